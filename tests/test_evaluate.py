"""Evaluation: its statistics against oracles, what may not be evaluated on, and all of it on the built-in world."""

import gc
import json
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from dissonance import audit, kendall_tau_distance
from dissonance.artifacts import read_table
from dissonance.config import AuditConfig, EvaluationConfig, PolicyConfig, RewardConfig
from dissonance.errors import DataError, DissonanceError, SettingsError
from dissonance.evaluate import Asked, Grader, HeldOut, Models, evaluate, figures, overlaps
from dissonance.evaluate.detection import correctness, detection, ordered_pairs, predictors
from dissonance.evaluate.statistics import Bootstrap, auc_of, bands, codes, kl_estimates, ratio_of, win_rates
from dissonance.feedback.aggregate import PreferencePair
from dissonance.prompts import load_prompts
from dissonance.records import Message, Preference, Prompt, Reward
from dissonance.rewards import load_reward_model
from dissonance.sampling import HFPolicy, HFReference
from dissonance.sandbox import World, build_sandbox, gold_reward

_VALUES = st.integers(-20, 20).map(float)
_TIED = st.integers(-2, 2).map(float)


def quickly(test):
    """Draw few enough cases for a slow machine."""
    return settings(max_examples=50)(test)


def bootstrap(cluster, replicates=1000, seed=0):
    return Bootstrap(np.asarray(cluster), replicates, seed)


# Statistics


@st.composite
def clustered(draw, elements=_VALUES):
    """Items with a cluster each (none empty), a value, and how often each cluster is drawn."""
    cluster = np.array(draw(st.lists(st.integers(0, 5), min_size=1, max_size=25)))
    cluster = np.unique(cluster, return_inverse=True)[1]
    values = draw(hnp.arrays(np.float64, cluster.size, elements=elements))
    drawn = draw(hnp.arrays(np.int64, int(cluster.max()) + 1, elements=st.integers(0, 3)))
    return cluster, values, drawn


@quickly
@given(clustered(), st.integers(1, 6))
def test_a_weighted_ratio_is_that_of_the_repeated_items(items, step):
    cluster, values, drawn = items
    assume(drawn.sum())
    size = 1.0 + np.arange(values.size) % step
    statistic = ratio_of(*(np.bincount(cluster, x) for x in (values, size)))
    repeats = drawn[cluster]
    expected = np.repeat(values, repeats).sum() / np.repeat(size, repeats).sum() if repeats.sum() else np.nan
    assert statistic(drawn[None].astype(float))[0] == pytest.approx(expected, nan_ok=True)


def brute_force_auc(score, positive):
    won = total = 0.0
    for (s, p), (t, q) in product(zip(score, positive, strict=True), repeat=2):
        won += p * (1 - q) * ((s > t) + 0.5 * (s == t))
        total += p * (1 - q)
    return won / total if total else np.nan


@quickly
@given(clustered(_TIED), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=25, max_size=25))
def test_a_weighted_auc_is_that_of_the_repeated_items(items, labels):
    cluster, score, drawn = items
    positive = np.array(labels[: score.size])
    repeats = drawn[cluster]
    expected = brute_force_auc(np.repeat(score, repeats), np.repeat(positive, repeats))
    got = auc_of(score, positive, cluster)(drawn[None].astype(float))[0]
    assert got == pytest.approx(expected, nan_ok=True)


@quickly
@given(st.lists(st.tuples(_TIED, st.booleans()), min_size=2, max_size=40))
def test_auc_is_mann_whitneys_share(items):
    score, positive = (np.array(x, float) for x in zip(*items, strict=True))
    assume(0 < positive.sum() < positive.size)
    expected = stats.mannwhitneyu(score[positive == 1], score[positive == 0]).statistic
    found = bootstrap(np.arange(score.size), 200).auc(score, positive)
    assert found["mean"] == pytest.approx(expected / (positive.sum() * (1 - positive).sum()))
    reversed_ = bootstrap(np.arange(score.size), 200).auc(-score, positive)
    assert reversed_["mean"] == pytest.approx(1 - found["mean"])


def test_auc_needs_both_kinds():
    boot = bootstrap(np.arange(8))
    assert boot.auc(np.arange(8.0), np.ones(8)) is None
    assert boot.auc(np.arange(8.0), np.zeros(8)) is None
    assert bootstrap(np.zeros(0, int)).auc(np.zeros(0), np.zeros(0)) is None


def coverage(rng, clusters, size, interval, trials=400):
    """How often an interval holds 0, the true mean of items with an effect in common to their cluster."""
    held = 0
    for _ in range(trials):
        values = (rng.normal(size=(clusters, 1)) + rng.normal(size=(clusters, size))).ravel()
        found = interval(np.repeat(np.arange(clusters), size), values)
        held += found["low"] <= 0 <= found["high"]
    return held / trials


