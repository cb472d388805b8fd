"""A file of questions whose answer is known -> gold questions."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dissonance.errors import DataError
from dissonance.feedback.rows import answer_from_json
from dissonance.records import Answer, Message, Query, QueryKind, Question

_KEYS = {"kind", "prompt", "messages", "completions", "answer", "why"}


def read_gold_questions(path: Path) -> list[tuple[Question, Answer, str]]:
    """Read JSON lines: kind, prompt (text) or messages, completions (texts), answer, and why it is right (optional).

    `answer` is `{"choice": "first"}`, `{"rating": 4, "safe": true}` or `{"ranks": [2, 1]}`.

    Raises:
        DataError: the file or a line of it cannot be used; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_gold(json.loads(line)))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON object: {error}") from error
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if not found:
        raise DataError(f"{path} holds no questions")
    return found


def _gold(row: object) -> tuple[Question, Answer, str]:
    if not isinstance(row, dict):
        raise DataError("no JSON object")
    if unknown := sorted(set(row) - _KEYS):
        raise DataError(f"unknown key {unknown[0]!r}: use {', '.join(sorted(_KEYS))}")
    kind, completions = row.get("kind", "pairwise"), row.get("completions")
    if kind not in get_args(QueryKind):
        raise DataError(f"unknown kind {kind!r}: use {', '.join(get_args(QueryKind))}")
    if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
        raise DataError("completions must be a list of texts")
    canonical = json.dumps([row.get("prompt"), row.get("messages"), kind, completions], ensure_ascii=False)
    query_id = f"gold-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
    ids = tuple(range(len(completions)))
    Query(query_id, kind, ids, 0.0, "")  # as many completions as the kind asks about
    question = Question(query_id, query_id, kind, _messages(row), ids, tuple(completions))
    answer = _answer(row.get("answer"))
    answer.fits(question)
    return question, answer, str(row.get("why", ""))


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if isinstance(row.get("prompt"), str):
        return (Message("user", row["prompt"]),)
    messages = row.get("messages")
    try:
        found = tuple(Message(m["role"], m["content"]) for m in messages or ())
    except (TypeError, KeyError) as error:
        raise DataError("messages must be a list of role and content") from error
    if not found:
        raise DataError("give a prompt (text) or messages")
    return found


def _answer(value: object) -> Answer:
    if not isinstance(value, dict):
        raise DataError('answer must be an object such as {"choice": "first"}')
    answer = answer_from_json(value)
    if answer.skipped:
        raise DataError("a gold question needs an answer, not a skip")
    return answer
