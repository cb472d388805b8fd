"""One call from a pool to the queries to ask, with what was chosen and why."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from dissonance.config import DEFAULT_STRATEGY
from dissonance.errors import SettingsError
from dissonance.records import QUERIES_SCHEMA, Query
from dissonance.selection.pool import Pool
from dissonance.selection.strategies import (
    STRATEGIES,
    Strategy,
    conflicting_answers,
    conflicting_prompts,
    likelihood_gap,
)
from dissonance.selection.thresholds import (
    Threshold,
    ThresholdName,
    Thresholds,
    check_threshold,
    comparisons,
    effective_thresholds,
)

_TAKES = {
    "shf_cas": {"tau", "delta"},
    "pacs": {"delta"},
    **{name: {"tau"} for name in ("kendall", "discordant", "spread", "likelihood_gap")},
}
"""The thresholds that each conflict-driven strategy uses; a strategy of the user's may use both."""

_NO_LENGTHS = (
    "warning: n_tokens is not known of every completion, so gaps are of whole answers, short against long: add it, or "
    "choose another strategy"
)


@dataclass(frozen=True, slots=True)
class Selection:
    """What a strategy chose."""

    strategy: str
    """The name of a built-in, or of the user's callable."""

    queries: tuple[Query, ...]
    """In the order of asking."""

    thresholds: Thresholds
    """In force, quantiles as the numbers they came to."""

    explanation: tuple[str, ...]
    """Lines for people: what was kept at each step, then warnings."""

    @property
    def judgements(self) -> int:
        """What all queries cost."""
        return sum(query.judgements for query in self.queries)

    @property
    def prompts(self) -> int:
        """How many prompts are asked about."""
        return len({query.prompt_id for query in self.queries})


def select(
    pool: Pool,
    strategy: str | Strategy = DEFAULT_STRATEGY,
    *,
    budget: int,
    rng: np.random.Generator,
    tau: Threshold | None = None,
    delta: Threshold | None = None,
) -> Selection:
    """Choose what to ask for at most `budget` judgements.

    `strategy` names one of `STRATEGIES` or is a callable like them. Equal pools, settings and states of `rng` give
    equal selections. With less to ask than the budget pays for, everything is asked, and the explanation says so.
    Raises SettingsError for an unknown strategy, a budget below 1, a threshold out of range or one that the strategy
    does not use, and for a callable that overspends or asks about what the pool does not hold.
    """
    name, ask = _named(strategy)
    if budget < 1:
        raise SettingsError(f"the budget is {budget} judgements: give at least 1")
    own = name if ask in STRATEGIES.values() else None
    check_option(own, "tau", tau)
    check_option(own, "delta", delta)
    thresholds = effective_thresholds(pool, tau, delta)
    queries = tuple(ask(pool, budget, thresholds, rng))
    _check_queries(pool, name, queries, budget)
    lines = [_funnel(pool, name, thresholds, queries, budget), *comparisons(pool, thresholds)]
    if ask is likelihood_gap and pool.mean_loglikelihood is None:
        lines.append(_NO_LENGTHS)
    selection = Selection(name, queries, thresholds, tuple(lines))
    if selection.judgements < budget:
        note = f"note: there is no more to ask: {selection.judgements:,} of {_count(budget, 'judgement')} are spent"
        return replace(selection, explanation=(*lines, note))
    return selection


def queries_table(selection: Selection, round_number: int = 0) -> pa.Table:
    """Give a round's queries as a table of `QUERIES_SCHEMA`.

    A query's id is the same whichever strategy asked it, and another in another round: there, the same completion_ids
    are other texts.
    """
    rows = [
        {
            "query_id": query_id(query, round_number),
            "prompt_id": query.prompt_id,
            "kind": query.kind,
            "completion_ids": query.completion_ids,
            "judgements": query.judgements,
            "strategy": selection.strategy,
            "priority": query.priority,
            "reason": query.reason,
        }
        for query in selection.queries
    ]
    return pa.Table.from_pylist(rows, schema=QUERIES_SCHEMA)


