"""Processes of this machine: one for each core, with one thread each, for many small trainings; and how they end."""

import gc
import importlib
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from dissonance.errors import SettingsError

_PRELOAD = ("dissonance.loop", "dissonance.refine.policy_trainers", "dissonance.refine.reward")
"""What a training imports sooner or later; by name, since these stand above this module."""
_LOOK_EVERY = 1.0
"""Seconds between two looks at whether the parent is there."""


def worker_pool(most: int, workers: int | None = None) -> ProcessPoolExecutor:
    """Processes for at most so many tasks at once.

    Args:
        most: more than this are of no use.
        workers: how many; by default one for each core that this process may use.

    Raises:
        SettingsError: fewer than one.
    """
    if workers is not None and workers < 1:
        raise SettingsError(f"workers is {workers}: give at least 1")
    count = min(most, cores() if workers is None else workers)
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_alone)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _alone() -> None:
    """A thread for each process: at the size of tiny models a second one costs more than it brings.

    What the libraries hold for good is kept from the garbage collector: it is called whenever a model goes, and to walk
    through them takes longer than a step of training.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch

    for name in _PRELOAD:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone; without it, nothing would tell."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


def end_with_input() -> None:
    """End this process when its standard input does: whoever started it holds the other end of a pipe."""
    threading.Thread(target=_end_after_input, daemon=True).start()


def _end_after_input() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock Python wants when it ends
        pass
    os.write(2, b"dissonance: standard input has ended, and with it the run that this process belongs to\n")
    os._exit(1)
