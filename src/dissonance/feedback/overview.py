"""What a lead sees while answers arrive: progress, agreement, each annotator, what to settle."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from sqlalchemy import Connection, func, select

from dissonance.feedback import schema
from dissonance.feedback.quality import (
    Agreement,
    AnnotatorQuality,
    ConflictRate,
    CyclicPrompt,
    agreements,
    annotator_quality,
    conflict_rate,
)
from dissonance.feedback.queries import all_questions, count_progress, known_answers
from dissonance.feedback.rows import answer_to_json, label_from_row
from dissonance.feedback.store import Progress, Store
from dissonance.feedback.votes import AgreementKind, Coded, Said, said, standing
from dissonance.feedback.wording import excerpt, in_words, letters, shortened
from dissonance.records import AnnotatorKind, Answer, Label, QueryKind, Question

MOST_SHOWN = 50
"""Disagreements and remarks that are listed; all are counted."""

_COMPLETION_EXCERPT = 80
_REPLICATES = 400  # of the bootstrap: enough for a page that is looked at while it changes
_LEAST_SPAN = 2  # ratings one point apart are no disagreement
_PAIR_DISTANCE = (
    # first, second, tie, both bad: to call a tie what another prefers is half a contradiction
    (0.0, 1.0, 0.5, 0.5),
    (1.0, 0.0, 0.5, 0.5),
    (0.5, 0.5, 0.0, 0.5),
    (0.5, 0.5, 0.5, 0.0),
)


@dataclass(frozen=True, slots=True)
class GivenAnswer:
    """What one annotator said of a query."""

    annotator: str
    annotator_kind: AnnotatorKind
    answer: Answer
    text: str
    """For people, in terms of letters: `A is better`, `tie`, `rated 4, safe`, `C > A = B`."""
    adjudicated: bool


@dataclass(frozen=True, slots=True)
class NamedCompletion:
    """A completion as lists of answers name it."""

    letter: str
    """As on the page where a lead settles its query."""
    completion_id: int
    excerpt: str
    """The start of its text, one line."""


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A query that annotators answer differently."""

    query_id: str
    prompt_id: str
    kind: QueryKind
    excerpt: str
    """The start of the last user turn, one line."""
    dispute: float
    """In (0, 1]; 1 is as far apart as answers can be."""
    completions: tuple[NamedCompletion, ...]
    """By letter."""
    answers: tuple[GivenAnswer, ...]
    """By annotator name; skips left out."""
    adjudicated: bool
    """Whether a lead has settled it."""


@dataclass(frozen=True, slots=True)
class Remark:
    """A label that was flagged, or carries a note."""

    label_id: int
    query_id: str
    prompt_id: str
    excerpt: str
    annotator: str
    flagged: bool
    note: str
    created_at: float
    """Seconds since 1970, UTC."""


@dataclass(frozen=True, slots=True)
class Overview:
    """The state of the asking; gold questions count in the annotators' rows alone."""

    progress: Progress
    agreement: tuple[Agreement, ...]
    """One for each kind of answer that was given: pairwise, rating, safe, ranking."""
    annotators: tuple[AnnotatorQuality, ...]
    """Everyone who answered, by name."""
    disagreements: tuple[Disagreement, ...]
    """Unsettled ones first, the most disputed first; at most 50."""
    n_disagreements: int
    """All of them."""
    n_unsettled: int
    """Those that no lead has settled."""
    remarks: tuple[Remark, ...]
    """Newest first, at most 50."""
    n_remarks: int
    conflicts: ConflictRate
    """Cyclic prompts."""
    excerpts: dict[str, str]
    """prompt_id -> the start of its last user turn, for the cyclic prompts."""
    cycle_excerpts: tuple[tuple[str, ...], ...]
    """For each of the cyclic prompts, the start of every completion on its cycle."""
    latest_label_id: int
    """0 where there is none; unchanged means that nothing has arrived."""

    def to_json(self) -> dict[str, Any]:
        """Give it as JSON holds it; agreement by kind, answers as the store and the exports write them."""
        plain: dict[str, Any] = _plain(self)
        return plain | {"agreement": {row["kind"]: row for row in plain["agreement"]}}


