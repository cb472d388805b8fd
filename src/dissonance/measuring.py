"""Where a reward model and a policy disagree, and what to ask about it: audit, conflicts, select."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.artifacts import (
    Run,
    atomic_path,
    changes,
    create_run,
    find_run,
    matching_run,
    open_run,
    read_pieces,
    source_fingerprint,
    write_json,
    write_table,
)
from dissonance.callables import function_source
from dissonance.config import DEFAULT_STRATEGY, AuditConfig, ModelConfig, RewardKind, SelectionConfig
from dissonance.engine.local import LocalEngine
from dissonance.errors import DataError, InputError, RunError, SettingsError
from dissonance.models import Engine
from dissonance.progress import ProgressFactory, quiet
from dissonance.prompts import LoadedPrompts, load_prompts, prompts_fingerprint
from dissonance.report import write_report
from dissonance.round_ledger import stage_name
from dissonance.scored import ScoredLikelihood, measure_scored
from dissonance.sections import deciding
from dissonance.selection import Strategy, parse_threshold, pool_from_tables, queries_table
from dissonance.selection import select as select_queries
from dissonance.stages import conflict_keys, round_length_correlation

LOCAL: Engine = LocalEngine()
"""This process."""


def audit(
    config: AuditConfig, out: Path | str, progress: ProgressFactory = quiet, *, engine: Engine = LOCAL
) -> dict[str, Any]:
    """Sample a policy, score its completions, and find where the reward model and the policy disagree.

    Leaves `completions.parquet` and `prompts.parquet` in OUT/round-000, `summary.json` and `report.html` in OUT. Run
    again after an interruption, it goes on where it was; after it is done, it returns what it found.

    Args:
        config: the settings.
        out: the run folder.
        progress: opens the progress of each stage.
        engine: where it runs: in this process, or on a cluster, `dissonance.engine.ray.RayEngine`.

    Returns:
        What `summary.json` holds.

    Raises:
        InputError: a setting, the prompts or a model is wrong; nothing was written.
    """
    out = Path(out)
    loaded = load_prompts(**config.prompts.model_dump(), seed=config.seed)
    settings, inputs = audit_settings(config, engine), audit_inputs(config, loaded)
    if (done := _finished(out, "audit", settings, inputs)) is not None:
        engine.forget(out / "round-000")  # what a kill at the very end has left
        return done
    prepared = engine.prepare(config, loaded.prompts)
    duplicates = loaded.n_duplicates
    del loaded  # a million prompts, which rest with the engine now
    with create_run(out, "audit", settings, inputs) as run:
        found = {**prepared.measure(run.round(), progress), "duplicates": duplicates}
        del prepared
        summary = conclude(run, "audit", found)
        engine.forget(run.round())
        return summary


@dataclass(frozen=True)
class Measured:
    """What a run measured in its first round."""

    run: Run
    summary: dict[str, Any]
    """What measuring the round returned."""

    def copy(self, folder: Path) -> dict[str, Any]:
        """Copy the tables into a round's folder; gives the summary.

        Raises:
            RunError: a table is missing, damaged, or has other rows than it had.
        """
        for name in ROUND_TABLES:
            pieces, rows = read_pieces(self.run.round() / name), 0
            schema = next(pieces).schema
            with atomic_path(folder / name) as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for piece in pieces:
                    writer.write_table(piece)
                    rows += piece.num_rows
                if rows != self.summary[name.partition(".")[0]]:
                    raise RunError(f"{self.run.round() / name} has {rows:,} rows, not those that were measured")
        return self.summary


def measured_before(
    path: Path, config: AuditConfig, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> Measured:
    """What another run measured, if it is of the same audit.

    Args:
        path: a finished run of `audit`, or a run that has measured its first round.
        config: the audit.
        settings: what `audit_settings` says of it.
        inputs: what `audit_inputs` says of it, with all prompts that any round may draw.

    Raises:
        RunError: there is no such run, it is not that far, or it was made with other settings or inputs.
    """
    other = find_run(path)
    ledger = other.ledger
    command = ledger["command"]
    done = other.finished({"audit": "audit", "run": stage_name("measure", 0)}.get(command, ""))
    if done is None:
        raise RunError(f"{path} has no finished audit: name a finished run of `audit`, or a run that has measured")
    if command == "audit":
        drawn = load_prompts(**config.prompts.model_dump(), seed=config.seed).prompts
        inputs = {**inputs, "prompts": prompts_fingerprint(drawn)}
    if changed := changes(ledger, settings, inputs):
        raise RunError(f"{path} was audited with other settings ({'; '.join(changed)}): take those, or audit anew")
    return Measured(other, {name: value for name, value in done["summary"].items() if name != "duplicates"})


ROUND_TABLES = ("completions.parquet", "prompts.parquet")
"""What measuring leaves in a round's folder; its summary counts the rows of each."""


