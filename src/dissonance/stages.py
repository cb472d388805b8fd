"""The stages of a round: each takes the round's folder and a model, and leaves its part of the round's tables.

A stage works batch by batch and stores each one as it comes, so that a killed run goes on where it was. Windows of
prompts bound the memory: a window is planned, sampled, scored and written without the others.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.artifacts import Parts, atomic_path
from dissonance.conflict import Conflicts, ConflictSummary, ConflictTally, conflicts, length_correlation, tally
from dissonance.errors import DissonanceError, RunError
from dissonance.likelihood import Likelihood, loglikelihood
from dissonance.models import Policy, ReferenceModel, RewardModel
from dissonance.overlap import overlapped
from dissonance.progress import ProgressFactory
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, Completion, Prompt, messages_column

WINDOW = 1024
_SAMPLED = pa.schema(
    [f for f in COMPLETIONS_SCHEMA if f.name not in {"ref_logprob", "reward", "reward_truncated", "pacs"}]
)
_KEYS = ("prompt_id", "completion_id")
_REFERENCE = pa.schema([COMPLETIONS_SCHEMA.field(name) for name in (*_KEYS, "ref_logprob")])
_REWARDS = pa.schema([COMPLETIONS_SCHEMA.field(name) for name in (*_KEYS, "reward", "reward_truncated")])


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


def sample_completions(
    folder: Path, policy: Policy, batches: Sequence[Batch], n: int, progress: ProgressFactory
) -> None:
    """Prompts -> completions with log-likelihoods."""

    def compute(batch: Batch) -> pa.Table:
        completions = policy.sample(batch.prompts)
        if len(completions) != n * len(batch.prompts):
            raise DissonanceError(f"the policy gave {len(completions)} completions for {len(batch.prompts)} prompts")
        return _completions_table(completions)

    _each_batch(folder, "completions", policy, batches, n, compute, progress, label="sampling")


def score_completions(
    folder: Path, reward_model: RewardModel, batches: Sequence[Batch], n: int, progress: ProgressFactory
) -> None:
    """Completions -> rewards."""

    def compute(batch: Batch) -> pa.Table:
        texts = _read(folder, "completions", batch, n)["text"].to_pylist()
        conversations = [prompt.messages for prompt in batch.prompts for _ in range(n)]
        rewards = reward_model.score(conversations, texts)
        if len(rewards) != len(texts):
            raise DissonanceError(f"the reward model gave {len(rewards)} rewards for {len(texts)} completions")
        columns = {"reward": [r.value for r in rewards], "reward_truncated": [r.truncated for r in rewards]}
        return pa.table(_keys(batch, n) | columns, schema=_REWARDS)

    _each_batch(folder, "rewards", reward_model, batches, n, compute, progress, label="scoring")


def score_reference(
    folder: Path, reference: ReferenceModel, batches: Sequence[Batch], n: int, progress: ProgressFactory
) -> None:
    """Completions -> log-likelihoods under the reference model."""

    def compute(batch: Batch) -> pa.Table:
        ids = _read(folder, "completions", batch, n)["token_ids"].to_pylist()
        grouped = [ids[first : first + n] for first in range(0, len(ids), n)]
        sums = reference.logprobs(batch.prompts, grouped)
        flat = [value for group in sums for value in group]
        return pa.table(_keys(batch, n) | {"ref_logprob": flat}, schema=_REFERENCE)

    _each_batch(folder, "reference", reference, batches, n, compute, progress, label="reference model")


def _parts(folder: Path) -> Parts:
    return Parts(folder / "parts")


def _keys(batch: Batch, n: int) -> dict[str, list[Any]]:
    """What stands in the key columns of every part of a batch."""
    return {
        "prompt_id": [prompt.prompt_id for prompt in batch.prompts for _ in range(n)],
        "completion_id": [*range(n)] * len(batch.prompts),
    }


def _read(folder: Path, stage: str, batch: Batch, n: int) -> pa.Table:
    """A stored batch, which must hold what the plan says: positions alone would give a prompt another's reward."""
    table = _parts(folder).read(stage, batch.window, batch.number)
    if table.select(_KEYS).to_pydict() != _keys(batch, n):
        path = _parts(folder).path(stage, batch.window, batch.number)
        raise RunError(f"{path} holds other completions than planned: choose another --out")
    return table


def _each_batch(
    folder: Path,
    stage: str,
    model: object,
    batches: Sequence[Batch],
    n: int,
    compute: Callable[[Batch], pa.Table],
    progress: ProgressFactory,
    *,
    label: str,
) -> None:
    parts = _parts(folder)
    waiting = [b for b in batches if not parts.path(stage, b.window, b.number).exists()]
    total = sum(len(b.prompts) for b in waiting) * n
    with progress(label, total, "completions") as advance, closing(overlapped(model, waiting, compute)) as computed:
        start = time.perf_counter()
        for batch, table in computed:
            # Since the batch that came before: batches that were computed at once share the seconds.
            now = time.perf_counter()
            parts.write(stage, batch.window, batch.number, table, now - start)
            start = now
            advance(n * len(batch.prompts))


