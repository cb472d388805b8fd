"""Annotators as the store knows them: people, and models under their own names."""

from dataclasses import dataclass

from sqlalchemy import Connection, bindparam, insert, select

from dissonance.errors import DataError
from dissonance.feedback.schema import annotators
from dissonance.records import AnnotatorKind, Role


@dataclass(frozen=True, slots=True)
class Person:
    """An annotator as the store knows it: a person, or a model under its own name."""

    annotator_id: int
    name: str
    kind: AnnotatorKind
    role: Role


def find_person(connection: Connection, annotator_id: int) -> Person:
    """Give the annotator of this id; a DataError if there is none."""
    row = connection.execute(_BY_ID, {"me": annotator_id}).one_or_none()
    if row is None:
        raise DataError(f"there is no annotator {annotator_id} in this store")
    return Person(row.annotator_id, row.name, row.kind, row.role)


def find_or_add_person(
    connection: Connection, name: str, kind: AnnotatorKind, role: Role, now: float
) -> tuple[Person, bool]:
    """Give the annotator of this name, and whether it is new; a DataError if the name is another kind's or no name."""
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise DataError(f"{name!r} is no annotator's name: use 1 to 200 printable characters")
    row = connection.execute(select(annotators).where(annotators.c.name == name)).one_or_none()
    if row is None:
        values = {"name": name, "kind": kind, "role": role, "added_at": now}
        added = connection.scalar(insert(annotators).values(values).returning(annotators.c.annotator_id))
        return Person(added or 0, name, kind, role), True
    if row.kind != kind:
        raise DataError(f"annotator {name!r} is a {row.kind}, not a {kind}: use another name")
    return Person(row.annotator_id, row.name, row.kind, row.role), False


def all_people(connection: Connection) -> list[Person]:
    """Everyone who may answer or has answered, in the order they came."""
    rows = connection.execute(select(annotators).order_by(annotators.c.annotator_id))
    return [Person(row.annotator_id, row.name, row.kind, row.role) for row in rows]


_BY_ID = select(annotators).where(annotators.c.annotator_id == bindparam("me"))
