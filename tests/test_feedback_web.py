"""The labelling server: what is shown, what is stored, and how texts that others wrote are made harmless."""

import itertools
import json
import re
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, settings
from hypothesis import given as drawing
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.testclient import TestClient

from counting import calls_of
from dissonance.errors import DataError, SettingsError
from dissonance.feedback.access import invite
from dissonance.feedback.blind import blind_order
from dissonance.feedback.store import Store
from dissonance.feedback.web.forms import AnswerForm, answer_of, fields_of
from dissonance.feedback.web.markdown import MAX_CHARACTERS, MAX_MARKS, render_markdown, visible
from dissonance.feedback.web.serve import serve
from dissonance.feedback.web.settings import LabelSettings
from dissonance.feedback.web.views import differences, is_long
from dissonance.records import Answer, Message, Question
from web_clients import LOGIN, ask, client_of, fields, given, signed_in, store_of


def current(client: TestClient) -> dict[str, str]:
    return fields(client.get("/question").text)


def given_as(store: Store, form: dict[str, str]) -> tuple[str, tuple[int, ...]]:
    """The query that a form is about, and the completion_ids from left to right."""
    return given(store, form["question"])


def say(client: TestClient, form: dict[str, str], **answer: str) -> str:
    response = client.post("/answers", data=form | answer)
    assert response.status_code == 200, response.text
    return response.text


# -- answers -----------------------------------------------------------------------------------------------------------


def test_left_and_right_are_what_was_shown(tmp_path: Path) -> None:
    questions = [ask(f"q{i}") for i in range(30)]
    with store_of(tmp_path, *questions) as store:
        client = client_of(store)
        meant = {}
        for i in range(30):
            form = current(client)
            query_id, (left, right) = given_as(store, form)
            assert {left, right} == {5, 6}
            meant[query_id] = left if i % 2 else right
            say(client, form, choice="left" if i % 2 else "right", seconds="1.5")
        stored = {label.query_id: label for label in store.labels()}
        assert {label.shown for label in stored.values()} == {(5, 6), (6, 5)}
        for query_id, completion_id in meant.items():
            assert stored[query_id].answer.choice == ("first" if completion_id == 6 else "second")
            assert stored[query_id].seconds == 1.5
        assert "All done" in client.get("/").text
        assert client.get("/api/question").json() is None
        progress = client.get("/api/progress").json()
        assert (progress["done"], progress["left"]) == (30, 0)
        assert progress["per_hour"] > 0


def test_ties_skips_notes_and_flags(tmp_path: Path) -> None:
    said = [{"choice": "tie"}, {"choice": "both_bad", "flagged": "on"}, {"choice": "skip", "note": "who\r\nknows\0"}]
    with store_of(tmp_path, *[ask(f"q{i}") for i in range(3)]) as store:
        client = client_of(store)
        for answer in said:
            say(client, current(client), **answer)
        labels = store.labels()
        assert [label.answer for label in labels] == [Answer("tie"), Answer("both_bad"), Answer()]
        assert [label.flagged for label in labels] == [False, True, False]
        assert [label.note for label in labels] == ["", "", "who\nknows\N{REPLACEMENT CHARACTER}"]
        assert labels[2].answer.skipped


def test_ratings_and_rankings(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("r1", "rating"), ask("r2", "rating"), ask("k1", "ranking")) as store:
        client = client_of(store, LabelSettings(ask_safety=True, gold_every=0))
        say(client, current(client), rating="4", safe="no")
        say(client, current(client), rating="skip", safe="")
        form = current(client)
        _, shown = given_as(store, form)
        say(client, form, ranks=",".join({6: "1", 5: "2", 4: "2", 3: "4"}[i] for i in shown))
        assert [label.answer for label in store.labels()] == [
            Answer(rating=4, safe=False),
            Answer(),
            Answer(ranks=(1, 2, 2, 4)),
        ]


