r"""A round on a Ray cluster: every stage is a Ray Data pipeline over a pool of actors that have loaded its model.

    prompts -> windows -> plan ------------------> batches
    batches -> pool of policies ------> parts \
    batches -> pool of reward models -> parts  }-> windows -> conflicts -> the round's two tables

A batch is computed as `dissonance.engine.local` computes it, from the same plan and the same keyed uniforms, so that
the tables are the same. What an actor has done rests in the parts: an actor or a node that is lost costs the batches it
was at, and a run that was killed goes on where it was.
"""

import logging
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dissonance import errors
from dissonance.config import AuditConfig, ModelConfig
from dissonance.engine.local import by_window_of, check_reward_model, load_model, stages_of
from dissonance.errors import DissonanceError, SettingsError
from dissonance.parts import Parts, check_storage, parts_of
from dissonance.progress import ProgressFactory
from dissonance.prompt_table import PromptTable
from dissonance.records import Prompt
from dissonance.stages import (
    STAGES,
    Batch,
    MeasuredWindow,
    compute,
    measure_window,
    plan_window,
    waiting,
    windows_of,
    write_round,
)
from dissonance.summary import ConflictTally

_BLOCKS = 8192
"""Blocks of a pipeline, at most: each is a task, and its bookkeeping."""
_RESTARTS = 16
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
        for name in ("cpus", "gpus"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} of each worker is {getattr(self, name)}: give 0 or more")


class RayEngine:
    """Measures rounds on a cluster.

    Raises:
        SettingsError: Ray is not installed, there is no cluster at the address, or no room in it for one worker.
    """

    def __init__(self, options: RayOptions = RayOptions()) -> None:
        self._options = options
        connect(options.address)
        self._pool = _Pool(options)

    def resolved(self, section: ModelConfig) -> dict[str, Any]:
        """What `auto` stands for on a worker."""
        found: dict[str, Any] = self._pool.once(_resolved, section)
        return found

    def prepare(self, config: AuditConfig, prompts: Sequence[Prompt]) -> "RayRound":
        """Try the models on a worker, and plan every batch, before anything is written.

        Raises:
            InputError: a model or a prompt cannot be used.
        """
        self._pool.environment = _keys(config)
        if self._options.storage is not None:
            check_storage(self._options.storage)
        return RayRound(self._pool, _absolute(config), prompts, self._options.storage)

    def forget(self, folder: Path) -> None:
        """Remove the parts of a round whose tables stand."""
        parts_of(folder, self._options.storage).remove()
        Parts(folder / "parts").remove()


class RayRound:
    """An audit that has planned its batches before it writes anything."""

    def __init__(self, pool: "_Pool", config: AuditConfig, prompts: Sequence[Prompt], storage: str | None) -> None:
        pool.check_devices(config)
        pool.once(_try, config, prompts[0])
        self._pool, self._config, self._storage = pool, config, storage
        self._windows = windows_of(prompts)
        planned = pool.each(_Planner, (config,), list(enumerate(self._windows)), gpus=True)  # by whose device
        by_window = dict(planned)
        self._batches = [batch for w in range(len(self._windows)) for batch in by_window[w]]

    def measure(self, folder: Path, progress: ProgressFactory) -> dict[str, Any]:
        """Sample, score and measure: leaves `completions.parquet` and `prompts.parquet` in a round's folder."""
        parts, n, stages = parts_of(folder, self._storage), self._config.policy.n, stages_of(self._config)
        for stage in stages:
            left = waiting(parts, stage, self._batches)
            with progress(stage.label, sum(len(batch.prompts) for batch in left) * n, "completions") as advance:
                for done in self._pool.each(_Computer, (stage.name, self._config, parts), left, gpus=True):
                    advance(done)
        by_window = by_window_of(self._batches)
        jobs = [(w, window, by_window[w]) for w, window in enumerate(self._windows)]
        found = dict(self._pool.each(_Measurer, (self._config, parts), jobs, gpus=False))
        return write_round(folder, (_measured(parts, w, *found[w]) for w in range(len(self._windows))))


