"""What a number is worth: means, shares, ratios and AUCs with 95 % intervals from one cluster bootstrap.

What varies together is drawn together: a cluster (the prompts that are one question in other words, and all answers
and pairs under them) is in a replicate as often as it is drawn, as a whole. A statistic is therefore a function of how
often each of the C clusters was drawn, (B, C) weights for B replicates, and the same replicates serve every statistic:
differences are taken within a replicate, so that they are paired.

The interval is the expanded percentile interval (Hesterberg, "What Teachers Should Know About the Bootstrap", The
American Statistician 69(4), 2015, section 3.2): percentiles of the replicates, at the levels Phi(sqrt(C / (C - 1)) t)
with t the 2.5 and 97.5 % points of Student's t with C - 1 degrees of freedom. Plain percentiles are as narrow as a
z interval with the variance over C, which with twenty clusters is too narrow by a tenth. It stays inside the range of
the statistic, as a share must.
"""

from collections.abc import Callable, Hashable, Sequence
from copy import copy
from typing import TypedDict

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.special import ndtr

from dissonance.errors import DataError, SettingsError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LEAST_CLUSTERS = 5
"""With fewer, the clusters say too little of their own spread: there is a mean and no interval."""

_TAIL = 0.025
_ROUNDING = 1e-12  # relative; replicates that differ by no more are one value
_BLOCK_VALUES = 1 << 20  # weights of a block of replicates, times items: a few MB of float64

Statistic = Callable[[FloatArray], FloatArray]
"""From how often each cluster is drawn, (B, C), to the statistic, (B,); NaN where it is not defined."""


class Interval(TypedDict):
    """An estimate and its 95 % interval."""

    mean: float
    """The estimate from all the data."""

    low: float | None
    """None with fewer than `LEAST_CLUSTERS` clusters, and where all replicates are one value: shares of 0 or 1, mostly,
    of which nothing says how far from that they may be."""

    high: float | None


def codes(keys: Sequence[Hashable]) -> tuple[IntArray, int]:
    """Number keys from 0 in the order of their first appearance, (I,), and count them."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.int64, len(keys)), len(numbers)


class Bootstrap:
    """Replicates of the C clusters of some items, drawn with replacement.

    Args:
        cluster: (I,) of each item, 0..C-1.
        replicates: B.
        seed: the same seed and C give the same replicates.
    """

    def __init__(self, cluster: IntArray, replicates: int, seed: int) -> None:
        if replicates < 2:
            raise SettingsError(f"replicates is {replicates}: a bootstrap needs at least 2")
        self.cluster = cluster
        self.clusters = int(cluster.max(initial=-1)) + 1
        self._weights = _draw(self.clusters, replicates, np.random.default_rng(seed))

    def under(self, item: IntArray) -> "Bootstrap":
        """The same replicates for other items, (J,), each under one of these: pairs under their prompts."""
        other = copy(self)
        other.cluster = self.cluster[item]
        return other

    def sums(self, values: npt.ArrayLike) -> FloatArray:
        """Values of the items, (I,), added up by cluster, (C,)."""
        added: FloatArray = np.bincount(self.cluster, np.asarray(values, np.float64), self.clusters).astype(np.float64)
        return added

    def mean(self, values: npt.ArrayLike) -> Interval | None:
        """Mean over the items, (I,); None of none.

        Raises:
            DataError: a value is no finite number.
        """
        numbers = np.asarray(values, np.float64)
        return self.ratio(numbers, np.ones(numbers.size))

    def ratio(self, numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Interval | None:
        """Sum of one over the sum of the other, (I,) each, the second not negative; None where that is 0."""
        top, bottom = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
        if not (np.isfinite(top).all() and np.isfinite(bottom).all()):
            raise DataError("a value to average is not a finite number: look for it in the table it came from")
        counted = self.sums(bottom)
        return self.interval(ratio_of(self.sums(top), counted), int(np.count_nonzero(counted)))

    def auc(self, score: npt.ArrayLike, positive: npt.ArrayLike) -> Interval | None:
        """`auc_of` with its interval; None without positives or without negatives."""
        values = np.asarray(score, np.float64)
        return self.interval(auc_of(values, np.asarray(positive, np.float64), self.cluster), width=values.size)

    def interval(self, statistic: Statistic, clusters: int | None = None, width: int = 1) -> Interval | None:
        """Estimate and interval of any statistic.

        Args:
            statistic: of the cluster weights.
            clusters: how many of them it depends on; by default, all that have items.
            width: floats it takes per replicate beside the weights, to bound the memory.

        Returns:
            None where it is not defined (NaN) on the data.
        """
        if not self.clusters:
            return None
        estimate = float(statistic(np.ones((1, self.clusters)))[0])
        if np.isnan(estimate):
            return None
        n = np.unique(self.cluster).size if clusters is None else clusters
        if n < LEAST_CLUSTERS:
            return Interval(mean=estimate, low=None, high=None)
        replicates = self._replicates(statistic, width)
        low, high = np.nanquantile(replicates, _levels(n)).tolist()
        if np.nanmax(replicates) - np.nanmin(replicates) <= _ROUNDING * abs(estimate):
            low = high = None
        return Interval(mean=estimate, low=low, high=high)

    def _replicates(self, statistic: Statistic, width: int) -> FloatArray:
        size = max(1, _BLOCK_VALUES // max(self.clusters, width))
        blocks = range(0, len(self._weights), size)
        return np.concatenate([statistic(self._weights[at : at + size].astype(np.float64)) for at in blocks])


def _draw(clusters: int, replicates: int, rng: np.random.Generator) -> npt.NDArray[np.integer]:
    """How often each cluster is in each replicate, (B, C); in blocks, since NumPy draws 8 bytes where 1 is enough."""
    if not clusters:
        return np.zeros((replicates, 0), np.uint8)
    size = max(1, _BLOCK_VALUES // clusters)
    chances = np.full(clusters, 1 / clusters)
    blocks = [min(size, replicates - at) for at in range(0, replicates, size)]
    # A cluster that is drawn more than 255 times would wrap round: one chance in 10^500.
    return np.concatenate([rng.multinomial(clusters, chances, size=rows).astype(np.uint8) for rows in blocks])


def _levels(n: int) -> tuple[float, float]:
    """Levels of the percentiles for n clusters."""
    low = float(ndtr(np.sqrt(n / (n - 1)) * stats.t.ppf(_TAIL, n - 1)))
    return low, 1 - low


def ratio_of(numerator: FloatArray, denominator: FloatArray) -> Statistic:
    """A sum over another, of clusters' sums (C,)."""

    def statistic(weights: FloatArray) -> FloatArray:
        return _divided(weights @ numerator, weights @ denominator)

    return statistic


