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
    "max_abs_pacs",
    "degenerate",
)
_COMPLETION_COLUMNS = (
    "prompt_id",
    "completion_id",
    "reward",
    "logprob",
    "pacs",
    "n_tokens",
    "finish_reason",
    "reward_truncated",
)
_OPTIONAL = frozenset({"category", "n_tokens", "finish_reason", "reward_truncated"})


@dataclass(frozen=True)
class Prompts:
    """The numbers of `prompts.parquet`, P rows."""

    n_completions: Integers
    """(P,) N of each prompt."""

    distance: Floats
    """(P,) Kendall-tau distance, in [0, 1]."""

    mean_abs_pacs: Floats
    """(P,) in [0, 2]."""

    max_abs_pacs: Floats
    """(P,)"""

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

    logprob: Floats
    """(C,) nats."""

    pacs: Floats
    """(C,) 0 where the prompt is degenerate."""

    n_tokens: Integers | None
    """(C,) or None when the scores came without token counts."""

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
        max_abs_pacs=_floats(table["max_abs_pacs"]),
        degenerate=pc.fill_null(table["degenerate"], True).to_numpy().astype(np.bool_),
        category=category,
        category_names=names,
    )
    return prompts, table["prompt_id"].combine_chunks()


def read_completions(path: Path, prompt_ids: pa.Array) -> Completions:
    """Read the numbers of `completions.parquet`; `prompt_ids` are those of the prompts, in their row order."""
    parts: dict[str, list[NDArray[Any]]] = {"prompt": []}
    cut_answers = cut_rewards = 0
    with open_table(path) as file:
        columns = [name for name in _present(file, path, _COMPLETION_COLUMNS) if name != "completion_id"]
        numbers = [name for name in ("reward", "logprob", "pacs", "n_tokens") if name in columns]
        for batch in file.iter_batches(batch_size=1 << 20, columns=columns):
            code = pc.index_in(batch["prompt_id"], value_set=prompt_ids)
            if code.null_count:
                raise RunError(f"{path} has completions of prompts that prompts.parquet lacks: run the command again")
            parts["prompt"].append(_integers(code))
            for name in numbers:
                convert = _integers if name == "n_tokens" else _floats
                parts.setdefault(name, []).append(convert(batch[name]))
            if "finish_reason" in columns:
                cut_answers += pc.sum(pc.equal(batch["finish_reason"], "length")).as_py() or 0
            if "reward_truncated" in columns:
                cut_rewards += pc.sum(batch["reward_truncated"]).as_py() or 0
    if not parts["prompt"]:
        raise RunError(f"{path} has no rows: there is nothing to report")
    arrays = {name: np.concatenate(chunks) for name, chunks in parts.items()}
    return Completions(
        n_tokens=arrays.pop("n_tokens", None),
        cut_answers=cut_answers,
        cut_rewards=cut_rewards,
        **arrays,
    )


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
        return pq.ParquetFile(path)
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
