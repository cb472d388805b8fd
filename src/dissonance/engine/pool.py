"""Work spread over a Ray cluster: a Ray Data pipeline over a pool of actors that each load what they need once.

Our errors come back as values, since Ray would wrap them; Ray's own become ours of one line.
"""

import logging
import os
import pickle
import platform
import re
import secrets
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dissonance import errors
from dissonance.errors import DissonanceError, SettingsError
from dissonance.parts import check_url

_log = logging.getLogger(__name__)
_ANSWERS_IN = 10.0
_BLOCKS = 8192
"""Blocks of a pipeline, at most: each is a task, and its bookkeeping."""
RESTARTS = 16
"""How often an actor that died is started again, and what it was at tried again: not for ever, it may be why."""


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """Where a round runs, and in how many pieces; decides no number of it."""

    address: str | None = None
    """Of a running cluster, `auto` or `host:6379`; None takes the one that RAY_ADDRESS names, else starts one here."""
    workers: int | None = None
    """Actors of a pool at most; by default as many as the cluster has room for."""
    cpus: float = 1.0
    """Cores of each."""
    gpus: float = 0.0
    """GPUs of each; less than 1 shares one."""
    storage: str | None = None
    """Where the parts rest, for nodes that share no disk: any address that fsspec knows, `s3://bucket/folder`. By
    default the run folder, which every node must then see."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise SettingsError(f"workers is {self.workers}: give at least 1")
        if self.storage is not None:
            check_url(self.storage)
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} of each worker is {getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class Shared:
    """A folder that every worker must see: on a disk of its own, what it left there would be lost to the others."""

    mark: Path

    @classmethod
    def of(cls, folder: Path) -> "Shared":
        """Leave a mark in a folder."""
        folder.mkdir(exist_ok=True)
        mark = folder / f".shared-{secrets.token_hex(8)}.tmp"
        mark.touch()
        return cls(mark)

    def check(self) -> None:
        """On a worker.

        Raises:
            SettingsError: the mark is not there.
        """
        if not self.mark.exists():
            raise SettingsError(
                f"a worker on {platform.node()} does not see {self.mark.parent}: choose an --out that every node sees, "
                "or, for an audit or a run, a --storage"
            )


class Pool:
    """Runs a class over items, in as many actors as there is room for."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self.workers = workers_of(options)
        self.environment = tokens()
        """What of this process's environment is secret: tokens, and the keys of servers that the settings name."""

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on a worker."""
        return self.calls(function, [arguments])[0]

    def calls(self, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Call a function with each of these as tasks, for which a worker need not start; what it gives, in order."""
        import ray

        options = self._options
        remote = ray.remote(_Each.once).options(num_cpus=options.cpus, num_gpus=options.gpus)
        with ray_errors():
            outcomes = ray.get([remote.remote(self.environment, function, each) for each in arguments])
        return [value_of(outcome) for outcome in outcomes]

    def each(self, worker: type, arguments: tuple[Any, ...], items: Sequence[Any], *, gpus: bool) -> Iterator[Any]:
        """What `worker(*arguments)` gives for each item, as they are done.

        Raises:
            DissonanceError: what the worker raised; what no worker could do, for want of actors or memory.
        """
        import ray
        from ray.data import ActorPoolStrategy
        from ray.util.annotations import RayDeprecationWarning

        if not items:
            return
        rows = [{"item": pickle.dumps(item)} for item in items]
        pool = ActorPoolStrategy(min_size=1, max_size=max(1, min(self.workers, len(rows))))
        options = self._options
        with warnings.catch_warnings():  # max_restarts and max_task_retries have no other road before Ray 2.64
            warnings.simplefilter("ignore", RayDeprecationWarning)
            data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
                _Each,
                batch_size=1,
                fn_constructor_args=(worker, arguments, self.environment),
                compute=pool,
                num_cpus=options.cpus,
                num_gpus=options.gpus if gpus else 0,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        done = 0
        with ray_errors():
            for row in data.iter_rows():
                yield value_of(pickle.loads(row["outcome"]))  # noqa: S301 - what our own worker gave
                done += 1
        if done != len(items):
            raise DissonanceError(f"Ray returned {done:,} of {len(items):,} pieces of work: run it again")


