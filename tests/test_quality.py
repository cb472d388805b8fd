"""Agreement, reliability, bias and contradictions against oracles; preference graphs against brute force."""

import itertools
from dataclasses import replace

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest

from counting import calls_of
from dissonance.feedback import quality
from dissonance.feedback.preference_graph import (
    EXACT_UP_TO,
    Comparison,
    deconflict,
    find_cycle,
    greedy_order,
    preference_graph,
)
from dissonance.feedback.quality import agreements, annotator_quality, conflict_rate, is_right, wilson
from dissonance.feedback.reliability import dawid_skene
from dissonance.feedback.votes import FIRST, SECOND, TIE, Unit, coded, decided, independent
from dissonance.records import Answer, Label, Message, Question

CHOICES = ("first", "second", "tie", "both_bad")


def question(query_id, kind="pairwise", ids=(0, 1), prompt_id="p"):
    return Question(query_id, prompt_id, kind, (Message("user", "hello"),), ids, tuple(f"text {i}" for i in ids))


def labels_of(*rows, **common):
    """Labels of (query_id, annotator, answer), in the order given; an answer may be a choice, a rating or ranks."""
    forms = {str: "choice", bool: "safe", int: "rating", tuple: "ranks"}
    found = []
    for at, (query_id, who, said, *rest) in enumerate(rows, 1):
        answer = said if isinstance(said, Answer) else Answer(**{forms[type(said)]: said})
        found.append(Label(at, query_id, who, "person", answer, float(at), **{**common, **(rest[0] if rest else {})}))
    return found


def by_id(*questions):
    return {q.query_id: q for q in questions}


def pairwise(rows, **common):
    """Labels and questions of {query: {annotator: choice}}."""
    labels = labels_of(*((q, who, said) for q, answers in rows.items() for who, said in answers.items()), **common)
    return labels, by_id(*(question(q, prompt_id=q) for q in rows))


def crowd(n_queries, accuracies, seed=0, per_query=None):
    """Pairwise answers of annotators that are right as often as `accuracies` say, and the truth."""
    rng = np.random.default_rng(seed)
    truth = {f"q{i}": CHOICES[rng.integers(2)] for i in range(n_queries)}
    rows = {}
    for q, right in truth.items():
        who = rng.choice(len(accuracies), per_query or len(accuracies), replace=False)
        wrong = "second" if right == "first" else "first"
        rows[q] = {f"a{w}": right if rng.random() < accuracies[w] else wrong for w in who}
    return *pairwise(rows), truth


# -- alpha -------------------------------------------------------------------------------------------------------------


def only(found, kind):
    return next(row for row in found if row.kind == kind)


def test_alpha_of_ratings_is_that_of_krippendorffs_own_example():
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C: four observers, twelve units.
    data = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    rows = [(f"q{u}", f"a{a}", value) for a, row in enumerate(data) for u, value in enumerate(row) if value]
    asked = by_id(*(question(f"q{u}", "rating", (0,)) for u in range(12)))
    found = only(agreements(labels_of(*rows), asked, {}), "rating")
    assert found.alpha.mean == pytest.approx(0.815, abs=5e-4)
    assert found.alpha.low < found.alpha.mean < found.alpha.high <= 1
    assert (found.queries, found.annotators, found.reason) == (11, 4, "")


def test_pairwise_alpha_is_the_packages_on_the_same_matrix_whichever_completion_is_named_first():
    labels, asked, _ = crowd(60, (0.9, 0.7, 0.6), seed=1)
    matrix = np.full((3, 60), np.nan)
    for label in labels:
        matrix[int(label.annotator[1:]), int(label.query_id[1:])] = CHOICES.index(label.answer.choice)
    expected = krippendorff.alpha(matrix, value_domain=range(4), level_of_measurement="nominal")
    found = only(agreements(labels, asked, {}), "pairwise")
    assert found.alpha.mean == pytest.approx(expected)

    turned = {q: question(q, ids=(1, 0), prompt_id=q) for q in asked}
    other = {"first": "second", "second": "first"}
    mirrored = labels_of(*((x.query_id, x.annotator, other[x.answer.choice]) for x in labels))
    assert only(agreements(mirrored, turned, {}), "pairwise") == found


