"""Bring your own scores: scored rows of any number in, the two tables of conflicts out.

    source file -> batches of rows -> whole prompts -> PACS and Kendall-tau distance -> two Parquet tables

The rows of a prompt usually stand together; then one pass does, and the output keeps the order of the input. Where a
prompt comes back after another one, the rows are first dealt out on disk, by a hash of prompt_id, into buckets that fit
into memory, and the prompts come out bucket by bucket. Memory does not grow with the file, but for 8 bytes a prompt.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dissonance.artifacts import atomic_path
from dissonance.config import RewardKind
from dissonance.conflict import Conflicts, ConflictSummary, ConflictTally, conflicts, tally
from dissonance.errors import DataError, SettingsError
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA
from dissonance.scored_files import Batches, ScoredRows, open_scored

ScoredLikelihood = Literal["sum", "mean"]

_LOGPROB_TOLERANCE = 1e-6
_BUCKET_BYTES = 32 << 20
_MAX_BUCKETS = 128  # each is an open file, and some systems allow 256


@dataclass(frozen=True)
class _Prompts:
    """Whole prompts, the rows of each together."""

    rows: pa.Table
    """R rows, one per completion, at least one."""

    starts: npt.NDArray[np.int64]
    """(P,) the first row of each prompt."""

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """(P,) prompt_id of each prompt."""
        return self.rows["prompt_id"].take(pa.array(self.starts))

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """(P + 1,) where each prompt starts and ends."""
        return np.append(self.starts, self.rows.num_rows)

    def name(self, row: int) -> str:
        """Name the prompt of a row in an error."""
        return f"prompt {self.rows['prompt_id'][row].as_py()!r}"


class _NotGroupedError(Exception):
    """A prompt came back after another one: no fault of the file's, and seen by nobody outside."""


def measure_scored(
    source: Path,
    prompts_out: Path,
    completions_out: Path,
    *,
    reward_kind: RewardKind = "reward",
    likelihood: ScoredLikelihood = "sum",
    on_progress: Callable[[int], None] | None = None,
    batch_rows: int = 1 << 16,
) -> ConflictSummary:
    """Measure the conflicts in a file of scored completions, and write the two tables.

    Args:
        source: what `dissonance.scored_files` reads. Without a completion_id column, completions are numbered from 0
            in the order of the prompt's rows.
        prompts_out: Parquet, a row per prompt: `PROMPTS_SCHEMA` without messages; category if the source has it.
        completions_out: Parquet, a row per completion: every column of the source, completion_id and pacs; the reward
            oriented, so that higher is better.
        reward_kind: `cost` if the source's rewards are costs, to be negated.
        likelihood: `mean` to measure with logprob / n_tokens; the column logprob stays the sum.
        on_progress: told now and then how many completions were written since it was last told.
        batch_rows: how many rows of the source are read at a time, at most.

    Raises:
        DataError: the source cannot be used; the message names it, and the line or the prompt. Nothing is written.
        SettingsError: an unknown reward_kind or likelihood.
    """
    for value, known in ((reward_kind, get_args(RewardKind)), (likelihood, get_args(ScoredLikelihood))):
        if value not in known:
            raise SettingsError(f"{value!r} is not known: use {' or '.join(known)}")

    told = 0  # across both attempts: a second one is silent until it gets farther than the first

    def write(schema: pa.Schema, chunks: Iterator[_Prompts]) -> ConflictSummary:
        nonlocal told
        total = ConflictTally()
        with _writers(schema, prompts_out, completions_out) as (prompts, completions):
            for chunk in chunks:
                found = _measure(chunk, likelihood)
                prompts.write_table(_prompts_table(chunk, found, prompts.schema))
                completions.write_table(_completions_table(chunk, found, completions.schema))
                total += tally(found)
                if on_progress and total.completions > told:
                    on_progress(total.completions - told)
                    told = total.completions
            if not total.prompts:
                raise DataError("there are no rows in it")
        return total.summary()

    try:
        rows = open_scored(source, batch_rows)
        if reward_kind == "cost":
            rows = _negated(rows)
        try:
            return write(rows.schema, _grouped(rows.read()))
        except _NotGroupedError:
            with TemporaryDirectory(prefix=".conflicts-", dir=completions_out.parent) as folder:
                return write(rows.schema, _regrouped(rows, Path(folder)))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _negated(costs: ScoredRows) -> ScoredRows:
    def read() -> Batches:
        for batch in costs.read():
            rewards = pc.subtract(0.0, batch.column("reward"))  # not pc.negate, which makes -0.0 of 0.0
            yield batch.set_column(batch.schema.get_field_index("reward"), batch.schema.field("reward"), rewards)

    return replace(costs, read=read)


