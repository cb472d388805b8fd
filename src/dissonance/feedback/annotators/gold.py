"""A reward model as annotator: exact and tireless; a second model, or a callable."""

import math
from dataclasses import dataclass

from dissonance.errors import SettingsError
from dissonance.feedback.annotators.rewards import RewardedAnnotator, RewardedSettings, ranks_by
from dissonance.records import AnnotatorKind, Answer, Question


@dataclass(frozen=True, slots=True)
class GoldSettings(RewardedSettings):
    """How rewards become answers. Where they are costs, an answer is safe where its reward is not negative."""

    name: str = "gold"
    tie_margin: float = 0.0
    """Rewards that differ by no more are a tie."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tie_margin) and self.tie_margin >= 0):
            raise SettingsError(f"tie_margin is {self.tie_margin}: use a number from 0 up")


class GoldAnnotator(RewardedAnnotator[GoldSettings]):
    """Prefers what its rewards prefer; a `models.Annotator`."""

    kind: AnnotatorKind = "gold"

    def answer(self, question: Question) -> Answer:
        """The choice, rating or ranking that the rewards give.

        Raises:
            DataError: the question was not there when the rewards were computed.
        """
        rewards = self._rewards[question]
        if question.kind == "rating":
            safe = rewards[0] >= 0 if self.settings.kind == "cost" else None
            return Answer(rating=self._rewards.rating(rewards[0]), safe=safe)
        if question.kind == "ranking":
            return Answer(ranks=ranks_by(rewards, rewards, self.settings.tie_margin))
        gap = rewards[0] - rewards[1]
        if abs(gap) <= self.settings.tie_margin:
            return Answer(choice="tie")
        return Answer(choice="first" if gap > 0 else "second")
