"""What a lead sees of a store: right after each answer, without reading everything again, and quick."""

import json
import threading
from dataclasses import fields

import pytest
from sqlalchemy import event, insert

from counting import calls_of
from dissonance.feedback import schema
from dissonance.feedback.overview import MOST_SHOWN, NamedCompletion, Overview, overview, summary
from dissonance.feedback.store import Progress, Store
from dissonance.feedback.wording import excerpt, in_words, letters, shortened
from dissonance.records import Answer, Message, Question

NOTHING = Progress(0, 0, 0, 0)


def question(query_id, kind="pairwise", ids=(0, 1), prompt_id=None, text="hello"):
    return Question(
        query_id, prompt_id or query_id, kind, (Message("user", text),), tuple(ids), tuple(f"text {i}" for i in ids)
    )


class Asked:
    """A store with people who answer."""

    def __init__(self, store):
        self.store = store
        self.count = 0

    def say(self, who, query_id, answer, **more):
        self.count += 1
        if not isinstance(answer, Answer):
            answer = Answer(**{{str: "choice", int: "rating", tuple: "ranks"}[type(answer)]: answer})
        person = self.store.annotator(who, role="lead" if more.get("adjudicated") else "annotator")
        return self.store.record(person.annotator_id, query_id, answer, key=str(self.count), **more)


@pytest.fixture
def asked(tmp_path):
    with Store.open(tmp_path / "labels.db", "run", now=lambda: 1000.0) as store:
        yield Asked(store)


def test_an_empty_store_has_an_empty_overview(asked):
    found = overview(asked.store)
    assert found == Overview(NOTHING, (), (), (), 0, 0, (), 0, found.conflicts, {}, (), 0)
    assert (found.conflicts.prompts, found.conflicts.rate) == (0, None)
    json.dumps(found.to_json())


def test_everything_a_lead_needs_is_there_after_each_answer(asked):
    asked.store.add_questions([question("q", ids=(4, 2)), question("r", "rating", (1,))], overlap=2)
    asked.store.add_gold([(question("g"), Answer(choice="first"), "clear")])
    asked.say("ann", "q", "first", shown=(2, 4), seconds=10.0)
    first = overview(asked.store)
    assert (first.progress.answered, first.n_disagreements) == (1, 0)
    asked.say("bob", "q", "second", shown=(4, 2), flagged=True, note="both are odd")
    asked.say("ann", "r", Answer(rating=2, safe=True))
    asked.say("bob", "r", Answer(rating=3, safe=True))
    asked.say("ann", "g", "first")
    asked.say("bob", "g", "second")
    found = overview(asked.store)

    assert (found.progress.queries, found.progress.answered, found.latest_label_id) == (2, 4, 6)
    assert [row.kind for row in found.agreement] == ["pairwise", "rating", "safe"]
    assert [row.alpha for row in found.agreement] == [None] * 3
    ann, bob = found.annotators
    assert (ann.name, ann.per_hour, ann.left_share.mean, ann.gold_accuracy.mean) == ("ann", 360.0, 0.0, 1.0)
    assert (bob.left_share.mean, bob.gold_accuracy.mean) == (0.0, 0.0)
    (disagreement,) = found.disagreements  # ratings a point apart are none, nor are gold questions
    assert (disagreement.query_id, disagreement.dispute, disagreement.adjudicated) == ("q", 1.0, False)
    named = letters(question("q", ids=(4, 2)))
    assert [(x.annotator, x.text) for x in disagreement.answers] == [
        ("ann", f"{named[4]} is better"),
        ("bob", f"{named[2]} is better"),
    ]
    first, second = sorted(named, key=named.__getitem__)
    assert disagreement.completions == (
        NamedCompletion("A", first, f"text {first}"),
        NamedCompletion("B", second, f"text {second}"),
    )
    (remark,) = found.remarks
    assert (remark.annotator, remark.note, remark.flagged, remark.created_at) == ("bob", "both are odd", True, 1000.0)


def test_a_settled_disagreement_goes_to_the_end_and_stays(asked):
    asked.store.add_questions([question("a"), question("b")], overlap=2)
    for query_id in ("a", "b"):
        asked.say("ann", query_id, "first")
        asked.say("bob", query_id, "second")
    assert [x.query_id for x in overview(asked.store).disagreements] == ["a", "b"]
    asked.say("lead", "a", "tie", adjudicated=True)
    found = overview(asked.store)
    assert [(x.query_id, x.adjudicated) for x in found.disagreements] == [("b", False), ("a", True)]
    assert (found.n_disagreements, found.n_unsettled) == (2, 1)
    assert [x.text for x in found.disagreements[1].answers if x.adjudicated] == ["tie"]
    assert [row.name for row in found.annotators] == ["ann", "bob"]  # who settles is not measured by it


