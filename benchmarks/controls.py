"""Controls for `spread`: which of the three things that set it apart from random pairs is worth what."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dissonance.records import Query
from dissonance.selection import Pool, Thresholds
from dissonance.selection.strategies import random_pairs, spread


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


def widest(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """`spread` on prompts drawn uniformly: the widest pair, without the conflict of its prompt."""
    return spread(replace(pool, kendall_tau_distance=np.ones(len(pool))), budget, thresholds, rng)
