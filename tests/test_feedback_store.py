"""The label store on SQLite and PostgreSQL: nothing lost, nothing doubled, nobody asked twice, and clear errors."""

import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import create_engine, delete, event, func, insert, inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from dissonance.errors import DataError, StoreError
from dissonance.feedback import database
from dissonance.feedback.access import invite, person_of_token, revoke_tokens
from dissonance.feedback.aggregate import aggregate
from dissonance.feedback.rows import answer_from_json, answer_to_json
from dissonance.feedback.schema import events, labels, leases, metadata, queries
from dissonance.feedback.store import Lease, Person, Progress, Store
from dissonance.feedback.votes import independent
from dissonance.records import Answer, Message, Question

FIRST, SECOND, TIE, SKIP = Answer("first"), Answer("second"), Answer("tie"), Answer()


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


def question(name, kind="pairwise"):
    ids = {"pairwise": (3, 1), "rating": (2,), "ranking": (0, 4, 2)}[kind]
    return Question(name, f"p-{name}", kind, (Message("user", f"about {name}"),), ids, tuple(f"text {i}" for i in ids))


def numbered(count):
    return [question(f"q{i:02}") for i in range(count)]


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request, tmp_path):
    """Where a fresh store goes."""
    return tmp_path / "labels.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(where, clock):
    with Store.open(where, "run", clock) as store:
        yield store


@pytest.fixture
def ann(store):
    return store.annotator("ann").annotator_id


@pytest.fixture
def bob(store):
    return store.annotator("bob").annotator_id


keys = (f"key-{i}" for i in itertools.count())


def say(store, who, query_id, answer=FIRST, **more):
    return store.record(who, query_id, answer, **({"key": next(keys)} | more))


def asked(store, who, **more):
    """The query_id that someone is asked next, or None."""
    lease = store.lease(who, **({"gold_every": 0} | more))
    return None if lease is None else lease.question.query_id


def work(store, who, answer=FIRST, **more):
    """Everything that someone is asked until there is nothing more, answered."""
    seen = []
    while (name := asked(store, who, **more)) is not None:
        assert name not in seen
        say(store, who, name, answer)
        seen.append(name)
    return seen


# -- asking ------------------------------------------------------------------------------------------------------------


def test_questions_come_back_as_they_went_in(store):
    given = [question("a"), question("b", "rating"), question("c", "ranking")]
    assert store.add_questions(given) == 3
    assert store.questions() == given
    assert store.question("b") == given[1]
    with pytest.raises(DataError, match="there is no query 'x'"):
        store.question("x")
    with pytest.raises(DataError, match="there is no query"):
        store.question("\0")


def test_any_text_comes_back(store):
    strange = "\0 \ud800 \u202e 👩‍🚀 é <script> ' \" % \\ {} :x"
    given = Question("q", "p", "pairwise", (Message("user", strange),), (0, 1), (strange, ""), category="é %s")
    store.add_questions([given])
    assert store.questions() == [given]
    assert store.lease(store.annotator("Zoë O'Neil").annotator_id).question == given


def test_a_question_is_leased_in_order_and_held(store, ann, clock):
    store.add_questions(numbered(3))
    lease = store.lease(ann, seconds=60)
    assert lease.question.query_id == "q00"
    assert sorted(lease.shown) == [1, 3]
    assert (lease.given_at, lease.expires_at) == (1000, 1060)
    clock.at += 50
    again = store.lease(ann, seconds=60)
    assert again == Lease(lease.lease_id, lease.question, lease.shown, 1000, 1110)
    clock.at += 55
    assert store.lease(ann, seconds=60).lease_id == lease.lease_id  # the second call made it last
    assert work(store, ann) == ["q00", "q01", "q02"]
    assert store.progress() == Progress(3, 3, 3, 3)


def test_sides_are_drawn_at_random_and_kept(store, ann):
    store.add_questions([question(f"q{i}", "ranking") for i in range(120)])
    held = store.lease_many(ann, 120)
    assert len({lease.shown for lease in held}) == 6
    assert [lease.question.query_id for lease in held] == [f"q{i}" for i in range(120)]
    assert store.lease_many(ann, 120) == held


def test_two_people_are_not_asked_the_same_unless_both_are_wanted(store, ann, bob):
    store.add_questions(numbered(2))
    assert [asked(store, ann), asked(store, bob), asked(store, store.annotator("eve").annotator_id)] == [
        "q00",
        "q01",
        None,
    ]
    store.add_questions(numbered(2), overlap=2)
    assert work(store, ann) == ["q00", "q01"]
    assert asked(store, bob) == "q01"  # which he held


def test_a_lease_that_ran_out_is_given_to_the_next_and_its_late_answer_is_kept(store, ann, bob, clock):
    store.add_questions(numbered(1))
    assert asked(store, ann, seconds=60) == "q00"
    assert asked(store, bob) is None
    clock.at += 60
    assert asked(store, bob, seconds=60) == "q00"
    assert asked(store, ann) is None
    late = say(store, ann, "q00")
    assert store.labels() == [late]
    assert asked(store, bob) is None  # nobody is asked what nobody wants to know any more
    say(store, bob, "q00", SECOND)
    assert [label.annotator for label in store.labels()] == ["ann", "bob"]
    assert store.progress() == Progress(1, 1, 1, 1)


def test_many_at_once_are_those_held_and_then_the_next(store, ann):
    store.add_questions(numbered(5))
    assert [lease.question.query_id for lease in store.lease_many(ann, 2)] == ["q00", "q01"]
    say(store, ann, "q00")
    assert [lease.question.query_id for lease in store.lease_many(ann, 3)] == ["q01", "q02", "q03"]
    for wrong in ({"count": 0}, {"count": 1, "seconds": 0}, {"count": 1, "gold_every": -1}):
        with pytest.raises(DataError, match="out of range"):
            store.lease_many(ann, **wrong)
    with pytest.raises(DataError, match="no annotator 99"):
        store.lease(99)


def test_a_skip_goes_to_someone_else_and_counts_for_nothing(store, ann, bob):
    store.add_questions(numbered(2))
    say(store, ann, asked(store, ann), SKIP)
    assert asked(store, ann) == "q01"
    assert store.progress() == Progress(2, 0, 2, 0)
    assert asked(store, bob) == "q00"
    say(store, bob, "q00")
    assert store.progress() == Progress(2, 1, 2, 1)
    assert [label.answer.skipped for label in store.labels()] == [True, False]


def test_a_correction_to_a_skip_asks_again(store, ann, bob):
    store.add_questions(numbered(1))
    say(store, ann, "q00")
    assert asked(store, bob) is None
    say(store, ann, "q00", SKIP)
    assert asked(store, bob) == "q00"


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_a_round_asked_again_keeps_its_labels_and_retires_what_is_gone(store, ann):
    store.add_questions(numbered(3))
    say(store, ann, "q01")
    assert asked(store, ann) == "q00"
    assert store.add_questions([question("new"), question("q01")]) == 1
    assert [q.query_id for q in store.questions()] == ["new", "q01"]
    assert {q.query_id for q in store.questions(retired=True)} == {"new", "q00", "q01", "q02"}
    assert work(store, ann) == ["new"]
    assert len(store.labels()) == 2
    assert store.progress() == Progress(2, 2, 2, 2)
    assert store.add_questions(numbered(3)) == 0
    assert work(store, ann) == ["q00", "q02"]


