"""Strategies that were tried on development worlds and not taken: rankings instead of comparisons, and a balance."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from dissonance.records import Query
from dissonance.selection import Pool, Thresholds
from dissonance.selection.pool import FloatArray, IntArray
from dissonance.selection.strategies import drawn_by_conflict, spread


def balanced(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """`spread`, but of every second prompt the widest discordant pair, and of the others the widest concordant one."""
    every = spread(pool, len(pool) * 1_000, thresholds, rng)
    place = {name: p for p, name in enumerate(pool.prompt_ids)}
    order = list(dict.fromkeys(query.prompt_id for query in every))
    side = {name: (-1, 1)[turn % 2] for turn, name in enumerate(order)}
    first: dict[str, Query] = {}
    for query in every:
        if _agreement(pool, place[query.prompt_id], query) == side[query.prompt_id]:
            first.setdefault(query.prompt_id, query)
    return [first[name] for name in order if name in first][:budget]


def _agreement(pool: Pool, prompt: int, query: Query) -> int:
    start = pool.offsets[prompt]
    stop = pool.offsets[prompt + 1]
    i, j = (start + int(np.flatnonzero(pool.completion_ids[start:stop] == k)[0]) for k in query.completion_ids)
    return int(np.sign((pool.reward[i] - pool.reward[j]) * (pool.loglikelihood[i] - pool.loglikelihood[j])))


def spread_of(size: int, pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> Sequence[Query]:
    """Rank so many answers of prompts drawn by K^2: the two furthest apart, then the farthest from its nearest."""
    queries: list[Query] = []
    for p in drawn_by_conflict(pool, thresholds, rng).tolist():
        answers = pool.answers[pool.answer_offsets[p] : pool.answer_offsets[p + 1]]
        taken = _farthest(pool.z_reward[answers], pool.z_loglikelihood[answers], min(size, budget + 1))
        if len(taken) < 2:
            continue
        ids = tuple(pool.completion_ids[np.sort(answers[taken])].tolist())
        queries.append(Query(pool.prompt_ids[p], "ranking" if len(ids) > 2 else "pairwise", ids, 0.0, "far apart"))
        budget -= len(ids) - 1
    return queries


def _farthest(reward: FloatArray, likelihood: FloatArray, size: int) -> IntArray:
    gaps = np.abs(reward[:, None] - reward) + np.abs(likelihood[:, None] - likelihood)
    taken = [int(k) for k in np.unravel_index(np.argmax(gaps), gaps.shape)][:size]
    while len(taken) < min(size, len(gaps)):
        nearest = gaps[taken].min(axis=0)
        nearest[taken] = -1.0
        taken.append(int(np.argmax(nearest)))
    return np.array(taken)


spread_of_3, spread_of_4, spread_of_8 = (partial(spread_of, size) for size in (3, 4, 8))
