"""Many annotators at one server over HTTP, and a server killed under them: benchmarks/labelling.py, in small."""

import importlib
import json
import time
from pathlib import Path

import pytest

from dissonance.feedback.store import Store
from dissonance.records import Answer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = "--annotators 16 --every 0.4 --seconds 2 --queries 400 --kills 3 --per-kill 60 --watched --json"


@pytest.fixture(scope="module")
def labelling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("labelling")


@pytest.fixture(scope="module")
def crowd(labelling):
    return importlib.import_module("labelling_crowd")


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_none_lost_and_none_doubled_by_many_at_once_and_by_kill(labelling, request, capsys, tmp_path, kind):
    arguments = [*SMALL.split(), "--store", kind, "--folder", str(tmp_path)]
    if kind == "postgresql":
        arguments += ["--postgres-url", request.getfixturevalue("postgres_server")]
    labelling.main(arguments)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    for phase in ("paced", "saturated", "killed"):
        assert not any(result[phase]["findings"].values()), result[phase]
    for what in ("post", "get", "overview"):
        assert result["paced"]["milliseconds"][what]["count"] > 0
    assert result["paced"]["acknowledged"] == result["paced"]["milliseconds"]["post"]["count"] > 30
    assert result["saturated"]["acknowledged"] >= 16
    assert result["killed"]["kills"] == 3
    assert result["killed"]["acknowledged"] >= 4 * 60
    assert result["killed"]["sent_again"] > 0


def test_a_reply_counts_from_when_the_answer_was_due(labelling, tmp_path):
    load = labelling.Load(annotators=1, overlap=1)
    with labelling.people_at_work(str(tmp_path / "labels.db"), load, 20) as (_, crowd):
        (annotator,) = crowd.annotators
        annotator.answer(time.perf_counter() - 7)
        annotator.look("/", time.perf_counter() - 7)
        assert annotator.ledger.seconds["post"][0] > 7
        assert annotator.ledger.seconds["get"][-1] > 7


@pytest.fixture
def answered(labelling, crowd, tmp_path):
    """A store in which two people answered six queries, and the ledger of it."""
    ledger = crowd.Ledger()
    where = tmp_path / "labels.db"
    labelling.fill(str(where), labelling.Load(annotators=2, overlap=2), 6)
    with Store.open(where, labelling.RUN_ID) as store:
        for person in store.annotators()[:2]:
            while (lease := store.lease(person.annotator_id, gold_every=0)) is not None:
                query_id, key = lease.question.query_id, f"{person.name}/{lease.question.query_id}"
                said = {"pairwise": Answer("tie"), "rating": Answer(rating=3), "ranking": Answer(ranks=(1, 1, 1, 1))}
                answer = said[lease.question.kind]
                store.record(person.annotator_id, query_id, answer, key=key, shown=lease.shown)
                ledger.sent[key] = crowd.Sent(person.name, lease.lease_id, answer, "", False)
                ledger.acknowledged.append(key)
        yield store, ledger


def found(crowd, store, ledger, overlap=2):
    return {name: n for name, n in vars(crowd.check(store, ledger, overlap, finished=True)).items() if n}


def test_the_check_finds_nothing_where_nothing_is_wrong(crowd, answered):
    store, ledger = answered
    assert len(ledger.acknowledged) == 12
    assert found(crowd, store, ledger) == {}


def test_the_check_sees_what_is_lost_altered_or_unknown(crowd, answered):
    store, ledger = answered
    key, other = ledger.acknowledged[:2]
    ledger.acknowledged.append("an answer that is not there")
    assert found(crowd, store, ledger) == {"lost": 1}
    ledger.acknowledged.pop()
    sent = ledger.sent.pop(key)
    assert found(crowd, store, ledger) == {"unknown": 1}
    ledger.sent[key] = crowd.Sent(sent.annotator, sent.question, Answer("both_bad"), "", False)
    assert found(crowd, store, ledger) == {"altered": 1}
    ledger.sent[key], ledger.sent[other] = ledger.sent[other], sent
    assert found(crowd, store, ledger) == {"altered": 2}


def test_the_check_sees_what_is_doubled_too_many_or_left_behind(crowd, answered):
    store, ledger = answered
    assert found(crowd, store, ledger, overlap=1) == {"too_many": 6}
    assert found(crowd, store, ledger, overlap=3) == {"left_behind": 6}
    label = store.labels()[0]
    person = store.annotators()[0]
    store.record(person.annotator_id, label.query_id, label.answer, key="again", shown=label.shown)
    ledger.sent["again"] = ledger.sent[ledger.acknowledged[0]]
    assert found(crowd, store, ledger)["doubled"] == 1
