"""Any `models.Annotator` against a store: leases, threads, labels as they come; it goes on from wherever it ended."""

import hashlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from sqlalchemy import exists, func, or_, select, text, update

from dissonance.errors import SettingsError, StoreError
from dissonance.feedback.annotators.budget import BudgetSpentError
from dissonance.feedback.schema import events, judge_calls, labels, leases, queries
from dissonance.feedback.store import LEASE_SECONDS, Person, Store
from dissonance.models import Annotator
from dissonance.progress import Advance, ProgressFactory, quiet
from dissonance.records import Answer, Question

_RENEW_EVERY = LEASE_SECONDS / 3
_SETTINGS = "annotator_settings"


@dataclass(frozen=True, slots=True)
class Details:
    """What a label holds besides the answer."""

    shown: tuple[int, ...] = ()
    """The completion_ids in the order in which the annotator saw them; empty where one order means nothing."""
    note: str = ""


@runtime_checkable
class DetailedAnnotator(Protocol):
    """What an annotator may offer on top of `models.Annotator`."""

    @property
    def fingerprint(self) -> str:
        """Tells apart settings whose answers should not stand under one name."""
        ...

    def details(self, question: Question) -> Details:
        """What to store beside the answer that `answer` gave last to this question."""
        ...


@dataclass(frozen=True, slots=True)
class Annotated:
    """What one call of `annotate` did."""

    annotator: str
    answered: int
    skipped: int
    """Questions that the annotator passed on."""
    failed: int
    """Questions that it gave no answer to; nothing is stored of them, and a later run asks again."""
    left: int
    """Questions that this annotator could be asked now, the failed ones included."""
    stopped: Literal["", "budget", "interrupted"]
    """Why it ended before everything was asked."""
    reason: str
    """One line on it."""
    seconds: float


def annotate(store: Store, annotator: Annotator, progress: ProgressFactory = quiet) -> Annotated:
    """Ask an annotator everything that waits for it, from `annotator.concurrency` threads.

    Every answer is stored as it comes, under a key made of the annotator and the query, so that no way of ending can
    lose or double one. A spent budget and Ctrl-C end it when the questions under way are answered.

    Args:
        store: where the questions are.
        annotator: whom to ask; its name says what it has answered before.
        progress: told of every question that is done.

    Raises:
        SettingsError: another process is this annotator, or it answered with other settings before.
        Exception: what the annotator or the store raised, once the questions under way are answered and stored.
    """
    if annotator.concurrency < 1:
        raise SettingsError(f"annotator {annotator.name!r} has a concurrency of {annotator.concurrency}: use 1 or more")
    person = store.annotator(annotator.name, annotator.kind)
    started = time.monotonic()
    with _alone(store, person):
        if isinstance(annotator, DetailedAnnotator):
            _hold_to(store, person, annotator.fingerprint)
        with progress(annotator.name, _waiting(store, person), "questions") as advance:
            asking = _Asking(store, annotator, person, advance)
            try:
                asking.run()
            finally:
                _release(store, person)
        left = _waiting(store, person)
    return Annotated(
        annotator=annotator.name,
        answered=asking.answered,
        skipped=asking.skipped,
        failed=len(asking.failed),
        left=left,
        stopped=asking.stopped,
        reason=asking.reason,
        seconds=time.monotonic() - started,
    )


def label_key(annotator: str, query_id: str) -> str:
    """The idempotency key of an annotator's answer to a query; 64 characters."""
    return hashlib.blake2b(f"{annotator}\0{query_id}".encode(), digest_size=32).hexdigest()


