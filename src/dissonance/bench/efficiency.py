"""What a label is worth: the horizontal distance of two learning curves.

    efficiency = judgements that the baseline needs / judgements that the strategy needs, for the same result

Curves are means by judgements spent, made monotone by isotonic regression (one that falls is pooled to its
mean) and interpolated linearly in the logarithm of the judgements; what a result needs is the least that reaches it.
The ratio is the geometric mean over the results that both curves reach, from the higher of their starts to the lower of
their ends. Where one curve lies wholly above the other, all that is known is a bound: the ratio is beyond it.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from dissonance.evaluate.statistics import Bootstrap, FloatArray, Interval

WeightedCurve = Callable[[FloatArray], FloatArray]
"""From the weights of C clusters in B replicates, (B, C), to the results at K budgets, (B, K)."""

_LEVELS = 33
_ROUNDING = 1e-9


class Ratio(NamedTuple):
    """A label efficiency."""

    value: float
    bound: Literal["at least", "at most"] | None
    """Where the curves never meet: the value is all that is known."""


class Efficiency(Interval):
    """A label efficiency with its interval."""

    bound: Literal["at least", "at most"] | None
    """Of the estimate, as in `Ratio`."""


def efficiency(
    spent_baseline: Sequence[float], baseline: FloatArray, spent_strategy: Sequence[float], strategy: FloatArray
) -> Ratio:
    """The ratio for two curves.

    Args:
        spent_baseline: (K,), judgements, rising from above 0.
        baseline: (K,), results of the baseline.
        spent_strategy: (L,), likewise.
        strategy: (L,).
    """
    base_logs, own_logs = np.log(spent_baseline), np.log(spent_strategy)
    base, own = isotonic_regression(baseline).x, isotonic_regression(strategy).x
    low, high = max(base[0], own[0]), min(base[-1], own[-1])
    if low > high + _ROUNDING:
        better = own[0] > base[-1]
        apart = base_logs[-1] - own_logs[0] if better else base_logs[0] - own_logs[-1]
        return Ratio(float(np.exp(apart)), "at least" if better else "at most")
    levels = np.linspace(low, max(low, high), _LEVELS)
    return Ratio(float(np.exp(np.mean(_needed(levels, base, base_logs) - _needed(levels, own, own_logs)))), None)


def _needed(levels: FloatArray, curve: FloatArray, logs: FloatArray) -> FloatArray:
    """The least log of judgements at which a rising curve reaches each level."""
    reached = np.searchsorted(curve, levels - _ROUNDING).clip(max=len(curve) - 1)
    before = np.maximum(reached - 1, 0)
    step = curve[reached] - curve[before]
    share = np.where(step > 0, (levels - curve[before]) / np.where(step > 0, step, 1.0), 1.0).clip(0, 1)
    needed: FloatArray = logs[before] + share * (logs[reached] - logs[before])
    return needed


def mean_over_seeds(results: FloatArray) -> WeightedCurve:
    """The curve of results by seed and budget, (S, K)."""

    def means(weights: FloatArray) -> FloatArray:
        found: FloatArray = weights @ results / weights.sum(axis=1, keepdims=True)
        return found

    return means


def efficiency_interval(
    spent_baseline: Sequence[float],
    baseline: WeightedCurve,
    spent_strategy: Sequence[float],
    strategy: WeightedCurve,
    bootstrap: Bootstrap,
    clusters: int | None = None,
) -> Efficiency | None:
    """The ratio with its interval; the two curves share what is drawn, and are drawn together.

    Args:
        spent_baseline: (K,), rising.
        baseline: to (B, K).
        spent_strategy: (L,), rising.
        strategy: to (B, L).
        bootstrap: of the C clusters that both curves weigh.
        clusters: as in `Bootstrap.interval`.
    """

    def statistic(weights: FloatArray) -> FloatArray:
        curves = zip(baseline(weights), strategy(weights), strict=True)
        return np.array([efficiency(spent_baseline, base, spent_strategy, own).value for base, own in curves])

    found = bootstrap.interval(statistic, clusters)
    equal = np.ones((1, bootstrap.clusters))
    whole = efficiency(spent_baseline, baseline(equal)[0], spent_strategy, strategy(equal)[0])
    return None if found is None else Efficiency(**found, bound=whole.bound)