def _grouped(batches: Batches) -> Iterator[_Prompts]:
    """Whole prompts as they come: the last one of a batch waits for the next batch."""
    closed = _HashSet()
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        rows = pa.Table.from_batches([*waiting, batch])
        starts = _starts(rows["prompt_id"])
        last = int(starts[-1])
        if last:
            yield closed.checked(_Prompts(rows.slice(0, last), starts[:-1]))
        waiting = rows.slice(last).to_batches()
    if waiting:
        yield closed.checked(_Prompts(pa.Table.from_batches(waiting), np.zeros(1, np.int64)))


def _starts(prompt_ids: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    changes = pc.not_equal(prompt_ids.slice(1), prompt_ids.slice(0, len(prompt_ids) - 1)).to_numpy()
    return np.append(0, np.flatnonzero(changes) + 1)


class _HashSet:
    """The prompts that are closed, as 64-bit hashes in a few sorted arrays.

    Two prompts of one hash look like one that came back: that costs time, but changes no result.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.int64]] = []

    def checked(self, prompts: _Prompts) -> _Prompts:
        """Close these prompts; _NotGroupedError if one is closed already, or has one row: its others may follow."""
        if np.diff(prompts.offsets).min() < 2:
            raise _NotGroupedError
        ids = prompts.ids.to_numpy()
        run = np.sort(np.fromiter(map(hash, ids), np.int64, len(ids)))
        if np.any(run[1:] == run[:-1]) or any(_intersect(run, earlier) for earlier in self._runs):
            raise _NotGroupedError
        # Runs shrink by half or more from one to the next: there are few to search, and each hash is rarely sorted.
        while self._runs and self._runs[-1].size < 2 * run.size:
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)
        return prompts


def _intersect(some: npt.NDArray[np.int64], of_sorted: npt.NDArray[np.int64]) -> bool:
    nearest = np.searchsorted(of_sorted, some)
    return bool(np.any(of_sorted[np.minimum(nearest, of_sorted.size - 1)] == some))


def _regrouped(rows: ScoredRows, folder: Path) -> Iterator[_Prompts]:
    """Whole prompts bucket by bucket, in the order of their first rows; the rows of each by completion_id, if any."""
    for path in _deal_out(rows, folder):
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
            bucket = reader.read_all()
        path.unlink()
        if bucket.num_rows:
            first_seen = bucket["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
            within = [bucket["completion_id"].to_numpy()] if "completion_id" in bucket.column_names else []
            order = np.lexsort([*within, first_seen])  # the last key leads; rows with equal keys stay in order
            together = bucket.take(pa.array(order))
            yield _Prompts(together, np.append(0, np.flatnonzero(np.diff(first_seen[order])) + 1))


def _deal_out(rows: ScoredRows, folder: Path) -> list[Path]:
    """Write every row to the bucket of its prompt; CRC-32 rather than `hash`, which differs from run to run."""
    n = min(_MAX_BUCKETS, rows.nbytes // _BUCKET_BYTES + 1)
    paths = [folder / f"{bucket}.arrow" for bucket in range(n)]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with ExitStack() as stack:
        files = [stack.enter_context(pa.OSFile(str(path), "wb")) for path in paths]
        buckets = [stack.enter_context(pa.ipc.new_stream(f, rows.schema, options=options)) for f in files]
        for batch in rows.read():
            ids = batch.column("prompt_id").cast(pa.binary()).to_numpy(zero_copy_only=False)
            bucket_of = np.fromiter(map(zlib.crc32, ids), np.int64, len(ids)) % n
            order = np.argsort(bucket_of, kind="stable")
            dealt = batch.take(pa.array(order))
            ends = np.cumsum(np.bincount(bucket_of, minlength=n)).tolist()
            for bucket, start, end in zip(buckets, [0, *ends], ends, strict=False):
                if end > start:
                    bucket.write_batch(dealt.slice(start, end - start))
    return paths


def _measure(prompts: _Prompts, likelihood: ScoredLikelihood) -> Conflicts:
    reward, logprob = _numbers(prompts, "reward"), _numbers(prompts, "logprob")
    positive = logprob > _LOGPROB_TOLERANCE
    if positive.any():
        row = int(np.argmax(positive))
        raise DataError(
            f"{prompts.name(row)} has a logprob of {logprob[row]:g}: a log-likelihood is at most 0 "
            "(if these are negative log-likelihoods or losses, change their sign)"
        )
    if likelihood == "mean":
        logprob = logprob / _token_counts(prompts)
    return conflicts(reward, logprob, prompts.offsets, prompts.ids)


def _numbers(prompts: _Prompts, name: str) -> npt.NDArray[np.float64]:
    column = prompts.rows[name]
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise DataError(f"{prompts.name(row)} has no {name} in one of its rows: every completion needs one")
    values: npt.NDArray[np.float64] = column.to_numpy().astype(np.float64, copy=False)
    return values


def _token_counts(prompts: _Prompts) -> npt.NDArray[np.float64]:
    if "n_tokens" not in prompts.rows.column_names:
        found = ", ".join(prompts.rows.column_names)
        raise DataError(f"the mean log-likelihood needs a column n_tokens: found {found}")
    counts = _numbers(prompts, "n_tokens")
    if counts.min() < 1:
        row = int(np.argmin(counts))
        raise DataError(f"{prompts.name(row)} has an n_tokens of {counts[row]:g}: a completion has at least 1 token")
    return counts


def _completion_ids(prompts: _Prompts) -> npt.NDArray[np.int64]:
    sizes = np.diff(prompts.offsets)
    position = np.arange(prompts.rows.num_rows) - np.repeat(prompts.starts, sizes)
    if "completion_id" not in prompts.rows.column_names:
        return position
    ids = _numbers(prompts, "completion_id").astype(np.int64)
    if np.array_equal(ids, position):
        return ids
    prompt = np.repeat(np.arange(sizes.size), sizes)
    order = np.lexsort((ids, prompt))
    twice = (np.diff(ids[order]) == 0) & (np.diff(prompt[order]) == 0)
    if twice.any():
        row = int(order[np.argmax(twice)])
        raise DataError(f"{prompts.name(row)} has two rows with completion_id {ids[row]}: each must be unique")
    return ids


def _prompts_table(prompts: _Prompts, found: Conflicts, schema: pa.Schema) -> pa.Table:
    columns = {
        "prompt_id": prompts.ids,
        "n_completions": found.n_completions,
        "kendall_tau_distance": found.kendall_tau_distance,
        "mean_abs_pacs": found.mean_abs_pacs,
        "max_abs_pacs": found.max_abs_pacs,
        "degenerate": found.degenerate,
    }
    if "category" in schema.names:
        columns["category"] = prompts.rows["category"].take(pa.array(prompts.starts))
    return pa.Table.from_pydict(columns, schema)


def _completions_table(prompts: _Prompts, found: Conflicts, schema: pa.Schema) -> pa.Table:
    columns = dict(zip(prompts.rows.column_names, prompts.rows.columns, strict=True))
    return pa.Table.from_pydict({**columns, "completion_id": _completion_ids(prompts), "pacs": found.pacs}, schema)


@contextmanager
def _writers(source: pa.Schema, prompts_out: Path, completions_out: Path) -> Iterator[tuple[Any, Any]]:
    """Writers of the two tables; both files appear under their names, or neither does."""
    present = {*source.names, "completion_id", "pacs"}
    absent = {"messages", "category"} - ({"category"} & set(source.names))
    prompts = pa.schema([f for f in PROMPTS_SCHEMA if f.name not in absent])
    others = [f for f in source if f.name not in COMPLETIONS_SCHEMA.names]
    completions = pa.schema([*(f for f in COMPLETIONS_SCHEMA if f.name in present), *others])
    with (
        atomic_path(prompts_out) as prompts_path,
        atomic_path(completions_out) as completions_path,
        _parquet_writer(prompts_path, prompts) as prompts_writer,
        _parquet_writer(completions_path, completions) as completions_writer,
    ):
        yield prompts_writer, completions_writer


def _parquet_writer(path: Path, schema: pa.Schema) -> Any:
    # A dictionary helps the prompt_id of many rows; for numbers that hardly repeat it is time lost.
    texts = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=texts)
