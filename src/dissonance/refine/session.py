"""What a policy's training needs around TRL: quiet, calling nobody, and leaving the process as it was."""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants

from dissonance.config import Tracker
from dissonance.errors import SettingsError
from dissonance.huggingface import quiet_transformers
from dissonance.refine.isolation import isolated

_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"


@contextmanager
def training_session(out: Path, seed: int) -> Iterator[None]:
    """Keep the libraries from talking and from calling home, and put back what they set.

    TensorBoard's files, where they are asked for, go to a folder beside `out`, unless its environment variable says
    otherwise.
    """
    telemetry, bars = huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, datasets.is_progress_bar_enabled()
    environment = dict(os.environ)
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.disable_progress_bars()
    os.environ.setdefault(_TENSORBOARD, str(out.parent / "tensorboard" / out.name))
    try:
        with isolated(seed), quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = telemetry
        if bars:
            datasets.enable_progress_bars()
        os.environ.clear()
        os.environ.update(environment)


def on_one_device(arguments: Any) -> Any:
    """A trainer's arguments, so that a process trains on one device, however many it sees.

    With more, Transformers would wrap the model in DataParallel, which TRL refuses.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # noqa: SLF001 - as Transformers' own trainer does
    return arguments


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise SettingsError if the package of a tracker is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"trackers: {name} is not installed: pip install {name}")
