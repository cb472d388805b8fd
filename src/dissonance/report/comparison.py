"""The arms of a comparison side by side, each with its interval over seeds -> one HTML file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import altair as alt

from dissonance.artifacts import atomic_path
from dissonance.report.charts import BLUE, GREY, spec
from dissonance.report.figures import Figure
from dissonance.report.page import render_page
from dissonance.report.round_charts import known_ends
from dissonance.report.round_parts import Values, in_words


def write_comparison(out: Path, summary: Mapping[str, Any]) -> Path:
    """Write `report.html` beside a demo's `summary.json`, atomically, and return its path.

    Args:
        out: the folder; the arms' own reports are in OUT/TASK/seed-S/ARM.
        summary: what `demo` returns.
    """
    figures = {figure.name: figure for figure in _figures(summary)}
    tables = {task: [_row(name, arm) for name, arm in arms.items()] for task, arms in summary["tasks"].items()}
    shown = summary["report"]
    links = {task: f"{task}/seed-{summary['seeds'][0]}/{shown}/report.html" for task in tables}
    html = render_page(
        "comparison.html", figures=figures, tables=tables, links=links, shown=shown, seeds=len(summary["seeds"])
    )
    path = out / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", newline="\n")
    return path


def _figures(summary: Mapping[str, Any]) -> Iterator[Figure]:
    for task, arms in summary["tasks"].items():
        rows = [
            {"arm": name, "what": "before" if name == "start" else "after", **arm["gold_reward"]}
            for name, arm in arms.items()
        ]
        said = "; ".join(f"{row['arm']} {in_words(row, 3)}" for row in rows)
        yield Figure(
            name=f"gold-{task}",
            title=task.capitalize(),
            caption="Mean exact gold reward of the answers to held-out prompts; intervals are over the"
            f" seeds ({len(summary['seeds'])}): they say what other draws, annotators and trainings would change.",
            description=f"Gold reward, {task}: {said}.",
            spec=_chart(rows),
        )


def _chart(rows: list[dict[str, Any]]) -> dict[str, Any]:
    base = alt.Chart(alt.NamedData("rows"))
    y = alt.Y("arm:N", title=None, sort=[row["arm"] for row in rows], axis=alt.Axis(labelLimit=300))
    scale = alt.Scale(domain=["before", "after"], range=[GREY, BLUE])
    colour = alt.Color("what:N", scale=scale, legend=None)
    tooltip = [
        alt.Tooltip("arm:N", title="policy"),
        *(alt.Tooltip(f"{k}:Q", format=".3f") for k in ("mean", "low", "high")),
    ]
    x = alt.X("mean:Q", title="gold reward", scale=alt.Scale(zero=False))
    interval = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2.5, opacity=0.55)
    layers = known_ends(
        rows,
        interval.encode(y=y, x="low:Q", x2="high:Q", color=colour, tooltip=tooltip),
        base.mark_circle(size=85, opacity=1).encode(y=y, x=x, color=colour, tooltip=tooltip),
    )
    return spec(alt.layer(*layers), 34 * len(rows), rows=rows)


def _row(name: str, arm: Values) -> tuple[str, str, str, str]:
    return name, in_words(arm["gold_reward"], 3), in_words(arm["reward_accuracy"], 3), f"{arm['judgements']:,.0f}"
