"""The pictures of the page: what each shows, how to read it, and what a screen reader says instead."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.conflict import Conflicts
from dissonance.report import charts
from dissonance.report.examples import clip, read_points
from dissonance.report.headline import LENGTH_WARNING, percent, plural, signed
from dissonance.report.reading import Reading
from dissonance.report.statistics import (
    CategoryMean,
    Measured,
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
    """K over distinct answers significantly above 1/2."""

    agreeing: Booleans
    """Significantly below."""


def figures(
    folder: Path, prompts: Prompts, completions: Completions, measured: Measured, sides: Sides, reading: Reading
) -> Iterator[Figure]:
    """Draw the pictures that the columns allow, in the order of the page; none when every prompt is degenerate."""
    rows = np.flatnonzero(sides.proper[completions.prompt])
    if not len(rows):
        return
    yield _distance(measured.conflicts, sides)
    yield _pacs(completions.pacs[rows])
    yield _points(folder, prompts, completions, rows, reading)
    means = category_means(prompts, measured.conflicts, _CATEGORIES)
    if means:
        yield _categories(means, len(prompts.category_names))
    if measured.relative_length is not None:
        lengths, rho = measured.relative_length[rows], measured.length_correlation
        yield _lengths(lengths, completions.pacs[rows], rho, reading)


def _distance(found: Conflicts, sides: Sides) -> Figure:
    p = sides.proper
    n, distance = found.n_distinct[p], found.distinct_distance[p]
    histogram = distance_histogram(n, distance, sides.conflicting[p], sides.agreeing[p])
    mean = float(distance.mean())
    conflicting, agreeing = percent(sides.conflicting[p].mean()), percent(sides.agreeing[p].mean())
    return Figure(
        name="distance",
        title="How far the two orders differ",
        caption="Each prompt’s Kendall-tau distance K: the share of its answer pairs that reward model and policy order"
        " oppositely. 0 is the same order, 1 the reverse; answers that are identical in both count as one. The outline"
        " is the exact distribution for unrelated scores without other ties. Orange: prompts with a K so large that"
        " unrelated scores would rarely give it (two-sided p < 0.05); blue: so small.",
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


def _points(folder: Path, prompts: Prompts, completions: Completions, rows: Integers, reading: Reading) -> Figure:
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
        spec=charts.points_chart(read_points(folder, prompts, completions, chosen), reading),
    )


def _categories(means: list[CategoryMean], categories: int) -> Figure:
    left_out = f" Of {categories:,} categories, the {len(means)} largest." if categories > len(means) else ""
    return Figure(
        name="categories",
        title="Conflict by category",
        caption="Mean K of the prompts of each category (identical answers count as one), from five prompts on with the"
        " 95 % interval of the mean. The dashed line, ½, is what unrelated scores give; orange and blue lie further"
        " from it than 1.96 standard errors, the category’s own or those of unrelated scores, whichever are larger."
        f" Of many categories, chance alone colours up to one in twenty.{left_out}",
        description="Mean K by category: "
        + "; ".join(
            f"{clip(c.name, _NAME_CHARACTERS)} {c.mean:.2f} ({c.prompts:,} {plural('prompt', c.prompts)})"
            for c in means
        )
        + ".",
        spec=charts.category_chart(means),
    )


def _lengths(relative_length: Integers, pacs: Floats, rho: float | None, reading: Reading) -> Figure:
    correlation = (
        ""
        if rho is None
        else f" Spearman’s ρ of PACS with length is {signed(rho)}"
        + (": conflict follows length here." if abs(rho) > LENGTH_WARNING else ".")
    )
    drift = (
        " A summed log-likelihood falls with every token, so that long answers drift upwards by themselves."
        if reading.likelihood == "sum"
        else ""
    )
    shortest, longest = (f"{value:+,}".replace("-", "−") for value in (relative_length.min(), relative_length.max()))
    return Figure(
        name="lengths",
        title="Conflict and length",
        caption="PACS by answer length relative to the mean of the prompt, in bands of about equally many answers: the"
        " median in orange, the middle half in strong grey, the middle four fifths in faint grey."
        f"{drift}{correlation}",
        description=f"Quantiles of PACS for answers of {shortest} to {longest} tokens relative to the mean of their"
        f" prompt.{correlation}",
        spec=charts.length_chart(length_bands(relative_length, pacs)),
    )
