"""Strategies side by side: learning curves with bands, what a label is worth, and what predicts the proxy's errors."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt

from dissonance.artifacts import atomic_path
from dissonance.report.charts import BLUE, GREY, INK, ORANGE, spec
from dissonance.report.figures import Figure
from dissonance.report.headline import percent
from dissonance.report.page import render_page
from dissonance.report.round_charts import known_ends
from dissonance.report.round_parts import Values, in_words

_ROW_HEIGHT = 26
_BASELINE = "random_pairs"
_INTERVALS = " Bars are 95 % intervals over the seeds, from five seeds on."
_UNIONS = ("all", "policy_knows")
"""Subsets of more than one cell of the 2 x 2."""
_MEASURES = {"gold_reward": "gold reward, best of n", "reward_accuracy": "reward model’s accuracy"}


def write_bench_report(out: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` beside a benchmark's `summary.json`, atomically, and return its path."""
    figures = [*_curves(summary), *_efficiencies(summary), *_leads(summary), *_detections(summary)]
    html = render_page(
        "bench.html",
        figures={figure.name: figure for figure in figures},
        tables=_tables(summary),
        seeds=sorted({row["seed"] for row in summary["baselines"]}),
        seed_set=summary["seeds"],
    )
    path = out / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return path


def _curves(summary: Mapping[str, Any]) -> Iterator[Figure]:
    """A learning curve of each strategy, before the baseline's, by task and measure."""
    of_first = [row for row in summary["table"] if row["feedback"] == summary["feedback"]]
    for task in dict.fromkeys(row["task"] for row in of_first):
        for measure, title in _MEASURES.items():
            rows = [_point(row, measure) for row in of_first if row["task"] == task]
            start = summary["start"][task][measure]["mean"]
            ends = [row for row in rows if row["budget"] == max(r["budget"] for r in rows)]
            said = "; ".join(f"{row['strategy']} {in_words(row, 3)}" for row in ends)
            yield Figure(
                name=f"curves-{measure}-{task}",
                title=f"{task.capitalize()}: {title}",
                caption="Mean over the seeds with 95 % intervals, by judgements; orange is the strategy of the panel."
                f" Grey: {_BASELINE}. The dashed line is the proxy before anybody was asked.",
                description=f"{task}, {title}, at the largest budget: {said}.",
                spec=_curve_chart(rows, title, start),
            )


def _point(row: Values, measure: str) -> dict[str, Any]:
    return {"strategy": row["strategy"], "budget": round(row["judgements"]["mean"]), **row[measure]}


def _curve_chart(rows: Sequence[dict[str, Any]], title: str, start: float) -> dict[str, Any]:
    names = [name for name in dict.fromkeys(row["strategy"] for row in rows) if name != _BASELINE] or [_BASELINE]
    own = [{**row, "panel": row["strategy"], "series": row["strategy"]} for row in rows if row["strategy"] in names]
    baseline = [
        {**row, "panel": name, "series": _BASELINE} for name in names for row in rows if row["strategy"] == _BASELINE
    ]
    points = [{**row, "kind": "own"} for row in own] + [{**row, "kind": "baseline"} for row in baseline]
    x = alt.X("budget:Q", title="judgements", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=4))
    y = alt.Y("mean:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=5))
    scale = alt.Scale(domain=["own", "baseline"], range=[ORANGE, GREY])
    colour = alt.Color("kind:N", scale=scale, legend=None)
    base = alt.Chart(alt.NamedData("points"))
    tooltip = [
        alt.Tooltip("series:N", title="strategy"),
        alt.Tooltip("budget:Q", title="judgements", format=","),
        *(
            alt.Tooltip(f"{key}:Q", title=title if key == "mean" else key, format=".3f")
            for key in ("mean", "low", "high")
        ),
    ]
    band = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.18, tooltip=None)
    layers = known_ends(
        points,
        band.encode(
            x=x, y=alt.Y("low:Q", title=None, scale=alt.Scale(zero=False)), y2="high:Q", color=colour, detail="kind:N"
        ),
        base.mark_line(strokeWidth=1.8, tooltip=None).encode(x=x, y=y, color=colour, detail="kind:N"),
    )
    across = base.mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None).encode(y=alt.Y("mean(start):Q"))
    dots = base.mark_circle(size=36, opacity=0.9).encode(x=x, y=y, color=colour, tooltip=tooltip)
    panels = alt.layer(across, *layers, dots).properties(width=260, height=160)
    chart = panels.facet(facet=alt.Facet("panel:N", title=None, sort=names), columns=3)
    return spec(chart, 150, points=[{**row, "start": start} for row in points])


