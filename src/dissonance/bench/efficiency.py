"""What a label is worth: the horizontal distance of two learning curves.

    efficiency = judgements that the baseline needs / judgements that the strategy needs, for the same result

Curves are means over seeds by budget, made monotone by isotonic regression and interpolated linearly in the logarithm
of the budget. The ratio is the geometric mean over the results that both curves reach. Where one curve lies wholly
above the other, all that is known is that the ratio is beyond the range of budgets: it is then that range's bound.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from dissonance.evaluate.statistics import Bootstrap, FloatArray, Interval

_LEVELS = 33
_LEAST_SLOPE = 1e-9


def efficiency(budgets: Sequence[int], baseline: FloatArray, strategy: FloatArray) -> float:
    """The ratio for two curves.

    Args:
        budgets: (K,), rising, at least two.
        baseline: (K,), results of the baseline.
        strategy: (K,).
    """
    logs = np.log(np.asarray(budgets, np.float64))
    rising = np.arange(logs.size) * _LEAST_SLOPE
    base, own = (isotonic_regression(curve).x + rising for curve in (baseline, strategy))
    low, high = max(base[0], own[0]), min(base[-1], own[-1])
    if low > high:
        return float(np.exp((logs[-1] - logs[0]) * (1 if own[0] > base[-1] else -1)))
    levels = np.linspace(low, high, _LEVELS)
    return float(np.exp(np.mean(np.interp(levels, base, logs) - np.interp(levels, own, logs))))


def efficiency_interval(
    budgets: Sequence[int], baseline: FloatArray, strategy: FloatArray, bootstrap: Bootstrap
) -> Interval | None:
    """The ratio with its interval over seeds; the two share each seed, and are drawn together.

    Args:
        budgets: (K,), rising.
        baseline: (S, K), of each seed.
        strategy: (S, K).
        bootstrap: over the S seeds.
    """

    def statistic(weights: FloatArray) -> FloatArray:
        total = weights.sum(axis=1, keepdims=True)
        curves = zip(weights @ baseline / total, weights @ strategy / total, strict=True)
        return np.array([efficiency(budgets, base, own) for base, own in curves])

    return bootstrap.interval(statistic)
