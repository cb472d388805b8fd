"""Files of scored completions, read as a stream of record batches with a row per completion.

    Parquet (a file, or a folder with or without key=value subfolders), JSONL, CSV; the last two plain or gzipped

Three layouts are understood, told apart by the columns:

    a row per completion   prompt_id, reward, logprob
    a row per prompt       prompt_id, and lists in reward and logprob
    a row per prompt       prompt_id, reward_0 .. reward_{N-1}, logprob_0 .. logprob_{N-1}

Other columns of `COMPLETIONS_SCHEMA` follow reward and logprob in this; the rest of a prompt's row is repeated for each
of its completions. CSV knows no types: there, columns that the schema does not name stay text.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.dataset as pa_dataset
import pyarrow.json as pa_json

from dissonance.errors import DataError
from dissonance.parquet import open_parquet
from dissonance.records import COMPLETIONS_SCHEMA

Batches = Iterator[pa.RecordBatch]

_TYPES: dict[str, pa.DataType] = {f.name: f.type for f in COMPLETIONS_SCHEMA} | {"category": pa.string()}
_PER_COMPLETION = [name for name in COMPLETIONS_SCHEMA.names if name not in {"prompt_id", "pacs"}]
_NEEDED = "needed are prompt_id, reward and logprob (or reward_0, reward_1, .. and logprob_0, logprob_1, ..)"
_UNREADABLE = (pa.ArrowException, OSError, EOFError, zlib.error)
_BATCH_BYTES = 16 << 20
_BLOCK_BYTES_PER_ROW = 64
_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows that can be read from the start any number of times."""

    schema: pa.Schema
    """The columns of every batch; those of `COMPLETIONS_SCHEMA` have its types."""

    nbytes: int
    """About what all rows would take in memory."""

    read: Callable[[], Batches]
    """Start a pass over the rows, in the order of the file; no batch is empty."""


def open_scored(source: Path, batch_rows: int) -> ScoredRows:
    """Find out what a file holds; it is then read in batches of at most `batch_rows` of its rows.

    Raises:
        DataError: a missing, empty or unreadable file, an unknown extension, or columns that make none of the layouts;
            while reading, broken content, with its line where the format has lines. The caller names the file.
    """
    if not source.exists():
        raise DataError("no such file or folder: check the path")
    name, block_bytes = source.name.lower(), _BLOCK_BYTES_PER_ROW * batch_rows
    if source.is_dir() or name.endswith(".parquet"):
        return _to_long(_parquet(source, batch_rows))
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _to_long(_jsonl(source, block_bytes))
    if name.endswith((".csv", ".csv.gz")):
        return _to_long(_csv(source, block_bytes))
    raise DataError("unknown kind of file: use .parquet (or a folder of them), .jsonl, .jsonl.gz, .csv or .csv.gz")