class _Each:
    """What a Ray actor runs: our errors come back as values, since Ray would wrap them."""

    def __init__(self, worker: type, arguments: tuple[Any, ...], environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self._worker, self._arguments = worker, arguments
        self._made: Any = None
        self._failed: tuple[str | None, Any] | None = None

    @staticmethod
    def once(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Call a function in a worker of its own."""
        os.environ.update(environment)
        return caught(function, *arguments)

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"outcome": [pickle.dumps(self._outcome(item)) for item in rows["item"]]}

    def _outcome(self, item: bytes) -> tuple[str | None, Any]:
        """After an error nothing more is computed: Ray hands over what a block gave when the block is done."""
        if self._failed is not None:
            return self._failed
        outcome = caught(self._one, item)
        if outcome[0] is not None:
            self._failed = outcome
        return outcome

    def _one(self, item: bytes) -> Any:
        if self._made is None:
            self._made = self._worker(*self._arguments)
        return self._made(pickle.loads(item))  # noqa: S301 - from our own driver


def connect(address: str | None) -> None:
    """Connect to a cluster, or start one on this machine.

    Raises:
        SettingsError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what our driver keeps as long as it lives
    try:
        import ray
        from ray.data import DataContext
    except ImportError as error:
        raise SettingsError("engine ray needs Ray: pip install 'dissonance[ray]'") from error
    if not ray.is_initialized():
        asked = address or os.environ.get("RAY_ADDRESS")
        _check_answers(asked)
        try:
            with _hushed():
                ray.init(
                    address=asked or "local", include_dashboard=None if asked else False, log_to_driver=False,
                    logging_level=logging.ERROR, runtime_env={"env_vars": _environment()},
                )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            failed = f"there is no Ray cluster at {asked}" if asked else "Ray cannot be started here"
            raise SettingsError(f"{failed}: {last_line(error)}") from error
    DataContext.get_current().enable_progress_bars = False  # ours says what was done
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on standard error, where Ray's core says what its log level is."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_answers(address: str | None) -> None:
    """Find out at once whether anything is at an address: Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or "://" in host or not port.isdecimal():  # auto, local, or what only Ray understands
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_IN).close()
    except (OSError, OverflowError) as error:
        raise SettingsError(f"there is no Ray cluster at {address}: {error}") from error


def _environment() -> dict[str, str]:
    """What the models' libraries were told here, for the workers."""
    known = ("HF_", "TOKENIZERS_", "TRANSFORMERS_")
    told = {name: value for name, value in os.environ.items() if name.startswith(known)}
    return {name: told[name] for name in told.keys() - tokens().keys()}


def tokens() -> dict[str, str]:
    """The secret ones of these, which go another way: Ray shows the others to whoever sees its dashboard."""
    return {name: value for name, value in os.environ.items() if name.startswith("HF_") and "TOKEN" in name}


def workers_of(options: RayOptions) -> int:
    """How many workers run at once, at most.

    Raises:
        SettingsError: the cluster has no room for one, and how many there are to be is not said.
    """
    import ray

    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    asked = {"CPU": options.cpus, "GPU": options.gpus}
    room = sum(
        int(min((node.get(name, 0.0) / share for name, share in asked.items() if share), default=1)) for node in nodes
    )
    if room < 1:
        wants = ", ".join(f"{share:g} {name}" for name, share in asked.items())
        largest = max((tuple(node.get(name, 0.0) for name in asked) for node in nodes), default=(0.0, 0.0))
        has = ", ".join(f"{value:g} {name}" for value, name in zip(largest, asked, strict=True))
        if options.workers is None:
            raise SettingsError(
                f"no node has room for a worker of {wants}: the largest has {has} (of a cluster that grows, say "
                "how many --workers there are to be)"
            )
        _log.warning("no node has room for a worker of %s yet: waiting for the cluster to grow", wants)
    return options.workers or room


def caught(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str | None, Any]:
    """On a worker: what a call gives, or the name and the message of our error."""
    try:
        return None, function(*arguments, **named)
    except DissonanceError as error:
        known = (kind.__name__ for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
        return next(known), str(error)
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        return DissonanceError.__name__, f"a worker failed: {type(error).__name__}: {last_line(error)}"


def value_of(outcome: tuple[str | None, Any]) -> Any:
    """What a call on a worker gave; its error is raised here."""
    kind, value = outcome
    if kind is not None:
        raise getattr(errors, kind)(value)
    return value


@contextmanager
def ray_errors() -> Iterator[None]:
    """Ray's errors are ours of one line."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise DissonanceError(f"Ray gave up: {last_line(error)}: what was done is kept, run it again") from error


def last_line(error: BaseException) -> str:
    """What an error says, where Ray puts it: behind its traceback."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