def test_ranking_alpha_compares_orders_pair_by_pair():
    rng = np.random.default_rng(3)
    ids = (4, 2, 9)
    rankings = [[tuple((rng.permutation(3) + 1).tolist()) for _ in range(2)] for _ in range(20)]
    rows = [(f"q{i}", f"a{a}", ranks) for i, both in enumerate(rankings) for a, ranks in enumerate(both)]
    asked = by_id(*(question(f"q{i}", "ranking", ids) for i in range(20)))
    matrix = [[], []]
    for both in rankings:
        for i, j in itertools.combinations(np.argsort(ids), 2):
            for a, ranks in enumerate(both):
                matrix[a].append(np.sign(ranks[i] - ranks[j]))
    found = only(agreements(labels_of(*rows), asked, {}), "ranking")
    assert found.alpha.mean == pytest.approx(krippendorff.alpha(np.array(matrix), level_of_measurement="nominal"))
    assert found.queries == 20


@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60)
def test_bootstrap_replicates_are_what_the_package_gives_for_the_queries_drawn(seed, ordinal):
    rng = np.random.default_rng(seed)
    n_values = 5 if ordinal else 4
    counts = rng.integers(0, 3, size=(8, n_values))
    counts = counts[counts.sum(axis=1) >= 2]
    drawn = counts[rng.integers(len(counts), size=12)] if len(counts) else counts
    if np.count_nonzero(drawn.sum(axis=0)) < 2:
        return
    level = "ordinal" if ordinal else "nominal"
    expected = krippendorff.alpha(value_counts=drawn, level_of_measurement=level)
    pairs = np.einsum("qi,qj->qij", drawn, drawn) - np.einsum("qi,ij->qij", drawn, np.eye(n_values))
    coincidences = (pairs / (drawn.sum(axis=1) - 1)[:, None, None]).sum(axis=0)
    assert quality._alphas(coincidences[None], ordinal)[0] == pytest.approx(expected)


def test_the_interval_holds_the_true_alpha_about_as_often_as_it_says():
    def alpha(n, seed):
        labels, asked, _ = crowd(n, (0.85, 0.85), seed=seed)
        return only(agreements(labels, asked, {}, seed=seed, replicates=300), "pairwise").alpha

    truth = alpha(20_000, 1).mean
    held = sum(found.low <= truth <= found.high for found in (alpha(60, 100 + s) for s in range(80)))
    assert 66 <= held <= 80  # 95 % of 80 is 76


def test_agreement_is_the_same_for_the_same_seed_and_any_order_of_labels():
    labels, asked, _ = crowd(40, (0.9, 0.6, 0.7))
    assert agreements(labels, asked, {}) == agreements(labels[::-1], asked, {})
    assert agreements(labels, asked, {}) != agreements(labels, asked, {}, seed=1)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({f"q{i}": {"ann": "first"} for i in range(9)}, "no query has answers of two annotators"),
        ({f"q{i}": {"ann": "first", "bob": "tie"} for i in range(4)}, "only 4 of the 5 queries"),
        ({f"q{i}": {"ann": "first", "bob": "first"} for i in range(9)}, "all answers are the same"),
    ],
)
def test_alpha_that_cannot_be_told_is_none_with_the_reason(rows, reason):
    (found,) = agreements(*pairwise(rows), {})
    assert found.alpha is None
    assert reason in found.reason


def test_kinds_that_nobody_answered_are_left_out_and_nothing_at_all_gives_nothing():
    assert agreements([], {}, {}) == ()
    labels, asked = pairwise({"q": {"ann": "first"}})
    assert [row.kind for row in agreements(labels, asked, {})] == ["pairwise"]


