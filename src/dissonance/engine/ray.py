r"""A round on a Ray cluster: every stage is a Ray Data pipeline over a pool of actors that have loaded its model.

    prompts -> windows -> tasks that plan -------> batches
    batches -> pool of policies ------> parts \
    batches -> pool of reward models -> parts  }-> windows -> conflicts -> the round's two tables

A batch is computed as `dissonance.engine.local` computes it, from the same plan and the same keyed uniforms, so that
the tables are the same. What an actor has done rests in the parts: an actor or a node that is lost costs the batches it
was at, and a run that was killed goes on where it was.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dissonance.config import AuditConfig, ModelConfig
from dissonance.engine.local import by_window_of, check_reward_model, load_model, stages_of
from dissonance.engine.pool import Pool, RayOptions, Shared, connect, ray_errors, tokens
from dissonance.errors import SettingsError
from dissonance.parts import Parts, check_storage, parts_of
from dissonance.progress import ProgressFactory
from dissonance.prompt_table import PromptTable
from dissonance.records import Prompt
from dissonance.stages import (
    SAMPLING,
    SCORING,
    STAGES,
    Batch,
    MeasuredWindow,
    Stage,
    compute,
    measure_window,
    plan_window,
    waiting,
    windows_of,
    write_round,
)
from dissonance.summary import ConflictTally

if TYPE_CHECKING:
    from ray import ObjectRef

_TO_A_SERVER = 32
"""Batches that an actor is given at once, at most, whose model is a server's: it is to have many requests at once."""


class RayEngine:
    """Measures rounds on a cluster.

    Raises:
        SettingsError: Ray is not installed, there is no cluster at the address, or no room in it for one worker.
    """

    def __init__(self, options: RayOptions | None = None) -> None:
        self._options = options or RayOptions()
        connect(self._options.address)
        self._pool = Pool(self._options)

    def resolved(self, section: ModelConfig) -> dict[str, Any]:
        """What `auto` stands for on a worker."""
        found: dict[str, Any] = self._pool.once(_resolved, section)
        return found

    def prepare(self, config: AuditConfig, prompts: Sequence[Prompt]) -> "RayRound":
        """Try the models on a worker, and plan every batch, before anything is written.

        Raises:
            SettingsError: the cluster has GPUs of which the settings say nothing, or a storage cannot be used.
            InputError: a model or a prompt cannot be used.
        """
        _check_devices(config, self._options)
        self._pool.environment = {**tokens(), **_keys(config)}
        if self._options.storage is not None:
            check_storage(self._options.storage)
        return RayRound(self._pool, _absolute(config), prompts, self._options.storage)

    def forget(self, folder: Path) -> None:
        """Remove the parts of a round whose tables stand."""
        parts_of(folder, self._options.storage).remove()
        Parts(folder / "parts").remove()


class RayRound:
    """An audit that has planned its batches before it writes anything."""

    def __init__(self, pool: Pool, config: AuditConfig, prompts: Sequence[Prompt], storage: str | None) -> None:
        pool.once(_try, config, prompts[0])
        self._pool, self._config, self._storage = pool, config, storage
        self._windows = _Windows.of(windows_of(prompts))
        refs = self._windows.refs
        share = math.ceil(len(refs) / pool.workers)
        starts = range(0, len(refs), share)
        planned = pool.calls(_plan, [(config, first, _Windows(refs[first : first + share])) for first in starts])
        self._batches = list(chain.from_iterable(planned))

    def measure(self, folder: Path, progress: ProgressFactory) -> dict[str, Any]:
        """Sample, score and measure: leaves `completions.parquet` and `prompts.parquet` in a round's folder."""
        parts, n, stages = parts_of(folder, self._storage), self._config.policy.n, stages_of(self._config)
        shared = Shared.of(parts.place) if isinstance(parts.place, Path) else None
        for stage in stages:
            left = waiting(parts, stage, self._batches)
            together = self._together(stage, len(left))
            batches = [left[first : first + together] for first in range(0, len(left), together)]
            needs = (stage.name, self._config, self._windows, parts, shared)
            with progress(stage.label, sum(len(batch.rows) for batch in left) * n, "completions") as advance:
                for done in self._pool.each(_Computer, needs, batches, gpus=True):
                    advance(done)
        jobs = list(by_window_of(self._batches).items())
        found = dict(self._pool.each(_Measurer, (self._config, self._windows, parts, shared), jobs, gpus=False))
        return write_round(folder, (_measured(parts, w, *found[w]) for w in range(len(found))))

    def _together(self, stage: Stage, batches: int) -> int:
        """How many batches an actor is given at once."""
        sections: Mapping[Stage, ModelConfig] = {SAMPLING: self._config.policy, SCORING: self._config.reward_model}
        if stage not in sections or sections[stage].server is None:
            return 1
        return min(_TO_A_SERVER, math.ceil(batches / self._pool.workers)) or 1


