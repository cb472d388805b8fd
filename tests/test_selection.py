"""Acquisition strategies: invariants on any pool, brute-force oracles on small ones, and the user's mistakes."""

import dataclasses
import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dissonance.errors import DataError, SettingsError
from dissonance.likelihood import loglikelihood
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, QUERIES_SCHEMA, Query
from dissonance.selection import (
    STRATEGIES,
    Pool,
    Threshold,
    Thresholds,
    parse_threshold,
    pool_from_tables,
    queries_table,
    select,
)

CONFLICT_DRIVEN = ("shf_cas", "discordant", "spread", "likelihood_gap", "pacs", "kendall")


def z(values):
    sd = values.std()
    return np.zeros_like(values) if sd == 0 else (values - values.mean()) / sd


def distance(reward, likelihood):
    pairs = list(itertools.combinations(range(len(reward)), 2))
    signs = [(np.sign(reward[i] - reward[j]), np.sign(likelihood[i] - likelihood[j])) for i, j in pairs]
    return sum(0.5 if (a == 0) != (b == 0) else float(a * b < 0) for a, b in signs) / max(1, len(pairs))


def make_pool(prompts) -> Pool:
    """Build the pool of [(rewards, log-likelihoods, text codes), ...]; completion ids run from 100 on."""
    rewards, likelihoods, codes = ([np.asarray(column) for column in columns] for columns in zip(*prompts, strict=True))
    sizes = [len(reward) for reward in rewards]
    return Pool(
        prompt_ids=tuple(f"p{i}" for i in range(len(prompts))),
        kendall_tau_distance=np.array([distance(*scores) for scores in zip(rewards, likelihoods, strict=True)]),
        degenerate=np.array([r.std() == 0 or v.std() == 0 for r, v in zip(rewards, likelihoods, strict=True)]),
        offsets=np.concatenate(([0], np.cumsum(sizes))),
        completion_ids=np.concatenate([100 + np.arange(size) for size in sizes]),
        reward=np.concatenate(rewards).astype(float),
        loglikelihood=np.concatenate(likelihoods).astype(float),
        pacs=np.concatenate([z(r) - z(v) for r, v in zip(rewards, likelihoods, strict=True)]),
        text_codes=np.concatenate(codes).astype(int),
        member_rewards=np.stack([np.concatenate(rewards), 2 * np.concatenate(likelihoods)], axis=1).astype(float),
        mean_loglikelihood=np.concatenate(likelihoods).astype(float) % 4,
        implicit_reward=np.concatenate(likelihoods).astype(float) % 3,
    )


def random_pool(n_prompts, n, seed=0, n_texts=10**9) -> Pool:
    rng = np.random.default_rng(seed)
    shape = (n_prompts, n)
    return make_pool(
        list(zip(rng.normal(size=shape), rng.normal(size=shape), rng.integers(n_texts, size=shape), strict=True))
    )


@st.composite
def pools(draw):
    """Ragged, with ties, repeated texts and degenerate prompts."""
    small = st.integers(0, 4)
    row = st.tuples(small.map(float), small.map(float), small)
    prompts = draw(st.lists(st.lists(row, min_size=1, max_size=6), min_size=1, max_size=6))
    return make_pool([tuple(np.array(column) for column in zip(*rows, strict=True)) for rows in prompts])


def choose(pool, strategy, budget, seed=0, **options):
    return select(pool, strategy, budget=budget, rng=np.random.default_rng(seed), **options)


def flat(pool, query):
    """Flat indices of a query's completions."""
    prompt = pool.prompt_ids.index(query.prompt_id)
    return [int(pool.offsets[prompt]) + i - 100 for i in query.completion_ids]


def representatives(pool, prompt):
    """Find the first flat index of each distinct text of a prompt, by a plain loop."""
    first = {}
    for i in range(pool.offsets[prompt], pool.offsets[prompt + 1]):
        first.setdefault(pool.text_codes[i], i)
    return list(first.values())


def all_pairs(pool):
    prompts = range(len(pool.prompt_ids))
    return [pair for prompt in prompts for pair in itertools.combinations(representatives(pool, prompt), 2)]


def opposed(pool, i, j):
    return (pool.reward[i] - pool.reward[j]) * (pool.loglikelihood[i] - pool.loglikelihood[j]) < 0


def width(pool, i, j):
    """How far apart reward and likelihood put two answers, in standard deviations of their prompt."""
    rows = slice(*pool.offsets[pool.prompt_of[i] :][:2])
    at = i - rows.start, j - rows.start
    return sum(abs(z(scores[rows])[at[0]] - z(scores[rows])[at[1]]) for scores in (pool.reward, pool.loglikelihood))


