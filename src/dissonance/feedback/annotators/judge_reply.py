"""From what a judge wrote to an answer: JSON found in the text, validated, and put in terms of the question."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ValidationError

from dissonance.feedback.annotators.judge_prompt import labels, shown
from dissonance.feedback.annotators.texts import storable
from dissonance.records import Answer, Choice, Question


class ReplyError(Exception):
    """A reply that cannot be read; the message says why, for the judge to read."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one reply says."""

    answer: Answer
    reason: str = ""


def _plain(value: object) -> object:
    if not isinstance(value, str):
        return value
    word = value.strip().strip(".")
    return word.upper() if len(word) == 1 else word.lower().replace(" ", "_").replace("-", "_")


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("use a whole number")  # pydantic reports ValueErrors
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def _text(value: object) -> str:
    # Cleaned here too: what is no character in the reply may be one in its JSON (\\u0000).
    return storable(value if isinstance(value, str) else "" if value is None else str(value))


_Reason = Annotated[str, BeforeValidator(_text)]


class _Pairwise(BaseModel):
    answer: Annotated[Literal["A", "B", "tie", "both_bad"], BeforeValidator(_plain)]
    reason: _Reason = ""


class _Rating(BaseModel):
    answer: Annotated[Literal[1, 2, 3, 4, 5], BeforeValidator(_number)]
    reason: _Reason = ""


class _SafeRating(_Rating):
    safe: bool


class _Ranking(BaseModel):
    answer: list[Annotated[str, BeforeValidator(_plain)]]
    reason: _Reason = ""


def read_reply(reply: str, question: Question, variant: int, *, ask_safety: bool = False) -> Verdict:
    """Read one reply to one variant of a question.

    The JSON may stand by itself, in a Markdown fence or between other words; thoughts in <think> are passed over.

    Raises:
        ReplyError: there is no such JSON, it is not what was asked for, or there are several that differ.
    """
    rating = _SafeRating if ask_safety else _Rating
    form: type[BaseModel] = {"pairwise": _Pairwise, "rating": rating, "ranking": _Ranking}[question.kind]
    found = list(_objects(reply.rpartition("</think>")[2]))
    if not found:
        raise ReplyError('there is no JSON object with "answer" in it')
    try:
        read = [form.model_validate(value) for value in found]
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ReplyError(f'"{where}": {problem["msg"]}') from error
    verdicts = [Verdict(_answer(value, question, variant), getattr(value, "reason", "")) for value in read]
    if len({verdict.answer for verdict in verdicts}) > 1:
        raise ReplyError("it holds several answers that differ")
    return verdicts[-1]


def combine(question: Question, verdicts: Sequence[Verdict]) -> tuple[Answer, bool]:
    """One answer from those to each variant, and whether they agree.

    Two comparisons that differ make a tie. Two rankings are merged by the sum of their ranks.
    """
    first, *others = (verdict.answer for verdict in verdicts)
    if all(other == first for other in others):
        return first, True
    if question.kind == "pairwise":
        return Answer(choice="tie"), False
    sums = [sum(ranks) for ranks in zip(*(verdict.answer.ranks or () for verdict in verdicts), strict=True)]
    places = sorted(set(sums))
    return Answer(ranks=tuple(places.index(value) + 1 for value in sums)), False


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every outermost JSON object in a text that has an "answer"."""
    decoder, position = json.JSONDecoder(), 0
    while (start := text.find("{", position)) >= 0:
        try:
            value, position = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            position = start + 1
            continue
        if "answer" in value:
            yield value


def _answer(value: Any, question: Question, variant: int) -> Answer:
    if question.kind == "rating":
        return Answer(rating=value.answer, safe=getattr(value, "safe", None))
    places = shown(question, variant)
    names = labels(len(places))
    if question.kind == "pairwise":
        sides: tuple[Choice, Choice] = ("first", "second")
        return Answer(choice=sides[places[names.index(value.answer)]] if value.answer in names else value.answer)
    order = [re.sub(r"^answer_", "", name).upper() for name in value.answer]
    if sorted(order) != sorted(names):
        raise ReplyError(f'"answer" must name each of {", ".join(names)} once')
    ranks = [0] * len(places)
    for rank, name in enumerate(order, start=1):
        ranks[places[names.index(name)]] = rank
    return Answer(ranks=tuple(ranks))