def test_rounds_stand_beside_each_other(store, ann):
    store.add_questions(numbered(2), round_number=0)
    store.add_questions([question("later"), question("q00")], round_number=1)
    assert [q.query_id for q in store.questions()] == ["q01", "later", "q00"]
    assert work(store, ann) == ["q01", "later", "q00"]
    assert store.progress().queries == 3


def test_a_changed_overlap_opens_and_closes(store, ann, bob):
    store.add_questions(numbered(2))
    work(store, ann)
    store.add_questions(numbered(2), overlap=2)
    assert store.progress() == Progress(2, 0, 4, 2)
    assert work(store, bob) == ["q00", "q01"]
    store.add_questions(numbered(2), overlap=1)
    assert store.progress() == Progress(2, 2, 2, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": (Message("user", "something else"),)}, "other messages"),
        ({"completions": ("text 3", "drawn anew")}, "other completions"),
        ({"completions": ("text 1", "text 3")}, "other completions"),
        ({"completion_ids": (3, 2)}, "other completions"),
        ({"kind": "ranking"}, "another kind"),
    ],
)
def test_other_texts_never_inherit_the_labels(store, ann, change, said):
    store.add_questions(numbered(2))
    label = say(store, ann, "q01")
    other = replace(question("q01"), **change)
    for call in (
        lambda: store.add_questions([question("q00"), other]),
        lambda: store.add_questions([question("new"), other], round_number=1),
        lambda: store.add_gold([(question("new"), FIRST, ""), (other, FIRST, "")]),
    ):
        one_line(DataError, call, "query 'q01' is in the store with", said, "use another store")
    assert store.questions() == numbered(2)
    assert store.labels() == [label]
    assert store.gold() == {}


def test_the_same_question_with_its_completions_in_another_order(store, ann):
    store.add_questions(numbered(1))
    label = say(store, ann, "q00")
    turned = replace(question("q00"), completion_ids=(1, 3), completions=("text 1", "text 3"))
    assert store.add_questions([turned], round_number=1) == 0
    # So that first and second mean what they did.
    assert store.questions() == [replace(question("q00"), round=1)]
    assert store.labels() == [label]
    one_line(DataError, lambda: store.add_gold([(turned, FIRST, "")]), "its completions in another order")


def test_questions_that_cannot_be_stored(store):
    with pytest.raises(DataError, match="overlap is 0"):
        store.add_questions(numbered(1), overlap=0)
    with pytest.raises(DataError, match="'q00' is there 2 times"):
        store.add_questions(numbered(1) * 2)
    for name in ("", "x" * 201, "a\0", "\ud800"):
        with pytest.raises(DataError, match="is no query_id"):
            store.add_questions([question("fine"), question(name)])
    with pytest.raises(DataError, match="no text"):
        store.add_questions([Question("q", "p\0", "rating", (), (0,), ("",))])
    assert store.questions() == []
    assert store.add_questions([]) == 0


# -- answers -----------------------------------------------------------------------------------------------------------


def test_an_answer_comes_back_as_it_went_in(store, ann, clock):
    store.add_questions([question("a"), question("b", "rating"), question("c", "ranking")])
    clock.at = 1234.5
    more = {"shown": (1, 3), "seconds": 2.5, "note": "é\n'", "flagged": True}
    label = say(store, ann, "a", TIE, **more)
    said = (label.query_id, label.annotator, label.annotator_kind, label.answer, label.created_at, label.supersedes)
    assert said == ("a", "ann", "person", TIE, 1234.5, None)
    assert (label.shown, label.seconds, label.note, label.flagged, label.adjudicated) == (
        (1, 3),
        2.5,
        "é\n'",
        True,
        False,
    )
    rating = say(store, ann, "b", Answer(rating=4, safe=False))
    ranking = say(store, ann, "c", Answer(ranks=(2, 1, 2)))
    assert store.labels() == [label, rating, ranking]
    assert store.labels(query_id="b") == [rating]
    assert store.labels(query_id="none") == store.labels(query_id="\0") == []


@pytest.mark.parametrize("answer", [FIRST, SKIP, Answer(rating=1), Answer(safe=True), Answer(ranks=(1, 2, 1))])
def test_answers_to_json_and_back(answer):
    assert answer_from_json(answer_to_json(answer)) == answer


def test_the_same_key_is_stored_once(store, ann, bob):
    store.add_questions(numbered(2), overlap=2)
    first = say(store, ann, "q00", key="k")
    assert say(store, ann, "q00", key="k", seconds=9.0) == first  # sent again, some time later
    say(store, ann, "q00", SECOND, key="k2")
    assert say(store, ann, "q00", key="k") == first  # a straggler
    assert len(store.labels(current=False)) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"query_id": "q01"},
        {"answer": SECOND},
        {"note": "and this"},
        {"flagged": True},
        {"adjudicated": True},
        {"shown": (1, 3)},
        {"shown": ()},
    ],
    ids=str,
)
def test_a_key_sent_again_with_anything_else_is_refused(store, ann, other):
    store.add_questions(numbered(2))
    said = {"who": ann, "query_id": "q00", "answer": FIRST, "key": "k", "note": "this", "shown": (3, 1)}
    first = say(store, **said)
    with pytest.raises(DataError, match="the key 'k' belongs to another answer: use a new key"):
        say(store, **said | other)
    assert store.labels(current=False) == [first]


def test_an_answer_and_the_next_question_come_together(store, ann):
    store.add_questions(numbered(2))
    first = store.lease(ann, gold_every=0)
    label, second = store.record_and_lease(ann, "q00", FIRST, key="k", shown=first.shown, note="this", gold_every=0)
    assert (label.shown, label.note) == (first.shown, "this")
    assert store.labels() == [label]
    assert second == store.lease(ann, gold_every=0)
    assert second.question.query_id == "q01"
    # Sent again, it is stored once, and the question that was given is given again.
    again = {"key": "k", "shown": first.shown, "note": "this", "gold_every": 0}
    assert store.record_and_lease(ann, "q00", FIRST, **again) == (label, second)
    assert store.record_and_lease(ann, "q01", SECOND, key="k2", gold_every=0)[1] is None


@pytest.mark.parametrize(
    "wrong",
    [{"query_id": "q09"}, {"answer": Answer(rating=3)}, {"gold_every": -1}, {"lease_seconds": 0.0}, {"shown": (1, 9)}],
    ids=str,
)
def test_an_answer_that_is_refused_brings_no_question(store, ann, wrong):
    store.add_questions(numbered(2))
    said = {"annotator_id": ann, "query_id": "q00", "answer": FIRST, "key": "k"}
    with pytest.raises(DataError):
        store.record_and_lease(**said | wrong)
    with store.reading() as connection:
        assert connection.execute(select(leases)).all() == []
    assert store.labels() == []


