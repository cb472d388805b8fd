"""Whole runs of SHF-CAS with real models: round after round, killed and gone on with, and what is refused."""

import json
import os
import random
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file

from dissonance import cli
from dissonance.config import AuditConfig, PolicyConfig, RewardConfig, RunConfig
from dissonance.errors import ModelError, RunError, StoreError
from dissonance.feedback.annotators.gold import GoldSettings
from dissonance.labelling import label_by_rewards
from dissonance.loop import evaluate, gain_per_judgement, refine, run, seed_of, why_end
from dissonance.measuring import audit, select
from dissonance.records import Answer, Message, Prompt
from dissonance.rewards import load_reward_model
from dissonance.run_labels import labels_of
from dissonance.sampling import HFReference
from dissonance.sections import parse_section
from loop_world import gold_preferences, write_world

TABLES = ("completions", "prompts", "queries", "pairs", "evaluation_answers", "evaluation_labels")


@pytest.fixture
def settings(
    tmp_path: Path,
    make_policy: Callable[..., Path],
    make_reward_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return write_world(tmp_path, make_policy, make_reward_model)


def changed(settings: dict[str, Any], **sections: Any) -> RunConfig:
    """The settings with some keys of some sections changed; None takes a section away."""
    merged = dict(settings)
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_section(RunConfig, merged)


def contents(folder: Path) -> dict[str, Any]:
    """What a run is to come to, whatever happened on the way: tables, metrics and weights of every round."""
    found: dict[str, Any] = {"summary": json.loads((folder / "summary.json").read_text())}
    for number in range(len(found["summary"]["rounds"])):
        here = folder / f"round-{number:03d}"
        found[here.name] = json.loads((here / "metrics.json").read_text())
        for name in TABLES:
            found[f"{here.name}/{name}"] = pq.read_table(here / f"{name}.parquet").to_pylist()
        for name in ("reward_model", "policy"):
            weights = load_file(here / name / "model.safetensors")
            found[f"{here.name}/{name}"] = {key: value.tolist() for key, value in weights.items()}
    return found


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- two rounds --------------------------------------------------------------------------------------------------------


def test_two_rounds_begin_where_the_round_before_ended(settings: dict[str, Any], tmp_path: Path) -> None:
    """Traps 4 and 5 of a loop: the old reward model, or the old policy, where the refined one was meant."""
    config = changed(settings, rounds={"most": 2})
    summary = run(config, tmp_path / "run")
    assert [sorted(one) for one in summary["rounds"]] == [sorted(summary["rounds"][0])] * 2
    assert summary["rounds"][0]["judgements"] == 12
    assert (tmp_path / "run" / "report.html").is_file()
    first, second = (tmp_path / "run" / f"round-00{k}" for k in range(2))
    table = pq.read_table(second / "completions.parquet").to_pylist()
    turns = {row["prompt_id"]: row["messages"] for row in pq.read_table(second / "prompts.parquet").to_pylist()}
    conversations = [tuple(Message(**turn) for turn in turns[row["prompt_id"]]) for row in table]
    texts = [row["text"] for row in table]

    def rewards(model: str) -> list[float]:
        return [r.value for r in load_reward_model(RewardConfig(model=model)).score(conversations, texts)]

    recorded = [row["reward"] for row in table]
    assert recorded == pytest.approx(rewards(str(first / "reward_model")), abs=1e-5)
    assert recorded != pytest.approx(rewards(settings["reward_model"]["model"]), abs=1e-3)

    def logprobs(model: str) -> list[float]:
        policy = PolicyConfig(**settings["policy"])
        reference = HFReference(policy, model)
        prompts = [Prompt(row["prompt_id"], c) for row, c in zip(table, conversations, strict=True)]
        ids = [[row["token_ids"]] for row in table]
        return [value for values in reference.logprobs(prompts, ids) for value in values]

    sampled = [row["logprob"] for row in table]
    assert sampled == pytest.approx(logprobs(str(first / "policy")), abs=1e-3)
    assert sampled != pytest.approx(logprobs(settings["policy"]["model"]), abs=1e-2)
    metrics = json.loads((second / "metrics.json").read_text())
    assert metrics["policy"]["start"]["kl"] == 0
    assert (
        metrics["reward_model"]["pairs"]["new"]
        > json.loads((first / "metrics.json").read_text())["reward_model"]["pairs"]["new"]
    )  # what was said in the first round still counts


def test_the_same_settings_give_the_same_run_and_a_finished_one_is_not_run_again(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = changed(settings)
    first = run(config, tmp_path / "one")
    run(config.model_copy(update={"trackers": ("tensorboard",)}), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    for trained in ("reward_model", "policy"):
        assert list((tmp_path / "two" / "round-000" / "tensorboard" / trained).glob("events.*"))
    before = everything(tmp_path / "one")
    assert run(config, tmp_path / "one") == first
    assert everything(tmp_path / "one") == before


@pytest.mark.parametrize("prompts", [{}, {"sample": 10}])
def test_what_was_audited_is_taken_over(settings: dict[str, Any], tmp_path: Path, prompts: dict[str, Any]) -> None:
    settings = {**settings, "prompts": {**settings["prompts"], **prompts}}
    config = changed(settings)
    run(config, tmp_path / "whole")
    audit(AuditConfig(**{name: settings[name] for name in ("prompts", "policy", "reward_model")}), tmp_path / "audit")
    for source in ("audit", "whole"):
        before = everything(tmp_path / source)
        run(config, tmp_path / f"on-{source}", audit=tmp_path / source)
        assert contents(tmp_path / f"on-{source}") == contents(tmp_path / "whole")
        assert everything(tmp_path / source) == before
        ledger = json.loads((tmp_path / f"on-{source}" / "run.json").read_text())
        assert ledger["stages"]["taken-over"]["run"] == str(tmp_path / source)


def test_a_damaged_table_is_not_taken_over(settings: dict[str, Any], tmp_path: Path) -> None:
    audit(AuditConfig(**{name: settings[name] for name in ("prompts", "policy", "reward_model")}), tmp_path / "audit")
    table = tmp_path / "audit" / "round-000" / "completions.parquet"
    pq.write_table(pq.read_table(table).slice(1), table)
    with pytest.raises(RunError, match="completions.parquet has 63 rows"):
        run(changed(settings), tmp_path / "run", audit=tmp_path / "audit")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("nothing", {}, "nothing is not a run folder"),
        ("audit", {"seed": 1}, "audit was audited with other settings (seed: 0, now 1): take those, or audit anew"),
        ("begun", {}, "begun has no finished audit: name a finished run of `audit`, or a run that has measured"),
    ],
)
def test_an_audit_that_cannot_be_taken_over(
    settings: dict[str, Any],
    tmp_path: Path,
    source: str,
    changes: dict[str, Any],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    audit(AuditConfig(**{name: settings[name] for name in ("prompts", "policy", "reward_model")}), tmp_path / "audit")
    (tmp_path / "begun").mkdir()
    ledger = json.loads((tmp_path / "audit" / "run.json").read_text())
    (tmp_path / "begun" / "run.json").write_text(json.dumps({**ledger, "stages": {}}))
    with pytest.raises(RunError, match=re.escape(said)):
        run(changed({**settings, **changes}), tmp_path / "run", audit=tmp_path / source)
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
    assert cli.run(["run", "config.yaml", "--dry-run", "--audit", str(tmp_path / source)]) == 2
    assert said in capsys.readouterr().err


def test_no_round_is_built_on_a_policy_that_is_gone(settings: dict[str, Any], tmp_path: Path) -> None:
    """The advice of an error, followed: round 0 trains another policy, and round 1 was sampled from the first."""
    run(changed(settings, rounds={"most": 2}), tmp_path / "run")
    training = {**settings["refine"]["policy"], "steps": 3}
    other = changed(settings, rounds={"most": 2}, refine={"policy": training})
    with pytest.raises(RunError, match=r"policy of round 0 was run with other settings \(steps: 2, now 3\)"):
        run(other, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "round-000" / "policy")
    with pytest.raises(RunError, match="measure of round 1 was run with other settings"):
        run(other, tmp_path / "run")


def test_a_run_killed_before_it_did_anything_can_have_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    run(changed(settings), tmp_path / "run")
    ledger = json.loads((tmp_path / "run" / "run.json").read_text())
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run" / "round-000").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({**ledger, "stages": {}}))
    assert run(changed(settings, seed=5), tmp_path / "run")["rounds"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["seed"] == 5


def test_a_file_that_is_gone_is_made_again(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(settings, rounds={"most": 1})
    run(config, tmp_path / "run")
    before = contents(tmp_path / "run")
    ledger = json.loads((tmp_path / "run" / "run.json").read_text())
    del ledger["stages"]["run"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(ledger))
    (tmp_path / "run" / "round-000" / "policy" / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "round-000" / "policy" / "config.json").unlink()
    for left in (tmp_path / "run" / "round-000" / "policy").iterdir():
        left.unlink()
    (tmp_path / "run" / "round-000" / "policy").rmdir()
    run(config, tmp_path / "run")
    assert contents(tmp_path / "run") == before


def _done(folder: Path) -> dict[str, Any]:
    """The stages that a run has entered as done."""
    ledger = folder / "run.json"
    return dict(json.loads(ledger.read_text())["stages"]) if ledger.exists() else {}


def _play(settings: dict[str, Any], out: str) -> None:
    import torch

    torch.set_num_threads(1)
    os.chdir(Path(out).parent)  # where the gold is
    run(parse_section(RunConfig, settings), out, report=False)


def test_killed_at_twelve_moments_a_run_comes_to_what_it_would_have(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "rounds": {"most": 2}}
    processes = get_context("forkserver")  # a process that has imported everything, and is forked in no time
    processes.set_forkserver_preload(["dissonance.loop", "dissonance.refine.policy", "dissonance.sampling"])
    start = time.monotonic()
    _play(settings, str(tmp_path / "whole"))
    whole = time.monotonic() - start
    stages = len(_done(tmp_path / "whole"))
    rng, hit = random.Random(0), set()
    for kill in range(12):
        process = processes.Process(target=_play, args=(settings, str(tmp_path / "killed")))
        process.start()
        # Each in another stage, at any moment of it, however busy the machine is.
        while process.is_alive() and len(_done(tmp_path / "killed")) < kill:
            time.sleep(0.002)
        process.join(rng.uniform(0, whole / stages))
        assert process.pid is not None
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        hit.add(len(_done(tmp_path / "killed")))
    _play(settings, str(tmp_path / "killed"))
    assert len(hit) >= 6, hit
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob(".*.tmp"))


# -- people ------------------------------------------------------------------------------------------------------------

PEOPLE = {"annotator": "people", "reward_model": None}


def answer_as_gold(folder: Path, share: float = 1.0) -> None:
    """Answer that share of the open queries as a person with an eye for different words would."""
    with labels_of(folder) as store:
        me = store.annotator("alice")
        queries = store.progress().queries
        for _ in range(round(share * queries)):
            lease = store.lease(me.annotator_id, gold_every=0)
            assert lease is not None
            counts = [len(set(text.split())) for text in lease.question.completions]
            choice = "tie" if counts[0] == counts[1] else "first" if counts[0] > counts[1] else "second"
            store.record(me.annotator_id, lease.question.query_id, Answer(choice), key=uuid.uuid4().hex)


def test_a_run_stops_for_people_and_goes_on(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({**settings, "feedback": {"annotator": "people", "enough": 0.5}})
    )
    command = ["run", "config.yaml", "--out", "run", "--quiet"]
    assert cli.run(command) == 3
    said = capsys.readouterr().err
    assert "6 answers are due in round 0 (0 of 12 are there)" in said
    assert "dissonance label run" in said
    assert cli.run([*command, "--json"]) == 3
    assert json.loads(capsys.readouterr().out) == {"round": 0, "answered": 0, "wanted": 12}
    before = everything(tmp_path / "run" / "round-000")
    assert cli.run(["select", "run", "--budget", "3"]) == 2
    assert "chooses by itself" in capsys.readouterr().err
    answer_as_gold(tmp_path / "run", 0.25)
    assert cli.run(command) == 3
    assert "3 answers are due" in capsys.readouterr().err
    assert everything(tmp_path / "run" / "round-000") == before
    answer_as_gold(tmp_path / "run", 0.75)
    assert cli.run([*command, "--json", "--set", "evaluation=null"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rounds"]) == 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Where the reward model was furthest from what people said" in page  # without an evaluation too


def test_waiting_goes_on_by_itself(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        answer_as_gold(tmp_path / "run", 1.0 if len(slept) == 1 else 0.0)

    monkeypatch.setattr("dissonance.round_labels.time.sleep", sleep)
    config = changed({**settings, "feedback": {"annotator": "people", "min_pairs": 1}})
    assert len(run(config, tmp_path / "run", wait=True)["rounds"]) == 1
    assert len(slept) == 1


# -- when it ends ------------------------------------------------------------------------------------------------------


def test_without_selection_the_policy_is_trained_against_the_proxy_as_it_is(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = changed({**settings, "feedback": {}}, selection=None)
    (found,) = run(config, tmp_path / "run")["rounds"]
    assert found["judgements"] == 0
    assert not (tmp_path / "run" / "round-000" / "reward_model").exists()
    assert (tmp_path / "run" / "round-000" / "policy").is_dir()


def test_a_run_ends_when_too_few_prompts_are_in_conflict(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(settings, rounds={"most": 3, "min_conflict": 1.0})
    found = run(config, tmp_path / "run")
    assert len(found["rounds"]) == 1
    assert "rounds.min_conflict" in found["ended"]
    assert not (tmp_path / "run" / "round-000" / "policy").exists()
    assert found["rounds"][0]["judgements"] == 0
    assert not (tmp_path / "run" / "labels.db").exists()


def test_a_run_ends_when_a_label_gains_too_little(settings: dict[str, Any]) -> None:
    config = changed(settings, rounds={"most": 3, "min_gain": 0.01})
    found = {
        "conflict": {"kendall_tau_distance": {"share_significant": 0.5}},
        "selection": {"judgements": 100},
        "evaluation": {"gold_reward": {"change": {"mean": 2.0, "low": 0.0, "high": 4.0}}},
    }
    assert gain_per_judgement(found) == 0.02
    assert why_end(config, found) is None
    found["evaluation"]["gold_reward"]["change"]["mean"] = 0.5
    assert "less than rounds.min_gain" in str(why_end(config, found))


def test_each_round_and_stage_draws_otherwise() -> None:
    places = [(number, stage) for number in range(10) for stage in ("", "select", "reward", "policy", "evaluate")]
    seeds = [seed_of(7, *place) for place in places]
    assert seeds[0] == 7
    assert len(set(seeds)) == len(places)
    assert seeds == [seed_of(7, *place) for place in places]


# -- stage by stage ----------------------------------------------------------------------------------------------------


def test_refine_and_evaluate_go_on_from_an_audit(settings: dict[str, Any], tmp_path: Path) -> None:
    parts = ("prompts", "policy", "reward_model")
    audit(parse_section(AuditConfig, {name: settings[name] for name in parts}), tmp_path / "run")
    select(tmp_path / "run", strategy="discordant", budget=12)
    label_by_rewards(tmp_path / "run", RewardConfig(model="gold_module:gold"), GoldSettings(source="gold_module:gold"))
    with pytest.raises(RunError, match="was not refined yet"):
        evaluate(tmp_path / "run", {"evaluation": settings["evaluation"]})
    sections = {"refine": settings["refine"], "feedback": {"min_pairs": 4}}
    found = refine(tmp_path / "run", sections)
    assert found["reward_model"]["pairs"]["new"] > 0
    assert found["policy"]["start"]["kl"] == 0
    before = everything(tmp_path / "run" / "round-000" / "policy")
    assert refine(tmp_path / "run", sections)["policy"] == found["policy"]
    assert everything(tmp_path / "run" / "round-000" / "policy") == before
    with pytest.raises(RunError, match=r"reward-model of round 0 was run with other settings \(.*epochs: 2.*, now 3"):
        refine(tmp_path / "run", merged(sections, {"refine": {"reward": {"epochs": 3}}}))
    judged = evaluate(tmp_path / "run", {"evaluation": settings["evaluation"]})
    assert judged["evaluation"]["gold_reward"]["new"] is not None
    assert "Round by round" in (tmp_path / "run" / "report.html").read_text()


# -- what is refused ---------------------------------------------------------------------------------------------------


def preferences(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"refine": {"polcy": {}}}, "refine.polcy: there is no such setting: did you mean policy?"),
    "an unknown section": ({"selecton": {}}, "selecton: there is no such setting: did you mean selection?"),
    "a missing policy": ({"policy": {"model": "./nowhere"}}, "./nowhere"),
    "a missing reward model": ({"reward_model": {"model": "./nowhere"}}, "./nowhere"),
    "a missing file of preferences": ({"preferences": {"original": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "an unknown strategy": ({"selection": {"strategy": "guess"}}, "selection.strategy is 'guess'"),
    "no budget": ({"selection": {"budget": 0}}, "selection.budget"),
    "an unknown annotator's setting": (
        {"feedback": {"settings": {"mood": 1}}},
        "feedback.settings of gold: there is no 'mood'",
    ),
    "people with a reward model": ({"feedback": {"annotator": "people"}}, "feedback: reward_model is what"),
    "more prompts a step than there are": ({"refine": {"policy": {"prompts_per_step": 17}}}, "there are 16 prompts"),
    "a gold that is not there": ({"evaluation": {"gold": {"model": "gold_module:silver"}}}, "gold_module:silver"),
    "held-out pairs that are trained on": (
        {"preferences": {"original": "pairs.jsonl", "gold": "pairs.jsonl"}},
        "preferences.gold: 30 of its pairs are on prompts of preferences.original",
    ),
    "a callable that is to be trained": ({"reward_model": {"model": "gold_module:gold"}}, "refine.reward.base"),
    "bounds on asking without asking": ({"selection": None, "rounds": {"min_conflict": 0.1}}, "rounds.min_conflict"),
    "evaluation without prompts": ({"evaluation": {"prompts": None}}, "evaluation needs prompts"),
    "a gain without gold": ({"rounds": {"min_gain": 1}, "evaluation": {"gold": None}}, "rounds.min_gain"),
    "held-out prompts that are trained on": (
        {"evaluation": {"prompts": {"source": "prompts.jsonl"}}},
        "16 held-out prompts were trained on",
    ),
    "the annotator as grader": (
        {"evaluation": {"gold": {"model": "gold_module:gold"}}},
        "also answered the queries",
    ),
    "too few labels": ({"feedback": {"min_pairs": 100}}, "feedback.min_pairs is 100"),
}


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes, however deep."""
    found = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(found.get(name), dict)
        found[name] = merged(found[name], value) if both else value
    return found


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_one_clear_line(
    settings: dict[str, Any], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, expected = BAD[name]
    preferences(tmp_path / "pairs.jsonl", gold_preferences(30))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(merged(settings, changes)))
    assert cli.run(["run", "config.yaml", "--out", "run", "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dissonance: error: ")
    assert said.err.count("\n") == 1
    assert expected in said.err
    assert (tmp_path / "run").exists() == (name == "too few labels")
    assert not (tmp_path / "run" / "round-000" / "policy").exists()


def test_a_reward_model_that_ranks_gold_worse_than_chance_trains_no_policy(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Traps 1 and 2: a cost read as a reward and swapped pairs look alike, and both are caught before a step."""
    swapped = preferences(tmp_path / "original.jsonl", gold_preferences(60, swapped=True))
    gold = preferences(tmp_path / "gold.jsonl", gold_preferences(60, word="w61"))
    config = changed(
        settings,
        preferences={"original": swapped, "gold": gold, "held_out_share": 0},
        refine={"reward": {"learning_rate": 3e-3, "epochs": 8, "batch_size": 4, "new_weight": 0.05}},
    )
    with pytest.raises(ModelError, match="held-out gold pairs rightly"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "round-000" / "policy").exists()
    assert (tmp_path / "run" / "round-000" / "pairs.parquet").is_file()  # nothing that was answered is lost


def test_other_settings_change_nothing_of_a_run(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "feedback": {"annotator": "people"}}))
    command = ["run", "config.yaml", "--out", "run", "--quiet"]
    assert cli.run(command) == 3
    before = everything(tmp_path / "run")
    capsys.readouterr()
    for change, said in {
        "policy.n=3": "was made with other settings (policy.n: 4, now 3)",
        "selection.budget=9": "select of round 0 was run with other settings (budget: 12, now 9)",
    }.items():
        assert cli.run([*command, "--set", change]) == 2
        assert said in capsys.readouterr().err
        assert everything(tmp_path / "run") == before
    # What no stage was run with yet may change: fewer answers are enough now, and the policy gets more steps.
    answer_as_gold(tmp_path / "run", 0.5)
    lower = ["--set", "feedback.enough=0.5", "--set", "feedback.min_pairs=2"]
    assert cli.run([*command, *lower, "--set", "refine.policy.steps=3"]) == 0
    metrics = json.loads((tmp_path / "run" / "round-000" / "metrics.json").read_text())
    assert metrics["policy"]["steps"] == 3
    capsys.readouterr()
    assert cli.run([*command, *lower, "--set", "refine.policy.steps=4"]) == 2
    assert "policy of round 0 was run with other settings (steps: 3, now 4)" in capsys.readouterr().err


def test_a_dry_run_reads_everything_and_writes_nothing(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = preferences(tmp_path / "original.jsonl", gold_preferences(30))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "preferences": {"original": original}}))
    before = sorted(tmp_path.iterdir())
    assert cli.run(["run", "config.yaml", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["prompts"] == 16
    assert planned["completions"] == 64
    assert planned["pairs"] == {"original": 30}
    assert planned["models"]["feedback.reward_model"]["found"] == "callable"
    assert cli.run(["run", "config.yaml", "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert sorted(path for path in tmp_path.iterdir() if path.name != "__pycache__") == before
    (tmp_path / "here").mkdir()
    for wrong, said in {
        "evaluation.prompts.source=prompts.jsonl": "16 held-out prompts were trained on",
        "preferences.gold=prompts.jsonl": "prompts.jsonl:1",
        "reward_model.model=./nowhere": "./nowhere",
        "trackers=[mlflow]": "mlflow is not installed: pip install mlflow",
        "policy.model=" + settings["reward_model"]["model"]: "is a classifier",
        "reward_model.model=" + settings["policy"]["model"]: "is a causal LM",
        "policy.model=here/nope": "there is no nope in the folder here",
        "selection={strategy: discordant, budgett: 12}": "did you mean budget?",
        "rounds": "write KEY=VALUE",
    }.items():
        assert cli.run(["run", "config.yaml", "--dry-run", "--set", wrong]) == 2
        assert said in capsys.readouterr().err


def test_a_stores_password_is_written_nowhere(settings: dict[str, Any], tmp_path: Path) -> None:
    config = changed(
        settings,
        feedback={"annotator": "people", "reward_model": None, "store": "postgresql://me:s3cret@127.0.0.1:1/x"},
    )
    with pytest.raises(StoreError) as error:
        run(config, tmp_path / "run")
    assert "s3cret" not in str(error.value)
    assert not [name for name, held in everything(tmp_path / "run").items() if b"s3cret" in held]


@pytest.mark.parametrize(
    ("text", "said"), [("- a\n", "holds no settings"), ("a: [\n", "cannot be read as YAML"), (None, "no such file")]
)
def test_a_file_that_holds_no_settings(
    tmp_path: Path, text: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    assert cli.run(["run", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
