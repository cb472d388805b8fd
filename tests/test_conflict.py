"""The identities of the two metrics, with SciPy and a brute-force double loop as oracles."""

from dataclasses import asdict
from itertools import permutations
from math import sqrt

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from dissonance.conflict import (
    ConflictTally,
    conflicts,
    kendall_null,
    kendall_p_value,
    kendall_tau_distance,
    length_correlation,
    pacs,
    standardize,
    tally,
)
from dissonance.errors import DataError
from dissonance.null import chance_shares, null_pmf, p_values

# Multiples of 1/4 below 2**20: sums, differences and the affine maps below are exact, so that no tie appears or breaks.
_VALUES = st.integers(-(1 << 20), 1 << 20).map(lambda i: i / 4)
_TIED = st.integers(-3, 3).map(float)


def given(*strategies):
    """Draw few enough cases for a slow machine."""
    return lambda test: settings(max_examples=50)(hypothesis_given(*strategies)(test))


@st.composite
def scored(draw, elements=_VALUES, unique=False, max_n=12):
    """Draw rewards and log-likelihoods (P, N)."""
    prompts, n = draw(st.integers(1, 4)), draw(st.integers(2, max_n))
    row = st.lists(elements, min_size=n, max_size=n, unique=unique)
    rows = st.lists(row, min_size=prompts, max_size=prompts).map(np.array)
    return draw(rows), draw(rows)


@st.composite
def ragged(draw, elements=_TIED):
    """Draw rewards and log-likelihoods of a list of prompts, each with its own N."""
    sizes = draw(st.lists(st.integers(2, 9), min_size=1, max_size=8))
    return tuple([draw(hnp.arrays(np.float64, n, elements=elements)) for n in sizes] for _ in range(2))


def brute_force_distance(r, ll):
    n, total = len(r), 0.0
    for i in range(n):
        for j in range(i + 1, n):
            a, b = np.sign(r[i] - r[j]), np.sign(ll[i] - ll[j])
            total += 1.0 if a * b < 0 else 0.5 if (a == 0) != (b == 0) else 0.0
    return total / (n * (n - 1) / 2)


def naive_pacs(r, ll):
    if np.ptp(r) == 0 or np.ptp(ll) == 0:
        return np.zeros(len(r))
    return (r - np.mean(r)) / np.std(r) - (ll - np.mean(ll)) / np.std(ll)


@given(scored())
def test_pacs_sums_to_zero_within_a_prompt(pair):
    assert np.sum(pacs(*pair), axis=1) == pytest.approx(0, abs=1e-12)


@given(scored(elements=st.one_of(_TIED, _VALUES)))
def test_mean_square_of_pacs_is_twice_one_minus_pearson(pair):
    r, ll = pair[0][0], pair[1][0]
    assume(np.ptp(r) > 0 and np.ptp(ll) > 0)
    assert np.mean(pacs(r, ll) ** 2) == pytest.approx(2 * (1 - np.corrcoef(r, ll)[0, 1]), abs=1e-9)


@given(scored(elements=st.one_of(_TIED, _VALUES)))
def test_mean_and_max_of_abs_pacs_are_bounded(pair):
    size = np.abs(pacs(*pair))
    assert np.all(size.mean(axis=1) <= 2 + 1e-12)
    assert np.all(size.max(axis=1) <= 2 * sqrt(pair[0].shape[1] - 1) + 1e-12)


def test_the_bounds_are_reached():
    assert np.mean(np.abs(pacs([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]))) == pytest.approx(2)
    assert np.max(np.abs(pacs([1.0, 0.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0, 0.0]))) == pytest.approx(4)


@given(scored(), st.sampled_from([0.25, 2.0, 1024.0]), st.integers(-1000, 1000))
def test_positive_affine_maps_change_nothing(pair, scale, shift):
    r, ll = pair
    for mapped in ((scale * r + shift, ll), (r, scale * ll + shift)):
        assert pacs(*mapped) == pytest.approx(pacs(r, ll), abs=1e-9)
        np.testing.assert_array_equal(kendall_tau_distance(*mapped), kendall_tau_distance(r, ll))


