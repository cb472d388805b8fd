"""How time and memory grow with the number of prompts: an audit with the built-in world's models, stage by stage.

Every size is audited in a process of its own. Peak memory is that of the process, from the moment a stage begins until
the next one does.

    python benchmarks/scale.py --sizes 1000 10000 100000
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

from dissonance.config import AuditConfig, PolicyConfig, PromptsConfig, RewardConfig
from dissonance.measuring import audit
from dissonance.progress import Advance
from dissonance.sandbox import World, build_sandbox

WORLD = World(task="helpfulness")


def main() -> None:
    arguments = _arguments()
    if arguments.audit:
        print(json.dumps(_audit(arguments)))
        return
    build_sandbox(WORLD)
    results = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(_in_child(arguments, size, Path(scratch)))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results) if arguments.json else "\n".join(_lines(results)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--audit", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_child(arguments: argparse.Namespace, size: int, scratch: Path) -> dict[str, Any]:
    _write_prompts(scratch / "prompts.jsonl", size)
    options = {"audit": scratch, "n": arguments.n, "max-new-tokens": arguments.max_new_tokens}
    command = [sys.executable, __file__, *(str(x) for name, value in options.items() for x in (f"--{name}", value))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"prompts": size, **json.loads(done.stdout)}


def _write_prompts(path: Path, count: int) -> None:
    """Conversations of two of the world's questions: as long for any count, and all different."""
    sandbox = build_sandbox(WORLD)
    texts = [json.loads(line)["prompt"][0]["content"] for line in sandbox.prompts.read_text().splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for i, (first, second) in enumerate(islice(_pairs(texts), count)):
            row = {"id": f"p{i}", "prompt": [{"role": "user", "content": f"{first} {second}"}]}
            file.write(json.dumps(row) + "\n")


def _pairs(texts: list[str]) -> Iterator[tuple[str, str]]:
    """Every two texts, neighbours last, so that any beginning has its texts evenly."""
    for shift, i in product(range(1, len(texts)), range(len(texts))):
        yield texts[i], texts[(i + shift) % len(texts)]


class Meter:
    """Seconds and peak memory of every stage; a `ProgressFactory`."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._name = "loading"
        self._start()

    def _start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # Linux keeps the peak itself; 5 starts it anew
        self._since = time.perf_counter()

    def next(self, name: str) -> None:
        """End a stage and begin another."""
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
        self.stages[self._name] = {"seconds": time.perf_counter() - self._since, "peak_mb": peak / 1e6}
        self._name = name
        self._start()

    @contextmanager
    def __call__(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Begin a stage."""
        del total, unit
        self.next(label)
        yield lambda _: None
        self.next(f"after {label}")


def _audit(arguments: argparse.Namespace) -> dict[str, Any]:
    sandbox, folder = build_sandbox(WORLD), Path(arguments.audit)
    config = AuditConfig(
        prompts=PromptsConfig(source=str(folder / "prompts.jsonl")),
        policy=PolicyConfig(
            model=str(sandbox.policy), n=arguments.n, max_new_tokens=arguments.max_new_tokens, dtype="float32"
        ),
        reward_model=RewardConfig(model=str(sandbox.reward_model), dtype="float32"),
    )
    meter, start = Meter(), time.perf_counter()
    found = audit(config, folder / "run", meter)
    meter.next("end")
    return {
        "seconds": time.perf_counter() - start,
        "peak_mb": max(stage["peak_mb"] for stage in meter.stages.values()),
        "tokens": found["tokens"],
        "stages": meter.stages,
    }


def _lines(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        lines.append(f"{result['prompts']:9,} prompts {result['seconds']:9.1f} s  {result['peak_mb']:7.0f} MB")
        lines += [
            f"    {name:24}{one['seconds']:9.1f} s  {one['peak_mb']:7.0f} MB" for name, one in result["stages"].items()
        ]
    for a, b in pairwise(results):
        growth = math.log(b["seconds"] / a["seconds"]) / math.log(b["prompts"] / a["prompts"])
        lines.append(
            f"{a['prompts']:,} to {b['prompts']:,} prompts: time grows with exponent {growth:.2f}, peak memory by "
            f"{b['peak_mb'] / a['peak_mb'] - 1:+.1%}"
        )
    return lines


if __name__ == "__main__":
    main()
