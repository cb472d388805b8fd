"""The stages of a round: each takes batches of prompts and a model, and leaves its part of the round's tables.

A stage works batch by batch and stores each one as it comes, so that a killed run goes on where it was. Windows of
prompts bound the memory: a window is planned, sampled, scored and written without the others. What computes one batch,
or measures one window, does not know where it runs: `dissonance.engine` does.
"""

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.artifacts import atomic_path
from dissonance.conflict import Conflicts, ConflictSummary, ConflictTally, conflicts, length_correlation, tally
from dissonance.errors import DissonanceError, RunError
from dissonance.likelihood import Likelihood, loglikelihood
from dissonance.models import Planner, Policy, ReferenceModel, RewardModel
from dissonance.overlap import overlapped
from dissonance.parts import Parts
from dissonance.prompt_table import CHUNK, PromptTable
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA, Completion, Prompt
from dissonance.round_sample import sampled

WINDOW = CHUNK
"""Prompts of a window: those that Arrow holds in one piece, of which it gathers some in no time."""
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
    rows: "array[int]"
    """The prompts that are in it, by their places in the window."""


def windows_of(prompts: Sequence[Prompt]) -> list[PromptTable]:
    """The prompts, `WINDOW` at a time."""
    table = PromptTable.of(prompts)
    return [table[first : first + WINDOW] for first in range(0, len(table), WINDOW)]


def plan_window(planner: Planner, number: int, window: PromptTable) -> list[Batch]:
    """Every batch of a window.

    Raises:
        DissonanceError: the plan lost or repeated a prompt.
    """
    prompts = list(window)
    planned = planner.plan(prompts)
    if sorted(p.prompt_id for batch in planned for p in batch) != sorted(p.prompt_id for p in prompts):
        raise DissonanceError(f"the policy's plan does not hold each prompt of window {number} once")
    place = {prompt.prompt_id: row for row, prompt in enumerate(prompts)}
    return [Batch(number, i, array("i", (place[p.prompt_id] for p in batch))) for i, batch in enumerate(planned)]


@dataclass(frozen=True)
class Stage:
    """What is computed batch by batch."""

    name: str
    """Of its parts."""

    label: str
    """Of its progress."""

    compute: Callable[[Any, Batch, PromptTable, int, Parts], pa.Table]
    """(model, batch, its prompts, n, parts before it) -> the batch's part."""


def compute(
    stage: Stage, model: Any, batches: Iterable[Batch], window_of: Callable[[int], PromptTable], n: int, parts: Parts
) -> Iterator[int]:
    """Compute batches of a stage and store them; the completions of each as it is done.

    `window_of` gives a window by its number, to several threads at once. Of batches that are computed at once, each is
    said to have taken the seconds since the one before.
    """

    def one(batch: Batch) -> pa.Table:
        return stage.compute(model, batch, window_of(batch.window).take(batch.rows), n, parts)

    start = time.perf_counter()
    with closing(overlapped(model, batches, one)) as computed:
        for batch, table in computed:
            now = time.perf_counter()
            parts.write(stage.name, batch.window, batch.number, table, now - start)
            start = now
            yield n * len(batch.rows)


def _sample(policy: Policy, batch: Batch, prompts: PromptTable, n: int, parts: Parts) -> pa.Table:
    del batch, parts
    completions = policy.sample(list(prompts))
    if len(completions) != n * len(prompts):
        raise DissonanceError(f"the policy gave {len(completions)} completions for {len(prompts)} prompts")
    return _completions_table(completions)


def _score(reward_model: RewardModel, batch: Batch, prompts: PromptTable, n: int, parts: Parts) -> pa.Table:
    keys = _keys(prompts.columns["prompt_id"].to_pylist(), n)
    texts = _read(parts, SAMPLING, batch, keys)["text"].to_pylist()
    conversations = [prompt.messages for prompt in prompts for _ in range(n)]
    rewards = reward_model.score(conversations, texts)
    if len(rewards) != len(texts):
        raise DissonanceError(f"the reward model gave {len(rewards)} rewards for {len(texts)} completions")
    columns = {"reward": [r.value for r in rewards], "reward_truncated": [r.truncated for r in rewards]}
    return pa.table(keys | columns, schema=_REWARDS)