def askable(pool, strategy):
    """How many judgements there are to ask for, by brute force."""
    prompts = range(len(pool.prompt_ids))
    proper = [p for p in prompts if not pool.degenerate[p]]
    conflicting = [p for p in proper if pool.kendall_tau_distance[p] > 0]
    sizes = [len(representatives(pool, p)) for p in prompts]
    apart = [pool.prompt_of[i] for i, j in all_pairs(pool) if width(pool, i, j) > 0]
    by_strategy = {
        "shf_cas": lambda: sum(sizes[p] for p in proper),
        "pacs": lambda: sum(sizes[p] for p in proper),
        "kendall": lambda: sum(sizes[p] - 1 for p in proper),
        "random_prompts": lambda: sum(size - 1 for size in sizes),
        "rso": lambda: sum(math.comb(max(2, size // 2), 2) for size in sizes if size > 1),
        "spread": lambda: sum(p in conflicting for p in apart),
        "likelihood_gap": lambda: sum(
            pool.prompt_of[i] in conflicting and pool.mean_loglikelihood[i] != pool.mean_loglikelihood[j]
            for i, j in all_pairs(pool)
        ),
        "discordant": lambda: sum(opposed(pool, i, j) and pool.prompt_of[i] in proper for i, j in all_pairs(pool)),
    }
    return by_strategy.get(strategy, lambda: len(all_pairs(pool)))()


# ---- invariants ----


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 60), seed=st.integers(0, 3))
def test_the_budget_is_spent_exactly_and_nothing_is_asked_twice(strategy, pool, budget, seed):
    selection = choose(pool, strategy, budget, seed)
    assert selection.judgements == min(budget, askable(pool, strategy))
    asked = [(q.prompt_id, frozenset(q.completion_ids)) for q in selection.queries]
    assert len(set(asked)) == len(asked)
    assert selection == choose(pool, strategy, budget, seed)
    for query in selection.queries:
        rows = flat(pool, query)
        assert rows == sorted(rows)
        assert len({pool.text_codes[i] for i in rows}) == len(rows)
        if strategy in CONFLICT_DRIVEN:
            assert not pool.degenerate[pool.prompt_of[rows[0]]]
    if not strategy.startswith("random") and strategy not in ("discordant", "spread", "likelihood_gap", "rso", "apl"):
        priorities = [q.priority for q in selection.queries]
        assert priorities == sorted(priorities, reverse=True)
    if strategy in ("shf_cas", "pacs"):
        texts = [(q.prompt_id, pool.text_codes[flat(pool, q)[0]]) for q in selection.queries]
        assert len(set(texts)) == len(texts), "a text is rated once"


@settings(max_examples=60)
@given(pool=pools())
def test_answers_are_the_first_of_each_text(pool):
    expected = [representatives(pool, p) for p in range(len(pool.prompt_ids))]
    assert pool.answers.tolist() == [i for answers in expected for i in sorted(answers)]
    assert pool.n_answers.tolist() == [len(answers) for answers in expected]


# ---- each strategy against its definition ----


@given(
    pool=pools(), budget=st.integers(1, 12), tau=st.sampled_from([None, 0.3, 0.5]), delta=st.sampled_from([None, 0.5])
)
def test_ratings_are_the_largest_pacs_above_the_thresholds(pool, budget, tau, delta):
    def oracle(tau):
        proper = [p for p in range(len(pool.prompt_ids)) if not pool.degenerate[p]]
        kept = [p for p in proper if tau is None or pool.kendall_tau_distance[p] >= tau]
        scores = [abs(pool.pacs[i]) for p in kept for i in representatives(pool, p)]
        return sorted((score for score in scores if delta is None or score >= delta), reverse=True)[:budget]

    thresholds = {name: value and Threshold(value) for name, value in (("tau", tau), ("delta", delta))}
    selection = choose(pool, "shf_cas", budget, **thresholds)
    assert [q.priority for q in selection.queries] == oracle(tau)
    assert [abs(pool.pacs[flat(pool, q)[0]]) for q in selection.queries] == oracle(tau)
    assert {q.kind for q in selection.queries} <= {"rating"}
    assert [q.priority for q in choose(pool, "pacs", budget, delta=thresholds["delta"]).queries] == oracle(None)


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 12))
def test_margin_takes_the_closest_rewards(pool, budget):
    def gap(i, j):
        return abs(pool.reward[i] - pool.reward[j])

    queries = choose(pool, "margin", budget).queries
    chosen = [flat(pool, q) for q in queries]
    assert [gap(*pair) for pair in chosen] == sorted(gap(*pair) for pair in all_pairs(pool))[:budget]
    assert [-q.priority for q in queries] == [gap(*pair) for pair in chosen]


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 12), shift=st.floats(-5, 5))
def test_the_ensemble_takes_the_pairs_on_which_its_members_differ_most(pool, budget, shift):
    def spread(i, j):
        differences = [member[i] - member[j] for member in pool.member_rewards.T]
        return float(np.std(differences))

    queries = choose(pool, "ensemble", budget).queries
    found = [spread(*flat(pool, q)) for q in queries]
    assert found == pytest.approx(sorted((spread(*pair) for pair in all_pairs(pool)), reverse=True)[:budget])
    assert [q.priority for q in queries] == pytest.approx(found)
    # What a member adds to every answer of a prompt says nothing about which is better.
    added = shift * pool.prompt_of[:, None] * np.array([0, 1])
    moved = dataclasses.replace(pool, member_rewards=pool.member_rewards + added)
    assert [q.priority for q in choose(moved, "ensemble", budget).queries] == pytest.approx(found, abs=1e-9)


