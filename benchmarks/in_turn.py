"""What benchmarks that compare two ways of one piece of work have in common."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Clock = Callable[[], float]


def choose_clock(*, cpu_time: bool) -> Clock:
    """The clock to time with: the wall's, or this process's own seconds of CPU where others use the machine too.

    CPU time says how long it takes only with one thread.
    """
    return time.process_time if cpu_time else time.perf_counter


def conditions(arguments: argparse.Namespace) -> str:
    """What a table says of how it was timed."""
    timed = ", CPU time" if arguments.cpu_time else ""
    return f"{torch.get_num_threads()} threads, {arguments.repeats} repeats{timed}"


def in_turn(
    ways: Mapping[str, Callable[[], object]], repeats: int, now: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """The seconds of each way, `repeats` times each, in changing order: what else the machine does hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in sorted(ways, reverse=repeat % 2 == 1):
            start = now()
            ways[name]()
            seconds[name].append(now() - start)
    return seconds


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and the least and the largest."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:>9}   ({low} to {high})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """One for each repeat."""
    return [a / b for a, b in zip(above, below, strict=True)]
