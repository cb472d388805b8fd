"""Annotators as the store knows them: people, and models under their own names."""

from dataclasses import dataclass, replace
from typing import get_args

from sqlalchemy import Connection, bindparam, insert, select, update

from dissonance.errors import DataError
from dissonance.feedback.rows import is_text
from dissonance.feedback.schema import annotators
from dissonance.records import AnnotatorKind, Role


@dataclass(frozen=True, slots=True)
class Person:
    """An annotator as the store knows it: a person, or a model under its own name."""

    annotator_id: int
    name: str
    kind: AnnotatorKind
    role: Role


def check_name(name: str) -> None:
    """Raise a DataError unless an annotator can be called this."""
    if not name or name != name.strip() or len(name) > 200 or not name.isprintable():
        shown = repr(name) if len(name) <= 200 else f"{name[:77]!r}..."
        raise DataError(f"{shown} is no annotator's name: use 1 to 200 printable characters, no blank at either end")


def find_person(connection: Connection, annotator_id: int) -> Person:
    """Give the annotator of this id; a DataError if there is none."""
    row = connection.execute(_BY_ID, {"me": annotator_id}).one_or_none()
    if row is None:
        raise DataError(f"there is no annotator {annotator_id} in this store")
    return Person(row.annotator_id, row.name, row.kind, row.role)


def find_by_name(connection: Connection, name: str) -> Person:
    """Give the annotator of this name; a DataError if there is none."""
    chosen = select(annotators).where(annotators.c.name == name)
    row = connection.execute(chosen).one_or_none() if is_text(name) else None
    if row is None:
        raise DataError(f"there is no annotator {name!r} in this store")
    return Person(row.annotator_id, row.name, row.kind, row.role)


def find_or_add_person(
    connection: Connection, name: str, kind: AnnotatorKind, role: Role, now: float
) -> tuple[Person, str | None]:
    """Give the annotator of this name, and what happened if it is new ("annotator") or was "taken over".

    A person takes over the name that an import gave to their labels, in the role given.

    Raises:
        DataError: the name is another kind's, or is no name.
    """
    check_name(name)
    if role not in get_args(Role):
        raise DataError(f"unknown role {role!r}: use {' or '.join(get_args(Role))}")
    row = connection.execute(select(annotators).where(annotators.c.name == name)).one_or_none()
    if row is None:
        values = {"name": name, "kind": kind, "role": role, "added_at": now}
        added = connection.scalar(insert(annotators).values(values).returning(annotators.c.annotator_id))
        return Person(added or 0, name, kind, role), "annotator"
    if (row.kind, kind) == ("import", "person"):
        mine = update(annotators).where(annotators.c.annotator_id == row.annotator_id)
        connection.execute(mine.values(kind=kind, role=role))
        return Person(row.annotator_id, name, kind, role), "taken over"
    if row.kind != kind:
        raise DataError(f"annotator {name!r} is {_a(row.kind)}, not {_a(kind)}: use another name")
    return Person(row.annotator_id, row.name, row.kind, row.role), None


def change_role(connection: Connection, name: str, role: Role) -> tuple[Person, bool]:
    """Give the annotator of this name another role, and say whether it was another; see `Store.set_role`."""
    if role not in get_args(Role):
        raise DataError(f"unknown role {role!r}: use {' or '.join(get_args(Role))}")
    person = find_by_name(connection, name)
    if person.role == role:
        return person, False
    connection.execute(update(annotators).where(annotators.c.annotator_id == person.annotator_id).values(role=role))
    return replace(person, role=role), True


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def all_people(connection: Connection) -> list[Person]:
    """Everyone who may answer or has answered, in the order they came."""
    rows = connection.execute(select(annotators).order_by(annotators.c.annotator_id))
    return [Person(row.annotator_id, row.name, row.kind, row.role) for row in rows]


_BY_ID = select(annotators).where(annotators.c.annotator_id == bindparam("me"))
