"""Annotators at the labelling page, each a thread with a connection, and what must be true of the store afterwards.

A ledger keeps what was sent and what was acknowledged; `check` holds the store against it.
"""

import html
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Self
from urllib.parse import urlencode

from sqlalchemy import func, select, text

from dissonance.feedback.schema import labels as label_rows
from dissonance.feedback.schema import leases
from dissonance.feedback.store import Store
from dissonance.records import Answer
from labelling_server import HOST

PATIENCE_SECONDS = 120.0
"""How long an annotator waits for a server that is not there."""


def name_of(number: int) -> str:
    """The name of an annotator."""
    return f"annotator {number}"


@dataclass(frozen=True)
class Sent:
    """An answer as it was sent, in the terms of the page."""

    annotator: str
    question: str
    """What the page called it: the id of the lease."""
    answer: Answer
    """In terms of what stood left and right."""
    note: str
    flagged: bool


@dataclass
class Ledger:
    """What the annotators know of what they did; each has its own, and they are added up."""

    sent: dict[str, Sent] = field(default_factory=dict)
    """By key."""
    acknowledged: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """How long replies took, by what was asked for."""
    again: int = 0
    """Requests that were sent again because no reply came, or a 503."""

    def add(self, other: "Ledger") -> None:
        """Take another's entries in."""
        self.sent |= other.sent
        self.acknowledged += other.acknowledged
        self.again += other.again
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds


