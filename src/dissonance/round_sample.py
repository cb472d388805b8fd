"""A random sample of a round's prompts with all their completions, so that pictures of any round fit into memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.errors import RunError
from dissonance.parquet import open_parquet

MOST_COMPLETIONS = 1 << 16
"""Of a larger round, prompts with about so many completions are drawn."""

_TABLES = ("prompts.parquet", "completions.parquet")
_BATCH_ROWS = 1 << 14


@contextmanager
def sampled(folder: Path, columns: Sequence[Sequence[str] | None] = (None, None)) -> Iterator[Path]:
    """A folder with the round's two tables, or with a sample of them: the same one at every call.

    Args:
        folder: the round's; the completions stand in the order of their prompts.
        columns: of the prompts, n_completions among them, and of the completions; None for all.

    Raises:
        RunError: the completions stand in another order.
    """
    total = _completions_in(folder)
    if total <= MOST_COMPLETIONS:
        yield folder
        return
    prompts, completions = (open_parquet(folder / name) for name in _TABLES)
    of_prompts, of_completions = (None if some is None else ["prompt_id", *some] for some in columns)
    with prompts, completions, TemporaryDirectory(prefix="dissonance-") as name:
        taken = _prompts(prompts, of_prompts, MOST_COMPLETIONS / total, Path(name) / _TABLES[0])
        _completions(completions, of_completions, taken, Path(name) / _TABLES[1])
        yield Path(name)


def _completions_in(folder: Path) -> int:
    """How many there are; 0 where a table is missing or damaged, which whoever reads it says."""
    try:
        prompts, completions = (pq.read_metadata(folder / name).num_rows for name in _TABLES)
        return int(completions) if prompts else 0
    except (OSError, pa.ArrowInvalid):
        return 0


class _Taken:
    """Which prompts were drawn: their ids, and the rows [start, end) of their completions, in order."""

    def __init__(self, ids: pa.ChunkedArray, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> None:
        self.ids, self.starts, self.ends = ids, starts, ends

    def rows(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which of `count` completions from `first` on belong to a drawn prompt."""
        rows = np.arange(first, first + count)
        at = np.minimum(np.searchsorted(self.ends, rows, "right"), len(self.ends) - 1)
        return (self.starts[at] <= rows) & (rows < self.ends[at])


def _prompts(file: pq.ParquetFile, columns: list[str] | None, share: float, out: Path) -> _Taken:
    count, before, seen = file.metadata.num_rows, 0, 0
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, size=max(1, round(share * count)), replace=False, shuffle=False))
    ids, starts, ends = [], [], []
    with pq.ParquetWriter(out, _schema(file, columns)) as writer:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            table = pa.Table.from_batches([batch])
            n = table["n_completions"].to_numpy().astype(np.int64)
            end = before + np.cumsum(n)
            drawn = np.isin(np.arange(seen, seen + len(n)), chosen)
            seen += len(n)
            kept = table.filter(pa.array(drawn))
            writer.write_table(kept)
            ids.append(kept["prompt_id"])
            starts.append((end - n)[drawn])
            ends.append(end[drawn])
            before = int(end[-1])
    return _Taken(
        pa.chunked_array([c for one in ids for c in one.chunks]), np.concatenate(starts), np.concatenate(ends)
    )


def _completions(file: pq.ParquetFile, columns: list[str] | None, taken: _Taken, out: Path) -> None:
    first, ids = 0, []
    with pq.ParquetWriter(out, _schema(file, columns)) as writer:
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            kept = pa.Table.from_batches([batch]).filter(pa.array(taken.rows(first, batch.num_rows)))
            writer.write_table(kept)
            ids.append(kept["prompt_id"])
            first += batch.num_rows
    if (
        _one(ids).to_pylist()
        != taken.ids.take(np.repeat(np.arange(len(taken.ids)), taken.ends - taken.starts)).to_pylist()
    ):
        raise RunError(f"{out.name} does not stand in the order of its prompts: run the command again")


def _schema(file: pq.ParquetFile, columns: list[str] | None) -> pa.Schema:
    schema = file.schema_arrow
    return schema if columns is None else pa.schema([schema.field(name) for name in columns])


def _one(columns: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