def test_the_ensemble_needs_an_ensemble():
    alone = dataclasses.replace(random_pool(3, 3), member_rewards=None)
    with pytest.raises(SettingsError, match="needs what several reward models say: add their rewards as the column"):
        choose(alone, "ensemble", 2)
    assert choose(alone, "margin", 2).judgements == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (np.zeros((9, 1)), r"member_rewards has shape \(9, 1\), expected \(9, 2 or more\)"),
        (np.zeros(9), r"member_rewards has shape \(9,\)"),
        (np.full((9, 2), np.nan), "prompt 'p0' has member_rewards that are no numbers"),
    ],
)
def test_an_ensemble_that_does_not_fit_is_refused(members, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(random_pool(3, 3), member_rewards=members)


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 40))
def test_apl_goes_round_by_falling_gap_in_the_implicit_reward(pool, budget):
    by_prompt = {}
    for i, j in all_pairs(pool):
        gap = abs(pool.implicit_reward[i] - pool.implicit_reward[j])
        by_prompt.setdefault(pool.prompt_of[i], []).append(gap)
    ranked = [(turn, -gap) for gaps in by_prompt.values() for turn, gap in enumerate(sorted(gaps, reverse=True))]
    assert [q.priority for q in choose(pool, "apl", budget).queries] == [-low for _, low in sorted(ranked)[:budget]]


def test_apl_does_not_hang_on_blocks_and_needs_a_reference(monkeypatch):
    pool = random_pool(40, 5, n_texts=6)
    whole = [q.priority for q in choose(pool, "apl", 60).queries]
    monkeypatch.setattr("dissonance.selection.strategies._PAIRS_PER_BLOCK", 7)
    assert [q.priority for q in choose(pool, "apl", 60).queries] == whole
    with pytest.raises(SettingsError, match="needs what a reference model says"):
        choose(dataclasses.replace(pool, implicit_reward=None), "apl", 2)
    with pytest.raises(DataError, match="prompt 'p0' has a completion whose implicit_reward is not a finite number"):
        dataclasses.replace(pool, implicit_reward=np.full(200, np.nan))
    with pytest.raises(DataError, match=r"implicit_reward has shape \(3,\), expected \(200,\)"):
        dataclasses.replace(pool, implicit_reward=np.zeros(3))


def test_rso_favours_what_is_rewarded_and_goes_round_the_prompts():
    n = 8
    pool = make_pool([(np.arange(n), np.arange(n), np.arange(n))] * 30)
    kept = [i - n * pool.prompt_of[i] for q in choose(pool, "rso", 30).queries for i in flat(pool, q)]
    assert np.mean(kept) > 5, "of rewards 0 to 7, whose mean is 3.5"
    order = [q.prompt_id for q in choose(pool, "rso", 90).queries]
    assert all(len(set(order[at : at + 30])) == 30 for at in (0, 30, 60)), "each prompt once before any again"


def test_margin_does_not_hang_on_blocks(monkeypatch):
    pool = random_pool(40, 5, n_texts=6)
    whole = [q.priority for q in choose(pool, "margin", 30).queries]
    monkeypatch.setattr("dissonance.selection.strategies._PAIRS_PER_BLOCK", 7)
    assert [q.priority for q in choose(pool, "margin", 30).queries] == whole


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 40), seed=st.integers(0, 5))
def test_discordant_goes_round_by_falling_gap(pool, budget, seed):
    by_prompt = {}
    for i, j in all_pairs(pool):
        if opposed(pool, i, j) and not pool.degenerate[pool.prompt_of[i]]:
            by_prompt.setdefault(f"p{pool.prompt_of[i]}", []).append(abs(pool.pacs[i] - pool.pacs[j]))
    asked = {prompt: [] for prompt in by_prompt}
    queries = choose(pool, "discordant", budget, seed).queries
    for query in queries:
        i, j = flat(pool, query)
        assert opposed(pool, i, j)
        assert query.priority == abs(pool.pacs[i] - pool.pacs[j])
        asked[query.prompt_id].append(query.priority)
    for prompt, gaps in asked.items():
        assert gaps == sorted(by_prompt[prompt], reverse=True)[: len(gaps)], "largest gap first"
    first_round = [q.prompt_id for q in queries[: len(by_prompt)]]
    assert len(set(first_round)) == len(first_round), "no prompt again before every prompt was asked about"
    order = [q.prompt_id for q in queries]
    second_round = order[len(by_prompt) :][: len(set(order[len(by_prompt) :]))]
    assert second_round == [p for p in first_round if p in second_round], "each round in the same order"


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 40), seed=st.integers(0, 5))
def test_spread_goes_round_by_falling_width(pool, budget, seed):
    by_prompt = {}
    for i, j in all_pairs(pool):
        p = pool.prompt_of[i]
        if pool.kendall_tau_distance[p] > 0 and not pool.degenerate[p]:
            by_prompt.setdefault(f"p{p}", []).append(width(pool, i, j))
            if opposed(pool, i, j):
                assert width(pool, i, j) == pytest.approx(abs(pool.pacs[i] - pool.pacs[j]))
    queries = choose(pool, "spread", budget, seed).queries
    asked = {}
    for query in queries:
        assert query.priority == pytest.approx(width(pool, *flat(pool, query)))
        asked.setdefault(query.prompt_id, []).append(query.priority)
    for prompt, widths in asked.items():
        assert widths == pytest.approx(sorted(by_prompt[prompt], reverse=True)[: len(widths)])
    turns = [sum(q.prompt_id == query.prompt_id for q in queries[:at]) for at, query in enumerate(queries)]
    assert turns == sorted(turns), "no prompt again before every prompt was asked about"


