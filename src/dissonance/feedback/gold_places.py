"""Where gold questions come among a person's others: one in each block of `gold_every`, at a place nobody can foresee.

The places are drawn from the run and the person, so that they are the same however often the page is loaded. The run's
id is on no page: who knows how they are drawn cannot work them out.
"""

import random


def seed_of(run_id: str, annotator_id: int) -> str:
    """What a person's places are drawn from."""
    return f"{run_id}/{annotator_id}"


def is_gold_place(seed: str, place: int, gold_every: int) -> bool:
    """Whether a person's question number `place`, from 0, is to be a gold one."""
    block, offset = divmod(place, gold_every)
    return _gold_offset(seed, block, gold_every) == offset


def questions_ahead(seed: str, place: int, others: int, gold: int, gold_every: int) -> int:
    """How many questions are still to come before a person's others are used up, the gold ones among them included.

    A count of the others alone would stand still while a gold question is answered, and so give it away.

    Args:
        seed: of the person.
        place: the number of the next question, from 0.
        others: questions to come that are not gold.
        gold: gold questions that the person has not answered.
        gold_every: one of how many is gold; 0 for none.
    """
    if gold_every < 1:
        return others
    passed = _gold_places(seed, place, gold_every)
    among = 0
    # Each gold place among those ahead makes room for one question more behind them, at what may be such a place again.
    while (more := min(gold, _gold_places(seed, place + others + among, gold_every) - passed)) > among:
        among = more
    return others + among


def _gold_places(seed: str, stop: int, gold_every: int) -> int:
    """How many of the places before `stop` are gold ones."""
    block, rest = divmod(stop, gold_every)
    return block + (_gold_offset(seed, block, gold_every) < rest)


def _gold_offset(seed: str, block: int, gold_every: int) -> int:
    return random.Random(f"{seed}/{block}/{gold_every}").randrange(gold_every)
