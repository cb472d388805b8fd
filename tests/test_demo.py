"""The demo: all of it with one seed, and the table that it ends with."""

import json
import math
from pathlib import Path

import pytest
from playwright.sync_api import Browser
from scipy import stats

from dissonance import cli
from dissonance.config import RunConfig
from dissonance.demo import STRATEGIES, Arm, arm_config, seed_interval
from dissonance.report import write_comparison
from dissonance.sandbox import Sandbox, World
from test_report import browser, opened  # noqa: F401

ARMS = ["start", *STRATEGIES]


def test_one_seed_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["demo", "--out", str(tmp_path / "demo"), "--seeds", "1", "--quiet"]
    assert cli.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert set(found["tasks"]) == {"safety", "helpfulness"}
    for task, arms in found["tasks"].items():
        assert list(arms) == ARMS
        assert [arm["judgements"] for arm in arms.values()] == [0, 0, 200, 200, 200]
        assert arms["start"]["reward_accuracy"] == arms["proxy_only"]["reward_accuracy"]  # nothing was learnt
        for name in STRATEGIES:
            folder = Arm(task, 0, 0, name).folder(tmp_path / "demo")
            metrics = json.loads((folder / "round-000" / "metrics.json").read_text())
            gold = metrics["evaluation"]["gold_reward"]
            assert gold["new"]["mean"] == arms[name]["gold_reward"]["mean"]
            assert gold["start"]["mean"] == pytest.approx(arms["start"]["gold_reward"]["mean"])
            assert metrics["evaluation"]["grader"]["annotated"] is True
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "discordant" in page
    assert (tmp_path / "demo" / "safety" / "seed-0" / "discordant" / "report.html").is_file()
    assert cli.run(command) == 0  # nothing is played again
    said = capsys.readouterr().out
    assert "proxy_only" in said
    assert "reward accuracy" in said


def test_the_arms_differ_in_what_is_asked_alone(tmp_path: Path) -> None:
    sandbox = Sandbox(World(task="safety"), tmp_path)
    configs = [arm_config(sandbox, Arm("safety", 0, 3, name)) for name in STRATEGIES]
    assert len({config.model_copy(update={"selection": None}).model_dump_json() for config in configs}) == 1
    asked = [None if c.selection is None else (c.selection.strategy, c.selection.budget) for c in configs]
    assert asked == [None, ("random_pairs", 200), ("shf_cas", 200), ("discordant", 200)]
    assert all(isinstance(config, RunConfig) and config.seed == 3 for config in configs)


def test_the_interval_over_seeds_is_students() -> None:
    values = [0.1, 0.4, 0.35, 0.2]
    found = seed_interval(values)
    expected = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx(expected)
    assert seed_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}
    assert math.isclose(seed_interval([2.0, 2.0])["low"] or 0, 2.0)


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--seed", "-1"]])
def test_numbers_that_make_no_demo(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["demo", "--out", str(tmp_path / "demo"), *options]) == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("ends", [True, False])
def test_the_comparison_is_drawn(browser: Browser, tmp_path: Path, ends: bool) -> None:  # noqa: F811
    def interval(mean: float) -> dict[str, float | None]:
        return {"mean": mean, "low": mean - 0.1 if ends else None, "high": mean + 0.1 if ends else None}

    arms = {
        name: {"gold_reward": interval(place / 5), "reward_accuracy": interval(0.6), "judgements": 200}
        for place, name in enumerate(ARMS)
    }
    summary = {"tasks": {"safety": arms, "helpfulness": arms}, "seeds": [0, 1], "report": "discordant"}
    page = opened(browser, write_comparison(tmp_path, summary), viewport={"width": 1100, "height": 800})
    assert page.complaints == []
    assert page.page.locator("#chart-gold-safety svg .mark-symbol.role-mark path").count() == len(ARMS)
    assert page.page.locator("#safety tbody tr, #safety table tr").count() >= len(ARMS)
