"""Prompts as columns: as many records would take four times the memory, and a run may hold a million."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import pyarrow as pa

from dissonance.records import PROMPTS_SCHEMA, Message, Prompt, messages_column

_SCHEMA = pa.schema([PROMPTS_SCHEMA.field(name) for name in ("prompt_id", "messages", "category")])
CHUNK = 1024
"""Prompts that lie in one piece."""
_GATHERED = 1 << 30


class PromptTable(Sequence[Prompt]):
    """A sequence of prompts that makes each record when it is asked for; equal to any sequence of the same prompts."""

    def __init__(self, columns: pa.Table) -> None:
        self._columns = columns

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> "PromptTable":
        """Take prompts in, a thousand at a time."""
        if isinstance(prompts, PromptTable):
            return prompts
        rest, parts = iter(prompts), []
        while chunk := list(islice(rest, CHUNK)):
            columns = {
                "prompt_id": [prompt.prompt_id for prompt in chunk],
                "messages": messages_column(chunk),
                "category": [prompt.category for prompt in chunk],
            }
            parts.append(pa.table(columns, schema=_SCHEMA))
        return cls(pa.concat_tables(parts) if parts else _SCHEMA.empty_table())

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    @overload
    def __getitem__(self, at: int) -> Prompt: ...
    @overload
    def __getitem__(self, at: slice) -> "PromptTable": ...
    def __getitem__(self, at: int | slice) -> "Prompt | PromptTable":
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self.take(range(start, stop, step)) if step != 1 else self._part(start, stop)
        row = range(len(self))[at]
        return _records(self._columns.slice(row, 1))[0]

    def __iter__(self) -> Iterator[Prompt]:
        for start in range(0, len(self), CHUNK):
            yield from _records(self._columns.slice(start, CHUNK))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} prompts>"

    def __reduce__(self) -> tuple[type["PromptTable"], tuple[pa.Table]]:
        # A slice would bring along what it was cut from.
        return PromptTable, (self.take(range(len(self)))._columns,)  # noqa: SLF001 - its own

    @property
    def columns(self) -> pa.Table:
        """`prompt_id`, `messages` and `category`, as `PROMPTS_SCHEMA` has them."""
        return self._columns

    def take(self, rows: Sequence[int]) -> "PromptTable":
        """The prompts in these places, in this order."""
        if self._columns.nbytes < _GATHERED:
            return PromptTable(self._columns.take(pa.array(rows, pa.int64())))
        # Arrow gathers a column's chunks in one, which holds no more than 2 GiB of text.
        return PromptTable.of(self[row] for row in rows)

    def _part(self, start: int, stop: int) -> "PromptTable":
        return PromptTable(self._columns.slice(start, max(0, stop - start)))


def _records(columns: pa.Table) -> list[Prompt]:
    names, conversations, categories = (columns[name].to_pylist() for name in _SCHEMA.names)
    return [
        Prompt(name, tuple(Message(turn["role"], turn["content"]) for turn in turns), category)
        for name, turns, category in zip(names, conversations, categories, strict=True)
    ]
