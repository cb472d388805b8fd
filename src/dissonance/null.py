"""What chance alone gives: the Kendall-tau distance K of two independent rankings.

The distribution is Kendall's (Rank Correlation Methods, chapters 4 and 5): K times the number of pairs is the number of
inversions of a random permutation. It is exact up to n = 100, the normal approximation beyond, and knows no ties.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dissonance.errors import DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SIGNIFICANCE = 0.05
"""A two-sided p below this is called significant."""

_EXACT_LIMIT = 100


@dataclass(frozen=True, slots=True)
class KendallNull:
    """The Kendall-tau distance of two independent rankings without ties."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class ChanceShares:
    """How often independent rankings look like conflict."""

    above: float
    """P(K > 1/2): half of what is not exactly 1/2."""

    significant: float
    """P(K > 1/2 and two-sided p < 0.05)."""


def kendall_null(n: int) -> KendallNull:
    """Mean and standard deviation of K for two independent rankings of n without ties (Kendall's variance of tau)."""
    _check_ranking(n)
    return KendallNull(mean=0.5, sd=sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))) / 2)


def kendall_p_value(distance: npt.ArrayLike, n: int) -> FloatArray:
    """Two-sided p of a Kendall-tau distance if the two rankings of n were independent.

    The probability of a K at least as far from 1/2. Exact up to n = 100, from the number of permutations with a given
    number of inversions (the Mahonian numbers); the normal approximation beyond.

    The null has no ties. Pairs tied on one side pull K towards 1/2, so that p errs on the cautious side. Pairs tied on
    both sides lower K whatever the scores: leave out all but one of identical items first, as `conflicts` does.

    Args:
        distance: any shape, in [0, 1].
        n: how many completions were ranked, at least 2.

    Raises:
        DataError: n < 2, or a distance outside [0, 1].
    """
    _check_ranking(n)
    k = np.asarray(distance, np.float64)
    if not np.all((k >= 0) & (k <= 1)):
        raise DataError("a Kendall-tau distance lies in [0, 1]: one of those given does not")
    if n > _EXACT_LIMIT:
        null = kendall_null(n)
        return np.asarray(2 * ndtr(-np.abs(k - null.mean) / null.sd))
    pairs = n * (n - 1) // 2
    doubled = np.rint(2 * pairs * k).astype(np.int64)  # ties count half: whole numbers again
    nearer = np.minimum(doubled, 2 * pairs - doubled) // 2
    p: FloatArray = np.minimum(1.0, 2 * _inversion_cdf(n)[nearer])
    return p


def p_values(distance: FloatArray, n: IntArray) -> FloatArray:
    """`kendall_p_value` of P prompts, each with its own n; (P,), 1 where n < 2."""
    p = np.ones(distance.size)
    for size in np.unique(n[n > 1]).tolist():
        p[n == size] = kendall_p_value(distance[n == size], size)
    return p


def null_pmf(n: int) -> FloatArray:
    """Probability of each number of discordant pairs, 0 .. n(n-1)/2, for two independent rankings of n."""
    _check_ranking(n)
    if n <= _EXACT_LIMIT:
        return np.diff(_inversion_cdf(n), prepend=0.0)
    pairs = n * (n - 1) // 2
    edges = (np.arange(pairs + 2) - 0.5) / pairs
    return np.diff(ndtr((edges - 0.5) / kendall_null(n).sd))


@lru_cache(maxsize=_EXACT_LIMIT)
def chance_shares(n: int) -> ChanceShares:
    """Shares of prompts with n distinct completions that independent scores show as conflict."""
    if n > _EXACT_LIMIT:
        return ChanceShares(above=0.5, significant=SIGNIFICANCE / 2)
    pmf = null_pmf(n)
    distance = np.linspace(0, 1, pmf.size)
    above = distance > 0.5
    significant = above & (kendall_p_value(distance, n) < SIGNIFICANCE)
    return ChanceShares(above=float(pmf[above].sum()), significant=float(pmf[significant].sum()))


@lru_cache(maxsize=_EXACT_LIMIT)
def _inversion_cdf(n: int) -> FloatArray:
    """P(at most k inversions) in a random permutation of n, for k = 0 .. n(n-1)/2.

    The j-th element adds 0 .. j-1 inversions with equal chance, independently of the others; every term is positive,
    so that the tails keep their relative precision.
    """
    density = np.ones(1)
    for j in range(2, n + 1):
        density = np.convolve(density, np.full(j, 1 / j))
    cdf = np.cumsum(density)
    cdf.setflags(write=False)
    return cdf


def _check_ranking(n: int) -> None:
    if n < 2:
        raise DataError(f"a ranking of {n} has no pairs: at least 2 completions are needed")
