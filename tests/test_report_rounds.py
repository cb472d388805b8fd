"""The pictures of the rounds: what they hold and leave out, drawn by Vega itself, and in the page with hostile text."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert
from playwright.sync_api import Browser

from dissonance.report import page, write_report
from dissonance.report.rounds import Round, round_figures
from test_report import PAYLOADS, World, browser, build, opened  # noqa: F401

NAMES = (
    "asked", "errors", "held-out", "accuracy",
    "training-reward", "training-kl", "training-length", "training-entropy",
    "gold", "conflict", "gold-categories",
)  # fmt: skip


def interval(mean: float, half: float | None = 0.05) -> dict[str, Any]:
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def a_round(seed: int, texts: tuple[str, ...] = ("yes", "no"), categories: tuple[str, ...] = ("law", "code")) -> Round:
    """One round with everything there is, in the form that the stages leave."""
    rng = np.random.default_rng(seed)
    history = [
        {"step": step, "reward": step / 10, "kl": step / 5, "length": 20 - step, "entropy": 1 / (1 + step), "loss": 0.5}
        for step in range(8)
    ]
    labels = [
        {
            "prompt_id": f"p{i}",
            "tie": i % 7 == 0,
            "chosen": texts[i % len(texts)],
            "rejected": texts[(i + 1) % len(texts)],
            **{
                f"{judge}_{side}": float(rng.normal())
                for judge in ("proxy", "refined")
                for side in ("chosen", "rejected")
            },
        }
        for i in range(30)
    ]
    bands = [{"from": i / 5, "to": (i + 1) / 5, "pairs": 20, "error": interval(0.1 + i / 8)} for i in range(5)]
    scores = ("kendall_tau_distance", "pacs_gap", "abs_pacs", "reward_margin")
    detection = {
        "pairs": 100,
        "clusters": 20,
        "error": interval(0.35),
        "auc": {name: interval(0.66) for name in scores},
        "bands": dict.fromkeys(scores, bands),
    }
    gold = {
        "start": interval(0.1),
        "new": interval(0.2 + seed / 10),
        "change": interval(0.1),
        "win_rate": interval(0.6),
    }
    accuracy = {"pairs": 90, "ties": 3, "proxy": interval(0.6), "refined": interval(0.7), "change": interval(0.1)}
    distance = {"kendall_tau_distance": interval(0.5), "null_mean": 0.5, "distinct_distance": interval(0.48)}
    judges = dict.fromkeys(("proxy", "refined", "gold"), distance)
    evaluation = {
        "gold_reward": gold,
        "by_category": {
            name: {"prompts": 8, "clusters": 2, "gold_reward": {key: interval(0.3, None) for key in gold}}
            for name in categories
        },
        "reward_accuracy": {"start": accuracy, "new": accuracy, "pairs": None},
        "conflict": {"start": judges, "new": judges},
        "error_detection": {"held_out": detection, "asked": None},
    }
    measured = {"accuracy": interval(0.7), "pairs": 40}
    return Round(
        policy={"history": history, "stopped": None},
        reward_model={name: {"before": measured, "after": measured} for name in ("held_out_original", "held_out_new")},
        evaluation=evaluation,
        labels=labels,
        prompts={f"p{i}": texts[i % len(texts)] for i in range(30)},
    )


def figures_of(*rounds: Round) -> dict[str, Any]:
    return {figure.name: figure for figure in round_figures(rounds)}


def points_drawn(spec: dict[str, Any]) -> int:
    """How many points Vega draws, without a browser."""
    svg = vl_convert.vegalite_to_svg(json.loads(json.dumps({**spec, "width": 600}, allow_nan=False)))
    groups = re.findall(r'<g class="mark-symbol role-mark[^"]*"[^>]*>(.*?)</g>', svg, re.DOTALL)
    return sum(group.count("<path") for group in groups)


def test_a_full_run_gives_every_picture_in_the_order_of_the_story() -> None:
    rounds = (a_round(0), a_round(1))
    found = list(round_figures(rounds))
    assert [figure.name for figure in found] == list(NAMES)
    expected = {
        "asked": 2 * 25,  # of 30 labels, 5 are ties
        "errors": 2 * 5,
        "held-out": 2 * 4,
        "accuracy": 2 * 2,
        **dict.fromkeys(NAMES[4:8], 2 * 8),
        "gold": 2 * 2,
        "conflict": 2 * 3,
        "gold-categories": 2 * 2,
    }
    assert {figure.name: points_drawn(figure.spec) for figure in found} == expected
    for figure in found:
        assert len(figure.caption) > 40, figure.name
        assert len(figure.description) > 30, figure.name


def test_what_is_not_there_is_not_drawn() -> None:
    assert list(round_figures(())) == []
    assert list(round_figures((Round(), Round()))) == []
    whole = a_round(0)
    assert set(figures_of(Round(policy=whole.policy))) == set(NAMES[4:8])
    assert set(figures_of(Round(labels=whole.labels))) == {"asked"}
    assert set(figures_of(Round(reward_model=whole.reward_model))) == {"held-out"}
    without_gold = {**whole.evaluation, "gold_reward": None, "by_category": {}}
    without_gold |= {"reward_accuracy": {"start": None}, "error_detection": {"held_out": None, "asked": None}}
    assert set(figures_of(Round(evaluation=without_gold))) == {"conflict"}
    fresh = {"before": None, "after": {"accuracy": interval(0.7)}}
    found = figures_of(
        Round(reward_model={"held_out_original": fresh, "held_out_new": {"before": None, "after": None}})
    )
    assert points_drawn(found["held-out"].spec) == 1


def test_steps_go_on_from_round_to_round() -> None:
    spec = figures_of(a_round(0), Round(), a_round(1))["training-reward"].spec
    points = spec["datasets"]["points"]
    assert [point["step"] for point in points] == [*range(8), *range(8, 16)]
    assert [point["own"] for point in points] == [*range(8), *range(8)]
    assert [point["round"] for point in points] == ["0"] * 8 + ["2"] * 8
    assert spec["datasets"]["ends"] == [{"x": 7.5}]


def test_what_is_no_number_is_left_out_and_a_stop_is_told() -> None:
    history = [{"step": 0, "reward": 1.0, "kl": 0.0}, {"step": 1, "reward": float("nan"), "kl": 9.0}]
    stopped = {"step": 1, "reason": "KL from the start policy is 9.0 nats"}
    found = figures_of(Round(policy={"history": history, "stopped": stopped}))
    assert set(found) == {"training-reward", "training-kl"}
    assert [point["value"] for point in found["training-reward"].spec["datasets"]["points"]] == [1.0]
    assert "Round 0 was stopped at step 1: KL from the start policy is 9.0 nats." in found["training-kl"].caption


def test_the_leads_say_what_the_reward_model_took_in() -> None:
    def label(before: float, after: float, tie: bool = False) -> dict[str, Any]:
        refined = {"refined_chosen": after, "refined_rejected": 0.0}
        proxy = {"proxy_chosen": before, "proxy_rejected": 0.0}
        return {"prompt_id": "p", "tie": tie, "chosen": "a", "rejected": "b", **proxy, **refined}

    labels = [label(1, 2), label(-1, 1), label(1, -1), label(-1, -2), label(0, 0), label(5, 5, tie=True)]
    figure = figures_of(Round(labels=labels, prompts={"p": "Why?"}))["asked"]
    assert [point["series"] for point in figure.spec["datasets"]["points"]] == [
        "right before and after",
        "wrong before, right now",
        "right before, wrong now",
        "wrong before and after",
        "wrong before and after",
    ]
    assert figure.spec["datasets"]["points"][0]["prompt"] == "Why?"
    assert "Of 5 preferences that people gave, the reward model shared 40 % before and 40 % after" in figure.description
    untrained = [{**row, "refined_chosen": None, "refined_rejected": None} for row in labels]
    assert figures_of(Round(labels=untrained)) == {}


def test_many_labels_are_thinned_and_the_caption_says_so() -> None:
    labels = [row for row in a_round(0).labels if not row["tie"]] * 200
    figure = figures_of(Round(labels=labels))["asked"]
    shown = len(figure.spec["datasets"]["points"])
    assert 1000 <= shown <= 1500
    assert f"{shown:,} of them are drawn." in figure.caption


def test_held_out_errors_go_before_asked_ones_and_the_last_round_counts() -> None:
    first, second = a_round(0), a_round(1)
    detection = second.evaluation["error_detection"]["held_out"]
    asked = {**second.evaluation, "error_detection": {"held_out": None, "asked": {**detection, "pairs": 70}}}
    found = figures_of(first, Round(evaluation=asked))["errors"]
    assert "70 pairs that were asked about" in found.caption
    assert "0.66 (0.61 to 0.71) by conflict (K)" in found.description
    positions = [row["position"] for row in found.spec["datasets"]["rows"]][:5]
    assert positions == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])


def test_one_band_alone_is_no_picture_of_errors() -> None:
    first = a_round(0)
    detection = first.evaluation["error_detection"]["held_out"]
    few = {**detection, "pairs": 12, "bands": {name: bands[:1] for name, bands in detection["bands"].items()}}
    assert "errors" not in figures_of(Round(evaluation={**first.evaluation, "error_detection": {"held_out": few}}))


def test_categories_stand_by_gain() -> None:
    one = a_round(0)
    by_category = {
        name: {"prompts": 9, "gold_reward": {"start": interval(0), "new": interval(gain), "change": interval(gain)}}
        for name, gain in (("law", -0.2), ("code", 0.5), ("art", 0.1))
    }
    figure = figures_of(Round(evaluation={**one.evaluation, "by_category": by_category}))["gold-categories"]
    assert figure.description == "Change of the mean gold reward by category: code +0.50; art +0.10; law −0.20."
    assert {row["name"]: row["place"] for row in figure.spec["datasets"]["rows"]} == {"code": 0, "art": 1, "law": 2}


# In the page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A report whose pictures are those of rounds full of hostile text, in the places of the audit's own."""
    places = ("distance", "pacs", "points", "categories", "lengths")
    wanted = ("asked", "training-kl", "gold-categories", "errors", "accuracy")
    found = figures_of(a_round(0, PAYLOADS, PAYLOADS))
    drawn = [replace(found[name], name=place) for name, place in zip(wanted, places, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "figures", lambda *_: iter(drawn))
        yield write_report(build(tmp_path_factory.mktemp("rounds"), World()))


def test_hostile_text_stays_text_in_the_page(browser: Browser, hostile: Path) -> None:  # noqa: F811
    report = opened(browser, hostile, viewport={"width": 1100, "height": 800})
    shown = report.page
    assert shown.evaluate("window.__xss") is None
    shown.locator("#chart-distance").scroll_into_view_if_needed()
    box = shown.locator("#chart-distance svg .mark-symbol.role-mark path").first.bounding_box()
    assert box is not None
    shown.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = shown.locator("#tooltip")
    tooltip.wait_for(state="visible")
    assert any(payload.strip()[:20] in (tooltip.text_content() or "") for payload in PAYLOADS)
    assert shown.evaluate("window.__xss") is None
    assert report.complaints == []
    assert shown.locator("img, iframe, video, math, a[href], svg:not([data-chart] svg)").count() == 0
    for chart in shown.locator("[data-chart]").all():
        assert chart.locator("svg .mark-symbol.role-mark path").count() > 0
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
