"""The run over any annotator, gold rewards and simulated people, on real stores."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from dissonance.errors import DataError, SettingsError, StoreError
from dissonance.feedback.annotators import run
from dissonance.feedback.annotators.budget import BudgetSpentError
from dissonance.feedback.annotators.gold import GoldAnnotator, GoldSettings
from dissonance.feedback.annotators.rewards import Rewards, ranks_by, score_questions
from dissonance.feedback.annotators.run import annotate, label_key
from dissonance.feedback.annotators.simulated import SimulatedAnnotator, SimulatedSettings
from dissonance.feedback.schema import leases
from dissonance.feedback.store import LEASE_SECONDS, Store
from dissonance.records import Answer, Message, Question, Reward

CUTS = (-1.5, -0.5, 0.5, 1.5)


def question(i: int, kind: str = "pairwise", n: int = 2) -> Question:
    ids = tuple(range(10, 10 + (1 if kind == "rating" else n)))
    texts = tuple(f"answer {i}.{j}" for j in ids)
    return Question(f"{kind}-{i}", f"p{i}", kind, (Message("user", f"ask {i}"),), ids, texts)


class NumberReward:
    """Scores by the number in the text; keeps what it was asked."""

    def __init__(self):
        self.scored = []

    def score(self, _conversations, completions):
        self.scored += completions
        return [Reward(math.sin(float(text.split()[-1]) * 7)) for text in completions]


class Scripted:
    """An annotator made of a function."""

    kind = "simulated"

    def __init__(self, function, name="scripted", concurrency=1):
        self.function, self.name, self.concurrency = function, name, concurrency

    def answer(self, question):
        return self.function(question)


FIRST = Answer(choice="first")


@pytest.fixture
def where(request, tmp_path):
    """Where the store goes; on PostgreSQL for those tests that ask for both."""
    return request.getfixturevalue("postgres_url") if getattr(request, "param", "") == "postgresql" else tmp_path / "db"


both = pytest.mark.parametrize("where", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def store(where):
    with Store.open(where, "run") as store:
        store.add_questions([question(i) for i in range(40)])
        yield store


def open_leases(store):
    with store.reading() as connection:
        return connection.execute(select(leases).where(leases.c.closed_at.is_(None))).all()


def said(store):
    return {label.query_id: label.answer for label in store.labels()}


# -- the run ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("concurrency", [1, 7])
def test_asks_everything_once_and_gives_the_leases_back(store, concurrency):
    asked = []
    done = annotate(store, Scripted(lambda q: asked.append(q.query_id) or FIRST, concurrency=concurrency))
    assert (done.answered, done.skipped, done.failed, done.left, done.stopped) == (40, 0, 0, 0, "")
    assert sorted(asked) == sorted(q.query_id for q in store.questions())
    assert len(store.labels()) == 40
    assert open_leases(store) == []
    assert annotate(store, Scripted(lambda q: pytest.fail("asked twice"))).answered == 0


def test_runs_concurrency_many_at_once(store):
    together = threading.Barrier(5)  # breaks, and fails the test, unless five are asked at once
    annotate(store, Scripted(lambda q: together.wait(20) >= 0 and FIRST, concurrency=5))
    assert len(store.labels()) == 40


def test_an_abstention_is_a_skip_and_no_answer_is_not_stored(store):
    answers = {0: None, 1: Answer()}
    done = annotate(store, Scripted(lambda q: answers.get(int(q.query_id.split("-")[1]), FIRST), concurrency=3))
    assert (done.answered, done.skipped, done.failed, done.left) == (38, 1, 1, 1)
    assert "pairwise-0" not in said(store)
    assert said(store)["pairwise-1"].skipped
    assert open_leases(store) == []
    again = annotate(store, Scripted(lambda q: FIRST))
    assert (again.answered, again.left) == (1, 0)  # the failed one alone; a skip is not asked again


def test_hundreds_of_failures_do_not_hide_what_comes_after_them(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as store:
        store.add_questions([question(i) for i in range(300)])
        done = annotate(store, Scripted(lambda q: FIRST if int(q.query_id.split("-")[1]) > 250 else None))
        assert (done.answered, done.failed, done.left) == (49, 251, 251)


def test_a_spent_budget_keeps_what_was_answered(store):
    budget = iter(range(11))

    def answer(q):
        if next(budget, None) is None:
            raise BudgetSpentError("spent")
        return FIRST

    done = annotate(store, Scripted(answer, concurrency=4))
    assert (done.answered, done.stopped, done.reason, done.left) == (11, "budget", "spent", 29)
    assert len(store.labels()) == 11
    assert open_leases(store) == []


def test_what_an_annotator_raises_comes_out_after_the_others_are_stored(store):
    def answer(q):
        if q.query_id == "pairwise-5":
            raise ValueError("broken")
        return FIRST

    with pytest.raises(ValueError, match="broken"):
        annotate(store, Scripted(answer))
    assert len(store.labels()) >= 5
    assert open_leases(store) == []
    assert annotate(store, Scripted(lambda q: FIRST)).left == 0


def test_an_answer_that_does_not_fit_is_refused(store):
    with pytest.raises(DataError, match="takes a choice"):
        annotate(store, Scripted(lambda q: Answer(rating=3)))


def test_ctrl_c_stores_what_is_under_way_and_goes_on_later(store):
    under_way, go_on = threading.Barrier(3), threading.Event()

    def answer(q):
        if not go_on.is_set():
            under_way.wait(20)
            go_on.wait(20)
        return FIRST

    def interrupt():
        under_way.wait(20)
        os.kill(os.getpid(), signal.SIGINT)
        go_on.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    done = annotate(store, Scripted(answer, concurrency=2))
    thread.join()
    assert done.stopped == "interrupted"
    assert done.answered + done.left == 40
    assert len(store.labels()) == done.answered >= 2
    assert open_leases(store) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert annotate(store, Scripted(answer, concurrency=2)).left == 0
    assert len(store.labels(current=False)) == 40


def test_a_second_ctrl_c_does_not_wait(store, monkeypatch):
    leave, heard, interrupt = threading.Event(), threading.Event(), run._Asking._interrupt

    def hear(asking):
        heard.set()
        interrupt(asking)

    monkeypatch.setattr(run._Asking, "_interrupt", hear)

    class Impatient(Scripted):
        def answer(self, _question):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            heard.wait(20)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            leave.wait(20)
            return FIRST

    with pytest.raises(KeyboardInterrupt):
        annotate(store, Impatient(None))
    leave.set()
    assert open_leases(store) == []


def test_progress_counts_what_waits_for_this_annotator(store):
    seen = []

    class Bar:
        def __init__(self, label, total, unit):
            seen.append((label, total, unit))

        def __enter__(self):
            return seen.append

        def __exit__(self, *_):
            seen.append("closed")

    store.add_gold([(question(99), FIRST, "known")])
    person = store.annotator("scripted", "simulated")
    store.record(person.annotator_id, "pairwise-3", FIRST, key=label_key("scripted", "pairwise-3"))
    annotate(store, Scripted(lambda q: FIRST), Bar)
    assert seen == [("scripted", 39, "questions"), *[1] * 39, "closed"]
    assert "pairwise-99" not in said(store)  # gold questions are for people


def test_what_is_not_for_this_annotator_does_not_wait_for_it(store):
    judge, person = store.annotator("judge", "judge"), store.annotator("anna")
    for i in range(3):
        store.record(judge.annotator_id, f"pairwise-{i}", FIRST, key=f"key {i}")
    assert store.check_sample("judge", 2) == 2  # asked of people only
    held = store.lease_many(person.annotator_id, 5)  # two of them those
    totals = []

    @contextmanager
    def bar(_label, total, _unit):
        totals.append(total)
        yield totals.append

    done = annotate(store, Scripted(lambda q: FIRST), bar)
    assert (done.answered, done.left) == (34, 0)
    assert totals == [34, *[1] * 34]
    assert not {lease.question.query_id for lease in held} & {
        label.query_id for label in store.labels() if label.annotator == "scripted"
    }


# -- leases ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds since 1970, when a test says so."""

    def __init__(self):
        self.now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def clocked(tmp_path, clock):
    with Store.open(tmp_path / "db", "run", clock) as store:
        store.add_questions([question(i) for i in range(40)])
        yield store


