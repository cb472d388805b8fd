"""A round in this process: batch after batch, one model in memory at a time."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dissonance.config import AuditConfig, ModelConfig, RewardConfig
from dissonance.parts import parts_of
from dissonance.progress import ProgressFactory
from dissonance.records import Prompt
from dissonance.stages import (
    REFERENCE,
    SAMPLING,
    SCORING,
    Batch,
    Stage,
    compute,
    measure_window,
    plan_window,
    waiting,
    windows_of,
    write_round,
)


class LocalEngine:
    """Measures rounds in this process."""

    def resolved(self, section: ModelConfig) -> dict[str, Any]:
        """What `auto` stands for here."""
        from dissonance.huggingface import resolved

        return resolved(section)

    def prepare(self, config: AuditConfig, prompts: Sequence[Prompt]) -> "LocalRound":
        """Load and try the models, so that a mistake is found out before anything is written.

        Raises:
            InputError: a model or a prompt cannot be used.
        """
        return LocalRound(config, prompts)

    def forget(self, folder: Path) -> None:
        """Remove the parts of a round whose tables stand."""
        parts_of(folder).remove()


class LocalRound:
    """An audit that has loaded what it needs before it writes anything."""

    def __init__(self, config: AuditConfig, prompts: Sequence[Prompt]) -> None:
        check_reward_model(config.reward_model, prompts[0])
        self._config, self._windows = config, windows_of(prompts)
        self._models = {SAMPLING: load_model(SAMPLING, config)}
        if config.policy.reference is not None:
            self._models[REFERENCE] = load_model(REFERENCE, config)
        planner = self._models[SAMPLING]
        self._batches = [batch for w, window in enumerate(self._windows) for batch in plan_window(planner, w, window)]

    def measure(self, folder: Path, progress: ProgressFactory) -> dict[str, Any]:
        """Sample, score and measure: leaves `completions.parquet` and `prompts.parquet` in a round's folder."""
        from dissonance.huggingface import free_memory

        parts, n = parts_of(folder), self._config.policy.n
        stages = stages_of(self._config)
        for stage in stages:
            model = self._models.pop(stage, None) or load_model(stage, self._config)
            left = waiting(parts, stage, self._batches)
            with progress(stage.label, sum(len(batch.rows) for batch in left) * n, "completions") as advance:
                for done in compute(stage, model, left, self._windows.__getitem__, n, parts):
                    advance(done)
            del model
            free_memory()
        by_window = by_window_of(self._batches)
        return write_round(
            folder,
            (
                measure_window(parts, stages, window, by_window[w], n, self._config.likelihood)
                for w, window in enumerate(self._windows)
            ),
        )


def stages_of(config: AuditConfig) -> tuple[Stage, ...]:
    """What a round computes before it is measured, in order."""
    return (SAMPLING, SCORING) if config.policy.reference is None else (SAMPLING, REFERENCE, SCORING)


def load_model(stage: Stage, config: AuditConfig) -> Any:
    """The model of a stage.

    Raises:
        ModelError: it cannot be used.
    """
    # PyTorch and Transformers are loaded here, so that measuring and selecting need not wait for them.
    from dissonance.rewards import load_reward_model
    from dissonance.sampling import HFReference, load_policy

    load: Mapping[Stage, Callable[[], Any]] = {
        SAMPLING: lambda: load_policy(config.policy, config.seed),
        REFERENCE: lambda: HFReference(config.policy, str(config.policy.reference)),
        SCORING: lambda: load_reward_model(config.reward_model),
    }
    return load[stage]()


def check_reward_model(config: RewardConfig, prompt: Prompt) -> None:
    """Score one text: a model that cannot is found out before the sampling, and leaves its memory to the policy."""
    from dissonance.huggingface import free_memory
    from dissonance.rewards import load_reward_model

    load_reward_model(config).score([prompt.messages], [prompt.messages[-1].content])
    free_memory()


def by_window_of(batches: Sequence[Batch]) -> Mapping[int, list[Batch]]:
    """The batches of each window."""
    found: dict[int, list[Batch]] = defaultdict(list)
    for batch in batches:
        found[batch.window].append(batch)
    return found
