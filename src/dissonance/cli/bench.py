"""The command that compares strategies at equal cost."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dissonance.cli.common import Json, Quiet, Set, changed, progress_of, read_yaml, said, say
from dissonance.cli.engines import EngineName, RayAddress, WorkerCpus, WorkerGpus, ray_options
from dissonance.sections import parse_section

app = typer.Typer()

Development = Annotated[
    bool, typer.Option("--development", help="Take the config's development seeds instead of its confirmation seeds.")
]


@app.command()
def bench(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings, YAML.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to; by default CONFIG without .yaml.")] = None,
    changes: Set = None,
    development: Development = False,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes, or Ray tasks at once; default: all that fit.")
    ] = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the settings, say what would be done.")] = False,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Compare strategies at equal cost, in worlds whose gold is known. Goes on where it was.

    Example: dissonance bench benchmarks/label_efficiency.yaml --out efficiency
    """
    from dissonance import bench as benchmark  # its worlds take PyTorch a while to load

    settings = parse_section(benchmark.BenchConfig, changed(read_yaml(config), changes or ()))
    out = out or config.with_suffix("")
    seeds: Any = "development" if development else "confirmation"
    options = ray_options(engine, address=ray_address, cpus=worker_cpus, gpus=worker_gpus)
    options = None if options is None else replace(options, workers=workers)
    if dry_run:
        planned = benchmark.plan(settings, out, seeds)
        say(planned, as_json, [*_plan_lines(planned), *_notes(settings, len(planned["seeds"]))])
        return
    executor = None
    if options is not None:
        from dissonance.engine.tasks import TaskPool

        executor = partial(TaskPool, options, folder=out.resolve())
    found = benchmark.bench(
        settings, out, seeds=seeds, workers=workers, executor=executor, progress=progress_of(silent)
    )
    notes = _notes(settings, len({row["seed"] for row in found["baselines"]}))
    say(found, as_json, [*_lines(found), *notes, f"report: {out / 'report.html'}"])


def _notes(settings: Any, seeds: int) -> list[str]:
    """What a benchmark cannot say."""
    from dissonance.bench.config import BASELINE
    from dissonance.evaluate.statistics import LEAST_CLUSTERS

    notes = []
    if settings.strategies and (BASELINE not in settings.strategies or len(settings.budgets) < 2):
        notes.append(f"note: what a label is worth takes {BASELINE} among the strategies, and two budgets or more")
    if seeds < LEAST_CLUSTERS:
        notes.append(f"note: intervals take {LEAST_CLUSTERS} seeds or more")
    return notes


def _plan_lines(planned: Mapping[str, Any]) -> list[str]:
    return [
        f"seeds: {', '.join(map(str, planned['seeds']))}",
        f"settings: {planned['settings']:,}, of which {planned['settings_made']:,} are there",
        f"cells: {planned['cells']:,}, of which {planned['cells_played']:,} are there",
        "nothing was written",
    ]


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for task, start in found["start"].items():
        lines.append(f"{task}: gold reward {said(start['gold_reward_start'])} of a sampled answer")
        lines.append(f"  {'':24}{'judgements':10} {'gold reward':26}{'accuracy':26}lead in gold reward")
        lines.append(f"  nobody asked{'':23}{said(start['gold_reward']):26}{said(start['reward_accuracy'])}")
        for row in found["table"]:
            if row["task"] == task:
                name = f"{row['strategy']}, {row['feedback']}"
                lead = "" if row["lead"] is None else said(row["lead"]["gold_reward"])
                figures = f"{said(row['gold_reward']):26}{said(row['reward_accuracy']):26}"
                lines.append(f"  {name:28}{row['judgements']['mean']:6,.0f} {figures}{lead}".rstrip())
        for name, interval in found["label_efficiency"].get(task, {}).items():
            bound = "" if interval is None or interval["bound"] is None else f"{interval['bound']} "
            lines.append(f"  a label by {name} is worth {bound}{said(interval)} of random_pairs")
        for metric, one in found["error_detection"].get(task, {}).items():
            lines.append(f"  AUC of {metric} for the proxy's errors: {said(one['auc'])}")
    return lines