@given(scored(elements=st.one_of(_TIED, _VALUES)), st.randoms(use_true_random=False))
def test_reordering_completions_reorders_pacs_and_keeps_the_distance(pair, random):
    r, ll = pair
    order = random.sample(range(r.shape[1]), r.shape[1])
    assert pacs(r[:, order], ll[:, order]) == pytest.approx(pacs(r, ll)[:, order], abs=1e-12)
    np.testing.assert_array_equal(kendall_tau_distance(r[:, order], ll[:, order]), kendall_tau_distance(r, ll))


@given(scored(elements=st.one_of(_TIED, _VALUES)))
def test_pacs_is_antisymmetric_and_the_distance_symmetric(pair):
    r, ll = pair
    np.testing.assert_array_equal(pacs(ll, r), -pacs(r, ll))
    np.testing.assert_array_equal(kendall_tau_distance(ll, r), kendall_tau_distance(r, ll))


@given(scored(unique=True))
def test_reversing_one_ranking_without_ties_gives_the_complement(pair):
    r, ll = pair
    assert kendall_tau_distance(r, -ll) == pytest.approx(1 - kendall_tau_distance(r, ll), abs=1e-15)
    assert kendall_tau_distance(r, r) == pytest.approx(0, abs=0)
    assert kendall_tau_distance(r, -r) == pytest.approx(1, abs=0)


@given(scored(unique=True))
def test_the_distance_without_ties_is_scipys_tau(pair):
    for r, ll, distance in zip(*pair, kendall_tau_distance(*pair), strict=True):
        assert distance == pytest.approx((1 - stats.kendalltau(r, ll).statistic) / 2, abs=1e-12)


@given(scored(elements=_TIED))
def test_the_distance_with_ties_is_the_double_loops(pair):
    expected = [brute_force_distance(r, ll) for r, ll in zip(*pair, strict=True)]
    np.testing.assert_allclose(kendall_tau_distance(*pair), expected, rtol=1e-15)


@given(scored(elements=_TIED))
def test_pacs_is_the_textbook_formula(pair):
    expected = [naive_pacs(r, ll) for r, ll in zip(*pair, strict=True)]
    np.testing.assert_allclose(pacs(*pair), expected, atol=1e-12)


@given(ragged())
def test_ragged_prompts_equal_one_prompt_at_a_time(prompts):
    rewards, logprobs = prompts
    distances = kendall_tau_distance(rewards, logprobs)
    values = pacs(rewards, logprobs)
    assert isinstance(values, list)
    for i, (r, ll) in enumerate(zip(rewards, logprobs, strict=True)):
        np.testing.assert_array_equal(values[i], pacs(r, ll))
        assert distances[i] == kendall_tau_distance(r, ll)


@given(ragged())
def test_conflicts_holds_both_metrics_and_their_summaries(prompts):
    rewards, logprobs = prompts
    sizes = [len(r) for r in rewards]
    found = conflicts(np.concatenate(rewards), np.concatenate(logprobs), np.cumsum([0, *sizes]))
    values = pacs(rewards, logprobs)
    np.testing.assert_array_equal(found.pacs, np.concatenate(values))
    np.testing.assert_array_equal(found.kendall_tau_distance, kendall_tau_distance(rewards, logprobs))
    np.testing.assert_allclose(found.mean_abs_pacs, [np.mean(np.abs(v)) for v in values], atol=1e-15)
    np.testing.assert_array_equal(found.max_abs_pacs, [np.max(np.abs(v)) for v in values])
    np.testing.assert_array_equal(found.n_completions, sizes)
    constant = [np.ptp(r) == 0 or np.ptp(ll) == 0 for r, ll in zip(rewards, logprobs, strict=True)]
    np.testing.assert_array_equal(found.degenerate, constant)
    for i in np.flatnonzero(~found.degenerate):
        points, copies = np.unique([rewards[i], logprobs[i]], axis=1, return_counts=True)
        assert found.n_distinct[i] == points.shape[1]
        assert found.tied_share[i] == pytest.approx(np.sum(copies * (copies - 1)) / (sizes[i] * (sizes[i] - 1)))
        assert found.distinct_distance[i] == pytest.approx(brute_force_distance(*points))


