"""A Hugging Face sequence classifier as a reward model or a cost model."""

import math
from collections.abc import Sequence

from dissonance.classifier import Classifier
from dissonance.config import RewardConfig
from dissonance.conversation_encoder import ROLE
from dissonance.errors import DataError
from dissonance.records import Message, Reward


class HFRewardModel:
    """The classifier that a config names, oriented so that higher is better: `cost` models are negated.

    Raises:
        ModelError: see `dissonance.classifier.Classifier`.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._name = config.model
        self._sign = -1.0 if config.kind == "cost" else 1.0
        self._classifier = Classifier(config)

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per pair conversations[i], completions[i], whatever the batches.

        What reads the same is scored once, so that rounding cannot break a tie.

        Raises:
            DataError: the model returned NaN or infinity.
        """
        encoded = self._classifier.encode(conversations, completions)
        read = [self._classifier.cut(ids) for ids in encoded]
        values = self._classifier.score(read)
        for value, text in zip(values, completions, strict=True):
            if not math.isfinite(value):
                raise DataError(f"{ROLE}: {self._name} gave {value} for {text[:60]!r}")
        rows = zip(encoded, read, values, strict=True)
        return [Reward(self._sign * value, truncated=kept != whole) for whole, kept, value in rows]