@pytest.mark.parametrize("clusters", [10, 30])
def test_the_interval_covers_what_it_says(clusters):
    rng = np.random.default_rng(clusters)
    covered = coverage(rng, clusters, 4, lambda cluster, x: bootstrap(cluster, 500, rng.integers(1 << 30)).mean(x))
    # Of 400 trials at 95 %, a standard deviation is 1.1 %.
    assert 0.91 <= covered <= 0.985


def test_without_clusters_the_interval_would_cover_too_little():
    rng = np.random.default_rng(5)
    items = np.arange(30 * 8)
    covered = coverage(rng, 30, 8, lambda _, x: bootstrap(items, 300, rng.integers(1 << 30)).mean(x), trials=200)
    assert covered < 0.75


def test_with_an_item_a_cluster_it_is_scipys_bootstrap_at_wider_levels():
    values = np.random.default_rng(0).exponential(size=25)
    ours = bootstrap(np.arange(25), 50_000).mean(values)
    level = stats.norm.cdf(np.sqrt(25 / 24) * stats.t.ppf(0.025, 24))
    theirs = stats.bootstrap(
        (values,), np.mean, confidence_level=1 - 2 * level, n_resamples=50_000, method="percentile", rng=1
    ).confidence_interval
    assert ours["mean"] == pytest.approx(values.mean())
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(theirs), abs=0.02)


@quickly
@given(clustered(), st.integers(0, 5), st.floats(0.1, 10), st.floats(-5, 5))
def test_the_interval_holds_the_mean_follows_affine_maps_and_repeats_by_seed(items, seed, scale, shift):
    cluster, values, _ = items
    found = bootstrap(cluster, 200, seed).mean(values)
    assert found == bootstrap(cluster, 200, seed).mean(values)
    if found["low"] is not None:
        assert found["low"] <= found["mean"] <= found["high"]
        moved = bootstrap(cluster, 200, seed).mean(scale * values + shift)
        assert list(moved.values()) == pytest.approx([scale * x + shift for x in found.values()], abs=1e-9)


def test_few_clusters_have_no_interval():
    assert bootstrap(np.arange(4)).mean([1.0, 2.0, 3.0, 6.0]) == {"mean": 3.0, "low": None, "high": None}
    assert bootstrap(np.arange(5)).mean([1.0, 2.0, 3.0, 6.0, 3.0])["low"] is not None
    # Items of few clusters among many.
    assert bootstrap(np.arange(9)).under(np.array([0, 0, 1, 1, 2, 2])).mean(np.arange(6.0))["low"] is None


def test_nothing_has_no_mean_and_nan_is_an_error():
    assert bootstrap(np.zeros(0, int)).mean([]) is None
    assert bootstrap(np.arange(6)).under(np.zeros(0, int)).mean([]) is None
    with pytest.raises(DataError, match="not a finite number"):
        bootstrap(np.arange(6)).mean([0, 1, 2, 3, np.nan, 5])


def test_where_nothing_varies_there_is_no_interval():
    boot = bootstrap(np.repeat(np.arange(10), 3))
    for value in (0.0, 1.0, 0.3, -1e9):
        assert boot.mean(np.full(30, value)) == {"mean": pytest.approx(value), "low": None, "high": None}
    assert boot.mean(np.arange(30) == 7)["high"] is not None
    assert boot.auc(np.arange(30.0), np.arange(30) > 20) == {"mean": 1.0, "low": None, "high": None}


def test_blocks_of_replicates_change_nothing(monkeypatch):
    cluster, values = np.arange(300) % 30, np.random.default_rng(0).normal(size=300)
    whole = bootstrap(cluster).mean(values), bootstrap(cluster).auc(values, np.arange(300) % 2)
    monkeypatch.setattr("dissonance.evaluate.statistics._BLOCK_VALUES", 1000)
    parts = bootstrap(cluster).mean(values), bootstrap(cluster).auc(values, np.arange(300) % 2)
    for one, other in zip(whole, parts, strict=True):
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-12)


_GOLD = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 5)), elements=_TIED)


@quickly
@given(_GOLD, st.data(), st.sampled_from([0.0, 0.5, 1.0]))
def test_win_rates_are_antisymmetric_and_count_ties_half(new, data, tie):
    start = data.draw(hnp.arrays(np.float64, (len(new), data.draw(st.integers(1, 5))), elements=_TIED))
    rates = win_rates(new, start, tie)
    assert rates + win_rates(start, new, tie) == pytest.approx(np.ones(len(new)))
    assert win_rates(new, new, tie) == pytest.approx(np.full(len(new), 0.5))
    for prompt, rate in enumerate(rates):
        wins = [1.0 if a > b + tie else 0.0 if b > a + tie else 0.5 for a, b in product(new[prompt], start[prompt])]
        assert rate == pytest.approx(np.mean(wins))