@settings(max_examples=60)
@given(pool=pools(), budget=st.integers(1, 40), seed=st.integers(0, 5), known=st.booleans())
def test_likelihood_gap_goes_round_by_falling_gap(pool, budget, seed, known):
    if not known:
        pool = dataclasses.replace(pool, mean_loglikelihood=None)
    values = pool.mean_loglikelihood if known else pool.loglikelihood
    by_prompt = {}
    for i, j in all_pairs(pool):
        p = pool.prompt_of[i]
        if pool.kendall_tau_distance[p] > 0 and not pool.degenerate[p] and values[i] != values[j]:
            by_prompt.setdefault(f"p{p}", []).append(abs(values[i] - values[j]))
    queries = choose(pool, "likelihood_gap", budget, seed).queries
    asked = {}
    for query in queries:
        asked.setdefault(query.prompt_id, []).append(query.priority)
    for prompt, gaps in asked.items():
        assert gaps == sorted(by_prompt[prompt], reverse=True)[: len(gaps)]
    turns = [sum(q.prompt_id == query.prompt_id for q in queries[:at]) for at, query in enumerate(queries)]
    assert turns == sorted(turns), "no prompt again before every prompt was asked about"


def test_discordant_draws_prompts_in_proportion_to_the_square_of_k():
    base = [0.0, 1.0, 2.0]
    orders = [[0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]
    pool = make_pool([(np.array(base), np.array(order), np.arange(3)) for order in orders])
    assert np.allclose(pool.kendall_tau_distance, [1 / 3, 2 / 3, 1, 0])
    counts = dict.fromkeys(pool.prompt_ids, 0)
    pairs = {}
    for seed in range(1400):
        one, two = choose(pool, "discordant", 2, seed).queries
        counts[one.prompt_id] += 1
        pairs[one.prompt_id, two.prompt_id] = pairs.get((one.prompt_id, two.prompt_id), 0) + 1
    assert counts["p3"] == 0
    assert chisquare([counts["p0"], counts["p1"], counts["p2"]], [100, 400, 900]).pvalue > 1e-3
    after = [pairs["p2", "p0"], pairs["p2", "p1"]]
    assert chisquare(after, [sum(after) / 5, sum(after) * 4 / 5]).pvalue > 1e-3, "and then among those left"


def test_discordant_passes_over_prompts_whose_conflict_is_all_ties():
    ties = (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0]), np.arange(3))
    conflict = (np.array([0.0, 2.0, 1.0]), np.array([0.0, 1.0, 2.0]), np.arange(3))
    pool = make_pool([ties, conflict] * 1300)
    assert np.allclose(pool.kendall_tau_distance, 1 / 3)
    queries = choose(pool, "discordant", 1200).queries
    assert len({q.prompt_id for q in queries}) == len(queries) == 1200
    assert choose(pool, "discordant", 300).queries == queries[:300], "and looks no further than it must"


def test_random_pairs_are_uniform_over_all_pairs():
    pool = make_pool(
        [(np.arange(n), np.arange(n), codes) for n, codes in ((3, [0, 1, 2]), (4, [0, 1, 0, 2]), (2, [0, 0]))]
    )
    everything = {(q.prompt_id, q.completion_ids) for q in choose(pool, "random_pairs", 99).queries}
    assert len(everything) == 6
    counts = dict.fromkeys(everything, 0)
    for seed in range(600):
        (query,) = choose(pool, "random_pairs", 1, seed).queries
        counts[query.prompt_id, query.completion_ids] += 1
    assert chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [2, 3, 7, 50, 200])
def test_random_pairs_number_every_pair_once(n):
    pool = make_pool([(np.arange(2), np.arange(2), np.arange(2)), (np.arange(n), np.arange(n), np.arange(n))])
    drawn = {(q.prompt_id, q.completion_ids) for q in choose(pool, "random_pairs", n * n).queries}
    assert len(drawn) == 1 + n * (n - 1) // 2


