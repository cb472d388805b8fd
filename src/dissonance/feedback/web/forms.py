"""Answers as the page's form sends them, in terms of what stood left and right <-> `Answer`."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field

from dissonance.errors import DataError
from dissonance.records import Answer, Choice, Question

NOTE_CHARACTERS = 20_000
MAX_SECONDS = 1e7
KEY_PATTERN = r"^[!-~]{1,64}$"

_SKIP = "skip"


def _clean(text: object) -> object:
    # Forms end lines with CRLF. PostgreSQL holds every character but NUL.
    if not isinstance(text, str):
        return text
    return text.replace("\r\n", "\n").replace("\0", "\N{REPLACEMENT CHARACTER}")


Key = Annotated[str, Field(pattern=KEY_PATTERN, description="New for each answer; sent again, the answer counts once.")]
Handle = Annotated[str, Field(min_length=1, max_length=220, pattern=r"^[^\x00]+$")]
QueryId = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
Note = Annotated[str, BeforeValidator(_clean), Field(max_length=NOTE_CHARACTERS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


def _none_if_blank(value: object) -> object:
    return None if value == "" else value


class AnswerForm(BaseModel):
    """The fields of the form on the labelling page."""

    question: Handle
    key: Key
    choice: Literal["left", "right", "tie", "both_bad", "skip", ""] = ""
    rating: Literal["1", "2", "3", "4", "5", "skip", ""] = ""
    safe: Literal["yes", "no", ""] = ""
    ranks: Annotated[str, Field(pattern=r"^(|skip|[0-9]{1,9}(,[0-9]{1,9}){0,99})$")] = ""
    seconds: Annotated[Seconds | None, BeforeValidator(_none_if_blank)] = None
    note: Note = ""
    flagged: Literal["on", ""] = ""


def answer_of(form: AnswerForm, question: Question, shown: tuple[int, ...]) -> Answer:
    """What the form says of the question, whose completions stood in the order of `shown`.

    Raises:
        DataError: it says nothing, several things, or something that this question does not take.
    """
    given = [name for name in ("choice", "rating", "ranks") if getattr(form, name)]
    if len(given) > 1:
        raise DataError(f"the form gives both {given[0]} and {given[1]}: give one")
    if not given and not form.safe:
        raise DataError("the form gives no answer: send choice, rating or ranks; `skip` passes the question on")
    answer = _said(form, question, shown)
    answer.fits(question)
    return answer


def _said(form: AnswerForm, question: Question, shown: tuple[int, ...]) -> Answer:
    if _SKIP in {form.choice, form.rating, form.ranks}:
        return Answer()
    if form.choice:
        return Answer(choice=_choice(form.choice, question, shown))
    if form.ranks:
        return Answer(ranks=_ranks(form.ranks, question, shown))
    safe = {"yes": True, "no": False}.get(form.safe)
    return Answer(rating=int(form.rating) if form.rating else None, safe=safe)


def reordered(answer: Answer, of: tuple[int, ...], to: tuple[int, ...]) -> Answer:
    """An answer about completions in one order, in terms of another order of them; `of` and `to` are completion_ids."""
    if answer.choice in {"first", "second"} and of != to:
        return Answer(choice="second" if answer.choice == "first" else "first")
    if answer.ranks is not None:
        rank_of = dict(zip(of, answer.ranks, strict=True))
        return Answer(ranks=tuple(rank_of[i] for i in to))
    return answer


def _choice(choice: str, question: Question, shown: tuple[int, ...]) -> Choice:
    if choice == "tie":
        return "tie"
    if choice == "both_bad":
        return "both_bad"
    meant = shown[0 if choice == "left" else -1]
    return "first" if meant == question.completion_ids[0] else "second"


def _ranks(ranks: str, question: Question, shown: tuple[int, ...]) -> tuple[int, ...]:
    values = tuple(map(int, ranks.split(",")))
    if len(values) != len(shown):
        raise DataError(f"question {question.query_id!r} ranks {len(shown)} completions, got {len(values)} ranks")
    by_id = dict(zip(shown, values, strict=True))
    return tuple(by_id[i] for i in question.completion_ids)


def fields_of(answer: Answer, question: Question, shown: tuple[int, ...]) -> Mapping[str, str]:
    """The form's values that say `answer`: what `answer_of` reads, the other way round."""
    if answer.skipped:
        return {{"pairwise": "choice", "rating": "rating", "ranking": "ranks"}[question.kind]: _SKIP}
    if answer.choice in {"first", "second"}:
        meant = question.completion_ids[0 if answer.choice == "first" else 1]
        return {"choice": "left" if meant == shown[0] else "right"}
    if answer.choice is not None:
        return {"choice": answer.choice}
    if answer.ranks is not None:
        by_id = dict(zip(question.completion_ids, answer.ranks, strict=True))
        return {"ranks": ",".join(str(by_id[i]) for i in shown)}
    fields = {"rating": str(answer.rating)} if answer.rating is not None else {}
    return fields | ({"safe": "yes" if answer.safe else "no"} if answer.safe is not None else {})
