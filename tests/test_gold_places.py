"""Where gold questions come, and how many questions there are until a person's others are used up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counting import calls_of
from dissonance.feedback.gold_places import is_gold_place, questions_ahead, seed_of


@given(st.text(max_size=5), st.integers(1, 12), st.integers(0, 40))
def test_of_every_block_one_place_is_gold(seed: str, gold_every: int, block: int) -> None:
    places = range(block * gold_every, (block + 1) * gold_every)
    assert sum(is_gold_place(seed, place, gold_every) for place in places) == 1


def test_runs_and_people_have_places_of_their_own() -> None:
    seeds = [seed_of(run_id, person) for run_id in ("run", "other") for person in (1, 2)]
    drawn = {tuple(is_gold_place(seed, place, 10) for place in range(100)) for seed in seeds}
    assert len(drawn) == 4


@given(
    seed=st.sampled_from(["a", "b", "c"]),
    place=st.integers(0, 60),
    others=st.integers(0, 60),
    gold=st.integers(0, 25),
    gold_every=st.integers(0, 12),
)
def test_the_count_is_what_would_be_asked(seed: str, place: int, others: int, gold: int, gold_every: int) -> None:
    found = questions_ahead(seed, place, others, gold, gold_every)
    asked = 0
    while others:  # as asking.py hands them out: a gold one at its place, and only while there are others
        if gold_every and gold and is_gold_place(seed, place + asked, gold_every):
            gold -= 1
        else:
            others -= 1
        asked += 1
    assert found == asked


@pytest.mark.parametrize("gold_every", [1, 2, 10])
def test_counting_far_ahead_takes_little_work(gold_every: int) -> None:
    many = 10_000_000
    assert questions_ahead("a", 12_345, many, many, gold_every) > many
    assert calls_of(lambda: questions_ahead("a", 12_345, many, many, gold_every)) < many / 1000