def test_rankings_end_on_the_budget_with_part_of_a_prompt():
    pool = random_pool(5, 4)
    selection = choose(pool, "kendall", 8)
    assert [len(q.completion_ids) for q in selection.queries] == [4, 4, 3]
    assert [q.priority for q in selection.queries] == sorted(pool.kendall_tau_distance, reverse=True)[:3]
    last = selection.queries[-1]
    prompt = pool.prompt_ids.index(last.prompt_id)
    weakest = min(representatives(pool, prompt), key=lambda i: abs(pool.pacs[i]))
    assert weakest not in flat(pool, last)
    assert "3 of 4 answers, to fit the budget" in last.reason
    assert len({choose(pool, "random_prompts", 1, seed).queries[0].completion_ids for seed in range(40)}) == 6


@pytest.mark.parametrize("strategy", ["discordant", "spread", "likelihood_gap"])
def test_ties_within_a_prompt_do_not_favour_what_stands_first(strategy):
    scores = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    pool = make_pool([(scores, 1 - scores, np.arange(6))])
    assert len({choose(pool, strategy, 1, seed).queries[0].completion_ids for seed in range(40)}) > 5


def test_without_lengths_likelihood_gap_warns():
    pool = random_pool(4, 3)
    assert not any("n_tokens" in line for line in choose(pool, "likelihood_gap", 2).explanation)
    without = dataclasses.replace(pool, mean_loglikelihood=None)
    assert "n_tokens is not known of every completion" in " ".join(choose(without, "likelihood_gap", 2).explanation)
    assert not any("n_tokens" in line for line in choose(without, "spread", 2).explanation)


def test_by_default_the_policys_likeliest_answer_is_compared_with_its_least_likely():
    found = select(random_pool(4, 3), budget=3, rng=np.random.default_rng(0))
    assert (found.strategy, {query.kind for query in found.queries}) == ("likelihood_gap", {"pairwise"})


@pytest.mark.parametrize("strategy", ["shf_cas", "pacs", "kendall", "margin"])
def test_ties_do_not_favour_what_stands_first(strategy):
    pool = make_pool([(np.array([0.0, 1.0]), np.array([1.0, 0.0]), np.arange(2))] * 30)
    assert len({choose(pool, strategy, 1, seed).queries[0].prompt_id for seed in range(20)}) > 5


def test_reasons_are_for_people():
    pool = make_pool([(np.array([3.0, 0.0, 1.0]), np.array([-9.0, -1.0, -5.0]), np.arange(3))])
    pool = dataclasses.replace(pool, mean_loglikelihood=np.array([-0.9, -0.1, -0.5]))
    reasons = {name: choose(pool, name, 2).queries[0].reason for name in STRATEGIES}
    assert reasons["pacs"] == reasons["shf_cas"]
    assert reasons["pacs"].startswith("K = 1.00; reward ranks it 1 of 3, policy 3 of 3; PACS +2.")
    assert reasons["discordant"].startswith("K = 1.00; reward prefers 100, policy 101; PACS ")
    assert reasons["spread"].startswith("K = 1.00; reward and likelihood put them ")
    assert reasons["likelihood_gap"] == "K = 1.00; per token, policy prefers 101 to 100 by 0.80 nats"
    assert reasons["kendall"] == "K = 1.00; all 3 answers"
    assert reasons["margin"] == "rewards only 1 apart"
    assert reasons["apl"].startswith("implicit rewards ")
    assert reasons["rso"] == "pair kept by rejection sampling on the reward"
    assert reasons["random_pairs"] == "pair drawn at random"
    assert reasons["random_prompts"] == "prompt drawn at random; all 3 answers"


def test_every_strategy_takes_a_hundred_thousand_prompts():
    n_prompts, n = 100_000, 8
    rng = np.random.default_rng(0)
    reward, likelihood = rng.normal(size=(2, n_prompts * n))
    pool = Pool(
        tuple(map(str, range(n_prompts))), rng.random(n_prompts), np.zeros(n_prompts, bool),
        np.arange(0, n_prompts * n + 1, n),
        np.tile(np.arange(n), n_prompts), reward, likelihood, reward - likelihood, rng.integers(0, 20, n_prompts * n),
        rng.normal(size=(n_prompts * n, 3)), rng.normal(size=n_prompts * n),
    )  # fmt: skip
    for strategy in STRATEGIES:
        assert choose(pool, strategy, 500).judgements == 500


# ---- thresholds ----


def test_thresholds_are_read():
    assert parse_threshold(" 0.6 ", "tau") == Threshold(0.6)
    assert parse_threshold("Q0.9", "delta") == Threshold(0.9, quantile=True)
    assert [str(parse_threshold(text, "delta")) for text in ("2", "q0.25")] == ["2", "q0.25"]