class Annotator:
    """Someone at the page."""

    def __init__(self, name: str, token: str, port: int, crowd: "Crowd") -> None:
        self.name = name
        self.ledger = Ledger()
        self.rng = random.Random(name)
        self.question: dict[str, str] | None = None
        """The values of the form on the page; None where nothing is left to answer."""
        self._token = token
        self.crowd = crowd
        self._connection = HTTPConnection(HOST, port, timeout=30)
        self._cookie = ""

    def sign_in(self) -> None:
        """Open the personal link, and the page behind it."""
        self._cookie = self._fetch("POST", "/join", {"token": self._token})[1].partition(";")[0]
        self.look("/", what="arrival")  # everyone comes at once: not how pages load later

    def look(self, path: str, due: float | None = None, what: str = "get") -> None:
        """Load the page or a part of it; `due` is when it was to happen (`time.perf_counter`)."""
        began = time.perf_counter() if due is None else due
        page, _ = self._fetch("GET", path)
        self.ledger.seconds[what].append(time.perf_counter() - began)
        self.question = read_form(page)

    def answer(self, due: float | None = None) -> None:
        """Answer the question on the page, and take the next one from the reply."""
        assert self.question is not None
        began = time.perf_counter() if due is None else due
        fields, sent = make_answer(self.name, self.question, self.rng)
        self.ledger.sent[fields["key"]] = sent
        page, _ = self._fetch("POST", "/answers", fields)
        assert "data-fragment" in page, page[:500]
        self.ledger.seconds["post"].append(time.perf_counter() - began)
        self.ledger.acknowledged.append(fields["key"])
        self.question = read_form(page)
        self.crowd.acknowledge()

    def leave(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _fetch(self, method: str, path: str, fields: dict[str, str] | None = None) -> tuple[str, str]:
        """Page and cookie of a reply; asks until there is one, as a browser and the page's script do."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                status, page, cookie = self._fetch_once(method, path, fields)
            except (OSError, HTTPException) as error:
                self._connection.close()
                status, page, cookie = 503, str(error), ""
            if status in {200, 303}:
                return page, cookie
            if status != 503 or time.monotonic() > give_up or self.crowd.over.is_set():
                raise RuntimeError(f"{self.name}: {method} {path}: status {status}: {page[:300]}")
            self.ledger.again += 1
            self.crowd.over.wait(self.rng.uniform(0.05, 0.3))

    def _fetch_once(self, method: str, path: str, fields: dict[str, str] | None) -> tuple[int, str, str]:
        headers = {"Sec-Fetch-Site": "same-origin", "Cookie": self._cookie}
        if fields is not None:
            headers |= {"Content-Type": "application/x-www-form-urlencoded", "HX-Request": "true"}
        self._connection.request(method, path, None if fields is None else urlencode(fields).encode(), headers)
        reply = self._connection.getresponse()
        return reply.status, reply.read().decode(), reply.getheader("Set-Cookie", "")


_FIELD = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)"')
_KIND = re.compile(r'data-kind="(\w+)"')


def read_form(page: str) -> dict[str, str] | None:
    """The form's values and the question's kind; None on a page that asks nothing."""
    kind = _KIND.search(page)
    if kind is None:
        return None
    fields = {name: html.unescape(value) for name, value in _FIELD.findall(page)}
    return fields | {"kind": kind[1], "options": str(page.count("data-option="))}


def make_answer(name: str, question: dict[str, str], rng: random.Random) -> tuple[dict[str, str], Sent]:
    """Some answer: what the form sends, and what the store must then hold."""
    fields = {field: question[field] for field in ("csrf", "key", "question")}
    fields["seconds"] = f"{rng.uniform(1, 9):.3f}"
    note = f"a note & <b>{rng.random()}</b>\nof two lines" if rng.random() < 0.1 else ""
    flagged = rng.random() < 0.05
    said, answer = _say(question["kind"], int(question["options"]), rng)
    fields |= said | ({"note": note.replace("\n", "\r\n")} if note else {}) | ({"flagged": "on"} if flagged else {})
    return fields, Sent(name, question["question"], answer, note, flagged)


def _say(kind: str, options: int, rng: random.Random) -> tuple[dict[str, str], Answer]:
    skip = rng.random() < 0.02
    if kind == "pairwise":
        said = {
            "left": Answer("first"),
            "right": Answer("second"),
            "tie": Answer("tie"),
            "both_bad": Answer("both_bad"),
        }
        choice = rng.choice(list(said))
        return ({"choice": "skip"}, Answer()) if skip else ({"choice": choice}, said[choice])
    if kind == "rating":
        rating, safe = rng.randint(1, 5), rng.random() < 0.5
        if skip:
            return {"rating": "skip"}, Answer()
        return {"rating": str(rating), "safe": "yes" if safe else "no"}, Answer(rating=rating, safe=safe)
    ranks = [rng.randint(1, options) for _ in range(options)]
    answer = Answer() if skip else Answer(ranks=tuple(ranks))
    return {"ranks": "skip" if skip else ",".join(map(str, ranks))}, answer


class Crowd:
    """All the annotators, each in a thread."""

    def __init__(self, tokens: Sequence[str], port: int) -> None:
        self.over = threading.Event()
        """That nobody is to go on."""
        self.annotators = [Annotator(name_of(i), token, port, self) for i, token in enumerate(tokens[:-1])]
        self.lead = Annotator("lead", tokens[-1], port, self)
        self._changed = threading.Condition()
        self._acknowledged = 0
        self._idle: dict[str, int] = {}

    def all_do(self, work: Callable[[Annotator], None], meanwhile: Callable[[], None] = lambda: None) -> float:
        """Let everyone work, and do something `meanwhile`; the seconds it took. The first failure ends it for all."""

        def run(annotator: Annotator) -> None:
            try:
                work(annotator)
            except BaseException:
                self.stop()
                raise

        began = time.perf_counter()
        with ThreadPoolExecutor(len(self.annotators)) as pool:
            working = [pool.submit(run, annotator) for annotator in self.annotators]
            try:
                meanwhile()
                for done in working:
                    done.result()
            except BaseException:
                self.stop()  # or the pool would wait for them
                raise
        return time.perf_counter() - began

    def stop(self) -> None:
        """Let nobody go on."""
        with self._changed:
            self.over.set()
            self._changed.notify_all()

    def acknowledge(self) -> None:
        """Count an answer that the server has acknowledged."""
        with self._changed:
            self._acknowledged += 1
            self._changed.notify_all()

    def wait_for(self, acknowledged: int) -> None:
        """Wait until so many more answers are acknowledged, or nobody goes on."""
        with self._changed:
            wanted = self._acknowledged + acknowledged
            self._changed.wait_for(lambda: self.over.is_set() or self._acknowledged >= wanted)

    def answer_all(self, annotator: Annotator) -> None:
        """Answer as fast as possible until there is nothing left for anybody: a skip may bring one more for another."""
        while not self.over.is_set():
            if annotator.question is not None:
                annotator.answer()
                continue
            before = self._acknowledged
            annotator.look("/question")
            if annotator.question is None:
                self._rest(annotator, before)
                continue
            with self._changed:
                self._idle.pop(annotator.name, None)

    def _rest(self, annotator: Annotator, before: int) -> None:
        with self._changed:
            # It stays while they look again: 64 who look in turn would never all rest at one time.
            self._idle[annotator.name] = before
            last = len(self._idle) == len(self.annotators) and set(self._idle.values()) == {self._acknowledged}
        if last:  # since the latest answer, everyone was told that nothing is left
            self.stop()
        self.over.wait(0.2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for annotator in (*self.annotators, self.lead):
            annotator.leave()

    def ledger(self) -> Ledger:
        """Everybody's, together."""
        total = Ledger()
        for annotator in (*self.annotators, self.lead):
            total.add(annotator.ledger)
        return total


# -- what must be true afterwards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """What is wrong in a store: all zero, or answers were lost or doubled."""

    lost: int
    """Answers that were acknowledged and are not there."""
    doubled: int
    """Answers too many of one annotator to one query."""
    altered: int
    """Answers that are not there as they were sent."""
    unknown: int
    """Answers that nobody sent."""
    too_many: int
    """Answers beyond what their queries wanted, but for those whose lease ran out."""
    left_behind: int
    """Answers that queries still want although everybody was told that nothing is left."""
    damaged: int
    """1 if the database finds fault with itself."""

    @property
    def none(self) -> bool:
        """Whether all is well."""
        return not any(vars(self).values())


def check(store: Store, ledger: Ledger, overlap: int, *, finished: bool) -> Findings:
    """Compare a store with what was sent to it; `finished`: everybody was told that nothing is left."""
    labels, gold = store.labels(current=False), store.gold()
    ordered = {question.query_id: question.completion_ids for question in store.questions()}
    asked = [query_id for query_id in ordered if query_id not in gold]
    ran_out = select(leases.c.query_id, func.count().label("leases")).group_by(leases.c.query_id)
    ran_out = ran_out.where(leases.c.expires_at < func.coalesce(leases.c.closed_at, store.now()))
    with store.reading() as connection:
        given = {row.lease_id: (row.query_id, tuple(row.shown)) for row in connection.execute(select(leases))}
        expired = {row.query_id: row.leases for row in connection.execute(ran_out)}
        ids = {key: i for i, key in connection.execute(select(label_rows.c.label_id, label_rows.c.key))}
        sqlite = connection.dialect.name == "sqlite"
        sound = not sqlite or connection.scalar(text("PRAGMA integrity_check")) == "ok"
    held = {m.label_id: (m.annotator, m.query_id, m.answer, m.shown, m.note, m.flagged) for m in labels}
    sent = {key: _as_stored(said, *given[said.question], ordered) for key, said in ledger.sent.items()}
    pairs = Counter((label.query_id, label.annotator) for label in labels)
    answers = Counter(label.query_id for label in labels if not label.answer.skipped)
    return Findings(
        lost=len(set(ledger.acknowledged) - set(ids)),
        doubled=sum(count - 1 for count in pairs.values()),
        altered=sum(held[ids[key]] != said for key, said in sent.items() if key in ids),
        unknown=len(set(ids) - set(sent)),
        too_many=sum(max(0, answers[query_id] - overlap - expired.get(query_id, 0)) for query_id in asked),
        left_behind=sum(max(0, overlap - answers[query_id]) for query_id in asked) if finished else 0,
        damaged=int(not sound),
    )


def _as_stored(
    said: Sent, query_id: str, shown: tuple[int, ...], ordered: Mapping[str, tuple[int, ...]]
) -> tuple[str, str, Answer, tuple[int, ...], str, bool]:
    """An answer in the terms in which the store must hold it."""
    answer = said.answer
    if answer.choice in {"first", "second"} and shown != ordered[query_id]:
        answer = Answer("second" if answer.choice == "first" else "first")
    if answer.ranks is not None:
        by_id = dict(zip(shown, answer.ranks, strict=True))
        answer = Answer(ranks=tuple(by_id[i] for i in ordered[query_id]))
    return said.annotator, query_id, answer, shown, said.note, said.flagged
