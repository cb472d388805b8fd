"""Labels from a file into the store: everything is read and checked first, then written in one transaction.

What an annotator has said of a question before, no import says again, of whatever format: a file imported twice adds
nothing the second time, and a label that was corrected since stays corrected.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from dissonance.errors import DataError
from dissonance.feedback.answers import Submission, all_labels, record_answer
from dissonance.feedback.database import alone
from dissonance.feedback.exchange.argilla import parse_record
from dissonance.feedback.exchange.asked import Asked, ImportedAnswer, Parsed, UnknownQuestionError
from dissonance.feedback.exchange.label_studio import parse_task
from dissonance.feedback.exchange.reading import FORMATS, ImportFormat, Row, format_of, one_of, read_rows, text
from dissonance.feedback.exchange.tables import parse_csv_row
from dissonance.feedback.exchange.trl import parse_preference
from dissonance.feedback.people import all_people, check_name, find_or_add_person
from dissonance.feedback.rows import answer_to_json
from dissonance.feedback.store import Store
from dissonance.records import Answer, Label

_PARSERS: dict[ImportFormat, Callable[[dict[str, Any], Asked], Parsed]] = {
    "trl": parse_preference,
    "argilla": parse_record,
    "label-studio": parse_task,
    "csv": parse_csv_row,
}


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of the labels in a file."""

    format: ImportFormat
    labels: int
    """That the file holds and that are about this run; the sum of the next four."""
    added: int
    """The first that their annotators say of these questions."""
    corrected: int
    """Put in the place of what their annotators said of these questions before."""
    already: int
    """The store had them: the same answer to the same question by the same annotator."""
    superseded: int
    """The store had them, and its annotator has said something else since, which stands."""
    unknown: int
    """Rows about questions that this run has not asked; only with `skip_unknown`."""
    unfinished: int
    """Drafts, left out."""
    by_models: int
    """Suggestions and predictions left out; none with `predictions`."""
    annotators: tuple[str, ...]
    """Whose labels they are."""


@dataclass(frozen=True, slots=True)
class _Incoming:
    place: str
    annotator: str
    query_id: str
    submission: Submission


def import_labels(
    store: Store,
    path: Path,
    *,
    file_format: ImportFormat | None = None,
    annotator: str | None = None,
    predictions: bool = False,
    skip_unknown: bool = False,
) -> Imported:
    """Read a file of labels, check all of it, and store what the store does not have.

    Args:
        store: the run's; what its questions do not ask about cannot be labelled.
        path: a file, or a folder that Argilla's `to_disk` wrote.
        file_format: what it is; by default its content says.
        annotator: whose labels they are, whoever the file names.
        predictions: also take models' suggestions and predictions for labels, under the models' names.
        skip_unknown: leave out, and count, rows about questions that the run has not asked; otherwise an error.

    Raises:
        DataError: the first thing that is wrong, with the file and its line, row or record. Nothing was stored.
        StoreError: the store cannot be written. Nothing was stored.
    """
    if file_format is not None:
        one_of(file_format, FORMATS, "format")
    rows = read_rows(path)
    found = file_format or format_of(path, rows)
    parsed, unknown = _parse(
        path, rows, _PARSERS[found], Asked(store.questions(retired=True)), skip_unknown=skip_unknown
    )
    spoken = [(place, said) for place, row in parsed for said in row.said]
    taken = [(place, said) for place, said in spoken if predictions or not said.by_model]
    if not taken and not spoken:
        raise DataError(f"{path}: holds no labels of this run ({len(rows)} rows, {unknown} about other questions)")
    incoming = [_incoming(path, place, said, annotator) for place, said in taken]
    distinct = _distinct(path, incoming)
    with store.writing() as connection:
        alone(connection)  # of two who import the same file, the second finds what the first has stored
        counts = _write(store, connection, distinct)
        store.log(connection, "import", None, file=path.name, format=found, labels=len(distinct), **counts)
    return Imported(
        format=found,
        labels=len(distinct),
        **counts,
        unknown=unknown,
        unfinished=sum(row.unfinished for _, row in parsed),
        by_models=len(spoken) - len(taken),
        annotators=tuple(sorted({label.annotator for label in distinct})),
    )