def test_nobody_takes_another_ones_key(store, ann, bob):
    store.add_questions(numbered(2), overlap=2)
    one, other = say(store, ann, "q00", key="k"), say(store, bob, "q01", SECOND, key="k")
    assert one.label_id != other.label_id
    assert [say(store, ann, "q00", key="k"), say(store, bob, "q01", SECOND, key="k")] == [one, other]
    assert store.labels(current=False) == [one, other]


def test_corrections_form_a_chain(store, ann, bob):
    store.add_questions(numbered(1), overlap=3)
    one = say(store, ann, "q00")
    other = say(store, bob, "q00")
    two = say(store, ann, "q00", SECOND)
    three = say(store, ann, "q00", SKIP)
    four = say(store, ann, "q00", TIE)
    chain = [one.supersedes, two.supersedes, three.supersedes, four.supersedes, other.supersedes]
    assert chain == [None, one.label_id, two.label_id, three.label_id, None]
    assert store.labels() == [other, four]
    assert store.labels(current=False) == [one, other, two, three, four]
    assert store.progress() == Progress(1, 0, 3, 2)


def test_undo_goes_back_label_by_label(store, ann, bob):
    store.add_questions(numbered(3), overlap=2)
    assert store.last_label(ann) is None
    said = [say(store, ann, f"q{i:02}") for i in range(3)]
    say(store, bob, "q00")
    assert store.last_label(ann) == said[2]
    assert store.last_label(ann, before=said[2].label_id) == said[1]
    corrected = say(store, ann, "q01", SECOND)
    assert store.last_label(ann) == corrected
    assert store.last_label(ann, before=corrected.label_id) == said[2]
    assert store.last_label(ann, before=said[2].label_id) == said[0]
    assert store.last_label(ann, before=said[0].label_id) is None
    assert store.last_label(ann, before=10**30) == corrected
    assert store.last_label(ann, before=-(10**30)) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"query_id": "x"}, "there is no query 'x'"),
        ({"query_id": "a\0"}, "there is no query"),
        ({"who": 99}, "there is no annotator 99"),
        ({"answer": Answer(rating=3)}, "it takes a choice"),
        ({"shown": (1, 2)}, "shows completions"),
        ({"seconds": float("nan")}, "cannot take nan seconds"),
        ({"seconds": -1.0}, "cannot take -1.0 seconds"),
        ({"key": ""}, "use 1 to 64 printable"),
        ({"key": "k" * 65}, "use 1 to 64 printable"),
        ({"key": "\0"}, "use 1 to 64 printable"),
        ({"note": "a\0b"}, "no text: leave it out"),
        ({"note": "\udc00"}, "no text: leave it out"),
    ],
)
def test_answers_that_cannot_be_stored(store, ann, more, message):
    store.add_questions([question("a")])
    values = {"who": ann, "query_id": "a", "answer": FIRST} | more
    with pytest.raises(DataError, match=message):
        say(store, **values)
    assert store.labels(current=False) == []


def test_a_lead_settles_a_query_that_she_did_not_lease(store, ann, bob):
    lead = store.annotator("lea", role="lead").annotator_id
    store.add_questions(numbered(2), overlap=3)
    say(store, ann, "q00")
    assert asked(store, bob) == "q00"
    label = say(store, lead, "q00", SECOND, adjudicated=True)
    assert label.adjudicated
    assert store.progress() == Progress(2, 1, 5, 2)  # closed with two answers; the other one wants three
    assert asked(store, bob) == "q01"
    say(store, lead, "q00", SKIP, adjudicated=True)  # taken back
    assert store.progress() == Progress(2, 0, 6, 1)


def test_what_a_lead_settles_stands_beside_what_she_said(store, ann):
    lead = store.annotator("lea", role="lead").annotator_id
    store.add_questions(numbered(2), overlap=3)
    theirs, blind = say(store, ann, "q00"), say(store, lead, "q00", TIE)
    settled = say(store, lead, "q00", SECOND, adjudicated=True)
    assert settled.supersedes is None
    assert store.labels() == [theirs, blind, settled]
    assert store.progress() == Progress(2, 1, 5, 2)  # she has answered once
    assert [store.last_label(lead), store.last_label(lead, before=settled.label_id)] == [blind, blind]
    again = say(store, lead, "q00", FIRST, adjudicated=True)
    corrected = say(store, lead, "q00", SECOND)
    assert (again.supersedes, corrected.supersedes) == (settled.label_id, blind.label_id)
    assert store.labels() == [theirs, again, corrected]
    assert store.last_label(lead) == corrected
    assert work(store, lead) == ["q01"]
    say(store, lead, "q00", SKIP, adjudicated=True)  # taken back: her answer remains
    assert store.progress() == Progress(2, 0, 6, 3)


def test_a_lead_who_only_settles_has_nothing_to_undo_and_is_asked_no_more(store, ann):
    lead = store.annotator("lea", role="lead").annotator_id
    store.add_questions(numbered(1), overlap=3)
    say(store, lead, "q00", adjudicated=True)
    assert store.last_label(lead) is None
    say(store, lead, "q00", SKIP, adjudicated=True)
    assert store.progress() == Progress(1, 0, 3, 0)
    assert asked(store, lead) is None
    assert asked(store, ann) == "q00"


def test_a_lead_who_answers_and_settles_is_one_of_those_wanted(store, ann, bob):
    lead = store.annotator("lea", role="lead").annotator_id
    store.add_questions(numbered(1), overlap=2)
    say(store, lead, "q00", adjudicated=True)
    say(store, lead, "q00")
    say(store, lead, "q00", SKIP, adjudicated=True)
    assert store.progress() == Progress(1, 0, 2, 1)
    assert work(store, ann) == ["q00"]
    assert asked(store, bob) is None


@pytest.mark.parametrize("method", ["majority", "dawid_skene"])
def test_agreement_keeps_what_a_lead_said_blind_and_the_settlement_outweighs_it(store, ann, bob, method):
    lead = store.annotator("lea", role="lead").annotator_id
    store.add_questions(numbered(8), overlap=3)
    for who in (ann, bob, lead):
        work(store, who)
    say(store, bob, "q00", SECOND)
    say(store, lead, "q00", SECOND, adjudicated=True)
    given, asked_about = store.labels(), {q.query_id: q for q in store.questions()}
    counted = [(label.annotator, label.answer) for label in independent(given, ()) if label.query_id == "q00"]
    assert counted == [("ann", FIRST), ("lea", FIRST), ("bob", SECOND)]
    found = aggregate(given, asked_about, {}, method=method)
    preferred = {pair.prompt_id: (pair.chosen_id, pair.rejected_id) for pair in found.pairs}
    assert preferred == {f"p-q{i:02}": (3, 1) if i else (1, 3) for i in range(8)}


