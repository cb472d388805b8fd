"""What the pictures show, as a few numbers each: conflicts, histograms, intervals, bands, chosen rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dissonance.conflict import Conflicts, conflicts, length_correlation
from dissonance.null import kendall_null, null_pmf
from dissonance.report.tables import Booleans, Completions, Floats, Integers, Prompts

_MOST_LATTICE_BINS = 45
_BINS = 25
_PACS_BINS_PER_UNIT = 5
_MOST_BANDS, _ANSWERS_PER_BAND = 12, 20
_LEAST_FOR_INTERVAL = 5


@dataclass(frozen=True)
class Measured:
    """The conflicts behind the tables, with what the tables leave out: identical answers."""

    conflicts: Conflicts
    """Prompts in the order of `Prompts`; the completions of each together."""

    length_correlation: float | None
    """Spearman's rho of PACS with length, as `conflict.length_correlation` defines it."""

    relative_length: Integers | None
    """(C,) n_tokens less the mean of the prompt, rounded; in the order of `Completions`. None without n_tokens."""


def measure(prompts: Prompts, completions: Completions) -> Measured:
    """Measure the P prompts and their C completions anew, from the scores."""
    order = np.argsort(completions.prompt, kind="stable")
    sizes = np.bincount(completions.prompt, minlength=len(prompts.distance))
    offsets = np.append(0, np.cumsum(sizes))
    found = conflicts(completions.reward[order], completions.loglikelihood[order], offsets)
    n_tokens = completions.n_tokens
    if n_tokens is None:
        return Measured(found, None, None)
    mean = np.bincount(completions.prompt, n_tokens, len(sizes)) / sizes
    relative = np.rint(n_tokens - mean[completions.prompt]).astype(np.int64)
    return Measured(found, length_correlation(found.pacs, n_tokens[order], offsets, found.degenerate), relative)


@dataclass(frozen=True)
class DistanceHistogram:
    """Shares of the prompts (in [0, 1]) by Kendall-tau distance, B bins."""

    edges: Floats
    """(B+1,)"""

    above: Floats
    """(B,) prompts with more conflict than chance explains."""

    within: Floats
    """(B,) prompts that independent scores could give."""

    below: Floats
    """(B,) prompts with less conflict than chance explains."""

    null: Floats
    """(B,) what independent scores would give, over the prompts' own N."""