def auc_of(score: FloatArray, positive: FloatArray, cluster: IntArray) -> Statistic:
    """Area under the ROC curve: the chance that a positive item scores higher than a negative one, ties half.

    Args:
        score: (I,).
        positive: (I,) in [0, 1]: an item that is half positive counts half on either side.
        cluster: (I,).
    """
    order = np.argsort(score, kind="stable")
    ranked, said, of = score[order], positive[order], cluster[order]
    starts = np.append(0, np.flatnonzero(np.diff(ranked)) + 1)[: ranked.size]  # of runs of one score

    def statistic(weights: FloatArray) -> FloatArray:
        if not starts.size:
            return np.full(len(weights), np.nan)
        drawn = weights[:, of]
        positives = np.add.reduceat(drawn * said, starts, axis=1)
        negatives = np.add.reduceat(drawn * (1 - said), starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        won = np.sum(positives * (below + negatives / 2), axis=1)
        return _divided(won, positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def _divided(top: FloatArray, bottom: FloatArray) -> FloatArray:
    ratio: FloatArray = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
    return ratio


def bands(score: FloatArray, count: int) -> IntArray:
    """Number of each item's band by score, lowest 0, (I,): at most `count`, of about equally many items.

    Items of one score are in one band, so that a score of few values gives fewer bands.
    """
    if not score.size:
        return np.zeros(0, np.int64)
    cuts = np.unique(np.quantile(score, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    return np.unique(np.searchsorted(cuts, score), return_inverse=True)[1].astype(np.int64)


def win_rates(new: FloatArray, start: FloatArray, tie: float = 0.0) -> FloatArray:
    """Chance that an answer of `new` beats one of `start`, prompt by prompt, (P,).

    Over all N x M pairs of an answer of either, ties half: with the two exchanged it is one minus that.

    Args:
        new: gold rewards (P, N).
        start: gold rewards (P, M).
        tie: gold rewards that differ by no more are a tie.
    """
    gap = new[:, :, None] - start[:, None, :]
    rates: FloatArray = np.where(np.abs(gap) <= tie, 0.5, gap > 0).mean(axis=(1, 2))
    return rates


def kl_estimates(logprob: FloatArray, start_logprob: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Two estimates of KL(policy || start policy) by each of the policy's own samples, k1 and k3, and exp(-d).

    With d = log pi(y | x) - log pi_start(y | x) and y drawn from pi, k1 = d and k3 = exp(-d) - 1 + d (Schulman,
    "Approximating KL Divergence", 2020) both have the KL for their mean; k3 is never negative and varies less while the
    KL is small. Their difference is 1 - exp(-d), whose mean is 0: where the mean weight exp(-d) is far from 1, the rare
    answers that carry it were not drawn, and k3 is too small by what is missing.

    Args:
        logprob: nats, any shape.
        start_logprob: nats, of the same shape.
    """
    d = logprob - start_logprob
    power = np.minimum(-d, 300)  # finite, also for likelihoods that are not those of the samples' policy
    return d, np.maximum(0.0, np.expm1(power) + d), np.exp(power)
