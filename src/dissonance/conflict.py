"""How far a reward model and a policy disagree on the answers to a prompt: arrays in, arrays out.

For a prompt with N completions, r holds their rewards (higher is better) and l their log-likelihoods under the policy.

    PACS_i   z(r)_i - z(l)_i, signed, per completion (proxy-policy alignment conflict score)
    K        Kendall-tau distance of r and l, in [0, 1], per prompt

The metrics and their names are from Liu, Khajavi, Jiang and Liu, "Targeting Misalignment" (arXiv 2512.09212).
Ties in K count as in Fagin, Kumar, Mahdian, Sivakumar and Vee, "Comparing Partial Rankings" (SIAM J. Discrete Math.
20(3), 2006), with penalty 1/2. Pairs tied in both scores, as those of identical completions are, count 0: they lower K,
and what K is held against (`null.py`), by half their share.

All arithmetic is float64. Prompts of one N are handled together, in blocks: beyond input and output, it takes a few MB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dissonance.errors import DataError
from dissonance.null import (
    SIGNIFICANCE,
    FloatArray,
    IntArray,
    KendallNull,
    chance_shares,
    kendall_null,
    kendall_p_value,
    p_values,
)
from dissonance.summary import ConflictSummary, ConflictTally

__all__ = [
    "BoolArray",
    "ConflictSummary",
    "ConflictTally",
    "Conflicts",
    "FloatArray",
    "KendallNull",
    "conflicts",
    "kendall_null",
    "kendall_p_value",
    "kendall_tau_distance",
    "length_correlation",
    "pacs",
    "standardize",
    "tally",
]

BoolArray = npt.NDArray[np.bool_]

_DEGENERATE_RANGE = 1e-10
_RANK_DECIMALS = 9  # ranks of z-scores: rounding must not break ties
_BLOCK_VALUES = 1 << 15  # a block of float64 and its comparisons stay in a core's cache


@dataclass(frozen=True, slots=True)
class Conflicts:
    """The conflict of P prompts with R completions in all."""

    pacs: FloatArray
    """(R,) in the order of the input; 0 throughout a degenerate prompt."""

    kendall_tau_distance: FloatArray
    """(P,) in [0, 1]."""

    mean_abs_pacs: FloatArray
    """(P,) in [0, 2]."""

    max_abs_pacs: FloatArray
    """(P,) in [0, 2 sqrt(N - 1)]."""

    degenerate: BoolArray
    """(P,) whether the rewards or the log-likelihoods are constant: such a prompt shows no conflict either way."""

    n_completions: IntArray
    """(P,) N of each prompt."""

    n_distinct: IntArray
    """(P,) completions of the prompt that differ in reward or log-likelihood, at least 1."""

    tied_share: FloatArray
    """(P,) share of the pairs that are tied in both; independent scores give K = (1 - tied_share) / 2 on average."""

    distinct_distance: FloatArray
    """(P,) K with identical completions counted as one: what `null.py` is the distribution of."""


def standardize(values: npt.ArrayLike) -> tuple[FloatArray, BoolArray]:
    """z-scores along the last axis, with the population standard deviation.

    Args:
        values: (..., N), finite.

    Returns:
        z, (..., N), and degenerate, (...): where max - min <= 1e-10 * max|x|, the values are constant up to rounding,
        and z is 0.
    """
    z, degenerate = _standardize_first_axis(np.moveaxis(np.asarray(values, np.float64), -1, 0))
    return np.ascontiguousarray(np.moveaxis(z, 0, -1)), degenerate


def _standardize_first_axis(x: FloatArray) -> tuple[FloatArray, BoolArray]:
    # Differences from the minimum are exact for close values, and halves do not overflow: z is as good at an offset
    # of 1e9 times the spread, or at 1e308, as it is at 1.
    low, high = x.min(axis=0), x.max(axis=0)
    half_range = high / 2 - low / 2
    degenerate = np.asarray(half_range <= _DEGENERATE_RANGE / 2 * np.maximum(np.abs(low), np.abs(high)))
    u = (x / 2 - low / 2) / np.where(half_range > 0, half_range, 1.0)
    u -= _mean(u)
    sd = np.sqrt(_mean(u * u))
    z: FloatArray = np.where(degenerate, 0.0, u / np.where(degenerate, 1.0, sd))
    return z, degenerate


def _mean(x: FloatArray) -> FloatArray:
    # Row by row, since NumPy's own order of summation depends on the width of the block, and a result must not.
    mean: FloatArray = reduce(np.add, x) / len(x)
    return mean


@overload
def pacs(rewards: npt.NDArray[Any] | Sequence[float], logprobs: npt.NDArray[Any] | Sequence[float]) -> FloatArray: ...
@overload
def pacs(rewards: Sequence[npt.ArrayLike], logprobs: Sequence[npt.ArrayLike]) -> list[FloatArray]: ...
def pacs(rewards: Any, logprobs: Any) -> FloatArray | list[FloatArray]:
    """PACS of each completion, z(r) - z(l): positive where the reward model likes what the policy would hardly say.

    Args:
        rewards: (N,) or (P, N), higher is better; or a list of prompts, each (N_p,).
        logprobs: of the same shape, nats.

    Returns:
        The shape of the input; a list of arrays for a list of prompts. 0 throughout a prompt whose rewards or
        log-likelihoods are constant (`standardize`).

    Raises:
        DataError: NaN or infinity, N < 2, or shapes that differ.
    """
    r, ll, offsets, shape = _flatten_pair(rewards, logprobs)
    flat = conflicts(r, ll, offsets).pacs
    return np.split(flat, offsets[1:-1]) if shape is None else flat.reshape(shape)


def kendall_tau_distance(rewards: Any, logprobs: Any) -> float | FloatArray:
    """Count the pairs that r and l order oppositely, as a share of all N(N-1)/2.

    A pair tied in exactly one of them counts 1/2; tied in both, 0. Constant rewards or log-likelihoods
    (`standardize`) count as ties throughout, whatever the order of their last digits: K of a degenerate prompt is 1/2
    times the share of pairs that the other one tells apart, and says nothing about conflict.

    Args:
        rewards: (N,) or (P, N), higher is better; or a list of prompts, each (N_p,).
        logprobs: of the same shape, nats.

    Returns:
        A float for one prompt, else (P,), in [0, 1].

    Raises:
        DataError: NaN or infinity, N < 2, or shapes that differ.
    """
    r, ll, offsets, shape = _flatten_pair(rewards, logprobs)
    distance = conflicts(r, ll, offsets).kendall_tau_distance
    return float(distance[0]) if shape is not None and len(shape) == 1 else distance


def conflicts(
    rewards: npt.ArrayLike, logprobs: npt.ArrayLike, offsets: npt.ArrayLike, prompt_ids: Sequence[Any] | None = None
) -> Conflicts:
    """Both metrics for prompts of any N, laid end to end.

    Args:
        rewards: (R,), higher is better.
        logprobs: (R,), nats.
        offsets: (P + 1,), from 0 to R: prompt p has the completions offsets[p]:offsets[p + 1].
        prompt_ids: (P,), to name a prompt in an error; its position names it otherwise.

    Raises:
        DataError: NaN or infinity, a prompt with fewer than two completions, or lengths that do not fit together.
    """
    r, ll = np.asarray(rewards, np.float64), np.asarray(logprobs, np.float64)
    bounds = np.asarray(offsets, np.int64)
    _check(r, ll, bounds, prompt_ids)
    prompts = bounds.size - 1
    found = Conflicts(
        pacs=np.empty(r.size),
        kendall_tau_distance=np.empty(prompts),
        mean_abs_pacs=np.empty(prompts),
        max_abs_pacs=np.empty(prompts),
        degenerate=np.empty(prompts, np.bool_),
        n_completions=np.diff(bounds),
        n_distinct=np.empty(prompts, np.int64),
        tied_share=np.empty(prompts),
        distinct_distance=np.empty(prompts),
    )
    for rows, index in _blocks(bounds):
        _measure(found, rows, index, r[index], ll[index])
    return found


def tally(found: Conflicts) -> ConflictTally:
    """Count and sum what `ConflictTally.summary` needs."""
    proper = ~found.degenerate
    distance, n = found.distinct_distance[proper], found.n_distinct[proper]
    sizes, counts = np.unique(n, return_counts=True)
    by_size = list(zip(sizes.tolist(), counts.tolist(), strict=True))
    above = distance > 0.5
    return ConflictTally(
        prompts=proper.size,
        completions=found.pacs.size,
        degenerate=proper.size - distance.size,
        repeated=found.pacs.size - int(found.n_distinct.sum()),
        above=int(above.sum()),
        significant=int(np.sum(above & (p_values(distance, n) < SIGNIFICANCE))),
        kendall_tau_distance=float(found.kendall_tau_distance[proper].sum()),
        tied_share=float(found.tied_share[proper].sum()),
        distinct_distance=float(distance.sum()),
        null_variance=sum(count * kendall_null(size).sd ** 2 for size, count in by_size),
        null_above=sum(count * chance_shares(size).above for size, count in by_size),
        null_significant=sum(count * chance_shares(size).significant for size, count in by_size),
        mean_abs_pacs=float(found.mean_abs_pacs[proper].sum()),
    )


def length_correlation(
    pacs: FloatArray, n_tokens: npt.ArrayLike, offsets: npt.ArrayLike, degenerate: BoolArray
) -> float | None:
    """Spearman's rho of signed PACS with length, the length standardized within the prompt.

    PACS is relative to the prompt, so length must be: pooled with raw lengths, the prompts' own lengths would hide how
    PACS follows length within each. A sum log-likelihood falls with length, and pushes rho up.

    Args:
        pacs: (R,).
        n_tokens: (R,), of the completions.
        offsets: (P + 1,), as in `conflicts`.
        degenerate: (P,), prompts to leave out: they have no PACS.

    Returns:
        rho in [-1, 1]; None with fewer than 3 completions, or where PACS or the lengths do not vary.
    """
    from scipy.stats import rankdata  # it takes long to import, and the metrics do without

    bounds, lengths = np.asarray(offsets, np.int64), np.array(n_tokens, np.float64)
    for _, index in _blocks(bounds):
        lengths[index] = _standardize_first_axis(lengths[index])[0]
    proper = np.repeat(~degenerate, np.diff(bounds))
    # In place and one after the other: SciPy's spearmanr takes a hundred bytes for each completion.
    ranks = []
    for values in (pacs, lengths):
        rank = rankdata(np.round(values[proper], _RANK_DECIMALS))
        if rank.size < 3 or np.ptp(rank) == 0:
            return None
        rank -= rank.mean()
        rank /= np.linalg.norm(rank)
        ranks.append(rank)
    return float(np.clip(ranks[0] @ ranks[1], -1, 1))


def _measure(found: Conflicts, rows: IntArray, index: IntArray, r: FloatArray, ll: FloatArray) -> None:
    """Fill in a block of B prompts, r and ll (N, B): prompts along the last axis, where NumPy is fast."""
    z_r, constant_r = _standardize_first_axis(r)
    z_l, constant_l = _standardize_first_axis(ll)
    degenerate = constant_r | constant_l
    block_pacs = np.where(degenerate, 0.0, z_r - z_l)
    size = np.abs(block_pacs)
    found.pacs[index] = block_pacs
    found.mean_abs_pacs[rows], found.max_abs_pacs[rows], found.degenerate[rows] = _mean(size), size.max(0), degenerate
    _measure_order(found, rows, np.where(constant_r, 0.0, r), np.where(constant_l, 0.0, ll))


def _measure_order(found: Conflicts, rows: IntArray, r: FloatArray, ll: FloatArray) -> None:
    n = len(r)
    doubled, tied, repeats = _count_pairs(r, ll)
    distinct = n - repeats.sum(axis=0)
    found.kendall_tau_distance[rows] = doubled / (n * (n - 1))
    found.tied_share[rows] = 2 * tied / (n * (n - 1))
    found.n_distinct[rows] = distinct
    some = np.flatnonzero(tied)
    if some.size:
        # Comparisons with NaN are false: pairs with a repeated completion count nothing.
        left_out = repeats[:, some]
        doubled[some] = _count_pairs(np.where(left_out, np.nan, r[:, some]), np.where(left_out, np.nan, ll[:, some]))[0]
    found.distinct_distance[rows] = doubled / np.maximum(distinct * (distinct - 1), 1)


def _count_pairs(r: FloatArray, ll: FloatArray) -> tuple[IntArray, IntArray, BoolArray]:
    """Twice what the pairs count in K (B,), pairs tied in both (B,), and whether a completion repeats another (N, B).

    Of a block (N, B), over the pairs (i, i + lag) of each lag in turn. With "greater" and "less" as bits, the number of
    bits in which r and l differ is 2 for a pair in opposite order, 1 for one tied on one side only, 0 otherwise.
    """
    n, width = r.shape
    doubled, tied = np.zeros(width, np.int64), np.zeros(width, np.int64)
    repeats = np.zeros(r.shape, np.bool_)
    for lag in range(1, n):
        r_greater, r_less = r[lag:] > r[:-lag], r[lag:] < r[:-lag]
        l_greater, l_less = ll[lag:] > ll[:-lag], ll[lag:] < ll[:-lag]
        bits = (r_greater ^ l_greater).view(np.uint8) + (r_less ^ l_less).view(np.uint8)
        doubled += np.add.reduce(bits, axis=0, dtype=np.int32)
        same = ~(r_greater | r_less | l_greater | l_less)
        if same.any():
            tied += same.sum(axis=0)
            repeats[lag:] |= same
    return doubled, tied, repeats


def _blocks(offsets: IntArray) -> Iterator[tuple[IntArray, IntArray]]:
    """Prompts of one N at a time, in blocks: their positions (B,) and the positions of their completions (N, B)."""
    sizes = np.diff(offsets)
    order = np.argsort(sizes, kind="stable")
    for same in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1):
        if same.size:
            n = int(sizes[same[0]])
            width = max(1, _BLOCK_VALUES // n)
            for start in range(0, same.size, width):
                rows = same[start : start + width]
                yield rows, offsets[rows] + np.arange(n)[:, None]


def _check(rewards: FloatArray, logprobs: FloatArray, offsets: IntArray, prompt_ids: Sequence[Any] | None) -> None:
    if rewards.ndim != 1 or rewards.shape != logprobs.shape:
        raise DataError(f"rewards {rewards.shape} and logprobs {logprobs.shape} must be flat and of one length")
    if offsets.ndim != 1 or offsets.size == 0 or offsets[0] != 0 or offsets[-1] != rewards.size:
        raise DataError(f"offsets must run from 0 to the number of completions, {rewards.size}")
    if prompt_ids is not None and len(prompt_ids) != offsets.size - 1:
        raise DataError(f"{len(prompt_ids)} prompt ids for {offsets.size - 1} prompts: give one for each")

    def name(prompt: int) -> str:
        return f"prompt {prompt}" if prompt_ids is None else f"prompt {str(prompt_ids[prompt])!r}"

    sizes = np.diff(offsets)
    if sizes.size and sizes.min() < 2:
        prompt = int(np.argmax(sizes < 2))
        raise DataError(f"{name(prompt)} has {sizes[prompt]} completion(s): a conflict needs at least 2")
    for what, values in (("reward", rewards), ("logprob", logprobs)):
        finite = np.isfinite(values)
        if not finite.all():
            first = int(np.argmin(finite))
            prompt = int(np.searchsorted(offsets, first, side="right")) - 1
            raise DataError(f"{name(prompt)} has a {what} of {values[first]}: every {what} must be a finite number")


def _flatten_pair(rewards: Any, logprobs: Any) -> tuple[FloatArray, FloatArray, IntArray, tuple[int, ...] | None]:
    """Flat rewards, flat logprobs, offsets, and the shape (None for a list of prompts)."""
    r, offsets, shape = _flatten(rewards)
    ll, other_offsets, other_shape = _flatten(logprobs)
    if shape != other_shape or not np.array_equal(offsets, other_offsets):
        raise DataError("rewards and logprobs must have the same shape: one of each per completion")
    return r, ll, offsets, shape


def _flatten(values: Any) -> tuple[FloatArray, IntArray, tuple[int, ...] | None]:
    if isinstance(values, list | tuple) and values and np.ndim(values[0]) > 0:
        prompts = [np.asarray(prompt, np.float64) for prompt in values]
        if any(prompt.ndim != 1 for prompt in prompts):
            raise DataError("a list of prompts must hold one-dimensional arrays")
        return np.concatenate(prompts), np.cumsum([0, *map(len, prompts)]), None
    array = np.asarray(values, np.float64)
    if array.ndim not in {1, 2}:
        raise DataError(f"an array of shape {array.shape} is neither (N,) nor (P, N)")
    prompts, n = (1, array.size) if array.ndim == 1 else array.shape
    return array.reshape(-1), np.arange(prompts + 1) * n, array.shape