def test_an_answer_sent_again_is_stored_once(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        client = client_of(store)
        form = current(client)
        first, again = say(client, form, choice="left"), say(client, form, choice="left")
        assert given_as(store, fields(first)) == given_as(store, fields(again))
        assert given_as(store, fields(first))[0] == "q2"
        assert len(store.labels(current=False)) == 1
        other = client.post("/answers", data=form | {"choice": "tie"})
        assert other.status_code == 409
        assert "belongs to another answer" in other.text
        assert len(store.labels(current=False)) == 1


def test_undo_goes_back_answer_by_answer_and_corrects(tmp_path: Path) -> None:
    with store_of(tmp_path, *[ask(f"q{i}") for i in range(4)]) as store:
        client = client_of(store)
        assert client.get("/question/previous").status_code == 404
        for choice in ("left", "tie", "skip"):
            say(client, current(client), choice=choice, note=f"I said {choice}", flagged="on")
        held = current(client)["question"]
        page = client.get("/question/previous").text
        assert given_as(store, fields(page))[0] == "q2"
        before = re.search(r"/question/previous\?before=(\d+)", page)
        assert before is not None
        page = client.get(f"/question/previous?before={before[1]}").text
        assert "I said tie" in page
        assert "checked" in page
        assert "changing an answer" in page
        tie = re.search(r'<button[^>]*value="tie"[^>]*>', page)
        assert tie is not None
        assert "data-chosen" in tie[0]
        corrected = fields(page)
        after = say(client, corrected, choice="both_bad")
        assert fields(after)["question"] == held
        labels = store.labels(current=False)
        assert [label.query_id for label in labels] == ["q0", "q1", "q2", "q1"]
        assert labels[-1].supersedes == labels[1].label_id
        assert labels[-1].answer == Answer("both_bad")
        assert labels[-1].shown == labels[1].shown
        first = labels[0].label_id
        assert client.get(f"/question/previous?before={first}").status_code == 404


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"choice": "A"}, 422, "choice"),
        ({"choice": ""}, 422, "gives no answer"),
        ({"rating": "3"}, 422, "gives both choice and rating"),
        ({"choice": "", "rating": "3"}, 422, "takes a choice"),
        ({"choice": "", "rating": "6"}, 422, "rating"),
        ({"choice": "", "ranks": "1,2"}, 422, "takes a choice"),
        ({"choice": "", "ranks": "1"}, 422, "ranks 2 completions, got 1"),
        ({"choice": "", "ranks": "0,1"}, 422, "from 1 up"),
        ({"choice": "", "safe": "maybe"}, 422, "safe"),
        ({"seconds": "-1"}, 422, "seconds"),
        ({"seconds": "nan"}, 422, "seconds"),
        ({"seconds": "soon"}, 422, "seconds"),
        ({"key": ""}, 422, "key"),
        ({"key": "k" * 65}, 422, "key"),
        ({"key": "a b"}, 422, "key"),
        ({"note": "x" * 20_001}, 422, "note"),
        ({"question": "q9"}, 404, "no question 'q9'"),
        ({"question": "query:q9"}, 404, "no question 'query:q9'"),
        ({"question": "label:1"}, 404, "no question 'label:1'"),
        ({"question": "label:99999999999999999999"}, 404, "no question 'label:9"),
        ({"question": ""}, 422, "question"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, str], status: int, says: str
) -> None:
    with store_of(tmp_path) as store:
        client = client_of(store)
        form = current(client) | {"choice": "left"} | change
        reply = client.post("/answers", data=form, headers={"HX-Request": "true"})
        assert (reply.status_code, says in reply.text) == (status, True), reply.text
        assert "\n" not in reply.text
        assert not re.search(r"\bq1\b", reply.text)  # tokens are random, and may hold it
        assert store.labels() == []


