"""The tables of a round -> questions for annotators."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.errors import DataError, RunError
from dissonance.records import QUERIES_SCHEMA, Message, Question

_CONVERSATIONS = ("messages", "prompt")
_ASKED = ("query_id", "prompt_id", "kind", "completion_ids")
_SIZES = {"pairwise": range(2, 3), "rating": range(1, 2), "ranking": range(2, 1_000_000)}
"""How many completions a query of each kind is about."""


def questions_of_round(folder: Path, round_number: int = 0) -> list[Question]:
    """Every query of the round in this folder with its texts, in the order of asking.

    Texts come from `prompts.parquet` and `completions.parquet`. A run of scores that were brought has conversations
    only if the scored rows had a column `messages` (a list of role and content) or `prompt` (text), and texts only if
    they had a column `text`.

    Raises:
        RunError: nothing was selected yet, a table is damaged or lacks a column, a query is about what the tables do
            not hold, or there are no texts.
    """
    path = folder / "queries.parquet"
    if not path.is_file():
        raise RunError(f"{path} is missing: choose what to ask first, with `dissonance select`")
    try:
        queries = _queries(path)
        ids = pa.array(sorted({query["prompt_id"] for query in queries}), pa.string())
        prompts = _rows(folder / "prompts.parquet", ids)
        completions = _rows(folder / "completions.parquet", ids)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{folder}: its tables cannot be read: {' '.join(str(error).split())}") from error
    categories = {row["prompt_id"]: row.get("category") for row in prompts}
    if any("completion_id" not in row for row in completions[:1]):
        raise RunError(f"{folder / 'completions.parquet'} has no column 'completion_id': sample or score anew")
    texts = {(row["prompt_id"], row["completion_id"]): row.get("text") for row in completions}
    conversations = _conversations(folder, prompts, completions)
    found = [_question(folder, query, categories, texts, conversations) for query in queries]
    return [replace(question, round=round_number) for question in found]


def query_ids_of_round(folder: Path) -> list[str]:
    """The ids of a round's queries alone, in the order of asking.

    Raises:
        RunError: the table is damaged or lacks the column.
    """
    path = folder / "queries.parquet"
    try:
        found: list[str] = pq.read_table(path, columns=["query_id"])["query_id"].to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return found


def _queries(path: Path) -> list[dict[str, Any]]:
    found = pq.read_schema(path)
    for name in _ASKED:
        if name not in found.names:
            raise RunError(f"{path} has no column {name!r}: choose anew what to ask, with `dissonance select`")
        type_, wanted = found.field(name).type, QUERIES_SCHEMA.field(name).type
        if type_ != wanted:
            raise RunError(
                f"{path}: column {name!r} holds {type_}, not {wanted}: "
                "choose anew what to ask, with `dissonance select`"
            )
    queries: list[dict[str, Any]] = pq.read_table(path, columns=list(_ASKED)).to_pylist()
    for number, query in enumerate(queries, 1):
        if not _can_be_asked(query):
            raise RunError(
                f"{path} row {number} is no query that can be asked ({str(query)[:120]}): "
                "choose anew what to ask, with `dissonance select`"
            )
    return queries


def _can_be_asked(query: Mapping[str, Any]) -> bool:
    ids = query["completion_ids"]
    if any(query[name] is None for name in _ASKED) or None in ids or query["kind"] not in _SIZES:
        return False
    return len(set(ids)) == len(ids) and len(ids) in _SIZES[query["kind"]]


def _rows(path: Path, ids: pa.Array) -> list[dict[str, Any]]:
    wanted = ["prompt_id", "category", "messages", "prompt", "completion_id", "text"]
    columns = [name for name in pq.read_schema(path).names if name in wanted]
    rows: list[dict[str, Any]] = pq.read_table(
        path, columns=columns, filters=pc.field("prompt_id").isin(ids)
    ).to_pylist()
    return rows


def _conversations(
    folder: Path, prompts: list[dict[str, Any]], completions: list[dict[str, Any]]
) -> dict[str, tuple[Message, ...]]:
    found: dict[str, tuple[Message, ...]] = {}
    for row in (*completions, *prompts):
        for name in _CONVERSATIONS:
            if row.get(name):
                found[row["prompt_id"]] = _messages(folder, row[name])
    return found


def _messages(folder: Path, value: object) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("user", value),)
    try:
        messages = tuple(Message(m["role"], m["content"]) for m in value)  # type: ignore[attr-defined]
        if all(isinstance(message.content, str) for message in messages):
            return messages
    except (TypeError, KeyError, DataError):
        pass
    raise RunError(f"{folder}: {str(value)[:60]!r} is no conversation: use text, or a list of role and content")


def _question(
    folder: Path,
    query: Mapping[str, Any],
    categories: Mapping[str, str | None],
    texts: Mapping[tuple[str, int], object],
    conversations: Mapping[str, tuple[Message, ...]],
) -> Question:
    prompt_id, ids = query["prompt_id"], tuple(query["completion_ids"])
    answers = [texts.get((prompt_id, i)) for i in ids]
    if prompt_id not in conversations:
        raise RunError(
            f"{folder}: prompt {prompt_id!r} has no conversation to show: "
            "give the scored rows a column prompt or messages"
        )
    for completion_id, answer in zip(ids, answers, strict=True):
        if answer is None:
            raise RunError(
                f"{folder}: prompt {prompt_id!r} lacks the text of a completion: give the scored rows a column text"
            )
        if not isinstance(answer, str):
            raise RunError(
                f"{folder}: the text of completion {completion_id} of prompt {prompt_id!r} is {answer!r}: "
                "it must be text"
            )
    return Question(
        query_id=query["query_id"],
        prompt_id=prompt_id,
        kind=query["kind"],
        messages=conversations[prompt_id],
        completion_ids=ids,
        completions=tuple(map(str, answers)),
        category=categories.get(prompt_id),
    )
