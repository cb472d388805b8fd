"""The report's pictures as Vega-Lite specifications, built with Altair.

Colours are CSS variables, which an SVG resolves itself, so that one drawing serves light, dark and print. Orange is
always the reward model's side (PACS > 0, conflict), blue the policy's (PACS < 0, agreement).
"""

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt

from dissonance.report.reading import Reading
from dissonance.report.statistics import CategoryMean, DistanceHistogram, LengthBand
from dissonance.report.tables import Floats, Integers

ORANGE, BLUE, GREY, INK = "var(--orange)", "var(--blue)", "var(--grey)", "var(--ink)"
_SIDES = ("more conflict than chance", "within chance", "less conflict than chance")
_PACS_BREAKS = [-2, -1, 1, 2]
_PACS_COLOURS = [BLUE, "var(--blue-soft)", GREY, "var(--orange-soft)", ORANGE]
_ROW_HEIGHT = 26


def distance_chart(histogram: DistanceHistogram, mean: float) -> dict[str, Any]:
    """Stacked shares of the prompts by K, over the exact null."""
    edges = histogram.edges.tolist()
    stacked = histogram.above + histogram.within + histogram.below
    bars = [
        {"from": low, "to": high, "side": side, "order": order, "share": share, "null": null}
        for order, (side, shares) in enumerate(
            zip(_SIDES, (histogram.above, histogram.within, histogram.below), strict=True)
        )
        for low, high, share, null in zip(edges, edges[1:], shares.tolist(), histogram.null.tolist(), strict=False)
        if share > 0
    ]
    steps = [{"from": edge, "null": null} for edge, null in zip(edges, [*histogram.null.tolist(), 0.0], strict=True)]
    x = alt.X("from:Q", title="Kendall-tau distance K", scale=alt.Scale(domain=[edges[0], edges[-1]], nice=False))
    bar = (
        alt.Chart(alt.NamedData("bars"))
        .mark_bar(binSpacing=1)
        .encode(
            x=x.bin("binned"),
            x2="to:Q",
            y=alt.Y(
                "share:Q",
                title="share of prompts",
                stack="zero",
                axis=alt.Axis(format="%", tickCount=6),
                scale=alt.Scale(domainMin=0, domainMax=1.12 * float(max(stacked.max(), histogram.null.max()))),
            ),
            color=_legend("side:N", _SIDES, (ORANGE, GREY, BLUE)),
            order=alt.Order("order:Q", sort="descending"),
            tooltip=[
                alt.Tooltip("from:Q", title="K from", format=".3f"),
                alt.Tooltip("to:Q", title="to", format=".3f"),
                alt.Tooltip("side:N", title="prompts with"),
                alt.Tooltip("share:Q", title="share", format=".2%"),
                alt.Tooltip("null:Q", title="share if unrelated", format=".2%"),
            ],
        )
    )
    null = (
        alt.Chart(alt.NamedData("steps"))
        .mark_line(interpolate="step-after", stroke=INK, strokeWidth=1.6, tooltip=None)
        .encode(x=x, y="null:Q")
    )
    layers = alt.layer(bar, null, *_marker("mean", mean))
    return spec(layers, 300, bars=bars, steps=steps, mean=[{"x": mean, "label": f"mean {mean:.2f}"}])


def pacs_chart(edges: Floats, counts: Integers) -> dict[str, Any]:
    """Histogram of PACS, coloured by size and sign."""
    share = (counts / max(1, counts.sum())).tolist()
    bars = [
        {"from": low, "to": high, "middle": (low + high) / 2, "share": value, "count": count}
        for low, high, value, count in zip(edges.tolist(), edges.tolist()[1:], share, counts.tolist(), strict=False)
        if count
    ]
    bar = (
        alt.Chart(alt.NamedData("bars"))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X(
                "from:Q",
                bin="binned",
                title="PACS",
                scale=alt.Scale(domain=[float(edges[0]), float(edges[-1])], nice=False),
            ),
            x2="to:Q",
            y=alt.Y("share:Q", title="share of answers", axis=alt.Axis(format="%", tickCount=5)),
            color=_pacs_colour("middle:Q", legend=None),
            tooltip=[
                alt.Tooltip("from:Q", title="PACS from", format=".2f"),
                alt.Tooltip("to:Q", title="to", format=".2f"),
                alt.Tooltip("share:Q", title="share", format=".2%"),
                alt.Tooltip("count:Q", title="answers", format=","),
            ],
        )
    )
    return spec(alt.layer(bar, _rule("zero")), 240, bars=bars, zero=[{"x": 0}])


