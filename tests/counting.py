"""How much work a call is, counted in calls of functions: the same on every machine, as its time is not."""

import cProfile
from collections.abc import Callable


def calls_of(work: Callable[[], object]) -> int:
    """How many calls of functions, Python's own and those written in C, some work takes."""
    with cProfile.Profile() as profile:
        work()
    return sum(entry.callcount for entry in profile.getstats())