@pytest.mark.parametrize("concurrency", [1, 5])
def test_few_questions_are_leased_at_a_time(store, concurrency):
    held, lock = [], threading.Lock()

    def answer(_question):
        with lock:
            held.append(len(open_leases(store)))
        return FIRST

    annotate(store, Scripted(answer, concurrency=concurrency))
    assert max(held) <= 3 * concurrency


def test_a_question_whose_lease_ran_out_is_not_asked_while_someone_else_has_it(clocked, clock):
    anna, theirs, asked = clocked.annotator("anna"), [], []

    def answer(q):
        asked.append(q.query_id)
        if len(asked) == 1:
            clock.now += LEASE_SECONDS + 1
            theirs.extend(lease.question.query_id for lease in clocked.lease_many(anna.annotator_id, 4))
        return FIRST

    done = annotate(clocked, Scripted(answer))
    assert theirs == [f"pairwise-{i}" for i in range(4)]
    assert set(asked) & set(theirs) == {"pairwise-0"}  # which was under way
    assert sorted(asked) == sorted(set(asked))
    assert (done.answered, done.left) == (37, 0)


def test_leases_are_renewed_while_an_annotator_thinks(clocked, clock, monkeypatch):
    monkeypatch.setattr(run, "_RENEW_EVERY", 0.01)
    anna, renewed, theirs = clocked.annotator("anna"), threading.Event(), []
    lease_many = clocked.lease_many

    def watched(annotator_id, count, **options):
        given = lease_many(annotator_id, count, **options)
        renewed.set()
        return given

    monkeypatch.setattr(clocked, "lease_many", watched)

    def answer(q):
        if q.query_id == "pairwise-0":
            for _ in range(3):  # longer in all than a lease
                clock.now += 0.6 * LEASE_SECONDS
                for _ in range(2):  # one may have begun before the clock went on
                    renewed.clear()
                    assert renewed.wait(20)
            theirs.append(lease_many(anna.annotator_id, 1)[0].question.query_id)
        return FIRST

    done = annotate(clocked, Scripted(answer))
    assert theirs == ["pairwise-3"]  # 0 is under way, 1 and 2 are next
    assert done.answered == 39