def test_skips_corrections_adjudications_gold_and_unknown_queries_do_not_count_for_agreement():
    labels = [
        *labels_of(("q", "ann", "first"), ("q", "bob", "second"), ("q", "cy", Answer()), ("gold", "ann", "tie")),
        Label(5, "q", "bob", "person", Answer(choice="first"), 5.0, supersedes=2),
        Label(6, "q", "lead", "person", Answer(choice="second"), 6.0, adjudicated=True),
    ]
    kept = independent(labels[::-1], {"gold"})
    assert [label.label_id for label in kept] == [1, 5]
    assert coded(kept, {}, "pairwise").units == ()


def test_the_calls_for_alpha_grow_no_faster_than_the_labels():
    def work(n_queries):
        labels, asked, _ = crowd(n_queries, (0.8,) * 8, per_query=2)
        return calls_of(lambda: agreements(labels, asked, {}))

    assert work(1000) < 5 * work(250)


# -- Dawid-Skene -------------------------------------------------------------------------------------------------------


def test_dawid_skene_knows_the_good_annotator_from_the_bad_ones_and_beats_the_majority():
    labels, asked, truth = crowd(300, (0.95, 0.6, 0.6, 0.55, 0.9))
    answers = coded(labels, asked, "pairwise")
    found = dawid_skene(answers)
    ranked = sorted(found.reliability, key=found.reliability.get, reverse=True)
    assert ranked[:2] == ["a0", "a4"]
    assert found.reliability["a0"] > 0.9
    assert found.reliability["a3"] < 0.7
    assert found.posterior.sum(axis=1) == pytest.approx(1)
    right = np.array([CHOICES.index(truth[unit.query_id]) for unit in answers.units])
    estimated = (found.posterior.argmax(axis=1) == right).mean()
    majority = (answers.counts.argmax(axis=1) == right).mean()
    assert estimated > majority + 0.03


def test_dawid_skene_does_not_depend_on_which_completion_is_called_the_first():
    labels, asked, _ = crowd(40, (0.9, 0.7, 0.6), seed=5)
    other = {"first": "second", "second": "first"}
    some = {f"q{i}" for i in range(0, 40, 3)}
    turned = labels_of(
        *((x.query_id, x.annotator, other[x.answer.choice] if x.query_id in some else x.answer.choice) for x in labels)
    )
    plain, mirrored = (dawid_skene(coded(rows, asked, "pairwise")) for rows in (labels, turned))
    swapped = np.array([f"q{i}" in some for i in range(40)])
    expected = np.where(swapped[:, None], plain.posterior[:, [SECOND, FIRST, TIE, 3]], plain.posterior)
    assert mirrored.posterior == pytest.approx(expected, abs=1e-6)
    assert mirrored.reliability == pytest.approx(plain.reliability, abs=1e-6)


def test_what_one_annotator_says_alone_is_the_posterior():
    labels, asked = pairwise({f"q{i}": {"ann": CHOICES[i % 4]} for i in range(12)})
    answers = coded(labels, asked, "pairwise")
    assert dawid_skene(answers).posterior == pytest.approx(np.eye(4)[answers.value], abs=1e-6)


def test_known_answers_tell_who_is_right_where_votes_cannot():
    rows = {f"q{i}": {"ann": "first", "bob": "second"} for i in range(12)}
    answers = coded(*pairwise(rows), "pairwise")
    found = dawid_skene(answers, dict.fromkeys(range(6), FIRST) | {7: TIE})  # a tie that nobody gave tells nothing
    assert found.reliability["ann"] > 0.9
    assert found.reliability["bob"] < 0.1
    assert (found.posterior[6:].argmax(axis=1) == FIRST).all()


def test_no_answers_give_no_posterior():
    assert dawid_skene(coded([], {}, "pairwise")).reliability == {}


# -- annotators --------------------------------------------------------------------------------------------------------


def test_position_bias_is_in_terms_of_what_was_shown():
    asked = by_id(*(question(f"q{i}", ids=(7, 3)) for i in range(4)))
    labels = labels_of(
        ("q0", "ann", "first", {"shown": (7, 3)}),  # left
        ("q1", "ann", "first", {"shown": (3, 7)}),  # right
        ("q2", "ann", "second", {"shown": (3, 7)}),  # left
        ("q3", "ann", "tie", {"shown": (3, 7)}),
        ("q3", "bob", "first"),  # nothing was shown
    )
    ann, bob = annotator_quality(labels, asked, {})
    assert (ann.left_share.mean, ann.answers) == (pytest.approx(2 / 3), 4)
    assert bob.left_share is None


