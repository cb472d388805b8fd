"""The pictures of the page: what each shows, how to read it, and what a screen reader says instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.report import charts
from dissonance.report.examples import clip, read_points
from dissonance.report.headline import LENGTH_WARNING, percent, plural, signed
from dissonance.report.statistics import (
    CategoryMean,
    category_means,
    distance_histogram,
    length_bands,
    pacs_histogram,
    sample_points,
)
from dissonance.report.tables import Booleans, Completions, Floats, Integers, Prompts

_POINTS = 1500
_POINTS_SEED = 0
_CATEGORIES = 30
_NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Figure:
    """One picture of the page."""

    name: str
    """The id of its element."""

    title: str
    caption: str
    """How to read it."""

    description: str
    """What a screen reader says instead of the picture."""

    spec: dict[str, Any]
    """Vega-Lite."""


@dataclass(frozen=True)
class Sides:
    """Which prompts count, and which lie outside what independent scores would give; each (P,)."""

    proper: Booleans
    """Not degenerate."""

    conflicting: Booleans
    """K significantly above the null."""

    agreeing: Booleans
    """K significantly below the null."""


def figures(
    folder: Path, prompts: Prompts, completions: Completions, sides: Sides, rho: float | None
) -> Iterator[Figure]:
    """Draw the pictures that the columns allow, in the order of the page; none when every prompt is degenerate."""
    rows = np.flatnonzero(sides.proper[completions.prompt])
    if not len(rows):
        return
    yield _distance(prompts, sides)
    yield _pacs(completions.pacs[rows])
    yield _points(folder, prompts, completions, rows)
    means = category_means(prompts, sides.proper, _CATEGORIES)
    if means:
        yield _categories(means, len(prompts.category_names))
    if completions.n_tokens is not None:
        yield _lengths(completions.n_tokens[rows], completions.pacs[rows], rho)


def _distance(prompts: Prompts, sides: Sides) -> Figure:
    p = sides.proper
    n, distance = prompts.n_completions[p], prompts.distance[p]
    histogram = distance_histogram(n, distance, sides.conflicting[p], sides.agreeing[p])
    mean = float(distance.mean())
    conflicting, agreeing = percent(sides.conflicting[p].mean()), percent(sides.agreeing[p].mean())
    return Figure(
        name="distance",
        title="How far the two orders differ",
        caption="Each prompt’s Kendall-tau distance K: the share of its answer pairs that reward model and policy order"
        " oppositely. 0 is the same order, 1 the reverse. The outline is the exact distribution for unrelated"
        " scores without ties. Orange: prompts with a K so large that unrelated scores would rarely give it (two-sided"
        " p < 0.05); blue: so small.",
        description=f"Histogram of K over {len(n):,} {plural('prompt', len(n))}, mean {mean:.2f}. {conflicting} lie"
        f" significantly above 0.5, {agreeing} significantly below.",
        spec=charts.distance_chart(histogram, mean),
    )


def _pacs(pacs: Floats) -> Figure:
    edges, counts = pacs_histogram(pacs)
    large = percent(float((np.abs(pacs) > 2).mean()))
    return Figure(
        name="pacs",
        title="How far single answers differ",
        caption="PACS of each answer: its reward minus its log-likelihood, both in standard deviations within its"
        " prompt. Orange answers please the reward model though the policy would hardly give them; blue ones are the"
        " policy’s favourites that the reward model dislikes. Near 0, both think alike.",
        description=f"Histogram of PACS over {len(pacs):,} answers, from {signed(float(pacs.min()))} to"
        f" {signed(float(pacs.max()))}; {large} lie beyond 2 on either side.",
        spec=charts.pacs_chart(edges, counts),
    )


def _points(folder: Path, prompts: Prompts, completions: Completions, rows: Integers) -> Figure:
    chosen = sample_points(completions, rows, _POINTS, np.random.default_rng(_POINTS_SEED))
    rule = (
        f"All {len(rows):,} answers are drawn."
        if len(chosen) == len(rows)
        else f"Of {len(rows):,} answers {len(chosen):,} are drawn: the {len(chosen) // 2:,} with the largest |PACS| and"
        " as many of the rest, at random; the extremes are thus over-represented."
    )
    return Figure(
        name="points",
        title="Reward against likelihood",
        caption="A point per answer, both scores in standard deviations within its prompt; hover or tap to read it. On"
        f" the dashed line both agree; the further from it, the larger |PACS|. {rule}",
        description=f"Scatter plot of reward against log-likelihood for {len(chosen):,} answers. The lists of answers"
        " and prompts on this page hold the texts of its extremes.",
        spec=charts.points_chart(read_points(folder, prompts, completions, chosen)),
    )


def _categories(means: list[CategoryMean], categories: int) -> Figure:
    left_out = f" Of {categories:,} categories, the {len(means)} largest." if categories > len(means) else ""
    return Figure(
        name="categories",
        title="Conflict by category",
        caption="Mean K of the prompts of each category, with the 95 % interval of the mean (Student’s t; none for a"
        f" single prompt). The dashed line, ½, is what unrelated scores give; orange and blue where the whole interval"
        f" lies above or below it.{left_out}",
        description="Mean K by category: "
        + "; ".join(f"{clip(c.name, _NAME_CHARACTERS)} {c.mean:.2f} ({c.prompts:,} prompts)" for c in means)
        + ".",
        spec=charts.category_chart(means),
    )


def _lengths(n_tokens: Integers, pacs: Floats, rho: float | None) -> Figure:
    correlation = (
        ""
        if rho is None
        else f" Spearman’s ρ of PACS with length is {signed(rho)}"
        + (": conflict follows length here." if abs(rho) > LENGTH_WARNING else ".")
    )
    return Figure(
        name="lengths",
        title="Conflict and length",
        caption="PACS by answer length, in bands of about equally many answers: the median in orange, the middle half"
        " in strong grey, the middle four fifths in faint grey. A summed log-likelihood falls with every token, so that"
        f" long answers drift upwards by themselves.{correlation}",
        description=f"Quantiles of PACS for answers of {n_tokens.min():,} to {n_tokens.max():,} tokens.{correlation}",
        spec=charts.length_chart(length_bands(n_tokens, pacs)),
    )
