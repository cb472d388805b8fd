"""The tables of a round -> questions for annotators."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.errors import RunError
from dissonance.records import Message, Question

_CONVERSATIONS = ("messages", "prompt")


def questions_of_round(folder: Path) -> list[Question]:
    """Every query of a round with its texts, in the order of asking.

    Texts come from `prompts.parquet` and `completions.parquet`. A run of scores that were brought has conversations
    only if the scored rows had a column `messages` (a list of role and content) or `prompt` (text), and texts only if
    they had a column `text`.

    Raises:
        RunError: nothing was selected yet, a query is about what the tables do not hold, or there are no texts.
    """
    path = folder / "queries.parquet"
    if not path.is_file():
        raise RunError(f"{path} is missing: choose what to ask first, with `dissonance select`")
    try:
        queries = pq.read_table(path).to_pylist()
        ids = pa.array(sorted({query["prompt_id"] for query in queries}), pa.string())
        prompts = _rows(folder / "prompts.parquet", ids)
        completions = _rows(folder / "completions.parquet", ids)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{folder}: its tables cannot be read: {' '.join(str(error).split())}") from error
    categories = {row["prompt_id"]: row.get("category") for row in prompts}
    texts = {(row["prompt_id"], row["completion_id"]): row.get("text") for row in completions}
    conversations = _conversations(folder, prompts, completions)
    return [_question(folder, query, categories, texts, conversations) for query in queries]


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
        return tuple(Message(m["role"], m["content"]) for m in value)  # type: ignore[attr-defined]
    except (TypeError, KeyError) as error:
        raise RunError(
            f"{folder}: {str(value)[:60]!r} is no conversation: use text, or a list of role and content"
        ) from (error)


def _question(
    folder: Path,
    query: Mapping[str, Any],
    categories: Mapping[str, str | None],
    texts: Mapping[tuple[str, int], str | None],
    conversations: Mapping[str, tuple[Message, ...]],
) -> Question:
    prompt_id, ids = query["prompt_id"], tuple(query["completion_ids"])
    answers = [texts.get((prompt_id, i)) for i in ids]
    if prompt_id not in conversations:
        raise RunError(
            f"{folder}: prompt {prompt_id!r} has no conversation to show: "
            "give the scored rows a column prompt or messages"
        )
    if any(answer is None for answer in answers):
        raise RunError(
            f"{folder}: prompt {prompt_id!r} lacks the text of a completion: give the scored rows a column text"
        )
    return Question(
        query_id=query["query_id"],
        prompt_id=prompt_id,
        kind=query["kind"],
        messages=conversations[prompt_id],
        completion_ids=ids,
        completions=tuple(str(answer) for answer in answers),
        category=categories.get(prompt_id),
    )