def _efficiencies(summary: Mapping[str, Any]) -> Iterator[Figure]:
    for task, found in summary["label_efficiency"].items():
        rows = [{"what": _worth(name, one), **one} for name, one in found.items() if one is not None]
        if not rows:
            continue
        said = "; ".join(f"{row['what']} {in_words(row, 2)}" for row in rows)
        yield Figure(
            name=f"efficiency-{task}",
            title=f"{task.capitalize()}: what a label is worth",
            caption=f"How many judgements {_BASELINE} needs for each judgement of the strategy, for the same gold"
            " reward, with 95 % intervals over the seeds. 1 is no better than chance; a value at the edge of the"
            " range of budgets is a bound.",
            description=f"Label efficiency, {task}: {said}.",
            spec=_interval_chart(rows, "judgements of random pairs that one is worth", 1.0, log=True),
        )


def _leads(summary: Mapping[str, Any]) -> Iterator[Figure]:
    """Differences to the baseline at equal judgements."""
    led = [row for row in summary["table"] if row["lead"] is not None]
    for task in dict.fromkeys(row["task"] for row in led):
        rows = [
            {
                "what": _asked(row, summary["feedback"]),
                "panel": f"budget {row['budget']:,}",
                **row["lead"]["gold_reward"],
            }
            for row in led
            if row["task"] == task
        ]
        said = "; ".join(f"{row['what']}, {row['panel']} {in_words(row, 3)}" for row in rows)
        yield Figure(
            name=f"leads-{task}",
            title=f"{task.capitalize()}: lead over {_BASELINE} with the same budget",
            caption=f"Difference in gold reward to {_BASELINE}, {summary['feedback']}, seed by seed.{_INTERVALS}",
            description=f"Lead in gold reward, {task}: {said}.",
            spec=_interval_chart(rows, "difference in gold reward", 0.0),
        )


def _asked(row: Values, usual: str) -> str:
    return str(row["strategy"]) if row["feedback"] == usual else f"{row['strategy']}, {row['feedback']}"


def _worth(name: str, found: Values) -> str:
    return name if found["bound"] is None else f"{name} ({found['bound']})"


def _detections(summary: Mapping[str, Any]) -> Iterator[Figure]:
    """What predicts the proxy's errors: overall, by decile, by who knows the subject, and by world."""
    pairs = [row for row in summary["detection"] if row["most"] and row["level"] == "pair" and row["auc"] is not None]
    for task, found in summary["error_detection"].items():
        rows = [{"what": name, **one["auc"]} for name, one in found.items() if one["auc"] is not None]
        rows.sort(key=lambda row: -row["mean"])
        if not rows:
            continue
        best = ", ".join(f"{row['what']} {in_words(row, 2)}" for row in rows[:3])
        yield Figure(
            name=f"detection-{task}",
            title=f"{task.capitalize()}: what predicts the proxy’s errors",
            caption="Area under the ROC curve of each measure for the proxy’s error on a pair of answers; ½ is chance."
            + _INTERVALS,
            description=f"Error detection, {task}: {best}.",
            spec=_interval_chart(rows, "AUC", 0.5),
        )
        of_task = [row for row in pairs if row["task"] == task]
        first = [row for row in of_task if row["world"] == of_task[0]["world"]]
        deciles = [row for row in first if row.get("deciles")]
        if deciles:
            yield Figure(
                name=f"deciles-{task}",
                title=f"{task.capitalize()}: errors by decile of each measure",
                caption="Share of the pairs that the proxy orders wrongly, from the decile where the measure"
                " is lowest to the one where it is highest; the dashed line is the share of all.",
                description=f"Error rate by decile, {task}, lowest and highest: "
                + "; ".join(f"{row['metric']} {row['deciles'][0]:.2f} and {row['deciles'][-1]:.2f}" for row in deciles),
                spec=_deciles_chart(deciles),
            )
        order = [row["what"] for row in rows]
        cells = [row for row in first if row["subset"] not in _UNIONS]
        worlds = [row for row in of_task if row["subset"] == "all"]
        for key, within, what in (("subset", cells, "who knows the subject"), ("world", worlds, "world")):
            if len({row[key] for row in within}) > 1:
                panels = [{"what": row["metric"], "panel": row[key], **row["auc"]} for row in within]
                panels.sort(key=lambda row: order.index(row["what"]))
                yield Figure(
                    name=f"detection-by-{key}-{task}",
                    title=f"{task.capitalize()}: what predicts the proxy’s errors, by {what}",
                    caption="AUC as above, panel by panel." + _INTERVALS,
                    description=f"Best by {what}, {task}: {_best(panels)}.",
                    spec=_interval_chart(panels, "AUC", 0.5),
                )


