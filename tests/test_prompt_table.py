"""Prompts as columns are the prompts they were made from."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dissonance.prompt_table import PromptTable
from dissonance.records import Message, Prompt

texts = st.text(min_size=1).filter(str.strip)
turns = st.lists(st.builds(Message, st.sampled_from(["system", "assistant", "user"]), texts), max_size=3)
prompts = st.builds(
    lambda name, before, last, category: Prompt(name, (*before, Message("user", last)), category),
    st.text(),
    turns,
    texts,
    st.none() | st.text(),
)


@given(st.lists(prompts, max_size=12), st.slices(12), st.data())
def test_it_is_the_sequence_it_was_made_from(of: list[Prompt], part: slice, data: st.DataObject) -> None:
    table = PromptTable.of(iter(of))
    assert list(table) == of
    assert table == of
    assert list(table[part]) == of[part]
    assert list(pickle.loads(pickle.dumps(table[part]))) == of[part]  # noqa: S301
    if of:
        rows = data.draw(st.lists(st.integers(0, len(of) - 1), max_size=12))
        assert list(table.take(rows)) == [of[row] for row in rows]
        at = data.draw(st.integers(-len(of), len(of) - 1))
        assert table[at] == of[at]
        assert table != of[:-1]
    with pytest.raises(IndexError):
        table[len(of)]


def test_a_part_does_not_carry_the_whole_to_another_process() -> None:
    table = PromptTable.of(Prompt(f"p{i}", (Message("user", "word " * 50),)) for i in range(3000))
    assert len(list(table)) == 3000
    assert len(pickle.dumps(table[:10])) < 20_000