_POLICY = st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(lambda x: np.array(x) / sum(x))


@quickly
@given(_POLICY, _POLICY)
def test_the_expectation_of_both_estimators_is_the_kl(new, start):
    k1, k3, weight = kl_estimates(np.log(new), np.log(start))
    kl = stats.entropy(new, start)
    assert np.all(k3 >= 0)
    assert np.sum(new * k1) == pytest.approx(kl, abs=1e-12)
    assert np.sum(new * k3) == pytest.approx(kl, abs=1e-12)
    assert np.sum(new * weight) == pytest.approx(1)


def test_kl_of_a_policy_with_itself_is_zero_and_nothing_overflows():
    assert [x.tolist() for x in kl_estimates(np.array([-3.5]), np.array([-3.5]))] == [[0.0], [0.0], [1.0]]
    assert all(np.isfinite(x).all() for x in kl_estimates(np.array([-5000.0, -1e-17]), np.array([-1.0, 0.0])))


@quickly
@given(hnp.arrays(np.float64, st.integers(1, 60), elements=_VALUES), st.integers(1, 10))
def test_bands_follow_the_score_and_keep_ties_together(score, count):
    band = bands(score, count)
    assert np.unique(band).tolist() == list(range(band.max() + 1))
    assert band.max() < count
    for i, j in combinations(range(score.size), 2):
        assert not (score[i] < score[j] and band[i] > band[j])
        assert score[i] != score[j] or band[i] == band[j]


def test_bands_of_different_scores_are_of_one_size():
    assert np.bincount(bands(np.random.default_rng(0).normal(size=100), 10)).tolist() == [10] * 10


# Whether conflict foretold errors


