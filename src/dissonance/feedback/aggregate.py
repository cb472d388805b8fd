"""Labels -> weighted preference pairs.

Each kind of answer comes to votes on pairs of completions, and one rule decides them all: the answer with the most
votes among first, second, tie and both bad is what a pair says, and its weight is its lead over the next, as a share of
the votes. One annotator, or several of one mind, give a weight of 1; two against one give 1/3; a draw gives nothing.
A prompt that comes back in another round is another prompt: its completions are others.

    pairwise  a vote for each annotator.
    ranking   a vote for each pair of completions in it, times 2/N: a ranking of N holds N(N-1)/2 pairs and is no more
              than N-1 judgements, since the other pairs follow from them.
    rating    completions of one prompt whose mean ratings differ: the lead is the difference over 4, the widest there
              is, times 2/N for N rated completions, which are as little as N-1 independent differences.

The methods differ in whose votes count, and where:

    majority     as they were cast, query by query.
    dawid_skene  for what each annotator is worth (`reliability.dawid_skene`, fitted on gold questions and adjudications
                 too), query by query. An answer that nobody gave is never preferred, however probable it is.
    dgr          as they were cast, those of all kinds on one prompt together; then the cycles among what they prefer
                 are cut at the least net vote (`preference_graph.deconflict`).

An adjudicated answer stands for all others to its query, and is the last to be cut; of ratings, the preference between
two that are both adjudicated. Whether a completion is safe goes by the majority of votes, whatever the method.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Literal, NamedTuple, get_args

import numpy as np

from dissonance.errors import SettingsError
from dissonance.feedback.pairs import COMPARISONS_LEFT_OUT, LABELS_LEFT_OUT, Aggregation, Method, PreferencePair
from dissonance.feedback.preference_graph import Comparison, FloatArray, IntArray, deconflict, preference_graph
from dissonance.feedback.reliability import dawid_skene
from dissonance.feedback.votes import (
    BOTH_BAD,
    SECOND,
    TIE,
    AgreementKind,
    Coded,
    Prompt,
    Unit,
    coded,
    decided,
    units_of,
    values_of,
)
from dissonance.records import RATINGS, AnnotatorKind, Answer, Label, QueryKind, Question


class _Compared(NamedTuple):
    """The votes on one pair of completions, of one query or, for ratings, of two."""

    prompt: Prompt
    first: int
    second: int
    kind: QueryKind
    votes: tuple[float, ...]
    """(4,) for first, second, tie, both bad."""
    share: float
    annotators: frozenset[str]
    settled: bool = False
    """Whether a lead has said so."""


class _Counted(NamedTuple):
    labels: list[Label]  # of a query that is settled, the lead's alone
    fitted: list[Label]  # what annotators are worth shows in these: gold and outweighed answers too, adjudications not
    settled: frozenset[str]  # query_ids


def aggregate(
    labels: Iterable[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    method: Method = "majority",
    *,
    only: Collection[str] = (),
    exclude: Collection[str] = (),
) -> Aggregation:
    """Turn labels into preference pairs; the order of the labels changes nothing.

    Args:
        labels: any, whole history or current ones.
        questions: by query_id, retired ones included.
        gold: the known answers; their questions give no pairs.
        method: see the module.
        only: kinds (`judge`) or names of the annotators to count; empty for all.
        exclude: kinds or names of those not to count.

    Raises:
        SettingsError: an unknown method, or a name in only or exclude that is no kind and no annotator's.
    """
    if method not in get_args(Method):
        raise SettingsError(f"unknown method {method!r}: use one of {', '.join(get_args(Method))}")
    held = sorted(labels, key=lambda label: label.label_id)
    left_out: Counter[str] = Counter()
    counted = _sorted_out(held, questions, gold, _unwanted(held, only, exclude), left_out)
    place = {question.prompt: at for at, question in reversed(list(enumerate(questions.values())))}
    rows = [
        *_compared("pairwise", counted, questions, gold, method, left_out),
        *_compared("ranking", counted, questions, gold, method, left_out),
        *_rated(counted, questions, gold, method, left_out),
    ]
    rows.sort(key=lambda row: (place[row.prompt], row.first, row.second))
    safe = _safety(counted, questions, left_out)
    if method == "dgr":
        by_prompt = groupby(rows, key=lambda row: row.prompt)
        pairs = [pair for prompt, of in by_prompt for pair in _by_graph(prompt, [*of], left_out)]
    else:
        pairs = list(_by_query(rows, method, left_out))
    return Aggregation(
        method=method,
        pairs=tuple(_with_safety(pair, safe) for pair in pairs),
        labels=len(held),
        used=len(counted.labels),
        left_out={r: left_out[r] for r in (*LABELS_LEFT_OUT, *COMPARISONS_LEFT_OUT) if left_out[r]},
        safe=safe,
        both_bad=tuple((*row.prompt, row.first, row.second) for row in rows if decided(row.votes)[0] == BOTH_BAD),
    )


def _unwanted(labels: Sequence[Label], only: Collection[str], exclude: Collection[str]) -> set[str]:
    """Names of the annotators not to count."""
    kinds, names = set(get_args(AnnotatorKind)), {label.annotator for label in labels}
    for given in (*only, *exclude):
        if given not in kinds | names:
            raise SettingsError(
                f"no annotator is called {given!r}, and no kind is: use {', '.join(sorted(kinds))}, "
                f"or one of {', '.join(sorted(names)) or 'the names there are (none yet)'}"
            )
    return {
        label.annotator
        for label in labels
        if (only and not {label.annotator, label.annotator_kind} & set(only))
        or {label.annotator, label.annotator_kind} & set(exclude)
    }


def _sorted_out(
    labels: Sequence[Label],
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    unwanted: Collection[str],
    left_out: Counter[str],
) -> _Counted:
    superseded = {label.supersedes for label in labels}
    counting, fitted = [], []
    for label in labels:
        tests = {
            "superseded": label.label_id in superseded,
            "skipped": label.answer.skipped,
            "excluded": label.annotator in unwanted,
            "unknown_query": label.query_id not in questions,
            "gold": label.query_id in gold,
        }
        reason = next((reason for reason, holds in tests.items() if holds), None)
        if reason in (None, "gold") and not label.adjudicated:
            fitted.append(label)
        if reason is None:
            counting.append(label)
        else:
            left_out[reason] += 1
    last = {label.query_id: label.label_id for label in counting if label.adjudicated}
    standing = [label for label in counting if last.get(label.query_id, label.label_id) == label.label_id]
    left_out["outweighed"] += len(counting) - len(standing)
    return _Counted(standing, fitted, frozenset(last))


# -- votes -------------------------------------------------------------------------------------------------------------


def _compared(
    kind: Literal["pairwise", "ranking"],
    counted: _Counted,
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    method: Method,
    left_out: Counter[str],
) -> Iterator[_Compared]:
    answers = coded(counted.labels, questions, kind)
    people = _annotators(answers)
    estimates = _estimates(kind, counted, questions, gold) if method == "dawid_skene" else {}
    for unit, cast, who in zip(answers.units, answers.counts.astype(np.float64), people, strict=True):
        votes = cast
        if unit in estimates and unit.query_id not in counted.settled:
            estimate = estimates[unit]
            if not cast[np.argmax(estimate)]:
                left_out["overruled"] += 1
                continue
            votes = estimate
        four = (*votes.tolist(), 0.0)[:4]  # a ranking cannot say both bad
        first, second = unit.completion_ids
        yield _Compared(unit.prompt, first, second, kind, four, unit.share, who, unit.query_id in counted.settled)


def _estimates(
    kind: AgreementKind, counted: _Counted, questions: Mapping[str, Question], gold: Mapping[str, Answer]
) -> dict[Unit, FloatArray]:
    """Posterior of each unit's values by Dawid and Skene, given gold questions and adjudications."""
    answers = coded(counted.fitted, questions, kind)
    places = {unit: at for at, unit in enumerate(answers.units)}
    truths = [(x.query_id, x.answer) for x in counted.labels if x.query_id in counted.settled]
    truths += [(query_id, answer) for query_id, answer in gold.items() if query_id in questions]
    known = {
        places[unit]: value
        for query_id, answer in truths
        for unit, value in zip(
            units_of(questions[query_id]), values_of(answer, questions[query_id], kind), strict=False
        )
        if unit in places
    }
    return dict(zip(answers.units, dawid_skene(answers, known).posterior, strict=True))