def test_many_prompts_in_several_blocks_equal_single_prompts():
    rng = np.random.default_rng(1)
    r, ll = rng.integers(0, 50, (2, 700, 60)).astype(float)
    distances, values = kendall_tau_distance(r, ll), pacs(r, ll)
    for p in (0, 545, 546, 699):
        assert distances[p] == pytest.approx(brute_force_distance(r[p], ll[p]), abs=1e-15)
        np.testing.assert_allclose(values[p], naive_pacs(r[p], ll[p]), atol=1e-12)


def test_a_few_hundred_completions_have_the_distance_of_scipy():
    r, ll = np.random.default_rng(2).normal(size=(2, 400))
    assert kendall_tau_distance(r, ll) == pytest.approx((1 - stats.kendalltau(r, ll).statistic) / 2, abs=1e-12)


def test_shapes_follow_the_input():
    r, ll = np.random.default_rng(0).normal(size=(2, 3, 5))
    assert pacs(r, ll).shape == (3, 5)
    assert pacs(r[0], ll[0]).shape == (5,)
    assert kendall_tau_distance(r, ll).shape == (3,)
    assert isinstance(kendall_tau_distance(r[0], ll[0]), float)
    assert isinstance(kendall_tau_distance([1.0, 2.0], [1.0, 2.0]), float)
    assert pacs(np.empty((0, 5)), np.empty((0, 5))).shape == (0, 5)
    assert kendall_tau_distance(np.empty((0, 5)), np.empty((0, 5))).shape == (0,)


@given(hnp.arrays(np.float64, (3, 7), elements=_VALUES))
def test_standardize_gives_mean_zero_and_population_variance_one(values):
    z, degenerate = standardize(values)
    np.testing.assert_array_equal(degenerate, np.ptp(values, axis=1) == 0)
    assert z.mean(axis=1) == pytest.approx(0, abs=1e-12)
    assert z.std(axis=1) == pytest.approx(np.where(degenerate, 0, 1), abs=1e-12)


@pytest.mark.parametrize(
    ("values", "degenerate"),
    [
        ([5.0, 5.0, 5.0], True),
        ([0.0, 0.0, 0.0], True),
        ([0.1 + 0.2, 0.3, 0.3], True),
        ([1e300, 1e300 * (1 + 1e-12), 1e300], True),
        ([1.0, 1.0 + 1e-9, 1.0], False),
        ([1e-300, 2e-300, 3e-300], False),
        ([-1e308, 1e308, 1e308], False),
        ([1e9, 1e9 + 1, 1e9 + 2], False),
    ],
)
def test_degenerate_is_relative_to_the_scale(values, degenerate):
    z, found = standardize(values)
    assert bool(found) is degenerate
    assert z.std() == pytest.approx(0 if degenerate else 1, abs=1e-9)


def test_a_large_offset_costs_no_precision():
    small = np.array([0.0, 1.0, 4.0, 9.0])
    np.testing.assert_allclose(standardize(small + 2.0**30)[0], standardize(small)[0], atol=1e-15)


def test_pacs_of_a_degenerate_prompt_is_zero_even_where_the_other_side_varies():
    assert not np.any(pacs([2.0, 2.0, 2.0], [-1.0, -2.0, -3.0]))
    assert not np.any(pacs([1.0, 2.0, 3.0], [-4.0, -4.0, -4.0]))


def test_the_distance_of_a_degenerate_prompt_ignores_rounding_noise():
    noise = [0.1 + 0.2, 0.3, 0.3]
    assert kendall_tau_distance(noise, [-1.0, -2.0, -3.0]) == 0.5
    assert kendall_tau_distance(noise, [-1.0, -1.0, -3.0]) == pytest.approx(1 / 3)
    assert kendall_tau_distance(noise, noise[::-1]) == 0.0


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_the_null_is_that_of_all_permutations(n):
    ranks = np.array(list(permutations(range(n))), float)
    distances = kendall_tau_distance(ranks, np.tile(np.arange(n, dtype=float), (len(ranks), 1)))
    null = kendall_null(n)
    assert distances.mean() == pytest.approx(null.mean)
    assert distances.std() == pytest.approx(null.sd)
    away = np.abs(distances - 0.5)
    expected = [np.mean(away >= a - 1e-12) for a in away]
    np.testing.assert_allclose(kendall_p_value(distances, n), expected, atol=1e-12)