def test_pace_is_the_median_and_skips_are_counted_apart():
    asked = by_id(*(question(f"q{i}") for i in range(4)))
    labels = labels_of(
        ("q0", "ann", "first", {"seconds": 10.0}),
        ("q1", "ann", "first", {"seconds": 20.0}),
        ("q2", "ann", "first", {"seconds": 86_400.0}),
        ("q3", "ann", Answer(), {"seconds": 1.0}),
    )
    (ann,) = annotator_quality(labels, asked, {})
    assert (ann.per_hour, ann.answers, ann.skips) == (180.0, 3, 1)


def test_gold_questions_tell_accuracy_and_a_correction_counts_instead_of_what_it_corrects():
    asked = by_id(*(question(f"g{i}") for i in range(3)))
    gold = {f"g{i}": Answer(choice="first") for i in range(3)}
    labels = labels_of(("g0", "ann", "first"), ("g1", "ann", "second"), ("g2", "ann", "tie"))
    labels.append(Label(4, "g1", "ann", "person", Answer(choice="first"), 4.0, supersedes=2))
    (ann,) = annotator_quality(labels, asked, gold)
    assert ann.gold_accuracy.mean == pytest.approx(2 / 3)
    assert ann.majority_agreement is None
    assert ann.answers == 3


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (Answer(choice="first"), Answer(choice="first"), True),
        (Answer(choice="tie"), Answer(choice="both_bad"), False),
        (Answer(rating=4), Answer(rating=5), True),
        (Answer(rating=3), Answer(rating=5), False),
        (Answer(rating=5, safe=False), Answer(rating=5, safe=True), False),
        (Answer(rating=1, safe=True), Answer(safe=True), True),
        (Answer(safe=True), Answer(rating=4, safe=True), False),
        (Answer(ranks=(1, 3, 3)), Answer(ranks=(1, 2, 2)), True),
        (Answer(ranks=(1, 2, 3)), Answer(ranks=(1, 2, 2)), False),
    ],
)
def test_what_is_right(answer, truth, right):
    assert is_right(answer, truth) is right


def test_agreement_with_the_others_leaves_oneself_out():
    labels, asked = pairwise(
        {
            "q0": {"ann": "first", "bob": "first", "cy": "second"},  # ann and bob have no majority of the others
            "q1": {"ann": "first", "bob": "first", "cy": "first"},
            "q2": {"ann": "tie"},
        }
    )
    ann, bob, cy = annotator_quality(labels, asked, {})
    assert (ann.majority_agreement.mean, bob.majority_agreement.mean) == (1.0, 1.0)
    assert cy.majority_agreement.mean == 0.5


def test_agreement_of_ratings_allows_a_point_and_of_rankings_counts_pairs():
    asked = by_id(question("r", "rating", (0,)), question("k", "ranking", (0, 1, 2)))
    labels = labels_of(
        ("r", "ann", 3), ("r", "bob", 4), ("r", "cy", 1), ("k", "ann", (1, 2, 3)), ("k", "bob", (1, 3, 2))
    )
    ann, bob, cy = annotator_quality(labels, asked, {})
    assert ann.majority_agreement.mean == pytest.approx((1 + 2 / 3) / 2)  # 3 against a mean of 2.5; 2 pairs of 3
    assert bob.majority_agreement.mean == pytest.approx((0 + 2 / 3) / 2)  # 4 against a mean of 2; 2 pairs of 3
    assert cy.majority_agreement.mean == 0


@given(st.integers(0, 40), st.integers(1, 40))
def test_wilson_is_scipys(k, n):
    k = min(k, n)
    expected = binomtest(k, n).proportion_ci(method="wilson")
    found = wilson(k, n)
    assert (found.mean, found.low, found.high) == pytest.approx((k / n, expected.low, expected.high), abs=1e-9)
    assert wilson(0, 0) is None


# -- contradictions ----------------------------------------------------------------------------------------------------