def _parquet(source: Path, batch_rows: int) -> ScoredRows:
    files = [source] if source.is_file() else _visible(source)
    if not files:
        raise DataError("the folder holds no .parquet file")
    base = str(source if source.is_dir() else source.parent)
    try:
        dataset = pa_dataset.dataset(
            [str(f) for f in files], format="parquet", partitioning="hive", partition_base_dir=base
        )
        fragments = list(dataset.get_fragments())
        schemas = [fragment.physical_schema for fragment in fragments]
        schema = pa.unify_schemas([*schemas, dataset.schema], promote_options="permissive")
        groups = [group for fragment in fragments for group in fragment.row_groups]
    except _UNREADABLE as error:
        raise DataError(f"not readable as Parquet: {_first_line(error)}") from error
    nbytes, rows = sum(group.total_byte_size for group in groups), sum(group.num_rows for group in groups)
    batch_rows = max(1, min(batch_rows, _BATCH_BYTES * rows // max(1, nbytes)))

    def read() -> Batches:
        for fragment in fragments:
            try:
                yield from _fragment(fragment, batch_rows)
            except _UNREADABLE as error:
                shard = "" if source.is_file() else f"{os.path.relpath(fragment.path, source)}: "
                raise DataError(f"{shard}not readable as Parquet: {_first_line(error)}") from error

    return ScoredRows(schema, nbytes, read)


def _visible(folder: Path) -> list[Path]:
    """Parquet files, but for those that Spark and others hide behind `_` and `.`."""
    found = (path for path in sorted(folder.rglob("*.parquet")) if path.is_file())
    return [p for p in found if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]


def _fragment(fragment: Any, batch_rows: int) -> Batches:
    keys = pa_dataset.get_partition_keys(fragment.partition_expression)
    with open_parquet(fragment.path) as file:  # fragment.to_batches holds a whole row group, however large
        for batch in file.iter_batches(batch_rows):
            table = batch
            for name in keys.keys() - set(batch.schema.names):
                table = table.append_column(name, pa.repeat(keys[name], batch.num_rows))
            yield table


def _csv(source: Path, block_bytes: int) -> ScoredRows:
    names = _csv_names(source, block_bytes)
    types = {name: _csv_type(name) for name in names}

    def read() -> Batches:
        try:
            with _stream(source) as stream, _open_csv(stream, block_bytes, types) as reader:
                yield from reader
        except _UNREADABLE as error:
            raise _csv_error(source, types, error) from error

    return ScoredRows(pa.schema(list(types.items())), _size(source), read)


def _csv_names(source: Path, block_bytes: int) -> list[str]:
    try:
        with _stream(source) as stream, _open_csv(stream, block_bytes, {}) as reader:
            names: list[str] = reader.schema.names
    except _UNREADABLE as error:
        raise _csv_error(source, {}, error) from error
    _check_distinct(names)
    return names


def _csv_type(name: str) -> pa.DataType:
    stem, _, number = name.rpartition("_")
    return _TYPES.get(stem if number.isdecimal() and stem in _PER_COMPLETION else name, pa.string())


def _open_csv(stream: IO[bytes], block_bytes: int, types: dict[str, pa.DataType]) -> Any:
    return pa_csv.open_csv(
        stream,
        read_options=pa_csv.ReadOptions(block_size=block_bytes),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types),
    )


def _csv_error(source: Path, types: dict[str, pa.DataType], error: Exception) -> DataError:
    """Find the line that pyarrow stumbled over, by reading the file again in a simpler way."""
    line = 0
    try:
        with _stream(source) as stream:
            rows = csv.reader(text.decode() for text in stream)
            header = next(rows, [])
            for row in rows:
                line = rows.line_num
                if row and (problem := _row_problem(row, header, types)):
                    return DataError(f"line {line}: {problem}")
    except UnicodeDecodeError as undecodable:
        return DataError(f"line {line + 1}: not valid UTF-8: {undecodable.reason}")
    except (*_UNREADABLE, csv.Error):
        pass  # what pyarrow said is as good
    return DataError(f"not readable as CSV: {_first_line(error)}")


def _row_problem(row: list[str], header: list[str], types: dict[str, pa.DataType]) -> str | None:
    if len(row) != len(header):
        return f"{len(row)} fields where the header has {len(header)}"
    missing = set(pa_csv.ConvertOptions().null_values)
    for name, cell in zip(header, row, strict=True):
        kind = types.get(name, pa.string())
        if cell in missing or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            continue
        try:
            int(cell) if pa.types.is_integer(kind) else float(cell)
        except ValueError:
            return f"{name} is {cell!r}, not {'a whole' if pa.types.is_integer(kind) else 'a'} number"
    return None


def _jsonl(source: Path, block_bytes: int) -> ScoredRows:
    # Types are settled over the whole file first: a column may be null or whole numbers for a million lines.
    schema = pa.schema([])
    for first, block in _line_blocks(source, block_bytes):
        found = _parse_json(first, block, None).schema
        found = pa.schema([(field.name, _without_timestamps(field.type)) for field in found])
        try:
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"at or after line {first}: {_first_line(error)}") from error

    def read() -> Batches:
        for first, block in _line_blocks(source, block_bytes):
            yield from _parse_json(first, block, schema).to_batches()

    return ScoredRows(schema, _size(source), read)