# -- gold questions and checks -----------------------------------------------------------------------------------------


def test_gold_questions_are_mixed_in_once_for_everyone(store, ann, bob):
    store.add_questions(numbered(40), overlap=2)
    gold = [(question(f"g{i}"), FIRST, "because") for i in range(5)]
    assert store.add_gold(gold) == 5
    assert store.gold() == {f"g{i}": FIRST for i in range(5)}
    for who in (ann, bob):
        seen = work(store, who, gold_every=4)
        assert len(seen) == len(set(seen)) == 45
        for block in range(5):
            assert sum(name.startswith("g") for name in seen[4 * block : 4 * block + 4]) == 1
    assert store.progress() == Progress(40, 40, 80, 80)


def test_no_gold_where_nothing_else_is_left_or_none_is_wanted(store, ann):
    store.add_gold([(question("g"), FIRST, "")])
    assert store.lease(ann, gold_every=1) is None
    store.add_questions(numbered(2))
    assert asked(store, ann, gold_every=0) == "q00"
    assert [lease.question.query_id for lease in store.lease_many(ann, 5)] == ["q00", "q01"]
    say(store, ann, "q00")
    say(store, ann, "q01")
    assert store.lease(ann, gold_every=1) is None


def test_the_place_of_a_gold_question_differs_from_person_to_person_and_not_from_call_to_call(store):
    store.add_questions(numbered(12), overlap=12)
    store.add_gold([(question("g"), FIRST, "")])
    places = set()
    for i in range(12):
        who = store.annotator(f"person {i}").annotator_id
        for place in range(6):
            name = asked(store, who, gold_every=6)
            assert asked(store, who, gold_every=6) == name
            say(store, who, name)
            places |= {place} if name == "g" else set()
    assert len(places) > 2


def test_a_question_becomes_gold_and_stays_it(store, ann):
    store.add_questions(numbered(3))
    say(store, ann, "q00")
    assert store.add_gold([(question("q00"), FIRST, "")]) == 1
    assert store.add_gold([(question("q00"), SECOND, "a better reason")]) == 0
    assert store.gold() == {"q00": SECOND}
    assert store.progress() == Progress(2, 0, 2, 0)
    store.add_questions(numbered(3))
    assert store.progress().queries == 2
    assert work(store, ann, gold_every=1) == ["q01", "q02"]


def test_gold_that_cannot_be_stored(store):
    for wrong, message in (
        ((SKIP, ""), "has no answer"),
        ((Answer(rating=2), ""), "takes a choice"),
        ((TIE, "\0"), "text"),
    ):
        with pytest.raises(DataError, match=message):
            store.add_gold([(question("fine"), FIRST, ""), (question("g"), *wrong)])
    assert store.gold() == {}


def test_people_check_a_sample_of_what_a_judge_said(store, ann, bob):
    judge = store.annotator("judge", "judge").annotator_id
    other = store.annotator("other judge", "judge").annotator_id
    store.add_questions(numbered(20))
    for lease in store.lease_many(judge, 20):
        say(store, judge, lease.question.query_id)
    assert store.check_sample("judge", 6, seed=1) == 6
    assert store.progress() == Progress(20, 14, 26, 20)
    assert store.lease_many(other, 20) == []
    seen = work(store, ann)
    assert len(set(seen)) == 6
    assert work(store, bob) == []
    assert store.progress() == Progress(20, 20, 26, 26)
    assert store.check_sample("judge", 6, seed=2) == 0  # six were checked
    assert work(store, bob) == []
    assert store.check_sample("judge", 100) == 14
    assert not set(work(store, bob)) & set(seen)
    assert store.check_sample("judge", 100) == 0
    with pytest.raises(DataError, match="there is no annotator 'x'"):
        store.check_sample("x", 1)
    with pytest.raises(DataError, match="there is no annotator"):
        store.check_sample("\ud800", 1)
    with pytest.raises(DataError, match="a sample of -1"):
        store.check_sample("judge", -1)


def judged(store, count):
    """A judge has answered so many queries."""
    judge = store.annotator("judge", "judge").annotator_id
    store.add_questions(numbered(count))
    for lease in store.lease_many(judge, count):
        say(store, judge, lease.question.query_id)


def test_a_sample_drawn_again_is_no_larger(store, ann):
    judged(store, 20)
    assert store.check_sample("judge", 6, seed=1) == 6
    say(store, ann, asked(store, ann))
    for size, seed, still in ((6, 1, 5), (6, 2, 5), (3, 1, 5), (0, 0, 5), (8, 1, 7), (8, 1, 7)):
        assert store.check_sample("judge", size, seed) == still
    assert len(work(store, ann)) == 7
    assert store.check_sample("judge", 8, seed=3) == 0
    assert store.progress() == Progress(20, 20, 28, 28)


def test_what_one_judge_is_checked_on_is_no_part_of_the_sample_of_another(store, ann):
    judged(store, 4)
    other = store.annotator("other judge", "judge").annotator_id
    store.add_questions([question("more 1"), question("more 2")], round_number=1)
    for lease in store.lease_many(other, 2):
        say(store, other, lease.question.query_id)
    assert store.check_sample("judge", 2) == 2
    assert store.check_sample("other judge", 2) == 2
    assert len(work(store, ann)) == 4


@pytest.mark.parametrize("overlap", [None, 1, 2, 3])
def test_an_overlap_never_takes_checks_from_people(store, ann, bob, overlap):
    judged(store, 3)
    assert store.check_sample("judge", 2) == 2
    store.add_questions(numbered(3), overlap=overlap)
    with store.reading() as connection:
        rows = connection.execute(select(queries).where(queries.c.people_only)).all()
    assert [(row.overlap, row.closed_at) for row in rows] == [(max(2, overlap or 0), None)] * 2
    assert set(work(store, ann)) >= {row.query_id for row in rows}
    store.add_questions(numbered(3), overlap=overlap)
    assert (asked(store, bob) is None) == (overlap != 3)


def test_a_query_with_more_answers_than_wanted_can_be_checked(store, ann, bob, clock):
    judge = store.annotator("judge", "judge").annotator_id
    store.add_questions(numbered(1))
    say(store, judge, "q00")
    say(store, ann, "q00")
    assert store.check_sample("judge", 1) == 1
    assert work(store, bob) == ["q00"]
    assert store.progress() == Progress(1, 1, 3, 3)


# -- annotators and the audit trail ------------------------------------------------------------------------------------