def circle(prompt_id, *pairs):
    """Questions and rows that prefer the first of each pair."""
    return [(question(f"{prompt_id}-{a}-{b}", ids=(a, b), prompt_id=prompt_id), "first") for a, b in pairs]


def test_conflict_rate_counts_cycles_among_prompts_that_could_have_one():
    rows = [
        *circle("cyclic", (5, 2), (2, 9), (9, 5), (9, 1)),
        *circle("fine", (0, 1), (1, 2), (0, 2)),
        *circle("small", (0, 1)),
    ]
    asked = by_id(*(q for q, _ in rows))
    labels = labels_of(*((q.query_id, "ann", said) for q, said in rows))
    found = conflict_rate(labels, asked, {})
    assert (found.prompts, found.rate.mean) == (2, 0.5)
    (prompt,) = found.cyclic
    assert (prompt.prompt_id, prompt.cycle) == ("cyclic", (2, 9, 5))
    assert set(prompt.query_ids) == {"cyclic-5-2", "cyclic-2-9", "cyclic-9-5"}


def test_votes_that_are_even_or_call_a_tie_break_a_cycle():
    rows = circle("p", (0, 1), (1, 2), (2, 0))
    asked = by_id(*(q for q, _ in rows))
    labels = labels_of(*((q.query_id, "ann", said) for q, said in rows))
    assert len(conflict_rate(labels, asked, {}).cyclic) == 1
    for said in ("second", "tie"):
        more = [*labels, Label(99, "p-2-0", "bob", "person", Answer(choice=said), 1.0)]
        found = conflict_rate(more, asked, {})
        assert (found.prompts, found.cyclic) == (1, ())


def test_rankings_and_pairs_contradict_each_other():
    asked = by_id(question("k", "ranking", (0, 1, 2)), question("q", ids=(2, 0)))
    labels = labels_of(("k", "ann", (1, 2, 3)), ("q", "bob", "first"))
    (prompt,) = conflict_rate(labels, asked, {}).cyclic
    assert set(prompt.query_ids) == {"k", "q"}
    assert conflict_rate(labels[:1], asked, {}).cyclic == ()


def test_a_cycle_is_of_one_round():
    rows = circle("p", (0, 1), (1, 2), (2, 0))
    asked = by_id(*(q for q, _ in rows))
    labels = labels_of(*((q.query_id, "ann", said) for q, said in rows))
    moved = {query_id: replace(q, round=2) for query_id, q in asked.items()}
    (prompt,) = conflict_rate(labels, moved, {}).cyclic
    assert (prompt.round, prompt.prompt_id, prompt.cycle) == (2, "p", (0, 1, 2))
    found = conflict_rate(labels, asked | {"p-2-0": moved["p-2-0"]}, {})
    assert (found.prompts, found.cyclic) == (1, ())


def test_no_prompt_that_could_have_a_cycle_gives_no_rate():
    asked = by_id(question("q"), question("r", "rating", (2,)))
    assert conflict_rate(labels_of(("q", "ann", "first"), ("r", "ann", 3)), asked, {}).rate is None


# -- preference graphs -------------------------------------------------------------------------------------------------


def graph_of(net):
    """Build a graph from net votes: a (N, N) matrix of weights, one direction of each pair."""
    n = len(net)
    pairs = itertools.combinations(range(n), 2)
    return preference_graph(Comparison(10 + i, 10 + j, (net[i, j], net[j, i], 0, 0)) for i, j in pairs)


def lightest(net):
    """Least weight of arcs that point backwards, over all orders."""
    n = len(net)
    return min(
        sum(net[o[b], o[a]] for a in range(n) for b in range(a + 1, n)) for o in itertools.permutations(range(n))
    )


def is_acyclic(kept):
    return connected_components(kept, directed=True, connection="strong")[0] == len(kept)


WEIGHTS = st.sampled_from([0.0, 1.0, 2.0, 1 / 3, 2 / 3, 0.1])


