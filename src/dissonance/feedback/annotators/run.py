"""Any `models.Annotator` against a store: leases, threads, labels as they come; it goes on from wherever it ended."""

import hashlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from sqlalchemy import exists, func, select, text, update

from dissonance.errors import SettingsError
from dissonance.feedback.annotators.budget import BudgetSpentError
from dissonance.feedback.schema import events, gold_answers, labels, leases, queries
from dissonance.feedback.store import Person, Store
from dissonance.models import Annotator
from dissonance.progress import Advance, ProgressFactory, quiet
from dissonance.records import Answer, Question

_LEASED_AT_ONCE = 64
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
    """Questions that still wait for this annotator, the failed ones included."""
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
    """One run: questions leased but not asked wait in `ready`, those under way in `pending`."""

    def __init__(self, store: Store, annotator: Annotator, person: Person, advance: Advance) -> None:
        self._store, self._annotator, self._person, self._advance = store, annotator, person, advance
        self._ready: deque[Question] = deque()
        self._pending: dict[Future[tuple[Answer | None, float]], Question] = {}
        self._seen: set[str] = set()
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
        """Keep every thread busy, with one question each in reserve."""
        while len(self._pending) < 2 * self._annotator.concurrency:
            if not self._ready and not self._lease():
                break
            question = self._ready.popleft()
            self._pending[pool.submit(self._ask, question)] = question
        return bool(self._pending)

    def _lease(self) -> bool:
        # Leases of questions under way, and of those that failed, are ours still and come back first.
        held = len(self._pending) + len(self.failed)
        given = self._store.lease_many(self._person.annotator_id, held + _LEASED_AT_ONCE, gold_every=0)
        fresh = [lease.question for lease in given if lease.question.query_id not in self._seen]
        self._seen.update(question.query_id for question in fresh)
        self._ready.extend(fresh)
        return bool(fresh)

    def _collect(self) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in [future for future in self._pending if future in done]:
            self._take(future)

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
    """Count the questions that this annotator may be asked, whoever else is answering them now."""
    mine = exists().where(labels.c.query_id == queries.c.query_id, labels.c.annotator_id == person.annotator_id)
    is_gold = exists().where(gold_answers.c.query_id == queries.c.query_id)
    is_open = queries.c.closed_at.is_(None) & queries.c.retired_at.is_(None)
    with store.reading() as connection:
        chosen = select(func.count()).select_from(queries).where(is_open, ~mine, ~is_gold)
        return connection.scalar(chosen) or 0


def _release(store: Store, person: Person) -> None:
    mine = (leases.c.annotator_id == person.annotator_id) & leases.c.closed_at.is_(None)
    with store.writing() as connection:
        connection.execute(update(leases).where(mine).values(closed_at=store.now()))


def _hold_to(store: Store, person: Person, fingerprint: str) -> None:
    """Refuse other settings than this annotator answered with before: its labels would be two annotators'."""
    mine = (events.c.annotator_id == person.annotator_id) & (events.c.action == _SETTINGS)
    with store.writing() as connection:
        before = connection.scalar(select(events.c.details).where(mine).order_by(events.c.event_id.desc()).limit(1))
        if before is None:
            store.log(connection, _SETTINGS, person.annotator_id, fingerprint=fingerprint)
        elif before["fingerprint"] != fingerprint:
            raise SettingsError(
                f"annotator {person.name!r} has answered with other settings before: give it another name, or the"
                " settings it had"
            )


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
    lock = FileLock(f"{store.engine.url.database}.{person.annotator_id}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise taken from error
    try:
        yield
    finally:
        lock.release()
