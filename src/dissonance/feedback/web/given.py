"""What people were given to answer, under handles that tell nothing of it.

    a lease's id    what that lease gave the person, in its order
    label:17        what that label of theirs answers, in the order in which it was shown
    query:ID        any question, in the blind order: for leads, who see its id anyway

Those who label see no id of the run. Whoever has the texts can work out which query_ids the run would give them, and so
tell what a strategy chose from a gold question; and completion_ids that are always 0 and 1 tell it at a glance.
"""

from dataclasses import dataclass, replace

from sqlalchemy import BindParameter, bindparam, select

from dissonance.errors import DataError
from dissonance.feedback.blind import blind_order
from dissonance.feedback.rows import question_from_row
from dissonance.feedback.schema import labels, leases, queries
from dissonance.feedback.store import Lease, Person, Store
from dissonance.records import Label, Question

_LABEL, _QUERY = "label:", "query:"
_ID_DIGITS = 9  # as many as fit every database's integers

_WHO: BindParameter[int] = bindparam("annotator_id")
_BY_LEASE = (
    select(queries, leases.c.shown)
    .join(leases, leases.c.query_id == queries.c.query_id)
    .where(leases.c.lease_id == bindparam("handle"), leases.c.annotator_id == _WHO)
)
_BY_LABEL = (
    select(queries, labels.c.shown)
    .join(labels, labels.c.query_id == queries.c.query_id)
    .where(labels.c.label_id == bindparam("handle"), labels.c.annotator_id == _WHO)
)


@dataclass(frozen=True, slots=True)
class Given:
    """A question as it was given to somebody."""

    query_id: str
    """As the store knows it; not for those who label."""
    question: Question
    """With the handle in the place of its query_id, so that nothing that is said of it tells."""
    shown: tuple[int, ...]
    """The completion_ids from left to right."""

    @property
    def handle(self) -> str:
        """What the page and the scripts call it."""
        return self.question.query_id


def given_by_lease(lease: Lease) -> Given:
    """What a lease gives."""
    return _given(lease.lease_id, lease.question, lease.shown)


def given_again(label: Label, question: Question) -> Given:
    """What a label of the same person answers, to be corrected."""
    return _given(f"{_LABEL}{label.label_id}", question, label.shown)


def given_to_lead(question: Question) -> Given:
    """What a lead settles. The order of asking may begin with the likelier winner, so it is not shown in that."""
    return _given(f"{_QUERY}{question.query_id}", question, ())


def find_given(store: Store, person: Person, handle: str) -> Given | None:
    """What this person was given under this handle; None where it is nothing of theirs."""
    if handle.startswith(_QUERY):
        return _find_for_lead(store, person, handle.removeprefix(_QUERY))
    of_label = handle.startswith(_LABEL)
    number = handle.removeprefix(_LABEL)
    if of_label and not (number.isascii() and number.isdigit() and len(number) <= _ID_DIGITS):
        return None
    asked = {"handle": int(number) if of_label else handle, "annotator_id": person.annotator_id}
    rows = store.rows(_BY_LABEL if of_label else _BY_LEASE, asked)
    return _given(handle, question_from_row(rows[0]), tuple(rows[0].shown)) if rows else None


def _find_for_lead(store: Store, person: Person, query_id: str) -> Given | None:
    if person.role != "lead":
        return None
    try:
        return given_to_lead(store.question(query_id))
    except DataError:
        return None


def _given(handle: str, question: Question, shown: tuple[int, ...]) -> Given:
    # An imported label knows no order.
    return Given(question.query_id, replace(question, query_id=handle), shown or blind_order(question))