def test_a_store_that_fails_between_two_questions_loses_no_answer(store, monkeypatch):
    lease_many, calls = store.lease_many, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise StoreError("full")
        return lease_many(*args, **options)

    monkeypatch.setattr(store, "lease_many", failing)
    together = threading.Barrier(2)
    asked = []

    def answer(q):
        together.wait(20)
        asked.append(q.query_id)
        return FIRST

    with pytest.raises(StoreError, match="full"):
        annotate(store, Scripted(answer, concurrency=2))
    assert len(store.labels()) == len(asked) >= 4


@both
def test_one_process_per_annotator(store, where, tmp_path):
    entered, leave = threading.Event(), threading.Event()

    def answer(q):
        entered.set()
        leave.wait(20)
        return FIRST

    thread = threading.Thread(target=annotate, args=(store, Scripted(answer)))
    thread.start()
    entered.wait(20)
    with (
        Store.open(where, "run") as other,
        pytest.raises(SettingsError, match="another process is running annotator 'scripted'"),
    ):
        annotate(other, Scripted(lambda q: FIRST))
    leave.set()
    thread.join()
    assert annotate(store, Scripted(lambda q: FIRST)).left == 0  # and the next one may
    assert list(tmp_path.glob("*.lock")) == []


def test_no_two_of_many_are_the_same_annotator_at_once(tmp_path):
    """Taking and removing the lock file, over and over: two who hold it at once would be two annotators."""
    path, inside, together = tmp_path / "db", [], []
    with ExitStack() as stack:
        stores = [stack.enter_context(Store.open(path, "run")) for _ in range(4)]
        person = stores[0].annotator("scripted", "simulated")

        start, end = threading.Barrier(len(stores)), time.monotonic() + 300

        def come_and_go(store):
            start.wait(20)
            while len(together) < 40 and time.monotonic() < end:  # most attempts find it taken
                with suppress(SettingsError), run._alone(store, person):
                    inside.append(1)
                    together.append(len(inside))
                    inside.pop()

        threads = [threading.Thread(target=come_and_go, args=(store,), daemon=True) for store in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(together) >= 40
    assert set(together) == {1}
    assert list(tmp_path.glob("*.lock")) == []


def test_the_lock_file_is_removed_while_nobody_can_take_it(store, where, monkeypatch):
    unlink, removed = Path.unlink, []

    def watched(path, **options):
        if path.suffix == ".lock":
            with pytest.raises(StoreError), other.writing():  # whoever takes it holds the store to do so
                pass
            removed.append(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    with Store.open(where, "run", busy_seconds=0.05) as other:
        annotate(store, Scripted(lambda q: FIRST))
    assert len(removed) == 1


@both
def test_killed_at_any_moment_it_goes_on_without_losing_or_doubling(store, where):
    script = f"""
import itertools, os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_annotators import *
with Store.open({str(where)!r}, "run") as store:
    count = itertools.count()
    def answer(q):
        if next(count) == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return FIRST
    annotate(store, Scripted(answer, concurrency=3))
"""
    for survives in (1, 20):
        process = subprocess.run([sys.executable, "-c", script, str(survives)], check=False, capture_output=True)
        assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert 0 < len(store.labels()) < 40
    assert annotate(store, Scripted(lambda q: FIRST)).left == 0
    assert Counter(label.query_id for label in store.labels(current=False)) == {f"pairwise-{i}": 1 for i in range(40)}


# -- gold ------------------------------------------------------------------------------------------------------------


def all_kinds(n=60):
    sizes = {"pairwise": 2, "rating": 1, "ranking": 4}
    return [question(i, kind, size) for i in range(n) for kind, size in sizes.items()]


def test_gold_scores_each_completion_once_and_answers_by_reward():
    model = NumberReward()
    questions = all_kinds()
    rewards = score_questions(model, questions)
    assert len(model.scored) == len(set(model.scored)) == 60 * 4
    gold = GoldAnnotator(GoldSettings(kind="cost"), rewards)
    for q in questions:
        values, answer = rewards[q], gold.answer(q)
        answer.fits(q)
        if q.kind == "pairwise":
            assert answer.choice == ("first" if values[0] > values[1] else "second")
        elif q.kind == "rating":
            assert answer.safe == (values[0] >= 0)
        else:
            assert np.argsort(answer.ranks).tolist() == np.argsort([-v for v in values]).tolist()


def test_ratings_are_fifths_of_the_rewards():
    questions = [question(i, "rating") for i in range(100)]
    rewards = Rewards({q.query_id: (float(i),) for i, q in enumerate(questions)}, (19.8, 39.6, 59.4, 79.2))
    gold = GoldAnnotator(GoldSettings(), rewards)
    assert Counter(gold.answer(q).rating for q in questions) == dict.fromkeys(range(1, 6), 20)
    same = Rewards({}, (2.0, 2.0, 2.0, 2.0))
    assert [same.rating(r) for r in (1.0, 2.0, 3.0)] == [1, 3, 5]


@given(values=st.lists(st.integers(-3, 3), min_size=2, max_size=8), margin=st.sampled_from([0.0, 1.0]))
def test_ranks(values, margin):
    ranks = ranks_by(values, values, margin)
    assert min(ranks) == 1
    assert set(ranks) == set(range(1, max(ranks) + 1))
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if a == b:
                assert ranks[i] == ranks[j]
            if a > b + margin:
                assert ranks[i] <= ranks[j]
    if margin == 0:
        assert ranks == tuple(1 + len({v for v in values if v > value}) for value in values)


def test_gold_ties_within_the_margin():
    q = question(0)
    for rewards, margin, choice in [((1, 1), 0, "tie"), ((1, 1.1), 0, "second"), ((1, 1.1), 0.2, "tie")]:
        gold = GoldAnnotator(GoldSettings(tie_margin=margin), Rewards({q.query_id: rewards}, CUTS))
        assert gold.answer(q).choice == choice


def test_gold_refuses_what_is_no_number_and_what_it_has_not_scored():
    class Broken:
        def score(self, _conversations, completions):
            return [Reward(math.nan)] * len(completions)

    with pytest.raises(DataError, match="the gold reward of 'answer 0.10' is nan"):
        score_questions(Broken(), [question(0)])
    with pytest.raises(DataError, match="'pairwise-0' came after the others were scored"):
        GoldAnnotator(GoldSettings(), score_questions(Broken(), [])).answer(question(0))


def test_another_setting_needs_another_name(store):
    rewards = score_questions(NumberReward(), store.questions())
    annotate(store, GoldAnnotator(GoldSettings(), rewards))
    annotate(store, GoldAnnotator(GoldSettings(), rewards))
    with pytest.raises(SettingsError, match="'gold' has answered with other settings before"):
        annotate(store, GoldAnnotator(GoldSettings(tie_margin=0.1), rewards))


def test_settings_that_nothing_was_answered_with_bind_nobody(store):
    rewards = score_questions(NumberReward(), store.questions())
    typo = GoldAnnotator(GoldSettings(tie_margin=5.0), rewards)
    typo.answer = lambda q: None
    assert annotate(store, typo).failed == 40
    annotate(store, GoldAnnotator(GoldSettings(), rewards))
    with pytest.raises(SettingsError, match="'gold' has answered with other settings before"):
        annotate(store, typo)


# -- simulated -------------------------------------------------------------------------------------------------------


def simulate(rewards, n=4000, kind="pairwise", **options):
    """Give n questions of one kind with the same rewards, and what was said to each."""
    questions = [question(i, kind, len(rewards)) for i in range(n)]
    person = SimulatedAnnotator(SimulatedSettings(**options), Rewards({q.query_id: rewards for q in questions}, CUTS))
    return [(q, person.answer(q), person.details(q).shown) for q in questions]


def close(share, expected, n):
    """Within five standard errors of a proportion."""
    return abs(share - expected) <= 5 * math.sqrt(max(expected * (1 - expected), 1 / n) / n)


@settings(max_examples=8)
@given(
    gap=st.floats(-3, 3),
    temperature=st.floats(0.3, 3),
    flip=st.floats(0, 1),
    lapse=st.floats(0, 1),
    bias=st.floats(-2, 2),
    seed=st.integers(0, 2**40),
)
def test_frequencies_are_the_stated_probabilities(gap, temperature, flip, lapse, bias, seed):
    got = simulate((gap, 0.0), temperature=temperature, flip=flip, lapse=lapse, position_bias=bias, seed=seed)
    for left_id, sign in ((10, 1), (11, -1)):
        chosen = [answer.choice == "first" for _, answer, shown in got if shown[0] == left_id]
        assert close(len(chosen) / len(got), 0.5, len(got))
        seen = 1 / (1 + math.exp(-(gap / temperature + sign * bias)))
        expected = lapse / 2 + (1 - lapse) * (seen * (1 - flip) + (1 - seen) * flip)
        assert close(np.mean(chosen), expected, len(chosen))


def test_flipping_half_is_chance():
    got = simulate((5.0, 0.0), temperature=0.1, flip=0.5)
    assert close(np.mean([a.choice == "first" for _, a, _ in got]), 0.5, len(got))


def test_temperature_zero_never_errs_and_bias_shows_in_the_positions():
    assert {a.choice for _, a, _ in simulate((0.2, 0.1), n=300, temperature=0)} == {"first"}
    equal = simulate((0.0, 0.0), temperature=0)
    assert close(np.mean([a.choice == "first" for _, a, _ in equal]), 0.5, len(equal))
    biased = simulate((0.0, 0.0), position_bias=2.0)
    left = np.mean([(a.choice == "first") == (shown[0] == 10) for _, a, shown in biased])
    assert close(left, 1 / (1 + math.exp(-2)), len(biased))


def test_a_tie_band_ties_what_is_closer_and_nothing_else():
    assert {a.choice for _, a, _ in simulate((0.0, 0.1), n=200, tie_band=0.11)} == {"tie"}
    assert "tie" not in {a.choice for _, a, _ in simulate((0.0, 0.1), n=200, tie_band=0.1)}
    assert "tie" not in {a.choice for _, a, _ in simulate((0.0, 0.0), n=200)}


def test_rankings_are_plackett_luce():
    rewards = (1.0, 0.0, -1.0)
    got = simulate(rewards, kind="ranking", temperature=1.0)
    tops = Counter(a.ranks.index(1) for _, a, _ in got)
    weights = np.exp(rewards) / np.exp(rewards).sum()
    assert all(close(tops[i] / len(got), weights[i], len(got)) for i in range(3))
    flipped = simulate(rewards, kind="ranking", temperature=0, flip=1.0, n=50)
    assert {a.ranks for _, a, _ in flipped} == {(3, 2, 1)}


def test_ratings_follow_the_reward_and_turn_round():
    for reward, rating in ((-2.0, 1), (-1.0, 2), (0.0, 3), (1.0, 4), (2.0, 5)):
        straight = simulate((reward,), n=20, kind="rating", temperature=0)
        assert {a.rating for _, a, _ in straight} == {rating}
        turned = simulate((reward,), n=20, kind="rating", temperature=0, flip=1.0)
        assert {a.rating for _, a, _ in turned} == {6 - rating}
    lapsed = simulate((2.0,), kind="rating", lapse=1.0)
    counts = Counter(a.rating for _, a, _ in lapsed)
    assert all(close(counts[r] / len(lapsed), 0.2, len(lapsed)) for r in range(1, 6))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    options = SimulatedSettings(flip=0.2, lapse=0.1, position_bias=0.5, kind="cost")
    questions = all_kinds(15)

    def run(folder, stop_after):
        folder.mkdir()
        with Store.open(folder / "labels.db", "run") as store:
            store.add_questions(questions)
            rewards = score_questions(NumberReward(), store.questions())
            person = SimulatedAnnotator(options, rewards)
            allowed = iter(range(stop_after))
            for answer in (lambda q: person.answer(q) if next(allowed, None) is not None else None, person.answer):
                part = SimulatedAnnotator(options, rewards)
                part.answer = answer
                part.concurrency = 1 + stop_after % 4
                annotate(store, part)
            return {label.query_id: (label.answer, label.shown) for label in store.labels()}

    whole = run(tmp_path / "whole", 1000)
    assert len(whole) == 45
    for stop_after in (3, 10, 22):
        assert run(tmp_path / f"part{stop_after}", stop_after) == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature of a simulated annotator is -1: use a number from 0 up"),
        ({"flip": 1.5}, "flip of a simulated annotator is 1.5: use a number from 0 to 1"),
        ({"lapse": math.nan}, "lapse .* nan"),
        ({"tie_band": math.inf}, "tie_band .* inf"),
        ({"position_bias": math.inf}, "position_bias"),
        ({"temperature": 0, "position_bias": 1.0}, "temperature 0 has no position_bias"),
    ],
)
def test_simulated_settings_are_checked(options, message):
    with pytest.raises(SettingsError, match=message):
        SimulatedSettings(**options)


def test_gold_settings_are_checked():
    with pytest.raises(SettingsError, match="tie_margin is -1: use a number from 0 up"):
        GoldSettings(tie_margin=-1)
