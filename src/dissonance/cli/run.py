"""The commands that retrain: run, refine, evaluate, demo."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dissonance.cli.common import Json, Out, Quiet, RunFolder, Set, StoreUrl, changed, progress_of, read_yaml, said, say
from dissonance.cli.engines import EngineName, RayAddress, Storage, WorkerCpus, WorkerGpus, Workers, engine_of
from dissonance.config import RunConfig
from dissonance.errors import LabelsDue, SettingsError
from dissonance.sections import parse_section

app = typer.Typer()

RoundNumber = Annotated[int | None, typer.Option("--round", min=0, help="Which round; by default the latest.")]
Sections = Annotated[Path | None, typer.Option("--config", help="Settings, YAML.")]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Settings, YAML.")],
    out: Annotated[Path | None, typer.Option("--out", help="The run folder; by default CONFIG without .yaml.")] = None,
    changes: Set = None,
    audit: Annotated[
        Path | None,
        typer.Option("--audit", metavar="RUN", help="Take over what this run of `audit` or `run` measured."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until people have answered.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done.")] = False,
    store: StoreUrl = None,
    engine: EngineName = "local",
    ray_address: RayAddress = None,
    workers: Workers = None,
    worker_cpus: WorkerCpus = None,
    worker_gpus: WorkerGpus = None,
    storage: Storage = None,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Audit, ask, retrain and evaluate, round after round. Goes on where it was; exit 3 says that labels are due.

    Example: dissonance run config.yaml --out run
    """
    given = changed(read_yaml(config), changes or ())
    if store is not None:
        given["feedback"] = {**(given.get("feedback") or {}), "store": store}
    settings = parse_section(RunConfig, given)
    out = out or config.with_suffix("")
    where = engine_of(engine, address=ray_address, workers=workers, cpus=worker_cpus, gpus=worker_gpus, storage=storage)
    if dry_run:
        from dissonance.checks import plan

        planned = plan(settings, audit, where)
        say(planned, as_json, _plan_lines(planned))
        return
    from dissonance.loop import run as run_rounds

    try:
        found = run_rounds(
            settings, out, audit=audit, wait=wait, say=_on_stderr, progress=progress_of(silent), engine=where
        )
    except LabelsDue as due:
        if not as_json:
            raise
        say({"round": due.round_number, "answered": due.answered, "wanted": due.wanted}, as_json, [])
        raise typer.Exit(due.exit_code) from due
    lines = [line for number, one in enumerate(found["rounds"]) for line in _round_lines(number, one)]
    say(found, as_json, [*lines, f"ended: {found['ended']}", f"report: {out / 'report.html'}"])


