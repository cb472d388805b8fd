"""The pictures of a run's rounds as Vega-Lite specifications, in the style of `charts.py`.

Grey is what was there before, orange the refined reward model, blue the policy.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from dissonance.report.charts import BLUE, GREY, INK, spec

Row = dict[str, Any]
_ROW_HEIGHT = 34


def curve_chart(points: Sequence[Row], ends: Sequence[Row], title: str, reference: float | None) -> dict[str, Any]:
    """A measure over the steps of the training: a line for each round.

    Args:
        points: {step, round, value}; steps go on from round to round.
        ends: {x, label} of the last step of each round.
        title: of the vertical axis.
        reference: where to draw a dashed line across.
    """
    base = alt.Chart(alt.NamedData("points"))
    x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    tooltip = [
        alt.Tooltip("round:N", title="round"),
        alt.Tooltip("own:Q", title="step", format=","),
        alt.Tooltip("value:Q", title=title, format=".4~g"),
    ]
    line = base.mark_line(stroke=BLUE, strokeWidth=1.8, tooltip=None).encode(x=x, y=y, detail="round:N")
    # A line cannot be pointed at, and a round of one step has none.
    dot = base.mark_circle(size=28, fill=BLUE, opacity=0.9, aria=False).encode(x=x, y=y, tooltip=tooltip)
    layers = [line, dot]
    if ends:
        rule = alt.Chart(alt.NamedData("ends")).mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.4, tooltip=None)
        layers.insert(0, rule.encode(x="x:Q"))
    if reference is not None:
        across = alt.Chart(alt.NamedData("reference")).mark_rule(stroke=INK, opacity=0.5, tooltip=None)
        layers.append(across.encode(y="y:Q"))
    return spec(
        alt.layer(*layers),
        170,
        points=list(points),
        **({"ends": list(ends)} if ends else {}),
        **({} if reference is None else {"reference": [{"y": reference}]}),
    )


def rounds_chart(rows: Sequence[Row], title: str, colours: dict[str, str], reference: float | None) -> dict[str, Any]:
    """Estimates with their intervals, round by round, a colour for each series.

    Args:
        rows: {round, series, mean, low, high}; low and high may be None.
        title: of the vertical axis.
        colours: by series, in the order of the legend.
        reference: where to draw a dashed line across.
    """
    x = alt.X("round:O", title="after round", axis=alt.Axis(labelAngle=0, ticks=False), sort=None)
    offset = alt.XOffset("series:N", sort=list(colours))
    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=6))
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    legend = alt.Legend(title=None, orient="top", labelLimit=300, symbolType="circle")
    colour = alt.Color("series:N", scale=scale, legend=legend if len(colours) > 1 else None)
    base = alt.Chart(alt.NamedData("rows"))
    tooltip = [alt.Tooltip("series:N", title=title), alt.Tooltip("round:O", title="after round"), *_interval_tip()]
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5, opacity=0.55)
    point = base.mark_circle(size=85, opacity=1)
    layers = known_ends(
        rows,
        interval.encode(x=x, xOffset=offset, y="low:Q", y2="high:Q", color=colour, tooltip=tooltip),
        point.encode(x=x, xOffset=offset, y=y, color=colour, tooltip=tooltip),
    )
    if reference is None:
        return spec(alt.layer(*layers), 230, rows=list(rows))
    across = alt.Chart(alt.NamedData("reference")).mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
    return spec(alt.layer(across.encode(y="y:Q"), *layers), 230, rows=list(rows), reference=[{"y": reference}])


def known_ends(rows: Sequence[Row], interval: alt.Chart, *others: alt.Chart) -> list[alt.Chart]:
    """The layers, that of the intervals only where one has ends: an axis of nothing but nulls has no extent."""
    return [interval, *others] if any(row.get("low") is not None for row in rows) else list(others)


def _interval_tip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("mean:Q", title="estimate", format=".3f"),
        alt.Tooltip("low:Q", title="95 % from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
    ]


def categories_chart(rows: Sequence[Row], title: str) -> dict[str, Any]:
    """Before and after in each category, with intervals.

    Args:
        rows: {name, place, when, side, prompts, mean, low, high}: `when` is what the legend says, `side` 0 before and 1
            after.
        title: of the horizontal axis.
    """
    when = list(dict.fromkeys(row["when"] for row in sorted(rows, key=lambda row: row["side"])))
    y = alt.Y("name:N", title=None, sort=alt.SortField("place"), axis=alt.Axis(labelLimit=170, ticks=False))
    offset = alt.YOffset("side:O", scale=alt.Scale(paddingOuter=0.6))
    legend = alt.Legend(title=None, orient="top", symbolType="circle")
    colour = alt.Color("when:N", scale=alt.Scale(domain=when, range=[GREY, BLUE][: len(when)]), legend=legend)
    tooltip = [
        alt.Tooltip("name:N", title="category"),
        alt.Tooltip("when:N", title=title),
        alt.Tooltip("prompts:Q", title="prompts", format=","),
        *_interval_tip(),
    ]
    base = alt.Chart(alt.NamedData("rows"))
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5, opacity=0.55)
    x = alt.X("mean:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=8))
    layers = known_ends(
        rows,
        interval.encode(x="low:Q", x2="high:Q", y=y, yOffset=offset, color=colour, tooltip=tooltip),
        base.mark_circle(size=85, opacity=1).encode(x=x, y=y, yOffset=offset, color=colour, tooltip=tooltip),
    )
    return spec(alt.layer(*layers), max(90, _ROW_HEIGHT * len({row["name"] for row in rows})), rows=list(rows))


def margins_chart(points: Sequence[Row], series: dict[str, str]) -> dict[str, Any]:
    """How the reward model changed on what was asked: the lead of the answer that people prefer, before and after.

    Args:
        points: {before, after, series, prompt, chosen, rejected}.
        series: colours by series, in the order of the legend.
    """
    x_reach, y_reach = (max([1e-6, *(abs(point[axis]) for point in points)]) * 1.05 for axis in ("before", "after"))
    scale = alt.Scale(domain=list(series), range=list(series.values()))
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=300, symbolOpacity=1)
    marks = (
        alt.Chart(alt.NamedData("points"))
        .mark_circle(size=42, opacity=0.75, aria=False)
        .encode(
            x=_lead("before", "before", x_reach),
            y=_lead("after", "after", y_reach),
            color=alt.Color("series:N", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("prompt:N", title="Prompt"),
                alt.Tooltip("chosen:N", title="Preferred"),
                alt.Tooltip("rejected:N", title="Other"),
                alt.Tooltip("before:Q", title="lead before", format="+.3f"),
                alt.Tooltip("after:Q", title="lead after", format="+.3f"),
            ],
        )
    )
    zero = alt.Chart(alt.NamedData("zero")).mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
    layers = alt.layer(zero.encode(x="at:Q"), zero.encode(y="at:Q"), marks)
    return spec(layers, 400, points=list(points), zero=[{"at": 0}])


def _lead(field: str, when: str, reach: float) -> Any:
    channel = alt.X if field == "before" else alt.Y
    title = f"lead of the preferred answer, {when}"
    return channel(
        f"{field}:Q", title=title, scale=alt.Scale(domain=[-reach, reach], nice=False), axis=alt.Axis(tickCount=7)
    )


def bands_chart(rows: Sequence[Row], colours: dict[str, str], overall: float) -> dict[str, Any]:
    """Error rates by band of a score, a colour for each score.

    Args:
        rows: {series, position, from, to, pairs, mean, low, high}: `position` from 0, the lowest band, to 1.
        colours: by series, in the order of the legend.
        overall: the error rate of all pairs.
    """
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    colour = alt.Color("series:N", scale=scale, legend=alt.Legend(title=None, orient="top", labelLimit=300))
    x = alt.X(
        "position:Q",
        title="pairs by score, lowest to highest",
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=alt.Axis(format="%", tickCount=10),
    )
    y = alt.Y("mean:Q", title="reward model is wrong", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tooltip = [
        alt.Tooltip("series:N", title="score"),
        alt.Tooltip("from:Q", title="from", format=".3f"),
        alt.Tooltip("to:Q", title="to", format=".3f"),
        alt.Tooltip("pairs:Q", title="pairs", format=","),
        alt.Tooltip("mean:Q", title="wrong", format=".1%"),
        alt.Tooltip("low:Q", title="95 % from", format=".1%"),
        alt.Tooltip("high:Q", title="to", format=".1%"),
    ]
    base = alt.Chart(alt.NamedData("rows"))
    area = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.16, tooltip=None)
    line = base.mark_line(strokeWidth=1.8, tooltip=None)
    rule = alt.Chart(alt.NamedData("overall")).mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None)
    layers = known_ends(
        rows,
        area.encode(x=x, y="low:Q", y2="high:Q", color=colour),
        line.encode(x=x, y=y, color=colour),
        base.mark_circle(size=60, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip),
    )
    return spec(alt.layer(rule.encode(y="y:Q"), *layers), 260, rows=list(rows), overall=[{"y": overall}])
