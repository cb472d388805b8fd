"""The label store: questions go out on leases, answers come back and stay.

What it holds to, by the database's own constraints where one can say it:

- an answer is on disk before `record` returns, once, whatever is sent again;
- labels are only ever added; a correction supersedes, and both remain;
- nobody is asked what they have answered; a lease that ran out is given to whoever comes next;
- a query is closed when as many annotators as wanted have answered it; skips do not count.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, Unpack

from sqlalchemy import Connection, Engine, Executable, Row, insert, select

from dissonance.errors import DataError, StoreError
from dissonance.feedback.answers import Said, Submission, all_labels, last_label, record_answer
from dissonance.feedback.asking import Lease, hand_out
from dissonance.feedback.database import BUSY_SECONDS, alone, open_engine, shown, translated
from dissonance.feedback.people import Person, all_people, change_role, find_or_add_person, find_person
from dissonance.feedback.queries import (
    Progress,
    add_gold_questions,
    add_queries,
    all_questions,
    count_progress,
    find_question,
    known_answers,
    reopen_for_checks,
)
from dissonance.feedback.schema import about, events
from dissonance.records import AnnotatorKind, Answer, Label, Question, Role

__all__ = ["GOLD_EVERY", "LEASE_SECONDS", "Lease", "Person", "Progress", "Store"]

LEASE_SECONDS = 15 * 60.0
GOLD_EVERY = 10


class Store:
    """One run's questions and answers; safe to use from many threads, and from many processes at once."""

    def __init__(
        self, engine: Engine, now: Callable[[], float] = time.time, *, busy_seconds: float = BUSY_SECONDS
    ) -> None:
        self.engine = engine
        self.now = now
        self.run_id = ""
        self._where = shown(engine.url)
        self._busy_seconds = busy_seconds
        sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer at a time; threads wait here, which is quicker than to poll for its lock.
        self._writer = threading.Lock() if sqlite else None
        # SQLite reads a snapshot as it is.
        self._read_options = {} if sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        # One statement is of one moment by itself: a transaction around it would be two more trips to the server.
        self._row_options = {} if sqlite else {"isolation_level": "AUTOCOMMIT"}

    @classmethod
    def open(
        cls,
        where: Path | str,
        run_id: str,
        now: Callable[[], float] = time.time,
        *,
        busy_seconds: float = BUSY_SECONDS,
    ) -> Self:
        """Open the store of a run, made anew if there is none.

        Args:
            where: a path (SQLite), or `postgresql://user@host/database`.
            run_id: what identifies the run; a store belongs to one.
            now: the clock, seconds since 1970.
            busy_seconds: how long to wait for another writer before a StoreError.

        Raises:
            StoreError: it cannot be opened, or holds another run's labels.
        """
        store = cls(open_engine(where, busy_seconds), now, busy_seconds=busy_seconds)
        try:
            store._belong_to(run_id)
            store.run_id = run_id
        except BaseException:
            store.close()
            raise
        return store

    def _belong_to(self, run_id: str) -> None:
        chosen = select(about.c.value).where(about.c.key == "run_id")
        with self.reading() as connection:
            held = connection.scalar(chosen)
        if held is None:
            with self.writing() as connection:
                alone(connection)
                held = connection.scalar(chosen)
                if held is None:
                    connection.execute(insert(about).values(key="run_id", value=run_id))
                    self.log(connection, "opened", None, run_id=run_id)
                    return
        if held != run_id:
            raise StoreError(f"label store {self._where} holds another run's labels: name another database")

    def close(self) -> None:
        """Give back every connection."""
        self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A consistent view: whatever is read in the block is of one moment.

        Raises:
            StoreError: the database cannot be read.
        """
        with (
            translated(self._where),
            self.engine.connect().execution_options(**self._read_options) as connection,
            connection.begin(),
        ):
            yield connection

    def rows(self, statement: Executable, values: Mapping[str, Any]) -> Sequence[Row[Any]]:
        """What one statement reads, of one moment; quicker than a `reading` block around it.

        Raises:
            StoreError: the database cannot be read.
        """
        options = self._row_options
        with translated(self._where), self.engine.connect().execution_options(**options) as connection:
            return connection.execute(statement, values).all()

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction that writes: all of it is on disk when the block ends, or none of it happened.

        Raises:
            StoreError: the database cannot be written; the same store goes on when the cause is gone.
        """
        with (
            self._turn(),
            translated(self._where),
            self.engine.connect().execution_options(writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if self._writer is None:
            yield
            return
        if not self._writer.acquire(timeout=self._busy_seconds):
            raise StoreError(f"label store {self._where}: others are writing for too long: try again")
        try:
            yield
        finally:
            self._writer.release()

    # -- questions ---------------------------------------------------------------------------------------------------

    def add_questions(self, questions: Sequence[Question], *, overlap: int | None = None, round_number: int = 0) -> int:
        """Add questions in the order of asking; returns how many are new.

        `overlap` is how many annotators each wants; by default as many as were wanted before, 1 at first. Questions
        that are there stay as they are, but for their round, place and overlap; a gold one stays gold, and one that
        people are to check wants no fewer than it did. Those of the same round that are not among `questions` are
        retired: asked no more, their labels kept.

        Raises:
            DataError: overlap is below 1, two questions have one query_id, one is there with other texts or of another
                kind, or cannot be stored.
        """
        with self.writing() as connection:
            alone(connection)
            added = add_queries(connection, questions, overlap, round_number, self.now())
            self.log(connection, "questions", None, added=added, asked=len(questions), round=round_number)
        return added

    def add_gold(self, gold: Sequence[tuple[Question, Answer, str]]) -> int:
        """Add questions whose answer is known, with the answer and the reason for it; returns how many are new.

        They are mixed in among the others, for every person. A question that is there becomes gold; a gold one gets
        the answer and reason given now.

        Raises:
            DataError: an answer is missing or does not fit its question, or a question cannot be stored, or is there
                with other texts or of another kind.
        """
        with self.writing() as connection:
            alone(connection)
            added = add_gold_questions(connection, gold, self.now())
            self.log(connection, "gold questions", None, added=added, given=len(gold))
        return added

    def check_sample(self, annotator: str, size: int, seed: int = 0) -> int:
        """Ask people about a random sample of what this annotator (a judge) has answered.

        Each query of the sample wants the answer of one more person. The sample is of `size` in all: what is being
        checked, or was, counts, so that the same call again asks for no more, and one of a greater size for the rest.

        Returns:
            How many of the sample still want a person's answer.

        Raises:
            DataError: there is no annotator of this name, or the size is negative.
        """
        with self.writing() as connection:
            alone(connection)
            sampled = reopen_for_checks(connection, annotator, size, seed)
            self.log(connection, "check", None, of=annotator, size=size, seed=seed, open=sampled)
        return sampled

    def questions(self, *, retired: bool = False) -> list[Question]:
        """Every question, gold ones included, in the order of asking; with those asked no more if `retired`."""
        with self.reading() as connection:
            return all_questions(connection, retired=retired)

    def question(self, query_id: str) -> Question:
        """One question.

        Raises:
            DataError: there is no such query.
        """
        with self.reading() as connection:
            return find_question(connection, query_id)

    def gold(self) -> dict[str, Answer]:
        """The known answers, by query_id."""
        with self.reading() as connection:
            return known_answers(connection)

    def progress(self, round_number: int | None = None) -> Progress:
        """How far the asking is, in one round or in all."""
        with self.reading() as connection:
            return count_progress(connection, round_number)

    # -- annotators --------------------------------------------------------------------------------------------------

    def annotator(self, name: str, kind: AnnotatorKind = "person", role: Role = "annotator") -> Person:
        """Give the annotator of this name, added with this role if there is none; one who is there keeps the role.

        A person may take over the name that an import gave to their labels, and does so with this role.

        Raises:
            DataError: the name is taken by another kind of annotator, or is no name.
        """
        with self.writing() as connection:
            alone(connection)
            person, happened = find_or_add_person(connection, name, kind, role, self.now())
            if happened is not None:
                self.log(connection, happened, person.annotator_id, name=name, kind=kind, role=role)
        return person

    def set_role(self, name: str, role: Role) -> Person:
        """Make an annotator a lead, or a lead an annotator like the others; it holds from their next request on.

        Raises:
            DataError: there is no annotator of this name, or no such role.
        """
        with self.writing() as connection:
            alone(connection)
            person, changed = change_role(connection, name, role)
            if changed:
                self.log(connection, "role", person.annotator_id, role=role)
        return person

    def annotators(self) -> list[Person]:
        """Everyone who may answer or has answered."""
        with self.reading() as connection:
            return all_people(connection)

    # -- asking ------------------------------------------------------------------------------------------------------

    def lease(self, annotator_id: int, *, seconds: float = LEASE_SECONDS, gold_every: int = GOLD_EVERY) -> Lease | None:
        """Give an annotator the next question for `seconds`; the one they hold if they have not answered it.

        Of every `gold_every` questions one is a gold question, at a place that cannot be foreseen, as long as there are
        gold questions that they have not seen and others to ask; 0 for none.

        None where there is nothing left that they could be asked now.

        Raises:
            DataError: there is no such annotator, or a number is out of range.
        """
        (lease,) = self.lease_many(annotator_id, 1, seconds=seconds, gold_every=gold_every) or (None,)
        return lease

    def lease_many(
        self, annotator_id: int, count: int, *, seconds: float = LEASE_SECONDS, gold_every: int = 0
    ) -> list[Lease]:
        """Up to `count` questions at once, for annotators that answer several at a time; those they hold come first.

        Raises:
            DataError: there is no such annotator, or a number is out of range.
        """
        _check_lease(count, seconds, gold_every)
        with self.writing() as connection:
            alone(connection)  # two who reach for the last place of a query must not both get it
            person = find_person(connection, annotator_id)
            return hand_out(connection, person, count, self.now(), seconds=seconds, gold_every=gold_every)

    # -- answers -----------------------------------------------------------------------------------------------------

    def record(self, annotator_id: int, query_id: str, answer: Answer, *, key: str, **said: Unpack[Said]) -> Label:
        """Store an answer; it is on disk when this returns.

        Sent again with the same key, it is stored once, and the first is returned. With another key, it corrects what
        this annotator said of the query before; what a lead settles corrects only what they settled before, and stands
        beside their own answer. An answer is taken whether or not its lease has run out, and from whoever had none.

        Args:
            annotator_id: whose answer.
            query_id: to which query.
            answer: what was said.
            key: 1 to 64 printable characters of the sender's choosing, new for each answer of this annotator.
            said: what else there is to say, see `Said`.

        Raises:
            DataError: there is no such query or annotator, the answer does not fit, or the key was used for another.
            StoreError: it could not be stored; send it again with the same key.
        """
        submission = Submission(answer, key, **said)
        with self.writing() as connection:
            return self._record(connection, find_person(connection, annotator_id), query_id, submission)

    def record_and_lease(
        self,
        annotator_id: int,
        query_id: str,
        answer: Answer,
        *,
        key: str,
        lease_seconds: float = LEASE_SECONDS,
        gold_every: int = GOLD_EVERY,
        **said: Unpack[Said],
    ) -> tuple[Label, Lease | None]:
        """`record`, then `lease`, in one transaction: half the work for the database, and one wait for its disk.

        Raises:
            DataError: as `record` and `lease`; then nothing is stored.
            StoreError: it could not be stored; send it again with the same key.
        """
        submission = Submission(answer, key, **said)
        _check_lease(1, lease_seconds, gold_every)
        with self.writing() as connection:
            alone(connection)
            person = find_person(connection, annotator_id)
            label = self._record(connection, person, query_id, submission)
            given = hand_out(connection, person, 1, self.now(), seconds=lease_seconds, gold_every=gold_every)
        return label, given[0] if given else None

    def _record(self, connection: Connection, person: Person, query_id: str, said: Submission) -> Label:
        label, new = record_answer(connection, person, query_id, said, self.now())
        if new:
            self.log(connection, "label", person.annotator_id, label_id=label.label_id, query_id=query_id)
        return label

    def labels(self, *, current: bool = True, query_id: str | None = None) -> list[Label]:
        """Every label, or only those that no correction supersedes, in the order they came; of one query or of all."""
        with self.reading() as connection:
            return all_labels(connection, current=current, query_id=query_id)

    def last_label(self, annotator_id: int, before: int | None = None) -> Label | None:
        """This annotator's latest current label, or the latest whose label_id is below `before`: what undo goes to.

        What they settled as a lead is not among them.
        """
        with self.reading() as connection:
            return last_label(connection, annotator_id, before)

    # -- the audit trail ---------------------------------------------------------------------------------------------

    def log(self, connection: Connection, action: str, annotator_id: int | None, **details: Any) -> None:
        """Enter something into the audit trail, in the transaction that does it."""
        values = {"at": self.now(), "annotator_id": annotator_id, "action": action, "details": details}
        connection.execute(insert(events), values)


def _check_lease(count: int, seconds: float, gold_every: int) -> None:
    if count < 1 or gold_every < 0 or not (math.isfinite(seconds) and seconds > 0):
        raise DataError(f"{count} questions for {seconds} seconds, gold every {gold_every}: numbers out of range")
