"""Labels: an answer is recorded once, a correction supersedes the answer before it, and both remain.

What a lead settles supersedes nothing but what they settled before: it stands beside their own answer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Table,
    Update,
    and_,
    bindparam,
    case,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from dissonance.errors import DataError
from dissonance.feedback.asking import CLOSE_LEASE
from dissonance.feedback.people import Person
from dissonance.feedback.rows import answer_to_json, is_text, label_from_row, question_from_row
from dissonance.feedback.schema import annotators, labels, queries
from dissonance.records import Answer, Label

_LARGEST_ID = 2**31 - 1


class Said(TypedDict, total=False):
    """What may be said beside an answer."""

    shown: Sequence[int]
    """The completion_ids in the order shown, from the lease; empty where nothing was shown."""
    seconds: float | None
    """From the showing to the answer."""
    note: str
    """The annotator's words."""
    flagged: bool
    """Whether the annotator wants a lead to look."""
    adjudicated: bool
    """A lead settles a disagreement; the query is asked no more. A skip takes that back."""


@dataclass(frozen=True, slots=True)
class Submission:
    """An answer on its way into the store; see `Said`."""

    answer: Answer
    key: str
    """1 to 64 characters of the sender's choosing, new for each answer: sent again, it is stored once."""
    shown: Sequence[int] = ()
    seconds: float | None = None
    note: str = ""
    flagged: bool = False
    adjudicated: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.key) <= 64 or not self.key.isprintable():
            raise DataError(f"{self.key[:80]!r} is no key of an answer: use 1 to 64 printable characters")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise DataError(f"an answer cannot take {self.seconds} seconds")
        if not is_text(self.note):
            raise DataError(f"the note {self.note[:80]!r} holds a character that is no text: leave it out")


def record_answer(
    connection: Connection, person: Person, query_id: str, said: Submission, now: float
) -> tuple[Label, bool]:
    """Store an answer and say whether it is new; see `Store.record`."""
    _check_fits(connection, query_id, said)
    values = {
        "key": said.key,
        "query_id": query_id,
        "annotator_id": person.annotator_id,
        "answer": answer_to_json(said.answer),
        "skipped": said.answer.skipped,
        "shown": list(said.shown),
        "seconds": said.seconds,
        "note": said.note,
        "flagged": said.flagged,
        "adjudicated": said.adjudicated,
        "created_at": now,
    }
    row = connection.execute(_INSERT[connection.dialect.name], values).one_or_none()
    if row is None:
        return _label_of_key(connection, values), False
    mine = {"query": query_id, "me": person.annotator_id, "now": now}
    connection.execute(CLOSE_LEASE, mine)
    connection.execute(_RECOUNT_ONE, {"query": query_id, "now": now})
    rest = (tuple(said.shown), said.seconds, said.note, said.flagged, said.adjudicated, row.supersedes)
    return Label(row.label_id, query_id, person.name, person.kind, said.answer, now, *rest), True


def _check_fits(connection: Connection, query_id: str, said: Submission) -> None:
    asked = connection.execute(_ASKED, {"query": query_id}).one_or_none() if is_text(query_id) else None
    if asked is None:
        raise DataError(f"there is no query {query_id!r} in this store")
    said.answer.fits(question_from_row(asked))
    if said.shown and sorted(said.shown) != sorted(asked.completion_ids):
        raise DataError(f"query {query_id!r} shows completions {asked.completion_ids}, not {list(said.shown)}")


def _label_of_key(connection: Connection, values: Mapping[str, Any]) -> Label:
    mine = and_(labels.c.annotator_id == values["annotator_id"], labels.c.key == values["key"])
    row = connection.execute(_LABELS.where(mine)).one()
    # How long it took may differ: a clock goes on between two tries.
    if any(getattr(row, name) != values[name] for name in _SAID):
        raise DataError(f"the key {values['key']!r} belongs to another answer: use a new key for each")
    return label_from_row(row)


def recount(which: ColumnElement[bool], now: float | BindParameter[float]) -> Update:
    """Count the answers of these queries again, and close those that want no more, or open them again.

    A query is closed when as many annotators as wanted have answered it, or when a lead has settled it. A gold question
    is for everyone, and never closed.
    """
    # A lead who has answered and then settled it is one who answered.
    who = select(func.count(labels.c.annotator_id.distinct()))
    said = who.where(labels.c.query_id == queries.c.query_id, ~labels.c.skipped, is_current())
    answers = said.scalar_subquery()
    settled = said.where(labels.c.adjudicated).scalar_subquery() > 0
    enough = and_(~queries.c.is_gold, or_(answers >= queries.c.overlap, settled))
    closed_at = case((enough, func.coalesce(queries.c.closed_at, now)), else_=None)
    return update(queries).where(which).values(answers=answers, closed_at=closed_at)


def is_current() -> ColumnElement[bool]:
    """Whether a row of labels is superseded by none."""
    # Counted for the reason that asking.py gives.
    later = labels.alias()
    return select(func.count()).where(later.c.supersedes == labels.c.label_id).scalar_subquery() == 0


def all_labels(connection: Connection, *, current: bool, query_id: str | None = None) -> list[Label]:
    """Every label, or only the current ones; of one query or of all; in the order they came."""
    chosen = _LABELS.order_by(labels.c.label_id)
    if current:
        chosen = chosen.where(is_current())
    if query_id is not None:
        if not is_text(query_id):
            return []
        chosen = chosen.where(labels.c.query_id == query_id)
    return [label_from_row(row) for row in connection.execute(chosen)]


def last_label(connection: Connection, annotator_id: int, before: int | None) -> Label | None:
    """See `Store.last_label`."""
    chosen = _LABELS.where(labels.c.annotator_id == annotator_id, ~labels.c.adjudicated, is_current())
    if before is not None:
        chosen = chosen.where(labels.c.label_id < min(max(before, 0), _LARGEST_ID))
    row = connection.execute(chosen.order_by(labels.c.label_id.desc()).limit(1)).one_or_none()
    return None if row is None else label_from_row(row)


_LABELS = select(labels, annotators.c.name, annotators.c.kind).join(annotators)
_SAID = ("query_id", "answer", "note", "flagged", "adjudicated", "shown")
"""What makes two answers of one key the same answer."""
_ASKED = select(queries).where(queries.c.query_id == bindparam("query")).with_for_update(key_share=True)
"""Its lock puts the answers to a query in a line, and lets those to other queries go on beside it."""
_RECOUNT_ONE = recount(queries.c.query_id == bindparam("query"), bindparam("now"))


def _insert_with(insert: Callable[[Table], Any]) -> Any:
    """Insert a label that corrects this annotator's last one of the query; nothing where its key is taken.

    The last of the same sort: what was settled is corrected by settling it anew, an answer by an answer.
    """
    before = labels.alias()
    same = ("query_id", "annotator_id", "adjudicated")
    mine = and_(*(before.c[name] == bindparam(name) for name in same))
    last = select(func.max(before.c.label_id)).where(mine).scalar_subquery()
    new = insert(labels).values({c.name: bindparam(c.name, type_=c.type) for c in labels.c if c.name not in _GIVEN})
    new = new.values(supersedes=last).on_conflict_do_nothing(index_elements=[labels.c.annotator_id, labels.c.key])
    return new.returning(labels.c.label_id, labels.c.supersedes)


_GIVEN = {"label_id", "supersedes"}
"""What the database fills in."""
_INSERT = {"sqlite": _insert_with(sqlite.insert), "postgresql": _insert_with(postgresql.insert)}
