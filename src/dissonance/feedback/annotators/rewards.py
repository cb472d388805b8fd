"""The rewards behind gold and simulated annotators: every completion that is asked about, scored once."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

from dissonance.config import RewardKind
from dissonance.errors import DataError
from dissonance.feedback.annotators.run import Details
from dissonance.models import RewardModel
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import AnnotatorKind, Message, Question

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
class RewardedSettings:
    """What every annotator that answers by rewards is told."""

    name: str
    """What its answers stand under."""
    source: str = ""
    """Which reward model, so that another one does not go on under the same name."""
    kind: RewardKind = "reward"
    """`cost`: ratings say whether an answer is safe, too."""


_Settings = TypeVar("_Settings", bound=RewardedSettings)


class RewardedAnnotator(Generic[_Settings]):
    """The head of an annotator that answers by rewards; `answer` makes it a `models.Annotator`."""

    kind: AnnotatorKind
    concurrency = 1

    def __init__(self, settings: _Settings, rewards: Rewards) -> None:
        self.settings, self.name = settings, settings.name
        self._rewards = rewards

    @property
    def fingerprint(self) -> str:
        """Tells apart settings whose answers should not stand under one name."""
        said = json.dumps(asdict(self.settings), sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def details(self, question: Question) -> Details:
        """Nothing: a reward model sees one answer at a time."""
        del question
        return Details()


def _finite(reward: float, text: str) -> float:
    if not math.isfinite(reward):
        raise DataError(f"the gold reward of {text[:60]!r} is {reward}: rewards must be finite numbers")
    return reward
