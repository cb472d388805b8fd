"""Preferences as files and as a training set: reading, writing, mixing the original with the new, resampling.

A row is TRL's: `prompt`, `chosen` and `rejected` as conversations or as plain text; or, without a prompt, `chosen` and
`rejected` as whole conversations that differ in their last turn. Beside them, where known: `weight`, `source`, `tie`,
`chosen_safe`, `rejected_safe`, `prompt_id`.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dissonance.artifacts import write_table
from dissonance.errors import DataError, SettingsError
from dissonance.records import Message, Preference

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
PAIRS_SCHEMA = pa.schema(
    [
        ("prompt", _TURNS),
        ("chosen", _TURNS),
        ("rejected", _TURNS),
        ("weight", pa.float64()),
        ("source", pa.string()),
        ("prompt_id", pa.string()),
        ("tie", pa.bool_()),
        ("chosen_safe", pa.bool_()),
        ("rejected_safe", pa.bool_()),
    ]
)
"""`chosen_safe` and `rejected_safe` are only there where something is known of safety."""


def read_preferences(path: Path | str) -> list[Preference]:
    """Every preference of a .jsonl, .jsonl.gz or .parquet file, in its order; at least one.

    Raises:
        DataError: the file is missing, empty, damaged, of another kind, or a row is no preference; with the line (in
            Parquet, the row).
    """
    path = Path(path)
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    preferences = []
    for place, row in rows:
        try:
            preferences.append(_preference(row))
        except DataError as error:
            raise DataError(f"{path}{place}: {error}") from None
    if not preferences:
        raise DataError(f"{path}: holds no preferences")
    return preferences


def write_pairs(path: Path | str, preferences: Sequence[Preference]) -> None:
    """Write preferences as Parquet that `read_preferences`, and any trainer of TRL's format, reads; atomically."""
    write_table(Path(path), pairs_table(preferences))


def pairs_table(preferences: Sequence[Preference]) -> pa.Table:
    """The preferences as a table of `PAIRS_SCHEMA`."""
    rows = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in pair.messages],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            **{name: getattr(pair, name) for name in PAIRS_SCHEMA.names[3:]},
        }
        for pair in preferences
    ]
    unknown = all(pair.chosen_safe is None and pair.rejected_safe is None for pair in preferences)
    kept = [field for field in PAIRS_SCHEMA if not (unknown and field.name.endswith("_safe"))]
    return pa.Table.from_pylist(rows, pa.schema(kept))


def mix(original: Sequence[Preference], new: Sequence[Preference], new_weight: float | None) -> list[Preference]:
    """The original pairs and then the new, with weights whose mean is 1.

    Within each of the two, weights keep their proportions. `new_weight` is the share of all weight that the new pairs
    carry together; None lets the two weigh as the square roots of what they hold, so that 300 new pairs beside 2,000
    carry 28 %, beside 100,000 carry 5 %: more than their number, less than an equal part.

    Raises:
        SettingsError: `new_weight` is not between 0 and 1.
    """
    if new_weight is not None and not 0 < new_weight < 1:
        raise SettingsError(f"new_weight is {new_weight}: give a share between 0 and 1, or leave it out")
    sums = [sum(pair.weight for pair in part) for part in (original, new)]
    share = new_share(sums[0], sums[1], new_weight)
    total = len(original) + len(new)
    return [
        replace(pair, weight=pair.weight / weight * part_share * total)
        for part, weight, part_share in ((original, sums[0], 1 - share), (new, sums[1], share))
        for pair in part
    ]


def new_share(original: float, new: float, new_weight: float | None) -> float:
    """The share of the new pairs in all weight, given the two sums of weights; see `mix`."""
    if not original or not new:
        return float(bool(new))
    return float(np.sqrt(new) / (np.sqrt(original) + np.sqrt(new))) if new_weight is None else new_weight


def resample(preferences: Sequence[Preference], rng: np.random.Generator) -> list[Preference]:
    """As many preferences, drawn with replacement: a bootstrap sample (Efron 1979)."""
    drawn: NDArray[np.int64] = rng.integers(len(preferences), size=len(preferences))
    return [preferences[i] for i in np.sort(drawn)]


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path}: preferences are read from .jsonl, .jsonl.gz and .parquet: write them as one of these")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}): re-encode it") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip ({error}): write it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    # Not splitlines: U+2028 and its like may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f":{number}", _parsed(path, number, line)


def _parsed(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number}: not valid JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}:{number}: JSON that is no preference ({error})") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        rows = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path}: damaged Parquet ({str(error).partition(chr(10))[0]}): write it again") from None
    yield from ((f" row {number}", row) for number, row in enumerate(rows, 1))


def _preference(row: object) -> Preference:
    if not isinstance(row, dict):
        raise DataError(f"{_short(row)} is no JSON object")
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise DataError(f"no {name!r} among {', '.join(row) or 'nothing'}: a preference needs chosen and rejected")
    messages, chosen, rejected = _sides(row)
    tie = _truth(row, "tie")
    return Preference(
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        weight=_weight(row),
        tie=bool(tie),
        source=_text(row, "source"),
        chosen_safe=_truth(row, "chosen_safe"),
        rejected_safe=_truth(row, "rejected_safe"),
        prompt_id=_text(row, "prompt_id") or _text(row, "id"),
    )


def _sides(row: dict[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """The conversation and the two answers, whichever of TRL's forms the row has."""
    chosen, rejected = _turns(row["chosen"], "chosen", "assistant"), _turns(row["rejected"], "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row["prompt"], "prompt", "user")
    else:
        prompt = chosen[:-1]
        if not prompt or prompt != rejected[:-1]:
            raise DataError("no prompt, and chosen and rejected do not begin with one and the same conversation")
        chosen, rejected = chosen[-1:], rejected[-1:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0].role != "assistant":
            raise DataError(f"{name} is {_short([m.role for m in side])}: it must be one assistant turn")
    return prompt, chosen[0].content, rejected[0].content


def _turns(value: object, name: str, role: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message(role, value),)
    if not isinstance(value, list):
        raise DataError(f"{name} is {_short(value)}: it must be text or a list of messages")
    return tuple(_message(turn, name) for turn in value)


def _message(turn: object, name: str) -> Message:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise DataError(f"a message of {name} is {_short(turn)}: it must be {{role, content}}, both text")
    return Message(turn["role"], turn["content"])


def _weight(row: dict[str, Any]) -> float:
    value = row.get("weight")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise DataError(f"weight is {_short(value)}: it must be a number above 0")
    return float(value)


def _truth(row: dict[str, Any], name: str) -> bool | None:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise DataError(f"{name} is {_short(value)}: it must be true or false")
    return value


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{name} is {_short(value)}: it must be text")
    return str(value)


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
