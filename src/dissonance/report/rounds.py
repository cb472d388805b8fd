"""The story of a run in pictures: what was asked, what the reward model made of it, and what became of the policy.

Everything comes from the dicts and rows that the stages leave; what they do not hold is not drawn. Prompts, answers and
categories stand in the data and the texts of the pictures alone, which the page writes as text.

round_charts.py  Vega-Lite specifications
round_parts.py   what a round left; how estimates are drawn and said
round_reward.py  the pictures of the reward model
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from dissonance.report.charts import BLUE, GREY, INK, ORANGE
from dissonance.report.examples import clip
from dissonance.report.figures import Figure
from dissonance.report.headline import percent, plural, signed
from dissonance.report.round_charts import categories_chart, curve_chart
from dissonance.report.round_parts import Round, Values, by_round, estimate
from dissonance.report.round_reward import accuracy_figure, asked_figure, error_figure, held_out_figure

__all__ = ["Round", "round_figures"]

_CATEGORIES = 30
_NAME_CHARACTERS = 60


def round_figures(rounds: Sequence[Round]) -> Iterator[Figure]:
    """Draw what the rounds hold, in the order of the story: asked, reward model, training, outcome."""
    for figure in (
        asked_figure(rounds),
        error_figure(rounds),
        held_out_figure(rounds),
        accuracy_figure(rounds),
        *training_figures(rounds),
        gold_figure(rounds),
        conflict_figure(rounds),
        category_figure(rounds),
    ):
        if figure is not None:
            yield figure


@dataclass(frozen=True)
class _Curve:
    """One measure of the training."""

    key: str
    title: str
    axis: str
    caption: str
    reference: float | None = None


_CURVES = (
    _Curve(
        "reward",
        "Reward in training",
        "mean reward",
        "What the refined reward model gives the policy’s answers, step by step. It is what the policy is trained"
        " for: that it rises says nothing yet. Whether the answers got better is what gold and people say.",
    ),
    _Curve(
        "kl",
        "Distance from the start policy",
        "KL (nats an answer)",
        "How far the policy has moved from where the round began; 0 at the first step. A KL that runs away while"
        " the reward rises is what exploiting a reward model looks like.",
        0.0,
    ),
    _Curve("length", "Length of the answers", "tokens", "Mean tokens an answer. Reward models often like length."),
    _Curve(
        "entropy",
        "Variety of the answers",
        "entropy (nats a token)",
        "Mean entropy of the next token. Near 0 the policy says one thing only, and there is nothing left to compare.",
    ),
)


def training_figures(rounds: Sequence[Round]) -> Iterator[Figure]:
    """Reward, KL, length and entropy over the steps of all rounds, one picture each."""
    for curve in _CURVES:
        points = _points(rounds, curve.key)
        if points:
            first, last = points[0]["value"], points[-1]["value"]
            ended = " A dashed line ends a round." if len({point["round"] for point in points}) > 1 else ""
            yield Figure(
                name=f"training-{curve.key}",
                title=curve.title,
                caption=f"{curve.caption}{ended}{_stops(rounds)}",
                description=f"{curve.title} over {len(points):,} {plural('step', len(points))}: from {_short(first)} to"
                f" {_short(last)}.",
                spec=curve_chart(points, _ends(points), curve.axis, curve.reference),
            )


def _points(rounds: Sequence[Round], key: str) -> list[dict[str, Any]]:
    """Steps go on from round to round."""
    points: list[dict[str, Any]] = []
    before = 0
    for name, one in enumerate(rounds):
        history = one.policy.get("history") or ()
        points += [
            {"step": before + step["step"], "own": step["step"], "round": str(name), "value": float(step[key])}
            for step in history
            if step.get(key) is not None and isfinite(step[key])
        ]
        # The first measurement of a round is of the policy that the round before ended with.
        before += max((step["step"] + 1 for step in history), default=0)
    return points


def _stops(rounds: Sequence[Round]) -> str:
    stops = ((name, one.policy.get("stopped")) for name, one in enumerate(rounds))
    return "".join(f" Round {name} was stopped at step {at['step']:,}: {at['reason']}." for name, at in stops if at)


def _ends(points: Sequence[Values]) -> list[dict[str, Any]]:
    last = {point["round"]: point["step"] for point in points}
    return [{"x": step + 0.5} for step in list(last.values())[:-1]]


def gold_figure(rounds: Sequence[Round]) -> Figure | None:
    """Gold reward on held-out prompts, at the start and after each round."""
    rows = []
    for place, one in enumerate(rounds):
        gold = one.evaluation.get("gold_reward") or {}
        rows += [estimate(place, "start policy", gold.get("start")), estimate(place, "new policy", gold.get("new"))]
    return by_round(
        "gold",
        "Did the policy get better?",
        "Mean gold reward of the answers to held-out prompts, with 95 % intervals over prompts. They do not say what"
        f" another seed of the training would give. {_wins(rounds)}",
        rows,
        "gold reward",
        {"start policy": GREY, "new policy": BLUE},
    )


def _wins(rounds: Sequence[Round]) -> str:
    gold: Values = (rounds[-1].evaluation.get("gold_reward") or {}) if rounds else {}
    rate = gold.get("win_rate")
    return "" if rate is None else f"In the end, its answers beat the start policy’s in {_share(rate)} of the pairs."


def conflict_figure(rounds: Sequence[Round]) -> Figure | None:
    """Mean K of the new policy against each judge, round by round."""
    series = {"proxy": ("proxy", GREY), "refined": ("refined reward model", ORANGE), "gold": ("gold", INK)}
    rows = []
    for place, one in enumerate(rounds):
        found = (one.evaluation.get("conflict") or {}).get("new") or {}
        rows += [
            estimate(place, name, (found.get(key) or {}).get("distinct_distance")) for key, (name, _) in series.items()
        ]
    return by_round(
        "conflict",
        "Where do policy and judges still disagree?",
        "Mean K on held-out prompts between the new policy’s likelihoods and each judge, over different answers: 0 is"
        " the same order, ½ is what unrelated scores give.",
        rows,
        "mean K",
        dict(series.values()),
        reference=0.5,
    )


def category_figure(rounds: Sequence[Round]) -> Figure | None:
    """Gold reward by category, before and after the last round."""
    found: Values = (rounds[-1].evaluation.get("by_category") or {}) if rounds else {}
    known = {name: of for name, of in found.items() if of.get("gold_reward") and of["gold_reward"]["change"]}
    order = sorted(known, key=lambda name: -known[name]["gold_reward"]["change"]["mean"])
    shown = order[:_CATEGORIES]
    rows = [
        {
            "name": clip(name, _NAME_CHARACTERS),
            "place": place,
            "when": when,
            "side": side,
            **known[name]["gold_reward"][key],
        }
        | {"prompts": known[name]["prompts"]}
        for place, name in enumerate(shown)
        for side, (key, when) in enumerate((("start", "start policy"), ("new", "new policy")))
    ]
    if not rows:
        return None
    left_out = f" Of {len(order):,} categories, the {len(shown)} that gained most." if len(order) > len(shown) else ""
    gains = "; ".join(
        f"{clip(name, _NAME_CHARACTERS)} {signed(known[name]['gold_reward']['change']['mean'])}" for name in shown
    )
    return Figure(
        name="gold-categories",
        title="Where did it get better?",
        caption="Mean gold reward of each category before and after, most improved first, with 95 % intervals where"
        f" there are questions enough.{left_out}",
        description=f"Change of the mean gold reward by category: {gains}.",
        spec=categories_chart(rows, "gold reward"),
    )


def _share(interval: Values) -> str:
    if interval["low"] is None:
        return percent(interval["mean"])
    return f"{percent(interval['mean'])} ({percent(interval['low'])} to {percent(interval['high'])})"


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")