NONSENSE = {
    "tau": ("1.1", "-0.1", "nan", "q0", "qnan", "q", "high", "90%"),
    "delta": ("-1", "inf", "nan", "q1", "q-0.5", ""),
}


@pytest.mark.parametrize(("text", "name"), [(text, name) for name in NONSENSE for text in NONSENSE[name]])
def test_nonsense_thresholds_are_refused(text, name):
    with pytest.raises(SettingsError, match=f"--{name} "):
        parse_threshold(text, name)


def test_quantiles_are_of_what_is_not_degenerate():
    pool = random_pool(50, 6)
    pool = make_pool([(np.ones(6), np.arange(6.0), np.arange(6))] * 50 + [
        (pool.reward[i : i + 6], pool.loglikelihood[i : i + 6], np.arange(6)) for i in range(0, 300, 6)
    ])  # fmt: skip
    selection = choose(pool, "shf_cas", 9999, tau=Threshold(0.8, quantile=True), delta=Threshold(0.5, quantile=True))
    tau, delta = selection.thresholds.tau, selection.thresholds.delta
    assert tau == np.quantile(pool.kendall_tau_distance[50:], 0.8, method="higher")
    assert delta == np.quantile(np.abs(pool.pacs[300:]), 0.5, method="higher")
    rows = [flat(pool, q)[0] for q in selection.queries]
    assert set(rows) == {
        i for i in range(300, 600) if pool.kendall_tau_distance[i // 6] >= tau and abs(pool.pacs[i]) >= delta
    }
    kept = sum(pool.kendall_tau_distance[50:] >= tau)
    assert selection.explanation[0] == (
        f"100 prompts -> 50 not degenerate -> {kept} with K >= {tau:.2f} -> {len(rows)} completions with |PACS| >= "
        f"{delta:.2f} -> {len(rows)} rating queries within the budget ({len(rows)} of 9,999 judgements)"
    )
    assert not any(line.startswith("warning") for line in selection.explanation)


def test_a_threshold_that_keeps_nearly_everything_is_called_out():
    selection = choose(random_pool(400, 8), "shf_cas", 50, tau=Threshold(0.3), delta=Threshold(0.5))
    _, tau, delta = selection.explanation
    assert tau.startswith("warning: K >= 0.30 keeps 9")
    assert "of independent scores it would keep 91%" in tau  # the Mahonian numbers; a normal tail says 92%
    assert delta.startswith("warning: |PACS| >= 0.50 keeps 7")
    assert "of independent scores it would keep 72%" in delta


def test_a_pool_without_conflicts_asks_nothing():
    pool = make_pool([(np.ones(3), np.arange(3.0), np.arange(3))] * 2)
    selection = choose(pool, "shf_cas", 5, tau=Threshold(0.9, quantile=True), delta=Threshold(0.1))
    assert (selection.queries, selection.thresholds.tau) == ((), math.inf)
    assert "nothing to ask" in selection.explanation[0]
    assert queries_table(selection).schema == QUERIES_SCHEMA


def test_more_budget_than_questions_is_said():
    selection = choose(random_pool(2, 3), "random_pairs", 50)
    assert (selection.judgements, selection.prompts) == (6, 2)
    assert selection.explanation[-1] == "note: there is no more to ask: 6 of 50 judgements are spent"


# ---- the user's own strategies, and mistakes ----


def test_a_callable_is_a_strategy():
    def longest_first(pool, budget, thresholds, rng):
        assert thresholds == Thresholds(tau=0.1)
        return [Query(pool.prompt_ids[p], "rating", (100,), 1.0, "mine") for p in range(budget)]

    selection = choose(random_pool(5, 3), longest_first, 3, tau=Threshold(0.1))
    assert (selection.strategy, selection.judgements, selection.prompts) == ("longest_first", 3, 3)
    assert choose(random_pool(5, 3), STRATEGIES["margin"], 3).strategy == "margin"


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([("p0", (100, 101)), ("p0", (101, 102)), ("p1", (100, 101))], "asked for 3 judgements with a budget of 2"),
        ([("p9", (100, 101))], "'p9': no such prompt"),
        ([("p0", (100, 103))], r"the prompt has only \[100, 101, 102\]"),
        ([("p1", (100, 102))], "two of them are the same text"),
        ([("p0", (100, 101)), ("p0", (101, 100))], "twice"),
    ],
)
def test_a_callable_that_breaks_the_rules_is_refused(queries, message):
    pool = make_pool([(np.arange(3.0), np.arange(3.0), codes) for codes in ([0, 1, 2], [0, 1, 0])])

    class Mine:
        def __call__(self, *_):
            return [Query(prompt, "pairwise", ids, 0.0, "") for prompt, ids in queries]

    with pytest.raises(SettingsError, match=message) as caught:
        choose(pool, Mine(), 2)
    assert str(caught.value).startswith("strategy 'Mine' asked")


