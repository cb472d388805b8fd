"""Progress of a stage: a bar with rate and time left on a terminal, plain lines otherwise; always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Advance = Callable[[int], None]
_PLAIN_EVERY_SECONDS = 10.0


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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, advance=done)


@contextmanager
def _lines(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    start = said = time.monotonic()
    done = at_first = 0
    since = None
    """When the first were done: what comes before, such as the start of actors, does not come again."""

    def advance(more: int) -> None:
        nonlocal done, said, at_first, since
        done += more
        now = time.monotonic()
        if since is None:
            since, at_first = now, done
        if now - said >= _PLAIN_EVERY_SECONDS and done != total:
            said, line = now, _line(label, done, total, unit, now - start)
            if total is not None and done > at_first:
                line += f", {(total - done) * (now - since) / (done - at_first):,.0f} s left"
            print(line, file=sys.stderr, flush=True)

    yield advance
    print(_line(label, done, total, unit, time.monotonic() - start), file=sys.stderr, flush=True)


def _line(label: str, done: int, total: int | None, unit: str, seconds: float) -> str:
    of = "" if total is None else f"/{total:,}"
    return f"{label}: {done:,}{of} {unit}, {done / max(seconds, 1e-9):,.1f}/s, {seconds:,.0f} s"
