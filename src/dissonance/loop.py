"""SHF-CAS in prose: one round, one line per stage; and round after round, across the pauses in which people answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.artifacts import (
    Parts,
    Run,
    Stages,
    create_run,
    fingerprint,
    matching_run,
    open_run,
    source_fingerprint,
    stage_name,
    write_json,
)
from dissonance.checks import check
from dissonance.config import AuditConfig, RunConfig, parse_section
from dissonance.errors import LabelsDue, RunError
from dissonance.measuring import audit_inputs, audit_settings, choose, measure_round, prepare, reward_source
from dissonance.progress import ProgressFactory, quiet
from dissonance.prompts import LoadedPrompts, load_prompts
from dissonance.report import write_report
from dissonance.round_labels import PAIRS, answer_round, wait_for_answers, write_round_pairs
from dissonance.round_training import (
    POLICY,
    REWARD_MODEL,
    check_evaluation,
    evaluate_round,
    models_of_round,
    pairs_of_round,
    refine_policy_of_round,
    refine_reward_of_round,
)

_TIMES = ("seconds", "tokens_per_second")


def run(
    config: RunConfig,
    out: Path | str,
    *,
    wait: bool = False,
    report: bool = True,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Audit, ask, retrain and evaluate, round after round.

    Killed or stopped anywhere, it goes on where it was. With people as annotators it stops where their answers are due.

    Args:
        config: the settings.
        out: the run folder.
        wait: whether to stay, and go on when people have answered.
        report: whether to write `report.html`, which takes seconds.
        progress: opens the progress of each stage.

    Returns:
        What `summary.json` holds: `rounds`, and why there are no more.

    Raises:
        LabelsDue: people have not answered enough yet, and `wait` is not set.
        InputError: a setting, a file or a model is wrong; what was there before is as it was.
    """
    while True:
        try:
            return _go_on(config, Path(out), progress, report=report)
        except LabelsDue as due:
            if not wait:
                raise
            wait_for_answers(Path(out), due, config.feedback, progress)


def _go_on(config: RunConfig, out: Path, progress: ProgressFactory, *, report: bool) -> dict[str, Any]:
    check(config)
    loaded = _prompts(config, 0)
    settings, inputs = audit_settings(config), _inputs(config, loaded)
    before = matching_run(out, "run", settings, inputs)
    if before is not None and (done := before.finished("run")) is not None:
        return dict(done["summary"])
    if before is None:
        check_evaluation(config, loaded.prompts, pairs_of_round(Run(out), -1, config.preferences))
    with create_run(out, "run", settings, inputs) as opened:
        write_json(out / "config.yaml", config.model_dump(mode="json"))  # JSON is YAML
        rounds: list[dict[str, Any]] = []
        ended = None
        for number in range(config.rounds.most):
            found = play_round(opened, number, config, fingerprint([settings, inputs]), progress)
            rounds.append(found)
            if ended := why_end(config, found):
                break
        summary = {"rounds": [row(found) for found in rounds], "ended": ended or "all rounds are played"}
        write_json(out / "summary.json", summary)
        if report:
            write_report(out)
        opened.finish("run", summary=summary)
        return summary


def play_round(run: Run, number: int, config: RunConfig, before: object, progress: ProgressFactory) -> dict[str, Any]:
    """One round of SHF-CAS, as in the paper's Algorithm 1; gives what `metrics.json` of the round holds."""
    stages, seed = Stages(run, number, before), seed_of_round(config.seed, number)
    stages.folder.mkdir(exist_ok=True)
    prompts = _prompts(config, number).prompts
    policy, reward = models_of_round(run, number, config)
    now = config.model_copy(update={"policy": policy, "reward_model": reward, "seed": seed})
    found: dict[str, Any] = {"round": number}

    found["conflict"] = stages.done(
        "measure",
        None,
        lambda: _timeless(measure_round(stages.folder, now, prepare(now, prompts), progress)),
        ["completions.parquet", "prompts.parquet"],
    )
    Parts(stages.folder / "parts").remove()
    if config.selection is not None and not _settled(config, found):
        section = config.selection
        found["selection"] = stages.done(
            "select", None, lambda: choose(run, number, section, section.strategy, seed), ["queries.parquet"]
        )
        found["feedback"] = stages.done("feedback", None, lambda: answer_round(run, number, config.feedback, progress))
        found["pairs"] = stages.done("pairs", None, lambda: write_round_pairs(run, number, config.feedback), [PAIRS])
    found |= train_round(run, number, config, stages, seed, progress)
    write_json(stages.folder / "metrics.json", found)
    return found


