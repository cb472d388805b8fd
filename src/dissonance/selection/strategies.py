"""Acquisition strategies: pool, budget, thresholds and rng -> queries, in the order of asking.

All spend the same currency, judgements: 1 for a rating or a comparison, N-1 for a ranking of N. None exceeds the
budget; each spends all of it if there is enough to ask. Ties are broken by `rng`, since an order by position would
favour whatever stands first in the file. Degenerate prompts have no conflict, so that `shf_cas`, `discordant`,
`spread`, `likelihood_gap`, `pacs` and `kendall` leave them out; the others, which measure no conflict, do not.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dissonance.errors import SettingsError
from dissonance.records import Query, QueryKind
from dissonance.rejection import pooled_deviation, rejection_sample
from dissonance.selection.pool import FloatArray, IntArray, Pool
from dissonance.selection.thresholds import Thresholds

Strategy = Callable[[Pool, int, Thresholds, np.random.Generator], Sequence[Query]]
"""What to ask within a budget of judgements; `Pool.answers` are the completions to choose among."""

RSO_BETA = 0.5
"""How soft `rso` is, in standard deviations of the reward within a prompt."""

_PAIRS_PER_BLOCK = 1 << 20
"""Pairs held at once, so that memory does not grow with the pool."""


def shf_cas(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Rate the completions with |PACS| >= delta of the prompts with K >= tau, largest |PACS| first.

    Liu et al., arXiv 2512.09212, Algorithm 1, which asks about all of them; here a budget may cut the list. Without
    thresholds, all completions stand in the list.
    """
    return _ratings(pool, conflicting_answers(pool, thresholds), budget, rng)


