"""Accuracy and calibration against plain loops, SciPy, and simulations in which the truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import binomtest

from dissonance.refine.calibration import accuracy, calibration, proportion

LEADS = st.lists(st.floats(-8, 8) | st.just(0.0), min_size=1, max_size=40)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_independent_pairs_have_wilsons_interval(hits: list[bool]) -> None:
    leads = np.where(hits, 1.0, -1.0)
    found = accuracy(leads, list(range(len(hits))))
    expected = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    if 0 < sum(hits) < len(hits):  # a small correction for the number of groups stands in the design effect
        assert found is not None
        n = len(hits)
        widened = (found["high"] - found["low"]) / (expected.high - expected.low)
        assert 1 - 1e-9 <= widened <= n / (n - 1) + 1e-9  # its square root, where the share is not near 0 or 1
        assert found["mean"] == pytest.approx(sum(hits) / n)
        assert found["low"] <= found["mean"] <= found["high"]
    else:
        assert found == pytest.approx({"mean": float(hits[0]), "low": expected.low, "high": expected.high})


def test_pairs_of_one_prompt_count_as_what_they_are_worth() -> None:
    hits = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0, 1.0] * 5, 8)
    copies = proportion(hits, np.repeat(np.arange(30), 8).tolist())
    alone = proportion(hits[::8], list(range(30)))
    assert copies == pytest.approx(alone)
    same = proportion(np.ones(80), np.repeat(np.arange(10), 8).tolist())
    assert same == pytest.approx(proportion(np.ones(10), list(range(10))))


def test_the_interval_covers_the_truth_for_clustered_pairs() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        level = rng.beta(3, 1.5, size=40)  # each prompt is easier or harder
        hits = rng.random((40, 5)) < level[:, None]
        found = proportion(hits.ravel().astype(float), np.repeat(np.arange(40), 5).tolist())
        assert found is not None
        covered.append(found["low"] <= 2 / 3 <= found["high"])
    assert 0.92 <= np.mean(covered) <= 0.98


def test_equal_rewards_count_one_half_and_no_pairs_give_nothing() -> None:
    found = accuracy(np.array([0.0, 0.0, 1.0, -1.0]), ["a", "b", "c", "d"])
    assert found is not None
    assert found["mean"] == 0.5
    assert accuracy(np.array([]), []) is None
    assert calibration(np.array([])) is None


@given(LEADS)
def test_the_bins_are_those_of_a_plain_loop(leads: list[float]) -> None:
    found = calibration(np.array(leads))
    assert found is not None
    error = 0.0
    for number, place in enumerate(found["bins"]):
        inside = [
            (float(expit(abs(x))), 1.0 if x > 0 else 0.5 if x == 0 else 0.0)
            for x in leads
            if min(9, int((float(expit(abs(x))) - 0.5) * 20 + 1e-12)) == number
        ]
        assert (place["low"], place["high"]) == pytest.approx((0.5 + number / 20, 0.55 + number / 20))
        assert place["pairs"] == len(inside)
        if inside:
            confidence, right = np.mean(inside, axis=0)
            assert (place["confidence"], place["accuracy"]) == pytest.approx((confidence, right))
            error += len(inside) * abs(right - confidence)
        else:
            assert place["confidence"] is place["accuracy"] is None
    assert found["ece"] == pytest.approx(error / len(leads))


def test_probabilities_that_come_true_are_calibrated_and_bold_ones_are_not() -> None:
    rng = np.random.default_rng(0)
    strength = rng.normal(scale=2, size=20_000)
    leads = np.where(rng.random(20_000) < expit(strength), strength, -strength)
    honest, bold = calibration(leads), calibration(3 * leads)
    assert honest is not None
    assert bold is not None
    assert honest["ece"] < 0.015
    assert bold["ece"] > 0.1
