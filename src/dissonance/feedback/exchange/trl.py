"""Preferences in TRL's conversational format: what reward-model and preference trainers read.

    prompt            [{role, content}, ..]
    chosen, rejected  [{role: assistant, content}], one turn each
    weight            how much the pair counts, from the aggregation
    source            where it comes from
    round, prompt_id, chosen_id, rejected_id
    chosen_safe, rejected_safe   only where something is known of safety; null where not
    tie               only where ties were asked for: chosen and rejected are then equally good

A preference comes back as a label of the pairwise question that shows the two texts. What was aggregated stays
aggregated: a weight is no label, and pairs out of rankings or ratings belong to no pairwise question.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.errors import DataError, SettingsError
from dissonance.feedback.exchange.asked import Asked, ImportedAnswer, Parsed, Turns
from dissonance.feedback.exchange.reading import short, text, truth
from dissonance.feedback.pairs import PreferencePair
from dissonance.records import ROLES, Answer, Question

_TURNS = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCHEMA = pa.schema(
    [
        ("prompt", _TURNS),
        ("chosen", _TURNS),
        ("rejected", _TURNS),
        ("weight", pa.float64()),
        ("source", pa.string()),
        ("round", pa.int32()),
        ("prompt_id", pa.string()),
        ("chosen_id", pa.int32()),
        ("rejected_id", pa.int32()),
        ("chosen_safe", pa.bool_()),
        ("rejected_safe", pa.bool_()),
        ("tie", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Preferences:
    """What an export of preferences came to."""

    rows: int
    ties_left_out: int
    """Ties have no chosen side; they are written only when asked for."""


def write_preferences(
    path: Path, pairs: Sequence[PreferencePair], questions: Sequence[Question], *, suffix: str, ties: bool = False
) -> Preferences:
    """Write preferences for training.

    Args:
        path: where to write; the caller renames it when this returns.
        pairs: what feedback was aggregated to.
        questions: the store's, of every round of the pairs, for the texts.
        suffix: `.jsonl` or `.parquet`, the name's end that the file is to have.
        ties: also write pairs of equal worth, marked by a column `tie`. A trainer that does not know that column would
            take the side that happens to stand first for the better, so they are left out and counted by default.

    Raises:
        SettingsError: another suffix.
        DataError: a pair is about a completion that no question of its round shows, or that two of one round show with
            different texts.
    """
    if suffix not in {".jsonl", ".parquet"}:
        raise SettingsError(f"preferences are written as .jsonl or .parquet, not {suffix!r}: change the file's name")
    kept = [pair for pair in pairs if ties or not pair.tie]
    table = _table(kept, questions, ties=ties)
    if suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in table.to_pylist())
    return Preferences(len(kept), len(pairs) - len(kept))


def _table(pairs: Sequence[PreferencePair], questions: Sequence[Question], *, ties: bool) -> pa.Table:
    prompts = {q.prompt: [{"role": m.role, "content": m.content} for m in q.messages] for q in questions}
    texts = _texts(questions)
    rows = [
        {
            "prompt": prompts.get((pair.round, pair.prompt_id)),
            "chosen": _assistant(texts, pair, pair.chosen_id),
            "rejected": _assistant(texts, pair, pair.rejected_id),
            "weight": pair.weight,
            "source": pair.source,
            "round": pair.round,
            "prompt_id": pair.prompt_id,
            "chosen_id": pair.chosen_id,
            "rejected_id": pair.rejected_id,
            "chosen_safe": pair.chosen_safe,
            "rejected_safe": pair.rejected_safe,
            "tie": pair.tie,
        }
        for pair in pairs
    ]
    unknown = all(pair.chosen_safe is None and pair.rejected_safe is None for pair in pairs)
    absent = ({"chosen_safe", "rejected_safe"} if unknown else set()) | (set() if ties else {"tie"})
    return pa.Table.from_pylist(rows, pa.schema([column for column in _SCHEMA if column.name not in absent]))


def _texts(questions: Sequence[Question]) -> dict[tuple[int, str, int], str]:
    texts: dict[tuple[int, str, int], str] = {}
    for question in questions:
        for completion_id, shown in zip(question.completion_ids, question.completions, strict=True):
            if texts.setdefault((*question.prompt, completion_id), shown) != shown:
                raise DataError(
                    f"completion {completion_id} of prompt {question.prompt_id!r} has two texts in round "
                    f"{question.round}: the store holds questions that do not belong together"
                )
    return texts


def _assistant(
    texts: Mapping[tuple[int, str, int], str], pair: PreferencePair, completion_id: int
) -> list[dict[str, str]]:
    shown = texts.get((pair.round, pair.prompt_id, completion_id))
    if shown is None:
        raise DataError(
            f"no question shows completion {completion_id} of prompt {pair.prompt_id!r} in round {pair.round}"
        )
    return [{"role": "assistant", "content": shown}]


def parse_preference(row: dict[str, Any], asked: Asked) -> Parsed:
    """Read a row: TRL's explicit or implicit prompt, conversational or plain text.

    The annotator is the one in a column `annotator`; a `source` is no annotator.
    """
    prompt, chosen, rejected = _sides(row)
    ids = _id(row, "chosen_id"), _id(row, "rejected_id")
    question, named = asked.pair(prompt, (chosen, rejected), row.get("prompt_id"), ids, row.get("round"))
    first, second = question.completions
    if (tie := row.get("tie")) not in (None, "") and truth(tie, "tie"):
        answer = Answer("tie")
    elif first != second:
        answer = Answer("first" if chosen == first else "second")
    elif named:
        answer = Answer("first" if ids[0] == question.completion_ids[0] else "second")
    else:
        raise DataError(f"chosen and rejected are the same text ({short(chosen)}): which one is meant?")
    who = row.get("annotator")
    return Parsed((ImportedAnswer(question, None if who is None else text(who, "the annotator"), answer),))


def _id(row: dict[str, Any], name: str) -> int | None:
    value = row.get(name)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if value in (None, ""):
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{name} is {short(value)}: it must be a whole number")
    return value


def _sides(row: dict[str, Any]) -> tuple[Turns, str, str]:
    chosen, rejected = _turns(row["chosen"], "chosen", "assistant"), _turns(row["rejected"], "rejected", "assistant")
    prompt = row.get("prompt")
    before = () if prompt is None else _turns(prompt, "prompt", "user")
    if not before:
        before, rest = chosen[:-1], rejected[:-1]
        if not before or before != rest:
            raise DataError(
                "there is no prompt, and chosen and rejected do not begin with one and the same conversation"
            )
        chosen, rejected = chosen[-1:], rejected[-1:]
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) != 1 or side[0][0] != "assistant":
            raise DataError(f"{name} must be one assistant message after the prompt, not {short(list(side))}")
    return before, chosen[0][1], rejected[0][1]


def _turns(value: object, name: str, role: str) -> Turns:
    if isinstance(value, str):
        return ((role, text(value, name)),)
    if not isinstance(value, list):
        raise DataError(f"{name} is {short(value)}: it must be text or a list of messages")
    return tuple(_turn(turn, name) for turn in value)


def _turn(turn: object, name: str) -> tuple[str, str]:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise DataError(
            f"a message of {name} is {short(turn)}: it must be {{role, content}}, role one of {', '.join(ROLES)}"
        )
    return turn["role"], text(turn.get("content"), f"a message of {name}")
