"""How well rewards order held-out pairs, and how far they can be believed: pure functions of arrays.

`leads` are reward differences r(chosen) - r(rejected), (n,), of pairs that are no ties. The Bradley-Terry model says
that the chosen answer is the better with probability sigma(lead).
"""

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import norm

FloatArray = NDArray[np.float64]

_BINS = 10


def accuracy(leads: FloatArray, groups: Sequence[Hashable]) -> dict[str, float] | None:
    """The share of pairs that are ordered rightly, with a 95 % interval; None without pairs.

    Equal rewards order nothing and count one half. Pairs of one group, the answers to one prompt, are not independent:
    Wilson's interval is taken at the effective number of pairs, n over the design effect (Korn and Graubard 1998).
    """
    return proportion((leads > 0) + 0.5 * (leads == 0), groups)


def proportion(hits: FloatArray, groups: Sequence[Hashable]) -> dict[str, float] | None:
    """The mean of values between 0 and 1, (n,), with Wilson's 95 % interval for groups of dependent values."""
    n = len(hits)
    if not n:
        return None
    mean = float(np.mean(hits))
    effective = n / _design_effect(np.asarray(hits, dtype=np.float64), groups)
    z = float(norm.ppf(0.975))
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * sqrt(mean * (1 - mean) / effective + (z / (2 * effective)) ** 2)
    return {"mean": mean, "low": max(0.0, min(centre - half, mean)), "high": min(1.0, max(centre + half, mean))}


def _design_effect(hits: FloatArray, groups: Sequence[Hashable]) -> float:
    """The variance of the mean over that of independent values; at least 1, at most n.

    Where all values are the same, nothing can be estimated: each group then counts as one value.
    """
    places: dict[Hashable, int] = {}
    codes = [places.setdefault(group, len(places)) for group in groups]
    n, n_groups = len(hits), len(places)
    deviations = hits - hits.mean()
    independent = float((deviations**2).sum())
    if independent == 0 or n_groups == 1:
        return n / n_groups
    clustered = float((np.bincount(codes, deviations) ** 2).sum()) * n_groups / (n_groups - 1)
    return min(max(1.0, clustered / independent), float(n))


def calibration(leads: FloatArray) -> dict[str, Any] | None:
    """Expected calibration error and its reliability bins (Naeini et al. 2015); None without pairs.

    A pair's confidence is the probability of the answer that the model prefers, sigma(|lead|), in ten equal bins from
    1/2 to 1. A bin without pairs has neither confidence nor accuracy.
    """
    if not len(leads):
        return None
    confidence: FloatArray = expit(np.abs(leads))
    right = (leads > 0) + 0.5 * (leads == 0)
    edges = np.linspace(0.5, 1.0, _BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, _BINS - 1)
    bins = [_bin(confidence[place == b], right[place == b], float(edges[b]), float(edges[b + 1])) for b in range(_BINS)]
    error = sum(b["pairs"] * abs(b["accuracy"] - b["confidence"]) for b in bins if b["pairs"]) / len(leads)
    return {"ece": error, "bins": bins}


def _bin(confidence: FloatArray, right: FloatArray, low: float, high: float) -> dict[str, Any]:
    known = len(confidence) > 0
    return {
        "low": low,
        "high": high,
        "pairs": len(confidence),
        "confidence": float(confidence.mean()) if known else None,
        "accuracy": float(right.mean()) if known else None,
    }