def _best(panels: Sequence[Values]) -> str:
    best = {
        panel: max((r for r in panels if r["panel"] == panel), key=lambda row: row["mean"]) for panel in _of(panels)
    }
    return "; ".join(f"{panel}, {row['what']} {in_words(row, 2)}" for panel, row in best.items())


def _of(rows: Sequence[Values]) -> list[str]:
    return list(dict.fromkeys(row["panel"] for row in rows if "panel" in row))


def _deciles_chart(rows: Sequence[Values]) -> dict[str, Any]:
    points = [
        {"panel": row["metric"], "decile": decile, "share": share, "all": row["error"]["mean"]}
        for row in rows
        for decile, share in enumerate(row["deciles"], 1)
    ]
    base = alt.Chart(alt.NamedData("points"))
    y = alt.Y("share:Q", title="wrong", axis=alt.Axis(format="%", tickCount=5), scale=alt.Scale(zero=False))
    tooltip = [alt.Tooltip("decile:O"), alt.Tooltip("share:Q", title="wrong", format=".1%")]
    layers = alt.layer(
        base.mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None).encode(y="mean(all):Q"),
        base.mark_line(stroke=BLUE, strokeWidth=1.8, tooltip=None).encode(x=alt.X("decile:O", title="decile"), y=y),
        base.mark_circle(size=36, fill=BLUE, opacity=0.9).encode(x="decile:O", y=y, tooltip=tooltip),
    ).properties(width=260, height=120)
    return spec(layers.facet(facet=alt.Facet("panel:N", title=None, sort=_of(points)), columns=3), 120, points=points)


def _interval_chart(
    rows: Sequence[dict[str, Any]], title: str, reference: float, *, log: bool = False
) -> dict[str, Any]:
    """Estimates with their intervals, one below the other; a panel for each `panel` of the rows, if they have any."""
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    names = list(dict.fromkeys(row["what"] for row in rows))
    base = alt.Chart(alt.NamedData("rows"))
    y = alt.Y("what:N", title=None, sort=names, axis=alt.Axis(labelLimit=300))
    x = alt.X("mean:Q", title=title, scale=scale, axis=alt.Axis(tickCount=6))
    tooltip = [
        alt.Tooltip("what:N", title="by"),
        *(alt.Tooltip(f"{key}:Q", format=".3f") for key in ("mean", "low", "high")),
    ]
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5, opacity=0.55, stroke=BLUE)
    layers = alt.layer(
        base.mark_rule(stroke=INK, strokeDash=[4, 4], opacity=0.5, tooltip=None).encode(x="mean(reference):Q"),
        *known_ends(
            list(rows),
            interval.encode(y=y, x="low:Q", x2="high:Q", tooltip=tooltip),
            base.mark_circle(size=70, opacity=1, fill=BLUE).encode(y=y, x=x, tooltip=tooltip),
        ),
    )
    height = _ROW_HEIGHT * len(names)
    drawn = [{**row, "reference": reference} for row in rows]
    if not (panels := _of(rows)):
        return spec(layers, height, rows=drawn)
    chart = layers.properties(width=200, height=height)
    return spec(chart.facet(facet=alt.Facet("panel:N", title=None, sort=panels), columns=3), height, rows=drawn)


def _tables(summary: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """By task, a row for each strategy, budget and kind of feedback."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for row in summary["table"]:
        tables.setdefault(row["task"], []).append(
            (
                row["strategy"],
                row["feedback"],
                f"{row['budget']:,}",
                in_words(row["gold_reward"], 3),
                in_words(row["reward_accuracy"], 3),
                "" if row["policy_gold_reward"] is None else in_words(row["policy_gold_reward"], 3),
                "" if row["shared_ignorance_share"] is None else percent(row["shared_ignorance_share"]["mean"]),
            )
        )
    return tables
