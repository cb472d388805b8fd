"""What the server asks the database with every question.

The statements are built once: building them costs more than running them.
"""

from itertools import pairwise
from statistics import median

from sqlalchemy import BindParameter, and_, bindparam, exists, func, or_, select

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
_COUNTS = select(
    select(func.count()).select_from(labels).where(_MINE).scalar_subquery(),
    select(func.count()).select_from(queries).where(_OPEN).scalar_subquery(),
    select(func.count()).select_from(labels).join(queries).where(_MINE, _OPEN).scalar_subquery(),
)
_LATEST = select(labels.c.created_at).where(_MINE).order_by(labels.c.created_at.desc()).limit(_PACE_OF)
_GIVEN = select(queries).where(
    queries.c.query_id == bindparam("query_id"),
    or_(
        exists().where(leases.c.annotator_id == _WHO, leases.c.query_id == queries.c.query_id),
        exists().where(labels.c.annotator_id == _WHO, labels.c.query_id == queries.c.query_id),
    ),
)


def person_progress(store: Store, annotator_id: int) -> PersonProgress:
    """How many questions an annotator has answered, how many could still come, and how fast it goes."""
    values = {"annotator_id": annotator_id}
    with store.reading() as connection:
        done, n_open, answered = connection.execute(_COUNTS, values).one()
        times = connection.scalars(_LATEST, values).all()
    # The median passes over breaks.
    between = median([later - earlier for later, earlier in pairwise(times)]) if len(times) > 2 else 0.0
    return PersonProgress(done, n_open - answered, 3600 / between if between > 0 else None)


def question_given_to(store: Store, annotator_id: int, query_id: str) -> Question | None:
    """A question that an annotator was ever shown; None for any other, which they may not answer."""
    with store.reading() as connection:
        row = connection.execute(_GIVEN, {"query_id": query_id, "annotator_id": annotator_id}).one_or_none()
    return None if row is None else question_from_row(row)