def test_annotators_are_known_by_name_and_kind(store):
    ann = store.annotator("ann")
    lea = store.annotator("lea", role="lead")
    judge = store.annotator("a judge", "judge")
    assert ann == Person(ann.annotator_id, "ann", "person", "annotator")
    assert store.annotator("lea") == lea
    assert store.annotators() == [ann, lea, judge]
    with pytest.raises(DataError, match="'a judge' is a judge, not a person: use another name"):
        store.annotator("a judge")
    for name in ("", " ", "x" * 201, "a\nb", "\0", "\ud800", "ann ", " ann", "\xa0ann", "ann\u3000"):
        with pytest.raises(DataError, match="is no annotator's name: use 1 to 200 .*, no blank at either end"):
            store.annotator(name)
    with pytest.raises(DataError, match="unknown role 'boss': use annotator or lead"):
        store.annotator("eve", role="boss")
    assert store.annotators() == [ann, lea, judge]


def actions(store):
    with store.reading() as connection:
        rows = connection.execute(select(events).order_by(events.c.event_id)).all()
    return [(row.action, row.annotator_id, row.details) for row in rows]


def test_a_person_takes_over_the_labels_that_were_imported(store, ann):
    store.add_questions(numbered(2), overlap=2)
    cyd = store.annotator("cyd", "import")
    say(store, cyd.annotator_id, "q00")
    with pytest.raises(DataError, match="'cyd' is an import, not a judge: use another name"):
        store.annotator("cyd", "judge")
    assert store.annotator("cyd", "import") == cyd
    person = store.annotator("cyd", role="lead")
    assert person == Person(cyd.annotator_id, "cyd", "person", "lead")
    assert person in store.annotators()
    assert store.annotator("cyd") == person
    happened = ("taken over", cyd.annotator_id, {"name": "cyd", "kind": "person", "role": "lead"})
    assert actions(store).count(happened) == 1
    assert [(label.annotator, label.annotator_kind) for label in store.labels()] == [("cyd", "person")]
    assert work(store, cyd.annotator_id) == ["q01"]
    with pytest.raises(DataError, match="'cyd' is a person, not an import"):
        store.annotator("cyd", "import")


def test_a_person_is_invited_after_an_import(store):
    imported = store.annotator("cyd", "import")
    token = invite(store, "cyd", "lead")
    assert person_of_token(store, token) == Person(imported.annotator_id, "cyd", "person", "lead")


def test_a_role_changes(store, ann, bob):
    before = store.annotator("ann")
    lead = store.set_role("ann", "lead")
    assert lead == replace(before, role="lead")
    assert store.set_role("ann", "lead") == lead == store.annotator("ann")
    assert store.annotator("bob").role == "annotator"
    assert store.set_role("ann", "annotator") == before
    assert actions(store)[-2:] == [("role", ann, {"role": "lead"}), ("role", ann, {"role": "annotator"})]
    for name in ("nobody", "\ud800", "\0"):
        one_line(DataError, lambda name=name: store.set_role(name, "lead"), "there is no annotator")
    one_line(DataError, lambda: store.set_role("ann", "boss"), "unknown role 'boss': use annotator or lead")


@pytest.mark.parametrize("name", ["\ud800", "a\0"])
def test_access_for_a_name_that_is_no_text(store, name):
    one_line(DataError, lambda: invite(store, name), "is no annotator's name")
    one_line(DataError, lambda: revoke_tokens(store, name), "there is no annotator")


def test_the_audit_trail_names_every_label_once(store, ann, bob):
    store.add_questions(numbered(2), overlap=2)
    for who in (ann, bob):
        for answer in (FIRST, SECOND):
            say(store, who, "q00", answer, key=f"{who}{answer.choice}")
            say(store, who, "q00", answer, key=f"{who}{answer.choice}")
    with store.reading() as connection:
        rows = connection.execute(select(events).order_by(events.c.event_id)).all()
    said = [row.details["label_id"] for row in rows if row.action == "label"]
    assert said == [label.label_id for label in store.labels(current=False)]
    assert Counter(row.action for row in rows) == {"opened": 1, "annotator": 2, "questions": 1, "label": 4}


@pytest.mark.parametrize("table", [labels, events], ids=str)
def test_the_database_itself_refuses_to_change_a_label(store, ann, table):
    store.add_questions(numbered(1))
    say(store, ann, "q00")
    column = {"labels": "note", "events": "action"}[table.name]
    for change in (update(table).values({column: "changed"}), delete(table)):
        with pytest.raises(StoreError, match=f"{table} are never changed or deleted"), store.writing() as connection:
            connection.execute(change)
    sweeping = (
        f"TRUNCATE {table} CASCADE"
        if store.engine.dialect.name == "postgresql"
        else f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}"  # noqa: S608
    )
    with pytest.raises(StoreError, match=f"{table} are never changed"), store.writing() as connection:
        connection.exec_driver_sql(sweeping)
    assert [label.note for label in store.labels()] == [""]


def test_the_database_itself_refuses_what_must_not_be(store, ann):
    store.add_questions(numbered(1))
    label = say(store, ann, "q00")
    say(store, ann, "q00", SECOND, key="taken")
    row = {"query_id": "q00", "annotator_id": ann, "answer": {}, "skipped": True, "shown": [], "created_at": 1.0}
    wrongs = [{"supersedes": label.label_id}, {"supersedes": None}, {"query_id": "x"}, {"annotator_id": 99}]
    for wrong in (*wrongs, {"key": "taken", "adjudicated": True}):
        with pytest.raises(StoreError), store.writing() as connection:
            connection.execute(insert(labels).values(row | {"key": "other"} | wrong))
    assert len(store.labels(current=False)) == 2


def test_what_fails_in_a_block_leaves_nothing(store):
    def fail():
        with store.writing() as connection:
            store.log(connection, "half", None)
            raise DataError("stop")

    with pytest.raises(DataError, match="^stop$"):
        fail()
    with store.reading() as connection:
        assert "half" not in connection.scalars(select(events.c.action)).all()


def test_a_reader_sees_one_moment(store, ann):
    store.add_questions(numbered(1))
    with store.reading() as connection:
        before = connection.scalar(select(func.count()).select_from(labels))
        say(store, ann, "q00")
        assert connection.scalar(select(func.count()).select_from(labels)) == before == 0


def test_sqlite_is_durable(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as store, store.reading() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys")
        assert [connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in pragmas] == ["wal", 2, 1]


# -- speed -------------------------------------------------------------------------------------------------------------


def test_no_call_that_an_annotator_waits_for_scans_a_table(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as store:
        who = store.annotator("ann").annotator_id
        store.add_questions(numbered(5), overlap=2)
        seen = set()
        event.listen(store.engine, "before_cursor_execute", lambda _c, _k, sql, values, _x, _m: seen.add((sql, values)))
        for _ in range(2):
            lease = store.lease(who, gold_every=1)
            store.lease(who)
            say(store, who, lease.question.query_id)
            store.last_label(who)
            store.last_label(who, before=5)
            store.question("q00")
            store.labels(query_id="q00")
        store.lease_many(store.annotator("j", "judge").annotator_id, 2)
        found = list(seen)
        with store.reading() as connection:
            for sql, values in found:
                if sql.startswith(("SELECT", "UPDATE")):
                    plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values)]
                    assert not [step for step in plan if step.startswith("SCAN")], sql
        assert len(found) > 12