@dataclass(frozen=True)
class _Windows:
    """The prompts, which rest in the cluster's object store for as long as their driver holds them."""

    refs: "Sequence[ObjectRef[PromptTable]]"

    @classmethod
    def of(cls, windows: Iterable[PromptTable]) -> "_Windows":
        """Put them there."""
        import ray

        with ray_errors():
            return cls([ray.put(window) for window in windows])

    def __call__(self, number: int) -> PromptTable:
        """One of them, on whatever node this is."""
        import ray

        with ray_errors():
            return ray.get(self.refs[number])


class _Computer:
    """A stage's model, and what it has to do."""

    def __init__(self, stage: str, config: AuditConfig, windows: _Windows, parts: Parts, shared: Shared | None) -> None:
        if shared is not None:
            shared.check()
        self._stage, self._windows, self._parts, self._n = STAGES[stage], windows, parts, config.policy.n
        self._model = load_model(self._stage, config)

    def __call__(self, batches: Sequence[Batch]) -> int:
        # Ray computes anew what a lost node had returned; what it has stored is there.
        left = [one for one in batches if not self._parts.has(self._stage.name, one.window, one.number)]
        sum(compute(self._stage, self._model, left, self._windows, self._n, self._parts))
        return sum(len(batch.rows) for batch in batches) * self._n


_TABLES = ("measured-completions", "measured-prompts")


class _Measurer:
    def __init__(self, config: AuditConfig, windows: _Windows, parts: Parts, shared: Shared | None) -> None:
        if shared is not None:
            shared.check()
        self._config, self._windows, self._parts = config, windows, parts

    def __call__(self, item: tuple[int, list[Batch]]) -> tuple[int, tuple[Any, ...]]:
        w, batches = item
        config, stages = self._config, stages_of(self._config)
        found = measure_window(self._parts, stages, self._windows(w), batches, config.policy.n, config.likelihood)
        for name, table in zip(_TABLES, (found.completions, found.prompts), strict=True):
            self._parts.write(name, w, 0, table, 0.0)
        return w, (asdict(found.tally), found.seconds)


def _measured(parts: Parts, w: int, tally: dict[str, Any], seconds: dict[str, float]) -> MeasuredWindow:
    completions, prompts = (parts.read(name, w, 0).replace_schema_metadata(None) for name in _TABLES)
    return MeasuredWindow(completions, prompts, ConflictTally(**tally), seconds)


def _check_devices(config: AuditConfig, options: RayOptions) -> None:
    """Refuse to leave GPUs unused, or to share them unasked.

    Raises:
        SettingsError: the cluster has GPUs, and neither workers nor models are told what to do with them.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    devices = {one.device for one in (config.policy, config.reward_model) if one.server is None}
    if gpus and not options.gpus and "auto" in devices:
        raise SettingsError(f"the cluster has {gpus:g} GPUs: give --worker-gpus 1, or --device cpu")


def _resolved(section: ModelConfig) -> dict[str, Any]:
    from dissonance.huggingface import resolved

    return resolved(section)


def _try(config: AuditConfig, prompt: Prompt) -> None:
    check_reward_model(config.reward_model, prompt)
    for stage in stages_of(config):
        if stage is not SCORING:
            load_model(stage, config)


def _plan(config: AuditConfig, first: int, windows: _Windows) -> list[Batch]:
    """The batches of some windows, which begin with this one; on a worker, since the plan is by its device."""
    from dissonance.sampling import load_planner

    planner = load_planner(config.policy)
    return [batch for i in range(len(windows.refs)) for batch in plan_window(planner, first + i, windows(i))]


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