@st.composite
def nets(draw, most=6, weights=WEIGHTS):
    n = draw(st.integers(2, most))
    net = np.zeros((n, n))
    for i, j in itertools.combinations(range(n), 2):
        weight = draw(weights)
        forward = draw(st.booleans())
        net[(i, j) if forward else (j, i)] = weight
    return net


@given(nets())
@settings(max_examples=200)
def test_what_is_cut_is_the_lightest_there_is_and_leaves_no_cycle(net):
    graph = graph_of(net)
    found = deconflict(graph)
    assert found.exact
    assert is_acyclic(found.kept)
    assert graph.net[found.removed].sum() == pytest.approx(lightest(net), abs=1e-9)
    assert ((graph.net > 0) == (found.kept | found.removed)).all()
    assert not (found.kept & found.removed).any()
    assert np.abs(found.rewards).max(initial=0) <= 1
    assert found.rewards.sum() == pytest.approx(0, abs=1e-9)
    # no cycle, nothing cut; and what is cut could not stay
    assert found.removed.any() != is_acyclic(graph.net > 0)
    for i, j in np.argwhere(found.removed):
        again = found.kept.copy()
        again[i, j] = True
        assert not is_acyclic(again)


@pytest.mark.parametrize("seed", range(3))
def test_seven_completions_against_all_orders(seed):
    rng = np.random.default_rng(seed)
    net = np.triu(rng.integers(1, 4, size=(7, 7)) * 1.0, 1)
    flip = np.triu(rng.random((7, 7)) < 0.5, 1)
    net = np.where(flip, 0, net) + np.where(flip, net, 0).T
    graph = graph_of(net)
    assert graph.net[deconflict(graph).removed].sum() == pytest.approx(lightest(net))