# -- many at once ------------------------------------------------------------------------------------------------------


def test_many_people_at_once_lose_nothing_and_double_nothing(store, where, clock):
    people = [store.annotator(f"person {i}").annotator_id for i in range(8)]
    store.add_questions(numbered(25), overlap=3)
    start = threading.Barrier(len(people))

    # Two stores of one database: as two processes are, they are strangers to each other.
    with Store.open(where, "run", clock) as other, ThreadPoolExecutor(len(people)) as pool:

        def one(who):
            start.wait()
            return work((store, other)[who % 2], who)

        seen = list(pool.map(one, people))
    assert all(len(names) == len(set(names)) for names in seen)
    assert Counter(name for names in seen for name in names) == {f"q{i:02}": 3 for i in range(25)}
    assert store.progress() == Progress(25, 25, 75, 75)
    with store.reading() as connection:
        given = connection.execute(select(leases.c.query_id, func.count()).group_by(leases.c.query_id)).all()
    assert {count for _, count in given} == {3}  # nothing was given to more people than wanted


def test_the_last_place_is_given_once(store):
    people = [store.annotator(f"person {i}").annotator_id for i in range(8)]
    for turn in range(5):
        store.add_questions([question(f"turn {turn}")], round_number=turn)
        start = threading.Barrier(len(people))

        def one(who, start=start):
            start.wait()
            return asked(store, who)

        with ThreadPoolExecutor(len(people)) as pool:
            given = [name for name in pool.map(one, people) if name is not None]
        assert given == [f"turn {turn}"]
        say(store, people[0], given[0])


def test_one_key_in_many_threads_is_one_label(store, ann):
    store.add_questions(numbered(5))
    for turn in range(5):
        start = threading.Barrier(6)

        def one(_, turn=turn, start=start):
            start.wait()
            return store.record(ann, f"q{turn:02}", FIRST, key=f"turn {turn}")

        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(one, range(6)))) == 1
    assert len(store.labels(current=False)) == 5


def test_one_key_for_two_queries_at_once_is_taken_by_one(store, ann):
    store.add_questions(numbered(10))
    for turn in range(5):
        start = threading.Barrier(2)

        def one(name, turn=turn, start=start):
            start.wait()
            try:
                return store.record(ann, name, FIRST, key=f"turn {turn}").query_id
            except DataError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            said = sorted(pool.map(one, [f"q{2 * turn:02}", f"q{2 * turn + 1:02}"]))
        assert said[0].startswith("q")
        assert said[1] == f"the key 'turn {turn}' belongs to another answer: use a new key for each"


def test_corrections_at_once_still_form_one_chain(store, ann, bob):
    store.add_questions(numbered(1), overlap=2)
    start = threading.Barrier(8)

    def one(i):
        start.wait()
        return say(store, (ann, bob)[i % 2], "q00", (FIRST, SECOND)[i % 2], key=f"k{i}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    for name in ("ann", "bob"):
        chain = [label for label in store.labels(current=False) if label.annotator == name]
        assert [label.supersedes for label in chain] == [None, *[label.label_id for label in chain[:-1]]]
    assert len(store.labels()) == 2
    assert store.progress() == Progress(1, 1, 2, 2)


def run_python(code, *arguments):
    """A process of its own that runs some code."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_processes_open_a_fresh_database_at_once(where):
    code = """
        import sys
        from dissonance.feedback.store import Store
        print("ready", flush=True)
        sys.stdin.readline()
        with Store.open(sys.argv[1], "run") as store:
            store.annotator(sys.argv[2])
            store.annotator("the same for all")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(where)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, f"process {i}"], **pipes) for i in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 4
    with Store.open(where, "run") as store:
        assert {p.name for p in store.annotators()} == {"the same for all", *(f"process {i}" for i in range(4))}


def test_every_answer_acknowledged_before_kill_9_is_there_once(where):
    code = """
        import sys, uuid
        from dissonance.feedback.store import Store
        from dissonance.records import Answer
        store = Store.open(sys.argv[1], "run")
        ann = store.annotator("ann").annotator_id
        while True:
            lease = store.lease(ann)
            key = uuid.uuid4().hex
            store.record(ann, lease.question.query_id, Answer("first"), key=key, shown=lease.shown)
            print(key, flush=True)
    """
    rng = random.Random(0)
    with Store.open(where, "run") as store:
        store.add_questions([question(f"q{i:04}") for i in range(4000)])
    acknowledged = []
    for _ in range(3):
        process = run_python(code, where)
        acknowledged += [process.stdout.readline().strip() for _ in range(rng.randint(1, 40))]
        threading.Event().wait(rng.random() / 50)  # anywhere between two answers
        process.kill()
        acknowledged += process.stdout.read().split()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    with Store.open(where, "run") as store:
        with store.reading() as connection:
            stored = connection.scalars(select(labels.c.key)).all()
            answered = connection.scalars(select(labels.c.query_id)).all()
        assert len(stored) == len(set(stored)) == len(set(answered))
        assert set(acknowledged) <= set(stored)
        assert len(stored) - len(acknowledged) <= 3  # stored, and killed before it could say so
        assert store.progress().closed == len(stored)


# -- against a model ---------------------------------------------------------------------------------------------------