def distance_histogram(n: Integers, distance: Floats, above: Booleans, below: Booleans) -> DistanceHistogram:
    """Count the prompts' distances; n, distance, above and below are (P,), P >= 1.

    One bin a possible value when all prompts have the same small N, 25 equal bins otherwise. A value on an edge (a
    tie counts half a pair) goes half to either side, in the counts and in the null alike.
    """
    sizes, counts = np.unique(n, return_counts=True)
    pairs = int(sizes[0] * (sizes[0] - 1) // 2)
    if len(sizes) == 1 and pairs <= _MOST_LATTICE_BINS:
        edges = (np.arange(pairs + 2) - 0.5) / pairs
    else:
        edges = np.linspace(0, 1, _BINS + 1)
    null = np.zeros(len(edges) - 1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        pmf = null_pmf(size)
        null += _shares(np.linspace(0, 1, len(pmf)), edges, pmf * count / len(n))
    weight = np.full(len(n), 1 / len(n))
    return DistanceHistogram(
        edges=edges,
        above=_shares(distance[above], edges, weight[above]),
        within=_shares(distance[~above & ~below], edges, weight[~above & ~below]),
        below=_shares(distance[below], edges, weight[below]),
        null=null,
    )


def _shares(values: Floats, edges: Floats, weight: Floats) -> Floats:
    """Weighted histogram; a value on an inner edge goes half to either side."""
    shift = 1e-9
    sides = [np.clip(values + side, edges[0], edges[-1]) for side in (-shift, shift)]
    return np.asarray(sum(np.histogram(side, edges, weights=weight)[0] for side in sides) / 2)


def pacs_histogram(pacs: Floats) -> tuple[Floats, Integers]:
    """Edges (B+1,), symmetric about 0, and counts (B,) of the (C,) values."""
    units = max(1, int(np.ceil(np.abs(pacs).max(initial=0))))
    edges = np.linspace(-units, units, 2 * units * _PACS_BINS_PER_UNIT + 1)
    return edges, np.histogram(pacs, edges)[0]


@dataclass(frozen=True)
class CategoryMean:
    """The mean Kendall-tau distance of one category, over the distinct answers of its prompts."""

    name: str
    prompts: int
    mean: float
    half_width: float
    """1.96 standard errors of the mean: the category's own, or that of unrelated scores where it is larger.

    K takes few values: a few prompts that happen to share one would seem to have no error at all.
    """

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean; None below 5 prompts, too few to know their spread."""
        if self.prompts < _LEAST_FOR_INTERVAL:
            return None
        return max(0.0, self.mean - self.half_width), min(1.0, self.mean + self.half_width)

    @property
    def side(self) -> int:
        """1 or -1 where the mean lies more than `half_width` above or below 1/2, else 0."""
        return int(self.mean - 0.5 > self.half_width) - int(0.5 - self.mean > self.half_width)


def category_means(prompts: Prompts, found: Conflicts, limit: int) -> list[CategoryMean]:
    """Mean K over the prompts that are not degenerate of the `limit` largest categories, most conflicting first."""
    if prompts.category is None:
        return []
    chosen = ~found.degenerate & (prompts.category >= 0)
    code, distance, n = prompts.category[chosen], found.distinct_distance[chosen], found.n_distinct[chosen]
    variance = np.zeros(int(n.max(initial=0)) + 1)
    for size in np.unique(n).tolist():
        variance[size] = kendall_null(size).sd ** 2
    size = np.bincount(code, minlength=len(prompts.category_names))
    mean = np.bincount(code, distance, len(size)) / np.maximum(size, 1)
    own = np.bincount(code, (distance - mean[code]) ** 2, len(size)) / np.maximum(size - 1, 1)
    null = np.bincount(code, variance[n], len(size)) / np.maximum(size, 1)
    half_width = 1.96 * np.sqrt(np.maximum(own, null) / np.maximum(size, 1))
    largest = np.argsort(-size, kind="stable")[:limit]
    means = [
        CategoryMean(prompts.category_names[c], int(size[c]), float(mean[c]), float(half_width[c]))
        for c in largest.tolist()
        if size[c]
    ]
    return sorted(means, key=lambda category: (-category.mean, category.name))


@dataclass(frozen=True)
class LengthBand:
    """PACS of the completions within one range of lengths."""

    shortest: int
    """Tokens, relative to the prompt's mean."""

    longest: int
    completions: int
    quantiles: tuple[float, float, float, float, float]
    """PACS at 10, 25, 50, 75 and 90 %."""


def length_bands(relative_length: Integers, pacs: Floats) -> list[LengthBand]:
    """Cut the (C,) completions into at most 12 bands by length, of about 20 answers or more each, shortest first."""
    count = int(np.clip(len(relative_length) // _ANSWERS_PER_BAND, 1, _MOST_BANDS))
    cuts = np.unique(np.quantile(relative_length, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    band = np.searchsorted(cuts, relative_length)
    bands = []
    for number in np.unique(band):
        rows = band == number
        low, high = int(relative_length[rows].min()), int(relative_length[rows].max())
        q10, q25, q50, q75, q90 = np.quantile(pacs[rows], [0.1, 0.25, 0.5, 0.75, 0.9]).tolist()
        bands.append(LengthBand(low, high, int(rows.sum()), (q10, q25, q50, q75, q90)))
    return bands


def extremes(completions: Completions, rows: Integers, count: int) -> tuple[list[int], list[int]]:
    """Rows with the highest and with the lowest PACS among `rows`, at most one a prompt, most extreme first."""
    if not len(rows):
        return [], []
    order = rows[np.argsort(completions.pacs[rows], kind="stable")]
    enough = count * int(np.bincount(completions.prompt[rows]).max())
    positive = [row for row in order[::-1][:enough].tolist() if completions.pacs[row] > 0]
    negative = [row for row in order[:enough].tolist() if completions.pacs[row] < 0]
    return _one_per_prompt(positive, completions.prompt, count), _one_per_prompt(negative, completions.prompt, count)


def _one_per_prompt(rows: Sequence[int], prompt: Integers, count: int) -> list[int]:
    chosen: dict[int, int] = {}
    for row in rows:
        if len(chosen) == count:
            break
        chosen.setdefault(int(prompt[row]), row)
    return list(chosen.values())


def sample_points(completions: Completions, rows: Integers, limit: int, rng: np.random.Generator) -> Integers:
    """At most `limit` of `rows`: the half with the largest |PACS|, and a uniform sample of the rest."""
    if len(rows) <= limit:
        return rows
    order = rows[np.argsort(-np.abs(completions.pacs[rows]), kind="stable")]
    half = limit // 2
    return np.sort(np.concatenate([order[:half], rng.choice(order[half:], limit - half, replace=False)]))


def top_prompts(prompts: Prompts, rows: Booleans, count: int) -> list[int]:
    """Rows of the (P,) chosen prompts with the largest K, ties by mean |PACS|, most conflicting first."""
    order = np.lexsort((-prompts.mean_abs_pacs, -prompts.distance))
    return [int(row) for row in order[rows[order]][:count]]


def rows_by_prompt(completions: Completions, wanted: Iterable[int]) -> dict[int, Integers]:
    """Find the completion rows of each wanted prompt row, in file order."""
    prompts = np.unique(np.fromiter(wanted, dtype=np.int64))
    rows = np.flatnonzero(np.isin(completions.prompt, prompts))
    rows = rows[np.argsort(completions.prompt[rows], kind="stable")]
    starts = np.searchsorted(completions.prompt[rows], prompts)
    parts = np.split(rows, starts[1:]) if len(prompts) else []
    return dict(zip(prompts.tolist(), parts, strict=True))
