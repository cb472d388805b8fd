"""A file of questions whose answer is known -> gold questions.

An annotator is shown the query_id, so those of gold questions are like any others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from dissonance.errors import DataError
from dissonance.feedback.rows import answer_from_json, is_text
from dissonance.records import Answer, Message, Query, QueryKind, Question

_KEYS = {"kind", "prompt", "messages", "completions", "answer", "why"}


def read_gold_questions(path: Path) -> list[tuple[Question, Answer, str]]:
    """Read JSON lines: kind, prompt (text) or messages, completions (texts), answer, and why it is right (optional).

    `answer` is `{"choice": "first"}`, `{"rating": 4, "safe": true}` or `{"ranks": [2, 1]}`.

    Raises:
        DataError: the file or a line of it cannot be used; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    found: dict[str, tuple[Question, Answer, str]] = {}
    lines: dict[str, int] = {}
    # Not splitlines: JSON texts may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            gold = _gold(json.loads(line))
            query_id = gold[0].query_id
            if query_id in found:
                raise DataError(f"the same question as in line {lines[query_id]}: keep one of them")
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON object: {error}") from error
        except RecursionError as error:
            raise DataError(f"{path}, line {number}: no JSON object of a question: it is nested too deep") from error
        found[query_id], lines[query_id] = gold, number
    if not found:
        raise DataError(f"{path} holds no questions")
    return list(found.values())


def other_kinds(known: Sequence[Question], asked: Sequence[Question]) -> str:
    """Say which gold questions give themselves away by a kind that is not asked otherwise; nothing where none does."""
    kinds = {question.kind for question in asked}
    strange = [question.kind for question in known if question.kind not in kinds]
    if not strange or not kinds:
        return ""
    return (
        f"warning: {len(strange)} of {len(known)} gold questions give themselves away: their kind is "
        f"{' or '.join(sorted(set(strange)))}, and this run asks {' and '.join(sorted(kinds))} questions alone"
    )


def _gold(row: object) -> tuple[Question, Answer, str]:
    if not isinstance(row, dict):
        raise DataError("no JSON object")
    if unknown := sorted(set(row) - _KEYS):
        raise DataError(f"unknown key {unknown[0]!r}: use {', '.join(sorted(_KEYS))}")
    kind, completions, why = row.get("kind", "pairwise"), row.get("completions"), row.get("why", "")
    if kind not in get_args(QueryKind):
        raise DataError(f"unknown kind {kind!r}: use {', '.join(get_args(QueryKind))}")
    if not isinstance(completions, list) or not all(isinstance(text, str) for text in completions):
        raise DataError("completions must be a list of texts")
    if not isinstance(why, str) or not is_text(why):
        raise DataError(f"why must be a text, not {str(why)[:80]!r}")
    messages = _messages(row)
    prompt_id = _id([[message.role, message.content] for message in messages])
    ids = tuple(range(len(completions)))
    Query(prompt_id, kind, ids, 0.0, "")  # as many completions as the kind asks about
    question = Question(_id([prompt_id, kind, completions]), prompt_id, kind, messages, ids, tuple(completions))
    answer = _answer(row.get("answer"))
    answer.fits(question)
    return question, answer, why


def _id(content: list[Any]) -> str:
    # Escaped, so that half of a surrogate pair, which JSON can hold, is nothing special.
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise DataError("give either a prompt (text) or messages")
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    if prompt is not None:
        raise DataError(f"the prompt must be a text, not {str(prompt)[:80]!r}")
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a list of role and content")
    return tuple(map(_message, messages))


def _message(value: object) -> Message:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
        raise DataError("messages must be a list of role and content, both texts")
    return Message(value["role"], value["content"])


def _answer(value: object) -> Answer:
    if not isinstance(value, dict):
        raise DataError('answer must be an object such as {"choice": "first"}')
    answer = answer_from_json(value)
    if answer.skipped:
        raise DataError("a gold question needs an answer, not a skip")
    return answer
