"""What a judge may spend, and a purse that many threads draw on without ever spending more."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dissonance.errors import DissonanceError, SettingsError


class BudgetSpentError(DissonanceError):
    """The next call could exceed the budget; everything that was paid for is stored."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call or of many."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens)

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt_tokens - other.prompt_tokens, self.completion_tokens - other.completion_tokens)


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on everything a judge spends under its name in one store; None is no limit."""

    max_tokens_total: int | None = None
    """Prompt and completion tokens together."""
    max_cost: float | None = None
    """In the currency of the prices."""
    price_in: float = 0.0
    """Per million prompt tokens."""
    price_out: float = 0.0
    """Per million completion tokens."""

    def __post_init__(self) -> None:
        for name in ("price_in", "price_out"):
            _check(name, getattr(self, name))
        if self.max_tokens_total is not None and self.max_tokens_total < 1:
            raise SettingsError(f"max_tokens_total is {self.max_tokens_total}: allow at least 1 token")
        if self.max_cost is not None:
            _check("max_cost", self.max_cost)
            if not (self.price_in or self.price_out):
                raise SettingsError(f"max_cost is {self.max_cost}, but no prices are given: set price_in and price_out")

    def cost(self, usage: Usage) -> float:
        """What these tokens cost."""
        return (usage.prompt_tokens * self.price_in + usage.completion_tokens * self.price_out) / 1e6


@dataclass(frozen=True, slots=True)
class Spending:
    """What has been spent."""

    usage: Usage = Usage()
    cost: float = 0.0


class Purse:
    """Hands out the budget call by call; calls under way count with the most that they can cost."""

    def __init__(self, budget: Budget, before: Spending = Spending()) -> None:  # frozen
        self.budget = budget
        self._before = before
        self._settled = Usage()
        self._reserved = Usage()
        self._changed = threading.Condition()

    @property
    def committed(self) -> Spending:
        """Spent, and reserved for calls under way."""
        with self._changed:
            return self._with(self._settled + self._reserved)

    @contextmanager
    def reserve(self, worst: Usage) -> Iterator[list[Usage]]:
        """Set the worst case of a call aside, for the block in which it is made.

        Append what the call really took to the list before the block ends; without that, the worst case is spent. It
        waits for calls under way where what they leave over may be enough.

        Raises:
            BudgetSpentError: the worst case does not fit, and no call is under way that could leave something over.
        """
        with self._changed:
            while not self._fits(self._reserved + worst):
                if not self._fits(worst):
                    raise BudgetSpentError(self._explain(worst))
                self._changed.wait()
            self._reserved += worst
        taken: list[Usage] = []
        try:
            yield taken
        finally:
            with self._changed:
                self._reserved -= worst
                self._settled += taken[0] if taken else worst
                self._changed.notify_all()

    def _with(self, usage: Usage) -> Spending:
        return Spending(self._before.usage + usage, self._before.cost + self.budget.cost(usage))

    def _fits(self, more: Usage) -> bool:
        total, limits = self._with(self._settled + more), self.budget
        tokens_fit = limits.max_tokens_total is None or total.usage.total <= limits.max_tokens_total
        return tokens_fit and (limits.max_cost is None or total.cost <= limits.max_cost)

    def _explain(self, worst: Usage) -> str:
        spent = self._with(self._settled)
        limits = {"tokens": self.budget.max_tokens_total, "cost": self.budget.max_cost}
        said = " and ".join(f"{value:,} {name}" for name, value in limits.items() if value is not None)
        return (
            f"budget of {said}: {spent.usage.total:,} tokens are spent (cost {spent.cost:.4f}), and the next call may"
            f" take {worst.total:,} (cost {self.budget.cost(worst):.4f}): raise the budget to go on"
        )


def _check(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise SettingsError(f"{name} is {value}: use a number from 0 up")
