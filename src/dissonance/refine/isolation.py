"""Training that depends on its seed alone, and leaves the process as it found it."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (trainers draw from all three), and give them back their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # it is the global state that is kept
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
