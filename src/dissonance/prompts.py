"""Files and datasets -> prompts.

A source is a file (JSONL, JSON, CSV, each also gzipped, or Parquet), a folder that `datasets.save_to_disk` wrote or
that `datasets.load_dataset` reads, or the name of a dataset on the hub, `owner/name` or `owner/name:config`.
A row's prompt is text, which becomes one user turn, or chat messages (TRL's conversational format).
"""

import csv
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dissonance.errors import DataError, SettingsError
from dissonance.parquet import open_parquet
from dissonance.prompt_table import PromptTable
from dissonance.records import Message, Prompt

PROMPT_COLUMNS = ("prompt", "messages", "text", "question", "instruction", "query")
ID_COLUMNS = ("id", "prompt_id")
CATEGORY_COLUMNS = ("category", "kind", "type")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")

Row = tuple[int, dict[str, Any]]
"""A row with its 1-based place: the line of a text file, else the row."""


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The prompts taken from a source, and what became of the others."""

    prompts: PromptTable
    """Distinct, in the order of the source."""

    n_rows: int
    """Rows read; with `limit`, reading stops once there are enough."""

    n_duplicates: int
    """Rows among them that repeated an earlier row's messages, and were dropped."""

    @property
    def summary(self) -> str:
        """One line for people, e.g. `64 of 5,707 distinct prompts (5,719 rows, 12 duplicates dropped)`."""
        distinct = self.n_rows - self.n_duplicates
        duplicates = f"{self.n_duplicates:,} duplicate{'' if self.n_duplicates == 1 else 's'} dropped"
        return f"{len(self.prompts):,} of {distinct:,} distinct prompts ({self.n_rows:,} rows, {duplicates})"


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where a row's fields are: of several names, the first that holds something."""

    prompt: str
    prompt_id: tuple[str, ...]
    category: tuple[str, ...]

    def names(self, found: Sequence[str]) -> list[str]:
        """List those that were found, each once."""
        return [name for name in dict.fromkeys((self.prompt, *self.prompt_id, *self.category)) if name in found]


@dataclass(frozen=True, slots=True)
class _Asked:
    """The columns the user named; None where they are to be found."""

    text: str | None
    id: str | None
    category: str | None

    def among(self, found: Sequence[str], where: str) -> _Columns:
        """Choose the columns to read, of those `found` (in JSON: in the first row)."""
        for option in ("text", "id", "category"):
            name = getattr(self, option)
            if name is not None and name not in found:
                raise DataError(f"{where}: no column {name!r} among {_listed(found)}: correct --{option}-column")
        prompt = self.text or next((name for name in PROMPT_COLUMNS if name in found), None)
        if prompt is None:
            known = ", ".join(PROMPT_COLUMNS)
            raise DataError(f"{where}: no prompt column ({known}) among {_listed(found)}: name it with --text-column")
        return _Columns(
            prompt,
            ID_COLUMNS if self.id is None else (self.id,),
            CATEGORY_COLUMNS if self.category is None else (self.category,),
        )


def load_prompts(
    source: str,
    *,
    split: str = "train",
    text_column: str | None = None,
    id_column: str | None = None,
    category_column: str | None = None,
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> LoadedPrompts:
    """Read the prompts of a file, a folder or a dataset, without duplicates.

    Unless named, the prompt's column is the first of `PROMPT_COLUMNS` that there is (in JSON: in the first row), and a
    row's id and category are the first of `ID_COLUMNS` and `CATEGORY_COLUMNS` that it has. In a `prompt` column, chat
    messages must end before the assistant's turn (one that ends with it is a prefill, which would be lost: an error);
    in any other column, assistant turns at the end are a reference answer and are dropped. A row without an id gets
    one made from its messages, the same wherever the row stands. A category that is not text is taken as its JSON.
    `split` is for datasets; a file has none.

    Rows with the same messages are one prompt, the first. Of these, `limit` keeps the first n, then `sample` draws n
    at random by `seed`, in the order of the source, or keeps all where there are fewer.

    Raises DataError, with the file and the line (Parquet, datasets: the row), for anything that cannot be read;
    SettingsError for a `limit`, `sample` or `seed` out of range.
    """
    for name, value in (("limit", limit), ("sample", sample)):
        if value is not None and value < 1:
            raise SettingsError(f"--{name} is {value}: give at least 1, or leave it out")
    if seed < 0:
        raise SettingsError(f"--seed is {seed}: give 0 or more")
    where, columns, rows = _open(source, split, _Asked(text_column, id_column, category_column))
    loaded = _distinct(where, columns, rows, limit)
    if not loaded.prompts:
        raise DataError(f"{where}: holds no prompts")
    if sample is None or sample >= len(loaded.prompts):
        return loaded
    drawn = np.sort(np.random.default_rng(seed).choice(len(loaded.prompts), size=sample, replace=False))
    return LoadedPrompts(loaded.prompts.take(drawn.tolist()), loaded.n_rows, loaded.n_duplicates)


def prompts_fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256, in hex, over ids, categories and messages in order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, prompt.category, *map(astuple, prompt.messages)]).encode() + b"\n")
    return digest.hexdigest()


