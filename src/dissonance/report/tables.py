"""The tables of a run, read so that millions of rows fit: numbers whole, text only for the rows that are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dissonance.errors import RunError
from dissonance.likelihood import Likelihood, loglikelihood
from dissonance.parquet import open_parquet

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

_BATCH_ROWS = 1 << 16
_PROMPT_COLUMNS = (
    "prompt_id",
    "category",
    "n_completions",
    "kendall_tau_distance",
    "mean_abs_pacs",
    "degenerate",
)
_COMPLETION_COLUMNS = (
    "reward",
    "logprob",
    "ref_logprob",
    "pacs",
    "n_tokens",
    "finish_reason",
    "reward_truncated",
)
_OPTIONAL = frozenset({"category", "ref_logprob", "n_tokens", "finish_reason", "reward_truncated"})


@dataclass(frozen=True)
class Prompts:
    """The numbers of `prompts.parquet`, P rows."""

    n_completions: Integers
    """(P,) N of each prompt."""

    distance: Floats
    """(P,) Kendall-tau distance, in [0, 1]."""

    mean_abs_pacs: Floats
    """(P,) in [0, 2]."""

    degenerate: Booleans
    """(P,) whether all rewards or all log-likelihoods of the prompt are equal."""

    category: Integers | None
    """(P,) index into `category_names`, -1 where there is none; None when no prompt has one."""

    category_names: tuple[str, ...]


@dataclass(frozen=True)
class Completions:
    """The numbers of `completions.parquet`, C rows."""

    prompt: Integers
    """(C,) row of the prompt in `Prompts`."""

    reward: Floats
    """(C,) higher is better."""

    loglikelihood: Floats
    """(C,) in the run's reading: nats, or nats per token."""

    pacs: Floats
    """(C,) 0 where the prompt is degenerate."""

    n_tokens: Integers | None
    """(C,) or None when a score came without its token count."""

    cut_answers: int
    """Completions that ended at the token limit rather than of themselves."""

    cut_rewards: int
    """Completions that the reward model could not read to the end."""


def read_prompts(path: Path) -> tuple[Prompts, pa.Array]:
    """Read the numbers of `prompts.parquet`, and the prompt ids in row order."""
    with open_table(path) as file:
        table = file.read(columns=_present(file, path, _PROMPT_COLUMNS)).combine_chunks()
    names: tuple[str, ...] = ()
    category = None
    if "category" in table.column_names and table["category"].null_count < len(table):
        encoded = pc.dictionary_encode(table["category"]).combine_chunks()
        names = tuple(encoded.dictionary.to_pylist())
        category = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    prompts = Prompts(
        n_completions=_integers(table["n_completions"]),
        distance=_floats(table["kendall_tau_distance"]),
        mean_abs_pacs=_floats(table["mean_abs_pacs"]),
        degenerate=pc.fill_null(table["degenerate"], True).to_numpy().astype(np.bool_),
        category=category,
        category_names=names,
    )
    return prompts, table["prompt_id"].combine_chunks()


def read_completions(path: Path, prompt_ids: pa.Array, likelihood: Likelihood) -> Completions:
    """Read the numbers of `completions.parquet`; `prompt_ids` are those of the prompts, in their row order."""
    parts: dict[str, list[NDArray[Any]]] = {}
    arrays: dict[str, NDArray[Any]]
    cut_answers = cut_rewards = 0
    with open_table(path) as file:
        prompt = _prompt_rows(file, path, prompt_ids)
        columns = _present(file, path, _COMPLETION_COLUMNS)
        for batch in file.iter_batches(batch_size=1 << 20, columns=columns):
            rows = pa.Table.from_batches([batch])
            arrays = {
                "reward": _floats(rows["reward"]),
                "loglikelihood": loglikelihood(rows, likelihood),
                "pacs": _floats(rows["pacs"]),
            }
            if "n_tokens" in columns and not rows["n_tokens"].null_count:
                arrays["n_tokens"] = _integers(rows["n_tokens"])
            for name, values in arrays.items():
                parts.setdefault(name, []).append(values)
            if "finish_reason" in columns:
                cut_answers += pc.sum(pc.equal(rows["finish_reason"], "length")).as_py() or 0
            if "reward_truncated" in columns:
                cut_rewards += pc.sum(rows["reward_truncated"]).as_py() or 0
    numbers = {name: np.concatenate(chunks) for name, chunks in parts.items()}
    n_tokens = numbers.pop("n_tokens", None)
    return Completions(
        prompt=prompt,
        n_tokens=n_tokens if n_tokens is not None and len(n_tokens) == len(prompt) else None,
        cut_answers=cut_answers,
        cut_rewards=cut_rewards,
        **numbers,
    )


def _prompt_rows(file: pq.ParquetFile, path: Path, prompt_ids: pa.Array) -> Integers:
    """(C,) row of each completion's prompt; all at once, since the ids are hashed anew at every call."""
    _present(file, path, ("prompt_id",))
    rows = pc.index_in(file.read(columns=["prompt_id"])["prompt_id"], value_set=prompt_ids)
    if not len(rows):
        raise RunError(f"{path} has no rows: there is nothing to report")
    if rows.null_count:
        raise RunError(f"{path} has completions of prompts that prompts.parquet lacks: run the command again")
    return _integers(rows)


def read_rows(path: Path, rows: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Read the given rows, keyed by row number, with those of `columns` that the file has.

    Row groups without a wanted row are not touched, the others pass by in small batches, so that memory stays flat.
    """
    wanted = np.unique(np.fromiter(rows, dtype=np.int64))
    found: dict[int, dict[str, Any]] = {}
    with open_table(path) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            inside = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)]
            if len(inside) and present:
                found |= _rows_of_group(file, group, start, inside, present)
            start = end
    return found


def _rows_of_group(
    file: pq.ParquetFile, group: int, start: int, rows: Integers, columns: list[str]
) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
        end = start + batch.num_rows
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)]
        if len(inside):
            found.update(zip(inside.tolist(), batch.take(pa.array(inside - start)).to_pylist(), strict=True))
        start = end
    return found


def open_table(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; one that is missing or damaged is a RunError."""
    if not path.is_file():
        raise RunError(f"{path} is missing: the run is not finished, run its command again")
    try:
        return open_parquet(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read ({reason}): delete it and run the command again") from error


def _present(file: pq.ParquetFile, path: Path, columns: Sequence[str]) -> list[str]:
    names = set(file.schema_arrow.names)
    for name in columns:
        if name not in names and name not in _OPTIONAL:
            raise RunError(f"{path} has no column {name!r}: it is not a table of this run, run its command again")
    return [name for name in columns if name in names]


def _floats(column: pa.Array | pa.ChunkedArray) -> Floats:
    array: Floats = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return array


def _integers(column: pa.Array | pa.ChunkedArray) -> Integers:
    array: Integers = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return array
