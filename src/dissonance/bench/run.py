"""All cells of a benchmark, in as many processes as there are cores, and what they come to.

What is there already is not made again: a setting and a cell are named by all that decides them, so that a benchmark
that was killed, or given more seeds, budgets or strategies, plays only what is new.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.artifacts import locked, read_json, sweep, versions, write_json
from dissonance.bench.cell import Cell, baseline, cells_of, play
from dissonance.bench.config import BASELINE, BenchConfig, SeedSet
from dissonance.bench.detection import detect
from dissonance.bench.efficiency import efficiency_interval, mean_over_seeds
from dissonance.bench.setting import Place, load_setting, make_setting, place
from dissonance.callables import import_callable
from dissonance.engine.processes import worker_pool
from dissonance.errors import RunError, SettingsError
from dissonance.evaluate.statistics import Bootstrap, FloatArray, Interval
from dissonance.progress import ProgressFactory, quiet
from dissonance.report.bench import write_bench_report

MEASURES = ("gold_reward", "reward_accuracy")
_SETTING_STEPS = 15
"""A setting takes about as long as so many cells, for the time left."""


def bench(
    config: BenchConfig,
    out: Path | str,
    *,
    seeds: SeedSet = "confirmation",
    workers: int | None = None,
    executor: Callable[[int], Executor] | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Compare strategies at equal cost, and conflict as a predictor of the proxy's errors.

    Args:
        config: what is compared.
        out: gets settings/, cells/, `summary.json` and `report.html`.
        seeds: which of the config's sets.
        workers: processes; by default one for each core.
        executor: opens what runs at most so many settings and cells at once, in place of processes of this machine:
            `dissonance.engine.tasks.TaskPool`.
        progress: opens the progress of the settings and cells.

    Returns:
        `config`, `versions`; `seeds` and `feedback`, which set and which kind the rest is of; `cells`, a row for each;
        `baselines`, of each setting before anybody was asked, and `start`, their means; `table`, means over seeds, and
        each row's `lead`, the difference to the baseline with the first feedback at the same budget, seed by seed;
        `label_efficiency` and `label_efficiency_accuracy`, by task and strategy; `error_detection`, by task and metric,
        with `detection`, all that was measured of it.

    Raises:
        SettingsError: the config has no seeds of that set.
        RunError: `out` holds something else, another process is at it, or the file of a strategy was edited meanwhile.
    """
    out = Path(out).resolve()  # what runs a cell may stand in another folder
    places = _places(config, out, seeds)
    check_folder(out)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    (out / "settings").mkdir(exist_ok=True)
    with locked(out):
        for folder in (out, out / "cells", out / "settings"):
            sweep(folder)
        files = {cell: cell.file(config, out) for here in places for cell in cells_of(config, here)}
        _play_all(config, places, files, out, executor or partial(worker_pool, workers=workers), progress)
        summary = {
            "seeds": seeds,
            "feedback": next(iter(config.feedback)),
            "config": config.model_dump(mode="json"),
            **summarise(config, places, files),
            "versions": versions(),
        }
        write_json(out / "summary.json", summary)
        write_bench_report(out, summary)
    return summary