class _Pool:
    """Runs a class over items, in as many actors as there is room for."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._workers = workers_of(options)
        self.environment: dict[str, str] = {}
        """What the settings name of this process's environment: keys of servers."""

    def check_devices(self, config: AuditConfig) -> None:
        """Refuse to leave GPUs unused, or to share them unasked.

        Raises:
            SettingsError: the cluster has GPUs, and neither workers nor models are told what to do with them.
        """
        import ray

        gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
        if gpus and not self._options.gpus and "auto" in {config.policy.device, config.reward_model.device}:
            raise SettingsError(f"the cluster has {gpus:g} GPUs: give --worker-gpus 1, or --device cpu")

    def once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on a worker."""
        import ray

        options = self._options
        remote = ray.remote(_Each.once).options(num_cpus=options.cpus, num_gpus=options.gpus)
        with _ray_errors():
            outcome = ray.get(remote.remote(self.environment, function, arguments))
        return value_of(outcome)

    def each(self, worker: type, arguments: tuple[Any, ...], items: Sequence[Any], *, gpus: bool) -> Iterator[Any]:
        """What `worker(*arguments)` gives for each item, as they are done.

        Raises:
            DissonanceError: what the worker raised; what no worker could do, for want of actors or memory.
        """
        import ray
        from ray.data import ActorPoolStrategy

        if not items:
            return
        rows = [{"item": pickle.dumps(item)} for item in items]
        pool = ActorPoolStrategy(min_size=1, max_size=max(1, min(self._workers, len(rows))))
        options = self._options
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), _BLOCKS)).map_batches(
            _Each,
            batch_size=1,
            fn_constructor_args=(worker, arguments, self.environment),
            compute=pool,
            num_cpus=options.cpus,
            num_gpus=options.gpus if gpus else 0,
            max_restarts=_RESTARTS,
            max_task_retries=_RESTARTS,
        )
        done = 0
        with _ray_errors():
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


class _Planner:
    def __init__(self, config: AuditConfig) -> None:
        from dissonance.sampling import load_planner

        self._planner = load_planner(config.policy)

    def __call__(self, item: tuple[int, PromptTable]) -> tuple[int, list[Batch]]:
        return item[0], plan_window(self._planner, *item)


class _Computer:
    """A stage's model, and what it has to do."""

    def __init__(self, stage: str, config: AuditConfig, parts: Parts) -> None:
        self._stage, self._parts, self._n = STAGES[stage], parts, config.policy.n
        self._model = load_model(self._stage, config)

    def __call__(self, batch: Batch) -> int:
        # Ray computes anew what a lost node had returned; what it has stored is there.
        if not self._parts.has(self._stage.name, batch.window, batch.number):
            sum(compute(self._stage, self._model, [batch], self._n, self._parts))
        return len(batch.prompts) * self._n


_TABLES = ("measured-completions", "measured-prompts")


class _Measurer:
    def __init__(self, config: AuditConfig, parts: Parts) -> None:
        self._config, self._parts = config, parts

    def __call__(self, item: tuple[int, PromptTable, list[Batch]]) -> tuple[int, tuple[Any, ...]]:
        w, window, batches = item
        config = self._config
        found = measure_window(self._parts, stages_of(config), window, batches, config.policy.n, config.likelihood)
        for name, table in zip(_TABLES, (found.completions, found.prompts), strict=True):
            self._parts.write(name, w, 0, table, 0.0)
        return w, (asdict(found.tally), found.seconds)


def _measured(parts: Parts, w: int, tally: dict[str, Any], seconds: dict[str, float]) -> MeasuredWindow:
    completions, prompts = (parts.read(name, w, 0).replace_schema_metadata(None) for name in _TABLES)
    return MeasuredWindow(completions, prompts, ConflictTally(**tally), seconds)


def caught(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[str | None, Any]:
    """On a worker: what a call gives, or the name and the message of our error."""
    try:
        return None, function(*arguments, **named)
    except DissonanceError as error:
        known = (kind.__name__ for kind in type(error).__mro__ if vars(errors).get(kind.__name__) is kind)
        return next(known), str(error)
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        return DissonanceError.__name__, f"a worker failed: {type(error).__name__}: {_last_line(error)}"


def value_of(outcome: tuple[str | None, Any]) -> Any:
    """What a call on a worker gave; its error is raised here."""
    kind, value = outcome
    if kind is not None:
        raise getattr(errors, kind)(value)
    return value


def _resolved(section: ModelConfig) -> dict[str, Any]:
    from dissonance.huggingface import resolved

    return resolved(section)


def _try(config: AuditConfig, prompt: Prompt) -> None:
    check_reward_model(config.reward_model, prompt)
    for stage in stages_of(config):
        load_model(stage, config)


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
        try:
            ray.init(
                address=address, include_dashboard=None if address else False, log_to_driver=False,
                logging_level=logging.ERROR, runtime_env={"env_vars": _environment()},
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            asked = address or os.environ.get("RAY_ADDRESS")
            raise SettingsError(f"there is no Ray cluster at {asked}: {_last_line(error)}") from error
    DataContext.get_current().enable_progress_bars = False  # ours says what was done
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _environment() -> dict[str, str]:
    """What the models' libraries were told here, for the workers."""
    known = ("HF_", "TOKENIZERS_", "TRANSFORMERS_")
    return {name: value for name, value in os.environ.items() if name.startswith(known)}


def workers_of(options: RayOptions) -> int:
    """How many workers run at once, at most.

    Raises:
        SettingsError: the cluster has no room for one.
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
        raise SettingsError(f"no node has room for a worker of {wants}: the largest has {has}")
    return options.workers or room


def _absolute(config: AuditConfig) -> AuditConfig:
    """The models by their whole paths: a worker may stand in another folder."""

    def whole(section: ModelConfig) -> dict[str, str]:
        named = {name: getattr(section, name, None) for name in ("model", "adapter", "reference")}
        return {
            name: str(Path(value).expanduser().resolve())
            for name, value in named.items()
            if value is not None and Path(value).expanduser().exists()
        }

    sections = {"policy": config.policy, "reward_model": config.reward_model}
    return config.model_copy(update={name: of.model_copy(update=whole(of)) for name, of in sections.items()})


def _keys(config: AuditConfig) -> dict[str, str]:
    """The keys of the servers that the settings name, for the workers."""
    servers = (config.policy.server, config.reward_model.server)
    names = [server.api_key_env for server in servers if server is not None and server.api_key_env is not None]
    return {name: os.environ[name] for name in names if name in os.environ}


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Ray's errors are ours of one line."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise DissonanceError(f"Ray gave up: {_last_line(error)}: what was done is kept, run it again") from error


def _last_line(error: BaseException) -> str:
    """What an error says, where Ray puts it: behind its traceback."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