def _refer(reference: ReferenceModel, batch: Batch, prompts: PromptTable, n: int, parts: Parts) -> pa.Table:
    keys = _keys(prompts.columns["prompt_id"].to_pylist(), n)
    ids = _read(parts, SAMPLING, batch, keys)["token_ids"].to_pylist()
    grouped = [ids[first : first + n] for first in range(0, len(ids), n)]
    sums = reference.logprobs(list(prompts), grouped)
    flat = [value for group in sums for value in group]
    return pa.table(keys | {"ref_logprob": flat}, schema=_REFERENCE)


SAMPLING = Stage("completions", "sampling", _sample)
"""Prompts -> completions with log-likelihoods, by a `Policy`."""
REFERENCE = Stage("reference", "reference model", _refer)
"""Completions -> log-likelihoods under a `ReferenceModel`."""
SCORING = Stage("rewards", "scoring", _score)
"""Completions -> rewards, by a `RewardModel`."""
STAGES = {stage.name: stage for stage in (SAMPLING, REFERENCE, SCORING)}


def _keys(ids: Sequence[str], n: int) -> dict[str, list[Any]]:
    """What stands in the key columns of every part of a batch of these prompts."""
    return {"prompt_id": [name for name in ids for _ in range(n)], "completion_id": [*range(n)] * len(ids)}


def _read(parts: Parts, stage: Stage, batch: Batch, keys: dict[str, list[Any]]) -> pa.Table:
    """A stored batch, which must hold what the plan says: positions alone would give a prompt another's reward."""
    table = parts.read(stage.name, batch.window, batch.number)
    if table.select(_KEYS).to_pydict() != keys:
        name = parts.name(stage.name, batch.window, batch.number)
        raise RunError(f"{name} holds other completions than planned: delete it and run the same command again")
    return table


def waiting(parts: Parts, stage: Stage, batches: Iterable[Batch]) -> list[Batch]:
    """The batches that are not stored yet."""
    there = parts.names()
    left = [batch for batch in batches if parts.name(stage.name, batch.window, batch.number) not in there]
    if stage is SAMPLING:  # what was computed of completions that are gone may be of others than those that come
        for batch, later in product(left, (REFERENCE, SCORING)):
            if parts.name(later.name, batch.window, batch.number) in there:
                parts.drop(later.name, batch.window, batch.number)
    return left


def _completions_table(completions: Sequence[Completion]) -> pa.Table:
    rows = [{**asdict(c), "n_tokens": len(c.token_ids)} for c in completions]
    return pa.Table.from_pylist(rows, schema=_SAMPLED)


@dataclass(frozen=True)
class MeasuredWindow:
    """The rows that a window adds to the round's two tables, and what they add to its summary."""

    completions: pa.Table
    """`COMPLETIONS_SCHEMA`, in the order of the prompts."""
    prompts: pa.Table
    """`PROMPTS_SCHEMA`."""
    tally: ConflictTally
    seconds: dict[str, float]
    """What its batches took, by stage."""


def measure_window(
    parts: Parts,
    stages: Sequence[Stage],
    window: PromptTable,
    batches: Sequence[Batch],
    n: int,
    likelihood: Likelihood,
) -> MeasuredWindow:
    """What `stages` left of a window's batches -> its conflicts.

    Raises:
        RunError: a part is missing, damaged, or holds something else than planned.
    """
    table, seconds = _window_table(parts, stages, window, batches, n)
    found = _measure(table, window, likelihood)
    completions = table.append_column(COMPLETIONS_SCHEMA.field("pacs"), pa.array(found.pacs))
    return MeasuredWindow(
        completions.select(COMPLETIONS_SCHEMA.names), _prompts_table(window, found), tally(found), seconds
    )