def test_settings_that_make_no_sense():
    pool = random_pool(2, 3)
    with pytest.raises(
        SettingsError, match="unknown strategy 'shfcas': use one of shf_cas, discordant, spread, likelihood_gap,"
    ):
        choose(pool, "shfcas", 1)
    for budget in (0, -1):
        with pytest.raises(SettingsError, match=f"the budget is {budget} judgements"):
            choose(pool, "pacs", budget)
    with pytest.raises(SettingsError, match=r"strategy 'pacs' uses no tau: .* one of shf_cas, kendall, discordant"):
        choose(pool, "pacs", 1, tau=Threshold(0.5))
    with pytest.raises(SettingsError, match=r"strategy 'margin' uses no delta: .* one of shf_cas, pacs"):
        choose(pool, STRATEGIES["margin"], 1, delta=Threshold(0.5))
    with pytest.raises(SettingsError, match="--tau 3"):
        choose(pool, "shf_cas", 1, tau=Threshold(3))


# ---- tables ----


def tables(**changes):
    prompts = pa.table(
        {"prompt_id": ["x", "y"], "kendall_tau_distance": [1.0, 0.0], "degenerate": [False, False]},
        schema=pa.schema([PROMPTS_SCHEMA.field(n) for n in ("prompt_id", "kendall_tau_distance", "degenerate")]),
    )
    columns = {
        "prompt_id": ["y", "x", "x", "y", "x"],
        "completion_id": [1, 2, 0, 0, 1],
        "text": ["b", "a", "a", "a", None],
        "n_tokens": [2, 4, 5, 10, 8],
        "logprob": [-1.0, -2.0, -3.0, -4.0, -5.0],
        "ref_logprob": [-1.5, -1.0, -3.0, -8.0, -4.0],
        "reward": [1.0, 2.0, 3.0, 4.0, 5.0],
        "pacs": [0.1, 0.2, 0.3, 0.4, 0.5],
    } | changes
    kept = {name: values for name, values in columns.items() if values is not None}
    return prompts, pa.table(kept, schema=pa.schema([COMPLETIONS_SCHEMA.field(name) for name in kept]))


def test_a_pool_is_built_from_the_tables_in_any_order():
    pool = pool_from_tables(*tables(), "sum")
    assert pool.prompt_ids == ("x", "y")
    assert pool.offsets.tolist() == [0, 3, 5]
    assert pool.completion_ids.tolist() == [0, 1, 2, 0, 1]
    assert pool.reward.tolist() == [3, 5, 2, 4, 1]
    assert pool.loglikelihood.tolist() == [-3, -5, -2, -4, -1]
    assert pool.pacs.tolist() == [0.3, 0.5, 0.2, 0.4, 0.1]
    assert pool.answers.tolist() == [0, 1, 3, 4], "0 and 2 are the same text; a missing one is like none"
    assert pool_from_tables(*tables(text=None), "sum").n_answers.tolist() == [3, 2]
    assert pool_from_tables(*tables(text=[None] * 5), "sum").n_answers.tolist() == [3, 2]
    assert pool_from_tables(*tables(), "mean").loglikelihood.tolist() == [-0.6, -0.625, -0.5, -0.4, -0.5]
    assert pool_from_tables(*tables(), "relative").loglikelihood.tolist() == [0, -1, -1, 4, 0.5]
    assert pool.mean_loglikelihood.tolist() == [-0.6, -0.625, -0.5, -0.4, -0.5], "whatever the reading"
    assert pool.implicit_reward.tolist() == [0, -1, -1, 4, 0.5]
    for unknown in (None, [2, 4, None, 10, 8], [2, 4, 0, 10, 8]):
        assert pool_from_tables(*tables(n_tokens=unknown), "sum").mean_loglikelihood is None


def test_the_rewards_of_an_ensemble_come_with_their_completions():
    prompts, completions = tables()
    column = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [5.0, 50.0]]
    scored = completions.append_column("member_rewards", pa.array(column))
    pool = pool_from_tables(prompts, scored, "sum")
    assert pool.member_rewards.tolist() == [[r, 10 * r] for r in pool.reward]
    assert pool_from_tables(prompts, completions, "sum").member_rewards is None
    cut = pa.concat_tables([scored[:2], scored[2:]])
    assert pool_from_tables(prompts, cut, "sum").member_rewards.tolist() == pool.member_rewards.tolist()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1.0, 2.0], [1.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], "lists of different lengths"),
        ([[1.0, 2.0], None, [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], "lists of different lengths"),
        ([[1.0, None], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], "prompt 'y' has member_rewards that are no"),
        ([[1.0]] * 5, r"shape \(5, 1\), expected \(5, 2 or more\)"),
    ],
)
def test_rewards_of_an_ensemble_that_do_not_fit(column, message):
    prompts, completions = tables()
    with pytest.raises(DataError, match=message):
        pool_from_tables(prompts, completions.append_column("member_rewards", pa.array(column)), "sum")