@pytest.mark.parametrize("n", [8, 30, 150])
def test_the_null_is_that_of_simulated_independent_scores(n):
    r, ll = np.random.default_rng(3).normal(size=(2, 4000, n))
    distances, null = kendall_tau_distance(r, ll), kendall_null(n)
    assert distances.mean() == pytest.approx(null.mean, abs=4 * null.sd / sqrt(4000))
    assert distances.std() == pytest.approx(null.sd, rel=0.05)
    assert np.mean(kendall_p_value(distances, n) < 0.05) == pytest.approx(0.045, abs=0.02)


def test_the_null_at_eight_is_the_documented_one():
    assert kendall_null(8).sd == pytest.approx(0.144, abs=5e-4)


@pytest.mark.parametrize("n", [2, 3, 8, 33, 60, 100])
def test_p_values_are_scipys_exact_ones(n):
    rng = np.random.default_rng(n)
    reference = np.arange(n, dtype=float)
    for swaps in (0, 1, n // 2, n * n):
        ranks = reference.copy()
        for i, j in rng.integers(0, n, (swaps, 2)):
            ranks[[i, j]] = ranks[[j, i]]
        expected = stats.kendalltau(ranks, reference, method="exact").pvalue
        found = kendall_p_value(kendall_tau_distance(ranks, reference), n)
        assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_normal_approximation_joins_the_exact_distribution():
    distances = np.linspace(0.4, 0.6, 9)
    np.testing.assert_allclose(kendall_p_value(distances, 101), kendall_p_value(distances, 100), atol=0.02)


def test_p_value_of_a_half_count_is_the_exact_chance_of_one_as_far():
    away = np.abs(
        kendall_tau_distance(np.array(list(permutations([0.0, 1, 2, 3]))), np.tile(np.arange(4.0), (24, 1))) - 0.5
    )
    for half in range(13):
        expected = np.mean(away >= abs(half / 12 - 0.5) - 1e-12)
        assert float(kendall_p_value(half / 12, 4)) == pytest.approx(expected)


@pytest.mark.parametrize(("distance", "n"), [(1.1, 8), (-0.1, 8), (np.nan, 8), (0.5, 1)])
def test_p_value_refuses_what_is_no_distance(distance, n):
    with pytest.raises(DataError):
        kendall_p_value(distance, n)


@pytest.mark.parametrize("n", [2, 3, 8, 100, 101, 130])
def test_the_chance_shares_are_the_nulls_upper_tails(n):
    pmf = null_pmf(n)
    distance = np.linspace(0, 1, pmf.size)
    assert pmf.sum() == pytest.approx(1)
    assert np.sum(pmf * (distance - 0.5) ** 2) == pytest.approx(kendall_null(n).sd ** 2, rel=1e-3)
    shares = chance_shares(n)
    assert shares.above == pytest.approx(np.sum(pmf[distance > 0.5]), abs=2e-3)
    significant = (distance > 0.5) & (kendall_p_value(distance, n) < 0.05)
    assert shares.significant == pytest.approx(np.sum(pmf[significant]), abs=2e-3)


def test_the_chance_shares_at_eight_are_the_documented_ones():
    assert chance_shares(8).above == pytest.approx(0.452, abs=5e-4)
    assert chance_shares(8).significant == pytest.approx(0.016, abs=5e-4)
    assert chance_shares(4).significant == 0


def test_p_values_of_prompts_of_several_sizes():
    p = p_values(np.array([0.5, 1.0, 1.0, 0.0]), np.array([8, 8, 4, 1]))
    assert p.tolist() == [1.0, float(kendall_p_value(1.0, 8)), float(kendall_p_value(1.0, 4)), 1.0]


def repeated_answers(seed, prompts=200, n=8, distinct=4):
    """Draw independent scores of a few distinct answers, each given by the policy once or more."""
    rng = np.random.default_rng(seed)
    which = np.array(
        [rng.permutation([*range(distinct), *rng.integers(0, distinct, n - distinct)]) for _ in range(prompts)]
    )
    r, ll = (np.take_along_axis(rng.normal(size=(prompts, distinct)), which, axis=1) for _ in range(2))
    return conflicts(r.ravel(), ll.ravel(), np.arange(prompts + 1) * n)


@pytest.mark.parametrize(("distinct", "significant"), [(4, 0.0), (6, 0.04)])
def test_repeated_answers_of_independent_scores_are_no_agreement(distinct, significant):
    found = repeated_answers(5, distinct=distinct)
    summary = tally(found).summary()
    error = summary.null_sd / sqrt(200)
    assert summary.repeated_answers == 1 - distinct / 8
    assert summary.kendall_tau_distance < 0.5 - 1.96 * error  # what makes it look like agreement
    assert summary.kendall_tau_distance == pytest.approx(summary.null_mean, abs=1.96 * error)
    assert summary.distinct_distance == pytest.approx(0.5, abs=1.96 * error)
    assert summary.null_mean == pytest.approx(np.mean((1 - found.tied_share) / 2))
    assert summary.null_sd == pytest.approx(kendall_null(distinct).sd)
    assert summary.share_above_null == pytest.approx(summary.null_share_above, abs=0.1)
    assert summary.null_share_above == pytest.approx(chance_shares(distinct).above)
    p = p_values(found.distinct_distance, found.n_distinct)
    assert np.mean((p < 0.05) & (found.distinct_distance < 0.5)) <= significant
    assert summary.share_significant <= significant


def test_repeating_every_answer_changes_no_p_value():
    r, ll = np.random.default_rng(6).normal(size=(2, 50, 7))
    offsets = np.arange(51)
    once = conflicts(r.ravel(), ll.ravel(), 7 * offsets)
    thrice = conflicts(np.repeat(r, 3), np.repeat(ll, 3), 21 * offsets)
    np.testing.assert_array_equal(thrice.distinct_distance, once.kendall_tau_distance)
    np.testing.assert_array_equal(thrice.n_distinct, once.n_completions)
    np.testing.assert_allclose(thrice.kendall_tau_distance, (1 - thrice.tied_share) * once.kendall_tau_distance)


@pytest.mark.parametrize("spread", [0, 30, 300])
def test_the_length_correlation_does_not_depend_on_the_prompts_own_lengths(spread):
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 40, (400, 8)) + rng.integers(0, spread + 1, (400, 1))
    found = conflicts(rng.normal(size=3200), -2.5 * lengths.ravel(), np.arange(401) * 8)
    rho = length_correlation(found.pacs, lengths.ravel(), np.arange(401) * 8, found.degenerate)
    assert rho == pytest.approx(0.69, abs=0.03)


