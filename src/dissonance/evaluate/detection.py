"""Whether conflict foretold where the reward model is wrong.

An item is a pair of answers of which one is known to be better, by gold or by people. The reward model errs on it when
it prefers the other; where it prefers neither, it errs by half. Each predictor is a number per item, made so that a
larger one should mean an error:

    kendall_tau_distance  K of the item's prompt
    pacs_gap              PACS of the answer that the reward model prefers, less that of the other
    abs_pacs              the larger |PACS| of the two
    reward_margin         the baseline, minus the difference of the rewards: it should err where it hesitates
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from dissonance.evaluate.statistics import Bootstrap, FloatArray, IntArray, auc_of, bands

BASELINE = "reward_margin"
_LEAST_IN_BAND = 10


@dataclass(frozen=True, slots=True)
class Ordered:
    """I pairs of answers to one prompt, of which the first is better."""

    prompt: IntArray
    """(I,)"""

    better: IntArray
    """(I,) position within the prompt."""

    worse: IntArray

    def margin(self, values: FloatArray) -> FloatArray:
        """Value of the better one less that of the worse one, (I,), of values (P, N)."""
        difference: FloatArray = values[self.prompt, self.better] - values[self.prompt, self.worse]
        return difference


def ordered_pairs(gold: FloatArray, tie: float = 0.0) -> Ordered:
    """All pairs of one prompt's answers that gold tells apart; gold is (P, N), and differences up to `tie` are ties."""
    first, second = np.triu_indices(gold.shape[1], k=1)
    gap = gold[:, first] - gold[:, second]
    prompt, pair = np.nonzero(np.abs(gap) > tie)
    forward = gap[prompt, pair] > 0
    return Ordered(prompt, np.where(forward, first[pair], second[pair]), np.where(forward, second[pair], first[pair]))


def correctness(margin: FloatArray) -> FloatArray:
    """1 where a reward model gives the better answer the higher reward, 1/2 where the same, else 0; any shape."""
    return (np.sign(margin) + 1) / 2


def predictors(distance: FloatArray, pacs: tuple[FloatArray, FloatArray], margin: FloatArray) -> dict[str, FloatArray]:
    """What might foretell an error on each of I items; nothing here knows which answer is better but by sign.

    Args:
        distance: (I,) K of the prompt.
        pacs: (I,) of the better and of the worse answer.
        margin: (I,) reward of the better less that of the worse.
    """
    gap = pacs[0] - pacs[1]
    return {
        "kendall_tau_distance": distance,
        "pacs_gap": np.where(margin == 0, np.abs(gap), np.sign(margin) * gap),
        "abs_pacs": np.maximum(np.abs(pacs[0]), np.abs(pacs[1])),
        BASELINE: -np.abs(margin),
    }


def detection(
    margin: FloatArray, scores: dict[str, FloatArray], bootstrap: Bootstrap, most_bands: int
) -> dict[str, Any]:
    """How well each predictor tells errors from the rest.

    Args:
        margin: (I,) reward of the better answer less that of the worse.
        scores: by predictor, (I,).
        bootstrap: over the items.
        most_bands: bands of equally many items to give the error rate by; fewer where there are few items or values.

    Returns:
        pairs, clusters, error (the rate), auc and over_margin (the AUC less the baseline's) by predictor, and bands by
        predictor: a list of {from, to, pairs, error}, lowest scores first.
    """
    error = 1 - correctness(margin)

    def over_margin(score: FloatArray) -> Any:
        own = auc_of(score, error, bootstrap.cluster)
        baseline = auc_of(scores[BASELINE], error, bootstrap.cluster)
        return bootstrap.interval(lambda weights: own(weights) - baseline(weights), width=2 * error.size)

    return {
        "pairs": error.size,
        "clusters": int(np.unique(bootstrap.cluster).size),
        "error": bootstrap.mean(error),
        "auc": {name: bootstrap.auc(score, error) for name, score in scores.items()},
        "over_margin": {name: over_margin(score) for name, score in scores.items() if name != BASELINE},
        "bands": {name: _by_band(error, score, bootstrap, most_bands) for name, score in scores.items()},
    }


def _by_band(error: FloatArray, score: FloatArray, bootstrap: Bootstrap, most: int) -> list[dict[str, Any]]:
    band = bands(score, max(1, min(most, error.size // _LEAST_IN_BAND)))
    rows = []
    for number in range(int(band.max(initial=-1)) + 1):
        inside = np.flatnonzero(band == number)
        rows.append(
            {
                "from": float(score[inside].min()),
                "to": float(score[inside].max()),
                "pairs": int(inside.size),
                "error": bootstrap.under(inside).mean(error[inside]),
            }
        )
    return rows
