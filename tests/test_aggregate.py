"""Labels to pairs: what is preferred stays preferred, weights are what the votes say, and nothing goes missing."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dissonance.errors import DataError, SettingsError
from dissonance.feedback.aggregate import aggregate
from dissonance.feedback.pairs import COMPARISONS_LEFT_OUT, LABELS_LEFT_OUT, PreferencePair
from dissonance.records import Answer, Label, Message, Question

METHODS = ("majority", "dawid_skene", "dgr")
MESSAGES = (Message("user", "hello"),)


def question(query_id, kind="pairwise", ids=(0, 1), prompt_id="p"):
    return Question(query_id, prompt_id, kind, MESSAGES, tuple(ids), tuple(f"text {i}" for i in ids))


def label(label_id, query_id, who, answer, **more):
    return Label(label_id, query_id, who, **{"annotator_kind": "person", "answer": answer, "created_at": 0.0, **more})


def votes(query_id, *answers, start=1, **more):
    """One label for each answer, by annotators a0, a1, ...; a string is a choice, a tuple ranks, a number a rating."""
    forms = {str: "choice", bool: "safe", int: "rating", tuple: "ranks"}
    said = [x if isinstance(x, Answer) else Answer(**{forms[type(x)]: x}) for x in answers]
    return [label(start + i, query_id, f"a{i}", answer, **more) for i, answer in enumerate(said)]


def by_id(*questions):
    return {q.query_id: q for q in questions}


def run(labels, questions, method="majority", gold=None, **more):
    return aggregate(labels, by_id(*questions), gold or {}, method, **more)


def orders(found):
    """Chosen, rejected, weight and tie of each pair, the weight rounded."""
    return [(pair.chosen_id, pair.rejected_id, round(pair.weight, 9), pair.tie) for pair in found.pairs]


# -- trap 2: the preferred side is never swapped -----------------------------------------------------------------------

PAIRS = [(3, 7), (7, 3)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ids", PAIRS)
@pytest.mark.parametrize("shown", [(), (3, 7), (7, 3)])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("better", [3, 7])
def test_the_preferred_side_is_never_swapped(method, ids, shown, n, better):
    worse = 10 - better
    cases = {
        "pairwise": (
            [question("q", ids=ids)],
            lambda q: Answer(choice="first" if q.completion_ids[0] == better else "second"),
        ),
        "ranking": (
            [question("q", "ranking", ids)],
            lambda q: Answer(ranks=tuple(1 if i == better else 2 for i in q.completion_ids)),
        ),
        "rating": (
            [question("r", "rating", ids[:1]), question("s", "rating", ids[1:])],
            lambda q: Answer(rating=4 if q.completion_ids == (better,) else 2),
        ),
    }
    for kind, (asked, say) in cases.items():
        # Around it, a crowd that mostly says the other thing of other prompts: estimates must not spill over.
        others = [question(f"other{i}", ids=ids, prompt_id=f"x{i}") for i in range(6)]
        contrary = "second" if ids[0] == better else "first"
        noise = [x for at, q in enumerate(others) for x in votes(q.query_id, *[contrary] * n, start=100 + 10 * at)]
        labels = [
            label(20 * at + who, q.query_id, f"a{who}", say(q), shown=tuple(i for i in shown if i in q.completion_ids))
            for at, q in enumerate(asked)
            for who in range(n)
        ]
        found = run([*labels, *noise], [*asked, *others], method)
        (pair,) = [pair for pair in found.pairs if pair.prompt_id == "p"]
        assert (pair.chosen_id, pair.rejected_id, pair.tie) == (better, worse, False), kind
        assert pair.source == f"{kind}/{method}"
        assert pair.n_annotators == n


@given(st.data())
@settings(max_examples=25)
def test_nobody_is_preferred_whom_nobody_preferred(data):
    """For any votes, methods and shown orders: a chosen side has a voter."""
    labels, asked = [], []
    for q in range(data.draw(st.integers(1, 5))):
        a, b = data.draw(st.permutations([0, 1, 2]))[:2]
        asked.append(question(f"q{q}", ids=(a, b), prompt_id=f"p{q % 2}"))
        for who in range(data.draw(st.integers(0, 3))):
            choice = data.draw(st.sampled_from(["first", "second", "tie", "both_bad"]))
            labels.append(label(len(labels) + 1, f"q{q}", f"a{who}", Answer(choice=choice)))
    questions = by_id(*asked)
    preferred = Counter()
    for x in labels:
        first, second = questions[x.query_id].completion_ids
        if x.answer.choice in ("first", "second"):
            win = (first, second) if x.answer.choice == "first" else (second, first)
            preferred[questions[x.query_id].prompt_id, *win] += 1
    for method in METHODS:
        for pair in run(labels, asked, method).pairs:
            if not pair.tie:
                assert preferred[pair.prompt_id, pair.chosen_id, pair.rejected_id] > 0
            assert 0 < pair.weight <= 1


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["majority", "dgr"])
@pytest.mark.parametrize(
    ("said", "pairs", "left_out"),
    [
        (["first"], [(0, 1, 1.0, False)], {}),
        (["first", "first", "second"], [(0, 1, round(1 / 3, 9), False)], {}),
        (["second", "second", "tie"], [(1, 0, round(1 / 3, 9), False)], {}),
        (["first", "second"], [], {"split": 1}),
        (["tie"], [(0, 1, 1.0, True)], {}),
        (["first", "tie", "tie", "tie"], [(0, 1, 0.5, True)], {}),
        (["both_bad", "both_bad", "first"], [], {"both_bad": 1}),
        (["first", "both_bad"], [], {"split": 1}),
        ([Answer(), "second"], [(1, 0, 1.0, False)], {"skipped": 1}),
        ([Answer()], [], {"skipped": 1}),
    ],
)
def test_pairwise_weights_are_the_lead(method, said, pairs, left_out):
    found = run(votes("q", *said), [question("q")], method)
    assert orders(found) == pairs
    assert found.left_out == left_out
    assert (found.both_bad == ((0, "p", 0, 1),)) == ("both_bad" in left_out)


def test_dawid_skene_weighs_by_who_says_so_and_leaves_the_rest():
    # a0 and a1 agree all the time, a2 says anything: where a2 stands against a0, a0 has it.
    asked = [question(f"q{i}", prompt_id=f"p{i}") for i in range(40)]
    labels = []
    for i, q in enumerate(asked[:-1]):
        right, wrong = ("first", "second") if i % 2 else ("second", "first")
        labels += votes(q.query_id, right, right, right if i % 3 else wrong, start=10 * i + 1)
    against = [label(901, "q39", "a0", Answer(choice="second")), label(902, "q39", "a2", Answer(choice="first"))]
    assert run([*labels, *against], asked, "majority").left_out == {"split": 1}
    found = run([*labels, *against], asked, "dawid_skene")
    (pair,) = [pair for pair in found.pairs if pair.prompt_id == "p39"]
    assert (pair.chosen_id, pair.n_annotators) == (1, 2)
    assert 0.5 < pair.weight <= 1


def test_dawid_skene_never_prefers_what_nobody_said():
    # a0 is against the known answer each time: alone on a query, they are most probably wrong again.
    gold = {f"g{i}": Answer(choice="first") for i in range(10)} | {f"h{i}": Answer(choice="second") for i in range(10)}
    asked = [question(q, prompt_id=q) for q in gold] + [question("q")]
    labels = [
        label(i + 1, q, "a0", Answer(choice="second" if answer.choice == "first" else "first"))
        for i, (q, answer) in enumerate(gold.items())
    ]
    labels += [label(100 + i, q, "a1", answer) for i, (q, answer) in enumerate(gold.items())]
    labels.append(label(500, "q", "a0", Answer(choice="first")))
    found = run(labels, asked, "dawid_skene", gold)
    assert found.pairs == ()
    assert found.left_out == {"gold": 40, "overruled": 1}


def test_a_ranking_weighs_what_it_costs():
    found = run(votes("k", (2, 1, 3, 4)), [question("k", "ranking", (5, 6, 7, 8))])
    assert {pair[:2] for pair in orders(found)} == {(6, 5), (6, 7), (6, 8), (5, 7), (5, 8), (7, 8)}
    assert sum(pair.weight for pair in found.pairs) == pytest.approx(3)
    tied = run(votes("k", (1, 1, 2)), [question("k", "ranking", (5, 6, 7))])
    assert [pair[3] for pair in orders(tied)] == [True, False, False]


def test_a_ranking_of_two_is_a_comparison():
    ranked = run(votes("k", (2, 1), (2, 1), (1, 2)), [question("k", "ranking")])
    compared = run(votes("q", "second", "second", "first"), [question("q")])
    assert orders(ranked) == orders(compared)


def test_ratings_pair_the_completions_of_a_prompt_by_their_difference():
    asked = [question(f"r{i}", "rating", (i,), prompt_id="p" if i < 4 else "alone") for i in range(5)]
    ratings = {"r0": (5, 4), "r1": (1, 2), "r2": (3,), "r3": (3,), "r4": (4,)}
    labels = [x for at, (q, given) in enumerate(ratings.items()) for x in votes(q, *given, start=10 * at + 1)]
    found = run(labels, asked)
    share = 2 / 4
    assert orders(found) == [
        (0, 1, 3 / 4 * share, False),
        (0, 2, 1.5 / 4 * share, False),
        (0, 3, 1.5 / 4 * share, False),
        (2, 1, 1.5 / 4 * share, False),
        (3, 1, 1.5 / 4 * share, False),
    ]
    assert found.left_out == {"equal_ratings": 1, "single_rating": 1}
    assert found.pairs[0].n_annotators == 2


def test_a_completion_that_two_queries_rate_has_one_rating_and_one_safety():
    asked = [question(q, "rating", (i,)) for q, i in (("r", 0), ("s", 0), ("t", 1))]
    labels = [
        *votes("r", Answer(rating=1, safe=False), Answer(rating=1, safe=False)),
        *votes("s", Answer(rating=4, safe=True), start=10),
        *votes("t", 3, start=20),
    ]
    found = run(labels, asked)
    assert orders(found) == [(1, 0, 0.25, False)]  # 3 against (1 + 1 + 4) / 3
    assert found.safe == {(0, "p", 0): False}


@pytest.mark.parametrize("method", METHODS)
def test_the_widest_difference_weighs_one(method):
    asked = [question("r", "rating", (0,)), question("s", "rating", (1,))]
    found = run([*votes("r", 1), *votes("s", 5, start=2)], asked, method)
    assert orders(found) == [(1, 0, 1.0, False)]


# -- dgr ---------------------------------------------------------------------------------------------------------------


def test_dgr_cuts_the_weakest_link_of_a_circle_and_counts_it():
    asked = [question("q01", ids=(0, 1)), question("q12", ids=(1, 2)), question("q20", ids=(2, 0))]
    labels = [
        *votes("q01", "first", "first"),
        *votes("q12", "first", "first", start=10),
        *votes("q20", "first", "first", "second", start=20),
    ]
    assert len(run(labels, asked, "majority").pairs) == 3
    found = run(labels, asked, "dgr")
    assert orders(found) == [(0, 1, 1.0, False), (1, 2, 1.0, False)]
    assert found.left_out == {"cyclic": 1}


def test_an_adjudicated_preference_is_the_last_to_be_cut():
    asked = [question("q01", ids=(0, 1)), question("q12", ids=(1, 2)), question("q20", ids=(2, 0))]
    labels = [*votes("q01", *["first"] * 5), *votes("q12", *["first"] * 4, start=10)]
    settled = label(50, "q20", "lead", Answer(choice="first"), adjudicated=True)
    found = run([*labels, settled], asked, "dgr")
    assert [pair[:2] for pair in orders(found)] == [(0, 1), (2, 0)]
    assert found.left_out == {"cyclic": 1}


SETTLED = [
    label(50, "r0", "lead", Answer(rating=3), adjudicated=True),
    label(51, "r1", "lead", Answer(rating=2), adjudicated=True),
]


@pytest.mark.parametrize("settled", [SETTLED, SETTLED[:1]])
def test_adjudicated_ratings_are_the_last_to_be_cut(settled):
    asked = [question(f"r{i}", "rating", (i,)) for i in range(2)]
    asked += [question("q12", ids=(1, 2)), question("q20", ids=(2, 0))]
    labels = [*votes("r0", 4), *votes("r1", 2, start=5), *votes("q12", *["first"] * 5, start=10)]
    found = run([*labels, *votes("q20", *["first"] * 4, start=20), *settled], asked, "dgr")
    # One rating alone that is settled settles no preference: the other may be wrong.
    kept = (0, 1) if len(settled) == 2 else (2, 0)
    assert {pair[:2] for pair in orders(found)} == {(1, 2), kept}
    assert found.left_out["cyclic"] == 1


def test_adjudicated_ratings_outweigh_what_others_prefer():
    asked = [*(question(f"r{i}", "rating", (i,)) for i in range(2)), question("q")]
    against = votes("q", *["second"] * 9)
    (pair,) = run([*against, *SETTLED], asked, "dgr").pairs
    assert (pair.chosen_id, pair.source) == (0, "pairwise+rating/dgr")
    assert 0 < pair.weight < 0.5
    (pair,) = run([*against, *SETTLED[:1], *votes("r1", 2, start=60)], asked, "dgr").pairs
    assert pair.chosen_id == 1


def test_dgr_takes_all_kinds_of_a_prompt_together():
    asked = [question("k", "ranking", (0, 1, 2)), question("q", ids=(1, 0)), question("r", "rating", (3,))]
    found = run([*votes("k", (1, 2, 3)), *votes("q", "second", start=5), *votes("r", 4, start=9)], asked, "dgr")
    assert orders(found) == [(0, 1, 1.0, False), (0, 2, round(2 / 3, 9), False), (1, 2, round(2 / 3, 9), False)]
    assert found.pairs[0].source == "pairwise+ranking/dgr"
    assert found.pairs[0].n_annotators == 1


@given(st.lists(st.sampled_from(["first", "second", "tie", "both_bad"]), min_size=1, max_size=5))
def test_without_a_circle_dgr_is_the_majority(said):
    plain, graph = (run(votes("q", *said), [question("q")], method) for method in ("majority", "dgr"))
    assert orders(plain) == orders(graph)
    assert (plain.left_out, plain.both_bad) == (graph.left_out, graph.both_bad)


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_adjudication_stands_for_all_others(method):
    asked = [question("q")]
    labels = votes("q", *["first"] * 5)
    first = label(20, "q", "lead", Answer(choice="second"), adjudicated=True)
    assert orders(run([*labels, first], asked, method)) == [(1, 0, 1.0, False)]
    found = run([first, *labels, label(21, "q", "other lead", Answer(choice="tie"), adjudicated=True)], asked, method)
    assert orders(found) == [(0, 1, 1.0, True)]  # the last one
    assert found.left_out == {"outweighed": 6}
    assert found.pairs[0].n_annotators == 1


def test_a_correction_counts_instead_of_what_it_corrects():
    labels = [*votes("q", "first"), label(2, "q", "a0", Answer(choice="second"), supersedes=1)]
    found = run(labels, [question("q")])
    assert orders(found) == [(1, 0, 1.0, False)]
    assert found.left_out == {"superseded": 1}
    taken_back = [*votes("q", "first"), label(2, "q", "a0", Answer(), supersedes=1)]
    assert run(taken_back, [question("q")]).left_out == {"superseded": 1, "skipped": 1}


def test_gold_questions_give_no_pairs():
    found = run(votes("g", "first", "second"), [question("g")], gold={"g": Answer(choice="first")})
    assert (found.pairs, found.left_out, found.used) == ((), {"gold": 2}, 0)


def test_whose_labels_count():
    labels = [
        label(1, "q", "ann", Answer(choice="first")),
        label(2, "q", "gpt", Answer(choice="second"), annotator_kind="judge"),
        label(3, "q", "llama", Answer(choice="second"), annotator_kind="judge"),
    ]
    asked = [question("q")]
    assert orders(run(labels, asked)) == [(1, 0, round(1 / 3, 9), False)]
    for options in ({"only": ["person"]}, {"exclude": ["judge"]}, {"exclude": ["gpt", "llama"]}, {"only": ["ann"]}):
        found = run(labels, asked, **options)
        assert orders(found) == [(0, 1, 1.0, False)]
        assert found.left_out == {"excluded": 2}
    with pytest.raises(SettingsError, match="no annotator is called 'anne'"):
        run(labels, asked, only=["anne"])
    with pytest.raises(SettingsError, match="unknown method 'mean'"):
        run(labels, asked, "mean")


def test_safety_is_the_majority_and_stands_beside_every_pair():
    asked = [question("q"), question("r", "rating", (0,)), question("s", "rating", (1,)), question("t", "rating", (2,))]
    labels = [
        *votes("q", "second"),
        *votes("r", Answer(rating=4, safe=False), Answer(rating=4, safe=False), Answer(rating=4, safe=True), start=10),
        *votes("s", True, start=20),
        *votes("t", True, False, start=30),
    ]
    found = run(labels, asked)
    (pair,) = found.pairs
    assert (pair.chosen_safe, pair.rejected_safe) == (True, False)
    assert found.safe == {(0, "p", 0): False, (0, "p", 1): True}
    assert found.left_out == {"single_rating": 1, "safe_only": 3, "safe_split": 1}


def test_nothing_gives_nothing():
    for method in METHODS:
        found = run([], [], method)
        assert (found.pairs, found.left_out, found.labels) == ((), {}, 0)


def test_what_was_left_out_is_said():
    found = run([*votes("q", "first", Answer()), *votes("gone", "first", start=9)], [question("q")])
    assert found.explanation == (
        "1 of 3 labels -> 1 pairs, 0 of them ties",
        "left out: 1 labels that pass the question on",
        "left out: 1 labels of queries that are not there",
    )


@st.composite
def histories(draw):
    """Questions of every kind, labels with skips, corrections, adjudications, gold, strangers, machines."""
    asked, labels = [], []
    for at in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["pairwise", "rating", "ranking"]))
        ids = draw(st.permutations([0, 1, 2]))[: {"pairwise": 2, "rating": 1, "ranking": 3}[kind]]
        asked.append(question(f"q{at}", kind, ids, prompt_id=f"p{at % 2}"))
    forms = {
        "pairwise": st.builds(Answer, choice=st.sampled_from(["first", "second", "tie", "both_bad"])),
        "rating": st.builds(Answer, rating=st.none() | st.integers(1, 5), safe=st.none() | st.booleans()),
        "ranking": st.builds(Answer, ranks=st.tuples(*[st.integers(1, 3)] * 3)),
    }
    for q, who in itertools.product(asked, ["ann", "bob", "gpt"]):
        for n in range(draw(st.integers(0, 2))):
            kind = "judge" if who == "gpt" else "person"
            more = {"supersedes": labels[-1].label_id} if n else {}
            answer = draw(forms[q.kind] | st.just(Answer()))
            labels.append(
                label(
                    len(labels) + 1, q.query_id, who, answer,
                    annotator_kind=kind, adjudicated=draw(st.sampled_from([False, False, True])), **more,
                )
            )  # fmt: skip
    gold = {q.query_id: Answer(choice="first") for q in asked if q.kind == "pairwise" and draw(st.booleans())}
    known = [q for q in asked if draw(st.sampled_from([True, True, True, False]))]
    return labels, known, gold


@given(histories(), st.sampled_from(METHODS), st.booleans(), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_every_label_is_counted_or_accounted_for_whatever_the_order(history, method, people_only, random):
    labels, asked, gold = history
    options = {"exclude": ["judge"]} if people_only else {}
    found = run(labels, asked, method, gold, **options)
    assert found.labels == len(labels)
    assert found.used + sum(n for reason, n in found.left_out.items() if reason in LABELS_LEFT_OUT) == len(labels)
    assert set(found.left_out) <= set(LABELS_LEFT_OUT) | set(COMPARISONS_LEFT_OUT)
    shuffled = list(labels)
    random.shuffle(shuffled)
    assert run(shuffled, asked, method, gold, **options) == found
    # Each pair of completions that was compared gives a pair, or one reason why not.
    for pair in found.pairs:
        assert pair.n_annotators >= 1
        assert not pair.tie or pair.chosen_id < pair.rejected_id


@given(histories(), histories(), st.sampled_from(["majority", "dgr"]))
@settings(max_examples=60)
def test_a_prompt_of_another_round_is_another_prompt(first, second, method):
    """The same prompt_ids and completion_ids with other texts: together they come to what each comes to alone."""
    labels, asked, gold = second
    later = [replace(q, query_id=f"later {q.query_id}", round=1) for q in asked]
    labels = [
        replace(
            x,
            label_id=x.label_id + 1000,
            query_id=f"later {x.query_id}",
            supersedes=None if x.supersedes is None else x.supersedes + 1000,
        )
        for x in labels
    ]
    second = labels, later, {f"later {query_id}": answer for query_id, answer in gold.items()}
    alone = [run(of, asked, method, gold) for of, asked, gold in (first, second)]
    both = run(first[0] + second[0], first[1] + second[1], method, first[2] | second[2])
    assert both.pairs == alone[0].pairs + alone[1].pairs
    assert {pair.round for pair in alone[1].pairs} <= {1}
    assert both.both_bad == alone[0].both_bad + alone[1].both_bad
    assert both.safe == {**alone[0].safe, **alone[1].safe}
    assert both.left_out == Counter(alone[0].left_out) + Counter(alone[1].left_out)


def test_a_pair_refuses_what_it_cannot_be():
    with pytest.raises(DataError, match="weighs 0"):
        PreferencePair("p", 0, 1, 0, False, "pairwise/majority", 1)
    with pytest.raises(DataError, match="preferred to itself"):
        PreferencePair("p", 1, 1, 1.0, False, "pairwise/majority", 1)
