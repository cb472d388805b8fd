"""The stages of a round: each takes a run folder and a model, and leaves its part of the round's tables.

A stage works batch by batch and stores each one as it comes, so that a killed run goes on where it was. Windows of
prompts bound the memory: a window is planned, sampled, scored and written without the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.stats import spearmanr

from dissonance.artifacts import Parts, Run, atomic_path
from dissonance.conflict import Conflicts, ConflictSummary, ConflictTally, FloatArray, conflicts, tally
from dissonance.errors import DissonanceError
from dissonance.likelihood import Likelihood, loglikelihood
from dissonance.models import Policy, ReferenceModel, RewardModel
from dissonance.progress import ProgressFactory
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, Completion, Prompt, messages_column

WINDOW = 1024
_SAMPLED = pa.schema(
    [f for f in COMPLETIONS_SCHEMA if f.name not in {"ref_logprob", "reward", "reward_truncated", "pacs"}]
)
_REFERENCE = pa.schema([COMPLETIONS_SCHEMA.field("ref_logprob")])
_REWARDS = pa.schema([COMPLETIONS_SCHEMA.field(name) for name in ("reward", "reward_truncated")])


@dataclass(frozen=True)
class Batch:
    """One batch of a plan and the name it is stored under."""

    window: int
    number: int
    prompts: tuple[Prompt, ...]


def plan_batches(policy: Policy, prompts: Sequence[Prompt]) -> list[Batch]:
    """Every batch of a round, window after window.

    Raises:
        DissonanceError: the policy's plan lost or repeated a prompt.
    """
    batches = []
    for w, window in enumerate(_windows(prompts)):
        planned = policy.plan(window)
        if sorted(p.prompt_id for batch in planned for p in batch) != sorted(p.prompt_id for p in window):
            raise DissonanceError(f"the policy's plan does not hold each prompt of window {w} once")
        batches += [Batch(w, number, tuple(batch)) for number, batch in enumerate(planned)]
    return batches


def _windows(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    return (prompts[first : first + WINDOW] for first in range(0, len(prompts), WINDOW))


def sample_completions(run: Run, policy: Policy, batches: Sequence[Batch], n: int, progress: ProgressFactory) -> None:
    """Prompts -> completions with log-likelihoods."""

    def compute(batch: Batch) -> pa.Table:
        completions = policy.sample(batch.prompts)
        if len(completions) != n * len(batch.prompts):
            raise DissonanceError(f"the policy gave {len(completions)} completions for {len(batch.prompts)} prompts")
        return _completions_table(completions)

    _each_batch(run, "completions", batches, n, compute, progress, label="sampling")


def score_completions(
    run: Run, reward_model: RewardModel, batches: Sequence[Batch], n: int, progress: ProgressFactory
) -> None:
    """Completions -> rewards."""
    parts = _parts(run)

    def compute(batch: Batch) -> pa.Table:
        texts = parts.read("completions", batch.window, batch.number)["text"].to_pylist()
        conversations = [prompt.messages for prompt in batch.prompts for _ in range(n)]
        rewards = reward_model.score(conversations, texts)
        if len(rewards) != len(texts):
            raise DissonanceError(f"the reward model gave {len(rewards)} rewards for {len(texts)} completions")
        columns = {"reward": [r.value for r in rewards], "reward_truncated": [r.truncated for r in rewards]}
        return pa.table(columns, schema=_REWARDS)

    _each_batch(run, "rewards", batches, n, compute, progress, label="scoring")


def score_reference(
    run: Run, reference: ReferenceModel, batches: Sequence[Batch], n: int, progress: ProgressFactory
) -> None:
    """Completions -> log-likelihoods under the reference model."""
    parts = _parts(run)

    def compute(batch: Batch) -> pa.Table:
        ids = parts.read("completions", batch.window, batch.number)["token_ids"].to_pylist()
        grouped = [ids[first : first + n] for first in range(0, len(ids), n)]
        sums = reference.logprobs(batch.prompts, grouped)
        return pa.table({"ref_logprob": [value for group in sums for value in group]}, schema=_REFERENCE)

    _each_batch(run, "reference", batches, n, compute, progress, label="reference model")


def _parts(run: Run) -> Parts:
    return Parts(run.round() / "parts")


def _each_batch(
    run: Run,
    stage: str,
    batches: Sequence[Batch],
    n: int,
    compute: Callable[[Batch], pa.Table],
    progress: ProgressFactory,
    label: str,
) -> None:
    parts = _parts(run)
    waiting = [b for b in batches if not parts.path(stage, b.window, b.number).exists()]
    total = sum(len(b.prompts) for b in waiting) * n
    with progress(label, total, "completions") as advance:
        for batch in waiting:
            start = time.perf_counter()
            table = compute(batch)
            parts.write(stage, batch.window, batch.number, table, time.perf_counter() - start)
            advance(n * len(batch.prompts))


def _completions_table(completions: Sequence[Completion]) -> pa.Table:
    rows = [{**asdict(c), "n_tokens": len(c.token_ids)} for c in completions]
    return pa.Table.from_pylist(rows, schema=_SAMPLED)


def measure_conflicts(
    run: Run, prompts: Sequence[Prompt], batches: Sequence[Batch], likelihood: Likelihood
) -> dict[str, Any]:
    """Completions, rewards and log-likelihoods -> the round's two tables and their summary."""
    folder = run.round()
    total, seconds = ConflictTally(), dict.fromkeys(("completions", "rewards", "reference"), 0.0)
    with (
        atomic_path(folder / "completions.parquet") as completions_path,
        atomic_path(folder / "prompts.parquet") as prompts_path,
        pq.ParquetWriter(completions_path, COMPLETIONS_SCHEMA, compression="zstd") as completions_writer,
        pq.ParquetWriter(prompts_path, PROMPTS_SCHEMA, compression="zstd") as prompts_writer,
    ):
        for w, window in enumerate(_windows(prompts)):
            table, spent = _window_table(run, window, [b for b in batches if b.window == w])
            seconds = {stage: seconds[stage] + spent[stage] for stage in seconds}
            found = _measure(table, window, likelihood)
            completions_writer.write_table(_column(table, "pacs", found.pacs).select(COMPLETIONS_SCHEMA.names))
            prompts_writer.write_table(_prompts_table(window, found))
            total += tally(found)
    return {**conflict_keys(total.summary()), **_audit_keys(folder / "completions.parquet", seconds)}