def _finished(out: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """What the command found before, if all that it leaves is still there."""
    run = matching_run(out, command, settings, inputs)
    done = None if run is None else run.finished(command)
    left = ("summary.json", "report.html", *(f"round-000/{name}" for name in ROUND_TABLES))
    if done is None or not all((out / name).is_file() for name in left):
        return None
    return dict(done["summary"])


def audit_settings(config: AuditConfig, engine: Engine = LOCAL) -> dict[str, Any]:
    """The settings as `run.json` holds them, with what `auto` stands for where the models run.

    Of a server it says that there is one, and not where.
    """
    reward = {} if ":" in config.reward_model.model else {"reward_model": engine.resolved(config.reward_model)}
    settings = deciding(config.model_dump(mode="json"))
    return {**settings, "resolved": {"policy": engine.resolved(config.policy), **reward}}


def audit_inputs(config: AuditConfig, loaded: LoadedPrompts) -> dict[str, str]:
    """Fingerprints of the prompts and of every model."""
    reference = config.policy.reference
    return {
        "prompts": prompts_fingerprint(loaded.prompts),
        **model_inputs("policy", config.policy),
        **({} if reference is None else {"policy.reference": source_fingerprint(reference)}),
        **model_inputs("reward_model", config.reward_model),
    }


def model_inputs(name: str, section: ModelConfig) -> dict[str, str]:
    """Fingerprints of a model: of the model that is named, its adapter, and the base that an adapter names."""
    from dissonance.huggingface import base_and_adapter

    base, _ = base_and_adapter(section, name)
    sources = {
        "model": reward_source(section.model),
        "adapter": section.adapter,
        "base": None if base == section.model else base,
    }
    return {f"{name}.{part}": source_fingerprint(source) for part, source in sources.items() if source is not None}


def reward_source(name: str) -> str:
    """The file of a callable; else the name itself."""
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
                run.discard()
            raise
        rho = round_length_correlation(run.round())
        keys = {**conflict_keys(found), "length_correlation": rho, "seconds": time.perf_counter() - start}
        return conclude(run, "conflicts", keys)


def select(
    run: Path | str,
    *,
    budget: int,
    strategy: str | Strategy = DEFAULT_STRATEGY,
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
    settings = SelectionConfig.model_construct(budget=budget, tau=tau, delta=delta)
    with open_run(Path(run)) as opened:
        if opened.ledger["command"] == "run":
            raise RunError(f"{run} is a run that chooses by itself: give its config another selection before it begins")
        number = opened.find_round(round_number)
        found = choose(opened, number, settings, strategy, seed)
        stage = stage_name("select", number)
        opened.finish(stage, budget=budget, tau=tau, delta=delta, seed=seed, summary=found)
    return found


def choose(run: Run, number: int, settings: SelectionConfig, strategy: str | Strategy, seed: int) -> dict[str, Any]:
    """Choose a round's queries and write them; returns the keys of `select --json`.

    Raises:
        InputError: as `select`.
    """
    folder, tau, delta = run.round(number), settings.tau, settings.delta
    prompts = pa.concat_tables(read_pieces(folder / "prompts.parquet", without=("messages",)))
    pieces = read_pieces(folder / "completions.parquet", without=("token_ids",))
    completions = pa.concat_tables(map(_told_apart, pieces))
    pool = pool_from_tables(prompts, completions, run.ledger["settings"]["likelihood"])
    chosen = select_queries(
        pool,
        strategy,
        budget=settings.budget,
        rng=np.random.default_rng(seed),
        tau=None if tau is None else parse_threshold(str(tau), "tau"),
        delta=None if delta is None else parse_threshold(str(delta), "delta"),
    )
    write_table(folder / "queries.parquet", queries_table(chosen, number))
    return {
        "round": number,
        "strategy": chosen.strategy,
        "judgements": chosen.judgements,
        "prompts": chosen.prompts,
        "queries": len(chosen.queries),
        # No quantile of nothing: where every prompt is degenerate, JSON has no word for an infinite bound.
        "thresholds": {k: v if v is None or isfinite(v) else None for k, v in asdict(chosen.thresholds).items()},
        "explanation": list(chosen.explanation),
    }


def _told_apart(completions: pa.Table) -> pa.Table:
    """Completions with a digest in place of each text: selecting asks no more of texts than which are the same."""
    if "text" not in completions.column_names:
        return completions
    texts = completions["text"].to_pylist()
    digests = [None if text is None else blake2b(str(text).encode(), digest_size=16).digest() for text in texts]
    return completions.set_column(completions.column_names.index("text"), "text", pa.array(digests, pa.binary(16)))


def conclude(run: Run, command: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write the summary and the report, and enter the command as done."""
    write_json(run.path / "summary.json", summary)
    write_report(run.path)
    run.finish(command, summary=summary)
    return dict(summary)