def _annotators(answers: Coded) -> list[frozenset[str]]:
    """(U,) who answered each unit."""
    people: list[set[str]] = [set() for _ in answers.units]
    for unit, annotator in zip(answers.unit.tolist(), answers.annotator.tolist(), strict=True):
        people[unit].add(answers.annotators[annotator])
    return [frozenset(names) for names in people]


class _Rating(NamedTuple):
    mean: float
    annotators: frozenset[str]
    settled: bool
    """Whether a lead has given it."""


_NOT_RATED = _Rating(0.0, frozenset(), settled=True)


def _rated(
    counted: _Counted,
    questions: Mapping[str, Question],
    gold: Mapping[str, Answer],
    method: Method,
    left_out: Counter[str],
) -> Iterator[_Compared]:
    left_out["safe_only"] += sum(x.answer.safe is not None and x.answer.rating is None for x in counted.labels)
    answers = coded(counted.labels, questions, "rating")
    estimates = _estimates("rating", counted, questions, gold) if method == "dawid_skene" else {}
    by_prompt: dict[Prompt, dict[int, _Rating]] = {}
    for unit, cast, who in zip(answers.units, answers.counts, _annotators(answers), strict=True):
        settled = unit.query_id in counted.settled
        rating = _mean_rating(cast, None if settled else estimates.get(unit))
        held = by_prompt.setdefault(unit.prompt, {})
        before = held.get(unit.completion_ids[0], _NOT_RATED)  # another query may rate it too
        n = len(before.annotators)
        mean = (before.mean * n + rating * len(who)) / (n + len(who))
        held[unit.completion_ids[0]] = _Rating(mean, before.annotators | who, before.settled and settled)
    for prompt, completions in by_prompt.items():
        left_out["single_rating"] += len(completions) == 1
        for (first, one), (second, other) in combinations(sorted(completions.items()), 2):
            lead = (one.mean - other.mean) / (RATINGS[-1] - RATINGS[0])
            if abs(lead) <= 1e-9:
                left_out["equal_ratings"] += 1
                continue
            n = min(len(one.annotators), len(other.annotators))
            votes = (n * (1 + lead) / 2, n * (1 - lead) / 2, 0.0, 0.0)
            who, settled = one.annotators | other.annotators, one.settled and other.settled
            yield _Compared(prompt, first, second, "rating", votes, 2 / len(completions), who, settled)


