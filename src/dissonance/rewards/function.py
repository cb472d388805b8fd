"""Any Python callable as a reward model."""

import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from dissonance.callables import import_callable
from dissonance.config import RewardConfig
from dissonance.errors import DataError, ModelError
from dissonance.records import Message, Reward


class FunctionRewardModel:
    """`module:callable`, called as callable(prompts=[[{"role", "content"}, ...], ...], completions=["...", ...]).

    It returns one number per completion, as TRL's reward functions do; the current folder is searched for the module.

    Raises:
        ModelError: there is no such module or callable.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._name, self._sign = config.model, -1.0 if config.kind == "cost" else 1.0
        self._function = import_callable(config.model, "reward model")

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per completion.

        Raises:
            DataError: the callable returned another number of values, or one that is not a finite number.
        """
        prompts = [[{"role": m.role, "content": m.content} for m in messages] for messages in conversations]
        try:
            with redirect_stdout(sys.stderr):
                values = list(self._function(prompts=prompts, completions=list(completions)))
        except Exception as error:  # whatever the user's function raises
            raise ModelError(f"reward model: {self._name} failed: {error!r}") from error
        if len(values) != len(completions):
            raise DataError(f"{self._name} returned {len(values)} rewards for {len(completions)} completions")
        return [Reward(self._sign * self._number(v, text)) for v, text in zip(values, completions, strict=True)]

    def _number(self, value: object, completion: str) -> float:
        try:
            number = float(value)  # type: ignore[arg-type]  # tensors and NumPy scalars convert too
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{self._name} returned {value!r} for {completion[:60]!r}: rewards must be finite numbers")
        return number
