"""Leases: who is asked what next. A question is someone's for a while, and comes back when the while is over."""

import random
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Row,
    ScalarSelect,
    Select,
    Table,
    and_,
    bindparam,
    func,
    insert,
    select,
    update,
)

from dissonance.feedback.gold_places import is_gold_place, seed_of
from dissonance.feedback.people import Person
from dissonance.feedback.rows import question_from_row
from dissonance.feedback.schema import about, labels, leases, queries
from dissonance.records import Question


@dataclass(frozen=True, slots=True)
class Lease:
    """A question that is someone's for a while."""

    lease_id: str
    question: Question
    shown: tuple[int, ...]
    """The completion_ids in the order to show them."""
    given_at: float
    expires_at: float


def hand_out(
    connection: Connection, person: Person, count: int, now: float, *, seconds: float, gold_every: int
) -> list[Lease]:
    """Up to `count` questions: those that the person holds and has not answered, then the next ones.

    The caller sees to it that nobody else hands out at the same time.
    """
    held = _held(connection, person, count, now, seconds)
    if len(held) == count:
        return held
    gold = _gold_due(connection, person, len(held), count, gold_every)
    rows = _next(connection, person, count - len(held), gold, now)
    return held + [_give(connection, person, row, now, seconds) for row in rows]


def _held(connection: Connection, person: Person, count: int, now: float, seconds: float) -> list[Lease]:
    """The live leases of what is still to be answered, for `seconds` from now."""
    rows = connection.execute(_HELD, {"me": person.annotator_id, "now": now, "count": count}).all()
    if rows:
        renewed = [{"lease": row.lease_id, "until": now + seconds} for row in rows]
        connection.execute(_RENEW, renewed)
    return [_lease(row, row.lease_id, row.shown, row.given_at, now + seconds) for row in rows]


def _gold_due(connection: Connection, person: Person, held: int, count: int, gold_every: int) -> int:
    """How many of the next questions are to be gold: of every `gold_every` one, at a place nobody can foresee."""
    if gold_every < 1:
        return 0
    answered, run_id = connection.execute(_ANSWERED, {"me": person.annotator_id}).one()
    seed = seed_of(run_id, person.annotator_id)
    return sum(is_gold_place(seed, place, gold_every) for place in range(answered + held, answered + count))


def _next(connection: Connection, person: Person, count: int, gold: int, now: float) -> list[Row[Any]]:
    """The next questions that the person may be asked; gold ones only beside others, so that the end is the end."""
    values = {"me": person.annotator_id, "now": now, "count": count}
    others = list(connection.execute(_FOR_PEOPLE if person.kind == "person" else _FOR_MODELS, values))
    if not gold or not others:
        return others
    known = connection.execute(_GOLD, values | {"count": gold})
    return [*known, *others][:count]


def _give(connection: Connection, person: Person, row: Row[Any], now: float, seconds: float) -> Lease:
    connection.execute(CLOSE_LEASE, {"query": row.query_id, "me": person.annotator_id, "now": now})
    shown = list(row.completion_ids)
    random.SystemRandom().shuffle(shown)
    lease_id = secrets.token_urlsafe(16)
    values = {
        "lease_id": lease_id,
        "query_id": row.query_id,
        "annotator_id": person.annotator_id,
        "shown": shown,
        "given_at": now,
        "expires_at": now + seconds,
    }
    connection.execute(insert(leases), values)
    return _lease(row, lease_id, shown, now, now + seconds)


def _lease(row: Row[Any], lease_id: str, shown: list[int], given_at: float, expires_at: float) -> Lease:
    return Lease(lease_id, question_from_row(row), tuple(shown), given_at, expires_at)


# -- statements, put together once; `me` is the annotator -------------------------------------------------------------

_me: BindParameter[int] = bindparam("me")
_now: BindParameter[float] = bindparam("now")
_is_live = and_(leases.c.closed_at.is_(None), leases.c.expires_at > _now)
_is_asked = and_(queries.c.closed_at.is_(None), queries.c.retired_at.is_(None))
_is_first = and_(labels.c.annotator_id == _me, labels.c.supersedes.is_(None))
"""Whoever has answered has one first answer, and one more who has settled it; there is an index of those."""


def _count(table: Table, *conditions: ColumnElement[bool]) -> ScalarSelect[int]:
    """Rows of a table about the query at hand.

    Counted, where `exists` would do: PostgreSQL turns that into a join, and without statistics into one that takes
    minutes. What is counted is one or two entries of an index.
    """
    return (
        select(func.count())
        .select_from(table)
        .where(table.c.query_id == queries.c.query_id, *conditions)
        .scalar_subquery()
    )


_unanswered = _count(labels, _is_first) == 0
_unheld = _count(leases, leases.c.annotator_id == _me, _is_live) == 0
_has_room = queries.c.answers + _count(leases, _is_live) < queries.c.overlap


def _next_ones(*conditions: ColumnElement[bool]) -> Select[Any]:
    chosen = select(queries).where(_is_asked, _unanswered, *conditions, _unheld)
    return chosen.order_by(queries.c.round, queries.c.position, queries.c.query_id).limit(bindparam("count"))


_GOLD = _next_ones(queries.c.is_gold)
_FOR_PEOPLE = _next_ones(~queries.c.is_gold, _has_room)
_FOR_MODELS = _next_ones(~queries.c.is_gold, _has_room, ~queries.c.people_only)
_HELD = (
    select(leases, queries)
    .join(queries, queries.c.query_id == leases.c.query_id)
    .where(leases.c.annotator_id == _me, _is_live, _is_asked, _unanswered)
    .order_by(leases.c.given_at, queries.c.round, queries.c.position)
    .limit(bindparam("count"))
)
_RENEW = update(leases).where(leases.c.lease_id == bindparam("lease")).values(expires_at=bindparam("until"))
_ANSWERED = select(
    select(func.count()).select_from(labels).where(_is_first, ~labels.c.adjudicated).scalar_subquery(), about.c.value
).where(about.c.key == "run_id")
CLOSE_LEASE = (
    update(leases)
    .where(leases.c.query_id == bindparam("query"), leases.c.annotator_id == _me, leases.c.closed_at.is_(None))
    .values(closed_at=_now)
)
"""Ends what an annotator holds of a query."""
