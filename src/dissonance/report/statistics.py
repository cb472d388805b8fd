"""What the pictures show, as a few numbers each: histograms, the exact null, intervals, bands, chosen rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t

from dissonance.conflict import kendall_p_value
from dissonance.report.tables import Booleans, Completions, Floats, Integers, Prompts

SIGNIFICANCE = 0.05
_MOST_LATTICE_BINS = 45
_BINS = 25
_PACS_BINS_PER_UNIT = 5
_MOST_BANDS, _ANSWERS_PER_BAND = 12, 20


def p_values(prompts: Prompts) -> Floats:
    """Two-sided p of each prompt's K against independent scores; (P,), 1 for a prompt without pairs."""
    p = np.ones(len(prompts.distance))
    for n in np.unique(prompts.n_completions[prompts.n_completions > 1]).tolist():
        rows = prompts.n_completions == n
        p[rows] = kendall_p_value(prompts.distance[rows], n)
    return p


def null_pmf(n: int) -> Floats:
    """Distribution of the number of discordant pairs when reward and log-likelihood are independent, without ties.

    Element d is the probability of d of the n(n-1)/2 pairs. Read off the two-sided p values, which below the middle
    are twice the cumulative distribution; the upper half is the mirror image.
    """
    pairs = n * (n - 1) // 2
    below = (pairs + 1) // 2
    cdf = kendall_p_value(np.arange(below) / pairs, n) / 2
    lower = np.diff(cdf, prepend=0.0)
    middle = [] if pairs % 2 else [1 - 2 * cdf[-1]]
    return np.concatenate([lower, middle, lower[::-1]])


def share_by_luck(n: Integers) -> float:
    """Work out which share of prompts of sizes n (P,) independent scores would show as significantly conflicting."""
    sizes, counts = np.unique(n, return_counts=True)
    shares = []
    for size in sizes.tolist():
        pmf = null_pmf(size)
        distance = np.linspace(0, 1, len(pmf))
        shares.append(float(pmf[(distance > 0.5) & (kendall_p_value(distance, size) < SIGNIFICANCE)].sum()))
    return float(np.average(shares, weights=counts))


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
    """The mean Kendall-tau distance of one category."""

    name: str
    prompts: int
    mean: float
    low: float | None
    """Lower end of the 95 % interval (Student's t); None with a single prompt."""

    high: float | None


def category_means(prompts: Prompts, rows: Booleans, limit: int) -> list[CategoryMean]:
    """Mean K over the (P,) chosen rows of the `limit` largest categories, most conflicting first."""
    if prompts.category is None:
        return []
    chosen = rows & (prompts.category >= 0)
    code, distance = prompts.category[chosen], prompts.distance[chosen]
    size = np.bincount(code, minlength=len(prompts.category_names))
    mean = np.bincount(code, distance, len(size)) / np.maximum(size, 1)
    square = np.bincount(code, (distance - mean[code]) ** 2, len(size))
    largest = np.argsort(-size, kind="stable")[:limit]
    means = [
        _category_mean(prompts.category_names[c], int(size[c]), float(mean[c]), float(square[c]))
        for c in largest.tolist()
        if size[c]
    ]
    return sorted(means, key=lambda category: (-category.mean, category.name))


def _category_mean(name: str, n: int, mean: float, square: float) -> CategoryMean:
    if n == 1:
        return CategoryMean(name, n, mean, None, None)
    half = float(student_t.ppf(0.975, n - 1)) * (square / (n - 1) / n) ** 0.5
    return CategoryMean(name, n, mean, max(0.0, mean - half), min(1.0, mean + half))


@dataclass(frozen=True)
class LengthBand:
    """PACS of the completions within one range of lengths."""

    shortest: int
    """Tokens."""

    longest: int
    completions: int
    quantiles: tuple[float, float, float, float, float]
    """PACS at 10, 25, 50, 75 and 90 %."""


def length_bands(n_tokens: Integers, pacs: Floats) -> list[LengthBand]:
    """Cut the (C,) completions into at most 12 bands by length, of about 20 answers or more each, shortest first."""
    count = int(np.clip(len(n_tokens) // _ANSWERS_PER_BAND, 1, _MOST_BANDS))
    cuts = np.unique(np.quantile(n_tokens, np.linspace(0, 1, count + 1)[1:-1], method="lower"))
    band = np.searchsorted(cuts, n_tokens)
    bands = []
    for number in np.unique(band):
        rows = band == number
        low, high = int(n_tokens[rows].min()), int(n_tokens[rows].max())
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
