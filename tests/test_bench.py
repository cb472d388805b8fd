"""The benchmark: curves and their distance, detection against plain loops, and whole commands on tiny worlds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser
from scipy.stats import mannwhitneyu

from dissonance import cli
from dissonance.bench import BenchConfig, bench
from dissonance.bench.cell import Cell, cells_of, choose, grade
from dissonance.bench.config import FeedbackKind, StrategyConfig
from dissonance.bench.efficiency import efficiency, efficiency_interval, mean_over_seeds
from dissonance.bench.run import _play, summarise
from dissonance.bench.setting import load_setting, place
from dissonance.callables import import_callable
from dissonance.errors import ModelError, RunError, SettingsError
from dissonance.evaluate.statistics import Bootstrap
from dissonance.sandbox import cell as cell_of
from dissonance.sandbox import gold_reward
from dissonance.sections import parse_section
from dissonance.selection import select
from test_report import browser, opened  # noqa: F401
from test_selection import flat, opposed, random_pool
from waiting import until

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = yaml.safe_load((BENCHMARKS / "label_efficiency_tiny.yaml").read_text())


# -- label efficiency --------------------------------------------------------------------------------------------------

BUDGETS = (25, 50, 100, 200, 400)


def worth(base, own, spent=BUDGETS):
    return efficiency(BUDGETS, np.asarray(base, float), spent, np.asarray(own, float))


@given(st.floats(0.3, 3.0), st.floats(0.01, 5), st.floats(-3, 3))
def test_a_shifted_curve_is_worth_its_shift(ratio, slope, level):
    base = level + slope * np.log(BUDGETS)
    found = worth(base, level + slope * np.log(np.array(BUDGETS) * ratio))
    assert found.bound is None
    assert found.value == pytest.approx(ratio, rel=1e-4)


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=5), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_exchanged_curves_have_the_inverse_worth_within_the_budgets(first, second):
    found = worth(first, second)
    assert found.value * worth(second, first).value == pytest.approx(1)
    assert 1 / 16 - 1e-9 <= found.value <= 16 + 1e-9
    assert worth(first, first).value == pytest.approx(1)


RISING = [0.1, 0.2, 0.3, 0.4, 0.5]  # at 25, 50, 100, 200, 400


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        (RISING, [0.4] * 5, 200 / 25),  # a flat curve reaches its level with its first judgements
        ([0.4] * 5, RISING, 25 / 200),
        (RISING, [0.35, 0.25, 0.3, 0.3, 0.3], 100 / 25),  # one that falls is pooled to its mean, 0.3
        ([0.5] * 5, [0.5, 0.6, 0.7, 0.8, 0.9], 1),
    ],
)
def test_a_result_needs_the_least_that_reaches_it(base, own, expected):
    found = worth(base, own)
    assert found.bound is None
    assert found.value == pytest.approx(expected, rel=1e-6)


def test_curves_that_never_meet_give_the_bound():
    low, high = np.array([0.0, 0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    assert worth(low, high) == (pytest.approx(16), "at least")
    assert worth(high, low) == (pytest.approx(1 / 16), "at most")


def test_what_was_not_spent_is_not_charged():
    assert worth(RISING, RISING, spent=[n / 2 for n in BUDGETS]).value == pytest.approx(2)


def test_the_interval_holds_what_seeds_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(12, 1))  # a good seed is good for both: it must not widen the interval
    base, bootstrap = np.log(BUDGETS) + shared, Bootstrap(np.arange(12), 300, 0)

    def interval(own):
        return efficiency_interval(BUDGETS, mean_over_seeds(base), BUDGETS, mean_over_seeds(own), bootstrap)

    noise = 0.2 * rng.normal(size=(12, 5))
    paired, unpaired = interval(base + np.log(2) + noise), interval(np.log(2 * np.array(BUDGETS)) + noise)
    assert paired["mean"] == pytest.approx(2, rel=0.1)
    assert paired["low"] < paired["mean"] < paired["high"]
    assert paired["high"] / paired["low"] < 0.8 * unpaired["high"] / unpaired["low"]
    assert paired["bound"] is None


# -- whole commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, dict]:
    """A whole benchmark, through the command line."""
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    done = subprocess.run(
        [sys.executable, "-m", "dissonance", "bench", str(file), "--json", "--quiet"],
        env={**os.environ, "DISSONANCE_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "tiny", json.loads(done.stdout)


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISSONANCE_CACHE", str(cache))


def test_every_cell_is_there_and_spends_what_it_may(played: tuple[Path, dict]) -> None:
    out, found = played
    assert found == json.loads((out / "summary.json").read_text())
    cells = found["cells"]
    expected = 2 * 2 * (6 * 2 + 1 + 2)  # tasks, seeds, strategies x budgets and the other kinds of feedback
    assert len(cells) == expected
    assert len({tuple(c[k] for k in ("task", "seed", "strategy", "budget", "feedback")) for c in cells}) == expected
    assert all(cell["judgements"] == cell["budget"] for cell in cells)
    assert all(0 <= cell["reward_accuracy"] <= 1 and -2 <= cell["gold_reward"] <= 1 for cell in cells)
    assert all(0 <= cell["shared_ignorance_share"] <= 1 for cell in cells)
    trained = [c for c in cells if c["policy_gold_reward"] is not None]
    assert {(c["strategy"], c["budget"], c["feedback"]) for c in trained} == {("apl", 12, "comparisons")}
    assert {c["pairs"] for c in cells if c["strategy"] == "discordant_mean" and c["budget"] == 6} == {6}
    assert set(found["label_efficiency"]) == set(found["label_efficiency_accuracy"]) == {"helpfulness", "safety"}
    assert set(found["label_efficiency"]["safety"]) == set(TINY["strategies"]) - {"random_pairs"}
    assert found["seeds"] == "confirmation"
    start = found["start"]["helpfulness"]
    assert start["gold_reward_best"]["mean"] >= start["gold_reward"]["mean"]
    random = [c for c in cells if (c["task"], c["strategy"], c["budget"]) == ("safety", "random_pairs", 12)]
    mean = np.mean([c["gold_reward"] for c in random if c["feedback"] == "comparisons"])
    (row,) = (
        r
        for r in found["table"]
        if (r["task"], r["strategy"], r["budget"], r["feedback"]) == ("safety", "random_pairs", 12, "comparisons")
    )
    assert row["gold_reward"]["mean"] == pytest.approx(mean)


def test_errors_are_detected_as_plain_loops_say(played: tuple[Path, dict], in_cache: None) -> None:
    out, found = played
    config = parse_section(BenchConfig, TINY)
    here = place(config, "safety", "biased", 1, out)
    setting = load_setting(here)
    answers, pool = setting.pool, setting.pool.pool("mean")
    wrong, distance, margins = [], [], []
    for p, (turns, texts) in enumerate(zip(answers.conversations, answers.texts, strict=True)):
        gold = [gold_reward(here.world, turns[-1].content, text) for text in texts]
        reward = answers.reward[p]
        for i in range(len(texts)):
            for j in range(i):
                if gold[i] != gold[j]:
                    agree = (gold[i] - gold[j]) * (reward[i] - reward[j])
                    wrong.append(agree < 0)
                    assert agree != 0
                    distance.append(pool.kendall_tau_distance[p])
                    margins.append(-abs(reward[i] - reward[j]))
    wrong = np.array(wrong)
    rows = json.loads((here.folder / "detection.json").read_text())["rows"]
    by_name = {r["metric"]: r for r in rows if (r["subset"], r["n"], r["level"]) == ("all", 4, "pair")}
    for metric, values in (("kendall_tau_distance_mean", distance), ("reward_margin", margins)):
        of = np.array(values)
        oracle = mannwhitneyu(of[wrong], of[~wrong]).statistic / wrong.sum() / (~wrong).sum()
        assert by_name[metric]["auc"] == pytest.approx(oracle)
        assert by_name[metric]["error"] == pytest.approx(wrong.mean())
    assert {r["n"] for r in rows} == {2, 4}
    assert set(found["error_detection"]["safety"]) == set(by_name)
    worlds = {row["world"] for row in found["detection"]}
    assert worlds == {"biased", "even"}, "errors are looked at in every world, strategies compared in the first"
    assert {cell["world"] for cell in found["cells"]} == {"biased"}


def test_a_cell_is_graded_by_the_gold_of_what_its_model_likes(played: tuple[Path, dict], in_cache: None) -> None:
    here = place(parse_section(BenchConfig, TINY), "helpfulness", "biased", 0, played[0])
    held_out = load_setting(here).held_out
    assert grade(held_out, held_out.gold)["gold_reward"] == pytest.approx(held_out.gold.max(axis=1).mean())
    assert grade(held_out, held_out.gold)["reward_accuracy"] == 1
    assert grade(held_out, -held_out.gold)["reward_accuracy"] == 0
    (row,) = (
        b for b in played[1]["baselines"] if b["world"] == "biased" and (b["task"], b["seed"]) == ("helpfulness", 0)
    )
    assert row["gold_reward"] == pytest.approx(grade(held_out, held_out.reward)["gold_reward"])


def test_ratings_are_of_whole_sets_and_overlap_is_paid_for(played: tuple[Path, dict], in_cache: None) -> None:
    here = place(parse_section(BenchConfig, TINY), "helpfulness", "biased", 0, played[0])
    pool = load_setting(here).pool.pool("sum")
    asked = choose(pool, "discordant", StrategyConfig(), FeedbackKind(ask="ratings"), 9, 0)
    assert {query.kind for query in asked} == {"rating"}
    assert len(asked) == 9
    sizes = {name: sum(query.prompt_id == name for query in asked) for name in {q.prompt_id for q in asked}}
    whole = dict(zip(pool.prompt_ids, pool.n_answers.tolist(), strict=True))
    assert sum(sizes[name] != whole[name] for name in sizes) <= 1, "all of a prompt's answers, but for the last"
    assert len(choose(pool, "discordant", StrategyConfig(), FeedbackKind(overlap=3), 10, 0)) == 3
    assert choose(pool, "discordant", StrategyConfig(), FeedbackKind(overlap=3), 2, 0) == []


def test_shares_are_of_the_worlds_own_cells(played: tuple[Path, dict], in_cache: None) -> None:
    config = parse_section(BenchConfig, TINY)
    here = place(config, "helpfulness", "biased", 0, played[0])
    setting = load_setting(here)
    queries = choose(setting.pool.pool("sum"), "random_pairs", StrategyConfig(), FeedbackKind(), 12, 0)
    category = dict(zip(*(setting.pool.prompts[name].to_pylist() for name in ("prompt_id", "category")), strict=True))
    shared = [cell_of(here.world, category[query.prompt_id]) == "neither" for query in queries]
    (cell,) = (
        c
        for c in played[1]["cells"]
        if (c["task"], c["seed"], c["strategy"], c["budget"], c["feedback"])
        == ("helpfulness", 0, "random_pairs", 12, "comparisons")
    )
    assert cell["shared_ignorance_share"] == pytest.approx(np.mean(shared))


def test_leads_are_differences_seed_by_seed(played: tuple[Path, dict]) -> None:
    cells, rows = played[1]["cells"], [row for row in played[1]["table"] if row["lead"] is not None]
    assert len(rows) == len(played[1]["table"]) - 2 * 2, "all but the baseline itself: two tasks, two budgets"

    def gold(strategy: str, feedback: str) -> dict[int, float]:
        where = ("safety", strategy, feedback, 12)
        return {
            c["seed"]: c["gold_reward"]
            for c in cells
            if (c["task"], c["strategy"], c["feedback"], c["budget"]) == where
        }

    base = gold("random_pairs", "comparisons")
    for strategy, feedback in (("apl", "comparisons"), ("random_pairs", "ratings"), ("random_pairs", "noisy")):
        own = gold(strategy, feedback)
        (row,) = (
            r
            for r in rows
            if (r["task"], r["strategy"], r["feedback"], r["budget"]) == ("safety", strategy, feedback, 12)
        )
        assert row["lead"]["gold_reward"]["mean"] == pytest.approx(np.mean([own[seed] - base[seed] for seed in base]))


def test_a_strategy_edited_meanwhile_is_not_taken_for_what_was_played(
    played: tuple[Path, dict], tmp_path: Path, in_cache: None
) -> None:
    config = parse_section(BenchConfig, TINY)
    (cell, *_) = cells_of(config, place(config, "safety", "biased", 0, played[0]))
    before = tmp_path / "named-by-what-it-was.json"
    with pytest.raises(RunError, match="the file of random_pairs was edited while the benchmark ran: run it again"):
        _play({cell: before}, config, played[0])
    assert not before.exists()


def test_a_world_with_too_few_pairs_for_deciles(tmp_path: Path, in_cache: None) -> None:
    few = {**TINY, "tasks": ["safety"], "worlds": {"biased": TINY["worlds"]["biased"]}, "seeds": {"confirmation": [0]}}
    few |= {"strategies": {}, "budgets": [], "feedback": {"comparisons": {}}, "policy": None}
    found = bench(parse_section(BenchConfig, {**few, "pool": {"prompts": 6, "n": 2}}), tmp_path / "few")
    assert found["cells"] == []
    (row,) = (
        r for r in found["detection"] if (r["subset"], r["level"], r["metric"]) == ("all", "pair", "reward_margin")
    )
    assert row["deciles"] is None
    assert 0 <= row["error"]["mean"] <= 1


def test_what_is_there_is_not_played_again(played: tuple[Path, dict], tmp_path: Path, in_cache: None) -> None:
    out = tmp_path / "again"
    shutil.copytree(played[0], out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json") if path.name not in {"summary.json"}}
    assert bench(parse_section(BenchConfig, TINY), out) == played[1]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # Another budget is new; nothing else is.
    more = parse_section(BenchConfig, {**TINY, "tasks": ["safety"], "budgets": [6, 12, 18]})
    found = bench(more, out)
    assert {cell["budget"] for cell in found["cells"]} == {6, 12, 18}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def in_group(group: int) -> list[str]:
    """The processes of a process group that are there, but for those that nobody has waited for."""
    found = subprocess.run(["ps", "-eo", "pgid=,stat=,pid="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [pid for pgid, state, pid in rows if int(pgid) == group and not state.startswith("Z")]


def test_killed_and_run_again_it_finds_the_same(played: tuple[Path, dict], tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    command = [sys.executable, "-m", "dissonance", "bench", str(file), "--json", "--quiet"]
    environment = {**os.environ, "DISSONANCE_CACHE": str(cache)}
    running = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while running.poll() is None and len(list((tmp_path / "tiny" / "cells").glob("*.json"))) < 5:
        time.sleep(0.05)
    running.kill()  # and not its processes: they end by themselves
    running.wait()
    until(lambda: not in_group(running.pid))  # after a second, by themselves
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "tiny" / "cells").glob("*.json")}
    assert 5 <= len(kept) < len(played[1]["cells"])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == played[1]
    assert not list((tmp_path / "tiny").rglob(".*.tmp"))
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_interrupted_it_says_so_and_leaves_no_process(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY, sort_keys=False))
    running = subprocess.Popen(
        [sys.executable, "-m", "dissonance", "bench", str(file)],
        env={**os.environ, "DISSONANCE_CACHE": str(cache)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while running.poll() is None and not any((tmp_path / "tiny" / "settings").glob("*/detection.json")):
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert "interrupted; the same command goes on where it was" in said
    assert "Traceback" not in said
    until(lambda: not in_group(running.pid), 0.5)  # what is left behind ends by itself after a second


def test_the_page_shows_curves_worths_and_errors(played: tuple[Path, dict], browser: Browser) -> None:  # noqa: F811
    shown = opened(browser, played[0] / "report.html")
    headings = shown.page.locator("h2").all_inner_texts()
    assert "Helpfulness: gold reward, best of n" in headings
    assert "Safety: what a label is worth" in headings
    assert "Safety: what predicts the proxy’s errors" in headings
    assert "Safety: lead over random_pairs with the same budget" in headings
    assert "Safety: errors by decile of each measure" in headings
    assert "Safety: what predicts the proxy’s errors, by who knows the subject" in headings
    assert "Safety: what predicts the proxy’s errors, by world" in headings
    charts = shown.page.locator("[data-chart]")
    assert charts.count() == len(headings) - 2  # and two tables
    assert all(chart.locator("svg").count() == 1 for chart in charts.all())
    assert shown.page.locator("#table-safety tr").count() == 1 + 15
    assert not shown.complaints


# -- plans and mistakes ------------------------------------------------------------------------------------------------


def written(tmp_path: Path, **changes: object) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return str(file)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    assert cli.run(["bench", file, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "seeds": [0, 1], "settings": 8, "settings_made": 0, "cells": 60, "cells_played": 0,
    }  # fmt: skip
    assert cli.run(["bench", file, "--dry-run", "--development", "--set", "tasks=[safety]"]) == 0
    assert "cells: 15, of which 0 are there" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("file", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_benchmark_can_be_planned(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    for options in ([], ["--development"]):
        assert cli.run(["bench", str(file), "--dry-run", "--out", str(tmp_path / "out"), *options]) == 0


CALLABLES = {
    *(f"benchmarks.controls:{name}" for name in ("one_pair", "any_prompt", "summed", "widest")),
    *(f"benchmarks.candidates:{name}" for name in ("balanced", "spread_of_3", "spread_of_4", "spread_of_8")),
}


@pytest.mark.parametrize("named", sorted(CALLABLES))
def test_controls_and_candidates_keep_to_the_budget(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BENCHMARKS.parent)
    pool = random_pool(40, 6)
    for budget in (1, 2, 20, 41):
        chosen = select(pool, import_callable(named, "strategy"), budget=budget, rng=np.random.default_rng(0))
        assert chosen.judgements == budget or (named.endswith("balanced") and budget > 38)
    if named.endswith("balanced"):
        ends = [flat(pool, query) for query in chosen.queries]
        assert 0.4 < np.mean([opposed(pool, i, j) for i, j in ends]) < 0.6
        assert len({query.prompt_id for query in chosen.queries}) == len(chosen.queries)


def test_every_callable_of_the_configs_is_tried_above() -> None:
    configs = [yaml.safe_load(file.read_text()) for file in BENCHMARKS.glob("*.yaml")]
    named = {of.get("strategy", "") for config in configs for of in config.get("strategies", {}).values()}
    assert {name for name in named if ":" in name} <= CALLABLES


def test_what_a_benchmark_cannot_say_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", written(tmp_path, budgets=[12], feedback={"own": {}}), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "what a label is worth takes random_pairs among the strategies, and two budgets or more" in said
    assert "intervals take 5 seeds or more" in said


def broken(*_: object) -> None:
    raise RuntimeError("no such thing")


def test_a_strategy_that_fails_is_named(played: tuple[Path, dict], in_cache: None) -> None:
    here = place(parse_section(BenchConfig, TINY), "helpfulness", "biased", 0, played[0])
    pool = load_setting(here).pool.pool("sum")
    mine = StrategyConfig(strategy="test_bench:broken")
    message = (
        r"strategy mine \(test_bench:broken\) failed with seed 3 and budget 6: RuntimeError: no such thing "
        r"\(.*test_bench.py:"
    )
    with pytest.raises(SettingsError, match=message):
        choose(pool, "mine", mine, FeedbackKind(), 6, 3)


MISTAKES = {
    "an unknown strategy": ({"strategies": {"best": {}}}, "there is no strategy 'best'"),
    "a strategy that cannot be imported": (
        {"strategies": {"mine": {"strategy": "nowhere:mine"}}, "feedback": {"own": {}}, "policy": None},
        "strategy: nowhere:mine cannot be imported",
    ),
    "a threshold that is none": ({"strategies": {"shf_cas": {"tau": 7}}}, "--tau 7"),
    "seeds on both sides": ({"seeds": {"development": [1], "confirmation": [1]}}, "seeds [1] are for development"),
    "a seed twice": ({"seeds": {"confirmation": [1, 1]}}, "confirmation must be different seeds"),
    "no budgets": ({"budgets": []}, "strategies and budgets go together"),
    "a budget of nothing": ({"budgets": [0]}, "budgets must be different numbers"),
    "feedback on what is not compared": (
        {"feedback": {"some": {"strategies": ["margin"]}}, "policy": None},
        "feedback.some names 'margin'",
    ),
    "a policy at another budget": ({"policy": {"budget": 99}}, "policy names 99"),
    "a threshold that it does not use": ({"strategies": {"margin": {"tau": 0.5}}}, "strategy 'margin' uses no tau"),
    "another baseline": ({"strategies": {"random_pairs": {"strategy": "margin"}}}, "strategies.random_pairs is what"),
    "a callable as the name": (
        {"strategies": {"nowhere:mine": {}}, "feedback": {"own": {}}, "policy": None},
        "strategy: nowhere:mine cannot be imported",
    ),
    "a task twice": ({"tasks": ["safety", "safety"]}, "tasks must be different"),
    "feedback for nothing": ({"feedback": {"own": {"strategies": []}}}, "feedback.own is for nothing"),
    "more prompts than there are": ({"pool": {"prompts": 2000}}, "pool.prompts is 2000: a world has 1500"),
    "an unknown key": ({"worlds": {"one": {"biass": 1}}}, "worlds.one.biass: there is no such setting"),
    "a dial out of range": ({"worlds": {"one": {"bias": 2}}}, "worlds.one.bias"),
    "no such likelihood": ({"strategies": {"pacs": {"likelihood": "max"}}}, "strategies.pacs.likelihood"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = MISTAKES[name]
    assert cli.run(["bench", written(tmp_path, **changes)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "config").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("{}")
    for out, message in ((tmp_path / "run", "no benchmark's folder"), (file, "is a file")):
        assert cli.run(["bench", file, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["summary.json"]


def test_a_set_of_seeds_that_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, seeds={"confirmation": [0]})
    assert cli.run(["bench", file, "--development"]) == 2
    assert "seeds.development is empty" in capsys.readouterr().err
    assert cli.run(["bench", file, "--workers", "0"]) == 2
    assert "workers is 0" in capsys.readouterr().err


def test_a_callable_is_another_cell_once_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from dissonance.selection.strategies import random_pairs as mine\n"
    (tmp_path / "ours_for_bench.py").write_text(source)
    config = parse_section(
        BenchConfig,
        {
            "seeds": {"confirmation": [0]},
            "strategies": {"mine": {"strategy": "ours_for_bench:mine"}},
            "budgets": [4],
            "tasks": ["safety"],
        },
    )
    (cell,) = cells_of(config, place(config, "safety", "default", 0, tmp_path))
    before = cell.file(config, tmp_path)
    assert before == Cell(cell.here, "mine", 4, "comparisons").file(config, tmp_path)
    (tmp_path / "ours_for_bench.py").write_text(source + "# edited\n")
    assert cell.file(config, tmp_path) != before


def test_without_a_baseline_or_strategies_there_is_no_efficiency(tmp_path: Path) -> None:
    config = parse_section(BenchConfig, {"seeds": {"confirmation": [0]}})
    assert cells_of(config, place(config, "safety", "default", 0, tmp_path)) == []
    assert summarise(config, [], {})["label_efficiency"] == {}
    with pytest.raises(SettingsError, match=r"seeds.development is empty"):
        bench(config, tmp_path, seeds="development")
    with pytest.raises(ModelError, match="strategy: os:path is a module, not a callable"):
        bench(
            parse_section(
                BenchConfig,
                {"seeds": {"confirmation": [0]}, "strategies": {"x": {"strategy": "os:path"}}, "budgets": [4]},
            ),
            tmp_path,
        )
