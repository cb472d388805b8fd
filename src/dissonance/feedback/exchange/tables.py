"""Labels as CSV: a row per label, for spreadsheets and for everything else that has no format of its own.

    query_id         which question; or prompt_id with completion_ids, and with round where several have the same ones
    round
    prompt_id
    completion_ids   such as `3,1`: the order that `first`, `second` and `ranks` speak of; by default the question's
    annotator        who answered
    choice           first, second, tie, both_bad; or skip, for a question of any kind
    rating           1 (worst) to 5 (best)
    safe             yes or no
    ranks            one per completion, 1 the best, such as `2,1,3`; equal ranks are ties
    shown            completion_ids in the order that was shown, where known
    seconds, note    where known
    flagged          yes or no

Columns of other names are not read.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dissonance.errors import DataError
from dissonance.feedback.exchange.asked import Asked, ImportedAnswer, Parsed, order_shown
from dissonance.feedback.exchange.reading import one_of, seconds, text, truth, whole_number, whole_numbers
from dissonance.records import Answer, Choice, Label, Question

COLUMNS = (
    "query_id", "round", "prompt_id", "completion_ids", "annotator", "choice", "rating", "safe", "ranks",
    "shown", "seconds", "note", "flagged",
)  # fmt: skip

_NAMES = ("query_id", "prompt_id", "annotator")
_CHOICES: dict[str, Choice] = {"first": "first", "second": "second", "tie": "tie", "both_bad": "both_bad"}
_SWAPPED: dict[str, Choice] = {**_CHOICES, "first": "second", "second": "first"}
# A spreadsheet would run a cell that begins so as a formula; the apostrophe makes it text, and is taken off again.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")


def write_csv(path: Path, labels: Sequence[Label], questions: Sequence[Question]) -> int:
    """Write the labels of these questions, and return how many; the caller renames `path` when this returns."""
    by_id = {question.query_id: question for question in questions}
    kept = [label for label in labels if label.query_id in by_id]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_csv_row(label, by_id[label.query_id]) for label in kept)
    return len(kept)


def _csv_row(label: Label, question: Question) -> dict[str, object]:
    answer = label.answer
    return {
        "query_id": _guarded(question.query_id),
        "round": question.round,
        "prompt_id": _guarded(question.prompt_id),
        "completion_ids": ",".join(map(str, question.completion_ids)),
        "annotator": _guarded(label.annotator),
        "choice": "skip" if answer.skipped else answer.choice,
        "rating": answer.rating,
        "safe": None if answer.safe is None else _yes_or_no(answer.safe),
        "ranks": None if answer.ranks is None else ",".join(map(str, answer.ranks)),
        "shown": ",".join(map(str, label.shown)),
        "seconds": label.seconds,
        "note": _guarded(label.note),
        "flagged": _yes_or_no(label.flagged),
    }


def parse_csv_row(row: dict[str, Any], asked: Asked) -> Parsed:
    """Read a row."""
    given = {name: text(row[name], name) for name in COLUMNS if name in row}
    # Names are taken as they stand: a blank may be part of them.
    cells = {name: cell if name in _NAMES else cell.strip() for name, cell in given.items() if cell.strip()}
    order = whole_numbers(cells["completion_ids"], "completion_ids") if "completion_ids" in cells else None
    question = _question(cells, order, asked)
    order = order or question.completion_ids
    if sorted(order) != sorted(question.completion_ids):
        raise DataError(
            f"query {question.query_id!r} is about completions {', '.join(map(str, question.completion_ids))}, "
            f"not {', '.join(map(str, order))}"
        )
    said = ImportedAnswer(
        question,
        annotator=_unguarded(cells["annotator"]) if "annotator" in cells else None,
        answer=_answer(cells, question, order),
        shown=order_shown(question, cells["shown"].replace(" ", "")) if "shown" in cells else (),
        seconds=seconds(cells["seconds"], "seconds") if "seconds" in cells else None,
        note=_unguarded(given.get("note", "")),
        flagged=truth(cells.get("flagged", "no"), "flagged"),
    )
    return Parsed((said,))


def _question(cells: dict[str, str], order: tuple[int, ...] | None, asked: Asked) -> Question:
    if "query_id" in cells:
        return asked.query(_unguarded(cells["query_id"]))
    if "prompt_id" not in cells or order is None:
        raise DataError("no query_id, and no prompt_id with completion_ids: which question is this about?")
    of_round = whole_number(cells["round"], "round") if "round" in cells else None
    return asked.about(_unguarded(cells["prompt_id"]), order, of_round)


def _answer(cells: dict[str, str], question: Question, order: tuple[int, ...]) -> Answer:
    choice = one_of(cells.get("choice", "skip"), (*_CHOICES, "skip"), "choice")
    rating = cells.get("rating")
    if rating is not None and rating not in {"1", "2", "3", "4", "5"}:
        raise DataError(f"unknown rating {rating!r}: use a whole number from 1 to 5")
    ranks = whole_numbers(cells["ranks"], "ranks") if "ranks" in cells else None
    if ranks is not None and len(ranks) != len(order):
        raise DataError(f"{len(ranks)} ranks for {len(order)} completions: give one for each")
    answer = Answer(
        choice=None if choice == "skip" else (_CHOICES if order == question.completion_ids else _SWAPPED)[choice],
        rating=None if rating is None else int(rating),
        safe=truth(cells["safe"], "safe") if "safe" in cells else None,
        ranks=None if ranks is None else tuple(ranks[order.index(i)] for i in question.completion_ids),
    )
    if answer.skipped != (cells.get("choice") == "skip"):
        says = "skips and answers at once" if "choice" in cells else "says nothing"
        raise DataError(f"the row {says}: fill in one of choice, rating or safe, ranks; or write skip under choice")
    return answer


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _guarded(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def _unguarded(value: str) -> str:
    return value[1:] if value[:1] == "'" and value[1:2] in _FORMULA else value