def write_round(folder: Path, windows: Iterable[MeasuredWindow]) -> dict[str, Any]:
    """All windows in order -> the round's two tables; gives their summary."""
    total, seconds = ConflictTally(), dict.fromkeys(STAGES, 0.0)
    counts = dict.fromkeys(("truncated", "unfinished", "tokens"), 0)
    with (
        atomic_path(folder / "completions.parquet") as completions_path,
        atomic_path(folder / "prompts.parquet") as prompts_path,
        pq.ParquetWriter(completions_path, COMPLETIONS_SCHEMA, compression="zstd") as completions_writer,
        pq.ParquetWriter(prompts_path, PROMPTS_SCHEMA, compression="zstd") as prompts_writer,
    ):
        for window in windows:
            completions_writer.write_table(window.completions)
            prompts_writer.write_table(window.prompts)
            total += window.tally
            seconds = {stage: seconds[stage] + window.seconds[stage] for stage in seconds}
            counts["truncated"] += pc.sum(window.completions["reward_truncated"]).as_py()
            counts["unfinished"] += pc.sum(pc.equal(window.completions["finish_reason"], "length")).as_py()
            counts["tokens"] += pc.sum(window.completions["n_tokens"]).as_py()
    return {
        **conflict_keys(total.summary()),
        "length_correlation": round_length_correlation(folder),
        **counts,
        "tokens_per_second": counts["tokens"] / max(seconds[SAMPLING.name], 1e-9),
        "seconds": sum(seconds.values()),
    }


def _window_table(
    parts: Parts, stages: Sequence[Stage], window: PromptTable, batches: Sequence[Batch], n: int
) -> tuple[pa.Table, dict[str, float]]:
    """The completions of a window in the order of its prompts, and the seconds that each stage took."""
    seconds = dict.fromkeys(STAGES, 0.0)
    tables, ids = [], window.columns["prompt_id"].to_pylist()
    for batch in batches:
        columns: dict[str, pa.ChunkedArray] = {}
        keys = _keys([ids[row] for row in batch.rows], n)
        for stage in stages:
            part = _read(parts, stage, batch, keys)
            seconds[stage.name] += float(part.schema.metadata[b"seconds"])
            columns |= dict(zip(part.column_names, part.columns, strict=True))
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables)
    if "ref_logprob" not in table.column_names:
        table = table.append_column("ref_logprob", pa.nulls(len(table), pa.float64()))
    position = pc.index_in(table["prompt_id"], window.columns["prompt_id"])
    keyed = table.append_column("position", position)
    ordered = keyed.sort_by([("position", "ascending"), ("completion_id", "ascending")]).drop_columns("position")
    return ordered, seconds


def _measure(table: pa.Table, window: PromptTable, likelihood: Likelihood) -> Conflicts:
    if len(table) % len(window):
        raise DissonanceError(f"{len(table)} completions for {len(window)} prompts: run the command again")
    offsets = np.arange(len(window) + 1) * (len(table) // len(window))
    rewards = table["reward"].to_numpy()
    return conflicts(rewards, loglikelihood(table, likelihood), offsets, window.columns["prompt_id"].to_pylist())


def _prompts_table(window: PromptTable, found: Conflicts) -> pa.Table:
    return pa.table(
        {
            **{name: window.columns[name] for name in window.columns.column_names},
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


def round_length_correlation(folder: Path) -> float | None:
    """`conflict.length_correlation` of a round's two tables; None also where a completion has no n_tokens.

    Of a large round, that of the sample which its report shows.
    """
    if "n_tokens" not in pq.read_schema(folder / "completions.parquet").names:
        return None
    with sampled(folder, (["n_completions", "degenerate"], ["pacs", "n_tokens"])) as drawn:
        columns = pq.read_table(drawn / "completions.parquet", columns=["pacs", "n_tokens"])
        prompts = pq.read_table(drawn / "prompts.parquet", columns=["n_completions", "degenerate"])
    if columns["n_tokens"].null_count:
        return None
    offsets = np.append(0, np.cumsum(prompts["n_completions"].to_numpy(), dtype=np.int64))
    return length_correlation(
        columns["pacs"].to_numpy(), columns["n_tokens"].to_numpy(), offsets, prompts["degenerate"].to_numpy()
    )