class Asking(RuleBasedStateMachine):
    """People lease, answer, skip, correct, settle and let time pass; a plain model says what must come of it."""

    PEOPLE, QUERIES, LEASE = 3, 4, 100.0
    who = st.integers(0, PEOPLE - 1)
    what = st.integers(0, QUERIES - 1)
    said = st.sampled_from([FIRST, SECOND, TIE, SKIP])

    def __init__(self, where):
        super().__init__()
        self.clock = Clock()
        self.store = Store.open(where, "run", self.clock)
        self.people = [self.store.annotator(f"person {i}").annotator_id for i in range(self.PEOPLE)]
        self.names = [f"q{i}" for i in range(self.QUERIES)]
        self.labels = []
        """(person, query, answer, adjudicated, key), as they came."""
        self.leases = {}
        """(person, query) -> given, until"""

    def teardown(self):
        self.store.close()

    @initialize(overlap=st.integers(1, 3))
    def ask(self, overlap):
        self.overlap = overlap
        self.store.add_questions([question(name) for name in self.names], overlap=overlap)

    def current(self):
        return {(person, query, settled): answer for person, query, answer, settled, _ in self.labels}

    def answers(self, query):
        return len({p for (p, q, _), answer in self.current().items() if q == query and not answer.skipped})

    def is_closed(self, query):
        settled = any(s and q == query and not answer.skipped for (_, q, s), answer in self.current().items())
        return settled or self.answers(query) >= self.overlap

    def live(self, query):
        return [p for (p, q), (_, until) in self.leases.items() if q == query and until > self.clock.at]

    def expected(self, person):
        seen = {q for p, q, _ in self.current() if p == person}
        free = [q for q in range(self.QUERIES) if not self.is_closed(q) and q not in seen]
        held = [(self.leases[person, q][0], q) for q in free if person in self.live(q)]
        if held:
            return min(held)[1]
        room = [q for q in free if self.answers(q) + len(self.live(q)) < self.overlap]
        return min(room, default=None)

    @rule(person=who)
    def lease(self, person):
        expected = self.expected(person)
        lease = self.store.lease(self.people[person], seconds=self.LEASE)
        assert (lease and lease.question.query_id) == (None if expected is None else self.names[expected])
        if lease is not None:
            held = person in self.live(expected)
            given = self.leases[person, expected][0] if held else self.clock.at
            assert (lease.given_at, lease.expires_at) == (given, self.clock.at + self.LEASE)
            self.leases[person, expected] = (given, self.clock.at + self.LEASE)

    def record(self, person, query, answer, *, settled=False):
        key = next(keys)
        label = self.store.record(self.people[person], self.names[query], answer, key=key, adjudicated=settled)
        assert (label.answer, label.adjudicated) == (answer, settled)
        self.labels.append((person, query, answer, settled, key))
        self.leases.pop((person, query), None)

    @rule(person=who, answer=said)
    def answer_what_is_held(self, person, answer):
        held = [q for (p, q) in self.leases if p == person]
        if held:
            self.record(person, held[0], answer)

    @rule(person=who, query=what, answer=said)
    def answer_or_correct_anything(self, person, query, answer):
        self.record(person, query, answer)

    @rule(person=who, query=what, answer=said)
    def settle(self, person, query, answer):
        self.record(person, query, answer, settled=True)

    @rule(pick=st.randoms(use_true_random=False))
    def send_again(self, pick):
        if self.labels:
            person, query, answer, settled, key = pick.choice(self.labels)
            again = self.store.record(self.people[person], self.names[query], answer, key=key, adjudicated=settled)
            assert (again.answer, again.adjudicated) == (answer, settled)

    @rule(seconds=st.sampled_from([1.0, 60.0, 100.0]))
    def time_passes(self, seconds):
        self.clock.at += seconds

    @invariant()
    def every_label_is_there(self):
        stored = [(label.annotator, label.query_id, label.answer) for label in self.store.labels(current=False)]
        assert stored == [(f"person {p}", self.names[q], answer) for p, q, answer, _, _ in self.labels]
        current = sorted((label.annotator, label.query_id, str(label.answer)) for label in self.store.labels())
        expected = [(f"person {p}", self.names[q], str(answer)) for (p, q, _), answer in self.current().items()]
        assert current == sorted(expected)

    @invariant()
    def progress_is_right(self):
        if not hasattr(self, "overlap"):
            return
        had = [min(self.answers(q), self.overlap) for q in range(self.QUERIES)]
        closed = [self.is_closed(q) for q in range(self.QUERIES)]
        wanted = sum(h if c else self.overlap for h, c in zip(had, closed, strict=True))
        assert self.store.progress() == Progress(self.QUERIES, sum(closed), wanted, sum(had))


RULES = {"stateful_step_count": 25, "suppress_health_check": list(HealthCheck)}


def test_sqlite_does_as_the_model_says(tmp_path):
    Store.open(tmp_path / "empty.db", "run").close()
    numbers = itertools.count()

    def start():
        return Asking(shutil.copy(tmp_path / "empty.db", tmp_path / f"{next(numbers)}.db"))

    run_state_machine_as_test(start, settings=settings(max_examples=20, **RULES))


def test_postgresql_does_as_the_model_says(make_postgres_url):
    run_state_machine_as_test(lambda: Asking(make_postgres_url()), settings=settings(max_examples=6, **RULES))


# -- migrations --------------------------------------------------------------------------------------------------------


def other_database(request, where, tmp_path):
    if isinstance(where, Path):
        return create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    return create_engine(request.getfixturevalue("make_postgres_url")())


def described(index):
    options = {name: str(value) for name, value in index["dialect_options"].items()}
    return index["name"], bool(index["unique"]), str(index["column_names"]), str(sorted(options.items()))


def constraints(engine):
    found = inspect(engine)
    names = [name for name in found.get_table_names() if name != "dissonance_version"]
    return {
        name: (
            sorted((c["name"], c["sqltext"]) for c in found.get_check_constraints(name)),
            sorted(described(index) for index in found.get_indexes(name)),
            sorted(u["name"] for u in found.get_unique_constraints(name)),
            sorted((f["name"], f["constrained_columns"], f["referred_table"]) for f in found.get_foreign_keys(name)),
            found.get_pk_constraint(name)["name"],
        )
        for name in names
    }


def test_the_revisions_make_what_the_schema_says(request, store, where, tmp_path):
    with store.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True, "version_table": "dissonance_version"}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    other = other_database(request, where, tmp_path)
    metadata.create_all(other)
    assert constraints(store.engine) == constraints(other)
    other.dispose()


def test_an_older_store_is_upgraded_and_a_newer_one_refused(where, tmp_path, monkeypatch):
    with Store.open(where, "run") as store:
        store.add_questions(numbered(1))
        label = say(store, store.annotator("ann").annotator_id, "q00")
    newer = shutil.copytree(database.MIGRATIONS, tmp_path / "migrations 100%")
    (newer / "versions" / "0002_more.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision = '0002'\ndown_revision = '0001'\n"
        "def upgrade():\n    op.add_column('about', sa.Column('more', sa.Text()))\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", newer)
        with Store.open(where, "run") as store:
            assert store.labels() == [label]
            assert "more" in [column["name"] for column in inspect(store.engine).get_columns("about")]
    one_line(StoreError, lambda: Store.open(where, "run"), "was made by a newer version of dissonance: upgrade")


