"""Progress of a stage: a bar with rate and time left on a terminal, plain lines otherwise; always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]
_PLAIN_EVERY_SECONDS = 10.0
_RATE_OVER_SECONDS = 600.0  # a batch of a large model takes longer than rich's 30


class ProgressFactory(Protocol):
    """Opens the progress of one stage, which calls what it gets with the number of items done since the last call."""

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Advance]:
        """`total` is None where it is not known beforehand."""
        ...


@contextmanager
def quiet(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Say nothing."""
    del label, total, unit
    yield lambda _: None


@contextmanager
def console(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    """A bar on a terminal, a line every ten seconds otherwise."""
    with (_bar if sys.stderr.isatty() else _lines)(label, total, unit) as advance:
        yield advance


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.1f} {self._unit}/s")


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    with _progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, advance=done)


@contextmanager
def _lines(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    start = said = time.monotonic()
    bar = _progress(disable=True)
    bar.add_task(label, total=total)
    [task] = bar.tasks

    def line(now: float, speed: float | None) -> str:
        of = "" if total is None else f"/{total:,}"
        rate = task.completed / max(now - start, 1e-9) if speed is None else speed
        return f"{label}: {task.completed:,.0f}{of} {unit}, {rate:,.1f}/s, {now - start:,.0f} s"

    def advance(more: int) -> None:
        nonlocal said
        bar.update(task.id, advance=more)
        now = time.monotonic()
        if now - said >= _PLAIN_EVERY_SECONDS and not task.finished:
            said = now
            left = "" if task.time_remaining is None else f", {task.time_remaining:,.0f} s left"
            print(line(now, task.speed) + left, file=sys.stderr, flush=True)

    yield advance
    print(line(time.monotonic(), None), file=sys.stderr, flush=True)


def _progress(*columns: ProgressColumn, **options: Any) -> Progress:
    """With the rate since the first items were done: what comes before, such as the start of actors, comes once."""
    return Progress(*columns, speed_estimate_period=_RATE_OVER_SECONDS, get_time=time.monotonic, **options)
