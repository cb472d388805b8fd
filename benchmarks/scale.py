"""How time and memory grow with the number of prompts, stage by stage: here, and on a Ray cluster of several nodes.

audit      the built-in world's models over more and more prompts, each size in a process of its own. Peak memory is
           that of the process, from the moment a stage begins until the next one does; on Ray, of the driver, and
           beside it the largest any actor had
conflicts  `dissonance conflicts` over scored rows in a partitioned folder

python benchmarks/scale.py audit --prompts 1000 10000 100000 [--engine ray --nodes 3]
python benchmarks/scale.py conflicts --rows 1000000 10000000 100000000
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.config import AuditConfig, PolicyConfig, PromptsConfig, RewardConfig
from dissonance.measuring import LOCAL, audit
from dissonance.models import Engine
from dissonance.progress import Advance
from dissonance.sandbox import World, build_sandbox
from memory import peak, restart_peak

WORLD = World(task="helpfulness")
SHARD_ROWS, COMPLETIONS = 1_000_000, 8
OBJECT_STORE = 256 << 20
COMMAND = "import sys, memory; from dissonance.cli import run; assert not run(sys.argv[1:]); print(memory.peak())"


def main() -> None:
    arguments = _arguments()
    if arguments.child:
        measured = {"audit": _audit, "conflicts": _conflicts}[arguments.what]
        print(json.dumps(measured(arguments, Path(arguments.child))))
        return
    results = []
    for size in getattr(arguments, {"audit": "prompts", "conflicts": "rows"}[arguments.what]):
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            write = {"audit": _write_prompts, "conflicts": _write_scored}[arguments.what]
            write(Path(scratch), size)
            results.append({"size": size, **_in_child(arguments, Path(scratch))})
        print("\n".join(_lines(results[-1:], arguments.what)), file=sys.stderr, flush=True)
    print(json.dumps(results) if arguments.json else "\n".join(_lines(results, arguments.what)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["audit", "conflicts"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--nodes", type=int, default=3, help="of the Ray cluster, a core each")
    parser.add_argument("--scratch", help="a folder with room; default: the system's")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_child(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    options = {
        "child": scratch, "n": arguments.n, "max-new-tokens": arguments.max_new_tokens, "engine": arguments.engine,
        "nodes": arguments.nodes,
    }  # fmt: skip
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if arguments.engine == "ray" else None
    done = subprocess.run(
        [sys.executable, __file__, arguments.what, *given],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _write_prompts(folder: Path, count: int) -> None:
    """Two of the world's questions each: as long for any count, and all different."""
    sandbox = build_sandbox(WORLD)
    texts = [json.loads(line)["prompt"][0]["content"] for line in sandbox.prompts.read_text().splitlines()]
    pairs = (
        (texts[i], texts[(i + shift) % len(texts)]) for shift, i in product(range(1, len(texts)), range(len(texts)))
    )
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for i, (first, second) in enumerate(islice(pairs, count)):
            file.write(json.dumps({"id": f"p{i}", "prompt": f"{first} {second}"}) + "\n")


class Meter:
    """Seconds and peak memory of every stage; a `ProgressFactory`."""

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._name = "loading and planning"
        self._start()

    def _start(self) -> None:
        restart_peak()
        self._since = time.perf_counter()

    def next(self, name: str) -> None:
        """End a stage and begin another."""
        self.stages[self._name] = {"seconds": time.perf_counter() - self._since, "peak_mb": peak() / 1e6}
        self._name = name
        self._start()

    @contextmanager
    def __call__(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        """Begin a stage."""
        del total, unit
        self.next(label)
        yield lambda _: None
        self.next("loading the next" if label != "scoring" else "conflicts and report")


def _audit(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    pa.set_memory_pool(pa.system_memory_pool())  # as the command line does
    sandbox = build_sandbox(WORLD)
    config = AuditConfig(
        prompts=PromptsConfig(source=str(folder / "prompts.jsonl")),
        policy=PolicyConfig(
            model=str(sandbox.policy), n=arguments.n, max_new_tokens=arguments.max_new_tokens, dtype="float32"
        ),
        reward_model=RewardConfig(model=str(sandbox.reward_model), dtype="float32"),
    )
    with _ray(arguments.nodes) if arguments.engine == "ray" else nullcontext(LOCAL) as engine, _Actors() as actors:
        meter, start = Meter(), time.perf_counter()
        found = audit(config, folder / "run", meter, engine=engine)
        meter.next("end")
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_mb": max(stage["peak_mb"] for stage in meter.stages.values()),
        "actor_peak_mb": actors.peak / 1e6,
        "completions": found["completions"],
        "tokens": found["tokens"],
        "stages": meter.stages,
    }


@contextmanager
def _ray(nodes: int) -> Iterator[Engine]:
    import ray
    from ray.cluster_utils import Cluster

    from dissonance.engine.pool import RayOptions
    from dissonance.engine.ray import RayEngine

    cluster = Cluster()
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE, include_dashboard=False)
    try:
        yield RayEngine(RayOptions(address=cluster.address))
    finally:
        ray.shutdown()
        cluster.shutdown()