def train_round(
    run: Run, number: int, config: RunConfig, stages: Stages, seed: int, progress: ProgressFactory
) -> dict[str, Any]:
    """The second half of a round: what was answered -> reward model -> policy -> what became better."""
    prompts = _prompts(config, number).prompts
    pairs = pairs_of_round(run, number, config.preferences)
    found: dict[str, Any] = {}
    if (stages.folder / PAIRS).is_file():
        found["reward_model"] = stages.done(
            "reward-model",
            [config.refine.reward.model_dump(mode="json"), _held(config)],
            lambda: refine_reward_of_round(run, number, config, pairs, seed, progress),
            [REWARD_MODEL],
        )
    if config.refine.policy is not None:
        found["policy"] = stages.done(
            "policy",
            config.refine.policy.model_dump(mode="json"),
            lambda: refine_policy_of_round(run, number, config, prompts, pairs, seed, progress),
            [POLICY],
        )
    if config.evaluation is not None:
        found["evaluation"] = stages.done(
            "evaluate",
            config.evaluation.model_dump(mode="json"),
            lambda: evaluate_round(run, number, config, prompts, pairs, seed, progress),
            ["evaluation_answers.parquet"],
        )
    return found


def refine(
    run: Path | str,
    sections: Mapping[str, Any] | None = None,
    *,
    round_number: int | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Retrain the reward model and the policy of a run of `audit` on what was answered.

    Leaves `pairs.parquet`, `reward_model/` and `policy/` in the round's folder.

    Args:
        run: the run folder.
        sections: of `RunConfig`: preferences, feedback, refine, trackers; all have defaults.
        round_number: by default the latest.
        progress: opens the progress of each stage.

    Returns:
        pairs, reward_model and policy, as in `metrics.json`.

    Raises:
        InputError: this is no such run, too little was answered, a setting is wrong, or it was refined with others.
    """
    return _second_half(Path(run), "refine", dict(sections or {}), round_number, progress)


def evaluate(
    run: Path | str,
    sections: Mapping[str, Any],
    *,
    round_number: int | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Compare what `refine` left with what it began with, on held-out prompts.

    Args:
        run: the run folder.
        sections: of `RunConfig`: evaluation.
        round_number: by default the latest.
        progress: opens the progress of each stage.

    Returns:
        evaluation, as in `metrics.json`, beside what `refine` returned.

    Raises:
        InputError: the run was not refined, a setting is wrong, or it was evaluated with others.
    """
    return _second_half(Path(run), "evaluate", dict(sections), round_number, progress)


def _second_half(
    run: Path, command: str, sections: dict[str, Any], round_number: int | None, progress: ProgressFactory
) -> dict[str, Any]:
    with open_run(run) as opened:
        ledger = opened.ledger
        if ledger["command"] != "audit" or opened.finished("audit") is None:
            raise RunError(f"{run} is no finished run of `audit`: `{command}` has no policy to go on with")
        number = opened.find_round(round_number)
        refined = opened.finished(stage_name("refine", number))
        if command == "evaluate" and refined is None:
            raise RunError(f"{run} was not refined yet: run `dissonance refine {run}` first")
        settings = {name: value for name, value in ledger["settings"].items() if name != "resolved"}
        earlier = refined["sections"] if refined is not None and command == "evaluate" else {}
        config = parse_section(RunConfig, {**settings, **earlier, **sections, "selection": {"budget": 1}})
        check(config)
        prompts = _prompts(config, number).prompts
        check_evaluation(config, prompts, pairs_of_round(opened, number, config.preferences))
        stages = Stages(opened, number, [ledger["settings"], ledger["inputs"]])
        found: dict[str, Any] = {"round": number, "conflict": ledger["stages"]["audit"]["summary"]}
        found["pairs"] = stages.done("pairs", None, lambda: write_round_pairs(opened, number, config.feedback), [PAIRS])
        seed = seed_of_round(config.seed, number)
        found |= train_round(opened, number, config, stages, seed, progress)
        opened.finish(stage_name(command, number), sections=sections)
        write_json(stages.folder / "metrics.json", found)
        write_report(run)
        return found


def why_end(config: RunConfig, found: Mapping[str, Any]) -> str | None:
    """Why a round is the last one, if it is; `RoundsConfig` has the bounds."""
    if config.selection is not None and "selection" not in found:
        share = found["conflict"]["kendall_tau_distance"]["share_significant"]
        return f"{share or 0:.1%} of the prompts are in significant conflict, no more than rounds.min_conflict"
    bound = config.rounds.min_gain
    gain = None if bound is None else gain_per_judgement(found)
    if bound is not None and gain is not None and gain < bound:
        return f"a judgement raised the gold reward by {gain:.2g}, less than rounds.min_gain"
    return None


def gain_per_judgement(found: Mapping[str, Any]) -> float | None:
    """By how much a round raised the mean gold reward of held-out prompts, per judgement that it asked for."""
    gold, spent = (found.get("evaluation") or {}).get("gold_reward"), found.get("selection", {}).get("judgements")
    return None if not gold or not spent or gold["change"] is None else float(gold["change"]["mean"]) / float(spent)


def _settled(config: RunConfig, found: Mapping[str, Any]) -> bool:
    """Whether too few prompts are in conflict to ask any more."""
    bound = config.rounds.min_conflict
    return bound is not None and (found["conflict"]["kendall_tau_distance"]["share_significant"] or 0.0) <= bound


def row(found: Mapping[str, Any]) -> dict[str, Any]:
    """A round in the keys that `run --json` promises; null where nothing says."""
    evaluation = found.get("evaluation") or {}
    gold, accuracy = evaluation.get("gold_reward"), evaluation.get("reward_accuracy")
    start = accuracy and accuracy["start"]
    return {
        "judgements": found.get("selection", {}).get("judgements", 0),
        "gold_reward": gold and gold["new"],
        "gold_reward_start": gold and gold["start"],
        "win_rate": gold and gold["win_rate"],
        "reward_accuracy": start and (start["refined"] or start["proxy"]),
        "reward_accuracy_start": start and start["proxy"],
        "kendall_tau_distance": found["conflict"]["kendall_tau_distance"]["mean"],
        "kl": evaluation["kl"]["k1"] if evaluation else None,
    }


def seed_of_round(seed: int, number: int) -> int:
    """The run's seed in round 0; others afterwards, which it decides."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) if number else seed


def _timeless(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what another run of the same settings would not find."""
    return {name: value for name, value in found.items() if name not in _TIMES}


def _prompts(config: AuditConfig, number: int) -> LoadedPrompts:
    """The prompts of a round: with `sample`, each round draws its own."""
    return load_prompts(**config.prompts.model_dump(), seed=seed_of_round(config.seed, number))


def _held(config: RunConfig) -> dict[str, Any]:
    """What decides which pairs there are, besides the labels: files by their content."""
    given = config.preferences.model_dump(mode="json")
    return {name: source_fingerprint(value) if isinstance(value, str) else value for name, value in given.items()}


def _inputs(config: RunConfig, loaded: LoadedPrompts) -> dict[str, str]:
    held = {f"preferences.{name}": value for name, value in _held(config).items() if isinstance(value, str)}
    models = {"feedback.reward_model": config.feedback.reward_model}
    if config.evaluation is not None:
        models["evaluation.gold"] = config.evaluation.gold
        if config.evaluation.prompts is not None:
            held["evaluation.prompts"] = source_fingerprint(config.evaluation.prompts.source)
    prints = {name: source_fingerprint(reward_source(of.model)) for name, of in models.items() if of is not None}
    return {**audit_inputs(config, loaded), **held, **prints}