def points_chart(points: Sequence[dict[str, Any]], reading: Reading) -> dict[str, Any]:
    """z(reward) against z(log-likelihood), a point per answer; hover to read."""
    reach = max([1.0, *(abs(point[axis]) for point in points for axis in ("x", "y"))]) * 1.08
    scale = alt.Scale(domain=[-reach, reach], nice=False)
    axis = alt.Axis(tickCount=7)
    marks = (
        alt.Chart(alt.NamedData("points"))
        .mark_circle(size=42, opacity=0.75, aria=False)
        .encode(
            x=alt.X("x:Q", title=f"{reading.label} (z-score within the prompt)", scale=scale, axis=axis),
            y=alt.Y("y:Q", title="reward (z-score within the prompt)", scale=scale, axis=axis),
            color=_pacs_colour("pacs:Q", legend=alt.Legend(title="PACS", type="symbol", symbolOpacity=1)),
            tooltip=[
                alt.Tooltip("prompt:N", title="Prompt"),
                alt.Tooltip("answer:N", title="Answer"),
                alt.Tooltip("pacs:Q", title="PACS", format="+.2f"),
                alt.Tooltip("reward:Q", title="Reward", format=".3f"),
                alt.Tooltip("loglikelihood:Q", title=reading.label, format=f".{reading.decimals}f"),
                alt.Tooltip("distance:Q", title="K of the prompt", format=".2f"),
            ],
        )
    )
    line = alt.Chart(alt.NamedData("line")).mark_line(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
    corner = 0.98 * reach
    return spec(
        alt.layer(
            line.encode(x="x:Q", y="y:Q"),
            marks,
            _corner("liked", "left", "top", ORANGE),
            _corner("likely", "right", "bottom", BLUE),
        ),
        440,
        points=list(points),
        line=[{"x": -reach, "y": -reach}, {"x": reach, "y": reach}],
        liked=[{"x": -corner, "y": corner, "label": "liked, but unlikely"}],
        likely=[{"x": corner, "y": -corner, "label": "likely, but disliked"}],
    )


def _corner(data: str, align: Literal["left", "right"], baseline: Literal["top", "bottom"], fill: str) -> alt.Chart:
    text = alt.Chart(alt.NamedData(data)).mark_text(
        align=align, baseline=baseline, fontWeight=600, fontSize=12, fill=fill, tooltip=None
    )
    label: alt.Chart = text.encode(x="x:Q", y="y:Q", text="label:N")
    return label


def category_chart(means: Sequence[CategoryMean]) -> dict[str, Any]:
    """Mean K by category with its 95 % interval."""
    rows = [
        {"name": c.name, "prompts": c.prompts, "mean": c.mean, "side": c.side, "place": place}
        | dict(zip(("low", "high"), c.interval or (None, None), strict=True))
        for place, c in enumerate(means)
    ]
    y = alt.Y("name:N", title=None, sort=alt.SortField("place"), axis=alt.Axis(labelLimit=170, ticks=False))
    tooltip = [
        alt.Tooltip("name:N", title="category"),
        alt.Tooltip("prompts:Q", title="prompts", format=","),
        alt.Tooltip("mean:Q", title="mean K", format=".3f"),
        alt.Tooltip("low:Q", title="95 % from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
    ]
    base = alt.Chart(alt.NamedData("rows"))
    interval = (
        base.transform_filter("isValid(datum.low)")
        .mark_rule(stroke=INK, strokeWidth=2, opacity=0.55)
        .encode(x="low:Q", x2="high:Q", y=y, tooltip=tooltip)
    )
    point = base.mark_circle(size=90, opacity=1).encode(
        x=alt.X("mean:Q", title="mean K of the category", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=10)),
        y=y,
        color=alt.Color("side:N", scale=alt.Scale(domain=[-1, 0, 1], range=[BLUE, GREY, ORANGE]), legend=None),
        tooltip=tooltip,
    )
    height = max(90, _ROW_HEIGHT * len(rows))
    return spec(alt.layer(_rule("null"), interval, point), height, rows=rows, null=[{"x": 0.5}])


def length_chart(bands: Sequence[LengthBand]) -> dict[str, Any]:
    """Quantiles of PACS by answer length relative to the prompt's mean."""
    names = ("q10", "q25", "q50", "q75", "q90")
    rows = [
        {"from": b.shortest - 0.5, "to": b.longest + 0.5, "shortest": b.shortest, "longest": b.longest}
        | {"answers": b.completions}
        | dict(zip(names, b.quantiles, strict=True))
        for b in bands
    ]
    x = alt.X(
        "from:Q", title="answer length (tokens, relative to the prompt’s mean)", scale=alt.Scale(zero=False, nice=False)
    )
    tooltip = [
        alt.Tooltip("shortest:Q", title="tokens from", format="+"),
        alt.Tooltip("longest:Q", title="to", format="+"),
        alt.Tooltip("answers:Q", title="answers", format=","),
        *(alt.Tooltip(f"{n}:Q", title=f"{n[1:]} % below", format="+.2f") for n in names),
    ]
    base = alt.Chart(alt.NamedData("bands"))
    outer = base.mark_rect(fill=GREY, opacity=0.3, stroke="var(--card)").encode(
        x=x, x2="to:Q", y=alt.Y("q10:Q", title="PACS"), y2="q90:Q", tooltip=tooltip
    )
    inner = base.mark_rect(fill=GREY, opacity=0.75, stroke="var(--card)").encode(
        x=x, x2="to:Q", y="q25:Q", y2="q75:Q", tooltip=tooltip
    )
    median = base.mark_rule(stroke=ORANGE, strokeWidth=3).encode(x=x, x2="to:Q", y="q50:Q", tooltip=tooltip)
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
    return spec(alt.layer(outer, inner, zero.encode(y="y:Q"), median), 260, bands=rows, zero=[{"y": 0}])


def _legend(field: str, domain: Sequence[str], colours: Sequence[str]) -> alt.Color:
    scale = alt.Scale(domain=list(domain), range=list(colours))
    return alt.Color(field, scale=scale, legend=alt.Legend(title=None, orient="top", columns=1, labelLimit=300))


def _pacs_colour(field: str, legend: alt.Legend | None) -> alt.Color:
    return alt.Color(field, scale=alt.Scale(type="threshold", domain=_PACS_BREAKS, range=_PACS_COLOURS), legend=legend)


def _rule(data: str) -> alt.Chart:
    rule: alt.Chart = (
        alt.Chart(alt.NamedData(data))
        .mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
        .encode(x="x:Q")
    )
    return rule


def _marker(data: str, value: float) -> tuple[alt.Chart, alt.Chart]:
    """Draw a dashed vertical line with its label, on the side where there is room."""
    left = value > 0.75
    text = alt.Chart(alt.NamedData(data)).mark_text(
        align="right" if left else "left", dx=-6 if left else 6, baseline="top", fontWeight=600, fill=INK, tooltip=None
    )
    return _rule(data), text.encode(x="x:Q", y=alt.value(2), text="label:N")


def spec(chart: alt.LayerChart | alt.FacetChart, height: int, **datasets: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the specification of a chart as wide as its place, in the report's type and colours, with its data."""
    config = alt.Config(
        background="transparent",
        font="system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
        view=alt.ViewConfig(stroke="transparent"),
        axis=alt.AxisConfig(
            labelColor="var(--muted)",
            titleColor="var(--muted)",
            titleFontWeight="normal",
            domainColor="var(--line)",
            tickColor="var(--line)",
            gridColor="var(--line)",
            labelFontSize=12,
            titleFontSize=12,
            labelFlush=False,
        ),
        legend=alt.LegendConfig(orient="top", labelColor="var(--muted)", titleColor="var(--muted)", labelFontSize=12),
    )
    # The panels of a facet have sizes of their own.
    fitted = chart if isinstance(chart, alt.FacetChart) else chart.properties(width="container", height=height)
    sized = fitted.configure(**config.to_dict())
    # The parts were validated as they were made; validating the whole again takes as long as everything else here.
    return {**sized.to_dict(validate=False), "datasets": datasets}
