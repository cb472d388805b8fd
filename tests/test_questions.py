"""The tables of a round become questions; tables that are damaged are one line each."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dissonance.errors import RunError
from dissonance.feedback.questions import questions_of_round
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, QUERIES_SCHEMA, Message, Question

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
QUERIES = [
    {"query_id": "k", "prompt_id": "p2", "kind": "ranking", "completion_ids": [4, 0, 2]},
    {"query_id": "c", "prompt_id": "p1", "kind": "pairwise", "completion_ids": [3, 1]},
    {"query_id": "r", "prompt_id": "p1", "kind": "rating", "completion_ids": [1]},
]
PROMPTS = [
    {"prompt_id": "p1", "messages": TALK, "category": "sums"},
    {"prompt_id": "p2", "messages": TALK[1:], "category": None},
    {"prompt_id": "p3", "messages": TALK, "category": "not asked"},
]
COMPLETIONS = [
    {"prompt_id": prompt, "completion_id": i, "text": f"{prompt}/{i}", "reward": 9.0}
    for prompt in ("p1", "p2", "p3")
    for i in range(5)
]


def write(folder: Path, name: str, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> None:
    """Write a table; with a schema, with the columns of it that the rows have."""
    if schema is not None:
        schema = pa.schema([field for field in schema if field.name in rows[0]])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{name}.parquet")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A round that was sampled, scored and selected here."""
    write(tmp_path, "queries", QUERIES, QUERIES_SCHEMA)
    write(tmp_path, "prompts", PROMPTS, PROMPTS_SCHEMA)
    write(tmp_path, "completions", COMPLETIONS, COMPLETIONS_SCHEMA)
    return tmp_path


def brought(folder: Path, **columns: Any) -> None:
    """Replace the tables by those of scores that were brought, with these columns beside the text."""
    write(folder, "prompts", [{"prompt_id": name} for name in ("p1", "p2")])
    write(folder, "completions", [row | columns for row in COMPLETIONS if row["prompt_id"] != "p3"])


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        questions_of_round(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_questions_of_every_kind_come_in_the_order_of_asking(folder: Path) -> None:
    system, user = Message("system", "Be brief."), Message("user", "Hi")
    assert questions_of_round(folder) == [
        Question("k", "p2", "ranking", (user,), (4, 0, 2), ("p2/4", "p2/0", "p2/2"), None),
        Question("c", "p1", "pairwise", (system, user), (3, 1), ("p1/3", "p1/1"), "sums"),
        Question("r", "p1", "rating", (system, user), (1,), ("p1/1",), "sums"),
    ]


def test_questions_know_their_round(folder: Path) -> None:
    assert {question.round for question in questions_of_round(folder)} == {0}
    assert {question.prompt for question in questions_of_round(folder, 3)} == {(3, "p1"), (3, "p2")}


def test_a_round_that_asks_nothing_has_no_questions(folder: Path) -> None:
    pq.write_table(QUERIES_SCHEMA.empty_table(), folder / "queries.parquet")
    assert questions_of_round(folder) == []


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": TALK}, (Message("system", "Be brief."), Message("user", "Hi"))),
        ({"prompt": "Hi there"}, (Message("user", "Hi there"),)),
        ({"prompt": TALK}, (Message("system", "Be brief."), Message("user", "Hi"))),
        ({"prompt": "Hi there", "messages": None}, (Message("user", "Hi there"),)),
    ],
)
def test_scores_that_were_brought_may_have_conversations(
    folder: Path, columns: dict[str, Any], expected: tuple[Message, ...]
) -> None:
    brought(folder, **columns)
    found = questions_of_round(folder)
    assert [question.messages for question in found] == [expected] * 3
    assert [question.completions for question in found][1] == ("p1/3", "p1/1")
    assert {question.category for question in found} == {None}


def test_conversations_and_texts_must_be_there(folder: Path) -> None:
    brought(folder)
    assert "prompt 'p2' has no conversation to show: give the scored rows a column prompt" in refusal(folder)
    write(folder, "completions", [{"prompt_id": "p2", "completion_id": 0, "prompt": "Hi"}])
    assert "prompt 'p2' lacks the text of a completion" in refusal(folder)
    texts = [{"prompt_id": "p2", "completion_id": i, "prompt": "Hi", "text": None if i else "x"} for i in range(5)]
    write(folder, "completions", texts)
    assert "prompt 'p2' lacks the text of a completion" in refusal(folder)
    write(folder, "completions", [row | {"text": i} for i, row in enumerate(texts)])
    assert "the text of completion 4 of prompt 'p2' is 4: it must be text" in refusal(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user"}]),
        ("messages", ["user"]),
        ("messages", [5]),
        ("prompt", 5),
        ("prompt", b"bytes"),
    ],
)
def test_what_is_no_conversation_is_named(folder: Path, column: str, value: Any) -> None:
    brought(folder, **{column: value})
    assert "is no conversation: use text, or a list of role" in refusal(folder)


def test_nothing_selected_yet_says_what_to_run(folder: Path) -> None:
    (folder / "queries.parquet").unlink()
    assert "choose what to ask first, with `dissonance select`" in refusal(folder)


@pytest.mark.parametrize("column", ["query_id", "prompt_id", "kind", "completion_ids"])
def test_queries_need_their_columns(folder: Path, column: str) -> None:
    rows = [{name: value for name, value in query.items() if name != column} for query in QUERIES]
    write(folder, "queries", rows, QUERIES_SCHEMA)
    assert f"queries.parquet has no column {column!r}: " in refusal(folder)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("query_id", 1),
        ("prompt_id", 2.5),
        ("prompt_id", ["p1"]),
        ("kind", True),
        ("completion_ids", 3),
        ("completion_ids", ["a"]),
        ("completion_ids", [0.5]),
    ],
)
def test_columns_of_another_type_are_named(folder: Path, column: str, value: Any) -> None:
    write(folder, "queries", [query | {column: value} for query in QUERIES])
    assert f"queries.parquet: column {column!r} holds " in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [{"query_id": None}, {"prompt_id": None}, {"kind": None}, {"kind": "essay"}, {"completion_ids": None},
     {"completion_ids": [0, None]}, {"completion_ids": []}, {"completion_ids": [1, 1]}, {"kind": "rating"}],
)  # fmt: skip
def test_a_query_that_cannot_be_asked_is_named(folder: Path, change: dict[str, Any]) -> None:
    write(folder, "queries", [QUERIES[0], QUERIES[1] | change], QUERIES_SCHEMA)
    assert "queries.parquet row 2 is no query that can be asked" in refusal(folder)


@pytest.mark.parametrize("name", ["queries", "prompts", "completions"])
def test_a_damaged_table_is_one_line(folder: Path, name: str) -> None:
    path = folder / f"{name}.parquet"
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1 nonsense PAR1", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert "tables cannot be read: " in refusal(folder)


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_table_without_its_ids_is_one_line(folder: Path, name: str) -> None:
    (folder / f"{name}.parquet").unlink()
    assert "tables cannot be read: " in refusal(folder)
    write(folder, name, [{"text": "x"}])
    assert "tables cannot be read: " in refusal(folder)
    write(folder, name, [{"prompt_id": 1, "completion_id": 1}])
    assert "tables cannot be read: " in refusal(folder)


def test_completions_without_numbers_are_one_line(folder: Path) -> None:
    write(folder, "completions", [{"prompt_id": "p1", "text": "x"}])
    assert "completions.parquet has no column 'completion_id'" in refusal(folder)
