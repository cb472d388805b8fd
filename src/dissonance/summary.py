"""The conflict of many prompts in a few numbers, added up part by part."""

from dataclasses import dataclass, fields
from math import sqrt


@dataclass(frozen=True, slots=True)
class ConflictSummary:
    """Many prompts in a few numbers; the averages and shares are over the prompts that are not degenerate.

    They are None where every prompt is degenerate.
    """

    prompts: int
    completions: int
    degenerate: int

    repeated_answers: float
    """Share of all completions that have the reward and the log-likelihood of an earlier one of their prompt."""

    kendall_tau_distance: float | None
    """Mean K."""

    null_mean: float | None
    """Mean over prompts of the null's mean, (1 - tied_share) / 2: 1/2 where no two answers are identical."""

    distinct_distance: float | None
    """Mean K with identical completions counted as one: 1/2 for independent scores."""

    null_sd: float | None
    """Root of the mean over prompts of the variance of `distinct_distance`: of single prompts, not of their mean."""

    share_above_null: float | None
    """Share of prompts with distinct_distance > 1/2."""

    null_share_above: float | None
    """The share that independent scores would give, from each prompt's n_distinct."""

    share_significant: float | None
    """Share of prompts with distinct_distance > 1/2 and two-sided p < 0.05."""

    null_share_significant: float | None
    """The share that independent scores would give, from each prompt's n_distinct."""

    mean_abs_pacs: float | None
    """Mean over prompts of mean|PACS|."""


@dataclass(frozen=True, slots=True)
class ConflictTally:
    """Counts and sums from which a summary is made; tallies of parts add up to the tally of the whole."""

    prompts: int = 0
    completions: int = 0
    degenerate: int = 0
    repeated: int = 0
    above: int = 0
    significant: int = 0
    kendall_tau_distance: float = 0.0
    tied_share: float = 0.0
    distinct_distance: float = 0.0
    null_variance: float = 0.0
    null_above: float = 0.0
    null_significant: float = 0.0
    mean_abs_pacs: float = 0.0

    def __add__(self, other: "ConflictTally") -> "ConflictTally":
        return ConflictTally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def summary(self) -> ConflictSummary:
        """Turn sums into averages and shares."""
        proper = self.prompts - self.degenerate

        def mean(total: float) -> float | None:
            return total / proper if proper else None

        tied, variance = mean(self.tied_share), mean(self.null_variance)
        return ConflictSummary(
            prompts=self.prompts,
            completions=self.completions,
            degenerate=self.degenerate,
            repeated_answers=self.repeated / self.completions if self.completions else 0.0,
            kendall_tau_distance=mean(self.kendall_tau_distance),
            null_mean=None if tied is None else (1 - tied) / 2,
            distinct_distance=mean(self.distinct_distance),
            null_sd=None if variance is None else sqrt(variance),
            share_above_null=mean(self.above),
            null_share_above=mean(self.null_above),
            share_significant=mean(self.significant),
            null_share_significant=mean(self.null_significant),
            mean_abs_pacs=mean(self.mean_abs_pacs),
        )
