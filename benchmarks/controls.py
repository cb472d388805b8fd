"""Controls: which of the things that set `likelihood_gap` and `spread` apart from random pairs is worth what."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dissonance.records import Query
from dissonance.selection import Pool, Thresholds
from dissonance.selection.strategies import likelihood_gap, random_pairs, spread


def one_pair(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """Random pairs, but no prompt again before every prompt was asked about: diversity alone."""
    every = random_pairs(pool, len(pool) * 1_000, thresholds, rng)
    turns: dict[str, int] = {}
    ranked = []
    for place, query in enumerate(every):
        turns[query.prompt_id] = turns.get(query.prompt_id, -1) + 1
        ranked.append((turns[query.prompt_id], place, query))
    ranked.sort(key=lambda row: row[:2])
    return [query for _, _, query in ranked[:budget]]


def any_prompt(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """`likelihood_gap` on prompts drawn uniformly: without the conflict of its prompt."""
    return likelihood_gap(_without_conflict(pool), budget, thresholds, rng)


def summed(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """`likelihood_gap` by the log-likelihood of whole answers."""
    return likelihood_gap(replace(pool, mean_loglikelihood=None), budget, thresholds, rng)


def widest(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """`spread` on prompts drawn uniformly: the widest pair, without the conflict of its prompt."""
    return spread(_without_conflict(pool), budget, thresholds, rng)


def _without_conflict(pool: Pool) -> Pool:
    return replace(pool, kendall_tau_distance=np.ones(len(pool)), degenerate=np.zeros(len(pool), bool))