def check_folder(out: Path) -> None:
    """Refuse what is no benchmark's folder, before anything is written.

    Raises:
        RunError: it is a file, or a folder that holds something else.
    """
    if out.is_file():
        raise RunError(f"{out} is a file: --out names a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "cells").is_dir():
        raise RunError(f"{out} is there, and is no benchmark's folder: name another with --out")


def plan(config: BenchConfig, out: Path | str, seeds: SeedSet = "confirmation") -> dict[str, Any]:
    """What a benchmark would do: counts of settings and cells, and how many of them are there."""
    out = Path(out)
    check_folder(out)
    places = _places(config, out, seeds)
    cells = [cell for here in places for cell in cells_of(config, here)]
    return {
        "seeds": sorted({here.seed for here in places}),
        "settings": len(places),
        "settings_made": sum(_is_made(here) for here in places),
        "cells": len(cells),
        "cells_played": sum(cell.file(config, out).is_file() for cell in cells),
    }


def _places(config: BenchConfig, out: Path, seeds: SeedSet) -> list[Place]:
    """Every setting, seed by seed, if the config can be played."""
    chosen = getattr(config.seeds, seeds)
    if not chosen:
        raise SettingsError(f"seeds.{seeds} is empty: name some, or take the other set")
    for named in config.asked.values():
        if ":" in named:
            import_callable(named, "strategy")
    return [place(config, task, name, seed, out) for seed in chosen for name in config.worlds for task in config.tasks]


def _play_all(
    config: BenchConfig,
    places: Sequence[Place],
    files: Mapping[Cell, Path],
    out: Path,
    executor: Callable[[int], Executor],
    progress: ProgressFactory,
) -> None:
    """Make every setting; as each is done, play its cells, strategy by strategy."""
    missing = {here: [cell for cell in cells_of(config, here) if not files[cell].is_file()] for here in places}
    steps = {here: 0 if _is_made(here) else _SETTING_STEPS for here in places}
    places = [here for here in places if missing[here] or steps[here]]
    cells = sum(len(missing[here]) for here in places)
    if not places:
        return
    total = sum(steps[here] for here in places) + cells
    with progress("worlds and cells", total, "steps") as advance, executor(len(places) + cells) as pool:
        then: dict[Future[None], tuple[int, list[list[Cell]]]] = {}
        try:
            for here in places:
                groups = [list(group) for _, group in groupby(missing[here], key=lambda cell: cell.strategy)]
                then[pool.submit(_make, here, config)] = (steps[here], groups)
            while then:
                finished, _ = wait(then, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done, groups = then.pop(future)
                    advance(done)
                    for group in groups:
                        then[pool.submit(_play, {cell: files[cell] for cell in group}, config, out)] = (len(group), [])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise


def _make(here: Place, config: BenchConfig) -> None:
    make_setting(here, config)
    if not _is_made(here):
        write_json(here.folder / "detection.json", detect(load_setting(here), here.world))
        write_json(here.folder / "baseline.json", baseline(here))


def _is_made(here: Place) -> bool:
    """Whether all of a setting is there, of which the baseline comes last."""
    return (here.folder / "baseline.json").is_file()


def _play(files: Mapping[Cell, Path], config: BenchConfig, out: Path) -> None:
    for cell, file in files.items():
        found = play(cell, config)
        if cell.file(config, out) != file:
            raise RunError(
                f"the file of {config.asked[cell.strategy]} was edited while the benchmark ran: run it again, which "
                "plays its cells anew"
            )
        write_json(file, found)


def summarise(config: BenchConfig, places: Sequence[Place], files: Mapping[Cell, Path]) -> dict[str, Any]:
    """What the cells come to."""
    cells = [{**read_json(file), **cell.known} for cell, file in files.items()]
    baselines = [{**read_json(here.folder / "baseline.json"), **here.known} for here in places]
    detection = _detection(places, config.replicates)
    first = next(iter(config.worlds))
    return {
        "cells": cells,
        "baselines": baselines,
        "table": _table(config, cells),
        "start": {
            task: _means([row for row in baselines if row["task"] == task and row["world"] == first], config.replicates)
            for task in config.tasks
        },
        **_against_baseline(config, cells),
        "error_detection": {
            task: {row["metric"]: {"auc": row["auc"]} for row in detection if _is_main(row, task, first)}
            for task in config.tasks
        },
        "detection": detection,
    }


def _is_main(row: Mapping[str, Any], task: str, world: str) -> bool:
    most = row["most"]
    return (row["task"], row["world"], row["subset"], row["level"]) == (task, world, "all", "pair") and most


def _bootstrap(count: int, replicates: int) -> Bootstrap:
    return Bootstrap(np.arange(count), replicates, seed=0)


def _interval(values: Iterable[float | None], replicates: int) -> Interval | None:
    """Mean over seeds with its interval; None where nothing was measured."""
    known = [value for value in values if value is not None]
    return _bootstrap(len(known), replicates).mean(known) if known else None


def _means(rows: Sequence[Mapping[str, Any]], replicates: int) -> dict[str, Any]:
    names = (*MEASURES, "gold_reward_start", "gold_reward_best")
    return {name: _interval([row[name] for row in rows], replicates) for name in names}


_KEYS = ("task", "feedback", "strategy", "budget")


def _grouped(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """The cells of all seeds by `_KEYS`."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[tuple(cell[key] for key in _KEYS)].append(cell)
    return groups


def _table(config: BenchConfig, cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of every task, feedback, strategy and budget, and its lead over the baseline's."""
    measures = ("judgements", "pairs", *MEASURES, "shared_ignorance_share", "policy_gold_reward")
    groups = _grouped(cells)
    table = []
    for known, rows in groups.items():
        task, _, _, budget = known
        baseline = (task, next(iter(config.feedback)), BASELINE, budget)
        table.append(
            {
                **dict(zip(_KEYS, known, strict=True)),
                "seeds": len(rows),
                **{name: _interval([row[name] for row in rows], config.replicates) for name in measures},
                "lead": None if known == baseline else _lead(rows, groups.get(baseline), config.replicates),
            }
        )
    return table


def _lead(
    rows: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]] | None, replicates: int
) -> dict[str, Interval | None] | None:
    """Differences to the baseline's cells, seed by seed; None where there are none."""
    if baseline is None:
        return None
    of = {row["seed"]: row for row in baseline}
    return {name: _interval([row[name] - of[row["seed"]][name] for row in rows], replicates) for name in MEASURES}


def _against_baseline(config: BenchConfig, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Label efficiency by either measure, of the first feedback.

    A strategy that has not the baseline's cells, or only one that spends anything, has none.
    """
    first = next(iter(config.feedback))
    found: dict[str, Any] = {"label_efficiency": {}, "label_efficiency_accuracy": {}}
    for task in config.tasks:
        of_task = [cell for cell in cells if (cell["task"], cell["feedback"]) == (task, first)]
        curves = {name: _curve([cell for cell in of_task if cell["strategy"] == name]) for name in config.strategies}
        base = curves.get(BASELINE)
        if base is None:
            continue
        bootstrap = _bootstrap(len(base.seeds), config.replicates)
        others = {n: c for n, c in curves.items() if n != BASELINE and c is not None and c.seeds == base.seeds}
        for key, measure in zip(("label_efficiency", "label_efficiency_accuracy"), MEASURES, strict=True):
            found[key][task] = {
                name: efficiency_interval(
                    base.spent,
                    mean_over_seeds(base.of[measure]),
                    own.spent,
                    mean_over_seeds(own.of[measure]),
                    bootstrap,
                )
                for name, own in others.items()
            }
    return found


@dataclass(frozen=True)
class _Curve:
    """A strategy's results by budget and seed."""

    seeds: tuple[int, ...]
    budgets: tuple[int, ...]
    spent: tuple[float, ...]
    """(K,), mean judgements over the seeds: less than the budget where there was no more to ask."""
    of: Mapping[str, FloatArray]
    """(S, K), by measure."""


def _curve(cells: Sequence[Mapping[str, Any]]) -> _Curve | None:
    """None of fewer than two budgets that spend more and more."""
    by_place = {(cell["seed"], cell["budget"]): cell for cell in cells}
    seeds = tuple(sorted({seed for seed, _ in by_place}))
    spent = {
        budget: float(np.mean([by_place[seed, budget]["judgements"] for seed in seeds]))
        for budget in sorted({budget for _, budget in by_place})
    }
    budgets = [budget for k, budget in enumerate(spent) if spent[budget] > max([0.0, *list(spent.values())[:k]])]
    if len(budgets) < 2:
        return None
    of = {
        measure: np.array([[by_place[seed, budget][measure] for budget in budgets] for seed in seeds])
        for measure in MEASURES
    }
    return _Curve(seeds, tuple(budgets), tuple(spent[budget] for budget in budgets), of)


def _detection(places: Sequence[Place], replicates: int) -> list[dict[str, Any]]:
    """Means over seeds of every measure of error detection."""
    keys = ("subset", "n", "level", "metric")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    bands: dict[tuple[str, str, str], list[list[float]]] = defaultdict(list)
    most: dict[tuple[str, str], int] = {}
    for here in places:
        found = read_json(here.folder / "detection.json")
        for row in found["rows"]:
            groups[here.task, here.name, *(row[key] for key in keys)].append(row)
            most[here.task, here.name] = max(most.get((here.task, here.name), 0), row["n"])
        for metric, rates in found["bands"].items():
            if rates is not None:
                bands[here.task, here.name, metric].append(rates)
    rows = []
    for (task, world, subset, n, level, metric), of in groups.items():
        is_most = n == most[task, world]
        named = {"task": task, "world": world, "subset": subset, "n": n, "level": level, "metric": metric}
        measured = {key: _interval([row[key] for row in of], replicates) for key in ("auc", "correlation", "error")}
        row = {**named, "most": is_most, **measured}
        if is_most and subset == "all" and level == "pair":
            known_bands = bands[task, world, metric]
            row["deciles"] = np.mean(known_bands, axis=0).tolist() if known_bands else None
        rows.append(row)
    return rows