@app.command()
def refine(
    run: RunFolder,
    config: Sections = None,
    changes: Set = None,
    round_number: RoundNumber = None,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Retrain the reward model on what was answered, then the policy against it.

    CONFIG has the sections preferences, feedback, refine and trackers of `run`; all have defaults.

    Example: dissonance refine run --set refine.reward.epochs=2
    """
    from dissonance.loop import refine as refine_run

    sections = changed({} if config is None else read_yaml(config), changes or ())
    _only(sections, {"preferences", "feedback", "refine", "trackers"}, "refine")
    found = refine_run(run, sections, round_number=round_number, progress=progress_of(silent))
    folder = run / f"round-{found['round']:03d}"
    lines = [*_training_lines(found), f"reward model: {folder / 'reward_model'}"]
    say(found, as_json, [*lines, *([f"policy: {folder / 'policy'}"] if "policy" in found else [])])


@app.command()
def evaluate(
    run: RunFolder,
    config: Sections = None,
    changes: Set = None,
    round_number: RoundNumber = None,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Compare what `refine` left with what it began with, on held-out prompts, with intervals.

    CONFIG has the section evaluation of `run`, which needs at least prompts.

    Example: dissonance evaluate run --set evaluation.prompts.source=held_out.jsonl
    """
    from dissonance.loop import evaluate as evaluate_run
    from dissonance.loop import row

    sections = changed({} if config is None else read_yaml(config), changes or ())
    _only(sections, {"evaluation"}, "evaluate")
    if "evaluation" not in sections:
        raise SettingsError("evaluate needs held-out prompts: --set evaluation.prompts.source=FILE")
    found = evaluate_run(run, sections, round_number=round_number, progress=progress_of(silent))
    say(found, as_json, [*_round_lines(found["round"], row(found)), f"report: {run / 'report.html'}"])


@app.command()
def demo(
    out: Out = Path("demo"),
    seeds: Annotated[int, typer.Option(help="How often each policy is trained; intervals are over them.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the worlds, and the first of the trainings.")] = 0,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Play SHF-CAS on the built-in world: tiny models, trained from scratch here, on two tasks.

    Example: dissonance demo --out demo
    """
    from dissonance.demo import demo as run_demo

    summary = run_demo(out, seeds=seeds, seed=seed, progress=progress_of(silent))
    lines = []
    for task, arms in summary["tasks"].items():
        lines += [f"{task:14}{'gold reward':26}{'reward accuracy':26}judgements"]
        for name, arm in arms.items():
            gold, accuracy = (said(arm[key]) for key in ("gold_reward", "reward_accuracy"))
            lines.append(f"  {name:12}{gold:26}{accuracy:26}{arm['judgements']:.0f}")
    say(summary, as_json, [*lines, f"report: {out / 'report.html'}"])


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _only(sections: Mapping[str, Any], allowed: set[str], command: str) -> None:
    if other := sorted(set(sections) - allowed):
        raise SettingsError(f"{other[0]} is no section of `{command}`: it takes {', '.join(sorted(allowed))}")


def _plan_lines(planned: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{planned['prompts']:,} prompts, {planned['completions']:,} completions a round, rounds: {planned['rounds']}",
        f"held-out prompts: {planned['held_out_prompts']:,}",
        f"judgements a round: {planned['judgements']:,}, by {planned['annotator'] or 'nobody'}",
        *(f"preferences, {name}: {count:,} pairs" for name, count in planned["pairs"].items()),
    ]
    if (policy := planned["policy"]) is not None:
        lines.append(f"policy training: {policy['method']}, {policy['steps']:,} steps")
    notes = {"hub": "a hub id, not looked up", "folder": "a folder", "file": "a file", "callable": "a callable"}
    lines += [f"{name}: {of['model']} ({notes[of['found']]})" for name, of in planned["models"].items()]
    return [*lines, "nothing was written"]


def _training_lines(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if (reward := found.get("reward_model")) is not None:
        pairs = reward["pairs"]
        lines.append(
            f"reward model: {pairs['original']:,} original and {pairs['new']:,} new pairs, {reward['steps']:,} steps"
        )
        for name in ("held_out_original", "held_out_new"):
            measured = reward[name]
            if measured["after"] is not None:
                before = "" if measured["before"] is None else f"{said(measured['before']['accuracy'])} -> "
                lines.append(f"  accuracy, {name.replace('_', ' ')}: {before}{said(measured['after']['accuracy'])}")
    if (policy := found.get("policy")) is not None:
        start, end = policy["start"], policy["end"]
        lines.append(
            f"policy: {policy['method']}, {policy['kept_step']:,} steps; reward {start['reward']:.3f} -> "
            f"{end['reward']:.3f}, KL {end['kl']:.2f} nats, length {start['length']:.1f} -> {end['length']:.1f}"
        )
        if (stopped := policy["stopped"]) is not None:
            lines.append(f"  stopped at step {stopped['step']:,}: {stopped['reason']}")
    return lines


def _round_lines(number: int, one: Mapping[str, Any]) -> list[str]:
    lines = [
        f"round {number}: {one['judgements']:,} judgements, Kendall-tau distance {_number(one['kendall_tau_distance'])}"
    ]
    if one["gold_reward"] is not None:
        lines.append(f"  gold reward: {said(one['gold_reward_start'])} -> {said(one['gold_reward'])}")
        lines.append(f"  wins against the start policy: {said(one['win_rate'])}")
    if one["reward_accuracy"] is not None:
        lines.append(
            f"  reward model's accuracy: {said(one['reward_accuracy_start'])} -> {said(one['reward_accuracy'])}"
        )
    if one["kl"] is not None:
        lines.append(f"  KL from the start policy: {said(one['kl'])} nats")
    return lines


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