def test_a_correction_shows_at_once_and_the_first_answer_no_more(asked):
    asked.store.add_questions([question("q")], overlap=2)
    asked.say("ann", "q", "first", note="hm")
    asked.say("bob", "q", "second")
    assert overview(asked.store).n_disagreements == 1
    asked.say("ann", "q", "second")
    found = overview(asked.store)
    assert (found.n_disagreements, found.n_remarks) == (0, 0)
    assert [row.answers for row in found.annotators] == [1, 1]


def test_the_most_disputed_come_first_by_kind_of_contradiction(asked):
    kinds = {
        "tie": "pairwise",
        "side": "pairwise",
        "wide": "rating",
        "close": "rating",
        "unsafe": "rating",
        "k": "ranking",
    }
    ids = {"pairwise": (0, 1), "rating": (0,), "ranking": (0, 1, 2)}
    asked.store.add_questions([question(q, kind, ids[kind]) for q, kind in kinds.items()], overlap=2)
    said = {
        "tie": ("first", "tie"),
        "side": ("first", "second"),
        "wide": (1, 4),
        "close": (3, 4),
        "unsafe": (Answer(rating=3, safe=True), Answer(rating=3, safe=False)),
        "k": ((1, 2, 3), (2, 1, 3)),
    }
    for q, (one, other) in said.items():
        asked.say("ann", q, one)
        asked.say("bob", q, other)
    found = {x.query_id: x.dispute for x in overview(asked.store).disagreements}
    assert list(found) == ["side", "unsafe", "wide", "tie", "k"]
    assert found == {"side": 1.0, "unsafe": 1.0, "wide": 0.75, "tie": 0.5, "k": pytest.approx(1 / 3)}


def test_lists_are_cut_and_counted(asked):
    n = MOST_SHOWN + 5
    asked.store.add_questions([question(f"q{i:03}") for i in range(n)], overlap=2)
    for i in range(n):
        asked.say("ann", f"q{i:03}", "first", note=f"note {i}")
        asked.say("bob", f"q{i:03}", "second")
    found = overview(asked.store)
    assert (len(found.disagreements), found.n_disagreements, found.n_unsettled) == (MOST_SHOWN, n, n)
    assert (len(found.remarks), found.n_remarks) == (MOST_SHOWN, n)
    assert found.remarks[0].note == f"note {n - 1}"  # newest first
    (pairwise,) = found.agreement
    assert pairwise.alpha.mean < 0


def test_cyclic_prompts_are_named_with_their_beginning(asked):
    pairs = [(0, 1), (1, 2), (2, 0)]
    asked.store.add_questions(
        [question(f"q{a}{b}", ids=(a, b), prompt_id="p", text="Which?  \n " + "word " * 60) for a, b in pairs]
    )
    for a, b in pairs:
        asked.say("ann", f"q{a}{b}", "first")
    found = overview(asked.store)
    (prompt,) = found.conflicts.cyclic
    assert prompt.cycle == (0, 1, 2)
    assert found.excerpts["p"].startswith("Which? word word")
    assert len(found.excerpts["p"]) <= 120
    assert found.excerpts["p"].endswith("…")
    assert found.cycle_excerpts == (("text 0", "text 1", "text 2"),)


def test_labels_of_retired_questions_are_still_there(asked):
    asked.store.add_questions([question("old")], overlap=2)
    asked.say("ann", "old", "first")
    asked.say("bob", "old", "second")
    asked.store.add_questions([question("new")])
    found = overview(asked.store)
    assert [x.query_id for x in found.disagreements] == ["old"]
    assert found.progress.queries == 1


def test_new_questions_show_without_a_new_label(asked):
    asked.store.add_questions([question("a")])
    assert overview(asked.store).progress.queries == 1
    asked.store.add_questions([question("b")], round_number=1)
    assert overview(asked.store).progress.queries == 2
    asked.say("ann", "b", "first")
    asked.say("bob", "b", "second", note="no")
    found = overview(asked.store)
    assert [x.query_id for x in found.disagreements] == [x.query_id for x in found.remarks] == ["b"]


def test_a_poll_reads_only_the_labels_that_came_since(asked):
    asked.store.add_questions([question(f"q{i}") for i in range(20)])
    for i in range(19):
        asked.say("ann", f"q{i}", "first")
    overview(asked.store)
    rows = []

    @event.listens_for(asked.store.engine, "after_cursor_execute")
    def count(connection, cursor, statement, parameters, context, many):
        rows.append(statement)

    again = overview(asked.store)
    assert not any("labels.answer" in statement for statement in rows)
    assert again is not None
    asked.say("ann", "q19", "first")
    rows.clear()
    assert overview(asked.store).annotators[0].answers == 20
    (read,) = [statement for statement in rows if "labels.answer" in statement]
    assert "labels.label_id >" in read
    assert not any("queries.completions" in statement for statement in rows)