@given(nets(weights=st.floats(0.1, 5.0)), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_other_names_of_the_completions_cut_the_same_preferences(net, random):
    order = list(range(len(net)))
    random.shuffle(order)
    graph, renamed = graph_of(net), graph_of(net[np.ix_(order, order)])
    plain, other = deconflict(graph), deconflict(renamed)
    assert graph.net[plain.removed].sum() == pytest.approx(renamed.net[other.removed].sum())
    costs = sorted(
        sum(net[o[b], o[a]] for a in range(len(o)) for b in range(a + 1, len(o)))
        for o in itertools.permutations(range(len(net)))
    )
    if sum(cost < costs[0] + 1e-6 for cost in costs) == 1:  # a single best order: the same arcs
        assert (other.removed == plain.removed[np.ix_(order, order)]).all()
        assert other.rewards == pytest.approx(plain.rewards[order])


def test_ties_between_cuts_go_by_completion_id_whatever_the_order_of_votes():
    votes = [Comparison(2, 0, (1, 0, 0, 0)), Comparison(0, 1, (1, 0, 0, 0)), Comparison(1, 2, (1, 0, 0, 0))]
    for order in itertools.permutations(votes):
        graph = preference_graph(order)
        removed = np.argwhere(deconflict(graph).removed).tolist()
        assert removed == [[2, 0]]
        assert find_cycle(graph) == (0, 1, 2)
    tenths = [Comparison(2, 0, (0.1, 0, 0, 0))] * 3  # add up to a little more than 0.3
    rest = [Comparison(0, 1, (0.3, 0, 0, 0)), Comparison(1, 2, (0.3, 0, 0, 0))]
    assert np.argwhere(deconflict(preference_graph([*tenths, *rest])).removed).tolist() == [[2, 0]]


def test_the_weakest_link_is_cut_and_the_rest_gives_rewards():
    # 0 > 1 and 1 > 2 by three votes each, 2 > 0 by two to one: the cycle is cut there, and 0 comes first.
    graph = preference_graph(
        [Comparison(0, 1, (3, 0, 0, 0)), Comparison(1, 2, (3, 0, 0, 0)), Comparison(2, 0, (2, 1, 0, 0))]
    )
    found = deconflict(graph)
    assert np.argwhere(found.removed).tolist() == [[2, 0]]
    assert found.rewards.tolist() == [0.5, 0.0, -0.5]


def test_rewards_without_cycles_are_wins_less_losses():
    # Net wins of four answers in a line: 3, 1, -1, -3, over N - 1.
    pairs = [Comparison(i, j, (1, 0, 0, 0)) for i, j in itertools.combinations(range(4), 2)]
    found = deconflict(preference_graph(pairs))
    assert found.rewards == pytest.approx(np.array([3, 1, -1, -3]) / 3)
    assert not found.removed.any()
    assert find_cycle(preference_graph(pairs)) == ()


def test_votes_on_a_pair_add_up_whichever_way_round_and_a_tie_is_no_arc():
    graph = preference_graph([Comparison(5, 3, (2, 0, 0, 1)), Comparison(3, 5, (1, 0, 0, 0))])
    assert graph.completion_ids == (3, 5)
    assert graph.votes[0, 1].tolist() == [1, 2, 0, 1]
    assert graph.net.tolist() == [[0, 0], [1, 0]]
    assert graph.strength[1, 0] == 0.25
    assert not preference_graph([Comparison(0, 1, (1, 0, 2, 0))]).net.any()
    assert not preference_graph([Comparison(0, 1, (0.1 + 0.2, 0.3, 0, 0))]).net.any()


def test_twelve_completions_are_not_taken_order_by_order():
    rng = np.random.default_rng(0)
    votes = [Comparison(i, j, (*rng.random(2), 0, 0)) for i, j in itertools.combinations(range(EXACT_UP_TO), 2)]
    graph = preference_graph(votes)
    assert deconflict(graph).exact
    assert calls_of(lambda: deconflict(graph)) < 2**EXACT_UP_TO  # of 479,001,600 orders


def test_more_than_twelve_in_one_tangle_are_ordered_by_a_heuristic_that_says_so():
    rng = np.random.default_rng(0)
    votes = [Comparison(i, j, (*rng.random(2), 0, 0)) for i, j in itertools.combinations(range(20), 2)]
    graph = preference_graph(votes)
    found = deconflict(graph)
    assert not found.exact
    assert is_acyclic(found.kept)
    assert graph.net[found.removed].sum() <= graph.net.sum() / 2


def test_many_completions_in_small_tangles_are_exact():
    votes = [Comparison(i, j, (1, 0, 0, 0)) for i, j in itertools.combinations(range(20), 2) if (i, j) != (3, 5)]
    found = deconflict(preference_graph([*votes, Comparison(5, 3, (1, 0, 0, 0))]))
    assert found.exact
    assert found.removed.sum() == 1
    assert is_acyclic(found.kept)


@given(nets())
def test_the_heuristic_leaves_no_cycle_either_and_loses_half_at_most(net):
    order = greedy_order(net)
    assert sorted(order.tolist()) == list(range(len(net)))
    place = np.argsort(order)
    backward = net[place[:, None] > place[None, :]].sum()
    assert lightest(net) - 1e-9 <= backward <= net.sum() / 2 + 1e-9


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ((2, 1, 0, 0), (FIRST, 1 / 3)),
        ((0, 3, 0, 0), (SECOND, 1.0)),
        ((1, 1, 0, 0), (None, 0.0)),
        ((1, 0, 3, 0), (TIE, 0.5)),
        ((1, 0, 0, 1), (None, 0.0)),
    ],
)
def test_the_most_votes_decide_by_their_lead(votes, expected):
    assert decided(votes) == pytest.approx(expected) if expected[0] is not None else decided(votes) == expected


def test_a_ranking_counts_as_many_judgements_as_it_costs():
    asked = question("k", "ranking", (3, 1, 2, 0))
    (label,) = labels_of(("k", "ann", (4, 2, 2, 1)))
    answers = coded([label], by_id(asked), "ranking")
    assert sum(unit.share for unit in answers.units) == pytest.approx(3)
    assert answers.units[0] == Unit("k", (0, "p"), (0, 1), 0.5)
    said = {unit.completion_ids: value for unit, value in zip(answers.units, answers.value.tolist(), strict=True)}
    assert said == {(0, 1): FIRST, (0, 2): FIRST, (0, 3): FIRST, (1, 2): TIE, (1, 3): FIRST, (2, 3): FIRST}
