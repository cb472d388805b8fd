"""How good the answers are: agreement, reliability, position bias, pace, contradictions.

Every function is pure: labels, questions by query_id and known answers in, numbers out (`ready` is `votes.said` of the
same, where it is there already). Labels that a correction
supersedes and skips never count. Gold questions tell how accurate an annotator is and nothing else: they were chosen
for being clear, and everyone answers them. Adjudications count for none of this: who gives one has seen the others'.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, Literal, NamedTuple

import krippendorff
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dissonance.feedback.preference_graph import Comparison, FloatArray, find_cycle, preference_graph
from dissonance.feedback.votes import (
    CHOICES,
    FIRST,
    SECOND,
    AgreementKind,
    Coded,
    Prompt,
    Said,
    decided,
    said,
    standing,
)
from dissonance.records import AnnotatorKind, Answer, Label, Question

LEAST_FOR_ALPHA = 5  # queries with answers of two annotators: a bootstrap of fewer gives no interval

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """Krippendorff's alpha of one kind of answer."""

    kind: AgreementKind
    alpha: Interval | None
    """At most 1, which is perfect agreement; 0 is what chance gives. None where it cannot be told."""
    reason: str
    """Why `alpha` is None; empty otherwise."""
    queries: int
    """Queries with answers of two annotators or more: what alpha rests on."""
    annotators: int
    """Who gave those answers."""


@dataclass(frozen=True, slots=True)
class AnnotatorQuality:
    """One annotator's answers at a glance."""

    name: str
    kind: AnnotatorKind
    answers: int
    """Current answers, gold questions included; skips and adjudications are not."""
    skips: int
    per_hour: float | None
    """3600 over the median seconds per answer (a coffee break is no slow answer); None where no time was taken."""
    left_share: Interval | None
    """Of the answers that preferred a side, the share of the left one; 1/2 without position bias."""
    gold_accuracy: Interval | None
    """Share of the gold questions answered right; None where none were answered."""
    majority_agreement: Interval | None
    """Share of the answers that go with the majority of the others; None where there is none to go with."""


@dataclass(frozen=True, slots=True)
class CyclicPrompt:
    """A prompt whose answers contradict each other: A over B, B over C, C over A."""

    prompt_id: str
    cycle: tuple[int, ...]
    """completion_ids, each preferred to the next and the last to the first."""
    query_ids: tuple[str, ...]
    """The queries that compared two neighbours on the cycle."""
    round: int = 0
    """Of which round these completions are."""


@dataclass(frozen=True, slots=True)
class ConflictRate:
    """How many prompts have a cycle among their preferences: the conflict detection rate of arXiv 2510.15514."""

    rate: Interval | None
    """Share of `prompts`; None where there are none."""
    prompts: int
    """Prompts with three compared completions or more: others can have no cycle."""
    cyclic: tuple[CyclicPrompt, ...]


# -- agreement ---------------------------------------------------------------------------------------------------------


def agreements(
    labels: Iterable[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    *,
    seed: int = 0,
    replicates: int = 1000,
    ready: Said | None = None,
) -> tuple[Agreement, ...]:
    """Measure Krippendorff's alpha of each kind of answer that was given.

    Pairwise choices are nominal over first, second, tie and both bad; ratings ordinal; safe nominal; a ranking is as
    many nominal values as it has pairs of completions (first, second, tie). The interval is the percentile bootstrap
    over queries.
    """
    every = (ready or said(labels, questions, gold)).by_kind
    return tuple(agreement(kind, every[kind], seed=seed, replicates=replicates) for kind in every if every[kind].units)


def agreement(kind: AgreementKind, answers: Coded, *, seed: int = 0, replicates: int = 1000) -> Agreement:
    """Measure Krippendorff's alpha of answers of one kind, see `agreements`."""
    counts = answers.counts
    pairable = counts.sum(axis=1) >= 2
    queries = len({answers.units[u].query_id for u in np.flatnonzero(pairable)})
    people = len(np.unique(answers.annotator[pairable[answers.unit]]))
    if not queries:
        reason = "no query has answers of two annotators"
    elif queries < LEAST_FOR_ALPHA:
        reason = f"only {queries} of the {LEAST_FOR_ALPHA} queries that it needs have answers of two annotators"
    elif np.count_nonzero(counts[pairable].sum(axis=0)) < 2:
        reason = "all answers are the same: agreement cannot be told from chance"
    else:
        reason = ""
    alpha = None if reason else _alpha(kind, answers, np.random.default_rng(seed), replicates)
    return Agreement(kind, alpha, reason, queries, people)


def _alpha(kind: AgreementKind, answers: Coded, rng: np.random.Generator, replicates: int) -> Interval:
    ordinal = kind == "rating"
    level: Literal["ordinal", "nominal"] = "ordinal" if ordinal else "nominal"
    mean = krippendorff.alpha(value_counts=answers.counts, level_of_measurement=level)
    # Queries with the same answers are the same to alpha: few rows are drawn from, however many queries there are.
    rows, times = np.unique(_coincidences(answers), axis=0, return_counts=True)
    drawn = np.einsum("bq,qv->bv", rng.multinomial(times.sum(), times / times.sum(), size=replicates), rows)
    alphas = _alphas(drawn.reshape(replicates, answers.n_values, answers.n_values), ordinal)
    low, high = np.nanquantile(alphas, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))


