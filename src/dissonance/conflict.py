"""How far a reward model and a policy disagree on the answers to a prompt: arrays in, arrays out.

For a prompt with N completions, r holds their rewards (higher is better) and l their log-likelihoods under the policy.

    PACS_i   z(r)_i - z(l)_i, signed, per completion (proxy-policy alignment conflict score)
    K        Kendall-tau distance of r and l, in [0, 1], per prompt

The metrics and their names are from Liu, Khajavi, Jiang and Liu, "Targeting Misalignment" (arXiv 2512.09212).
Ties in K count as in Fagin, Kumar, Mahdian, Sivakumar and Vee, "Comparing Partial Rankings" (SIAM J. Discrete Math.
20(3), 2006), with penalty 1/2. The distribution of K for independent rankings is Kendall's (Rank Correlation Methods,
chapters 4 and 5).

All arithmetic is float64. Prompts of one N are handled together, in blocks: beyond input and output, it takes a few MB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, reduce
from math import sqrt
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from dissonance.errors import DataError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_DEGENERATE_RANGE = 1e-10
_EXACT_LIMIT = 100
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


@dataclass(frozen=True, slots=True)
class KendallNull:
    """The Kendall-tau distance of two independent rankings without ties."""

    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class ConflictSummary:
    """Many prompts in a few numbers; the averages and shares are over the prompts that are not degenerate.

    They are None where every prompt is degenerate.
    """

    prompts: int
    completions: int
    degenerate: int

    kendall_tau_distance: float | None
    """Mean K."""

    null_mean: float | None
    """Mean over prompts of the null's mean: 1/2 whatever N is."""

    null_sd: float | None
    """Root of the mean over prompts of the null's variance: the spread of single prompts, not of the mean K."""

    share_above_null: float | None
    """Share of prompts with K above the null's mean."""

    share_significant: float | None
    """Share of prompts with K above the null's mean and two-sided p < 0.05."""

    mean_abs_pacs: float | None
    """Mean over prompts of mean|PACS|."""


@dataclass(frozen=True, slots=True)
class ConflictTally:
    """Counts and sums from which a summary is made; tallies of parts add up to the tally of the whole."""

    prompts: int = 0
    completions: int = 0
    degenerate: int = 0
    above_null: int = 0
    significant: int = 0
    kendall_tau_distance: float = 0.0
    null_variance: float = 0.0
    mean_abs_pacs: float = 0.0

    def __add__(self, other: "ConflictTally") -> "ConflictTally":
        return ConflictTally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def summary(self) -> ConflictSummary:
        """Turn sums into averages and shares."""
        proper = self.prompts - self.degenerate

        def mean(total: float) -> float | None:
            return total / proper if proper else None

        variance = mean(self.null_variance)
        return ConflictSummary(
            prompts=self.prompts,
            completions=self.completions,
            degenerate=self.degenerate,
            kendall_tau_distance=mean(self.kendall_tau_distance),
            null_mean=None if variance is None else 0.5,
            null_sd=None if variance is None else sqrt(variance),
            share_above_null=mean(self.above_null),
            share_significant=mean(self.significant),
            mean_abs_pacs=mean(self.mean_abs_pacs),
        )


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
    flat_pacs = np.empty(r.size)
    distance, mean_abs, max_abs = np.empty(prompts), np.empty(prompts), np.empty(prompts)
    degenerate = np.empty(prompts, np.bool_)
    for rows, index in _blocks(bounds):
        block_pacs, distance[rows], degenerate[rows] = _measure(r[index], ll[index])
        flat_pacs[index] = block_pacs
        size = np.abs(block_pacs)
        mean_abs[rows], max_abs[rows] = _mean(size), size.max(axis=0)
    return Conflicts(flat_pacs, distance, mean_abs, max_abs, degenerate, np.diff(bounds))


def tally(found: Conflicts) -> ConflictTally:
    """Count and sum what `ConflictTally.summary` needs."""
    proper = ~found.degenerate
    distance, sizes = found.kendall_tau_distance[proper], found.n_completions[proper]
    variance, significant = 0.0, 0
    for n in np.unique(sizes).tolist():
        of_size = distance[sizes == n]
        variance += of_size.size * kendall_null(n).sd ** 2
        significant += int(np.sum((of_size > 0.5) & (kendall_p_value(of_size, n) < 0.05)))
    return ConflictTally(
        prompts=proper.size,
        completions=found.pacs.size,
        degenerate=proper.size - distance.size,
        above_null=int(np.sum(distance > 0.5)),
        significant=significant,
        kendall_tau_distance=float(distance.sum()),
        null_variance=variance,
        mean_abs_pacs=float(found.mean_abs_pacs[proper].sum()),
    )


