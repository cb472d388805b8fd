"""Answers as numbers: who gave which value to which pair of completions, or to which completion.

Everything that is measured on labels, and every pair that is made of them, starts from here. A pair is named by its
completion_ids, the lower first: neither the order in which a question holds them nor the order in which they were shown
can turn a preference round.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from dissonance.records import RATINGS, Answer, Choice, Label, Question

AgreementKind = Literal["pairwise", "rating", "safe", "ranking"]
AGREEMENT_KINDS: tuple[AgreementKind, ...] = get_args(AgreementKind)
CHOICES: tuple[Choice, ...] = get_args(Choice)
FIRST, SECOND, TIE, BOTH_BAD = range(4)
MIRRORED = (SECOND, FIRST, TIE, BOTH_BAD)
"""What each value of a pair is called when its completions are named the other way round."""

_VALUES: dict[AgreementKind, int] = {"pairwise": 4, "rating": 5, "safe": 2, "ranking": 3}

_EVEN = 1e-9  # relative: sums of the same shares in another order are even

IntArray = npt.NDArray[np.int64]


Prompt = tuple[int, str]
"""Round and prompt_id: in another round, the same completion_ids are other texts."""


class Unit(NamedTuple):
    """What one value is given to: a pair of completions of a query, or the one completion of a rating query."""

    query_id: str
    prompt: Prompt
    completion_ids: tuple[int, ...]
    """Two, the lower first (whichever the question names first), or one."""
    share: float
    """What an answer to it counts: 1; 2/N in a ranking of N, whose N(N-1)/2 pairs are N-1 judgements."""


@dataclass(frozen=True, eq=False, slots=True)
class Coded:
    """Answers of one kind as numbers: V values given to U units by A annotators."""

    units: tuple[Unit, ...]
    annotators: tuple[str, ...]
    unit: IntArray
    """(V,) which unit."""
    annotator: IntArray
    """(V,) by whom."""
    label: IntArray
    """(V,) in which of the labels."""
    value: IntArray
    """(V,) FIRST, SECOND, TIE or BOTH_BAD of a pair; rating - 1; 1 for safe, 0 for unsafe."""
    n_values: int

    @property
    def counts(self) -> IntArray:
        """(U, n_values) how many gave each value."""
        flat = np.bincount(self.unit * self.n_values + self.value, minlength=len(self.units) * self.n_values)
        return flat.reshape(len(self.units), self.n_values)


def standing(labels: Iterable[Label]) -> list[Label]:
    """Leave out the labels that a correction supersedes; the rest by label_id, whatever the order they come in."""
    held = list(labels)
    superseded = {label.supersedes for label in held}
    return sorted((x for x in held if x.label_id not in superseded), key=lambda label: label.label_id)


def independent(labels: Iterable[Label], gold: Collection[str]) -> list[Label]:
    """Leave out skips, adjudications and the answers to gold questions: what agreement is measured on."""
    return [x for x in standing(labels) if not (x.answer.skipped or x.adjudicated or x.query_id in gold)]


def coded(labels: Sequence[Label], questions: Mapping[str, Question], kind: AgreementKind) -> Coded:
    """Give the answers of one kind as numbers; labels of unknown questions are left out."""
    units: list[Unit] = []
    places: dict[str, range] = {}
    annotators: dict[str, int] = {}
    unit: list[int] = []
    who: list[int] = []
    where: list[int] = []
    value: list[int] = []
    for at, label in enumerate(labels):
        question = questions.get(label.query_id)
        said = values_of(label.answer, question, kind) if question is not None else ()
        if question is None or not said:
            continue
        if label.query_id not in places:
            places[label.query_id] = range(len(units), len(units) + len(said))
            units += units_of(question)
        unit += places[label.query_id]
        who += [annotators.setdefault(label.annotator, len(annotators))] * len(said)
        where += [at] * len(said)
        value += said
    columns = [np.array(column, np.int64) for column in (unit, who, where, value)]
    return Coded(tuple(units), tuple(annotators), columns[0], columns[1], columns[2], columns[3], _VALUES[kind])


def units_of(question: Question) -> list[Unit]:
    """The units of a question: its pairs of completions, or its one completion."""
    ids, n = sorted(question.completion_ids), len(question.completion_ids)
    groups = combinations(ids, 2) if n > 1 else [tuple(ids)]
    return [Unit(question.query_id, question.prompt, group, 2 / n if n > 1 else 1.0) for group in groups]


def values_of(answer: Answer, question: Question, kind: AgreementKind) -> Sequence[int]:
    """The value that an answer gives to each unit of its question; none where it says nothing of this kind."""
    if kind == "pairwise" and answer.choice is not None:
        first, second = question.completion_ids
        value = CHOICES.index(answer.choice)
        return (value if first < second else MIRRORED[value],)
    if kind == "ranking" and answer.ranks is not None:
        ranks = [rank for _, rank in sorted(zip(question.completion_ids, answer.ranks, strict=True))]
        return [TIE if a == b else FIRST if a < b else SECOND for a, b in combinations(ranks, 2)]
    if kind == "rating" and answer.rating is not None:
        return (RATINGS.index(answer.rating),)
    if kind == "safe" and answer.safe is not None:
        return (int(answer.safe),)
    return ()


@dataclass(frozen=True, eq=False, slots=True)
class Said:
    """What annotators said for themselves, ready to be measured."""

    labels: Sequence[Label]
    """`independent` ones."""
    by_kind: Mapping[AgreementKind, Coded]
    """The same, of every kind."""


def said(labels: Iterable[Label], questions: Mapping[str, Question], gold: Collection[str]) -> Said:
    """Sort out the labels once, for whatever is measured on them."""
    kept = independent(labels, gold)
    return Said(kept, {kind: coded(kept, questions, kind) for kind in AGREEMENT_KINDS})


def decided(votes: Sequence[float]) -> tuple[int | None, float]:
    """What the votes (4,) on a pair say: the value with the most, and its lead over the next as a share of the votes.

    None, and 0, where two are even.
    """
    best, after = sorted(votes, reverse=True)[:2]
    lead = best - after
    return (list(votes).index(best), lead / sum(votes)) if lead > _EVEN * best else (None, 0.0)
