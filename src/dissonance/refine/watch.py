"""What a policy's training is watched by: reward, KL, length and entropy, and when they say to stop.

A policy that has found a hole in its reward model gains reward without end; what gives it away is how far it is from
where it started, and the length of what it says.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from dissonance.errors import ModelError

WINDOW = 5
"""Steps whose mean decides: single batches are noisy."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Means over completions of the policy."""

    reward: float
    """Of the reward model, without penalties; higher is better."""
    kl: float
    """KL(policy || start policy) in nats per completion, estimated by log pi - log pi_start on the policy's own words;
    such an estimate can be below 0."""
    length: float
    """Tokens."""
    entropy: float
    """Nats per token."""
    unfinished: float
    """Share that ran into the limit of new tokens."""


def mean_measurement(rows: Sequence[Measurement]) -> Measurement:
    """Field by field."""
    names = [field.name for field in fields(Measurement)]
    return Measurement(**{name: sum(getattr(row, name) for row in rows) / len(rows) for name in names})


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a training is stopped; None for nowhere."""

    max_kl: float | None
    """Nats per completion."""
    max_length_ratio: float | None
    """To the start policy's mean length, either way: twice as long or half as long for 2."""

    def broken(self, now: Measurement, start: Measurement) -> str | None:
        """What has run away, in words, or None."""
        if not all(math.isfinite(value) for value in asdict(now).values()):
            return "a measurement is not a finite number"
        if self.max_kl is not None and now.kl > self.max_kl:
            return f"KL from the start policy is {now.kl:.1f} nats per completion, above max_kl {self.max_kl:g}"
        if self.max_length_ratio is not None:
            ratio = now.length / start.length
            if not 1 / self.max_length_ratio <= ratio <= self.max_length_ratio:
                return (
                    f"answers have {now.length:.1f} tokens, those of the start policy {start.length:.1f}: beyond "
                    f"max_length_ratio {self.max_length_ratio:g}"
                )
        return None


def check_reference(log_ratios: Sequence[float], lengths: Sequence[int], tolerance: float) -> None:
    """Raise ModelError unless policy and reference are one before the first step.

    Args:
        log_ratios: log pi - log pi_reference of each completion, nats.
        lengths: tokens of each.
        tolerance: nats per token that rounding may make.
    """
    differences = [abs(ratio) / length for ratio, length in zip(log_ratios, lengths, strict=True)]
    if not all(difference <= tolerance for difference in differences):  # NaN is not
        raise ModelError(
            f"policy: before the first step its answers differ from the KL reference's by up to {max(differences):.3g} "
            "nats per token, where 0 is right: the reference is not the start policy"
        )


class Watch(TrainerCallback):  # type: ignore[misc]
    """Writes the history, keeps the last good policy, and stops the training when something runs away.

    Args:
        limits: when to stop.
        check_every: steps between checks; a check measures the policy and, if all is well, keeps it.
        online: whether TRL's own logs measure the policy at each step.
        measure: measures the policy as it is now.
        begin: called with the first measurement before the first step.
        keep: called with the step to keep the policy of.
        advance: called with 1 after each step.
    """

    def __init__(
        self,
        limits: Limits,
        check_every: int,
        *,
        online: bool,
        measure: Callable[[], Measurement],
        begin: Callable[[], Measurement],
        keep: Callable[[int], None],
        advance: Callable[[int], None],
    ) -> None:
        self._limits, self._check_every, self._online = limits, check_every, online
        self._measure, self._begin, self._keep, self._advance = measure, begin, keep, advance
        self._recent: list[Measurement] = []
        self._losses: list[float] = []
        self.history: list[dict[str, Any]] = []
        """A row per measurement: `step`, the updates before it; the fields of Measurement; `loss` if there is one."""
        self.start: Measurement | None = None
        self.kept: tuple[int, Measurement] | None = None
        """The step and the measurement of the last good policy."""
        self.stopped: dict[str, Any] | None = None
        """The step and the reason of a stop."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Measure the start policy, and see that the reference is it."""
        self.start = self._begin()
        if not self._online:
            self.history.append({"step": 0, **asdict(self.start)})

    def on_step_end(self, _: Any, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        """Check now and then, and after the last step."""
        self._advance(1)
        if state.global_step % self._check_every == 0 or state.global_step == state.max_steps:
            self._check(state.global_step, control)

    def _check(self, step: int, control: TrainerControl) -> None:
        now = self._measure()
        if not self._online:
            loss = {"loss": sum(self._losses) / len(self._losses)} if self._losses else {}
            self.history.append({"step": step, **asdict(now), **loss})
            self._losses.clear()
        if self._stop(step, now, control):
            return
        self._keep(step)
        self.kept = (step, now)

    def on_log(
        self, _: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **__: Any
    ) -> None:
        """Take what TRL measured; its logs after a step are of the policy that the step began with."""
        logs = logs or {}
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))
        if not self._online or "reward" not in logs:
            return
        step, now = state.global_step - 1, from_logs(logs)
        self.history.append({"step": step, **asdict(now), "loss": float(logs.get("loss", math.nan))})
        self._recent = [*self._recent[1 - WINDOW :], now]
        self._stop(step, mean_measurement(self._recent), control)

    def _stop(self, step: int, now: Measurement, control: TrainerControl) -> bool:
        if self.start is None or self.stopped is not None:
            return self.stopped is not None
        reason = self._limits.broken(now, self.start)
        if reason is not None:
            self.stopped = {"step": step, "reason": reason}
            control.should_training_stop = True
        return reason is not None


def from_logs(logs: dict[str, Any]) -> Measurement:
    """TRL's logs of one step of RLOO or GRPO, whose KL is per token."""
    length = float(logs["completions/mean_length"])
    return Measurement(
        reward=float(logs[f"rewards/{REWARD}/mean"]),
        kl=float(logs["kl"]) * length,
        length=length,
        entropy=float(logs["entropy"]),
        unfinished=float(logs["completions/clipped_ratio"]),
    )


REWARD = "reward_model"
"""The name of the reward function in TRL's logs."""