def _named(strategy: str | Strategy) -> tuple[str, Strategy]:
    if callable(strategy):
        return getattr(strategy, "__name__", type(strategy).__name__), strategy
    if strategy not in STRATEGIES:
        raise SettingsError(f"unknown strategy {strategy!r}: use one of {', '.join(STRATEGIES)}")
    return strategy, STRATEGIES[strategy]


def check_option(name: str | None, option: ThresholdName, threshold: Threshold | None) -> None:
    """Refuse a threshold that is none, or that the built-in strategy of this name does not use; with SettingsError."""
    if threshold is None:
        return
    check_threshold(threshold, option)
    if name in STRATEGIES and option not in _TAKES.get(name, ()):
        users = ", ".join(user for user, options in _TAKES.items() if option in options)
        raise SettingsError(f"strategy {name!r} uses no {option}: leave it out, or choose one of {users}")


def query_id(query: Query, round_number: int) -> str:
    """A query's id in a round, whichever strategy asked it."""
    # The first round's number is left out: labels that are there keep their queries.
    content = [query.prompt_id, query.kind, sorted(query.completion_ids), *([round_number] if round_number else [])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _check_queries(pool: Pool, name: str, queries: Sequence[Query], budget: int) -> None:
    """Refuse what no annotator should see: strategies may be the user's own."""
    spent = sum(query.judgements for query in queries)
    if spent > budget:
        raise SettingsError(f"strategy {name!r} asked for {spent} judgements with a budget of {budget}: return fewer")
    prompts = {prompt_id: p for p, prompt_id in enumerate(pool.prompt_ids)}
    seen: set[tuple[str, str, frozenset[int]]] = set()
    for query in queries:
        asked = f"strategy {name!r} asked about completions {query.completion_ids} of prompt {query.prompt_id!r}"
        if query.prompt_id not in prompts:
            raise SettingsError(f"{asked}: no such prompt in the pool")
        start, stop = pool.offsets[prompts[query.prompt_id] :][:2].tolist()
        held, codes = pool.completion_ids[start:stop].tolist(), pool.text_codes[start:stop].tolist()
        if not set(query.completion_ids) <= set(held):
            raise SettingsError(f"{asked}: the prompt has only {held}")
        if len({codes[held.index(i)] for i in query.completion_ids}) < len(query.completion_ids):
            raise SettingsError(f"{asked}: two of them are the same text")
        key = (query.prompt_id, query.kind, frozenset(query.completion_ids))
        if key in seen:
            raise SettingsError(f"{asked} twice: ask once")
        seen.add(key)


def _funnel(pool: Pool, name: str, thresholds: Thresholds, queries: Sequence[Query], budget: int) -> str:
    """Say what each step kept, e.g. `64 prompts -> 62 not degenerate -> 41 with K >= 0.50 -> ...`."""
    steps = [_count(len(pool), "prompt")]
    if name in _TAKES or thresholds != Thresholds():
        steps.append(f"{np.count_nonzero(~pool.degenerate):,} not degenerate")
    if thresholds.tau is not None:
        steps.append(f"{np.count_nonzero(conflicting_prompts(pool, thresholds)):,} with K >= {thresholds.tau:.2f}")
    if thresholds.delta is not None:
        kept = _count(len(conflicting_answers(pool, thresholds)), "completion")
        steps.append(f"{kept} with |PACS| >= {thresholds.delta:.2f}")
    spent = sum(query.judgements for query in queries)
    kinds = sorted({query.kind for query in queries})
    asked = f"{len(queries):,} {' and '.join(kinds)} {'query' if len(queries) == 1 else 'queries'}"
    if not queries:
        asked = "nothing to ask"
    steps.append(f"{asked} within the budget ({spent:,} of {_count(budget, 'judgement')})")
    return " -> ".join(steps)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