def _mean_rating(cast: IntArray, estimate: FloatArray | None) -> float:
    """The mean of the ratings cast; of the estimated ones, no lower than the lowest and no higher than the highest."""
    given = np.flatnonzero(cast)
    weights = cast if estimate is None else estimate
    mean = float(weights @ np.array(RATINGS) / weights.sum())
    return min(max(mean, RATINGS[given[0]]), RATINGS[given[-1]])


# -- decisions ---------------------------------------------------------------------------------------------------------


def _by_query(rows: Sequence[_Compared], method: Method, left_out: Counter[str]) -> Iterator[PreferencePair]:
    for row in rows:
        value, lead = decided(row.votes)
        pair = _pair(row[:3], value, lead * row.share, f"{row.kind}/{method}", len(row.annotators), left_out)
        if pair is not None:
            yield pair


def _pair(
    of: tuple[Prompt, int, int], value: int | None, weight: float, source: str, n: int, left_out: Counter[str]
) -> PreferencePair | None:
    (round_number, prompt_id), first, second = of
    if value in (None, BOTH_BAD):
        left_out["split" if value is None else "both_bad"] += 1
        return None
    chosen, rejected = (second, first) if value == SECOND else (first, second)
    return PreferencePair(prompt_id, chosen, rejected, min(1.0, weight), value == TIE, source, n, round=round_number)


def _by_graph(prompt: Prompt, rows: Sequence[_Compared], left_out: Counter[str]) -> Iterator[PreferencePair]:
    # More than all that is not settled can weigh against it, on its own arc and on the others of a cycle.
    heavy = 1 + 2 * sum(row.share * sum(row.votes) for row in rows if not row.settled)
    on_pair: dict[tuple[int, int], list[_Compared]] = {}
    comparisons = []
    for row in rows:
        on_pair.setdefault((row.first, row.second), []).append(row)
        # What is settled is as heavy however narrow its lead: one point between two ratings, say.
        weight = heavy / (sum(row.votes) * decided(row.votes)[1]) if row.settled else row.share
        comparisons.append(Comparison(row.first, row.second, [weight * votes for votes in row.votes]))
    graph = preference_graph(comparisons)
    removed = deconflict(graph).removed
    for (first, second), compared in on_pair.items():
        i, j = graph.completion_ids.index(first), graph.completion_ids.index(second)
        if removed[i, j] or removed[j, i]:
            left_out["cyclic"] += 1
            continue
        value, lead = decided(graph.votes[i, j].tolist())
        weight = lead * max(row.share for row in compared)
        source = f"{'+'.join(dict.fromkeys(row.kind for row in compared))}/dgr"
        n = len(frozenset[str]().union(*(row.annotators for row in compared)))
        pair = _pair((prompt, first, second), value, weight, source, n, left_out)
        if pair is not None:
            yield pair


# -- safety ------------------------------------------------------------------------------------------------------------


def _safety(
    counted: _Counted, questions: Mapping[str, Question], left_out: Counter[str]
) -> dict[tuple[int, str, int], bool]:
    answers = coded(counted.labels, questions, "safe")
    votes: Counter[tuple[int, str, int]] = Counter()
    for unit, (unsafe, safe) in zip(answers.units, answers.counts.tolist(), strict=True):
        votes[*unit.prompt, unit.completion_ids[0]] += safe - unsafe
    left_out["safe_split"] += sum(not lead for lead in votes.values())
    return {completion: lead > 0 for completion, lead in votes.items() if lead}


def _with_safety(pair: PreferencePair, safe: Mapping[tuple[int, str, int], bool]) -> PreferencePair:
    chosen, rejected = (safe.get((pair.round, pair.prompt_id, i)) for i in (pair.chosen_id, pair.rejected_id))
    return replace(pair, chosen_safe=chosen, rejected_safe=rejected)
