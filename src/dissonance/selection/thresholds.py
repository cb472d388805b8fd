"""How much conflict is enough: tau for prompts, delta for completions (Liu et al., arXiv 2512.09212)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dissonance.errors import SettingsError
from dissonance.null import null_pmf
from dissonance.selection.pool import FloatArray, Pool

ThresholdName = Literal["tau", "delta"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A bound from below, inclusive; `str` gives back what `parse_threshold` read."""

    value: float
    """The bound itself or, if `quantile`, the share of values that lies below it."""

    quantile: bool = False
    """Whether the bound is to be found from the values at hand."""

    def __str__(self) -> str:
        return f"{'q' if self.quantile else ''}{self.value:g}"

    def bound(self, values: FloatArray) -> float:
        """Find the bound among `values`, (any,): a quantile is one of them (none: infinity)."""
        if not self.quantile:
            return self.value
        return float(np.quantile(values, self.value, method="higher")) if values.size else math.inf


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The bounds in force, as plain numbers; None where there is none."""

    tau: float | None = None
    """Prompts count as conflicting from this Kendall-tau distance on."""

    delta: float | None = None
    """Completions count as conflicting from this |PACS| on."""


def parse_threshold(text: str, name: ThresholdName) -> Threshold:
    """Read `0.6` (absolute) or `q0.9` (a quantile: the most conflicting tenth); SettingsError for anything else."""
    quantile = text.strip().lower().startswith("q")
    try:
        value = float(text.strip().lower().removeprefix("q"))
    except ValueError:
        raise SettingsError(f"--{name} {text!r} is no threshold: give a number (0.6) or a quantile (q0.9)") from None
    threshold = Threshold(value, quantile)
    check_threshold(threshold, name)
    return threshold


def check_threshold(threshold: Threshold, name: ThresholdName) -> None:
    """Refuse a value that no conflict can have, with a SettingsError."""
    if threshold.quantile:
        if not 0 < threshold.value < 1:
            raise SettingsError(f"--{name} {threshold}: a quantile lies between 0 and 1, as in q0.9")
    elif name == "tau" and not 0 <= threshold.value <= 1:
        raise SettingsError(f"--tau {threshold}: a Kendall-tau distance lies in [0, 1]")
    elif name == "delta" and not 0 <= threshold.value < math.inf:
        raise SettingsError(f"--delta {threshold}: |PACS| is 0 or more, and finite")


def effective_thresholds(pool: Pool, tau: Threshold | None, delta: Threshold | None) -> Thresholds:
    """Turn quantiles into numbers.

    Both are over all prompts that are not degenerate, so that delta does not depend on tau.
    """
    distances = pool.kendall_tau_distance[~pool.degenerate]
    scores = np.abs(pool.pacs[~pool.degenerate[pool.prompt_of]])
    return Thresholds(
        tau=None if tau is None else tau.bound(distances),
        delta=None if delta is None else delta.bound(scores),
    )


def comparisons(pool: Pool, thresholds: Thresholds) -> list[str]:
    """Say, one line each, what a threshold keeps beside what it would keep of scores that are independent.

    One that keeps more than half selects little, whatever it is called, and its line is a warning. For K the share of
    independent scores is exact for each prompt's N (`null_pmf`); for PACS, the difference of two z-scores, it is that
    of N(0, 2), a few percentage points off for N below 5.
    """
    fit = ~pool.degenerate
    if not fit.any():
        return []
    lines = []
    if thresholds.tau is not None:
        kept = float(np.mean(pool.kendall_tau_distance[fit] >= thresholds.tau))
        sizes, counts = np.unique(np.diff(pool.offsets)[fit], return_counts=True)
        expected = float(np.average([_null_share(int(n), thresholds.tau) for n in sizes], weights=counts))
        lines.append(_comparison(f"K >= {thresholds.tau:.2f}", "prompts", kept, expected))
    if thresholds.delta is not None:
        kept = float(np.mean(np.abs(pool.pacs[fit[pool.prompt_of]]) >= thresholds.delta))
        expected = math.erfc(thresholds.delta / 2)
        lines.append(_comparison(f"|PACS| >= {thresholds.delta:.2f}", "completions", kept, expected))
    return lines


def _comparison(rule: str, what: str, kept: float, expected: float) -> str:
    line = f"{rule} keeps {kept:.0%} of the {what}; of independent scores it would keep {expected:.0%}"
    return f"warning: {line}: raise it to choose more narrowly" if kept > 0.5 else f"note: {line}"


def _null_share(n: int, tau: float) -> float:
    """P(K >= tau) for two independent rankings of n."""
    chances = null_pmf(n)
    distances = np.arange(len(chances)) / (len(chances) - 1)
    return float(chances[distances >= tau - 1e-12].sum())
