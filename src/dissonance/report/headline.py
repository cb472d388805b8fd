"""The run in plain words: what the figures mean, and what to be careful about."""

from dataclasses import dataclass
from math import sqrt

from dissonance.conflict import ConflictSummary, tally
from dissonance.report.reading import Reading
from dissonance.report.statistics import Measured
from dissonance.report.tables import Booleans, Completions

LENGTH_WARNING = 0.5
"""|rho| beyond which conflict may be length in disguise."""

_REPEATS_WARNING = 0.01
"""Share of repeated answers from which they are worth a line."""

_ALL_DEGENERATE = (
    "Every prompt is degenerate: all its answers got the same reward or the same log-likelihood, so there is no order"
    " to compare. Draw answers that differ (a higher temperature), or check the reward model."
)


@dataclass(frozen=True)
class Headline:
    """What stands on top of the report."""

    figures: tuple[tuple[str, str, str], ...]
    """(value, what it is, what to hold it against)."""

    findings: tuple[str, ...]
    warnings: tuple[str, ...]


def headline(completions: Completions, measured: Measured, agreeing: Booleans, reading: Reading) -> Headline:
    """Sum up; `agreeing` (P,) marks the prompts that are not degenerate and have a significantly small K."""
    found = measured.conflicts
    summary = tally(found).summary()
    sizes = int(found.n_completions.min()), int(found.n_completions.max())
    proper = summary.prompts - summary.degenerate
    return Headline(
        figures=_figures(summary, *sizes),
        findings=_findings(summary, int(agreeing.sum()) / max(1, proper)),
        warnings=(
            *_length_warning(measured.length_correlation, reading),
            *_repeats_warning(summary),
            *_warnings(summary, completions),
        ),
    )


def _figures(summary: ConflictSummary, smallest: int, largest: int) -> tuple[tuple[str, str, str], ...]:
    each = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    size = (
        f"{summary.prompts:,}",
        plural("prompt", summary.prompts),
        f"{each} answers each, {summary.completions:,} in all",
    )
    if summary.kendall_tau_distance is None:
        return (size,)
    return (
        size,
        (
            f"{summary.kendall_tau_distance:.2f}",
            "mean distance K",
            f"unrelated: {summary.null_mean:.2f}, ± {summary.null_sd:.2f} a prompt",
        ),
        (
            percent(summary.share_significant),
            "conflict beyond chance",
            f"unrelated: {percent(summary.null_share_significant)}",
        ),
        (
            percent(summary.share_above_null),
            "K above chance mean",
            f"unrelated: {percent(summary.null_share_above)}",
        ),
        (f"{summary.mean_abs_pacs:.2f}", "mean |PACS|", "0: same standing, at most 2"),
    )


def _findings(summary: ConflictSummary, agreeing: float) -> tuple[str, ...]:
    if summary.distinct_distance is None or summary.null_sd is None:
        return (_ALL_DEGENERATE,)
    overall = _overall(summary.distinct_distance, summary.null_sd, summary.prompts - summary.degenerate)
    if summary.null_share_significant == 0:
        return overall, "With so few different answers per prompt no single prompt can be told from chance: draw more."
    single = (
        f"On {percent(summary.share_significant)} of the prompts they order the answers oppositely more often than"
        " chance explains (two-sided p < 0.05; unrelated scores would do so on"
        f" {percent(summary.null_share_significant)}), on {percent(agreeing)} they agree more often than chance"
        " explains."
    )
    return overall, single


def _overall(mean: float, null_sd: float, prompts: int) -> str:
    """Hold the mean K over distinct answers against its null: mean 1/2, standard error null_sd / sqrt(prompts)."""
    z = (mean - 0.5) / (null_sd / sqrt(prompts))
    pair = "of two different answers to the same prompt, the one that the policy finds likelier has the"
    if z < -1.96:
        return (
            f"On the whole the two agree: {pair} higher reward in {percent(1 - mean)} of the pairs (unrelated: 50 %)."
        )
    if z > 1.96:
        return (
            f"On the whole the two pull apart: {pair} lower reward in {percent(mean)} of the pairs (unrelated: 50 %)."
        )
    return f"On the whole the two cannot be told from unrelated: {pair} lower reward in {percent(mean)} of the pairs."


def _length_warning(rho: float | None, reading: Reading) -> tuple[str, ...]:
    if rho is None or abs(rho) <= LENGTH_WARNING:
        return ()
    advice = "; compare with the mean or the relative log-likelihood" if reading.likelihood == "sum" else ""
    warning = (
        f"Conflict follows length: within the prompts, PACS and the number of tokens correlate at ρ = {signed(rho)}."
        f" Much of what stands here may be length rather than quality{advice}."
    )
    return (warning,)


def _repeats_warning(summary: ConflictSummary) -> tuple[str, ...]:
    if summary.repeated_answers <= _REPEATS_WARNING or summary.null_mean is None:
        return ()
    warning = (
        f"{percent(summary.repeated_answers)} of the answers repeat another of their prompt, with the same reward and"
        " log-likelihood. Identical answers have no order, which lowers K: unrelated scores would give"
        f" {summary.null_mean:.2f} on average. Single prompts are judged by their different answers"
        f" (mean K {summary.distinct_distance:.2f}, unrelated: 0.50)."
    )
    return (warning,)


def _warnings(summary: ConflictSummary, completions: Completions) -> tuple[str, ...]:
    warnings = []
    if completions.cut_answers:
        warnings.append(
            f"{_of(completions.cut_answers, summary.completions, 'answer')} ran into the token limit: their"
            " log-likelihood and reward are those of an unfinished answer. Raise max_new_tokens."
        )
    if completions.cut_rewards:
        warnings.append(
            f"{_of(completions.cut_rewards, summary.completions, 'answer')}"
            f" {'was' if completions.cut_rewards == 1 else 'were'} longer than the reward model can read:"
            " the reward is that of the part it read."
        )
    if summary.degenerate:
        warnings.append(
            f"{_of(summary.degenerate, summary.prompts, 'prompt')} {'is' if summary.degenerate == 1 else 'are'}"
            " degenerate (all rewards or all log-likelihoods equal): left out of every figure and list below."
        )
    return tuple(warnings)


def _of(count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {plural(what, total)} ({percent(count / total)})"


def plural(word: str, count: int) -> str:
    """Put an s to the word unless there is one of it."""
    return word if count == 1 else f"{word}s"


def percent(share: float | None) -> str:
    """Write a share in [0, 1] as people do; 0 % and 100 % are only what is exactly so."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in {0, 1} or 0.0995 <= share < 0.995 else f"{100 * share:.1f} %"


def signed(value: float) -> str:
    """Two decimals with a sign, the minus a true one."""
    return f"{value:+.2f}".replace("-", "−")


def number(value: float, decimals: int) -> str:
    """Format a number with a true minus."""
    return f"{value:.{decimals}f}".replace("-", "−")
