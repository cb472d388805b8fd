"""Rows of the store's tables <-> records; answers <-> the JSON that the store and the exports hold."""

import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row

from dissonance.errors import DataError
from dissonance.records import Answer, Label, Message, Question


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """An answer as the store and the exports write it: only what was said; {} is a skip."""
    values: dict[str, Any] = {"choice": answer.choice, "rating": answer.rating, "safe": answer.safe}
    if answer.ranks is not None:
        values["ranks"] = list(answer.ranks)
    return {name: value for name, value in values.items() if value is not None}


def answer_from_json(values: Mapping[str, Any]) -> Answer:
    """Read `answer_to_json`; a DataError names what is unknown."""
    unknown = set(values) - {"choice", "rating", "safe", "ranks"}
    if unknown:
        raise DataError(f"unknown part {sorted(unknown)[0]!r} of an answer: use choice, rating, safe or ranks")
    ranks = values.get("ranks")
    if ranks is not None and not isinstance(ranks, list | tuple):
        raise DataError(f"ranks {ranks!r} are no list")
    return Answer(values.get("choice"), values.get("rating"), values.get("safe"), None if ranks is None else (*ranks,))


def label_from_row(row: Row[Any]) -> Label:
    """A row of labels joined with its annotator."""
    return Label(
        label_id=row.label_id,
        query_id=row.query_id,
        annotator=row.name,
        annotator_kind=row.kind,
        answer=answer_from_json(row.answer),
        created_at=row.created_at,
        shown=tuple(row.shown),
        seconds=row.seconds,
        note=row.note,
        flagged=row.flagged,
        adjudicated=row.adjudicated,
        supersedes=row.supersedes,
    )


def question_from_row(row: Row[Any]) -> Question:
    """A row of queries."""
    return Question(
        query_id=row.query_id,
        prompt_id=row.prompt_id,
        kind=row.kind,
        messages=tuple(Message(m["role"], m["content"]) for m in row.messages),
        completion_ids=tuple(row.completion_ids),
        completions=tuple(row.completions),
        category=row.category,
        round=row.round,
    )


def question_row(question: Question, position: int, round_number: int, overlap: int, now: float) -> dict[str, Any]:
    """The values of a new row of queries; a DataError where a text cannot be stored."""
    if not 1 <= len(question.query_id) <= 200 or not question.query_id.isprintable():
        raise DataError(f"{question.query_id[:80]!r} is no query_id: use 1 to 200 printable characters")
    if not is_text(question.prompt_id) or not is_text(question.category or ""):
        raise DataError(f"the prompt_id or category of query {question.query_id!r} holds a character that is no text")
    return {
        "query_id": question.query_id,
        "round": round_number,
        "position": position,
        "kind": question.kind,
        "overlap": overlap,
        "added_at": now,
        "prompt_id": question.prompt_id,
        "category": question.category,
        "completion_ids": list(question.completion_ids),
        "messages": [{"role": m.role, "content": m.content} for m in question.messages],
        "completions": list(question.completions),
    }


def is_text(value: str) -> bool:
    """Whether every database can hold it: no NUL, no half of a surrogate pair."""
    return re.search("[\0\ud800-\udfff]", value) is None
