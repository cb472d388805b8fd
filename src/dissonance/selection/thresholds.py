"""How much conflict is enough: tau for prompts, delta for completions (Liu et al., arXiv 2512.09212)."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dissonance.conflict import kendall_null
from dissonance.errors import DataError, SettingsError
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
        """Find the bound among `values`, (any,), of which a quantile is one."""
        return float(np.quantile(values, self.value, method="higher")) if self.quantile else self.value


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
    if pool.degenerate.all() and any(threshold and threshold.quantile for threshold in (tau, delta)):
        raise DataError("every prompt is degenerate, so there is nothing to take a quantile of: leave it out")
    distances = pool.kendall_tau_distance[~pool.degenerate]
    scores = np.abs(pool.pacs[~pool.degenerate[pool.prompt_of]])
    return Thresholds(
        tau=None if tau is None else tau.bound(distances),
        delta=None if delta is None else delta.bound(scores),
    )


def warnings(pool: Pool, thresholds: Thresholds) -> list[str]:
    """Say, one line each, which threshold keeps more than half: it selects little, whatever it is called.

    Beside the share stands what rewards independent of the log-likelihoods would give: K has mean 1/2 and Kendall's
    variance, taken as normal; PACS is the difference of two z-scores, near N(0, 2).
    """
    lines = []
    fit = ~pool.degenerate
    if thresholds.tau is not None and fit.any():
        n = max(2, int(np.median(np.diff(pool.offsets))))
        sd = kendall_null(n).sd
        kept = np.mean(pool.kendall_tau_distance[fit] >= thresholds.tau)
        expected = math.erfc((thresholds.tau - 0.5) / (sd * math.sqrt(2))) / 2
        if kept > 0.5:
            lines.append(
                f"warning: K >= {thresholds.tau:.2f} keeps {kept:.0%} of the prompts; independent scores would have "
                f"K = 0.50 +- {sd:.2f} (N = {n}), which keeps {expected:.0%}: raise tau to choose more narrowly"
            )
    if thresholds.delta is not None and fit.any():
        kept = np.mean(np.abs(pool.pacs[fit[pool.prompt_of]]) >= thresholds.delta)
        if kept > 0.5:
            lines.append(
                f"warning: |PACS| >= {thresholds.delta:.2f} keeps {kept:.0%} of the completions; independent scores "
                f"would keep {math.erfc(thresholds.delta / 2):.0%}: raise delta to choose more narrowly"
            )
    return lines
