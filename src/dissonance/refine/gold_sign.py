"""Does the reward model point the right way? Asked of held-out gold pairs before a policy takes a step.

A cost model read as a reward, or one trained on swapped pairs, makes a policy worse step by step, and every curve of
the training looks healthy meanwhile.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import binom

from dissonance.errors import DataError, ModelError
from dissonance.models import RewardModel
from dissonance.records import Preference

CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class GoldSign:
    """What the check found."""

    pairs: int
    """Gold pairs that are no ties."""
    right: float
    """How many of them the reward model orders as gold does; one that it cannot tell apart counts 1/2."""
    needed: int
    """The least number of right ones that passes."""

    @property
    def accuracy(self) -> float:
        """`right` as a share."""
        return self.right / self.pairs

    @property
    def passed(self) -> bool:
        """Whether the reward model is above chance by the margin."""
        return self.right >= self.needed

    def metrics(self) -> dict[str, Any]:
        """For the stage's metrics."""
        return {**asdict(self), "accuracy": self.accuracy, "needed_accuracy": self.needed / self.pairs}


def right_needed(pairs: int, margin: float, confidence: float) -> int:
    """The least number of right pairs with which a reward model is above chance + margin, by a one-sided binomial test.

    The least k with P(X >= k) <= 1 - confidence for X ~ Binomial(pairs, 1/2 + margin); `pairs` + 1 where even all of
    them would not do.
    """
    # isf(q) is the least k with P(X > k) <= q.
    return int(binom.isf(1 - confidence, pairs, CHANCE + margin)) + 1


def check_gold_sign(
    reward_model: RewardModel, gold: Sequence[Preference], *, margin: float = 0.0, confidence: float = 0.95
) -> GoldSign:
    """Score held-out gold pairs, and refuse a reward model that does not rank them above chance.

    Args:
        reward_model: what a policy is to be trained against, oriented so that higher is better.
        gold: pairs whose better answer is known, none of which the reward model was trained on. Ties say nothing.
        margin: how far above one half the accuracy is to be.
        confidence: of the one-sided test.

    Raises:
        DataError: there are too few pairs for any reward model to pass.
        ModelError: the reward model ranks fewer of them rightly than the test needs.
    """
    pairs = [pair for pair in gold if not pair.tie]
    needed = right_needed(len(pairs), margin, confidence)
    if needed > len(pairs):
        raise DataError(
            f"{len(pairs)} held-out gold pairs are too few to tell a reward model from chance: give more, "
            "or none, which leaves its direction unchecked"
        )
    found = GoldSign(len(pairs), _right(reward_model, pairs), needed)
    if not found.passed:
        raise ModelError(_refusal(found, margin, confidence))
    return found


def _right(reward_model: RewardModel, pairs: Sequence[Preference]) -> float:
    conversations = [pair.messages for pair in pairs]
    rewards = reward_model.score(
        [*conversations, *conversations], [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    )
    better, worse = rewards[: len(pairs)], rewards[len(pairs) :]
    return sum(
        1.0 if b.value > w.value else 0.5 if b.value == w.value else 0.0 for b, w in zip(better, worse, strict=True)
    )


def _refusal(found: GoldSign, margin: float, confidence: float) -> str:
    chance = f"chance{f' + {margin:g}' if margin else ''}"
    turned = found.pairs - found.right >= found.needed
    advice = (
        "it points the wrong way: is it a cost model read as a reward, or were its pairs swapped"
        if turned
        else "train it on more or better pairs first"
    )
    return (
        f"reward model: it ranks {found.right:g} of {found.pairs} held-out gold pairs rightly ({found.accuracy:.1%}), "
        f"and needs {found.needed} ({found.needed / found.pairs:.1%}) to be above {chance} at {confidence:.0%} "
        f"confidence; {advice}; no policy was trained"
    )