def _parse(
    path: Path,
    rows: Sequence[Row],
    parse: Callable[[dict[str, Any], Asked], Parsed],
    asked: Asked,
    *,
    skip_unknown: bool,
) -> tuple[list[tuple[str, Parsed]], int]:
    parsed: list[tuple[str, Parsed]] = []
    unknown = 0
    for place, row in rows:
        try:
            found = parse(row, asked)
            for said in found.said:
                said.answer.fits(said.question)
            parsed.append((place, found))
        except UnknownQuestionError as error:
            if not skip_unknown:
                raise DataError(f"{path}{place}: {error}") from None
            unknown += 1
        except DataError as error:
            raise DataError(f"{path}{place}: {error}") from None
        except KeyError as error:
            raise DataError(f"{path}{place}: there is no {error.args[0]!r} in it") from None
        except RecursionError:
            raise DataError(f"{path}{place}: nested too deep to be a label") from None
    return parsed, unknown


def _incoming(path: Path, place: str, said: ImportedAnswer, annotator: str | None) -> _Incoming:
    name = annotator or said.annotator
    try:
        if name is None:
            raise DataError("names no annotator: say whose labels the file's are, with --as NAME")
        check_name(text(name, "the annotator"))
        what = [name, said.question.query_id, answer_to_json(said.answer), said.note]
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
        submission = Submission(said.answer, key, said.shown, said.seconds, said.note, said.flagged)
    except DataError as error:
        raise DataError(f"{path}{place}: {error}") from None
    return _Incoming(place, name, said.question.query_id, submission)


def _distinct(path: Path, incoming: Sequence[_Incoming]) -> list[_Incoming]:
    """Each annotator's one answer to each question."""
    first: dict[tuple[str, str], _Incoming] = {}
    for label in incoming:
        earlier = first.setdefault((label.annotator, label.query_id), label)
        if _meaning(earlier.submission.answer) != _meaning(label.submission.answer):
            raise DataError(
                f"{path}{label.place}: {label.annotator!r} answers query {label.query_id!r} otherwise "
                f"at {path.name}{earlier.place}: keep one of them"
            )
    return list(first.values())


def _write(store: Store, connection: Connection, incoming: Sequence[_Incoming]) -> dict[str, int]:
    people = {person.name: person for person in all_people(connection)}
    history: defaultdict[tuple[str, str], list[Label]] = defaultdict(list)
    for label in all_labels(connection, current=False):
        if label.adjudicated:
            continue  # a settlement stands beside what its lead answered
        history[label.annotator, label.query_id].append(label)
    counts = {"added": 0, "corrected": 0, "already": 0, "superseded": 0}
    for new in incoming:
        before = history[new.annotator, new.query_id]
        same = [label for label in before if _repeats(new.submission, label)]
        if same:
            counts["already" if before[-1] in same else "superseded"] += 1
            continue
        if new.annotator not in people:
            person, _ = find_or_add_person(connection, new.annotator, "import", "annotator", store.now())
            store.log(
                connection, "annotator", person.annotator_id, name=person.name, kind=person.kind, role=person.role
            )
            people[new.annotator] = person
        record_answer(connection, people[new.annotator], new.query_id, new.submission, store.now())
        counts["corrected" if before else "added"] += 1
    return counts


def _repeats(said: Submission, label: Label) -> bool:
    # Some formats hold no note: an answer without one says nothing new.
    return _meaning(said.answer) == _meaning(label.answer) and said.note in {"", label.note}


def _meaning(answer: Answer) -> tuple[object, ...]:
    """An answer without what the form of its ranks leaves open: 1, 1, 3 says what 1, 1, 2 says."""
    ranks = answer.ranks and tuple(sorted(set(answer.ranks)).index(rank) for rank in answer.ranks)
    return answer.choice, answer.rating, answer.safe, ranks
