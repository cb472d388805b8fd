"""The audit as its user runs it: whole commands in processes of their own, killed and resumed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from scipy.stats import kendalltau

from conftest import WORDS
from dissonance import AuditConfig, audit, cli, kendall_tau_distance, pacs, select
from dissonance.artifacts import create_run
from dissonance.config import PolicyConfig
from dissonance.engine.local import LocalEngine, LocalRound
from dissonance.errors import DataError, RunError, SettingsError
from dissonance.measuring import conflicts
from dissonance.progress import Advance
from dissonance.prompts import load_prompts
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, QUERIES_SCHEMA, Prompt
from dissonance.sampling import HFPolicy

REWARD = """
import os, time
calls = 0
def reward(prompts, completions):
    global calls
    calls += 1
    if calls > int(os.environ.get("BLOCK_AFTER", "1000000")):
        time.sleep(600)
    return [float(len(set(c.split()))) for c in completions]
"""


def command(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dissonance", *map(str, arguments)],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def audit_arguments(policy: Path, reward: Path | str, prompts: Path, **options: Any) -> list[str]:
    settings = {"policy": policy, "reward-model": reward, "prompts": prompts, "max-new-tokens": 10, "n": 4} | options
    return ["audit", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]


def config(policy: Path, reward: Path | str, prompts: Path, **settings: Any) -> AuditConfig:
    policy_settings = {"model": str(policy), "n": 4, "max_new_tokens": 10, "tokens_per_batch": 200}
    return AuditConfig.model_validate(
        {
            "prompts": {"source": str(prompts)},
            "policy": {**policy_settings, **settings.pop("sampling", {})},
            "reward_model": {"model": str(reward)},
            **settings,
        }
    )


def tables(run: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        name: pq.read_table(run / "round-000" / f"{name}.parquet").to_pylist() for name in ("prompts", "completions")
    }


def test_an_audit_leaves_what_the_contract_says(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = command(*audit_arguments(policy_folder, reward_folder, prompts_file), "--out", out, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    kendall = {"mean", "null_mean", "null_sd", "distinct_mean", "share_above_null", "null_share_above"}
    assert kendall <= summary["kendall_tau_distance"].keys()
    assert (summary["prompts"], summary["completions"], summary["truncated"]) == (12, 48, 0)
    assert summary["tokens_per_second"] > 0
    assert "sampling: 48/48 completions" in done.stderr

    round_ = out / "round-000"
    prompts, completions = pq.read_table(round_ / "prompts.parquet"), pq.read_table(round_ / "completions.parquet")
    assert prompts.schema.equals(PROMPTS_SCHEMA)
    assert completions.schema.equals(COMPLETIONS_SCHEMA)
    assert prompts["prompt_id"].to_pylist() == [f"p{i}" for i in range(12)]
    assert completions["completion_id"].to_pylist() == [0, 1, 2, 3] * 12
    for row in prompts.to_pylist():
        mine = [c for c in completions.to_pylist() if c["prompt_id"] == row["prompt_id"]]
        rewards, logprobs = [c["reward"] for c in mine], [c["logprob"] for c in mine]
        assert row["kendall_tau_distance"] == kendall_tau_distance(rewards, logprobs)
        assert row["kendall_tau_distance"] == pytest.approx((1 - kendalltau(rewards, logprobs).statistic) / 2)
        assert [c["pacs"] for c in mine] == pytest.approx(list(pacs(rewards, logprobs)))
        assert row["category"] == ("even" if int(row["prompt_id"][1:]) % 2 == 0 else "odd")
    assert not (round_ / "parts").exists()
    assert (out / "report.html").stat().st_size > 10_000

    before = (out / "run.json").read_bytes()
    again = command(*audit_arguments(policy_folder, reward_folder, prompts_file), "--out", out, "--json", cwd=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")  # nothing sampled, nothing scored
    assert json.loads(again.stdout) == summary
    assert (out / "run.json").read_bytes() == before


@pytest.fixture(scope="module")
def undisturbed(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with an audit that nobody interrupted, and its arguments."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "my_rewards.py").write_text(REWARD)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "prompt": " ".join(WORDS[i : i + 2 + i % 5])}) + "\n" for i in range(12))
    )
    arguments = audit_arguments(
        policy_folder, "my_rewards:reward", folder / "prompts.jsonl", **{"tokens-per-batch": 120}
    )
    done = command(*arguments, "--out", "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, arguments


@pytest.mark.parametrize("parts", [1, 5, 9])
def test_kill_9_loses_no_finished_batch_and_changes_no_number(undisturbed: tuple[Path, list[str]], parts: int) -> None:
    folder, arguments = undisturbed
    killed = folder / f"killed-{parts}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dissonance", *arguments, "--out", killed.name, "--quiet"],
        cwd=folder, env={**os.environ, "BLOCK_AFTER": str(1 + max(0, parts - len(_plan(folder))))},
    )  # fmt: skip
    stored = killed / "round-000" / "parts"
    deadline = time.monotonic() + 120
    while len(list(stored.glob("*.parquet"))) < parts and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = [path.name for path in stored.glob("*.parquet")]
    assert len(survived) >= parts
    assert not (killed / "round-000" / "completions.parquet").exists()

    resumed = command(*arguments, "--out", killed.name, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert tables(killed) == tables(folder / "whole")
    sampled = sum(name.startswith("completions-") for name in survived)
    assert f"sampling: {48 - 4 * sum(map(len, _plan(folder)[:sampled]))}/" in resumed.stderr
    assert not list(killed.rglob("*.tmp"))


def _plan(folder: Path) -> list[list[Prompt]]:
    """The batches of the undisturbed run."""
    ledger = json.loads((folder / "whole" / "run.json").read_text())
    policy = HFPolicy(PolicyConfig.model_validate(ledger["settings"]["policy"]))
    return policy.plan(load_prompts(str(ledger["settings"]["prompts"]["source"])).prompts)


def test_the_same_seed_gives_the_same_tables_and_another_does_not(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        audit(config(policy_folder, reward_folder, prompts_file, seed=seed), tmp_path / name)
    assert tables(tmp_path / "a") == tables(tmp_path / "b")
    assert tables(tmp_path / "a") != tables(tmp_path / "c")


def test_relative_likelihood_measures_against_the_reference(
    policy_folder: Path, make_policy: Any, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    reference = make_policy(seed=9)
    relative = config(
        policy_folder, reward_folder, prompts_file, likelihood="relative", sampling={"reference": str(reference)}
    )
    audit(relative, tmp_path / "relative")
    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "sum")
    rows, plain = tables(tmp_path / "relative"), tables(tmp_path / "sum")
    assert all(c["ref_logprob"] is None for c in plain["completions"])
    for row in rows["prompts"]:
        mine = [c for c in rows["completions"] if c["prompt_id"] == row["prompt_id"]]
        ratio = [c["logprob"] - c["ref_logprob"] for c in mine]
        assert row["kendall_tau_distance"] == kendall_tau_distance([c["reward"] for c in mine], ratio)
    assert [c["logprob"] for c in rows["completions"]] == [c["logprob"] for c in plain["completions"]]


def test_several_windows_keep_the_order_of_the_prompts(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "one")
    monkeypatch.setattr("dissonance.stages.WINDOW", 5)
    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "three")
    one, three = tables(tmp_path / "one"), tables(tmp_path / "three")
    assert [c["token_ids"] for c in one["completions"]] == [c["token_ids"] for c in three["completions"]]
    assert [p["prompt_id"] for p in one["prompts"]] == [p["prompt_id"] for p in three["prompts"]]


def test_an_audit_keeps_no_prompts_that_its_engine_has(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    given = []

    class Watched(LocalEngine):
        def prepare(self, config: AuditConfig, prompts: Sequence[Prompt]) -> LocalRound:
            given.append(weakref.ref(prompts))
            return super().prepare(config, prompts)

    @contextmanager
    def stage(*_: object) -> Iterator[Advance]:
        assert given[0]() is None
        yield lambda _: None

    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "run", stage, engine=Watched())
    assert len(tables(tmp_path / "run")["prompts"]) == 12


def test_truncation_and_unfinished_answers_are_counted(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments = audit_arguments(policy_folder, reward_folder, prompts_file, **{"reward-max-length": 12})
    done = command(*arguments, "--out", "run", "--json", cwd=tmp_path)
    summary, rows = json.loads(done.stdout), tables(tmp_path / "run")["completions"]
    assert 0 < summary["truncated"] == sum(c["reward_truncated"] for c in rows) < 48
    assert summary["unfinished"] == sum(c["finish_reason"] == "length" for c in rows)


def test_select_spends_the_budget_and_says_why(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "run")
    done = command("select", "run", "--strategy", "discordant", "--budget", 7, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    queries = pq.read_table(tmp_path / "run" / "round-000" / "queries.parquet")
    assert queries.schema.equals(QUERIES_SCHEMA)
    assert (found["strategy"], found["judgements"], found["queries"]) == ("discordant", 7, len(queries))
    assert found["prompts"] == len(set(queries["prompt_id"].to_pylist()))
    assert set(queries["kind"].to_pylist()) == {"pairwise"}
    assert all(queries["reason"].to_pylist())
    assert "judgements" in command("select", "run", "--budget", 3, cwd=tmp_path).stdout


def test_select_refuses_and_leaves_the_last_choice(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    audit(config(policy_folder, reward_folder, prompts_file), run)
    select(run, budget=5)
    before = (run / "round-000" / "queries.parquet").read_bytes()
    for options in ({"budget": 0}, {"budget": 5, "tau": "2"}, {"budget": 5, "strategy": "best"}):
        with pytest.raises(SettingsError):
            select(run, **options)
    assert (run / "round-000" / "queries.parquet").read_bytes() == before


def test_a_changed_setting_is_refused_by_name(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    audit(config(policy_folder, reward_folder, prompts_file), run)
    before = tables(run)
    with pytest.raises(RunError, match=r"policy\.n: 4, now 5"):
        audit(config(policy_folder, reward_folder, prompts_file, sampling={"n": 5}), run)
    prompts_file.write_text(prompts_file.read_text().replace("w1 ", "w2 "))
    with pytest.raises(RunError, match="the content of prompts"):
        audit(config(policy_folder, reward_folder, prompts_file), run)
    assert tables(run) == before


def test_a_run_in_use_is_refused(policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "run")
    with create_run(tmp_path / "other", "audit", {}, {}), pytest.raises(RunError, match="in use by another"):
        select(tmp_path / "other", budget=1)


def test_a_reward_that_turns_nan_stops_the_run_and_keeps_the_samples(
    policy_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "sometimes.py"
    module.write_text(
        "def f(prompts, completions):\n    return [float('nan') if len(c) > 20 else 1.0 for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="returned nan"):
        audit(config(policy_folder, "sometimes:f", prompts_file), tmp_path / "run")
    assert list((tmp_path / "run" / "round-000" / "parts").glob("completions-*"))
    assert not (tmp_path / "run" / "round-000" / "completions.parquet").exists()


BAD_INPUT = {
    "missing file": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "empty prompt": ({"prompts": "empty_prompt.jsonl"}, "empty_prompt.jsonl:2"),
    "broken line": ({"prompts": "broken.jsonl"}, "broken.jsonl:2"),
    "corrupt Parquet": ({"prompts": "corrupt.parquet"}, "corrupt.parquet"),
    "one completion": ({"n": 1}, "--n"),
    "two outputs": ({"reward-model": "two"}, "has 2 outputs"),
    "a causal LM as reward model": ({"reward-model": "policy"}, "is a causal LM"),
    "a classifier as policy": ({"policy": "two"}, "is a classifier"),
    "a NaN reward": ({"reward-model": "bad:nan"}, "returned nan"),
    "unknown option": ({"nonsense": 1}, "--nonsense"),
    "a word for a number": ({"n": "many"}, "'many'"),
    "no such device": ({"device": "cuda:77"}, "cuda:77"),
    "temperature zero": ({"temperature": 0}, "--temperature"),
    "an encoder's template for a policy": ({"template": "pair"}, "policy"),
    "a reward model's option": ({"reward-max-length": 1}, "--reward-max-length"),
    "a folder that cannot be made": ({"out": "/proc/out"}, "--out /proc/out"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a template without a prompt": ({"template": "Question:"}, "{prompt}"),
    "relative without a reference": ({"likelihood": "relative"}, "relative"),
    "no policy": ({"policy": ""}, "--policy: "),
    "no reward model": ({"reward-model": ""}, "--reward-model: "),
    "no prompts": ({"prompts": ""}, "--prompts: "),
    "no such model": ({"policy": "./nothing"}, "./nothing"),
    "a prompt that is too long": ({"max-new-tokens": 63}, "leave no room"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, make_policy: Any, make_reward_model: Any) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, made in {
        "policy": make_policy(),
        "reward": make_reward_model(),
        "two": make_reward_model(num_labels=2),
    }.items():
        (folder / name).symlink_to(made)
    good = json.dumps({"prompt": "w1 w2"}) + "\n"
    (folder / "prompts.jsonl").write_text(good + json.dumps({"prompt": " ".join(WORDS[:5])}) + "\n")
    (folder / "empty_prompt.jsonl").write_text(good + json.dumps({"prompt": "  "}) + "\n")
    (folder / "broken.jsonl").write_text(good + '{"prompt": "w1\n')
    (folder / "corrupt.parquet").write_bytes(b"PAR1 this is not it PAR1")
    (folder / "bad.py").write_text("def nan(prompts, completions):\n    return [float('nan')] * len(completions)\n")
    return folder


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    workplace: Path, name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options, expected = BAD_INPUT[name]
    before = sorted(path.name for path in workplace.iterdir() if path.name != "__pycache__")
    good = {"policy": "policy", "reward-model": "reward", "prompts": "prompts.jsonl", "max-new-tokens": 8}
    settings = good | options
    arguments = ["audit", *(str(x) for key, value in settings.items() for x in (f"--{key}", value))]
    monkeypatch.chdir(workplace)
    assert cli.run([*arguments, *([] if "out" in options else ["--out", "out"]), "--quiet"]) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("dissonance: error: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert sorted(path.name for path in workplace.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["conflicts", "nowhere.parquet", "--out", "out"], "nowhere.parquet"),
        (["conflicts", "corrupt.parquet", "--out", "out"], "corrupt.parquet"),
        (["select", "nowhere", "--budget", "3"], "nowhere is not a run folder"),
        (["report", "nowhere"], "nowhere"),
        (["nonsense"], "nonsense"),
        (["select", "nowhere"], "--budget"),
    ],
)
def test_other_commands_refuse_as_clearly(
    workplace: Path,
    arguments: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(workplace)
    assert cli.run(arguments) == 2
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert expected in said.err
    assert not (workplace / "out").exists()


def test_a_folder_of_something_else_is_not_touched(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="is not empty and is not a run folder"):
        audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "notes")
    with pytest.raises(RunError, match="is a file"):
        audit(config(policy_folder, reward_folder, prompts_file), tmp_path / "notes" / "mine.txt")
    assert [p.name for p in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_scores_of_ones_own_can_be_measured_selected_and_reported(tmp_path: Path) -> None:
    rows = [
        {"prompt_id": f"q{p}", "completion_id": i, "logprob": -1.0 - (p * i) % 7, "reward": float((p + 3 * i) % 5)}
        for p in range(20)
        for i in range(5)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("conflicts", "scored.jsonl", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["prompts"], summary["completions"]) == (20, 100)
    assert summary["seconds"] > 0
    assert summary["length_correlation"] is None
    assert summary["repeated_answers"] == pytest.approx(
        1 - len({(row["prompt_id"], row["logprob"], row["reward"]) for row in rows}) / 100
    )
    found = tables(tmp_path / "run")
    first = [row for row in rows if row["prompt_id"] == "q3"]
    expected = kendall_tau_distance([r["reward"] for r in first], [r["logprob"] for r in first])
    assert found["prompts"][3]["kendall_tau_distance"] == expected
    assert command("select", "run", "--budget", 5, cwd=tmp_path).returncode == 0
    assert command("report", "run", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("likelihood", ["sum", "mean"])
def test_scores_that_follow_length_or_repeat_themselves_are_warned_about(
    tmp_path: Path, likelihood: str, capfd: pytest.CaptureFixture[str]
) -> None:
    lengths = [[3, 9, 14, 20, 20], [103, 120, 111, 130, 130], [40, 48, 44, 52, 52]]
    exponent = {"sum": 1, "mean": 2}[likelihood]
    rows = [
        {
            "prompt_id": p,
            "reward": [1.0, 3.0, 2.0, 5.0, 5.0],
            "n_tokens": tokens,
            "logprob": [-(n**exponent) for n in tokens],
        }
        for p, tokens in enumerate(lengths)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    assert cli.run(["conflicts", str(tmp_path / "scored.jsonl"), "--out", str(out), "--likelihood", likelihood]) == 0
    said = capfd.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["length_correlation"] > 0.5
    assert f"correlation of PACS with length: {summary['length_correlation']:+.2f}; |rho| > 0.5" in said
    assert ("try --likelihood mean" in said) == (likelihood == "sum")
    assert "repeated answers: 20.0%" in said
    assert "prompts above that: " in said
    assert ", by chance 37.5%\nsignificantly: 0.0%, by chance 0.0%" in said
    assert f"{summary['length_correlation']:+.2f}" in (out / "report.html").read_text()


def test_a_wrong_option_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = command("select", "nowhere", "--budget", "3", "--nonsense", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dissonance: error: No such option: --nonsense")
    assert done.stderr.count("\n") == 1


def test_a_nan_among_ones_own_scores_names_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "scored.csv").write_text(
        "prompt_id,completion_id,logprob,reward\na,0,-1,2\na,1,-2,1\nb,0,-1,nan\nb,1,-3,0\n"
    )
    done = command("conflicts", "scored.csv", "--out", "run", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'b'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_interrupted_audit_says_how_to_go_on(policy_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD)
    arguments = audit_arguments(policy_folder, "my_rewards:reward", prompts_file, out="run")
    process = subprocess.Popen(
        [sys.executable, "-m", "dissonance", *arguments], cwd=tmp_path,
        env={**os.environ, "BLOCK_AFTER": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    parts = tmp_path / "run" / "round-000" / "parts"
    while not parts.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.endswith("dissonance: error: interrupted; the same command goes on where it was\n")


def test_measuring_and_selecting_do_not_load_torch() -> None:
    code = (
        "import sys, dissonance.loop, dissonance.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_shows_every_command_with_an_example() -> None:
    done = command("--help", cwd=Path())
    for name in ("audit", "conflicts", "select", "report", "demo"):
        assert name in done.stdout
        assert "Example:" in command(name, "--help", cwd=Path()).stdout


def test_an_edited_reward_function_is_another_reward_model(
    policy_folder: Path, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "edited_rewards.py"
    module.write_text(REWARD)
    audit(config(policy_folder, "edited_rewards:reward", prompts_file), tmp_path / "run")
    module.write_text(REWARD.replace("len(set(c.split()))", "-len(c)"))
    with pytest.raises(RunError, match="the content of reward_model.model"):
        audit(config(policy_folder, "edited_rewards:reward", prompts_file), tmp_path / "run")


def test_what_was_in_the_folder_before_a_refusal_stays_there(tmp_path: Path) -> None:
    (tmp_path / "scored.csv").write_text("prompt_id,reward\na,1\na,2\n")
    (tmp_path / "study" / ".git").mkdir(parents=True)
    for out in ("study", "new"):
        with pytest.raises(DataError, match="no column logprob"):
            conflicts(tmp_path / "scored.csv", tmp_path / out)
    assert not (tmp_path / "new").exists()
    left = [path.name for path in (tmp_path / "study").iterdir()]
    assert ".git" in left
    assert not {"run.json", "round-000"} & set(left)


def test_a_disk_that_is_full_loses_nothing(
    policy_folder: Path, reward_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments = [*audit_arguments(policy_folder, reward_folder, prompts_file), "--tokens-per-batch", 120]
    whole = command(*arguments, "--out", tmp_path / "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    out, sizes = tmp_path / "run", []
    uncovered = {  # what coverage writes would be cut as well
        name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")
    }
    for limit in (2_500, 5_000):  # bytes that any file may have: less than a part, less than a table
        full = subprocess.run(
            [sys.executable, "-m", "dissonance", *map(str, arguments), "--out", str(out)],
            cwd=tmp_path, env=uncovered, capture_output=True, text=True, check=False,
            preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )  # fmt: skip
        assert full.returncode == 1, full.stderr
        assert "cannot be written" in full.stderr
        assert "Traceback" not in full.stderr
        sizes.append(len(list(out.glob("round-000/parts/*.parquet"))))
        assert not list(out.rglob("*.tmp"))
    assert sizes[0] < sizes[1]
    again = command(*arguments, "--out", out, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert tables(out) == tables(tmp_path / "whole")