@quickly
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 5)), elements=_TIED), st.data())
def test_ordered_pairs_are_all_that_gold_tells_apart(gold, data):
    tie = data.draw(st.sampled_from([0.0, 1.0]))
    judge = data.draw(hnp.arrays(np.float64, gold.shape, elements=_TIED))
    pairs = ordered_pairs(gold, tie)
    expected = [
        (p, i, j)
        for p in range(len(gold))
        for i in range(gold.shape[1])
        for j in range(gold.shape[1])
        if gold[p, i] > gold[p, j] + tie
    ]
    keys = list(zip(pairs.prompt.tolist(), pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert sorted(keys) == sorted(expected)
    right = {(p, i, j): (judge[p, i] > judge[p, j]) + (judge[p, i] == judge[p, j]) / 2 for p, i, j in expected}
    assert [right[key] for key in keys] == correctness(pairs.margin(judge)).tolist()


@quickly
@given(st.lists(st.tuples(_TIED, _VALUES, _VALUES), min_size=1, max_size=20))
def test_predictors_do_not_know_which_answer_is_better(items):
    margin, better, worse = (np.array(x) for x in zip(*items, strict=True))
    distance = np.linspace(0, 1, margin.size)
    seen = predictors(distance, (better, worse), margin)
    swapped = predictors(distance, (worse, better), -margin)
    for name, score in seen.items():
        np.testing.assert_array_equal(score, swapped[name], err_msg=name)


def test_detection_finds_what_foretells_errors():
    rng = np.random.default_rng(0)
    prompt = np.repeat(np.arange(150), 4)
    conflict = rng.random(150)[prompt]
    wrong = rng.random(600) < conflict
    margin = np.where(wrong, -1, 1) * rng.exponential(size=600)
    scores = predictors(conflict, (rng.normal(size=600), rng.normal(size=600)), margin)
    found = detection(margin, scores, bootstrap(prompt), 10)
    assert (found["pairs"], found["clusters"]) == (600, 150)
    assert found["error"]["mean"] == pytest.approx(wrong.mean())
    auc = found["auc"]
    assert auc["kendall_tau_distance"]["low"] > 0.75
    for name in ("pacs_gap", "abs_pacs", "reward_margin"):
        assert auc[name]["low"] < 0.5 < auc[name]["high"], name
    over = found["over_margin"]["kendall_tau_distance"]
    assert over["mean"] == pytest.approx(auc["kendall_tau_distance"]["mean"] - auc["reward_margin"]["mean"])
    assert over["low"] > 0.2
    rows = found["bands"]["kendall_tau_distance"]
    assert len(rows) == 10
    assert sum(row["pairs"] for row in rows) == 600
    for row in rows:
        inside = (conflict >= row["from"]) & (conflict <= row["to"])
        assert row["pairs"] == inside.sum()
        assert row["error"]["mean"] == pytest.approx(wrong[inside].mean())
    assert rows[0]["error"]["high"] < rows[-1]["error"]["low"]


# What may be evaluated on, and who may grade


def prompt(name, text, category=None, system=None):
    turns = (Message("user", text),) if system is None else (Message("system", system), Message("user", text))
    return Prompt(name, turns, category)


def preference(text, chosen="yes", rejected="no", **fields):
    return Preference((Message("user", text),), chosen, rejected, **fields)


TRAINED = (prompt("t1", "How do I bake bread?"), prompt("t2", "What is a prime number?"))


@pytest.mark.parametrize(
    "text",
    ["How do I bake bread?", "how do  I\nbake BREAD", "  How do I bake “bread”!?", "Ｈow do I bake bread"],
    ids=["same", "case-and-space", "punctuation", "full-width"],
)
def test_a_held_out_prompt_that_was_trained_on_is_an_error(text):
    with pytest.raises(DataError, match=r"1 held-out prompts were trained on \(the first, 'h2', is 't1'"):
        HeldOut((prompt("h1", "What is rain?"), prompt("h2", text)), TRAINED)


def test_a_system_prompt_does_not_make_another_prompt():
    with pytest.raises(DataError, match="trained on"):
        HeldOut((prompt("h", "How do I bake bread?", system="Be brief."),), TRAINED)
    with pytest.raises(DataError, match="trained on"):
        HeldOut((prompt("h", "How do I bake bread?"),), [preference("how do i bake bread")])


def test_other_words_are_other_prompts():
    turns = (Message("user", "Why?"), Message("assistant", "So."), Message("user", "How do I bake bread?"))
    others = (prompt("h1", "How do I bake breads?"), Prompt("h2", turns), prompt("h3", "؟؟"), prompt("h4", "!!"))
    assert len(HeldOut(others, [*TRAINED, prompt("t3", "??")]).prompts) == 4


def test_held_out_pairs_are_checked_too():
    held_out = (prompt("h", "What is rain?"),)
    assert HeldOut(held_out, TRAINED, pairs=(preference("What is rain?"),)).pairs
    with pytest.raises(DataError, match="1 held-out pairs were trained on"):
        HeldOut(held_out, TRAINED, pairs=(preference("What is rain?"), preference("What is a prime number")))


def test_overlaps_say_what_to_leave_out():
    asked = [prompt("h1", "what is a prime number"), prompt("h2", "What is rain?"), preference("How do I bake bread")]
    assert overlaps(asked, TRAINED) == [(0, "t2"), (2, "t1")]


def test_ids_name_one_prompt():
    with pytest.raises(DataError, match="'t1' has the id of another prompt in training"):
        HeldOut((prompt("t1", "What is rain?"),), TRAINED)
    with pytest.raises(DataError, match="two held-out prompts have the id 'h'"):
        HeldOut((prompt("h", "What is rain?"), prompt("h", "What is snow?")), TRAINED)
    with pytest.raises(DataError, match="no held-out prompts"):
        HeldOut((), TRAINED)


def test_clusters_that_were_trained_on_are_an_error():
    held_out = (prompt("h1", "What is rain?"), prompt("h2", "Tell me of snow."))
    clusters = {"h1": "rain", "h2": "snow"}
    assert HeldOut(held_out, TRAINED, clusters=clusters, trained_clusters={"bread"}).cluster_of(held_out) == [
        "rain",
        "snow",
    ]
    with pytest.raises(DataError, match="'h2' belongs to 'snow', which was trained on"):
        HeldOut(held_out, TRAINED, clusters=clusters, trained_clusters={"snow"})
    with pytest.raises(DataError, match="'h2' has no cluster"):
        HeldOut(held_out, TRAINED, clusters={"h1": "rain"})


def test_prompts_of_one_text_are_one_cluster():
    held_out = HeldOut((prompt("a", "What is rain?"), prompt("b", "what is rain"), prompt("c", "Snow?")), TRAINED)
    first, second, third = held_out.cluster_of(held_out.prompts)
    assert first == second != third
    assert held_out.cluster_of([preference("What is rain")]) == [first]


def test_who_answered_does_not_grade():
    with pytest.raises(SettingsError, match="also answered the queries"):
        Grader(lambda: None, "gold-7", annotators={"judge", "gold-7"})
    assert not Grader(lambda: None, "gold-7", annotators={"judge"}).annotated
    assert Grader(lambda: None, "gold-7", annotators={"gold-7"}, allow_annotator=True).annotated


# The whole of it, on the built-in world

KNOWN = tuple(range(10))
BEFORE = World(policy_competence=0.3, n_demonstrations=1600, policy_knows=KNOWN, n_pairs=400, proxy_knows=(0,))
AFTER = replace(BEFORE, policy_competence=1.0, n_demonstrations=2400, n_pairs=4000, proxy_knows=KNOWN)
"""The same gold, a policy that knows more, a proxy that has seen more."""

N, PROMPTS = 5, 60
CONFIG = EvaluationConfig(n=N, replicates=500)


class Gold:
    """The exact gold reward."""

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        pairs = zip(conversations, completions, strict=True)
        return [Reward(gold_reward(BEFORE, messages[-1].content, text)) for messages, text in pairs]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    cache = tmp_path_factory.mktemp("sandbox")
    return build_sandbox(BEFORE, cache), build_sandbox(AFTER, cache)


def policy_config(sandbox):
    return PolicyConfig(model=str(sandbox.policy), n=N, max_new_tokens=24)


def held_out_prompts(sandbox):
    return load_prompts(str(sandbox.eval_prompts), limit=PROMPTS).prompts


def held_out_of(sandbox, **fields):
    rows = [json.loads(line) for line in sandbox.eval_prompts.read_text().splitlines()]
    prompts = held_out_prompts(sandbox)
    trained = load_prompts(str(sandbox.prompts)).prompts
    keys = [json.loads(line)["gold_key"] for line in sandbox.prompts.read_text().splitlines()]
    clusters = {row["id"]: row["gold_key"] for row in rows}
    return HeldOut(prompts, trained, clusters=clusters, trained_clusters=set(keys), **fields)


def models_of(before, after, **changes):
    reward = {"kind": before.reward_kind}
    models = Models(
        start=lambda: HFPolicy(policy_config(before), seed=1),
        new=lambda: HFPolicy(policy_config(after), seed=2),
        start_likelihood=lambda: HFReference(policy_config(after), str(before.policy)),
        proxy=lambda: load_reward_model(RewardConfig(model=str(before.reward_model), **reward)),
        refined=lambda: load_reward_model(RewardConfig(model=str(after.reward_model), **reward)),
    )
    return replace(models, **changes)


GRADER = Grader(Gold, "exact gold", annotators={"noisy gold"})


def gold_pairs(sandbox, count):
    """Pairs of answers of mixed quality to held-out prompts, better first."""
    said = ("first measure it .", "first measure , then boil it .", "it is it .", "i can not help : it is rude .")
    pairs = []
    for at, asked in enumerate(held_out_prompts(sandbox)[:count]):
        text = asked.messages[-1].content
        one, other = sorted((said[at % 4], said[(at + 1) % 4]), key=lambda answer: -gold_reward(BEFORE, text, answer))
        if at % 10 == 0:
            one, other = other, other + " "
        tie = gold_reward(BEFORE, text, one) == gold_reward(BEFORE, text, other)
        pairs.append(Preference(asked.messages, one, other, tie=tie, prompt_id=asked.prompt_id))
    return tuple(pairs)


@pytest.fixture(scope="module")
def asked(worlds, tmp_path_factory):
    """An audit of the training prompts, and what exact gold says of some of its pairs."""
    before, _ = worlds
    out = tmp_path_factory.mktemp("audit") / "run"
    settings_ = {
        "prompts": {"source": str(before.prompts), "limit": 40},
        "policy": policy_config(before).model_dump(),
        "reward_model": {"model": str(before.reward_model), "kind": before.reward_kind},
    }
    audit(AuditConfig.model_validate(settings_), out)
    tables = (read_table(out / "round-000" / f"{name}.parquet") for name in ("prompts", "completions"))
    prompts, completions = tables
    rows = {(r["prompt_id"], r["completion_id"]): r["text"] for r in completions.to_pylist()}
    judged = []
    for row in prompts.to_pylist():
        text, name = row["messages"][-1]["content"], row["prompt_id"]
        for first, second in ((0, 1), (2, 3)):
            gold = [gold_reward(BEFORE, text, rows[name, i]) for i in (first, second)]
            better, worse = (first, second) if gold[0] >= gold[1] else (second, first)
            judged.append(PreferencePair(name, better, worse, 1.0, gold[0] == gold[1], "pairwise/majority", 1))
    return Asked(judged, prompts, completions)


@pytest.fixture(scope="module")
def evaluated(worlds, asked, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    held_out = held_out_of(worlds[0], pairs=gold_pairs(worlds[0], 30))
    return out, evaluate(held_out, models_of(*worlds), GRADER, CONFIG, out, asked=asked)


def by_prompt(out, policy):
    """The rows of a policy by prompt."""
    rows = {}
    for row in pq.read_table(out / "evaluation_answers.parquet").to_pylist():
        if row["policy"] == policy:
            rows.setdefault(row["prompt_id"], []).append(row)
    return rows


def test_the_better_policy_and_the_better_proxy_are_found_out(evaluated):
    _, found = evaluated
    json.dumps(found, allow_nan=False)
    gold = found["gold_reward"]
    assert gold["change"]["low"] > 0
    assert gold["win_rate"]["low"] > 0.5
    for where in ("start", "new"):
        assert found["reward_accuracy"][where]["change"]["mean"] > 0
    assert found["kl"]["k3"]["low"] > 0
    assert found["entropy"]["change"]["high"] < 0
    assert found["grader"] == {"fingerprint": "exact gold", "annotated": False}


def test_every_figure_comes_from_the_tables(evaluated):
    out, found = evaluated
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation_answers.parquet",
        "evaluation_labels.parquet",
        "evaluation_pairs.parquet",
    ]
    tables = [read_table(out / f"evaluation_{name}.parquet") for name in ("answers", "pairs", "labels")]
    assert figures(*tables, CONFIG) == {name: value for name, value in found.items() if name != "grader"}


def test_gold_and_win_rate_against_plain_loops(evaluated, worlds):
    out, found = evaluated
    start, new = by_prompt(out, "start"), by_prompt(out, "new")
    assert list(start) == list(new) == [p.prompt_id for p in held_out_prompts(worlds[0])]
    texts = {p.prompt_id: p.messages[-1].content for p in held_out_prompts(worlds[0])}
    for name, rows in start.items():
        assert [row["gold"] for row in rows] == [gold_reward(BEFORE, texts[name], row["text"]) for row in rows]
    categories = {row["category"] for rows in start.values() for row in rows}
    assert set(found["by_category"]) == categories
    for category in (None, *sorted(categories)):
        names = [name for name, rows in start.items() if category in (None, rows[0]["category"])]
        gains = [np.mean([r["gold"] for r in new[x]]) - np.mean([r["gold"] for r in start[x]]) for x in names]
        wins = [
            np.mean([(a["gold"] > b["gold"]) + 0.5 * (a["gold"] == b["gold"]) for a in new[x] for b in start[x]])
            for x in names
        ]
        where = found if category is None else found["by_category"][category]
        assert where["gold_reward"]["change"]["mean"] == pytest.approx(np.mean(gains))
        assert where["gold_reward"]["win_rate"]["mean"] == pytest.approx(np.mean(wins))
        assert where["clusters"] == len({start[x][0]["cluster"] for x in names})
    assert found["clusters"] < found["prompts"]


@pytest.mark.parametrize("policy", ["start", "new"])
def test_accuracy_and_conflict_against_plain_loops(evaluated, policy):
    out, found = evaluated
    prompts = by_prompt(out, policy)
    right = {"proxy": [], "refined": []}
    for rows in prompts.values():
        for a, b in combinations(rows, 2):
            if a["gold"] != b["gold"]:
                for judge, scores in right.items():
                    product_ = (a["gold"] - b["gold"]) * (a[judge] - b[judge])
                    scores.append(1.0 if product_ > 0 else 0.5 if product_ == 0 else 0.0)
    accuracy = found["reward_accuracy"][policy]
    assert accuracy["pairs"] == len(right["proxy"])
    assert accuracy["ties"] == len(prompts) * N * (N - 1) // 2 - len(right["proxy"])
    assert {judge: accuracy[judge]["mean"] for judge in right} == pytest.approx(
        {j: np.mean(x) for j, x in right.items()}
    )
    for judge in ("proxy", "refined", "gold"):
        columns = [[[r[x] for r in rows] for rows in prompts.values()] for x in (judge, "logprob")]
        proper = [np.ptp(r) > 1e-9 and np.ptp(ll) > 1e-9 for r, ll in zip(*columns, strict=True)]
        distance = kendall_tau_distance(*map(np.array, columns))[proper]
        assert found["conflict"][policy][judge]["kendall_tau_distance"]["mean"] == pytest.approx(distance.mean())
        assert found["conflict"][policy][judge]["degenerate"] == len(proper) - sum(proper)


def test_drift_against_plain_loops(evaluated):
    out, found = evaluated
    start, new = ([row for rows in by_prompt(out, p).values() for row in rows] for p in ("start", "new"))
    d = np.array([row["logprob"] - row["start_logprob"] for row in new])
    assert found["kl"]["k1"]["mean"] == pytest.approx(d.mean())
    assert found["kl"]["k3"]["mean"] == pytest.approx(np.mean(np.exp(-d) - 1 + d))
    assert found["kl"]["k1_per_token"]["mean"] == pytest.approx(d.sum() / sum(row["n_tokens"] for row in new))
    for name, rows in (("start", start), ("new", new)):
        assert found["length"][name]["mean"] == pytest.approx(np.mean([row["n_tokens"] for row in rows]))
        entropy = -sum(row["logprob"] for row in rows) / sum(row["n_tokens"] for row in rows)
        assert found["entropy"][name]["mean"] == pytest.approx(entropy)
        unfinished = np.mean([row["finish_reason"] == "length" for row in rows])
        assert found["unfinished"][name]["mean"] == pytest.approx(unfinished)
    repeats = sum(len(rows) - len({row["text"] for row in rows}) for rows in by_prompt(out, "new").values())
    assert found["repeated_answers"]["new"]["mean"] == pytest.approx(repeats / len(new))


def test_error_detection_against_mann_whitney(evaluated):
    out, found = evaluated
    rows = [
        r for r in pq.read_table(out / "evaluation_labels.parquet").to_pylist() if not (r["tie"] or r["degenerate"])
    ]
    margins = np.array([row["proxy_chosen"] - row["proxy_rejected"] for row in rows])
    assert (margins != 0).all(), "with a tie this oracle does not fit"
    wrong = margins < 0
    scores = {
        "kendall_tau_distance": [row["kendall_tau_distance"] for row in rows],
        "pacs_gap": np.sign(margins) * np.array([row["pacs_chosen"] - row["pacs_rejected"] for row in rows]),
        "reward_margin": -np.abs(margins),
    }
    asked_ = found["error_detection"]["asked"]
    assert asked_["pairs"] == len(rows)
    assert asked_["error"]["mean"] == pytest.approx(wrong.mean())
    for name, score in scores.items():
        u = stats.mannwhitneyu(np.array(score)[wrong], np.array(score)[~wrong]).statistic
        assert asked_["auc"][name]["mean"] == pytest.approx(u / (wrong.sum() * (~wrong).sum())), name


def test_what_was_asked_is_followed_through(evaluated, asked):
    out, found = evaluated
    table = pq.read_table(out / "evaluation_labels.parquet")
    assert len(table) == len(asked.judged)
    ties = sum(pair.tie for pair in asked.judged)
    assert (found["asked"]["pairs"], found["asked"]["ties"]) == (len(table) - ties, ties)
    kept = [row for row in table.to_pylist() if not row["tie"]]
    for judge in ("proxy", "refined"):
        expected = np.mean([correctness(np.array(row[f"{judge}_chosen"] - row[f"{judge}_rejected"])) for row in kept])
        assert found["asked"][judge]["mean"] == pytest.approx(expected)


def test_held_out_pairs_leave_ties_out(evaluated, worlds):
    out, found = evaluated
    pairs = gold_pairs(worlds[0], 30)
    table = pq.read_table(out / "evaluation_pairs.parquet")
    assert table["pair"].to_pylist() == [at for at, pair in enumerate(pairs) if not pair.tie]
    assert found["reward_accuracy"]["pairs"]["pairs"] == len(table) < len(pairs)
    clusters = {row["prompt_id"]: row["cluster"] for rows in by_prompt(out, "start").values() for row in rows}
    assert table["cluster"].to_pylist() == [clusters[name] for name in table["prompt_id"].to_pylist()]


def test_a_policy_against_itself_shows_nothing(worlds, tmp_path):
    before, _ = worlds
    start = HFPolicy(policy_config(before), seed=1)
    models = models_of(before, before, start=lambda: start, new=lambda: start, refined=None)
    found = evaluate(held_out_of(before), models, GRADER, CONFIG, tmp_path)
    assert found["gold_reward"]["change"] == {"mean": 0.0, "low": None, "high": None}
    assert found["gold_reward"]["win_rate"]["mean"] == pytest.approx(0.5)
    # Rounding alone: one model decodes token by token, the other reads the whole answer.
    assert 0 <= found["kl"]["k3"]["mean"] < 1e-8
    assert abs(found["kl"]["k1"]["mean"]) < 1e-4
    assert found["conflict"]["change"]["kendall_tau_distance"]["mean"] == 0
    assert found["reward_accuracy"]["start"]["refined"] is None
    assert found["error_detection"]["asked"] is None
    assert found["asked"] is None


def test_kl_against_another_policy_than_the_start_is_not_zero(worlds, tmp_path):
    """What a wrong reference would look like: the test above must be able to fail."""
    before, after = worlds
    models = models_of(before, before, refined=None)
    wrong = replace(models, start_likelihood=lambda: HFReference(policy_config(before), str(after.policy)))
    assert evaluate(held_out_of(before), wrong, GRADER, CONFIG, tmp_path)["kl"]["k3"]["low"] > 0.1


def nothing():
    pytest.fail("sampled before a mistake was found out")


def test_without_gold_the_rest_stands(worlds, tmp_path):
    before, after = worlds
    found = evaluate(held_out_of(before), models_of(before, after), None, CONFIG, tmp_path)
    assert found["gold_reward"] is found["error_detection"]["held_out"] is found["grader"] is None
    assert found["reward_accuracy"] == {"start": None, "new": None, "pairs": None}
    assert set(found["conflict"]["new"]) == {"proxy", "refined"}
    assert found["kl"]["k1"]["mean"] > 0


def test_relative_conflict_needs_its_reference_model(worlds, tmp_path):
    before, after = worlds
    config = CONFIG.model_copy(update={"likelihood": "relative"})
    with pytest.raises(SettingsError, match="reference"):
        evaluate(held_out_of(before), models_of(before, after, start=nothing), None, config, tmp_path)
    reference = models_of(before, after).start_likelihood
    found = evaluate(held_out_of(before), models_of(before, after, reference=reference), None, config, tmp_path)
    # Relative to itself, the start policy has no likelihoods but rounding; the new one has.
    table = pq.read_table(tmp_path / "evaluation_answers.parquet").to_pylist()
    assert max(abs(row["logprob"] - row["ref_logprob"]) for row in table if row["policy"] == "start") < 1e-3
    assert found["conflict"]["new"]["proxy"]["kendall_tau_distance"] is not None


def test_training_prompts_are_refused(worlds):
    before, _ = worlds
    trained = load_prompts(str(before.prompts)).prompts
    with pytest.raises(DataError, match="held-out prompts were trained on"):
        HeldOut(tuple(replace(p, prompt_id=f"other-{p.prompt_id}") for p in trained), trained)


def test_one_model_at_a_time_is_in_memory(worlds, tmp_path):
    before, after = worlds
    alive: list[tuple[str, weakref.ref]] = []

    def watched(name, make):
        def made():
            gc.collect()
            still = [other for other, model in alive if model() is not None]
            assert still == [], f"{still} in memory when {name} is made"
            model = make()
            alive.append((name, weakref.ref(model)))
            return model

        return made

    models = models_of(before, after)
    names = ("start", "new", "start_likelihood", "proxy", "refined")
    evaluate(
        held_out_of(before, pairs=gold_pairs(before, 5)),
        replace(models, **{name: watched(name, getattr(models, name)) for name in names}),
        GRADER,
        CONFIG,
        tmp_path,
    )
    assert {name for name, _ in alive} == set(names)


class Forgetful(HFPolicy):
    """Loses a prompt of its plan, or a completion of its batches."""

    plan_loses = False

    def plan(self, prompts):
        return super().plan(prompts)[self.plan_loses :]

    def sample(self, batch):
        return super().sample(batch)[1 - self.plan_loses :]


@pytest.mark.parametrize(("loses", "message"), [(True, "does not hold each"), (False, "completions for")])
def test_a_policy_that_forgets_is_noticed(worlds, tmp_path, loses, message):
    before, after = worlds
    config = policy_config(before).model_copy(update={"tokens_per_batch": 400})
    policy = Forgetful(config)
    policy.plan_loses = loses
    with pytest.raises(DissonanceError, match=message):
        evaluate(held_out_of(before), models_of(before, after, start=lambda: policy), None, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


class Broken(Gold):
    """Gold with a hole in it."""

    def score(self, conversations, completions):
        return [Reward(float("nan")), *super().score(conversations, completions)[1:]]


def test_a_reward_that_is_no_number_is_an_error(worlds, tmp_path):
    before, after = worlds
    with pytest.raises(DataError, match="gold rewards: nan for"):
        evaluate(held_out_of(before), models_of(before, after), replace_model(Broken), CONFIG, tmp_path)


def replace_model(model):
    return Grader(model, "broken", annotators=())


def test_what_was_said_of_nothing_is_an_error(worlds, asked, tmp_path):
    before, after = worlds
    stray = replace(asked.judged[0], chosen_id=99)
    wrong = {
        "no completion 99": replace(asked, judged=[stray]),
        "has no cluster": replace(asked, clusters={"x": "y"}),
        "no messages or texts": replace(asked, completions=asked.completions.drop_columns("text")),
    }
    for message, some in wrong.items():
        with pytest.raises(DataError, match=message):
            evaluate(held_out_of(before), models_of(before, after, start=nothing), None, CONFIG, tmp_path, asked=some)


def test_nothing_but_ties_leaves_nothing_to_tell(worlds, asked, tmp_path):
    before, after = worlds
    ties = replace(asked, judged=[replace(pair, tie=True) for pair in asked.judged])
    found = evaluate(held_out_of(before), models_of(before, after), None, CONFIG, tmp_path, asked=ties)
    assert found["asked"]["pairs"] == found["error_detection"]["asked"]["pairs"] == 0
    assert found["asked"]["proxy"] is found["error_detection"]["asked"]["auc"]["pacs_gap"] is None
    json.dumps(found, allow_nan=False)


def test_codes_number_by_appearance():
    found, count = codes(["b", "a", "b", None])
    assert (found.tolist(), count) == ([0, 1, 0, 2], 3)