class _Asking:
    """One run: questions leased but not asked wait in `ready`, those under way in `pending`.

    Few are leased at a time, and only for as long as they are: all leases are renewed while the run goes on, and
    looked at again should they have run out (a computer that slept), so that nobody else is asked the same meanwhile.
    """

    def __init__(self, store: Store, annotator: Annotator, person: Person, advance: Advance) -> None:
        self._store, self._annotator, self._person, self._advance = store, annotator, person, advance
        self._ready: deque[Question] = deque()
        self._pending: dict[Future[tuple[Answer | None, float]], Question] = {}
        self._begun: set[str] = set()
        self._leased_until = self._renew_at = 0.0
        self.failed: set[str] = set()
        self.answered = self.skipped = 0
        self.stopped: Literal["", "budget", "interrupted"] = ""
        self.reason = ""
        self._error: BaseException | None = None

    def run(self) -> None:
        """Ask until nothing is left, or something ends it."""
        pool = ThreadPoolExecutor(self._annotator.concurrency, thread_name_prefix="annotator")
        try:
            with _on_ctrl_c(self._interrupt):
                while self._go_on() and (self._submit(pool) or self._pending):
                    self._collect()
                self._drain()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self._error is not None:
            raise self._error

    def _interrupt(self) -> None:
        if self.stopped == "interrupted":
            raise KeyboardInterrupt
        self.stopped, self.reason = "interrupted", "interrupted: run again to go on"

    def _go_on(self) -> bool:
        return not self.stopped and self._error is None

    def _submit(self, pool: ThreadPoolExecutor) -> bool:
        """Keep every thread busy."""
        while len(self._pending) < self._annotator.concurrency:
            if not self._ready or self._store.now() >= self._leased_until:
                self._lease()
            if not self._ready:
                break
            question = self._ready.popleft()
            self._begun.add(question.query_id)
            self._pending[pool.submit(self._ask, question)] = question
        return bool(self._pending)

    def _lease(self) -> None:
        """Renew every lease, and take on as many questions as keep the threads busy twice over.

        The failed ones are renewed too, or they would be given again: with many of them, more is taken on at a time.
        """
        self._ready.clear()  # those that are ours still come back; so do those under way, and those that failed
        self._renew_at = time.monotonic() + _RENEW_EVERY
        ahead = max(2 * self._annotator.concurrency, len(self.failed) // 8)
        count = len(self._pending) + len(self.failed) + ahead
        try:
            given = self._store.lease_many(self._person.annotator_id, count, gold_every=0)
        except Exception as error:  # what is under way is stored first
            self._error = self._error or error
            return
        self._leased_until = min((lease.expires_at for lease in given), default=0.0)
        self._ready.extend(lease.question for lease in given if lease.question.query_id not in self._begun)

    def _collect(self) -> None:
        done, _ = wait(self._pending, max(0.0, self._renew_at - time.monotonic()), FIRST_COMPLETED)
        for future in [future for future in self._pending if future in done]:
            self._take(future)
        if time.monotonic() >= self._renew_at:
            self._lease()

    def _drain(self) -> None:
        """Wait for what is under way, and store it; what has not begun is not asked. Ctrl-C again ends the waiting."""
        for future in [future for future in self._pending if future.cancel()]:
            del self._pending[future]
        while self._pending:
            self._collect()

    def _ask(self, question: Question) -> tuple[Answer | None, float]:
        started = time.monotonic()
        return self._annotator.answer(question), time.monotonic() - started

    def _take(self, future: Future[tuple[Answer | None, float]]) -> None:
        question = self._pending.pop(future)
        try:
            answer, seconds = future.result()
            if answer is not None:
                self._record(question, answer, seconds)
        except BudgetSpentError as error:
            self.stopped, self.reason = self.stopped or "budget", self.reason or str(error)
            return
        except Exception as error:  # whatever the annotator raises; the others under way are stored first
            self._error = self._error or error
            return
        if answer is None:
            self.failed.add(question.query_id)
        elif answer.skipped:
            self.skipped += 1
        else:
            self.answered += 1
        self._advance(1)

    def _record(self, question: Question, answer: Answer, seconds: float) -> None:
        annotator = self._annotator
        details = annotator.details(question) if isinstance(annotator, DetailedAnnotator) else Details()
        self._store.record(
            self._person.annotator_id,
            question.query_id,
            answer,
            key=label_key(self._person.name, question.query_id),
            shown=details.shown,
            seconds=seconds,
            note=details.note,
        )


@contextmanager
def _on_ctrl_c(interrupt: Callable[[], None]) -> Iterator[None]:
    """Call this instead of raising KeyboardInterrupt, which could come between an answer and its storing."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # whoever set a handler of their own knows what to do
        return
    signal.signal(signal.SIGINT, lambda _number, _frame: interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _waiting(store: Store, person: Person) -> int:
    """Count the questions that this annotator could be asked now: those that `Store.lease_many` would give a model."""
    # Counted, where `exists` would do, for the reason that asking.py gives.
    said = select(func.count()).where(labels.c.query_id == queries.c.query_id)
    said_by_me = said.where(labels.c.annotator_id == person.annotator_id).scalar_subquery()
    held = select(func.count()).where(leases.c.query_id == queries.c.query_id, leases.c.closed_at.is_(None))
    others = held.where(leases.c.annotator_id != person.annotator_id, leases.c.expires_at > store.now())
    is_open = queries.c.closed_at.is_(None) & queries.c.retired_at.is_(None)
    for_models = ~queries.c.is_gold & ~queries.c.people_only
    has_room = queries.c.answers + others.scalar_subquery() < queries.c.overlap
    chosen = select(func.count()).select_from(queries).where(is_open, for_models, said_by_me == 0, has_room)
    with store.reading() as connection:
        return connection.scalar(chosen) or 0


def _release(store: Store, person: Person) -> None:
    mine = (leases.c.annotator_id == person.annotator_id) & leases.c.closed_at.is_(None)
    with store.writing() as connection:
        connection.execute(update(leases).where(mine).values(closed_at=store.now()))


def _hold_to(store: Store, person: Person, fingerprint: str) -> None:
    """Refuse other settings than this annotator answered with before: its labels would be two annotators'.

    Settings that nothing was answered with, such as a model that does not exist, bind nobody.
    """
    me = person.annotator_id
    mine = (events.c.annotator_id == me) & (events.c.action == _SETTINGS)
    has_label = exists().where(labels.c.annotator_id == me)
    has_reply = exists().where(judge_calls.c.annotator_id == me, judge_calls.c.reply.is_not(None))
    with store.writing() as connection:
        before = connection.scalar(select(events.c.details).where(mine).order_by(events.c.event_id.desc()).limit(1))
        if before is not None and before["fingerprint"] == fingerprint:
            return
        if before is not None and connection.scalar(select(or_(has_label, has_reply))):
            raise SettingsError(
                f"annotator {person.name!r} has answered with other settings before: give it another name, or the"
                " settings it had"
            )
        store.log(connection, _SETTINGS, me, fingerprint=fingerprint)


@contextmanager
def _alone(store: Store, person: Person) -> Iterator[None]:
    """Keep a second process from being the same annotator; the system ends this with the process, however it ends."""
    taken = SettingsError(f"another process is running annotator {person.name!r} on this store: wait for it, or end it")
    if store.engine.dialect.name == "postgresql":
        # Outside a transaction: a run takes hours, and servers end transactions that stand still.
        with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            key = {"annotator": person.annotator_id}
            if not connection.scalar(text("SELECT pg_try_advisory_lock(7248, :annotator)"), key):
                raise taken
            try:
                yield
            finally:
                connection.execute(text("SELECT pg_advisory_unlock(7248, :annotator)"), key)
        return
    path = Path(f"{store.engine.url.database}.{person.annotator_id}.lock")
    lock = FileLock(path)
    try:
        with store.writing():
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise taken from error
        yield
    finally:
        if lock.is_locked:
            # Locks are taken and removed while the store is held, one after another: to remove a file that another
            # process is just locking would leave two processes with a lock each. Where the store cannot be held, the
            # file stays, and does no harm.
            with suppress(StoreError, OSError), store.writing():
                lock.release()
                path.unlink(missing_ok=True)
            lock.release()
