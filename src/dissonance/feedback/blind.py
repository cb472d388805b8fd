"""The order of a question's completions where nothing may be learnt from it, and what people call them in it."""

import hashlib

from dissonance.records import Question


def blind_order(question: Question) -> tuple[int, ...]:
    """The completion_ids in an order as good as random, and always the same one for a question.

    A strategy may put the likelier winner first; whoever labels must not learn it from the position.
    """

    def drawn(completion_id: int) -> bytes:
        return hashlib.sha256(f"{question.query_id}\0{completion_id}".encode()).digest()

    return tuple(sorted(question.completion_ids, key=drawn))


def letter(place: int) -> str:
    """A, B, ..., Z, AA, ...: what people call the completion at a place."""
    return chr(ord("A") + place) if place < 26 else letter(place // 26 - 1) + letter(place % 26)