def overview(store: Store) -> Overview:
    """Look at a store as it is now.

    What was read of it stays in memory for as long as the store object lives: labels are only ever added, and a poll
    reads those that came since the last one. Nothing is worked out again while none came.
    """
    with _LOCK:
        watch = _WATCHES.setdefault(store, _Watch())
    with watch.lock:
        return watch.look(store)


class _Watch:
    """What was read of one store, and what was made of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.labels: list[Label] = []
        self.questions: dict[str, Question] = {}
        self.gold: dict[str, Answer] = {}
        self.seen: Overview | None = None

    def look(self, store: Store) -> Overview:
        with store.reading() as connection:
            progress = count_progress(connection)
            fresh = self._catch_up(connection)
        if self.seen is None or fresh:
            self.seen = summary(self.labels, self.questions, self.gold, progress)
        self.seen = replace(self.seen, progress=progress)
        return self.seen

    def _catch_up(self, connection: Connection) -> bool:
        """Read what is new; whether anything is."""
        known = known_answers(connection)
        n_questions = connection.scalar(select(func.count()).select_from(schema.queries))
        n_labels = connection.scalar(select(func.count()).select_from(schema.labels))
        fresh = (known, n_questions, n_labels) != (self.gold, len(self.questions), len(self.labels))
        self.gold = known
        if n_questions != len(self.questions):
            self.questions = {q.query_id: q for q in all_questions(connection, retired=True)}
        if n_labels != len(self.labels):
            self.labels = self.labels + _labels_after(connection, _latest(self.labels))
        if n_labels != len(self.labels):  # PostgreSQL may show a lower label_id after a higher one
            self.labels = _labels_after(connection, 0)
        return fresh


_WATCHES: WeakKeyDictionary[Store, _Watch] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _labels_after(connection: Connection, label_id: int) -> list[Label]:
    labels, annotators = schema.labels, schema.annotators
    chosen = select(labels, annotators.c.name, annotators.c.kind).join(annotators)
    rows = connection.execute(chosen.where(labels.c.label_id > label_id).order_by(labels.c.label_id))
    return [label_from_row(row) for row in rows]


def _latest(labels: Sequence[Label]) -> int:
    return max((label.label_id for label in labels), default=0)


def summary(
    labels: Sequence[Label], questions: Mapping[str, Question], gold: Mapping[str, Answer], progress: Progress
) -> Overview:
    """Sum up what labels say: pure, what `overview` shows of a store.

    Args:
        labels: all, superseded ones included.
        questions: by query_id; those of every label.
        gold: the known answers.
        progress: as the store counts it.
    """
    current = standing(labels)
    ready = said(current, questions, gold)
    conflicts = conflict_rate(current, questions, gold, ready=ready)
    disputed = _disputed(current, ready, questions)
    remarks = [label for label in reversed(current) if label.flagged or label.note]
    asked = {question.prompt_id: question for question in questions.values()}
    return Overview(
        progress=progress,
        agreement=agreements(current, questions, gold, replicates=_REPLICATES, ready=ready),
        annotators=annotator_quality(current, questions, gold, ready=ready),
        disagreements=tuple(_disagreement(row, questions[row.query_id]) for row in disputed[:MOST_SHOWN]),
        n_disagreements=len(disputed),
        n_unsettled=sum(not row.settled for row in disputed),
        remarks=tuple(_remark(label, questions[label.query_id]) for label in remarks[:MOST_SHOWN]),
        n_remarks=len(remarks),
        conflicts=conflicts,
        excerpts={prompt.prompt_id: excerpt(asked[prompt.prompt_id]) for prompt in conflicts.cyclic},
        cycle_excerpts=tuple(_cycle_excerpts(prompt, questions) for prompt in conflicts.cyclic),
        latest_label_id=_latest(labels),
    )


# -- disagreements -----------------------------------------------------------------------------------------------------


class _Disputed(NamedTuple):
    query_id: str
    dispute: float
    settled: bool
    labels: list[Label]


def _disputed(current: Sequence[Label], ready: Said, questions: Mapping[str, Question]) -> list[_Disputed]:
    """Queries that annotators answer differently: unsettled ones first, the most disputed first, then as asked."""
    disputes: dict[str, float] = {}
    for kind, answers in ready.by_kind.items():
        for query_id, dispute in _disputes(answers, kind).items():
            disputes[query_id] = max(disputes.get(query_id, 0.0), dispute)
    given: dict[str, list[Label]] = {query_id: [] for query_id in disputes}
    for label in current:
        if label.query_id in given and not label.answer.skipped:
            given[label.query_id].append(label)
    place = {query_id: at for at, query_id in enumerate(questions)}
    rows = [_Disputed(q, disputes[q], any(x.adjudicated for x in rows), rows) for q, rows in given.items()]
    return sorted(rows, key=lambda row: (row.settled, -row.dispute, place[row.query_id]))


def _disputes(answers: Coded, kind: AgreementKind) -> dict[str, float]:
    """How far apart the answers to each disputed query are, in (0, 1]: a mean over annotators two by two, and units."""
    n = answers.n_values
    values = np.arange(n)
    if kind == "rating":
        apart = np.abs(values[:, None] - values[None, :]) / (n - 1)
    else:
        apart = 1 - np.eye(n) if kind == "safe" else np.array(_PAIR_DISTANCE)[:n, :n]
    counts = answers.counts
    given = counts.sum(axis=1)
    mean = ((counts @ apart) * counts).sum(axis=1) / np.maximum(given * (given - 1), 1)
    if kind == "rating":
        highest, lowest = n - 1 - (counts[:, ::-1] > 0).argmax(axis=1), (counts > 0).argmax(axis=1)
        mean[highest - lowest < _LEAST_SPAN] = 0.0
    by_query: dict[str, list[float]] = {}
    for unit, dispute in zip(answers.units, mean.tolist(), strict=True):
        by_query.setdefault(unit.query_id, []).append(dispute)
    return {query_id: sum(of) / len(of) for query_id, of in by_query.items() if any(of)}


def _disagreement(row: _Disputed, question: Question) -> Disagreement:
    answers = [
        GivenAnswer(x.annotator, x.annotator_kind, x.answer, in_words(x.answer, question), x.adjudicated)
        for x in sorted(row.labels, key=lambda label: label.annotator)
    ]
    return Disagreement(
        query_id=question.query_id,
        prompt_id=question.prompt_id,
        kind=question.kind,
        excerpt=excerpt(question),
        dispute=row.dispute,
        completions=_named(question),
        answers=tuple(answers),
        adjudicated=row.settled,
    )


def _named(question: Question) -> tuple[NamedCompletion, ...]:
    texts = dict(zip(question.completion_ids, question.completions, strict=True))
    return tuple(
        NamedCompletion(letter, completion_id, shortened(texts[completion_id], _COMPLETION_EXCERPT))
        for completion_id, letter in letters(question).items()
    )


def _cycle_excerpts(prompt: CyclicPrompt, questions: Mapping[str, Question]) -> tuple[str, ...]:
    texts: dict[int, str] = {}
    for question in (questions[query_id] for query_id in prompt.query_ids):
        texts |= zip(question.completion_ids, question.completions, strict=True)
    return tuple(shortened(texts[completion_id], _COMPLETION_EXCERPT) for completion_id in prompt.cycle)


def _remark(label: Label, question: Question) -> Remark:
    return Remark(
        label_id=label.label_id,
        query_id=label.query_id,
        prompt_id=question.prompt_id,
        excerpt=excerpt(question),
        annotator=label.annotator,
        flagged=label.flagged,
        note=label.note,
        created_at=label.created_at,
    )


# -- JSON --------------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Dicts, lists and numbers of a record, for JSON."""
    if isinstance(value, Answer):
        return answer_to_json(value)
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    return [_plain(held) for held in value] if isinstance(value, tuple) else value
