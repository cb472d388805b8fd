"""What the server asks the database with every question.

The statements are built once: building them costs more than running them.
"""

from itertools import pairwise
from statistics import median

from sqlalchemy import BindParameter, and_, bindparam, case, func, literal, select, true

from dissonance.feedback.gold_places import questions_ahead, seed_of
from dissonance.feedback.schema import labels, queries
from dissonance.feedback.store import Store
from dissonance.feedback.web.views import PersonProgress

_PACE_OF = 21
"""The latest answers that the pace is taken from."""

_WHO: BindParameter[int] = bindparam("annotator_id")
_MINE = and_(labels.c.annotator_id == _WHO, labels.c.supersedes.is_(None), ~labels.c.adjudicated)
_ASKED = and_(queries.c.closed_at.is_(None), queries.c.retired_at.is_(None))
_OPEN = and_(_ASKED, ~queries.c.is_gold)
# Counted for the reason that asking.py gives.
_SEEN = select(func.count()).where(labels.c.query_id == queries.c.query_id, labels.c.annotator_id == _WHO)
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
    select(func.count()).where(_ASKED, queries.c.is_gold, _SEEN.scalar_subquery() == 0).scalar_subquery().label("gold"),
    _LATEST.c.created_at,
).select_from(select(literal(1)).subquery().outerjoin(_LATEST, true()))


def person_progress(store: Store, annotator_id: int, gold_every: int) -> PersonProgress:
    """How many questions an annotator has answered, how many could still come, and how fast it goes.

    Gold questions, which are one in `gold_every`, count like any others: nobody sees by the numbers which they are.
    """
    rows = store.rows(_PROGRESS, {"annotator_id": annotator_id})
    times = [row.created_at for row in rows if row.created_at is not None]
    # The median passes over breaks.
    between = median([later - earlier for later, earlier in pairwise(times)]) if len(times) > 2 else 0.0
    now = rows[0]
    seed = seed_of(store.run_id, annotator_id)
    left = questions_ahead(seed, now.done, now.open - (now.answered or 0), now.gold, gold_every)
    return PersonProgress(now.done, left, 3600 / between if between > 0 else None)