def _distinct(where: str, columns: _Columns, rows: Iterable[Row], limit: int | None) -> LoadedPrompts:
    n_rows = 0

    def distinct() -> Iterator[Prompt]:
        nonlocal n_rows
        contents: set[str] = set()
        first_with: dict[str, tuple[int, str]] = {}
        for place, row in rows:
            n_rows += 1
            try:
                prompt, content = _prompt(row, columns)
            except DataError as error:
                raise DataError(f"{where}:{place}: {error}") from None
            earlier, its_content = first_with.setdefault(prompt.prompt_id, (place, content))
            if its_content != content:
                raise DataError(
                    f"{where}:{place}: id {prompt.prompt_id!r} already stands for another prompt at "
                    f"{where}:{earlier}: make the ids unique, or name another column with --id-column"
                )
            if content not in contents:
                contents.add(content)
                yield prompt

    prompts = PromptTable.of(islice(distinct(), limit))
    return LoadedPrompts(prompts, n_rows, n_rows - len(prompts))


def _prompt(row: dict[str, Any], columns: _Columns) -> tuple[Prompt, str]:
    """Return the prompt of a row and the digest of its messages."""
    if columns.prompt not in row:
        raise DataError(f"no column {columns.prompt!r} among {_listed(row)}")
    messages = _messages(row[columns.prompt], columns.prompt)
    content = hashlib.sha256(json.dumps([*map(astuple, messages)]).encode()).hexdigest()
    prompt_id = _identifier(_first_value(row, columns.prompt_id)) or content[:16]
    return Prompt(prompt_id, messages, _category(_first_value(row, columns.category))), content


def _first_value(row: dict[str, Any], names: Sequence[str]) -> object:
    return next((row[name] for name in names if row.get(name) not in (None, "")), None)


def _messages(value: object, column: str) -> tuple[Message, ...]:
    if isinstance(value, str) and column != "messages":
        if not value.strip():
            raise DataError(f"the prompt in column {column!r} is empty")
        return (Message("user", _encodable(value, "prompt")),)
    if not isinstance(value, list):
        expected = "a list of messages" if column == "messages" else "text or a list of messages"
        raise DataError(f"column {column!r} must hold {expected}, not {_kind(value)}")
    turns = [_message(turn, column) for turn in value]
    while column != "prompt" and turns and turns[-1].role == "assistant":
        turns.pop()
    if not turns or not turns[-1].content.strip():
        raise DataError(f"the prompt in column {column!r} is empty")
    if turns[-1].role == "assistant":
        raise DataError(f"the prompt in column {column!r} ends with the assistant's turn: end it before that turn")
    return tuple(turns)


def _message(turn: object, column: str) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        shown = f"keys {_listed(turn)}" if isinstance(turn, dict) else _kind(turn)
        raise DataError(f"a message in column {column!r} must be {{role, content}}, both text; found {shown}")
    return Message(turn["role"], _encodable(turn["content"], "prompt"))


def _identifier(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"the id must be text or an integer, not {_kind(value)}: name another column with --id-column")
    return _encodable(str(value), "id")


def _category(value: object) -> str | None:
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text and _encodable(text, "category")