def test_no_seconds_are_no_seconds(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        client = client_of(store)
        say(client, current(client), choice="left", seconds="")
        assert store.labels()[0].seconds is None


@st.composite
def answers(draw: st.DrawFn) -> tuple[Question, tuple[int, ...], Answer]:
    kind = draw(st.sampled_from(["pairwise", "rating", "ranking"]))
    n = {"pairwise": 2, "rating": 1}.get(kind) or draw(st.integers(2, 8))
    ids = tuple(draw(st.lists(st.integers(0, 99), min_size=n, max_size=n, unique=True)))
    question = Question("q", "p", kind, (Message("user", "x"),), ids, ("t",) * n)
    forms: dict[str, Any] = {
        "pairwise": st.sampled_from(["first", "second", "tie", "both_bad"]).map(Answer),
        "rating": st.builds(
            Answer, rating=st.none() | st.integers(1, 5), safe=st.none() | st.booleans(), choice=st.none()
        ),
        "ranking": st.lists(st.integers(1, n), min_size=n, max_size=n).map(lambda ranks: Answer(ranks=tuple(ranks))),
    }
    return question, tuple(draw(st.permutations(ids))), draw(st.just(Answer()) | forms[kind])


@drawing(answers())
def test_the_form_says_what_the_answer_says_in_any_order_shown(
    drawn: tuple[Question, tuple[int, ...], Answer],
) -> None:
    question, shown, answer = drawn
    values = fields_of(answer, question, shown)
    form = AnswerForm(question="q", key="k", **dict(values))
    assert answer_of(form, question, shown) == answer


def test_ranks_follow_their_completions() -> None:
    question = Question("q", "p", "ranking", (Message("user", "x"),), (3, 1, 7), ("three", "one", "seven"))
    best_first = {7: "1", 3: "2", 1: "3"}
    for shown in permutations((3, 1, 7)):
        ranks = ",".join(best_first[i] for i in shown)
        form = AnswerForm(question="q", key="k", ranks=ranks)
        assert answer_of(form, question, shown) == Answer(ranks=(2, 3, 1))


def test_a_form_of_numbers_without_end_is_refused() -> None:
    for ranks in ("1" * 10, ",".join("1" * 101), "1,,2", "-1,2", "1,2,", "١,٢"):
        with pytest.raises((ValidationError, DataError)):
            answer_of(AnswerForm(question="q", key="k", ranks=ranks), ask("q"), (6, 5))


# -- pages -------------------------------------------------------------------------------------------------------------


def test_the_page_tells_nothing_that_could_sway(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("q1")) as store:
        store.add_gold([(ask("g1"), Answer("first"), "because it is known")])
        client = client_of(store, LabelSettings(gold_every=1))
        for path in ("/", "/question", "/api/question"):
            text = client.get(path).text
            for hidden in ("prompt of", "a category", "known", "reward", "logprob"):
                assert hidden not in text, (path, hidden)


@pytest.mark.parametrize("n_gold", [3, 40])
def test_nothing_on_the_page_tells_a_gold_question_from_another(tmp_path: Path, n_gold: int) -> None:
    settings = LabelSettings(login_required=True, gold_every=4)
    clock = itertools.count(1_000_000, 10)
    with store_of(tmp_path, *[ask(f"real{i}") for i in range(30)], now=lambda: next(clock)) as store:
        gold = [replace(ask(f"gold{i}"), completion_ids=(0, 1)) for i in range(n_gold)]
        store.add_gold([(question, Answer("first"), "") for question in gold])
        ann = signed_in(store, "ann", settings=settings)
        pages, left, seen = set(), [], []
        while "All done" not in (page := ann.get("/question").text):
            form = fields(page)
            seen.append(given_as(store, form)[0])
            left.append(ann.get("/api/progress").json()["left"])
            back = ann.get("/question/previous").text if len(seen) > 5 else ""
            for text in (page, back):
                for told in (*(q.query_id for q in store.questions()), "1,0", "0,1", "6,5", "5,6"):
                    assert not re.search(rf"\b{told}\b", re.sub(r"text . of \w+<", "", text)), told
            if len(seen) > 5:  # by then there is something to go back to, and a pace
                for value in form.values():
                    page, back = page.replace(value, "_"), back.replace(value, "_")
                pages.add(re.sub(r'of (real|gold)|label:|key" value="\w+|\d+', "", page + back))
            refused = ann.post("/answers", data=form | {"rating": "3"}).text
            assert seen[-1] not in refused
            say(ann, form, choice=("left", "skip")[len(seen) % 2])
        assert sum(query_id.startswith("gold") for query_id in seen) >= min(n_gold, 9)
        assert left == list(range(len(seen), 0, -1))
        assert ann.get("/api/progress").json()["left"] == 0
        assert len(pages) == 2  # after an answer and after a skip, which is filled in when going back


def test_the_page_tells_nothing_of_the_run(tmp_path: Path) -> None:
    """Places of gold questions are drawn from the run's id."""
    with store_of(tmp_path) as store:
        assert "a run" not in client_of(store).get("/").text


def test_a_lead_settles_in_an_order_that_tells_nothing(tmp_path: Path) -> None:
    questions = [ask(f"q{i}") for i in range(16)]
    with store_of(tmp_path, *questions) as store:
        lead = signed_in(store, "lea", "lead")
        likelier_first = set()
        for question in questions:
            address = f"/overview/queries/{question.query_id}"
            page = lead.get(address).text
            shown = tuple(6 - int(i) for i in re.findall(r'<div class="raw">text (\d) of', page))
            assert shown == blind_order(question)
            likelier_first.add(shown == question.completion_ids)
            assert lead.post(address, data=fields(page) | {"choice": "right"}).status_code == 303
            (label,) = store.labels(query_id=question.query_id)
            assert label.shown == shown
            assert label.answer == Answer("first" if shown[1] == 6 else "second")
        assert likelier_first == {True, False}


def test_guidelines_are_shown_as_harmless_markdown(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        page = client_of(store, LabelSettings(guidelines="# Be *kind*\n<script>alert(1)</script>")).get("/").text
        assert "<h1>Be <em>kind</em></h1>" in page
        assert "<script>alert" not in page
        assert client_of(store, LabelSettings(guidelines=" \n")).get("/").text.count("<h2") > 0


def test_a_lead_settles_a_disagreement(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("a/b?c#d é")) as store:
        for name, choice in (("ann", "first"), ("bob", "second")):
            store.record(store.annotator(name).annotator_id, "a/b?c#d é", Answer(choice), key=name)  # type: ignore[arg-type]
        lead = signed_in(store, "lea", "lead")
        page = lead.get("/overview")
        assert page.status_code == 200
        address = re.search(r'href="(/overview/queries/[^"]+)"', page.text)
        assert address is not None
        assert lead.get("/overview/live").text in page.text
        shown = lead.get(address[1])
        assert shown.status_code == 200
        assert "ann" in shown.text
        form = fields(shown.text)
        wrong = lead.post("/overview/queries/other", data=form | {"choice": "left"})
        assert wrong.status_code == 422
        done = lead.post(address[1], data=form | {"choice": "left"})
        assert (done.status_code, done.headers["Location"]) == (303, "/overview")
        part = lead.post(address[1], data=form | {"choice": "left"}, headers={"HX-Request": "true"})
        assert (part.status_code, part.headers["HX-Redirect"]) == (204, "/overview")
        settled = [label for label in store.labels() if label.adjudicated]
        left = blind_order(ask("a/b?c#d é"))[0]
        assert [(label.annotator, label.answer) for label in settled] == [
            ("lea", Answer("first" if left == 6 else "second"))
        ]
        assert [label.shown for label in settled] == [blind_order(ask("a/b?c#d é"))]
        assert lead.get("/overview/queries/none").status_code == 404


def test_the_api_answers_in_the_order_it_gives(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("q1"), ask("k1", "ranking")) as store:
        client = client_of(store, LOGIN, invite(store, "ann"))
        asked = client.get("/api/question").json()
        assert set(asked) == {"question_id", "kind", "messages", "completions", "expires_at"}
        assert sorted(asked["completions"]) == ["text 0 of q1", "text 1 of q1"]
        body = {
            "question_id": asked["question_id"],
            "key": "k",
            "answer": {"choice": "first"},
            "note": "n",
            "seconds": 3,
        }
        reply = client.post("/api/answers", json=body)
        assert reply.status_code == 200
        assert reply.json()["answer"]["choice"] == "first"
        (label,) = store.labels()
        assert label.answer.choice == ("first" if asked["completions"][0] == "text 0 of q1" else "second")
        assert client.post("/api/answers", json=body).json() == reply.json()
        assert client.post("/api/answers", json=body | {"answer": {}}).status_code == 409
        corrected = client.post("/api/answers", json=body | {"answer": {}, "key": "k2"}).json()
        assert corrected["supersedes"] == reply.json()["label_id"]
        for change in (
            {"question_id": ""},
            {"shown": [5, 6]},
            {"answer": {"rating": 3}},
            {"answer": {"choice": "left"}},
            {"answer": {"rating": True}},
            {"answer": {"ranks": [1, 2], "choice": "tie"}},
            {"answer": {"reward": 1}},
            {"note": "\ud800"},
            {"key": "k\0"},
        ):
            text = json.dumps(body | {"key": "k3"} | change)
            refused = client.post("/api/answers", content=text, headers={"Content-Type": "application/json"})
            assert refused.status_code == 422, change
            assert "\n" not in refused.json()["detail"]
            assert not re.search(r"\bq1\b", refused.text)
        assert (
            client.post("/api/answers", content=b"{", headers={"Content-Type": "application/json"}).status_code == 422
        )
        assert len(store.labels(current=False)) == 2


def test_the_api_is_as_blind_as_the_page(tmp_path: Path) -> None:
    best = {"pairwise": "text 0", "ranking": "text 2"}
    with store_of(tmp_path, *[ask(f"the-query-{i}", "ranking" if i % 2 else "pairwise") for i in range(64)]) as store:
        client = client_of(store, LOGIN, invite(store, "ann"))
        orders = set()
        for i in range(64):  # by chance alone all 32 pairs stand in one order once in 2**31 runs
            asked = client.get("/api/question").json()
            query_id, shown = given(store, asked["question_id"])
            orders.add(shown)
            assert asked["completions"] == [f"text {6 - one} of {query_id}" for one in shown]
            good = [text.startswith(best[asked["kind"]]) for text in asked["completions"]]
            answer = (
                {"choice": "first" if good[0] else "second"}
                if asked["kind"] == "pairwise"
                else {"ranks": [1 if one else 2 for one in good]}
            )
            body = {"question_id": asked["question_id"], "key": f"k{i}", "answer": answer}
            reply = client.post("/api/answers", json=body).json()
            said = {name: value for name, value in reply["answer"].items() if value is not None}
            assert (said, reply["question_id"]) == (answer, asked["question_id"])
            # By chance no token holds an id as long as these.
            assert query_id not in json.dumps([asked | {"completions": []}, reply])
        assert len(orders & {(5, 6), (6, 5)}) == 2
        assert len(orders) > 4
        assert {label.answer for label in store.labels()} == {Answer("first"), Answer(ranks=(2, 2, 1, 2))}


def test_the_api_refuses_ranks_that_are_not_one_each(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("k1", "ranking")) as store:
        client = client_of(store)
        asked = client.get("/api/question").json()
        body = {"question_id": asked["question_id"], "key": "k", "answer": {"ranks": [1, 2, 3]}}
        reply = client.post("/api/answers", json=body)
        assert (reply.status_code, "ranks 4 completions" in reply.json()["detail"]) == (422, True)


def test_a_lead_invites_and_revokes_over_the_api(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        lead = client_of(store, LOGIN, invite(store, "lea", "lead"))
        made = lead.post("/api/annotators", json={"name": "ann/é", "days": 1})
        assert made.status_code == 201
        link = made.json()["link"]
        assert link.startswith("http://127.0.0.1:8000/join#")
        ann = client_of(store, LOGIN, link.partition("#")[2])
        assert ann.get("/api/progress").status_code == 200
        assert lead.get("/api/annotators").json()[-1] == {"name": "ann/é", "kind": "person", "role": "annotator"}
        assert lead.post("/api/annotators", json={"name": "ann/é", "role": "lead"}).status_code == 422
        assert lead.delete("/api/annotators/ann%2F%C3%A9/tokens").json() == {"revoked": 1}
        assert ann.get("/api/progress").status_code == 401
        assert lead.delete("/api/annotators/nobody/tokens").status_code == 404
        secure = LabelSettings(login_required=True, secure_cookies=True)
        lead = client_of(store, secure, invite(store, "lea", "lead"))
        assert lead.post("/api/annotators", json={"name": "bo"}).json()["link"].startswith("https://")


@pytest.mark.parametrize(
    "wrong",
    [{"gold_every": -1}, {"lease_seconds": 0}, {"session_seconds": float("inf")}, {"lease_seconds": float("nan")}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        LabelSettings(**wrong)


# -- texts that others wrote -------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


ALLOWED = {
    "a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s",
    "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip


def assert_harmless(html: str) -> None:
    parser = _Tags()
    parser.feed(html)
    for tag, attributes in parser.seen:
        assert tag in ALLOWED
        if tag == "a":
            href = attributes.pop("href", "http://")
            assert re.match(r"(https?://|mailto:)", href or "", re.IGNORECASE), href
            assert attributes == {"target": "_blank", "rel": "noopener nofollow"}
        else:
            assert set(attributes) <= ({"start"} if tag == "ol" else set())


PAYLOADS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](java&#10;script:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x)",
    "[a](//evil.example)",
    "[a](/leave)",
    "[a](\\\\evil.example)",
    '[a](https://x.example "onmouseover=alert(1)")',
    '[a](https://x.example/"onmouseover="alert(1))',
    "![a](https://x.example/pixel.gif)",
    "![<script>](javascript:alert(1))",
    "[![alt](https://i.example)](https://l.example)",
    "<javascript:alert(1)>",
    "<https://x.example/'onclick='alert(1)>",
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "`<b>`",
    "| a |\n|:-:|\n| <style>*{}</style> |",
    "<a href=x id=y class=z style=color:red>",
    "<math><mi//xlink:href='data:x,<script>alert(4)</script>'>",
    "<iframe srcdoc='<script>1</script>'>",
    "<form action=/leave><input name=csrf>",
    "&lt;script&gt;",
    "\N{NULL}<scr\0ipt>",
    "<!-- --><script>",
    "[ref]\n\n[ref]: javascript:alert(1)",
    "1. a\n2. b",
    "999999999. a",
]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_markup_of_others_does_anything(payload: str) -> None:
    assert_harmless(render_markdown(payload))
    for text in compared("", payload):
        assert_harmless(f"<p>{text}</p>".replace("<mark>", "<p>").replace("</mark>", "</p>"))


@drawing(st.lists(st.sampled_from([*PAYLOADS, "\n", " ", "*", "[", "](", ")", "<", ">", "`", "|", "x"]), max_size=12))
@settings(max_examples=200)
def test_no_mixture_of_markup_does_anything(parts: list[str]) -> None:
    assert_harmless(render_markdown("".join(parts)))


def test_markdown_is_rendered() -> None:
    html = render_markdown(
        "# T\n\n**b** *e* ~~s~~ `c`\nnext\n\n- l\n\n| h |\n|---|\n| d |\n\n> q\n\n3. n\n\n[x](https://y.example)"
    )
    for part in ("<h1>T</h1>", "<strong>b</strong>", "<em>e</em>", "<s>s</s>", "<code>c</code><br>", "<li>l</li>"):
        assert part in html
    for part in ("<th>h</th>", "<td>d</td>", "<blockquote>", '<ol start="3">', ">x</a>"):
        assert part in html


def test_images_become_links_that_load_nothing() -> None:
    html = render_markdown("![a *cat*](https://x.example/cat.png) ![](https://x.example/dog.png)")
    assert "<img" not in html
    assert re.search(r'<a href="https://x.example/cat.png"[^>]*>a cat</a>', html)
    assert re.search(r'<a href="https://x.example/dog.png"[^>]*>https://x.example/dog.png</a>', html)


def test_every_link_has_words() -> None:
    assert re.search(
        r'<a href="https://x.example"[^>]*>https://x.example</a>', render_markdown("[](https://x.example)")
    )


def test_what_deceives_the_eye_is_shown() -> None:
    text = "a\u202eb\u2066c\u2069\x00\x1b[31m\x7f\x85\r\ne\tf"
    assert visible(text) == "a[U+202E]b[U+2066]c[U+2069]\u2400\u241b[31m\u2421[U+0085]\ne\tf"
    html = render_markdown(text)
    for hidden in "\u202e\u2066\u2069\x00\x1b\x7f\x85":
        assert hidden not in html
    assert "\u202e" not in "".join(map(str, compared("x", text)))


WORDS = "alpha beta gamma"


@pytest.mark.parametrize(
    "text",
    [
        "[1]: https://x.example\n[2]: y",
        ">" * 200 + " deep",
        "- " * 120 + "deep",
        "*" * 99 + "deep",
        "    code",
        "a\\\nb",
    ],
)
def test_no_part_of_a_text_is_left_out(text: str) -> None:
    html = render_markdown(f"{WORDS}\n\n{text}\n\n{WORDS}")
    for word in re.findall(r"\w+", text):
        assert word in html
    assert html.count(WORDS) == 2


TANGLED = {
    "long": "word *word* " * 17_000,
    "emphasis": "*a **a " * (MAX_MARKS // 3),
    "brackets": "[" * MAX_MARKS,
    "open links": "[a](" * (MAX_MARKS // 3),
    "images": "![[]()" * (MAX_MARKS // 6),
    "quotes": ">" * MAX_MARKS + "a",
    "quoted lists": "> - " * (MAX_MARKS // 2) + "a",
    "deep lists": "\n".join("  " * i + "- a" for i in range(220)),
    "ticks": " ".join("`" * i for i in range(70)),
    "wide table": "|".join("a" * 1400) + "\n" + "|".join("-" * 1400) + "\n" + "a\n" * 15_000,
    "lines": "a\n" * (MAX_CHARACTERS // 2),
    "headings": "# a\n" * (MAX_CHARACTERS // 4),
    "spaces": "a" + " " * (MAX_CHARACTERS - 2) + "b",
    "one word": "a" * 200_000,
}


@pytest.mark.parametrize("name", TANGLED)
def test_tangled_texts_take_work_in_proportion_and_lose_nothing(name: str) -> None:
    render_markdown.cache_clear()
    assert calls_of(lambda: render_markdown(TANGLED[name])) < 100 * len(TANGLED[name])
    html = render_markdown(TANGLED[name])
    assert_harmless(html)
    assert html.count("a") >= TANGLED[name].count("a")


def test_a_page_of_tangled_texts_comes(tmp_path: Path) -> None:
    with store_of(tmp_path, ask("q1", texts=(TANGLED["long"], TANGLED["quotes"]), prompt=TANGLED["one word"])) as store:
        client = client_of(store)
        assert client.get("/").status_code == 200
        assert say(client, current(client), choice="tie")


def compared(*texts: str) -> tuple[str | None, ...]:
    """What is shown of the differences of texts, which stand in this order."""
    ids = tuple(range(len(texts)))
    kind = "pairwise" if len(texts) == 2 else "ranking"
    return differences(Question("q", "p", kind, (Message("user", "x"),), ids[::-1], texts[::-1]), ids)


ANY_WORDS = st.lists(st.sampled_from(["a", "b", "the", "<b>", "&", "\n", " "]), max_size=30).map(" ".join)


@drawing(ANY_WORDS, ANY_WORDS)
@example("", "")
@example("a", "a")
@example("a b", "a\nb")
def test_each_text_stands_there_whole_and_what_is_not_marked_is_in_both(left: str, right: str) -> None:
    unescape = {"&lt;": "<", "&gt;": ">", "&amp;": "&"}
    plain, common, marks = [], [], []
    for html in compared(left, right):
        assert html is not None
        without = re.sub("<mark>.*?</mark>", "", html, flags=re.DOTALL)
        text, unmarked = (
            re.sub("&(lt|gt|amp);", lambda m: unescape[m[0]], re.sub("</?mark>", "", one)) for one in (html, without)
        )
        plain.append(text)
        common.append(unmarked.split())
        marks.append("<mark>" in html)
    assert plain == [left, right]
    assert common[0] == common[1]
    assert any(marks) == (left.split() != right.split())


def test_both_sides_are_marked() -> None:
    left, right = compared("Take one tablet daily, with water.", "Take two tablets, with a glass of water.")
    assert left == "Take <mark>one tablet daily,</mark> with water."
    assert right == "Take <mark>two tablets,</mark> with <mark>a glass of</mark> water."
    # Each is compared with the first; in the first stands out what none of the others has.
    assert compared("a b c", "a b", "a c d", "a b") == ("a b c", "a b", "a c <mark>d</mark>", "a b")
    assert compared("a b c", "a c", "a d c") == ("a <mark>b</mark> c", "a c", "a <mark>d</mark> c")


def test_differences_come_only_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("Take one tablet.", "Take two tablets.")
    with store_of(tmp_path, ask("q1", texts=texts)) as store:
        client = client_of(store)

        def fail(*_: object) -> None:
            raise AssertionError("nobody has asked for differences")

        with monkeypatch.context() as patch:
            patch.setattr("dissonance.feedback.web.pages.differences", fail)
            patch.setattr("difflib.SequenceMatcher", fail)
            page = client.get("/").text
        form = fields(page)
        _, shown = given_as(store, form)
        part = client.get("/question/differences", params={"question": form["question"]}).text
        marked = re.findall(r'<div class="diff" data-place="(\d)">(.*?)</div>', part)
        in_order = ["Take <mark>one tablet.</mark>", "Take <mark>two tablets.</mark>"]
        assert marked == [(str(place), in_order[6 - one]) for place, one in enumerate(shown)]
        assert "<mark>" not in page


def test_a_difference_that_would_take_long_is_not_made() -> None:
    long = ("a b " * 200_000, "b a " * 200_000)
    assert calls_of(lambda: compared(*long)) < 10 * 400_000
    assert compared(*long) == (None, None)
    assert compared("a b " * 400, "b a " * 400) == (None, None)
    assert None not in compared("a b " * 100, "a " * 100 + "b " * 100)
    assert [text is None for text in compared("a", "b " * 5000, "c")] == [False, True, False]


def test_long_texts_are_those_that_fill_a_screen() -> None:
    assert not is_long("a" * 1200)
    assert is_long("a" * 1201)
    assert not is_long("a\n" * 19)
    assert is_long("a\n" * 20)


# -- the real server ---------------------------------------------------------------------------------------------------

SERVER = """
import sys
from pathlib import Path
from dissonance.feedback.store import Store
from dissonance.feedback.web.serve import serve
from dissonance.feedback.web.settings import LabelSettings
with Store.open(Path(sys.argv[1]), "a run") as store:
    serve(store, LabelSettings(), sys.argv[2], 0, lambda url: print(url, flush=True))
    print("ended", flush=True)
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_real_server_says_where_it_is_and_ends_when_told(tmp_path: Path, signal_name: str) -> None:
    import signal

    with store_of(tmp_path):
        pass
    command = [sys.executable, "-c", SERVER, str(tmp_path / "labels.db"), "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(f"{url}/question?token=s3cret", timeout=60) as reply:  # noqa: S310
            assert reply.headers["Server"] is None
            assert set(fields(reply.read().decode())) == {"csrf", "key", "question"}
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as raw:
            raw.sendall(b"POST /answers HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(5):
                raw.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            assert b" 413 " in raw.recv(65536).partition(b"\r\n")[0]
        process.send_signal(getattr(signal, signal_name))
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "ended")
    assert "s3cret" not in err
    assert "Traceback" not in err


def test_a_port_that_is_taken_is_one_clear_line(tmp_path: Path) -> None:
    with store_of(tmp_path) as store, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen at 127.0.0.1 port {port}: .*in use") as error:
            serve(store, LabelSettings(), "127.0.0.1", port, lambda _: None)
        assert "\n" not in str(error.value)
        for host in ("no.such.host.invalid", "::1%nothing", "x" * 300):
            with pytest.raises(SettingsError, match="cannot listen at"):
                serve(store, LOGIN, host, 0, lambda _: None)


@pytest.mark.parametrize("port", [-1, 65536, 70000, 2**40])
def test_a_port_that_is_none_is_refused(tmp_path: Path, port: int) -> None:
    with store_of(tmp_path) as store, pytest.raises(SettingsError, match=f"port {port} is none: use 1 to 65535"):
        serve(store, LabelSettings(), "127.0.0.1", port, lambda _: pytest.fail("the server listens"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])  # noqa: S104
def test_other_machines_need_a_login(tmp_path: Path, host: str) -> None:
    with store_of(tmp_path) as store, pytest.raises(SettingsError, match="require a login"):
        serve(store, LabelSettings(), host, 0, lambda _: None)


def test_a_store_that_is_gone_is_unhealthy(tmp_path: Path) -> None:
    with store_of(tmp_path) as store:
        client = client_of(store)
        assert client.get("/healthz").json() == {"status": "ok"}
        store.close()
        for path in tmp_path.glob("labels.db*"):
            path.unlink()
        (tmp_path / "labels.db").mkdir()
        assert client.get("/healthz").status_code == 503


def test_one_store_many_threads(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with store_of(tmp_path, *[ask(f"q{i}") for i in range(24)]) as store:
        clients = [signed_in(store, f"a{i}") for i in range(6)]

        def label_all(client: TestClient) -> int:
            n = 0
            while (page := client.get("/question").text) and 'name="question"' in page:
                say(client, fields(page), choice="left")
                n += 1
            return n

        with ThreadPoolExecutor(6) as pool:
            counts = list(pool.map(label_all, clients))
        labels = store.labels(current=False)
        assert sum(counts) == len(labels) == 48
        assert len({(label.query_id, label.annotator) for label in labels}) == 48
        assert isinstance(store, Store)