def _line_blocks(source: Path, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Whole lines of about `block_bytes` in all, with the number of their first, from 1; never a blank block."""
    first, rest = 1, b""
    try:
        with _stream(source) as stream:
            while chunk := stream.read(block_bytes):
                rest += chunk
                end = rest.rfind(b"\n") + 1
                if rest[:end].strip():
                    yield first, rest[:end]
                first += rest.count(b"\n", 0, end)
                rest = rest[end:]
    except _UNREADABLE as error:
        raise DataError(f"not readable: {_first_line(error)}") from error
    if rest.strip():
        yield first, rest


def _parse_json(first: int, block: bytes, schema: pa.Schema | None) -> pa.Table:
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore" if schema else "infer")
    try:
        block.decode()  # pyarrow would let invalid UTF-8 pass
        one_block = pa_json.ReadOptions(block_size=len(block))
        return pa_json.read_json(pa.BufferReader(block), read_options=one_block, parse_options=options)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _json_error(first, block, error) from error


def _json_error(first: int, block: bytes, error: Exception) -> DataError:
    kinds: dict[str, str] = {}
    for number, line in enumerate(block.split(b"\n"), first):
        if line.strip() and (problem := _line_problem(line, kinds)):
            return DataError(f"line {number}: {problem}")
    return DataError(f"at or after line {first}: {_first_line(error)}")


def _line_problem(line: bytes, kinds: dict[str, str]) -> str | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} at column {error.colno}"
    except UnicodeDecodeError as error:
        return f"not valid UTF-8: {error.reason}"
    if not isinstance(value, dict):
        return "not a JSON object"
    for key, item in value.items():
        kind = _KINDS.get(type(item))
        if kind and kinds.setdefault(key, kind) != kind:
            return f"{key} is {kind} here and {kinds[key]} before"
    return None


def _without_timestamps(kind: pa.DataType) -> pa.DataType:
    """Put strings for the timestamps that pyarrow sees in every text that looks like a date."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_timestamps(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_timestamps(field.type)) for field in kind])
    return kind


def _to_long(rows: ScoredRows) -> ScoredRows:
    """Give the same rows, one per completion, in the contract's types."""
    families = _families(rows.schema.names)
    types = _column_types(rows.schema, families)
    exploded = [name for name in _PER_COMPLETION if name in types and _is_list_of(types[name], _TYPES[name])]
    if ("reward" in exploded) != ("logprob" in exploded):
        raise DataError("of reward and logprob, one is a list and one is not: both must be lists, or neither")
    schema = pa.schema([(name, _TYPES.get(name, kind)) for name, kind in types.items() if name != "pacs"])

    def read() -> Batches:
        done = 0
        for batch in rows.read():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            columns |= {stem: _gather(batch, stem, members) for stem, members in families.items()}
            long = _conform(_explode(columns, exploded) if "reward" in exploded else columns, schema)
            _check_named(long.column("prompt_id"), done)
            done += long.num_rows
            if long.num_rows:
                yield long

    return ScoredRows(schema, rows.nbytes, read)


def _column_types(schema: pa.Schema, families: dict[str, list[str]]) -> dict[str, pa.DataType]:
    """Check the columns, and give their types with each family as a column of lists."""
    names = schema.names
    if not names:
        raise DataError("the file is empty")
    _check_distinct(names)
    lacking = [name for name in ("prompt_id", "reward", "logprob") if name not in {*names, *families}]
    if lacking:
        raise DataError(f"no column {' and no '.join(lacking)}: found {', '.join(names)}; {_NEEDED}")
    members = {name for family in families.values() for name in family}
    types = {f.name: _decoded(f.type) for f in schema if f.name not in members}
    types |= {stem: pa.list_(_TYPES[stem]) for stem in families}
    kind = types["prompt_id"]
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"prompt_id holds {kind}: it must be text or whole numbers")
    return types


def _families(names: list[str]) -> dict[str, list[str]]:
    """Columns such as reward_0, reward_1, .. by what they stand for; none where there is a plain reward column."""
    members = {
        stem: list(takewhile(set(names).__contains__, (f"{stem}_{i}" for i in count())))
        for stem in _PER_COMPLETION
        if stem not in names
    }
    return {stem: found for stem, found in members.items() if found} if "reward" not in names else {}


def _is_list_of(kind: pa.DataType, value: pa.DataType) -> bool:
    def depth(t: pa.DataType) -> int:
        nested = pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)
        return 1 + depth(t.value_type) if nested else 0

    return depth(kind) > depth(value)


def _gather(batch: pa.RecordBatch, stem: str, members: list[str]) -> pa.Array:
    rows, n = batch.num_rows, len(members)
    values = pa.concat_arrays([_cast(batch.column(name), name, _TYPES[stem]) for name in members])
    row_by_row = np.arange(n * rows).reshape(n, rows).T.ravel()
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * n, values.take(pa.array(row_by_row)))


def _explode(columns: dict[str, pa.Array], exploded: list[str]) -> dict[str, pa.Array]:
    lengths = pc.fill_null(pc.list_value_length(columns["reward"]), 0).to_numpy()
    for name in exploded:
        other = pc.fill_null(pc.list_value_length(columns[name]), 0).to_numpy()
        wrong = np.flatnonzero((other != lengths) | (other == 0))
        if wrong.size:
            row = int(wrong[0])
            prompt = str(columns["prompt_id"][row])
            raise DataError(f"prompt {prompt!r} has {lengths[row]} reward and {other[row]} {name} values: give as many")
    parents = pa.array(np.repeat(np.arange(lengths.size), lengths))
    return {
        name: pc.list_flatten(column) if name in exploded else column.take(parents) for name, column in columns.items()
    }


def _conform(columns: dict[str, pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    rows = len(columns["prompt_id"])
    return pa.record_batch(
        [_cast(columns[f.name], f.name, f.type) if f.name in columns else pa.nulls(rows, f.type) for f in schema],
        schema=schema,
    )


def _cast(column: pa.Array, name: str, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind)
    except pa.ArrowException as error:
        raise DataError(f"column {name} cannot be read as {kind}: {_first_line(error)}") from error


def _decoded(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_named(prompt_ids: pa.Array, before: int) -> None:
    nameless = pc.fill_null(pc.equal(prompt_ids, ""), True).to_numpy(zero_copy_only=False)
    if nameless.any():
        raise DataError(f"completion {before + int(np.argmax(nameless)) + 1} has no prompt_id: every row needs one")


def _check_distinct(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"column {', '.join(twice)} stands more than once: rename or drop one")


def _stream(source: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(source)) if source.name.lower().endswith(".gz") else source.open("rb")


def _size(source: Path) -> int:
    return source.stat().st_size * (8 if source.name.lower().endswith(".gz") else 1)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
