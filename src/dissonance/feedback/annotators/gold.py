"""A reward model as annotator: exact and tireless; a second model, or a callable."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from dissonance.config import RewardKind
from dissonance.errors import DataError, SettingsError
from dissonance.feedback.annotators.run import Details
from dissonance.models import RewardModel
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import AnnotatorKind, Answer, Message, Question

_SCORED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of every completion that is asked about, higher is better."""

    of: Mapping[str, tuple[float, ...]]
    """By query_id; one per completion, in the order of `Question.completions`."""
    cuts: tuple[float, float, float, float]
    """The 20, 40, 60 and 80 % quantiles of the rewards of all distinct completions: the borders between ratings."""

    def __getitem__(self, question: Question) -> tuple[float, ...]:
        try:
            return self.of[question.query_id]
        except KeyError:
            raise DataError(
                f"question {question.query_id!r} came after the others were scored: run again to have it answered"
            ) from None

    def rating(self, reward: float) -> int:
        """1 to 5: the fifth of all rewards that this one is in; where many are equal, the middle of theirs."""
        return 1 + int(np.searchsorted(self.cuts, reward, "left") + np.searchsorted(self.cuts, reward, "right")) // 2


def score_questions(model: RewardModel, questions: Sequence[Question], progress: ProgressFactory = quiet) -> Rewards:
    """Score every distinct completion once.

    Args:
        model: what scores.
        questions: all questions of the store, so that ratings mean the same after a resume.
        progress: told of every completion.

    Raises:
        DataError: a reward is not a finite number.
    """
    found: dict[tuple[tuple[Message, ...], str], float] = {}
    wanted = list(dict.fromkeys((q.messages, text) for q in questions for text in q.completions))
    with progress("gold rewards", len(wanted), "completions") as advance:
        for start in range(0, len(wanted), _SCORED_AT_ONCE):
            part = wanted[start : start + _SCORED_AT_ONCE]
            rewards = model.score([messages for messages, _ in part], [text for _, text in part])
            found |= {key: _finite(reward.value, key[1]) for key, reward in zip(part, rewards, strict=True)}
            advance(len(part))
    low, lower, higher, high = np.quantile(list(found.values()) or [0.0], [0.2, 0.4, 0.6, 0.8]).tolist()
    of = {q.query_id: tuple(found[q.messages, text] for text in q.completions) for q in questions}
    return Rewards(of, (low, lower, higher, high))


def ranks_by(
    values: Sequence[float], rewards: Sequence[float], margin: float, first: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Ranks, 1 for the highest value; neighbours whose rewards differ by no more than the margin share a rank.

    Where values are equal, and their rewards no tie, those that stand earlier in `first` come first.
    """
    order = sorted(range(len(values)) if first is None else first, key=lambda place: -values[place])
    ranks = [1] * len(values)
    for before, place in pairwise(order):
        ranks[place] = ranks[before] + (abs(rewards[before] - rewards[place]) > margin)
    return tuple(ranks)


@dataclass(frozen=True, slots=True)
class GoldSettings:
    """How rewards become answers."""

    name: str = "gold"
    source: str = ""
    """Which reward model, so that another one does not go on under the same name."""
    kind: RewardKind = "reward"
    """`cost`: ratings say whether an answer is safe, which it is where the reward (minus the cost) is not negative."""
    tie_margin: float = 0.0
    """Rewards that differ by no more are a tie."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tie_margin) and self.tie_margin >= 0):
            raise SettingsError(f"tie_margin is {self.tie_margin}: use a number from 0 up")


class GoldAnnotator:
    """Prefers what its rewards prefer; a `models.Annotator`."""

    kind: AnnotatorKind = "gold"
    concurrency = 1

    def __init__(self, settings: GoldSettings, rewards: Rewards) -> None:
        self.settings, self.name = settings, settings.name
        self._rewards = rewards

    @property
    def fingerprint(self) -> str:
        """Tells apart gold annotators whose answers should not stand under one name."""
        return fingerprint(asdict(self.settings))

    def details(self, question: Question) -> Details:
        """Nothing: a reward model sees one answer at a time."""
        del question
        return Details()

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


def fingerprint(settings: Mapping[str, object]) -> str:
    """A hash of settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _finite(reward: float, text: str) -> float:
    if not math.isfinite(reward):
        raise DataError(f"the gold reward of {text[:60]!r} is {reward}: rewards must be finite numbers")
    return reward