def kendall_null(n: int) -> KendallNull:
    """Mean and standard deviation of K for two independent rankings of n without ties (Kendall's variance of tau)."""
    _check_ranking(n)
    return KendallNull(mean=0.5, sd=sqrt(2 * (2 * n + 5) / (9 * n * (n - 1))) / 2)


def kendall_p_value(distance: npt.ArrayLike, n: int) -> FloatArray:
    """Two-sided p of a Kendall-tau distance if the two rankings of n were independent.

    The probability of a K at least as far from 1/2. Exact up to n = 100, from the number of permutations with a given
    number of inversions (the Mahonian numbers); the normal approximation beyond.

    The null has no ties, so with ties p is approximate. Pairs tied on one side pull K towards 1/2 and pairs tied on
    both lower it: as evidence of conflict (K > 1/2), p then errs on the cautious side; a low K may owe its small p
    to shared ties alone.

    Args:
        distance: any shape, in [0, 1].
        n: how many completions were ranked, at least 2.

    Raises:
        DataError: n < 2, or a distance outside [0, 1].
    """
    _check_ranking(n)
    k = np.asarray(distance, np.float64)
    if not np.all((k >= 0) & (k <= 1)):
        raise DataError("a Kendall-tau distance lies in [0, 1]: one of those given does not")
    if n > _EXACT_LIMIT:
        null = kendall_null(n)
        return np.asarray(2 * ndtr(-np.abs(k - null.mean) / null.sd))
    pairs = n * (n - 1) // 2
    doubled = np.rint(2 * pairs * k).astype(np.int64)  # ties count half: whole numbers again
    nearer = np.minimum(doubled, 2 * pairs - doubled) // 2
    p: FloatArray = np.minimum(1.0, 2 * _inversion_cdf(n)[nearer])
    return p


@lru_cache(maxsize=_EXACT_LIMIT)
def _inversion_cdf(n: int) -> FloatArray:
    """P(at most k inversions) in a random permutation of n, for k = 0 .. n(n-1)/2.

    The j-th element adds 0 .. j-1 inversions with equal chance, independently of the others; every term is positive,
    so that the tails keep their relative precision.
    """
    density = np.ones(1)
    for j in range(2, n + 1):
        density = np.convolve(density, np.full(j, 1 / j))
    cdf = np.cumsum(density)
    cdf.setflags(write=False)
    return cdf


def _check_ranking(n: int) -> None:
    if n < 2:
        raise DataError(f"a ranking of {n} has no pairs: at least 2 completions are needed")


def _measure(r: FloatArray, ll: FloatArray) -> tuple[FloatArray, FloatArray, BoolArray]:
    """PACS (N, B), K (B,) and degenerate (B,) of a block (N, B): prompts along the last axis, where NumPy is fast."""
    z_r, constant_r = _standardize_first_axis(r)
    z_l, constant_l = _standardize_first_axis(ll)
    degenerate = constant_r | constant_l
    distance = _kendall(np.where(constant_r, 0.0, r), np.where(constant_l, 0.0, ll))
    return np.where(degenerate, 0.0, z_r - z_l), distance, degenerate


def _kendall(r: FloatArray, ll: FloatArray) -> FloatArray:
    """K (B,) of a block (N, B), over the pairs (i, i + lag) of each lag in turn.

    With "greater" and "less" as bits, the number of bits in which r and l differ is 2 for a pair in opposite order,
    1 for one tied on one side only, 0 otherwise: twice what the pair counts.
    """
    n, width = r.shape
    doubled = np.zeros(width, np.int64)
    for lag in range(1, n):
        greater = (r[lag:] > r[:-lag]) ^ (ll[lag:] > ll[:-lag])
        less = (r[lag:] < r[:-lag]) ^ (ll[lag:] < ll[:-lag])
        doubled += np.add.reduce(greater.view(np.uint8) + less.view(np.uint8), axis=0, dtype=np.int32)
    distance: FloatArray = doubled / (n * (n - 1))
    return distance


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
