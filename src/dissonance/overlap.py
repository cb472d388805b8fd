"""Batches of a model computed one after another, or several at once where the model can take them."""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, TypeVar

from dissonance.models import Concurrent

Item = TypeVar("Item")
Result = TypeVar("Result")


def overlapped(
    model: object, items: Iterable[Item], compute: Callable[[Item], Result]
) -> Generator[tuple[Item, Result]]:
    """Each item with its result, as it is done: in order, or, of a `Concurrent` model, by whichever is first.

    The first error ends it, and what is being computed then; so does `close`, for whoever takes no more results.
    """
    if not isinstance(model, Concurrent):
        for item in items:
            yield item, compute(item)
        return
    left = iter(items)
    pool = ThreadPoolExecutor(model.concurrency)
    running: dict[Future[Result], Item] = {}
    try:
        while True:
            for item in islice(left, model.concurrency - len(running)):
                running[pool.submit(compute, item)] = item
            if not running:
                return
            finished = wait(running, return_when=FIRST_COMPLETED).done
            for done in sorted(finished, key=lambda one: one.exception() is not None):  # what was computed comes first
                yield running.pop(done), done.result()
    finally:
        if running:
            _give_up(model, running)
        pool.shutdown()


def _give_up(model: Concurrent, running: Iterable[Future[Any]]) -> None:
    """End what is running; a call that begins only now is ended too."""
    waiting = set(running)
    for future in waiting:
        future.cancel()
    while waiting:
        model.cancel()
        waiting = wait(waiting, timeout=0.1).not_done