class _Actors:
    """The largest resident memory of any Ray actor, looked at four times a second."""

    def __enter__(self) -> Self:
        self.peak, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.25):
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.cmdline()[:1] and "MapWorker" in process.cmdline()[0]:
                        self.peak = max(self.peak, process.memory_info().rss)
                except psutil.Error:
                    continue


def _conflicts(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    arguments = ["conflicts", f"{folder / 'scored'}", "--out", f"{folder / 'run'}", "--json", "--quiet"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        cwd=Path(__file__).parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, (found, _, largest) = time.perf_counter() - start, done.stdout.rpartition("}")
    return {"seconds": seconds, "peak_mb": int(largest) / 1e6, "prompts": json.loads(found + "}")["prompts"]}


def _write_scored(folder: Path, rows: int) -> None:
    (folder / "scored").mkdir()
    for shard, first in enumerate(range(0, rows, SHARD_ROWS)):
        table = _scored(first, min(SHARD_ROWS, rows - first))
        pq.write_table(table, folder / "scored" / f"part-{shard:05d}.parquet")


def _scored(first: int, count: int) -> pa.Table:
    rng = np.random.default_rng(first)
    numbers = pc.cast(pa.array(np.arange(first, first + count) // COMPLETIONS), pa.string())
    return pa.table(
        {
            "prompt_id": pc.binary_join_element_wise("p", numbers, ""),
            "completion_id": np.arange(first, first + count) % COMPLETIONS,
            "logprob": -rng.gamma(4, 10, count),
            "reward": rng.normal(size=count),
            "n_tokens": rng.integers(1, 200, count),
        }
    )


def _lines(results: list[dict[str, Any]], what: str) -> list[str]:
    lines, of = [], {"audit": "prompts", "conflicts": "rows"}[what]
    for result in results:
        actors = f", actors up to {result['actor_peak_mb']:.0f} MB" if result.get("actor_peak_mb") else ""
        lines.append(f"{result['size']:11,} {of:8}{result['seconds']:9.1f} s {result['peak_mb']:7.0f} MB{actors}")
        for name, one in result.get("stages", {}).items():
            lines.append(f"    {name:24}{one['seconds']:9.1f} s {one['peak_mb']:7.0f} MB")
    pairs = list(pairwise(results))
    for a, b in [*pairs, (results[0], results[-1])] if len(pairs) > 1 else pairs:
        stages = "".join(
            f", {name} {_exponent(a, b, one['seconds'], b['stages'][name]['seconds']):.2f}"
            for name, one in a.get("stages", {}).items()
            if name in b["stages"]
        )
        lines.append(
            f"{a['size']:,} to {b['size']:,} {of}: peak memory grows by {b['peak_mb'] / a['peak_mb'] - 1:+.1%}, time "
            f"with exponent {_exponent(a, b, a['seconds'], b['seconds']):.2f}{stages}"
        )
    return lines


def _exponent(a: dict[str, Any], b: dict[str, Any], before: float, after: float) -> float:
    return math.log(after / before) / math.log(b["size"] / a["size"])


if __name__ == "__main__":
    main()