def _window_table(run: Run, window: Sequence[Prompt], batches: Sequence[Batch]) -> tuple[pa.Table, dict[str, float]]:
    """The completions of a window in the order of its prompts, and the seconds that each stage took."""
    parts = _parts(run)
    seconds = dict.fromkeys(("completions", "rewards", "reference"), 0.0)
    tables = []
    for batch in batches:
        columns: dict[str, pa.ChunkedArray] = {}
        for stage in seconds:
            if stage != "reference" or parts.path(stage, batch.window, batch.number).exists():
                part = parts.read(stage, batch.window, batch.number)
                seconds[stage] += float(part.schema.metadata[b"seconds"])
                columns |= dict(zip(part.column_names, part.columns, strict=True))
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    if "ref_logprob" not in table.column_names:
        table = table.append_column("ref_logprob", pa.nulls(len(table), pa.float64()))
    position = pc.index_in(table["prompt_id"], pa.array([p.prompt_id for p in window]))
    keyed = table.append_column("position", position)
    ordered = keyed.sort_by([("position", "ascending"), ("completion_id", "ascending")]).drop_columns("position")
    return ordered, seconds


def _measure(table: pa.Table, window: Sequence[Prompt], likelihood: Likelihood) -> Conflicts:
    ids = table["prompt_id"].to_pylist()
    offsets = [i for i, name in enumerate(ids) if i == 0 or name != ids[i - 1]]
    if len(offsets) != len(window):
        raise DissonanceError(f"{len(offsets)} of {len(window)} prompts have completions: run the command again")
    rewards = table["reward"].to_numpy()
    return conflicts(rewards, loglikelihood(table, likelihood), [*offsets, len(ids)], [p.prompt_id for p in window])


def _column(table: pa.Table, name: str, values: np.ndarray[Any, Any]) -> pa.Table:
    return table.append_column(COMPLETIONS_SCHEMA.field(name), pa.array(values))


def _prompts_table(window: Sequence[Prompt], found: Conflicts) -> pa.Table:
    return pa.table(
        {
            "prompt_id": [p.prompt_id for p in window],
            "messages": messages_column(window),
            "category": pa.array([p.category for p in window], pa.string()),
            "n_completions": found.n_completions.astype(np.int32),
            "kendall_tau_distance": found.kendall_tau_distance,
            "mean_abs_pacs": found.mean_abs_pacs,
            "max_abs_pacs": found.max_abs_pacs,
            "degenerate": found.degenerate,
        },
        schema=PROMPTS_SCHEMA,
    )


def conflict_keys(found: ConflictSummary) -> dict[str, Any]:
    """The keys that `audit` and `conflicts` share."""
    return {
        "prompts": found.prompts,
        "completions": found.completions,
        "degenerate": found.degenerate,
        "kendall_tau_distance": {
            "mean": found.kendall_tau_distance,
            "null_mean": found.null_mean,
            "null_sd": found.null_sd,
            "share_above_null": found.share_above_null,
            "share_significant": found.share_significant,
        },
        "mean_abs_pacs": found.mean_abs_pacs,
    }


def _audit_keys(completions: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The keys that only `audit` has: lengths, truncation, rates."""
    columns = pq.read_table(completions, columns=["pacs", "n_tokens", "finish_reason", "reward_truncated"])
    tokens = pc.sum(columns["n_tokens"]).as_py()
    return {
        "length_correlation": length_correlation(columns["pacs"].to_numpy(), columns["n_tokens"].to_numpy()),
        "truncated": pc.sum(columns["reward_truncated"]).as_py(),
        "unfinished": pc.sum(pc.equal(columns["finish_reason"], "length")).as_py(),
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds["completions"], 1e-9),
        "seconds": sum(seconds.values()),
    }


def length_correlation(pacs: FloatArray, n_tokens: np.ndarray[Any, Any]) -> float | None:
    """Spearman's rho of signed PACS and length, over the completions that conflict at all; None without variation.

    Sum log-likelihood falls with length, so a long answer looks unlikely and its PACS is high whatever it says.
    """
    conflicting = pacs != 0
    x, y = pacs[conflicting], n_tokens[conflicting]
    if x.size < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(spearmanr(x, y).statistic)
