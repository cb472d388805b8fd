"""The method in prose: what each command does, one line per stage."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dissonance.artifacts import (
    Parts,
    Run,
    create_run,
    matching_run,
    open_run,
    read_table,
    source_fingerprint,
    write_json,
    write_table,
)
from dissonance.config import RewardConfig, RewardKind, RunConfig
from dissonance.errors import DataError, InputError, SettingsError
from dissonance.progress import ProgressFactory, quiet
from dissonance.prompts import LoadedPrompts, load_prompts, prompts_fingerprint
from dissonance.records import Prompt
from dissonance.report import write_report
from dissonance.sandbox import Task, World, build_sandbox
from dissonance.scored import ScoredLikelihood, measure_scored
from dissonance.selection import Strategy, parse_threshold, pool_from_tables, queries_table
from dissonance.selection import select as select_queries
from dissonance.stages import (
    conflict_keys,
    measure_conflicts,
    plan_batches,
    round_length_correlation,
    sample_completions,
    score_completions,
    score_reference,
)


def audit(config: RunConfig, out: Path | str, progress: ProgressFactory = quiet) -> dict[str, Any]:
    """Sample a policy, score its completions, and find where the reward model and the policy disagree.

    Leaves `completions.parquet` and `prompts.parquet` in OUT/round-000, `summary.json` and `report.html` in OUT. Run
    again after an interruption, it goes on where it was; after it is done, it returns what it found.

    Args:
        config: the settings.
        out: the run folder.
        progress: opens the progress of each stage.

    Returns:
        What `summary.json` holds.

    Raises:
        InputError: a setting, the prompts or a model is wrong; nothing was written.
    """
    # PyTorch and Transformers are loaded here, so that measuring and selecting need not wait for them.
    from dissonance.huggingface import free_memory
    from dissonance.rewards import load_reward_model
    from dissonance.sampling import HFPolicy, HFReference

    out = Path(out)
    loaded = load_prompts(**config.prompts.model_dump(), seed=config.seed)
    settings, inputs = _settings(config), _inputs(config, loaded)
    if (done := _finished(out, "audit", settings, inputs)) is not None:
        return done

    _check_reward_model(config.reward_model, loaded.prompts[0])
    policy = HFPolicy(config.policy, config.seed)
    batches = plan_batches(policy, loaded.prompts)
    reference = None if config.policy.reference is None else HFReference(config.policy, config.policy.reference)

    with create_run(out, "audit", settings, inputs) as run:
        n = config.policy.n
        sample_completions(run, policy, batches, n, progress)
        del policy
        free_memory()
        if reference is not None:
            score_reference(run, reference, batches, n, progress)
            del reference
            free_memory()
        score_completions(run, load_reward_model(config.reward_model), batches, n, progress)
        found = measure_conflicts(run, loaded.prompts, batches, n, config.likelihood)
        return _conclude(run, "audit", {**found, "duplicates": loaded.n_duplicates})


def _finished(out: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """What the command found before, if all that it leaves is still there."""
    run = matching_run(out, command, settings, inputs)
    done = None if run is None else run.finished(command)
    left = ("summary.json", "report.html", "round-000/prompts.parquet", "round-000/completions.parquet")
    if done is None or not all((out / name).is_file() for name in left):
        return None
    return dict(done["summary"])


def _check_reward_model(config: RewardConfig, prompt: Prompt) -> None:
    """Score one text: a model that cannot is found out before the sampling, and leaves its memory to the policy."""
    from dissonance.huggingface import free_memory
    from dissonance.rewards import load_reward_model

    load_reward_model(config).score([prompt.messages], [prompt.messages[-1].content])
    free_memory()


def _settings(config: RunConfig) -> dict[str, Any]:
    from dissonance.huggingface import resolved

    reward = {} if ":" in config.reward_model.model else {"reward_model": resolved(config.reward_model)}
    return {**config.model_dump(), "resolved": {"policy": resolved(config.policy), **reward}}


def _inputs(config: RunConfig, loaded: LoadedPrompts) -> dict[str, str]:
    from dissonance.huggingface import base_and_adapter

    models = {
        "policy.model": config.policy.model,
        "policy.adapter": config.policy.adapter,
        "policy.reference": config.policy.reference,
        "reward_model.model": _reward_source(config.reward_model.model),
        "reward_model.adapter": config.reward_model.adapter,
    }
    for name, section in {"policy": config.policy, "reward_model": config.reward_model}.items():
        base, _ = base_and_adapter(section, name)
        models[f"{name}.base"] = None if base == section.model else base
    prints = {name: source_fingerprint(source) for name, source in models.items() if source is not None}
    return {"prompts": prompts_fingerprint(loaded.prompts), **prints}


def _reward_source(name: str) -> str:
    from dissonance.rewards import function_source

    return str(function_source(name) or name) if ":" in name else name


def conflicts(
    scored: Path | str,
    out: Path | str,
    *,
    reward_kind: RewardKind = "reward",
    likelihood: ScoredLikelihood = "sum",
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Measure conflict in scores that the user brings.

    Args:
        scored: rows of prompt_id, completion_id, logprob, reward, as `dissonance.scored` reads them.
        out: the run folder; its round-000 gets the two tables, and `select` and `report` work on it.
        reward_kind: `cost` negates the rewards.
        likelihood: `mean` divides by n_tokens.
        progress: opens the progress of the stage.

    Returns:
        What `summary.json` holds.

    Raises:
        InputError: the scores cannot be used; nothing was written.
    """
    scored, out = Path(scored), Path(out)
    settings = {"scored": str(scored), "reward_kind": reward_kind, "likelihood": likelihood}
    if not scored.exists():
        raise DataError(f"{scored}: no such file or folder")
    inputs = {"scored": source_fingerprint(str(scored))}
    if (done := _finished(out, "conflicts", settings, inputs)) is not None:
        return done
    start = time.perf_counter()
    with create_run(out, "conflicts", settings, inputs) as run:
        try:
            with progress("measuring", None, "completions") as advance:
                found = measure_scored(
                    scored,
                    run.round() / "prompts.parquet",
                    run.round() / "completions.parquet",
                    reward_kind=reward_kind,
                    likelihood=likelihood,
                    on_progress=advance,
                )
        except InputError:
            if run.fresh:
                shutil.rmtree(out)
            raise
        rho = round_length_correlation(run.round())
        keys = {**conflict_keys(found), "length_correlation": rho, "seconds": time.perf_counter() - start}
        return _conclude(run, "conflicts", keys)