def test_what_is_kept_is_what_the_store_says(asked):
    asked.store.add_questions([question(f"q{i}", prompt_id="p", ids=(i, i + 1)) for i in range(6)], overlap=3)
    asked.store.add_gold([(question("g"), Answer(choice="tie"), "")])
    for i in range(6):
        for who, said in (("ann", "first"), ("bob", "second" if i % 2 else "first"), ("cy", "tie")):
            asked.say(who, f"q{i}", said)
            overview(asked.store)
    asked.say("ann", "g", "first")
    questions = {q.query_id: q for q in asked.store.questions(retired=True)}
    expected = summary(asked.store.labels(current=False), questions, asked.store.gold(), asked.store.progress())
    assert overview(asked.store) == expected


def test_leads_may_look_from_many_threads_while_answers_arrive(asked):
    asked.store.add_questions([question(f"q{i}") for i in range(40)])
    found, failures = [], []

    def look():
        try:
            found.extend(overview(asked.store).latest_label_id for _ in range(15))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(40):
        asked.say("ann", f"q{i}", "first")
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(found) == 60
    assert overview(asked.store).annotators[0].answers == 40


def test_json_holds_every_field_with_agreement_by_kind_and_intervals(asked):
    asked.store.add_questions([question(f"q{i}") for i in range(8)], overlap=2)
    for i in range(8):
        asked.say("ann", f"q{i}", "first" if i % 2 else "second")
        asked.say("bob", f"q{i}", "first" if i % 3 else "second")
    found = overview(asked.store)
    written = json.loads(json.dumps(found.to_json()))
    assert set(written) == {field.name for field in fields(Overview)}
    assert set(written["agreement"]["pairwise"]["alpha"]) == {"mean", "low", "high"}
    assert written["disagreements"][0]["answers"][0]["answer"] in ({"choice": "first"}, {"choice": "second"})
    assert written["progress"]["answered"] == 16


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(choice="first"), "{3} is better"),
        (Answer(choice="second"), "{1} is better"),
        (Answer(choice="both_bad"), "both bad"),
        (Answer(rating=4, safe=False), "rated 4, unsafe"),
        (Answer(safe=True), "safe"),
        (Answer(ranks=(2, 2)), "A = B"),
        (Answer(ranks=(3, 1)), "{1} > {3}"),
        (Answer(), "skipped"),
    ],
)
@pytest.mark.parametrize("query_id", ["q", "r", "s", "t"])
def test_answers_in_words_name_completions_by_letter(answer, words, query_id):
    asked = question(query_id, ids=(3, 1))
    named = letters(asked)
    assert sorted(named.values()) == ["A", "B"]
    assert in_words(answer, asked) == words.replace("{3}", named[3]).replace("{1}", named[1])


def test_letters_tell_nothing_of_the_order_of_asking():
    first = [letters(question(f"q{i}", ids=(3, 1)))[3] for i in range(200)]
    assert 60 < first.count("A") < 140


def test_a_text_is_shortened_to_one_line():
    assert shortened(" a\n b ", 3) == "a b"
    assert shortened("a\n bc", 3) == "a…"
    assert shortened("", 3) == ""


def test_the_excerpt_is_of_the_last_thing_the_user_said():
    turns = (
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", " three\nfour "),
        Message("tool", "five"),
    )
    assert excerpt(Question("q", "p", "rating", turns, (0,), ("text",))) == "three four"
    assert excerpt(Question("q", "p", "rating", (Message("system", "six"),), (0,), ("text",))) == "six"


@pytest.fixture
def calls_of_a_poll(tmp_path):
    """How many calls of functions the overview takes when one of so many labels is new."""

    def count(n_queries):
        with Store.open(tmp_path / f"labels-{n_queries}.db", "run", now=lambda: 1000.0) as store:
            return of_store(Asked(store), n_queries)

    def of_store(asked, n_queries):
        questions = [question(f"q{i}", ids=(i % 4, (i + 1) % 4), prompt_id=f"p{i // 4}") for i in range(n_queries)]
        asked.store.add_questions(questions, overlap=3)
        people = [asked.store.annotator(f"a{i}").annotator_id for i in range(64)]
        said = ("first", "second", "tie", "first")
        rows = [
            {
                "key": f"{q.query_id}-{k}",
                "query_id": q.query_id,
                "annotator_id": people[(i + k * 5) % 64],
                "answer": {"choice": said[(i * 7 + k * 3 + i // 5) % 4]},
                "skipped": False,
                "shown": list(q.completion_ids),
                "seconds": 3.0,
                "created_at": 0.0,
            }
            for i, q in enumerate(questions)
            for k in range(3)
        ]
        with asked.store.writing() as connection:  # at once: answers one by one are as many writes to disk
            connection.execute(insert(schema.labels), rows)
        overview(asked.store)
        asked.say("a0", "q100", "second")
        return calls_of(lambda: overview(asked.store))

    return count


def test_a_poll_takes_work_in_proportion_to_the_labels(calls_of_a_poll):
    few, many = calls_of_a_poll(400), calls_of_a_poll(1600)
    assert many < 5 * few
