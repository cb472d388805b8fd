"""The pictures of the reward model over the rounds: what people said, what it took in, and where it is wrong."""

from collections.abc import Sequence
from typing import Any

from dissonance.report.charts import BLUE, GREY, INK, ORANGE
from dissonance.report.examples import clip
from dissonance.report.figures import Figure
from dissonance.report.headline import percent, plural
from dissonance.report.round_charts import bands_chart, margins_chart
from dissonance.report.round_parts import Round, Values, by_round, estimate, in_words

_POINTS = 1500
_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 100, 200

_SIDES = {
    (True, True): ("right before and after", GREY),
    (False, True): ("wrong before, right now", ORANGE),
    (True, False): ("right before, wrong now", INK),
    (False, False): ("wrong before and after", BLUE),
}


def asked_figure(rounds: Sequence[Round]) -> Figure | None:
    """How the reward model changed on what was asked: a point for each preference of people."""
    answered = [
        (one, row) for one in rounds for row in one.labels if not row["tie"] and row["refined_chosen"] is not None
    ]
    if not answered:
        return None
    shown = answered[:: -(-len(answered) // _POINTS)]
    points = [_lead_point(one, row) for one, row in shown]
    series = [name for name, _ in _SIDES.values()]
    leads = [_leads(row) for _, row in answered]
    before, after = (sum(lead[when] > 0 for lead in leads) / len(leads) for when in (0, 1))
    said = (
        f"Of {len(leads):,} {plural('preference', len(leads))} that people gave, the reward model shared"
        f" {percent(before)} before and {percent(after)} after it was trained on them."
    )
    left_out = "" if len(shown) == len(answered) else f" {len(shown):,} of them are drawn."
    return Figure(
        name="asked",
        title="What people said, and what the reward model made of it",
        caption="A point for each pair that people preferred one answer of: the lead that the reward model gave it"
        " before, to the right, and gives it now, upwards. Above the dashed line it now agrees. These are the pairs"
        f" that it was trained on: they show what it took in, not what it knows of others. {said}{left_out}",
        description=said,
        spec=margins_chart(points, dict(zip(series, (colour for _, colour in _SIDES.values()), strict=True))),
    )


def _leads(row: Values) -> tuple[float, float]:
    """By how much the preferred answer leads, before and after."""
    return row["proxy_chosen"] - row["proxy_rejected"], row["refined_chosen"] - row["refined_rejected"]


def _lead_point(one: Round, row: Values) -> dict[str, Any]:
    before, after = _leads(row)
    return {
        "before": before,
        "after": after,
        "series": _SIDES[before > 0, after > 0][0],
        "prompt": clip(one.prompts.get(row["prompt_id"], row["prompt_id"]), _PROMPT_CHARACTERS),
        "chosen": clip(row["chosen"] or "", _ANSWER_CHARACTERS),
        "rejected": clip(row["rejected"] or "", _ANSWER_CHARACTERS),
    }


def error_figure(rounds: Sequence[Round]) -> Figure | None:
    """Whether conflict foretold errors: error rates by K and by the reward margin, of the last round that has them."""
    found = next((d for one in reversed(rounds) if (d := _detection(one))), None)
    if found is None:
        return None
    where, detection = found
    if max(len(bands) for bands in detection["bands"].values()) < 2:  # too few pairs for a line
        return None
    series = {
        "kendall_tau_distance": ("by conflict (K)", ORANGE),
        "reward_margin": ("by hesitation (reward margin)", GREY),
    }
    rows = [row for key, (name, _) in series.items() for row in _band_rows(detection["bands"][key], name)]
    of = "held-out pairs, judged by gold" if where == "held_out" else "pairs that were asked about"
    aucs = " and ".join(_auc(detection, key, name) for key, (name, _) in series.items())
    return Figure(
        name="errors",
        title="Did conflict say where the reward model is wrong?",
        caption=f"The share of {detection['pairs']:,} {of}, on which the reward model prefers the other answer, from"
        " the pairs with the lowest score on the left to those with the highest: by conflict in orange, in grey by how"
        " close its two rewards are. A line that rises foretells errors; the dashed line is the rate of all pairs."
        f" AUC, ½ for chance: {aucs}.",
        description=f"Error rates by score over {detection['pairs']:,} {of}. AUC: {aucs}.",
        spec=bands_chart(rows, dict(series.values()), detection["error"]["mean"]),
    )


def _detection(one: Round) -> tuple[str, Values] | None:
    detections: Values = one.evaluation.get("error_detection") or {}
    for where in ("held_out", "asked"):
        detection = detections.get(where)
        if detection and detection["pairs"]:
            return where, detection
    return None


def _band_rows(bands: Sequence[Values], series: str) -> list[dict[str, Any]]:
    total, before, rows = sum(band["pairs"] for band in bands), 0, []
    for band in bands:
        middle = (before + band["pairs"] / 2) / total
        rows.append({"series": series, "position": middle, **band, **band["error"]})
        before += band["pairs"]
    return [{key: value for key, value in row.items() if key != "error"} for row in rows]


def _auc(detection: Values, key: str, name: str) -> str:
    auc = detection["auc"][key]
    return f"not defined {name}" if auc is None else f"{in_words(auc, 2)} {name}"


def accuracy_figure(rounds: Sequence[Round]) -> Figure | None:
    """The reward model's accuracy against gold, before and after, round by round, on the start policy's answers."""
    series = {"proxy": ("before", GREY), "refined": ("refined", ORANGE)}
    rows = []
    for place, one in enumerate(rounds):
        found = ((one.evaluation.get("reward_accuracy") or {}).get("start")) or {}
        rows += [estimate(place, name, found.get(key)) for key, (name, _) in series.items()]
    return by_round(
        "accuracy",
        "Does the reward model order answers as gold does?",
        "The share of pairs of held-out answers that the reward model orders as gold does, with 95 % intervals; ½ is"
        " chance.",
        rows,
        "accuracy",
        dict(series.values()),
        reference=0.5,
    )


def held_out_figure(rounds: Sequence[Round]) -> Figure | None:
    """Accuracy on held-out preferences before and after each training, those of the original data and the new ones."""
    sets = {"held_out_original": "original", "held_out_new": "new"}
    series = {(s, w): f"{name} data, {w}" for s, name in sets.items() for w in ("before", "after")}
    rows = [
        estimate(place, name, ((one.reward_model.get(key) or {}).get(when) or {}).get("accuracy"))
        for place, one in enumerate(rounds)
        for (key, when), name in series.items()
    ]
    return by_round(
        "held-out",
        "Did the reward model learn the new without losing the old?",
        "The share of held-out preferences that the reward model orders as people do, before and after its training:"
        " of the data that it had learnt from at first, and of what was asked since. ½ is chance.",
        rows,
        "accuracy",
        dict(zip(series.values(), (GREY, INK, "var(--orange-soft)", ORANGE), strict=True)),
        reference=0.5,
    )