def _completions_table(completions: Sequence[Completion]) -> pa.Table:
    rows = [{**asdict(c), "n_tokens": len(c.token_ids)} for c in completions]
    return pa.Table.from_pylist(rows, schema=_SAMPLED)


def measure_conflicts(
    folder: Path, prompts: Sequence[Prompt], batches: Sequence[Batch], n: int, likelihood: Likelihood
) -> dict[str, Any]:
    """Completions, rewards and log-likelihoods -> the round's two tables and their summary."""
    total, seconds = ConflictTally(), dict.fromkeys(("completions", "rewards", "reference"), 0.0)
    with (
        atomic_path(folder / "completions.parquet") as completions_path,
        atomic_path(folder / "prompts.parquet") as prompts_path,
        pq.ParquetWriter(completions_path, COMPLETIONS_SCHEMA, compression="zstd") as completions_writer,
        pq.ParquetWriter(prompts_path, PROMPTS_SCHEMA, compression="zstd") as prompts_writer,
    ):
        for w, window in enumerate(_windows(prompts)):
            table, spent = _window_table(folder, window, [b for b in batches if b.window == w], n)
            seconds = {stage: seconds[stage] + spent[stage] for stage in seconds}
            found = _measure(table, window, likelihood)
            completions_writer.write_table(_column(table, "pacs", found.pacs).select(COMPLETIONS_SCHEMA.names))
            prompts_writer.write_table(_prompts_table(window, found))
            total += tally(found)
    return {**conflict_keys(total.summary()), **_audit_keys(folder, seconds)}


def _window_table(
    folder: Path, window: Sequence[Prompt], batches: Sequence[Batch], n: int
) -> tuple[pa.Table, dict[str, float]]:
    """The completions of a window in the order of its prompts, and the seconds that each stage took."""
    parts = _parts(folder)
    seconds = dict.fromkeys(("completions", "rewards", "reference"), 0.0)
    tables = []
    for batch in batches:
        columns: dict[str, pa.ChunkedArray] = {}
        for stage in seconds:
            if stage != "reference" or parts.path(stage, batch.window, batch.number).exists():
                part = _read(folder, stage, batch, n)
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
    if len(table) % len(window):
        raise DissonanceError(f"{len(table)} completions for {len(window)} prompts: run the command again")
    offsets = np.arange(len(window) + 1) * (len(table) // len(window))
    rewards = table["reward"].to_numpy()
    return conflicts(rewards, loglikelihood(table, likelihood), offsets, [p.prompt_id for p in window])


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
        "repeated_answers": found.repeated_answers,
        "kendall_tau_distance": {
            "mean": found.kendall_tau_distance,
            "null_mean": found.null_mean,
            "null_sd": found.null_sd,
            "distinct_mean": found.distinct_distance,
            "share_above_null": found.share_above_null,
            "null_share_above": found.null_share_above,
            "share_significant": found.share_significant,
            "null_share_significant": found.null_share_significant,
        },
        "mean_abs_pacs": found.mean_abs_pacs,
    }


def _audit_keys(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The keys that only `audit` has: lengths, truncation, rates."""
    columns = pq.read_table(folder / "completions.parquet", columns=["n_tokens", "finish_reason", "reward_truncated"])
    tokens = pc.sum(columns["n_tokens"]).as_py()
    return {
        "length_correlation": round_length_correlation(folder),
        "truncated": pc.sum(columns["reward_truncated"]).as_py(),
        "unfinished": pc.sum(pc.equal(columns["finish_reason"], "length")).as_py(),
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds["completions"], 1e-9),
        "seconds": sum(seconds.values()),
    }


def round_length_correlation(folder: Path) -> float | None:
    """`conflict.length_correlation` of a round's two tables; None also where a completion has no n_tokens."""
    file = folder / "completions.parquet"
    if "n_tokens" not in pq.read_schema(file).names:
        return None
    columns = pq.read_table(file, columns=["pacs", "n_tokens"])
    if columns["n_tokens"].null_count:
        return None
    prompts = pq.read_table(folder / "prompts.parquet", columns=["n_completions", "degenerate"])
    offsets = np.append(0, np.cumsum(prompts["n_completions"].to_numpy(), dtype=np.int64))
    return length_correlation(
        columns["pacs"].to_numpy(), columns["n_tokens"].to_numpy(), offsets, prompts["degenerate"].to_numpy()
    )
