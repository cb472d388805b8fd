"""Files of questions whose answer is known: each kind comes in, and every bad line is named with what to do."""

import json
import re

import pytest

from dissonance.errors import DataError
from dissonance.feedback.gold_questions import read_gold_questions
from dissonance.feedback.store import Store
from dissonance.records import Answer, Message

PAIR = {"prompt": "2 + 2?", "completions": ["4", "5"], "answer": {"choice": "first"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gold.jsonl"


def written(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def only(path, row):
    """The question, answer and reason of a file of one row."""
    (gold,) = read_gold_questions(written(path, row))
    return gold


def refused(path, *words):
    """The file is refused with one line that says all this."""
    with pytest.raises(DataError) as caught:
        read_gold_questions(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# -- good files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "completions", "said", "answer"),
    [
        ("pairwise", ["4", "5"], {"choice": "first"}, Answer("first")),
        ("pairwise", ["4", "four"], {"choice": "tie"}, Answer("tie")),
        ("pairwise", ["6", "5"], {"choice": "both_bad"}, Answer("both_bad")),
        ("rating", ["4"], {"rating": 4, "safe": True}, Answer(rating=4, safe=True)),
        ("rating", ["4"], {"safe": False}, Answer(safe=False)),
        ("ranking", ["5", "4", "6"], {"ranks": [2, 1, 2]}, Answer(ranks=(2, 1, 2))),
    ],
)
def test_each_kind_comes_in(path, kind, completions, said, answer):
    row = {"kind": kind, "prompt": "2 + 2?", "completions": completions, "answer": said, "why": "arithmetic"}
    question, known, why = only(path, row)
    assert (question.kind, question.completions, known, why) == (kind, tuple(completions), answer, "arithmetic")
    assert question.completion_ids == tuple(range(len(completions)))
    assert question.messages == (Message("user", "2 + 2?"),)
    assert question.category is None


def test_a_question_is_a_pair_without_a_reason_unless_it_says_otherwise(path):
    question, _, why = only(path, PAIR)
    assert (question.kind, why) == ("pairwise", "")


def test_a_conversation_in_messages(path):
    turns = [("system", "Be brief."), ("user", "2 + 2?"), ("assistant", "4"), ("user", "Sure?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    question, *_ = only(path, {"messages": messages, "completions": ["Yes", "No"], "answer": {"choice": "first"}})
    assert question.messages == tuple(Message(*turn) for turn in turns)


def test_lines_come_in_order_and_blank_ones_are_nothing(path):
    rows = [PAIR | {"prompt": f"{n} + {n}?"} for n in range(3)]
    path.write_text("\ufeff" + "\r\n \r\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_gold_questions(path)
    assert [question.messages[0].content for question, *_ in found] == ["0 + 0?", "1 + 1?", "2 + 2?"]


def test_any_text_comes_through(path):
    strange = "é \u2028 \u2029 \x85 👩‍🚀"
    path.write_text(json.dumps(PAIR | {"prompt": strange, "why": strange}, ensure_ascii=False), encoding="utf-8")
    ((question, _, why),) = read_gold_questions(path)
    assert (question.messages[0].content, why) == (strange, strange)
    half, *_ = only(path, PAIR | {"prompt": "\ud800"})
    assert half.messages[0].content == "\ud800"


def test_nothing_in_the_ids_tells_a_gold_question_from_the_others(path):
    question, *_ = only(path, PAIR)
    # As `select` names the queries it chooses.
    assert re.fullmatch("[0-9a-f]{16}", question.query_id)
    assert re.fullmatch("[0-9a-f]{16}", question.prompt_id)


def test_an_id_is_that_of_the_question_whatever_its_answer(path):
    question, *_ = only(path, PAIR)
    same = [
        PAIR | {"answer": {"choice": "second"}, "why": "because"},
        PAIR | {"kind": "pairwise"},
        {name: PAIR[name] for name in ("completions", "answer")}
        | {"messages": [{"role": "user", "content": "2 + 2?"}]},
    ]
    assert {only(path, row)[0].query_id for row in same} == {question.query_id}
    other = [
        PAIR | {"prompt": "3 + 1?"},
        PAIR | {"completions": ["5", "4"]},
        PAIR | {"kind": "ranking", "answer": {"ranks": [1, 2]}},
    ]
    ids = {only(path, row)[0].query_id for row in other}
    assert len(ids) == 3
    assert question.query_id not in ids


def test_a_store_takes_what_was_read(path, tmp_path):
    gold = read_gold_questions(written(path, PAIR, PAIR | {"prompt": "\0 \ud800"}))
    with Store.open(tmp_path / "labels.db", "run") as store:
        assert store.add_gold(gold) == 2
        assert store.add_gold(read_gold_questions(path)) == 0
        assert store.questions() == [question for question, *_ in gold]
        assert store.gold() == {question.query_id: answer for question, answer, _ in gold}


# -- bad files ---------------------------------------------------------------------------------------------------------

BAD = {
    "no object": ([1, 2], "no JSON object"),
    "an unknown key": (PAIR | {"reward": 1}, "unknown key 'reward': use answer, completions, kind,"),
    "an unknown kind": (PAIR | {"kind": "duel"}, "unknown kind 'duel': use pairwise, rating, ranking"),
    "a kind that is no text": (PAIR | {"kind": ["pairwise"]}, "unknown kind ['pairwise']"),
    "no completions": ({"prompt": "x", "answer": {"choice": "first"}}, "completions must be a list of texts"),
    "completions that are one text": (PAIR | {"completions": "45"}, "completions must be a list of texts"),
    "completions that are numbers": (PAIR | {"completions": [4, 5]}, "completions must be a list of texts"),
    "three in a pair": (PAIR | {"completions": ["4", "5", "6"]}, "pairwise query cannot ask about completions (0, 1"),
    "one to rank": (PAIR | {"kind": "ranking", "completions": ["4"]}, "a ranking query cannot ask about"),
    "two to rate": (PAIR | {"kind": "rating"}, "a rating query cannot ask about"),
    "no prompt": (
        {"completions": ["4", "5"], "answer": {"choice": "first"}},
        "give either a prompt (text) or messages",
    ),
    "prompt and messages": (
        PAIR | {"messages": [{"role": "user", "content": "3?"}]},
        "give either a prompt (text) or messages",
    ),
    "a prompt that is no text": (PAIR | {"prompt": 5}, "the prompt must be a text, not '5'"),
    "no answer": ({"prompt": "x", "completions": ["4", "5"]}, "answer must be an object such as"),
    "an answer that is no object": (PAIR | {"answer": "first"}, "answer must be an object such as"),
    "a skip": (PAIR | {"answer": {}}, "needs an answer, not a skip"),
    "an unknown part of an answer": (PAIR | {"answer": {"winner": 1}}, "unknown part 'winner' of an answer"),
    "an unknown choice": (PAIR | {"answer": {"choice": "left"}}, "unknown choice 'left'"),
    "a choice that is no text": (PAIR | {"answer": {"choice": ["first"]}}, "unknown choice ['first']"),
    "a rating of a pair": (PAIR | {"answer": {"rating": 4}}, "it takes a choice"),
    "a rating out of range": (
        PAIR | {"kind": "rating", "completions": ["4"], "answer": {"rating": 6}},
        "unknown rating 6",
    ),
    "too few ranks": (PAIR | {"kind": "ranking", "answer": {"ranks": [1]}}, "ranks 2 completions, got (1,)"),
    "ranks that are no list": (PAIR | {"kind": "ranking", "answer": {"ranks": "12"}}, "ranks '12' are no list"),
    "ranks that are no numbers": (PAIR | {"kind": "ranking", "answer": {"ranks": ["a", {}]}}, "not whole numbers"),
    "a reason that is no text": (PAIR | {"why": ["because"]}, "why must be a text, not \"['because']\""),
    "a reason that is null": (PAIR | {"why": None}, "why must be a text, not 'None'"),
    "a reason with a NUL": (PAIR | {"why": "a\0"}, "why must be a text, not 'a\\x00'"),
    "a reason with half a pair": (PAIR | {"why": "\ud800"}, "why must be a text, not '\\ud800'"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(path, row, message):
    refused(written(path, PAIR, row), f"{path}, line 2: ", message)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of role and content"),
        ("2 + 2?", "messages must be a list of role and content"),
        ({"role": "user", "content": "2 + 2?"}, "messages must be a list of role and content"),
        (["2 + 2?"], "messages must be a list of role and content"),
        ([{"role": "user"}], "messages must be a list of role and content"),
        ([{"role": "user", "content": 4}], "messages must be a list of role and content, both texts"),
        ([{"role": 1, "content": "2 + 2?"}], "messages must be a list of role and content, both texts"),
        ([{"role": "bot", "content": "2 + 2?"}], "unknown role 'bot'"),
    ],
)
def test_messages_that_are_none(path, messages, message):
    row = {"messages": messages, "completions": ["4", "5"], "answer": {"choice": "first"}}
    refused(written(path, row), f"{path}, line 1: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": ', "no JSON object: "),
        ("4" * 5000, "no JSON object: "),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": "x", "messages": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
    ids=["cut short", "a long number", "deep and unclosed", "deep"],
)
def test_a_line_that_is_no_json(path, line, message):
    path.write_text(f"{json.dumps(PAIR)}\n\n{line}\n")
    refused(path, f"{path}, line 3: ", message)


def test_the_same_question_twice(path):
    refused(
        written(path, PAIR, PAIR | {"prompt": "1?"}, PAIR | {"why": "x"}), ", line 3: the same question as in line 1"
    )


def test_a_file_without_questions(path):
    path.write_text("\n \n")
    refused(path, f"{path} holds no questions")


def test_a_file_that_cannot_be_read(tmp_path, path):
    refused(path, "gold.jsonl' cannot be read", "No such file")
    refused(tmp_path, "cannot be read", "Is a directory")
    refused(tmp_path / "a\0", "cannot be read", "null byte")
    path.write_bytes(b"\xff\xfe{}")
    refused(path, "cannot be read", "utf-8")