def _coincidences(answers: Coded) -> FloatArray:
    """(Q, n_values^2) the coincidence matrix of each query that has any: what queries add up to alpha by."""
    counts = answers.counts.astype(np.float64)
    given = counts.sum(axis=1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(answers.n_values)
    pairs /= np.maximum(given - 1, 1)[:, None, None]
    queries: dict[str, int] = {}
    of_unit = np.array([queries.setdefault(unit.query_id, len(queries)) for unit in answers.units])
    summed = np.zeros((len(queries), answers.n_values**2))
    np.add.at(summed, of_unit, pairs.reshape(len(pairs), -1))
    found: FloatArray = summed[summed.any(axis=1)]
    return found


def _alphas(coincidences: FloatArray, ordinal: bool) -> FloatArray:
    """Alpha of each of B coincidence matrices, (B, n, n) -> (B,); NaN where all values are the same."""
    values = coincidences.sum(axis=2)
    total = values.sum(axis=1)
    middle = np.cumsum(values, axis=1) - values / 2
    n = values.shape[1]
    distance = (middle[:, :, None] - middle[:, None, :]) ** 2 if ordinal else 1 - np.eye(n)
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (values[:, :, None] * values[:, None, :] * distance).sum(axis=(1, 2))
    ratio = np.divide(observed, expected, out=np.full(len(values), np.nan), where=expected > 0)
    alphas: FloatArray = 1 - (total - 1) * ratio
    return alphas


# -- annotators --------------------------------------------------------------------------------------------------------


def annotator_quality(
    labels: Iterable[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    *,
    ready: Said | None = None,
) -> tuple[AnnotatorQuality, ...]:
    """Describe the answers of each annotator, by name."""
    by_name: dict[str, list[Label]] = {}
    for label in standing(labels):
        if not label.adjudicated:
            by_name.setdefault(label.annotator, []).append(label)
    agreeing = _majority_agreement(ready or said(chain.from_iterable(by_name.values()), questions, gold))
    return tuple(_quality(name, by_name[name], questions, gold, agreeing.get(name)) for name in sorted(by_name))


def _quality(
    name: str,
    given: Sequence[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    agreeing: tuple[float, int] | None,
) -> AnnotatorQuality:
    answers = [label for label in given if not label.answer.skipped]
    seconds = [label.seconds for label in answers if label.seconds]
    left = [side for label in answers if (side := _chose_left(label, questions)) is not None]
    right = [is_right(x.answer, gold[x.query_id]) for x in answers if x.query_id in gold]
    return AnnotatorQuality(
        name=name,
        kind=given[0].annotator_kind,
        answers=len(answers),
        skips=len(given) - len(answers),
        per_hour=3600 / median(seconds) if seconds else None,
        left_share=wilson(sum(left), len(left)),
        gold_accuracy=wilson(sum(right), len(right)),
        majority_agreement=wilson(*agreeing) if agreeing else None,
    )


def _chose_left(label: Label, questions: Mapping[str, Question]) -> bool | None:
    question = questions.get(label.query_id)
    if question is None or label.answer.choice not in ("first", "second") or len(label.shown) != 2:
        return None
    return label.shown[0] == question.completion_ids[CHOICES.index(label.answer.choice)]


def is_right(answer: Answer, truth: Answer) -> bool:
    """Whether an answer fits the known one: the same choice, safety and order; a rating within one point of it."""
    if truth.rating is not None and (answer.rating is None or abs(answer.rating - truth.rating) > 1):
        return False
    if truth.ranks is not None:
        return answer.ranks is not None and _dense(answer.ranks) == _dense(truth.ranks)
    return (truth.safe is None or answer.safe == truth.safe) and answer.choice == truth.choice


def _dense(ranks: Sequence[int]) -> list[int]:
    """1, 3, 3 and 1, 2, 2 are the same order."""
    return [sorted(set(ranks)).index(rank) for rank in ranks]


def _majority_agreement(ready: Said) -> dict[str, tuple[float, int]]:
    """By annotator: how many of their answers go with the others', and of how many that can be told.

    An answer goes with the others' where it is what most of them said (a rating: within one point of their mean); one
    that holds several values, as a ranking does, counts the share of them that do.
    """
    labels = ready.labels
    agreed, told = np.zeros(len(labels)), np.zeros(len(labels))
    for kind, answers in ready.by_kind.items():
        goes, known = _goes_with_others(answers, kind)
        agreed += np.bincount(answers.label, goes & known, len(labels))
        told += np.bincount(answers.label, known, len(labels))
    tally: dict[str, tuple[float, int]] = {}
    for at in np.flatnonzero(told).tolist():
        before, n = tally.get(labels[at].annotator, (0.0, 0))
        tally[labels[at].annotator] = before + float(agreed[at] / told[at]), n + 1
    return tally


def _goes_with_others(answers: Coded, kind: AgreementKind) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(V,) whether each value goes with the others' of its unit, and whether those have a majority."""
    others = answers.counts[answers.unit]
    rows = np.arange(len(others))
    others[rows, answers.value] -= 1
    n = others.sum(axis=1)
    if kind == "rating":
        mean = others @ np.arange(answers.n_values) / np.maximum(n, 1)
        return np.abs(answers.value - mean) <= 1, n > 0
    ranked = np.sort(others, axis=1)
    return others[rows, answers.value] == ranked[:, -1], ranked[:, -1] > ranked[:, -2]


def wilson(successes: float, n: int) -> Interval | None:
    """Share of n with Wilson's 95 % interval; None of nothing."""
    if not n:
        return None
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


# -- contradictions ----------------------------------------------------------------------------------------------------


def conflict_rate(
    labels: Iterable[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    *,
    ready: Said | None = None,
) -> ConflictRate:
    """Count the prompts whose preferences run in a circle, by the votes of pairwise and ranking answers together.

    Ratings compare nothing: their order is free of cycles whatever is said. A prompt that comes back in another round
    is another: its completions are.
    """
    every = (ready or said(labels, questions, gold)).by_kind
    by_prompt: dict[Prompt, dict[tuple[int, ...], _Pair]] = {}
    for answers in (every["pairwise"], every["ranking"]):
        for unit, votes in zip(answers.units, answers.counts.tolist(), strict=True):
            pair = by_prompt.setdefault(unit.prompt, {}).setdefault(unit.completion_ids, _Pair([0.0] * 4, []))
            pair.queries.append(unit.query_id)
            for value, n in enumerate(votes):
                pair.votes[value] += n * unit.share
    large = {prompt: pairs for prompt, pairs in by_prompt.items() if len({i for ids in pairs for i in ids}) >= 3}
    cyclic = tuple(_cyclic(prompt, large[prompt]) for prompt in sorted(_with_cycle(large)))
    return ConflictRate(wilson(len(cyclic), len(large)), len(large), cyclic)


class _Pair(NamedTuple):
    votes: list[float]
    queries: list[str]


def _with_cycle(prompts: Mapping[Prompt, Mapping[tuple[int, ...], _Pair]]) -> set[Prompt]:
    """Find the prompts with a cycle; one graph holds them all: there is one search."""
    nodes: dict[tuple[Prompt, int], int] = {}
    arcs: list[tuple[int, int]] = []
    for prompt, pairs in prompts.items():
        for (first, second), pair in pairs.items():
            ends = (nodes.setdefault((prompt, first), len(nodes)), nodes.setdefault((prompt, second), len(nodes)))
            value, _ = decided(pair.votes)
            if value in (FIRST, SECOND):
                arcs.append(ends if value == FIRST else ends[::-1])
    start, end = np.array(arcs, np.int64).reshape(-1, 2).T
    graph: Any = coo_array((np.ones(len(arcs)), (start, end)), shape=(len(nodes), len(nodes)))
    _, component = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(component)
    return {prompt for (prompt, _), c in zip(nodes, component.tolist(), strict=True) if sizes[c] > 1}


def _cyclic(prompt: Prompt, pairs: Mapping[tuple[int, ...], _Pair]) -> CyclicPrompt:
    cycle = find_cycle(preference_graph(Comparison(a, b, pair.votes) for (a, b), pair in pairs.items()))
    neighbours = {tuple(sorted(ends)) for ends in zip(cycle, (*cycle[1:], cycle[0]), strict=True)}
    queries = dict.fromkeys(query_id for ids, pair in pairs.items() if ids in neighbours for query_id in pair.queries)
    return CyclicPrompt(prompt[1], cycle, tuple(queries), prompt[0])