def select(
    run: Path | str,
    *,
    budget: int,
    strategy: str | Strategy = "shf_cas",
    tau: float | str | None = None,
    delta: float | str | None = None,
    seed: int = 0,
    round_number: int | None = None,
) -> dict[str, Any]:
    """Choose what to ask people about; writes `queries.parquet` beside the tables of the round.

    Args:
        run: a finished run folder of `audit` or `conflicts`.
        budget: judgements to spend: 1 for a comparison or a rating, N-1 for a ranking of N.
        strategy: a name in `dissonance.selection.STRATEGIES`, or a callable like them.
        tau: least K of a prompt, 0.6, or a quantile, "q0.9".
        delta: least |PACS| of a completion, likewise.
        seed: of the strategies that draw.
        round_number: which round to choose from; by default the latest.

    Returns:
        The keys of `select --json`.

    Raises:
        InputError: the run or the round is not there or not finished, or an option is wrong; nothing was written.
    """
    if seed < 0:
        raise SettingsError(f"--seed is {seed}: give 0 or more")
    with open_run(Path(run)) as opened:
        number = opened.find_round(round_number)
        folder = opened.round(number)
        pool = pool_from_tables(
            read_table(folder / "prompts.parquet"),
            read_table(folder / "completions.parquet"),
            opened.ledger["settings"]["likelihood"],
        )
        chosen = select_queries(
            pool,
            strategy,
            budget=budget,
            rng=np.random.default_rng(seed),
            tau=None if tau is None else parse_threshold(str(tau), "tau"),
            delta=None if delta is None else parse_threshold(str(delta), "delta"),
        )
        found = {
            "round": number,
            "strategy": chosen.strategy,
            "judgements": chosen.judgements,
            "prompts": chosen.prompts,
            "queries": len(chosen.queries),
            # No quantile of nothing: where every prompt is degenerate, JSON has no word for an infinite bound.
            "thresholds": {k: v if v is None or isfinite(v) else None for k, v in asdict(chosen.thresholds).items()},
            "explanation": list(chosen.explanation),
        }
        write_table(folder / "queries.parquet", queries_table(chosen, number))
        stage = f"select-{number:03d}" if number else "select"
        opened.finish(stage, budget=budget, tau=tau, delta=delta, seed=seed, summary=found)
    return found


def demo(out: Path | str, *, seed: int = 0, progress: ProgressFactory = quiet) -> dict[str, Any]:
    """Audit the built-in world's two tasks, with models trained from scratch in seconds and kept in the user's cache.

    Args:
        out: gets a run folder for each task, and `summary.json`.
        seed: of the world and of the sampling.
        progress: opens the progress of each stage.

    Returns:
        {"tasks": {task: {"audit": the keys of `audit --json`}}}.
    """
    from dissonance.huggingface import quiet_transformers

    out, tasks = Path(out), {}
    for task in get_args(Task):
        with progress(f"{task}: training the policy and its reward model", 2, "models") as advance:
            with quiet_transformers():
                sandbox = build_sandbox(World(task=task, seed=seed))
            advance(2)
        config = RunConfig.model_validate(
            {
                "prompts": {"source": str(sandbox.prompts), "limit": 160},
                "policy": {"model": str(sandbox.policy), "max_new_tokens": 32},
                "reward_model": {"model": str(sandbox.reward_model), "kind": sandbox.reward_kind},
                "seed": seed,
            }
        )
        tasks[task] = {"audit": audit(config, out / task, progress)}
    summary = {"tasks": tasks}
    write_json(out / "summary.json", summary)
    return summary


def _conclude(run: Run, command: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    write_json(run.path / "summary.json", summary)
    write_report(run.path)
    run.finish(command, summary=summary)
    Parts(run.round() / "parts").remove()
    return dict(summary)