def test_chunks_of_a_table_make_no_difference():
    prompts, completions = tables()
    chunked = pa.concat_tables([completions[:2], completions[2:2], completions[2:]])
    one, two = (pool_from_tables(prompts, table, "sum") for table in (completions, chunked))
    assert one.answers.tolist() == two.answers.tolist()
    assert one.reward.tolist() == two.reward.tolist()


@pytest.mark.parametrize(
    ("changes", "likelihood", "error", "message"),
    [
        ({"pacs": [None, 1.0, 1.0, 1.0, 1.0]}, "sum", DataError, "prompt 'y' has no pacs"),
        (
            {"reward": [math.nan, 1.0, 1.0, 1.0, 1.0]},
            "sum",
            DataError,
            "prompt 'y' has a completion whose reward is not a",
        ),
        (
            {"logprob": [0.0, -math.inf, 0.0, 0.0, 0.0]},
            "sum",
            DataError,
            "prompt 'x' has a completion whose loglikelihood is not a",
        ),
        ({"completion_id": [0, 2, 0, 0, 1]}, "sum", DataError, "prompt 'y' has two completions with the same"),
        ({"prompt_id": ["y", "x", "z", "y", "x"]}, "sum", DataError, "prompt 'z' has completions, but no row"),
        ({"prompt_id": ["x"] * 5, "completion_id": range(5)}, "sum", DataError, "prompt 'y' has no completions"),
        ({"n_tokens": [1, 1, 0, 1, 1]}, "mean", DataError, "row 3: n_tokens is below 1"),
        ({"ref_logprob": [0.0, 0.0, 0.0, None, 0.0]}, "relative", DataError, "row 4: ref_logprob is missing"),
        ({"ref_logprob": None}, "relative", SettingsError, "likelihood 'relative' needs the column 'ref_logprob'"),
        ({"n_tokens": None}, "mean", SettingsError, "likelihood 'mean' needs the column 'n_tokens'"),
        ({}, "median", SettingsError, "unknown likelihood 'median': use one of sum, mean, relative"),
    ],
)
def test_tables_that_do_not_fit(changes, likelihood, error, message):
    with pytest.raises(error, match=message):
        pool_from_tables(*tables(**changes), likelihood)


def test_the_likelihood_of_no_rows_is_empty():
    assert loglikelihood(COMPLETIONS_SCHEMA.empty_table(), "sum").shape == (0,)


def test_arrays_that_do_not_fit_together():
    fields = {"prompt_ids": ("a", "b"), "kendall_tau_distance": np.zeros(2), "offsets": np.array([0, 1, 2])}
    fields |= dict.fromkeys(("degenerate", "completion_ids", "text_codes"), np.zeros(2, int))
    fields |= dict.fromkeys(("reward", "loglikelihood", "pacs"), np.zeros(2))
    assert len(Pool(**fields)) == 2
    for changes, message in (
        ({"pacs": np.zeros(3)}, r"pacs has shape \(3,\), expected \(2,\)"),
        ({"offsets": np.array([0, 1, 3])}, "offsets run from 0 to 3, expected 0 to 2"),
        ({"offsets": np.array([0, 3, 2])}, "prompt 'b' has no completions"),
        ({"prompt_ids": ("a", "a")}, "two prompts"),
        ({"kendall_tau_distance": np.array([0.0, np.nan])}, r"prompt 'b' has a kendall_tau_distance outside \[0, 1\]"),
    ):
        with pytest.raises(DataError, match=message):
            Pool(**fields | changes)


def test_queries_as_a_table_carry_ids_that_do_not_hang_on_the_strategy():
    pool = random_pool(6, 4)
    selection = choose(pool, "random_pairs", 99)
    table = queries_table(selection)
    assert table.schema == QUERIES_SCHEMA
    assert table["judgements"].to_pylist() == [1] * 36
    assert set(table["strategy"].to_pylist()) == {"random_pairs"}
    assert tuple(table["completion_ids"][0].as_py()) == selection.queries[0].completion_ids
    ids = {(row["prompt_id"], *row["completion_ids"]): row["query_id"] for row in table.to_pylist()}
    assert len(set(ids.values())) == 36
    other = queries_table(choose(pool, "margin", 20))
    for row in other.to_pylist():
        assert ids[row["prompt_id"], *row["completion_ids"]] == row["query_id"]
    ratings = queries_table(choose(pool, "pacs", 20))["query_id"].to_pylist()
    assert not set(ratings) & set(ids.values())
    assert queries_table(choose(pool, "pacs", 1))["query_id"][0].as_py() == ratings[0]


def test_a_query_of_another_round_is_another_query():
    selection = choose(random_pool(6, 4), "random_pairs", 99)
    rounds = [set(queries_table(selection, number)["query_id"].to_pylist()) for number in range(3)]
    assert [len(ids) for ids in rounds] == [36] * 3
    assert len(set().union(*rounds)) == 3 * 36
    assert rounds[0] == set(queries_table(selection)["query_id"].to_pylist())