def test_the_length_correlation_counts_agreement_and_leaves_out_degenerate_prompts():
    offsets = np.array([0, 4, 8, 12])
    lengths = np.array([1, 2, 3, 4, 4, 3, 2, 1, 9, 1, 5, 7])
    rewards = np.array([1.0, 2, 3, 4, 4, 3, 2, 1, 1, 1, 1, 1])
    logprobs = np.array([-4.0, -3, -2, -1, -4, -3, -2, -1, -1, -2, -3, -4])
    found = conflicts(rewards, logprobs, offsets)
    assert not np.any(found.pacs[:4])  # not degenerate, though PACS is 0
    expected = stats.spearmanr(found.pacs[:8], lengths[:8]).statistic
    assert length_correlation(found.pacs, lengths, offsets, found.degenerate) == pytest.approx(expected)
    assert expected < 0.9
    assert length_correlation(found.pacs, np.full(12, 7), offsets, found.degenerate) is None
    assert length_correlation(found.pacs, lengths, offsets, np.ones(3, np.bool_)) is None


def test_mean_abs_pacs_above_one_flags_most_prompts_with_independent_scores():
    values = pacs(*np.random.default_rng(8).normal(size=(2, 20_000, 8)))
    assert np.mean(np.mean(np.abs(values), axis=1) > 1) == pytest.approx(0.72, abs=0.01)