def _encodable(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"the {name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    return text


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _kind(value: object) -> str:
    names: dict[object, str] = {
        str: "text",
        dict: "an object",
        list: "a list",
        bool: "a truth value",
        int: "an integer",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


_Opened = tuple[str, _Columns, Iterable[Row]]
"""The name to report by, the columns, and the rows."""


def _open(source: str, split: str, asked: _Asked) -> _Opened:
    path = Path(source)
    if path.exists():
        return _open_folder(path, split, asked) if path.is_dir() else _open_file(path, asked)
    # A bare name with a dot is a mistyped file far sooner than a dataset.
    if source.lower().endswith(SUFFIXES) or not _HUB_NAME.fullmatch(source) or ("." in source and "/" not in source):
        raise DataError(f"{source}: no such file")
    name, _, config = source.partition(":")
    return _open_hub(name, config or None, split, asked)


def _open_file(path: Path, asked: _Asked) -> _Opened:
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown format: use one of {', '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return _open_parquet(path, asked)
    rows = _csv_rows(path) if ".csv" in name[-7:] else _json_rows(path, lines=".jsonl" in name[-9:])
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path}: holds no prompts")
    return str(path), asked.among(list(first[1]), f"{path}:{first[0]}"), chain((first,), rows)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, gzipped or not; errors name the line."""
    place = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for place, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if place == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{place}: not UTF-8 (byte {error.object[error.start]:#04x}): re-encode it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}:{place + 1}: corrupt gzip ({error}): fetch or compress it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _json_rows(path: Path, *, lines: bool) -> Iterator[Row]:
    """Yield one object per line or, but for .jsonl, those of one list, whose place is their number in it."""
    text = enumerate(_lines(path), start=1)
    for place, line in text:
        if not line.strip():
            continue
        if not lines and line.lstrip().startswith("["):
            whole = "".join(chain((line,), (rest for _, rest in text)))
            for row, value in enumerate(_parsed(whole, path, place), start=1):
                yield row, _object(value, path, row)
        else:
            yield place, _object(_parsed(line, path, place), path, place)


def _parsed(text: str, path: Path, place: int) -> Any:
    try:
        return json.loads(text.rstrip())  # an error at the end is then on the last line, not after it
    except json.JSONDecodeError as error:
        where = f"{path}:{place + error.lineno - 1}"
        raise DataError(f"{where}: broken JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # an integer of more than 4300 digits; nesting without end
        raise DataError(f"{path}:{place}: broken JSON ({error})") from None


def _object(value: object, path: Path, place: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{path}:{place}: must be a JSON object such as {{"prompt": "..."}}, not {_kind(value)}')
    return value


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows under the header; a row's place is the line it starts on."""
    reader = csv.reader(_lines(path), strict=True)
    header: list[str] = []
    while True:
        place = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{place}: broken CSV ({error})") from None
        if fields is None:
            return
        if not fields:
            continue
        if not header:
            header = fields
        elif len(fields) != len(header):
            raise DataError(f"{path}:{place}: {len(fields)} fields where the header has {len(header)}")
        else:
            yield place, dict(zip(header, fields, strict=True))


@contextmanager
def _reading_parquet(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({_one_line(error)})") from None


def _open_parquet(path: Path, asked: _Asked) -> _Opened:
    with _reading_parquet(path):
        file = open_parquet(path)
        found = file.schema_arrow.names
    columns = asked.among(found, str(path))
    return str(path), columns, _parquet_rows(path, file, columns.names(found))


def _parquet_rows(path: Path, file: Any, names: list[str]) -> Iterator[Row]:
    with _reading_parquet(path):
        batches = file.iter_batches(batch_size=1024, columns=names)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _open_folder(path: Path, split: str, asked: _Asked) -> _Opened:
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _open_hub(str(path), None, split, asked)
    import datasets  # slow to import, and files need none of it

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever datasets, fsspec or pyarrow raise
        raise DataError(f"{path}: datasets cannot load it ({_one_line(error)})") from None
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{path}: no split {split!r} among {_listed(dataset)}: correct --split")
        dataset = dataset[split]
    return _open_dataset(dataset, str(path), asked)


def _open_hub(name: str, config: str | None, split: str, asked: _Asked) -> _Opened:
    import datasets  # slow to import, and files need none of it

    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # whatever datasets, the hub's client or pyarrow raise
        problem = f"neither a file nor a dataset with split {split!r}"
        raise DataError(f"{name}: {problem} ({_one_line(error)})") from None
    return _open_dataset(dataset, f"{name}[{split}]", asked)


def _open_dataset(dataset: Any, where: str, asked: _Asked) -> _Opened:
    columns = asked.among(dataset.column_names, where)
    return where, columns, enumerate(dataset.select_columns(columns.names(dataset.column_names)), start=1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
