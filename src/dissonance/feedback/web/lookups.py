"""What the server asks the database with every question.

The statements are built once: building them costs more than running them.
"""

from itertools import pairwise
from statistics import median

from sqlalchemy import BindParameter, and_, bindparam, case, exists, func, literal, or_, select, true

from dissonance.feedback.rows import question_from_row
from dissonance.feedback.schema import labels, leases, queries
from dissonance.feedback.store import Store
from dissonance.feedback.web.views import PersonProgress
from dissonance.records import Question

_PACE_OF = 21
"""The latest answers that the pace is taken from."""

_WHO: BindParameter[int] = bindparam("annotator_id")
_MINE = and_(labels.c.annotator_id == _WHO, labels.c.supersedes.is_(None), ~labels.c.adjudicated)
_OPEN = and_(queries.c.closed_at.is_(None), queries.c.retired_at.is_(None), ~queries.c.is_gold)
_LATEST = select(labels.c.created_at).where(_MINE).order_by(labels.c.label_id.desc()).limit(_PACE_OF).subquery()
# Looked up by its key for each label, and judged after: PostgreSQL, while it has no statistics, takes a condition for a
# reason to walk through every open query, for every label.
_is_open = (
    select(case((_OPEN, 1), else_=0)).where(queries.c.query_id == labels.c.query_id).correlate(labels).scalar_subquery()
)
# One statement, for one trip to the server: the counts, beside each of the latest times or beside none.
_PROGRESS = select(
    select(func.count()).select_from(labels).where(_MINE).scalar_subquery().label("done"),
    select(func.count()).select_from(queries).where(_OPEN).scalar_subquery().label("open"),
    select(func.sum(_is_open)).select_from(labels).where(_MINE).scalar_subquery().label("answered"),
    _LATEST.c.created_at,
).select_from(select(literal(1)).subquery().outerjoin(_LATEST, true()))
_GIVEN = select(queries).where(
    queries.c.query_id == bindparam("query_id"),
    or_(
        exists().where(leases.c.annotator_id == _WHO, leases.c.query_id == queries.c.query_id),
        exists().where(labels.c.annotator_id == _WHO, labels.c.query_id == queries.c.query_id),
    ),
)


def person_progress(store: Store, annotator_id: int) -> PersonProgress:
    """How many questions an annotator has answered, how many could still come, and how fast it goes."""
    rows = store.rows(_PROGRESS, {"annotator_id": annotator_id})
    times = [row.created_at for row in rows if row.created_at is not None]
    # The median passes over breaks.
    between = median([later - earlier for later, earlier in pairwise(times)]) if len(times) > 2 else 0.0
    return PersonProgress(rows[0].done, rows[0].open - (rows[0].answered or 0), 3600 / between if between > 0 else None)


def question_given_to(store: Store, annotator_id: int, query_id: str) -> Question | None:
    """A question that an annotator was ever shown; None for any other, which they may not answer."""
    rows = store.rows(_GIVEN, {"query_id": query_id, "annotator_id": annotator_id})
    return question_from_row(rows[0]) if rows else None
