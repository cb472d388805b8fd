"""The conflict metrics against a loop over SciPy and NumPy, side by side.

    command   `dissonance conflicts`: from a Parquet file with a row per completion to a run folder with its report,
              in a process of its own, its start included
    metrics   PACS and Kendall-tau distance of arrays in memory

The loop takes minutes for a million prompts, so it is timed on a sample, in turns with the rest, and scaled. Each ratio
is of two timings that follow each other; the numbers must agree before any ratio is printed.

    python benchmarks/conflict.py --prompts 100000 --repeats 3
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from dissonance.conflict import conflicts

FloatArray = npt.NDArray[np.float64]
Scores = tuple[FloatArray, FloatArray]  # rewards and logprobs, (P, N) each

_CHUNK = 50_000


@dataclass(frozen=True)
class Timing:
    """One thing against the loop, over the repeats."""

    seconds: float
    """Median."""

    prompts_per_second: float
    loop_seconds: float
    """Median, scaled to all prompts."""

    ratio: float
    """Median of loop / this."""

    ratio_min: float
    ratio_max: float


def scipy_loop(rewards: FloatArray, logprobs: FloatArray) -> tuple[FloatArray, FloatArray]:
    """PACS (P, N) and K (P,), prompt by prompt, as one writes it without this package."""
    pacs, distance = np.empty_like(rewards), np.empty(len(rewards))
    for p, (r, ll) in enumerate(zip(rewards, logprobs, strict=True)):
        pacs[p] = (r - r.mean()) / r.std() - (ll - ll.mean()) / ll.std()
        distance[p] = (1 - stats.kendalltau(r, ll).statistic) / 2
    return pacs, distance


def scores(prompts: int, n: int, seed: int) -> Scores:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(prompts, n)), -rng.gamma(5, 10, size=(prompts, n))


def write_scored(path: Path, prompts: int, n: int) -> None:
    """Write the rows a chunk at a time: a parent of large memory would pass for a child of large memory."""
    with pq.ParquetWriter(path, scored_table(0, 0, n).schema) as writer:
        for start in range(0, prompts, _CHUNK):
            writer.write_table(scored_table(start, min(_CHUNK, prompts - start), n))


def scored_table(start: int, prompts: int, n: int) -> pa.Table:
    rewards, logprobs = scores(prompts, n, seed=start)
    ids = pa.array([f"prompt-{i:08d}" for i in range(start, start + prompts)], pa.string())
    return pa.table(
        {
            "prompt_id": ids.take(pa.array(np.repeat(np.arange(prompts), n))),
            "completion_id": np.tile(np.arange(n, dtype=np.int32), prompts),
            "logprob": logprobs.ravel(),
            "reward": rewards.ravel(),
        }
    )


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(work: Callable[[], object], sample: Scores, prompts: int, repeats: int) -> Timing:
    scale = prompts / len(sample[0])
    pairs = [(seconds(work), scale * seconds(lambda: scipy_loop(*sample))) for _ in range(repeats)]
    ratios = [loop / own for own, loop in pairs]
    own, loop = np.median(pairs, axis=0).tolist()
    return Timing(own, prompts / own, loop, float(np.median(ratios)), min(ratios), max(ratios))


def time_command(folder: Path, sample: Scores, options: argparse.Namespace) -> Timing:
    source, run = folder / "scored.parquet", folder / "run"
    write_scored(source, options.prompts, options.n)
    command = [sys.executable, "-m", "dissonance", "conflicts", str(source), "--quiet", "--out"]

    def work() -> None:
        shutil.rmtree(run, ignore_errors=True)  # a finished run would only be read again
        subprocess.run([*command, str(run)], check=True, stdout=subprocess.DEVNULL)

    timing = compare(work, sample, options.prompts, options.repeats)
    tables = run / "round-000"
    distance = pq.read_table(tables / "prompts.parquet", columns=["kendall_tau_distance"]).slice(0, len(sample[0]))
    pacs = pq.read_table(tables / "completions.parquet", columns=["pacs"]).slice(0, sample[0].size)
    check(pacs["pacs"].to_numpy(), distance["kendall_tau_distance"].to_numpy(), sample)
    return timing


def time_metrics(sample: Scores, options: argparse.Namespace) -> Timing:
    rewards, logprobs = (np.tile(scored, (options.prompts // len(scored) + 1, 1)).ravel() for scored in sample)
    offsets = np.arange(options.prompts + 1) * options.n
    rewards, logprobs = rewards[: offsets[-1]], logprobs[: offsets[-1]]
    found = conflicts(rewards, logprobs, offsets)
    check(found.pacs[: sample[0].size], found.kendall_tau_distance[: len(sample[0])], sample)
    return compare(lambda: conflicts(rewards, logprobs, offsets), sample, options.prompts, options.repeats)


def check(pacs: FloatArray, distance: FloatArray, sample: Scores) -> None:
    expected_pacs, expected_distance = scipy_loop(*sample)
    np.testing.assert_allclose(pacs, expected_pacs.ravel(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-12, atol=1e-12)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--n", type=int, default=8, help="completions per prompt")
    parser.add_argument("--sample", type=int, default=2_000, help="prompts the loop is timed on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = parse()
    size = min(options.sample, options.prompts, _CHUNK)
    rewards, logprobs = scores(min(_CHUNK, options.prompts), options.n, seed=0)  # the first chunk of the file
    sample = (rewards[:size], logprobs[:size])
    with tempfile.TemporaryDirectory() as folder:
        command = time_command(Path(folder), sample, options)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    timings = {"metrics": time_metrics(sample, options), "command": command}
    if options.json:
        result = {name: asdict(timing) for name, timing in timings.items()}
        print(json.dumps({"prompts": options.prompts, "n": options.n, "command_peak_bytes": peak, **result}))
        return
    print(f"{options.prompts:,} prompts x {options.n}; the loop timed on {size:,} prompts, {options.repeats} repeats")
    print(f"{'':10}{'seconds':>10}{'prompts/s':>12}{'loop, s':>10}{'ratio':>8}   min .. max")
    for name, t in timings.items():
        spread = f"{t.ratio_min:.0f} .. {t.ratio_max:.0f}"
        print(f"{name:10}{t.seconds:10.2f}{t.prompts_per_second:12,.0f}{t.loop_seconds:10.0f}{t.ratio:8.0f}   {spread}")
    print(f"the command's peak memory: {peak / 2**20:,.0f} MiB; the same numbers as the loop's")


if __name__ == "__main__":
    main()