def pacs(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Rate the completions with |PACS| >= delta, largest |PACS| first, whatever their prompt's K."""
    return _ratings(pool, conflicting_answers(pool, Thresholds(delta=thresholds.delta)), budget, rng)


def kendall(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Rank the answers of the prompts with K >= tau, largest K first; a last, partial one keeps the largest |PACS|."""
    prompts = np.flatnonzero(conflicting_prompts(pool, thresholds) & (pool.n_answers > 1))
    distances = pool.kendall_tau_distance
    ordered = prompts[_falling(distances[prompts], rng)]
    return [
        _query(pool, "ranking", answers, distances[p], f"K = {distances[p]:.2f}; {_extent(pool, p, answers)}")
        for p, answers in _to_rank(pool, ordered, np.abs(pool.pacs), budget)
    ]


def random_prompts(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Rank the answers of prompts drawn at random; a last, partial ranking keeps answers drawn at random."""
    prompts = rng.permutation(np.flatnonzero(pool.n_answers > 1))
    return [
        _query(pool, "ranking", answers, 0.0, f"prompt drawn at random; {_extent(pool, p, answers)}")
        for p, answers in _to_rank(pool, prompts, rng.random(len(pool.pacs)), budget)
    ]


def discordant(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Draw prompts in proportion to K^2, and compare in each the discordant pair with the largest PACS gap.

    Without replacement, by Gumbel top-k (Efraimidis and Spirakis 2006; Kool et al. 2019), among the prompts with
    K >= tau; one without a discordant pair is passed over. Once every prompt was asked about, the same order is
    gone through again with the next-largest gap. Ours: conflict-driven, yet diverse.
    """

    def gaps(first: IntArray, second: IntArray) -> FloatArray:
        opposed = np.sign(pool.reward[first] - pool.reward[second]) * np.sign(
            pool.loglikelihood[first] - pool.loglikelihood[second]
        )
        return np.where(opposed < 0, np.abs(pool.pacs[first] - pool.pacs[second]), 0.0)

    asked = _widest_rounds(pool, drawn_by_conflict(pool, thresholds, rng), budget, gaps, rng)
    return [_comparison(pool, i, j, gap, _opposition(pool, i, j, gap)) for i, j, gap in asked]


def spread(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Draw prompts in proportion to K^2, and compare in each the two answers that lie furthest apart.

    As `discordant`, but the gap is |z(r)_i - z(r)_j| + |z(l)_i - z(l)_j|, whichever way the two orders point: for a
    discordant pair that is its PACS gap. Where reward and policy agree on a pair and are wrong, or both right, its
    label says so too; labels of discordant pairs alone say mostly that the reward model errs. Ours.
    """

    def gaps(first: IntArray, second: IntArray) -> FloatArray:
        reward, likelihood = pool.z_reward, pool.z_loglikelihood
        return np.abs(reward[first] - reward[second]) + np.abs(likelihood[first] - likelihood[second])

    asked = _widest_rounds(pool, drawn_by_conflict(pool, thresholds, rng), budget, gaps, rng)
    return [_comparison(pool, i, j, gap, _distance(pool, i, gap)) for i, j, gap in asked]


def likelihood_gap(pool: Pool, budget: int, thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Draw prompts in proportion to K^2, and compare in each the policy's likeliest answer with its least likely.

    Whatever the reward model says of the two: where the policy is surest, its opinion is most worth checking, and two
    answers that it tells apart differ in something that it knows. By the log-likelihood per token where the answers'
    lengths are known; summed, the gap is mostly that between a short answer and a long one. Kin to `apl`, without a
    reference. Once every prompt was asked about, the same order is gone through again with the next-largest gap. Ours.
    """
    values = pool.loglikelihood if pool.mean_loglikelihood is None else pool.mean_loglikelihood

    def gaps(first: IntArray, second: IntArray) -> FloatArray:
        apart: FloatArray = np.abs(values[first] - values[second])
        return apart

    asked = _widest_rounds(pool, drawn_by_conflict(pool, thresholds, rng), budget, gaps, rng)
    return [_comparison(pool, i, j, gap, _surety(pool, i, j, values)) for i, j, gap in asked]


def margin(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Compare the pairs whose rewards are closest, where the reward model is least certain."""
    chosen = _lowest_pairs(pool, budget, rng, lambda i, j: np.abs(pool.reward[i] - pool.reward[j]))
    return [_comparison(pool, i, j, -gap, f"rewards only {gap:.3g} apart") for i, j, gap in chosen]


def ensemble(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Compare the pairs on whose reward difference an ensemble of reward models disagrees most.

    By the standard deviation over the members of r(i) - r(j). The variances of single rewards would not do: a
    Bradley-Terry reward is known up to what it adds to all answers of a prompt, and members differ in that too.
    """
    members = pool.member_rewards
    if members is None:
        raise SettingsError(
            "strategy 'ensemble' needs what several reward models say: add their rewards as the column member_rewards "
            "of completions.parquet (dissonance.refine.ensemble), or choose another strategy"
        )
    n_members = members.shape[1]
    chosen = _lowest_pairs(pool, budget, rng, lambda i, j: -(members[i] - members[j]).std(axis=1))
    return [
        _comparison(pool, i, j, -low, f"{n_members} reward models differ by {-low:.3g} (sd) on which is better")
        for i, j, low in chosen
    ]


def random_pairs(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Compare pairs drawn uniformly, without replacement, from all pairs of distinct answers to one prompt."""
    ends = np.cumsum(pool.n_answers * (pool.n_answers - 1) // 2)
    total = int(ends[-1]) if len(ends) else 0
    drawn = rng.choice(total, size=min(budget, total), replace=False) if total else np.empty(0, dtype=np.int64)
    prompts = np.searchsorted(ends, drawn, side="right")
    # Pair u of a prompt, in the order (0, 1), (0, 2), (1, 2), (0, 3), ...: j is the largest with j(j-1)/2 <= u.
    within = drawn - np.concatenate(([0], ends))[prompts]
    j = ((1 + np.sqrt(1 + 8 * within)) // 2).astype(np.int64)
    i = within - j * (j - 1) // 2
    start = pool.answer_offsets[prompts]
    chosen = zip(pool.answers[start + i], pool.answers[start + j], strict=True)
    return [_comparison(pool, a, b, 0.0, "pair drawn at random") for a, b in chosen]


def rso(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Compare pairs of the answers that statistical rejection sampling keeps: likely under the policy RL aims at.

    Liu et al. 2023 (arXiv 2309.06657), algorithm 1, on rewards divided by their standard deviation within a prompt,
    with beta `RSO_BETA`; half of a prompt's answers are kept, at least two. Prompts are drawn at random and give one
    pair of those kept, drawn at random; once each has, another.
    """
    prompts = rng.permutation(np.flatnonzero(pool.n_answers > 1))[:budget]
    answers = [pool.answers[pool.answer_offsets[p] : pool.answer_offsets[p + 1]] for p in prompts]
    scale = pooled_deviation([pool.reward[some] for some in answers]) if answers else 1.0
    drawn = []
    for place, some in enumerate(answers):
        kept = rejection_sample(pool.reward[some] / scale, max(2, len(some) // 2), RSO_BETA, rng)
        of_prompt = list(combinations(sorted(some[kept].tolist()), 2))
        drawn += [(turn, place, *of_prompt[k]) for turn, k in enumerate(rng.permutation(len(of_prompt)))]
    return [
        _comparison(pool, i, j, 0.0, "pair kept by rejection sampling on the reward")
        for _, _, i, j in sorted(drawn)[:budget]
    ]


def apl(pool: Pool, budget: int, _thresholds: Thresholds, rng: np.random.Generator) -> list[Query]:
    """Compare in each prompt the two answers with the largest gap in DPO's implicit reward, largest gap first.

    Muldrew et al. 2024 (arXiv 2402.08114), equation 7, the preference model's certainty; the implicit reward is
    log pi - log pi_ref, so that a policy which is its own reference has no preference, and the order is random. Once
    every prompt was asked about, each gives its next-largest gap.
    """
    implicit = pool.implicit_reward
    if implicit is None:
        raise SettingsError(
            "strategy 'apl' needs what a reference model says of the completions, the column ref_logprob of "
            "completions.parquet: audit with --reference, or choose another strategy"
        )
    blocks = [np.empty((5, 0))]
    for first, second in pairs(pool, np.arange(len(pool))):
        gap, ties = np.abs(implicit[first] - implicit[second]), rng.random(len(first))
        turn = _turns(pool.prompt_of[first], np.lexsort((ties, -gap, pool.prompt_of[first])))
        block = np.stack((turn, -gap, ties, first, second))
        blocks.append(block[:, np.lexsort(block[2::-1])[:budget]])
    found = np.concatenate(blocks, axis=1)
    asked = found[:, np.lexsort(found[2::-1])[:budget]]
    return [
        _comparison(pool, int(i), int(j), -low, f"implicit rewards {-low:.3g} apart") for _, low, _, i, j in asked.T
    ]


STRATEGIES: dict[str, Strategy] = {
    "shf_cas": shf_cas,
    "discordant": discordant,
    "spread": spread,
    "likelihood_gap": likelihood_gap,
    "pacs": pacs,
    "kendall": kendall,
    "random_prompts": random_prompts,
    "random_pairs": random_pairs,
    "margin": margin,
    "ensemble": ensemble,
    "rso": rso,
    "apl": apl,
}


def conflicting_prompts(pool: Pool, thresholds: Thresholds) -> NDArray[np.bool_]:
    """(P,): which prompts are not degenerate and have K >= tau."""
    least = 0.0 if thresholds.tau is None else thresholds.tau
    return ~pool.degenerate & (pool.kendall_tau_distance >= least)


def conflicting_answers(pool: Pool, thresholds: Thresholds) -> IntArray:
    """Flat indices of the distinct answers with |PACS| >= delta in the conflicting prompts."""
    answers = pool.answers[conflicting_prompts(pool, thresholds)[pool.prompt_of[pool.answers]]]
    least = 0.0 if thresholds.delta is None else thresholds.delta
    return answers[np.abs(pool.pacs[answers]) >= least]


def pairs(pool: Pool, prompts: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield every pair of distinct answers of these prompts as flat indices i < j, in blocks of bounded size."""
    counts = pool.n_answers[prompts]
    for n in np.unique(counts[counts > 1]):
        members = prompts[counts == n]
        i, j = np.triu_indices(int(n), 1)
        step = max(1, _PAIRS_PER_BLOCK // len(i))
        for start in range(0, len(members), step):
            block = pool.answers[pool.answer_offsets[members[start : start + step], None] + np.arange(n)]
            yield block[:, i].ravel(), block[:, j].ravel()


def _lowest_pairs(
    pool: Pool, budget: int, rng: np.random.Generator, measure: Callable[[IntArray, IntArray], FloatArray]
) -> list[tuple[int, int, float]]:
    """Pairs of distinct answers with the lowest measure of (first, second), flat indices, rising; ties at random."""
    blocks = []
    for block in pairs(pool, np.arange(len(pool))):
        values, ties = measure(*block), rng.random(len(block[0]))
        kept = _smallest(values, ties, budget)
        blocks.append((*(side[kept] for side in block), values[kept], ties[kept]))
    if not blocks:
        return []
    first, second, values, ties = (np.concatenate(column) for column in zip(*blocks, strict=True))
    return [(int(first[k]), int(second[k]), float(values[k])) for k in _smallest(values, ties, budget)]


def _falling(values: FloatArray, rng: np.random.Generator) -> IntArray:
    """Positions in falling order of value, ties at random."""
    return np.lexsort((rng.random(len(values)), -values))


def _smallest(values: FloatArray, ties: FloatArray, k: int) -> IntArray:
    """Positions of the k smallest values, rising; equal ones by `ties`. Sorts no more than it must."""
    candidates = np.arange(len(values))
    if len(values) > k:
        candidates = np.flatnonzero(values <= np.partition(values, k - 1)[k - 1])
    return candidates[np.lexsort((ties[candidates], values[candidates]))[:k]]


def _ratings(pool: Pool, answers: IntArray, budget: int, rng: np.random.Generator) -> list[Query]:
    chosen = answers[_falling(np.abs(pool.pacs[answers]), rng)[:budget]]
    return [_query(pool, "rating", chosen[[k]], abs(pool.pacs[i]), _ranks(pool, i)) for k, i in enumerate(chosen)]


def _to_rank(pool: Pool, prompts: IntArray, keep: FloatArray, budget: int) -> Iterator[tuple[int, IntArray]]:
    """Yield prompts (each has two answers or more) with all their answers; of the last, those with the largest `keep`.

    A whole ranking would rarely end exactly on the budget, and strategies are compared at equal cost.
    """
    for prompt in prompts:
        if budget == 0:
            return
        answers = pool.answers[pool.answer_offsets[prompt] : pool.answer_offsets[prompt + 1]]
        if len(answers) - 1 > budget:
            answers = np.sort(answers[np.argsort(-keep[answers], kind="stable")[: budget + 1]])
        budget -= len(answers) - 1
        yield int(prompt), answers


def drawn_by_conflict(pool: Pool, thresholds: Thresholds, rng: np.random.Generator) -> IntArray:
    """Prompts with K >= tau, drawn in proportion to K^2 without replacement, in the order of drawing."""
    prompts = np.flatnonzero(conflicting_prompts(pool, thresholds) & (pool.kendall_tau_distance > 0))
    keys = 2 * np.log(pool.kendall_tau_distance[prompts]) + rng.gumbel(size=len(prompts))
    return prompts[np.argsort(-keys)]


def _widest_rounds(
    pool: Pool,
    prompts: IntArray,
    budget: int,
    measure: Callable[[IntArray, IntArray], FloatArray],
    rng: np.random.Generator,
) -> list[tuple[int, int, float]]:
    """Pairs (first, second, gap): of each prompt, in order, the one with the largest gap above 0, then the next, ..."""
    place = np.empty(len(pool), dtype=np.int64)
    place[prompts] = np.arange(len(prompts))
    blocks = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    n_prompts, step = 0, max(budget, 1024)
    for start in range(0, len(prompts), step):
        for first, second in pairs(pool, prompts[start : start + step]):
            gap = measure(first, second)
            kept = gap > 0
            blocks.append((first[kept], second[kept], gap[kept]))
            n_prompts += len(np.unique(pool.prompt_of[first[kept]]))
        if n_prompts >= budget:
            break
    first, second, gap = (np.concatenate(column) for column in zip(*blocks, strict=True))
    where = place[pool.prompt_of[first]]
    order = np.lexsort((rng.random(len(gap)), -gap, where))
    asked = np.lexsort((where, _turns(where, order)))[:budget]
    return [(int(first[k]), int(second[k]), float(gap[k])) for k in asked]


def _turns(group: IntArray, order: IntArray) -> IntArray:
    """The place 0, 1, ... of each item within its group, in this order, which is sorted by group first."""
    turn = np.empty(len(order), dtype=np.int64)
    ordered = group[order]
    turn[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return turn


def _comparison(pool: Pool, first: int, second: int, priority: float, reason: str) -> Query:
    return _query(pool, "pairwise", np.array([first, second]), priority, reason)


def _query(pool: Pool, kind: QueryKind, answers: IntArray, priority: float, reason: str) -> Query:
    ids = tuple(pool.completion_ids[answers].tolist())
    return Query(pool.prompt_ids[pool.prompt_of[answers[0]]], kind, ids, float(priority), reason)


def _ranks(pool: Pool, answer: int) -> str:
    prompt = pool.prompt_of[answer]
    rows = slice(pool.offsets[prompt], pool.offsets[prompt + 1])
    by_reward, by_policy = (
        f"{1 + np.count_nonzero(scores[rows] > scores[answer])} of {rows.stop - rows.start}"
        for scores in (pool.reward, pool.loglikelihood)
    )
    distance = pool.kendall_tau_distance[prompt]
    return f"K = {distance:.2f}; reward ranks it {by_reward}, policy {by_policy}; PACS {pool.pacs[answer]:+.2f}"


def _opposition(pool: Pool, first: int, second: int, gap: float) -> str:
    liked, likely = (first, second) if pool.reward[first] > pool.reward[second] else (second, first)
    ids, distance = pool.completion_ids, pool.kendall_tau_distance[pool.prompt_of[first]]
    return f"K = {distance:.2f}; reward prefers {ids[liked]}, policy {ids[likely]}; PACS {gap:.2f} apart"


def _surety(pool: Pool, first: int, second: int, values: FloatArray) -> str:
    likely, unlikely = (first, second) if values[first] > values[second] else (second, first)
    ids, distance = pool.completion_ids, pool.kendall_tau_distance[pool.prompt_of[first]]
    reading = "" if pool.mean_loglikelihood is None else "per token, "
    lead = values[likely] - values[unlikely]
    return f"K = {distance:.2f}; {reading}policy prefers {ids[likely]} to {ids[unlikely]} by {lead:.2f} nats"


def _distance(pool: Pool, first: int, gap: float) -> str:
    distance = pool.kendall_tau_distance[pool.prompt_of[first]]
    return f"K = {distance:.2f}; reward and likelihood put them {gap:.2f} standard deviations apart"


def _extent(pool: Pool, prompt: int, answers: IntArray) -> str:
    n_answers = pool.n_answers[prompt]
    if len(answers) == n_answers:
        return f"all {n_answers} answers"
    return f"{len(answers)} of {n_answers} answers, to fit the budget"
