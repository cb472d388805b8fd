"""What labels come to: weighted preference pairs, and what became of all that is not among them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dissonance.errors import DataError

Method = Literal["majority", "dawid_skene", "dgr"]

LABELS_LEFT_OUT: Mapping[str, str] = {
    "superseded": "labels that were corrected",
    "skipped": "labels that pass the question on",
    "excluded": "labels of annotators that were not asked for",
    "gold": "labels of gold questions",
    "unknown_query": "labels of queries that are not there",
    "outweighed": "labels of queries that a lead has settled",
}
"""Why labels give no pair."""
COMPARISONS_LEFT_OUT: Mapping[str, str] = {
    "both_bad": "pairs of completions of which neither is good",
    "split": "pairs of completions on which the votes are even",
    "overruled": "queries whose most probable answer nobody gave",
    "cyclic": "preferences cut because they contradict weightier ones",
    "equal_ratings": "pairs of completions that are rated alike",
    "single_rating": "completions rated that no other of their prompt was rated with",
    "safe_only": "labels that say safe or unsafe and rate nothing",
    "safe_split": "completions on whose safety the votes are even",
}
"""Why what was counted gives no pair, or no safety."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A preference to train on."""

    prompt_id: str
    chosen_id: int
    """completion_id of the better one; of a tie, the lower completion_id."""
    rejected_id: int
    weight: float
    """In (0, 1]."""
    tie: bool
    """Neither is better: a soft label of 1/2."""
    source: str
    """The kinds of query and the method: `pairwise/majority`, `pairwise+ranking/dgr`."""
    n_annotators: int
    """Whose answers it rests on."""
    chosen_safe: bool | None = None
    """None where nobody said, or as many say yes as no."""
    rejected_safe: bool | None = None
    round: int = 0
    """Whose completions these are."""

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise DataError(f"a preference pair of prompt {self.prompt_id!r} weighs {self.weight}: use 0 < weight <= 1")
        if self.chosen_id == self.rejected_id:
            raise DataError(f"prompt {self.prompt_id!r} has completion {self.chosen_id} preferred to itself")


@dataclass(frozen=True, slots=True)
class Aggregation:
    """The pairs, and what became of all that is not among them."""

    method: Method
    pairs: tuple[PreferencePair, ...]
    """By round and prompt, in the order of the questions."""
    labels: int
    """Given, corrections included."""
    used: int
    """Of those, counted: the rest are under `left_out`."""
    left_out: Mapping[str, int]
    """How many, by the reasons in `LABELS_LEFT_OUT` and `COMPARISONS_LEFT_OUT`; only what occurred."""
    safe: Mapping[tuple[int, str, int], bool]
    """By round, prompt_id and completion_id: what most say of its safety."""
    both_bad: tuple[tuple[int, str, int, int], ...]
    """Round, prompt_id and completion_ids of which neither is good: nothing to prefer, perhaps something to look at."""

    @property
    def explanation(self) -> tuple[str, ...]:
        """Lines for people: what came of the labels, and what was left out."""
        ties = sum(pair.tie for pair in self.pairs)
        first = f"{self.used:,} of {self.labels:,} labels -> {len(self.pairs):,} pairs, {ties:,} of them ties"
        reasons = {**LABELS_LEFT_OUT, **COMPARISONS_LEFT_OUT}
        return (first, *(f"left out: {n:,} {reasons[reason]}" for reason, n in self.left_out.items()))
