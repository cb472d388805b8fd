"""SHF-CAS in prose: one round, one line per stage; and round after round, across the pauses in which people answer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.artifacts import (
    Run,
    create_run,
    fingerprint,
    matching_run,
    open_run,
    sweep,
    write_json,
)
from dissonance.checks import check, check_refining, plan_with, write_config
from dissonance.config import AuditConfig, RefiningConfig, RunConfig
from dissonance.errors import InputError, LabelsDue, RunError
from dissonance.measuring import (
    LOCAL,
    ROUND_TABLES,
    Measured,
    audit_inputs,
    audit_settings,
    choose,
    measured_before,
)
from dissonance.models import Engine
from dissonance.progress import ProgressFactory, quiet
from dissonance.prompts import LoadedPrompts, load_prompts
from dissonance.report import write_report
from dissonance.round_labels import (
    PAIRS,
    answer_inputs,
    answer_round,
    labels_fingerprint,
    wait_for_answers,
    write_round_pairs,
)
from dissonance.round_ledger import Stages, stage_name
from dissonance.round_training import (
    POLICY,
    REWARD_MODEL,
    GivenPairs,
    answered_pairs,
    check_evaluation,
    evaluate_round,
    evaluation_inputs,
    models_of_round,
    pairs_of_round,
    policy_training_inputs,
    read_pairs,
    refine_policy_of_round,
    refine_reward_of_round,
    reward_training_inputs,
)
from dissonance.sections import parse_section, without_servers

_TIMES = ("seconds", "tokens_per_second")


def run(
    config: RunConfig,
    out: Path | str,
    *,
    audit: Path | str | None = None,
    wait: bool = False,
    report: bool = True,
    say: Callable[[str], None] = lambda _: None,
    progress: ProgressFactory = quiet,
    engine: Engine = LOCAL,
) -> dict[str, Any]:
    """Audit, ask, retrain and evaluate, round after round.

    Killed or stopped anywhere, it goes on where it was. With people as annotators it stops where their answers are due.
    Settings may change between two calls as long as no stage was finished with others.

    Args:
        config: the settings.
        out: the run folder.
        audit: a finished run of `audit`, or another run, of the same prompts, models and seed: what it measured is
            taken over, and not sampled and scored again.
        wait: whether to stay, and go on when people have answered.
        report: whether to write `report.html`, which takes seconds.
        say: told what is due, when the waiting begins.
        progress: opens the progress of each stage.
        engine: where each round's answers are sampled, scored and measured.

    Returns:
        What `summary.json` holds: `rounds`, and why there are no more.

    Raises:
        LabelsDue: people have not answered enough yet, and `wait` is not set.
        InputError: a setting, a file or a model is wrong; what was there before is as it was.
    """
    while True:
        try:
            given = None if audit is None else Path(audit)
            return _go_on(config, Path(out), given, progress, engine, report=report)
        except LabelsDue as due:
            if not wait:
                raise
            say(str(due))
            wait_for_answers(Path(out), due, config.feedback, progress)


def _go_on(
    config: RunConfig, out: Path, audit: Path | None, progress: ProgressFactory, engine: Engine, *, report: bool
) -> dict[str, Any]:
    check(config)
    everything = _prompts(config, None)
    settings, inputs = audit_settings(config.audit, engine), audit_inputs(config.audit, everything)
    measured = None if audit is None else measured_before(audit, config.audit, settings, inputs)
    before = matching_run(out, "run", settings, inputs)
    whole = fingerprint(config.model_dump(mode="json"))
    done = None if before is None else before.finished("run")
    if done is not None and done["config"] == whole and all((out / name).is_file() for name in _LEFT):
        return dict(done["summary"])
    given = read_pairs(config.preferences)
    if before is None:
        plan_with(config, given)
    with create_run(out, "run", settings, inputs) as opened, _unless_empty(opened):
        if opened.fresh:
            write_config(out / "config.yaml", config)
        rounds: list[dict[str, Any]] = []
        ended, before_it = None, fingerprint([settings, inputs])
        for number in range(config.rounds.most):
            stages = Stages(opened, number, before_it)
            rounds.append(play_round(config, given, stages, progress, engine, None if number else measured))
            before_it = stages.left
            if ended := why_end(config, rounds[-1]):
                break
        summary = {"rounds": [row(found) for found in rounds], "ended": ended or "all rounds are played"}
        write_config(out / "config.yaml", config)  # as it was in the end
        write_json(out / "summary.json", summary)
        if report:
            write_report(out)
        opened.finish("run", config=whole, summary=summary)
        return summary


_LEFT = ("summary.json", "config.yaml")


@contextmanager
def _unless_empty(run: Run) -> Iterator[None]:
    """Leave no folder behind when the very first stage is refused: the mended settings could not go on with it."""
    try:
        yield
    except InputError:
        if run.fresh and not run.ledger["stages"] and not any(run.path.glob("round-*/parts/*")):
            run.discard()
        raise


def play_round(
    config: RunConfig,
    given: GivenPairs,
    stages: Stages,
    progress: ProgressFactory,
    engine: Engine = LOCAL,
    measured: Measured | None = None,
) -> dict[str, Any]:
    """One round of SHF-CAS, as in the paper's Algorithm 1; gives what `metrics.json` of the round holds.

    `measured` is what another run measured of the same, where one did.
    """
    run, number = stages.run, stages.number
    stages.folder.mkdir(exist_ok=True)
    policy, reward = models_of_round(run, number, config)
    seed = partial(seed_of, config.seed, number)
    now = config.model_copy(update={"policy": policy, "reward_model": reward, "seed": seed()})
    found: dict[str, Any] = {"round": number}

    def measure() -> dict[str, Any]:
        if measured is None:
            return _timeless(
                engine.prepare(now.audit, _prompts(config, number).prompts).measure(stages.folder, progress)
            )
        found = _timeless(measured.copy(stages.folder))
        other = measured.run
        run.finish("taken-over", run=str(other.path), run_id=other.run_id, versions=other.ledger["versions"])
        return found

    found["conflict"] = stages.done("measure", {}, measure, ROUND_TABLES)
    engine.forget(stages.folder)
    if _settled(config, found):
        write_json(stages.folder / "metrics.json", found)
        return found
    if (asked := config.selection) is not None:
        found["selection"] = stages.done(
            "select",
            asked.model_dump(mode="json"),
            lambda: choose(run, number, asked, asked.strategy, seed("select")),
            ["queries.parquet"],
        )
        found["feedback"] = stages.done(
            "feedback",
            answer_inputs(config.feedback),
            lambda: answer_round(run, number, config.feedback, config.seed, progress),
        )
        found["pairs"] = stages.done(
            "pairs",
            {"method": config.feedback.method},
            lambda: write_round_pairs(run, number, config.feedback),
            [PAIRS],
        )
    found |= train_round(config, given, stages, progress)
    write_json(stages.folder / "metrics.json", found)
    return found


def train_round(config: RefiningConfig, given: GivenPairs, stages: Stages, progress: ProgressFactory) -> dict[str, Any]:
    """The second half of a round: what was answered -> reward model -> policy -> what became better."""
    run, number = stages.run, stages.number
    pairs = pairs_of_round(given, answered_pairs(run, number), config.preferences)
    seed = partial(seed_of, config.seed, number)
    found: dict[str, Any] = {}
    if (stages.folder / PAIRS).is_file():
        found["reward_model"] = stages.done(
            "reward-model",
            reward_training_inputs(config),
            lambda: refine_reward_of_round(run, number, config, pairs, seed("reward"), progress),
            [REWARD_MODEL],
        )
    if config.refine.policy is not None:
        prompts = _prompts(config, number).prompts
        found["policy"] = stages.done(
            "policy",
            policy_training_inputs(config),
            lambda: refine_policy_of_round(run, number, config, prompts, pairs, seed("policy"), progress),
            [POLICY],
        )
    if config.evaluation is not None:
        everything = _prompts(config, None).prompts
        found["evaluation"] = stages.done(
            "evaluate",
            evaluation_inputs(config),
            lambda: evaluate_round(run, number, config, everything, pairs, seed("evaluate"), progress),
            ["evaluation_answers.parquet"],
            redo=True,
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
        sections: of `RefiningConfig`: preferences, feedback, refine, trackers; all have defaults.
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
        sections: of `RefiningConfig`: evaluation.
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
        if ledger["command"] == "run":
            raise RunError(f"{run} is a run of `run`, which does this by itself: give it to `run` again, or audit anew")
        if ledger["command"] != "audit" or opened.finished("audit") is None:
            raise RunError(f"{run} is no finished run of `audit`: `{command}` has no policy to go on with")
        sweep(run)
        number = opened.find_round(round_number)
        refined = opened.finished(stage_name("refine", number))
        if command == "evaluate" and refined is None:
            raise RunError(f"{run} was not refined yet: run `dissonance refine {run}` first")
        settings = {name: value for name, value in ledger["settings"].items() if name != "resolved"}
        settings = without_servers(settings)  # what is trained is here anyway
        earlier = refined["sections"] if refined is not None and command == "evaluate" else {}
        config = parse_section(RefiningConfig, {**settings, **earlier, **sections})
        check_refining(config)
        everything = _prompts(config, None)
        matching_run(run, "audit", ledger["settings"], audit_inputs(config, _prompts(config, number)))
        given = read_pairs(config.preferences)
        check_evaluation(config, everything.prompts, pairs_of_round(given, (), config.preferences))
        stages = Stages(opened, number, [ledger["settings"], ledger["inputs"]])
        found: dict[str, Any] = {"round": number, "conflict": ledger["stages"]["audit"]["summary"]}
        if (selected := opened.finished(stage_name("select", number))) is not None:
            found["selection"] = selected["summary"]
        found["pairs"] = stages.done(
            "pairs",
            {"method": config.feedback.method, "labels": labels_fingerprint(run, number, config.feedback)},
            lambda: write_round_pairs(opened, number, config.feedback),
            [PAIRS],
            redo=True,
        )
        found |= train_round(config, given, stages, progress)
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
    """Whether too few prompts are in conflict to go on."""
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


def seed_of(seed: int, number: int, stage: str = "") -> int:
    """The run's seed for sampling in round 0; for any other stage or round another one, which it decides."""
    if not number and not stage:
        return seed
    return int(np.random.SeedSequence([seed, number, *stage.encode()]).generate_state(1)[0])


def _timeless(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what another run of the same settings would not find."""
    return {name: value for name, value in found.items() if name not in _TIMES}


def _prompts(config: AuditConfig, number: int | None) -> LoadedPrompts:
    """The prompts of a round: with `sample`, each round draws its own; None for all that any may draw."""
    if number is None:
        return load_prompts(**{**config.prompts.model_dump(), "sample": None})
    return load_prompts(**config.prompts.model_dump(), seed=seed_of(config.seed, number))
