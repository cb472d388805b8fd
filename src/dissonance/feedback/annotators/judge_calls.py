"""The table of a judge's calls: entered before a call is sent, completed when its reply arrives.

A row without `received_at` is a call whose reply never came, so that nobody knows whether it was paid for; it holds
the most that it can have cost, and counts with that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, insert, select, update

from dissonance.feedback.annotators.budget import Spending, Usage
from dissonance.feedback.schema import judge_calls
from dissonance.feedback.store import Store


@dataclass(frozen=True, slots=True)
class Totals:
    """What a judge's calls add up to."""

    calls: int
    lost: int
    """Of those, calls without a reply, which count with the most that they can have cost."""
    spent: Spending


class JudgeCalls:
    """One judge's calls in a store."""

    def __init__(self, store: Store, annotator_id: int) -> None:
        self._store = store
        self._annotator_id = annotator_id
        self._mine = judge_calls.c.annotator_id == annotator_id

    def sent(self, query_id: str, variant: int, worst: Usage, cost: float) -> int:
        """Enter a call that is about to be sent, with the most it can take; returns its call_id."""
        asked = (judge_calls.c.query_id == query_id) & self._mine & (judge_calls.c.variant == variant)
        with self._store.writing() as connection:
            before = connection.scalar(select(func.max(judge_calls.c.attempt)).where(asked))
            values = {
                "query_id": query_id,
                "annotator_id": self._annotator_id,
                "variant": variant,
                "attempt": 0 if before is None else before + 1,
                "sent_at": self._store.now(),
                **_taken(worst, cost),
            }
            return int(connection.scalar(insert(judge_calls).values(values).returning(judge_calls.c.call_id)) or 0)

    def arrived(self, call_id: int, reply: str | None, usage: Usage, cost: float) -> None:
        """Complete a call with its reply and what it took; None where the endpoint refused it."""
        values = {"received_at": self._store.now(), "reply": reply, **_taken(usage, cost)}
        with self._store.writing() as connection:
            connection.execute(update(judge_calls).where(judge_calls.c.call_id == call_id).values(values))

    def replies(self, query_id: str, variant: int) -> list[str]:
        """Every reply to one variant of a query, the first first."""
        chosen = (
            select(judge_calls.c.reply)
            .where(judge_calls.c.query_id == query_id, self._mine, judge_calls.c.variant == variant)
            .where(judge_calls.c.reply.is_not(None))
            .order_by(judge_calls.c.attempt)
        )
        with self._store.reading() as connection:
            return [str(reply) for reply in connection.scalars(chosen)]

    def all_replies(self) -> Mapping[str, Mapping[int, Sequence[str]]]:
        """Every reply, by query_id and variant, the first first."""
        chosen = select(judge_calls).where(self._mine).order_by(judge_calls.c.attempt)
        found: dict[str, dict[int, list[str]]] = {}
        with self._store.reading() as connection:
            for row in connection.execute(chosen):
                replies = found.setdefault(row.query_id, {}).setdefault(row.variant, [])
                replies += [] if row.reply is None else [row.reply]
        return found

    def totals(self) -> Totals:
        """Add up every call."""
        columns = (judge_calls.c.prompt_tokens, judge_calls.c.completion_tokens, judge_calls.c.cost)
        chosen = select(
            func.count(), func.count(judge_calls.c.received_at), *(func.coalesce(func.sum(c), 0) for c in columns)
        ).where(self._mine)
        with self._store.reading() as connection:
            calls, received, prompt, completion, cost = connection.execute(chosen).one()
        return Totals(calls, calls - received, Spending(Usage(int(prompt), int(completion)), float(cost)))


def _taken(usage: Usage, cost: float) -> dict[str, float]:
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "cost": cost}