def test_a_database_of_something_else_is_left_alone(request, where, tmp_path):
    url = f"sqlite:///{where}" if isinstance(where, Path) else where
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE recipes (name TEXT)"))
    one_line(StoreError, lambda: Store.open(where, "run"), "holds other tables, such as recipes: name another database")
    assert inspect(engine).get_table_names() == ["recipes"]
    engine.dispose()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def one_line(kind, call, *words):
    """The call fails with one line that says all this."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return caught.value


def test_a_store_belongs_to_one_run(store, where):
    one_line(StoreError, lambda: Store.open(where, "another"), "holds another run's labels: name another database")
    Store.open(where, "run").close()


def test_what_is_no_store(tmp_path):
    junk = tmp_path / "junk.db"
    junk.write_text("these are not the labels you are looking for " * 100)
    one_line(StoreError, lambda: Store.open(junk, "run"), str(junk), "not a database", "name another")
    for path in (tmp_path, tmp_path / "no" / "labels.db"):
        one_line(StoreError, lambda path=path: Store.open(path, "run"), str(path), "is the folder there, and writable?")
    assert junk.read_text().startswith("these")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "name a file"),
        (":memory:", "name a file"),
        ("sqlite://", "SQLite files or postgresql:// databases"),
        ("mysql://u:hunter2@host/db", "SQLite files or postgresql:// databases"),
        ("nonsense://u:hunter2@host/db", "SQLite files or postgresql:// databases"),
        ("postgresql://u:hunter2@host:port/db", "no database URL: write postgresql://user@host/database"),
        ("postgresql://u:hunter2@[::1/db", "no database URL"),
        ("sqlite:////tmp/x.db?hunter=2", "only with uri=true"),
        ("postgresql://u:hunter2@127.0.0.1:1/db?nonsense=1", "nonsense"),
        ("postgresql://u:hunter2@127.0.0.1:1/db", "is the server running, and the address right?"),
        ("postgresql://u:p@hunter2/hunter2@127.0.0.1:1/db", "write an @ in a user name or password as %40"),
        ("postgresql://u@127.0.0.1:1/db?password=hunter2", "127.0.0.1"),
        ("postgres://u:hunter2@/db?host=/nowhere/at/all", "is the server running, and the address right?"),
        ("postgresql://u:hunter2@no.such.host.invalid/db", "postgresql://no.such.host.invalid/db"),
    ],
)
def test_wrong_addresses_are_told_without_the_password(url, words):
    error = one_line(StoreError, lambda: Store.open(url, "run", busy_seconds=2), words)
    assert "hunter2" not in "".join(traceback.format_exception(error))


def test_a_store_never_shows_the_password(postgres_url, caplog):
    url = postgres_url.replace("postgres:@", "postgres:hunter2@")
    caplog.set_level("DEBUG")
    with Store.open(url, "run") as store:
        with pytest.raises(StoreError) as caught, store.writing() as connection:
            connection.exec_driver_sql("SELECT * FROM nothing")
        shown = "".join(traceback.format_exception(caught.value)) + caplog.text + repr(vars(store)) + repr(store.engine)
    assert "hunter2" not in shown


def test_the_driver_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    one_line(StoreError, lambda: Store.open("postgresql://h/db", "run"), "pip install 'dissonance[postgres]'")


def test_a_database_that_is_not_there(postgres_server):
    url = postgres_server.replace("/postgres?", "/nothing?")
    one_line(StoreError, lambda: Store.open(url, "run"), 'database "nothing" does not exist', "create it first")


def test_another_process_holds_the_database_for_too_long(where):
    with Store.open(where, "run", busy_seconds=0.2) as store:
        with store.engine.connect() as connection:
            told = "PRAGMA busy_timeout" if isinstance(where, Path) else "SHOW lock_timeout"
            assert connection.scalar(text(told)) in {200, "200ms"}
        ann = store.annotator("ann").annotator_id
        store.add_questions(numbered(2))
        say(store, ann, "q00")
        if isinstance(where, Path):
            holder = sqlite3.connect(where, isolation_level=None)
            holder.execute("BEGIN IMMEDIATE")
        else:
            holder = psycopg.connect(where)
            holder.execute("LOCK TABLE labels; SELECT pg_advisory_xact_lock(7246)")
        for call in (lambda: say(store, ann, "q01", key="k"), lambda: store.lease(ann)):
            one_line(StoreError, call, "another process holds it for too long: stop that one, or try again")
        holder.rollback()
        holder.close()
        say(store, ann, "q01", key="k")
        assert len(store.labels()) == 2


def test_threads_do_not_wait_for_ever_for_their_turn(tmp_path):
    with Store.open(tmp_path / "labels.db", "run", busy_seconds=0.1) as store, store.writing():
        with ThreadPoolExecutor(1) as pool:
            error = pool.submit(store.annotator, "ann").exception()
        assert isinstance(error, StoreError)
        assert str(error).endswith("others are writing for too long: try again")


def test_a_full_disk_loses_nothing_that_was_acknowledged(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as store:
        ann = store.annotator("ann").annotator_id
        store.add_questions(numbered(50))
        limit = {"pages": 0}
        # The very error that a full disk gives, at a size of our choosing.
        event.listen(store.engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={limit['pages']}"))
        with store.reading() as connection:
            limit["pages"] = connection.exec_driver_sql("PRAGMA page_count").scalar() + 3
        store.engine.dispose()
        kept = []

        def fill():
            while True:
                kept.append(say(store, ann, f"q{len(kept):02}", note="x" * 2000))

        one_line(StoreError, fill, "is full", "make room and try again; every answer that was acknowledged is safe")
        assert 0 < len(kept) < 50
        assert store.labels() == kept
        limit["pages"] = 1 << 30
        store.engine.dispose()
        kept.append(say(store, ann, f"q{len(kept):02}", note="x" * 2000))
        assert store.labels() == kept


def test_a_read_only_file(tmp_path):
    path = tmp_path / "labels.db"
    with Store.open(path, "run") as store:
        ann = store.annotator("ann").annotator_id
        store.add_questions(numbered(1))
        say(store, ann, "q00")
        # As root, the modes of files forbid nothing; opened read-only, SQLite gives the same error.
        with Store.open(f"sqlite:///file:{path}?mode=ro&uri=true", "run") as reader:
            assert reader.labels() == store.labels()
            one_line(
                StoreError, lambda: say(reader, ann, "q00", TIE), "readonly", "make the file and its folder writable"
            )
        assert say(store, ann, "q00", SECOND).supersedes is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="the modes of files forbid root nothing")
def test_a_folder_without_the_right_to_write(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    one_line(StoreError, lambda: Store.open(folder / "labels.db", "run"), "writable")


def test_a_read_only_server(postgres_url):
    with Store.open(postgres_url, "run") as store, psycopg.connect(postgres_url, autocommit=True) as admin:
        ann = store.annotator("ann").annotator_id
        store.add_questions(numbered(1))

        def switch(to):
            admin.execute("SET default_transaction_read_only = off")
            admin.execute(f"ALTER DATABASE {admin.info.dbname} SET default_transaction_read_only = {to}")
            drop_connections(admin)

        switch("on")
        one_line(StoreError, lambda: say(store, ann, "q00", key="k"), "read-only", "make it writable")
        switch("off")
        say(store, ann, "q00", key="k")
        assert len(store.labels()) == 1


def drop_connections(admin):
    admin.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )


def test_a_server_that_went_away_and_came_back(postgres_url):
    with Store.open(postgres_url, "run") as store, psycopg.connect(postgres_url, autocommit=True) as admin:
        ann = store.annotator("ann").annotator_id
        store.add_questions(numbered(2))

        def interrupted():
            with store.writing() as connection:
                store.log(connection, "half", None)
                drop_connections(admin)
                store.log(connection, "other half", None)

        one_line(StoreError, interrupted, "the server went away: try again")
        say(store, ann, "q00")
        drop_connections(admin)
        say(store, ann, "q01")
        assert store.progress().closed == 2


def test_errors_of_the_database_carry_no_values(store):
    with pytest.raises(StoreError) as caught, store.writing() as connection:
        connection.execute(insert(queries).values(query_id="the secret", round=None))
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert "the secret" not in str(caught.value)