@given(ragged())
def test_tallies_of_parts_add_up_to_the_tally_of_the_whole(prompts):
    parts = [conflicts(r, ll, [0, len(r)]) for r, ll in zip(*prompts, strict=True)]
    offsets = np.cumsum([0, *(len(r) for r in prompts[0])])
    whole = tally(conflicts(np.concatenate(prompts[0]), np.concatenate(prompts[1]), offsets))
    assert asdict(sum(map(tally, parts), ConflictTally())) == pytest.approx(asdict(whole))


def test_the_summary_averages_over_the_prompts_that_are_not_degenerate():
    opposed, agreed, flat = list(range(8)), [0.0, 1, 2], [1.0, 1.0]
    found = conflicts([*opposed, *agreed, *flat], [*(-x for x in opposed), *agreed, *[-1.0, -2.0]], [0, 8, 11, 13])
    summary = tally(found).summary()
    assert (summary.prompts, summary.completions, summary.degenerate) == (3, 13, 1)
    assert summary.kendall_tau_distance == 0.5
    assert summary.null_mean == 0.5
    assert summary.null_sd == pytest.approx(sqrt((kendall_null(8).sd ** 2 + kendall_null(3).sd ** 2) / 2))
    assert summary.share_above_null == 0.5
    assert summary.share_significant == 0.5
    assert summary.mean_abs_pacs == pytest.approx(np.mean(np.abs(pacs(opposed, opposed[::-1]))) / 2)


def test_the_summary_of_degenerate_prompts_has_no_averages():
    summary = tally(conflicts([1.0, 1.0], [-1.0, -2.0], [0, 2])).summary()
    assert (summary.degenerate, summary.kendall_tau_distance, summary.null_sd) == (1, None, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("what", ["reward", "logprob"])
def test_values_that_are_not_finite_name_prompt_and_side(bad, what):
    scores = {"reward": np.arange(7.0), "logprob": -np.arange(7.0)}
    scores[what][4] = bad
    arguments = (scores["reward"], scores["logprob"], [0, 2, 4, 7])
    with pytest.raises(DataError, match=f"prompt 'c' has a {what} of {bad}"):
        conflicts(*arguments, prompt_ids=["a", "b", "c"])
    with pytest.raises(DataError, match=f"prompt 2 has a {what}"):
        conflicts(*arguments)


@pytest.mark.parametrize(
    ("rewards", "logprobs", "message"),
    [
        ([1.0], [1.0], "1 completion"),
        (np.ones((3, 1)), np.ones((3, 1)), "prompt 0 has 1 completion"),
        ([np.ones(2), np.ones(1)], [np.ones(2), np.ones(1)], "prompt 1 has 1 completion"),
        ([], [], "0 completion"),
        (np.ones((2, 3)), np.ones((3, 2)), "same shape"),
        ([np.ones(2), np.ones(3)], [np.ones(3), np.ones(2)], "same shape"),
        (np.ones((2, 3, 4)), np.ones((2, 3, 4)), "neither"),
        ([np.ones((2, 2))], [np.ones((2, 2))], "one-dimensional"),
    ],
)
def test_shapes_that_hold_no_ranking_are_refused(rewards, logprobs, message):
    for metric in (pacs, kendall_tau_distance):
        with pytest.raises(DataError, match=message):
            metric(rewards, logprobs)


@pytest.mark.parametrize(
    ("rewards", "logprobs", "offsets", "ids", "message"),
    [
        (np.ones(4), np.ones(3), [0, 4], None, "one length"),
        (np.ones(4), np.ones(4), [0, 3], None, "offsets"),
        (np.ones(4), np.ones(4), [], None, "offsets"),
        (np.ones(4), np.ones(4), [0, 2, 4], ["a"], "1 prompt ids for 2 prompts"),
        (np.ones(4), np.ones(4), [0, 4, 0, 4], None, "has -4 completion"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(rewards, logprobs, offsets, ids, message):
    with pytest.raises(DataError, match=message):
        conflicts(rewards, logprobs, offsets, ids)
