"""Waiting for what is to happen, and not for a time."""

import time
from collections.abc import Callable
from typing import Any

import pytest


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What a condition gives, once it is true; a test in which it never is has failed."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            pytest.fail("it did not happen")
        time.sleep(0.05)
    return found
