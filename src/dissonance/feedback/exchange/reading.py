"""Files of labels -> rows, each with its place in the file, and the format that the rows are in.

The format is told by the content, never by the name. Every error is one line: the file, the place, what is wrong.
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.errors import DataError
from dissonance.records import RATINGS

ImportFormat = Literal["trl", "argilla", "label-studio", "csv"]
FORMATS: tuple[ImportFormat, ...] = get_args(ImportFormat)

Row = tuple[str, dict[str, Any]]
"""A row after its place, which is written behind the file's name: `:7` for a line, ` record 3`, ` row 3`."""

_TRUTH = {"yes": True, "no": False, "true": True, "false": False, "1": True, "0": False}
_ONE_OF = (
    "TRL preferences (prompt, chosen, rejected), Argilla's records, Label Studio's JSON or JSON_MIN, "
    "or CSV with query_id and annotator"
)


def read_rows(path: Path) -> list[Row]:
    """Every row of a Parquet, JSONL, JSON or CSV file; at least one.

    A folder that Argilla's `Dataset.to_disk` wrote stands for its records.

    Raises:
        DataError: the file is missing, empty, damaged, not UTF-8, or holds something else than rows.
    """
    file = path / "records.json" if path.is_dir() else path
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from None
    rows = _parquet_rows(file) if content.startswith(b"PAR1") else _text_rows(file, _decoded(file, content))
    if not rows:
        raise DataError(f"{file}: holds no labels")
    return rows


def format_of(path: Path, rows: list[Row]) -> ImportFormat:
    """Tell the format by the names in the first row."""
    names = rows[0][1].keys()
    if {"chosen", "rejected"} <= names:
        return "trl"
    if "fields" in names and {"responses", "suggestions"} & names:
        return "argilla"
    if "data" in names and {"annotations", "predictions"} & names:
        return "label-studio"
    if {"annotation_id", "annotator"} <= names:
        if _from_csv(rows):
            raise DataError(f"{path}: Label Studio's CSV leaves out what a label needs: export JSON or JSON_MIN")
        return "label-studio"
    if _from_csv(rows) and ("query_id" in names or {"prompt_id", "completion_ids"} <= names):
        return "csv"
    if any(name.endswith((".responses", ".suggestion")) for name in names):
        raise DataError(f"{path}: Argilla's flattened records: export them with flatten=False, or with to_json")
    found = ", ".join(repr(name) for name in list(names)[:8]) or "nothing"
    raise DataError(f"{path}: a row holds {found}, which is no known format: use {_ONE_OF}")


def text(value: object, name: str) -> str:
    """A text that a database and a file can hold; a DataError otherwise."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {short(value)}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} holds half of a surrogate pair, which is no text") from None
    if "\0" in value:
        raise DataError(f"{name} holds a NUL character: take it out")
    return value


def one_of(value: object, allowed: Collection[str], name: str) -> str:
    """A value if it is one of those allowed; a DataError that lists them otherwise."""
    if not isinstance(value, str) or value not in allowed:
        raise DataError(f"unknown {name} {short(value)}: use one of {', '.join(allowed)}")
    return value


def stars(value: object) -> int:
    """A rating from a JSON value."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in RATINGS:
        raise DataError(f"unknown rating {short(value)}: use a whole number from 1 to 5")
    return value


def truth(value: object, name: str) -> bool:
    """A truth, or a word for one as tables have it: yes, no, true, false, 1, 0."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise DataError(f"{name} is {short(value)}: it must be true or false")
    return _TRUTH[one_of(value.lower(), _TRUTH, f"value of {name}")]


def seconds(value: object, name: str) -> float:
    """A duration from a number, or from a text that writes one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise DataError(f"{name} is {short(value)}: write a number from 0 up")
    return number


def whole_number(value: str, name: str) -> int:
    """Read a whole number, such as `3`."""
    if not (value.isascii() and value.isdigit() and len(value) < 10):
        raise DataError(f"{name} is {short(value)}: write a whole number")
    return int(value)


def whole_numbers(value: str, name: str) -> tuple[int, ...]:
    """Read whole numbers between commas or blanks, such as `3,1`."""
    parts = value.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise DataError(f"{name} is {short(value)}: write whole numbers, such as 3,1")
    return tuple(map(int, parts))


def short(value: object) -> str:
    """A value as an error shows it."""
    try:
        shown = repr(value)
    except RecursionError:
        shown = f"a {type(value).__name__} nested too deep to show"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _from_csv(rows: list[Row]) -> bool:
    # Only a table's cells are texts throughout; JSON_MIN has the number of an annotation.
    return all(isinstance(value, str) for value in rows[0][1].values())


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte {content[error.start]:#04x}): re-encode it, in a spreadsheet as CSV UTF-8"
        ) from None


def _text_rows(path: Path, content: str) -> list[Row]:
    start = content.lstrip()[:1]
    if not start:
        raise DataError(f"{path}: the file is empty")
    if start == "[":
        return _json_rows(path, content)
    return _jsonl_rows(path, content) if start == "{" else _csv_rows(path, content)


def _json_rows(path: Path, content: str) -> list[Row]:
    rows = _parsed(path, content, 1)
    return [(f" record {number}", _object(path, f" record {number}", row)) for number, row in enumerate(rows, 1)]


def _jsonl_rows(path: Path, content: str) -> list[Row]:
    # Not splitlines: U+2028 and its like may stand in a JSON string.
    lines = enumerate(content.split("\n"), 1)
    return [(f":{n}", _object(path, f":{n}", _parsed(path, line, n))) for n, line in lines if line.strip()]


def _parsed(path: Path, content: str, first_line: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        cut_off = error.pos >= len(content.rstrip()) or error.msg.startswith("Unterminated")
        hint = " (is the file cut off?)" if cut_off else ""
        raise DataError(f"{path}:{line}: not valid JSON at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{path}:{first_line}: JSON nested too deep to be labels") from None
    except ValueError:  # Python reads no whole number of so many digits
        limit = sys.get_int_max_str_digits()
        long = re.search(rf"\d{{{limit + 1}}}", content)
        line = first_line + content.count("\n", 0, long.start() if long else 0)
        raise DataError(f"{path}:{line}: a number of more than {limit} digits is no label's") from None


def _object(path: Path, place: str, row: object) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{path}{place}: {short(row)} is no JSON object")
    return row


def _csv_rows(path: Path, content: str) -> list[Row]:
    delimiter = _delimiter(content)
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    line = 1
    try:
        header = [name.strip() for name in next(reader)]
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column stands twice in {', '.join(header)}: rename or drop one")
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                if len(cells) != len(header):
                    raise DataError(f"{path}:{line}: {len(cells)} cells under {len(header)} columns")
                row = dict(zip(header, cells, strict=True))
                if delimiter == ";" and "seconds" in row:
                    row["seconds"] = row["seconds"].replace(",", ".")
                rows.append((f":{line}", row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}") from None
    return rows


def _delimiter(content: str) -> str:
    """What stands between the names of the columns: spreadsheets write semicolons where the comma is in numbers."""
    header = content.lstrip("\r\n").partition("\n")[0]
    return max(",;\t", key=header.count)


def _parquet_rows(path: Path) -> list[Row]:
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: damaged Parquet ({reason}): write it again") from None
    return [(f" row {number}", row) for number, row in enumerate(rows, 1)]
