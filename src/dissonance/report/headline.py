"""The run in plain words: what the figures mean, and what to be careful about."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from dissonance.conflict import Conflicts, ConflictSummary, tally
from dissonance.report.statistics import share_by_luck
from dissonance.report.tables import Booleans, Completions, Prompts

LENGTH_WARNING = 0.5
"""|rho| beyond which conflict may be length in disguise."""

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


def headline(
    prompts: Prompts, completions: Completions, proper: Booleans, agreeing: Booleans, rho: float | None
) -> Headline:
    """Sum up; of the (P,) prompts, `proper` are not degenerate, `agreeing` have a significantly small K."""
    summary = tally(_conflicts(prompts, completions)).summary()
    luck = share_by_luck(prompts.n_completions[proper]) if proper.any() else 0.0
    return Headline(
        figures=_figures(summary, prompts, luck),
        findings=_findings(summary, float(agreeing[proper].mean()) if proper.any() else 0.0, luck),
        warnings=_warnings(summary, completions, rho),
    )


def length_correlation(summary: Mapping[str, Any]) -> float | None:
    """Spearman's rho of PACS with length from `summary.json`, where it is a number, {"pacs": number} or absent."""
    value = summary.get("length_correlation")
    value = value.get("pacs") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, int | float) else None


def _conflicts(prompts: Prompts, completions: Completions) -> Conflicts:
    return Conflicts(
        pacs=completions.pacs,
        kendall_tau_distance=prompts.distance,
        mean_abs_pacs=prompts.mean_abs_pacs,
        max_abs_pacs=prompts.max_abs_pacs,
        degenerate=prompts.degenerate,
        n_completions=prompts.n_completions,
    )


def _figures(summary: ConflictSummary, prompts: Prompts, luck: float) -> tuple[tuple[str, str, str], ...]:
    smallest, largest = int(prompts.n_completions.min()), int(prompts.n_completions.max())
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
            f"unrelated: 0.50, ± {summary.null_sd:.2f} a prompt",
        ),
        (percent(summary.share_significant), "conflict beyond chance", f"unrelated: {percent(luck)}"),
        (percent(summary.share_above_null), "K above ½", "unrelated: just under half"),
        (f"{summary.mean_abs_pacs:.2f}", "mean |PACS|", "0: same standing, at most 2"),
    )


def _findings(summary: ConflictSummary, agreeing: float, luck: float) -> tuple[str, ...]:
    if summary.kendall_tau_distance is None or summary.null_sd is None:
        return (_ALL_DEGENERATE,)
    findings = [_overall(summary.kendall_tau_distance, summary.null_sd, summary.prompts - summary.degenerate)]
    if luck == 0:
        findings.append("With so few answers per prompt no single prompt can be told from chance: draw more.")
    else:
        findings.append(
            f"On {percent(summary.share_significant)} of the prompts they order the answers oppositely more often than"
            f" chance explains (two-sided p < 0.05; unrelated scores would do so on {percent(luck)}), on"
            f" {percent(agreeing)} they agree more often than chance explains."
        )
    return tuple(findings)


def _overall(mean: float, null_sd: float, prompts: int) -> str:
    """Hold the mean K against its null: mean 1/2, standard error null_sd / sqrt(prompts)."""
    z = (mean - 0.5) / (null_sd / sqrt(prompts))
    pair = "of two answers to the same prompt, the one that the policy finds likelier has the"
    if z < -1.96:
        return (
            f"On the whole the two agree: {pair} higher reward in {percent(1 - mean)} of the pairs (unrelated: 50 %)."
        )
    if z > 1.96:
        return (
            f"On the whole the two pull apart: {pair} lower reward in {percent(mean)} of the pairs (unrelated: 50 %)."
        )
    return f"On the whole the two cannot be told from unrelated: {pair} lower reward in {percent(mean)} of the pairs."


def _warnings(summary: ConflictSummary, completions: Completions, rho: float | None) -> tuple[str, ...]:
    warnings = []
    if rho is not None and abs(rho) > LENGTH_WARNING:
        warnings.append(
            f"Conflict follows length: PACS and the number of tokens correlate at ρ = {signed(rho)}. Much of what"
            " stands here may be length rather than quality; compare with the mean or the relative log-likelihood."
        )
    if completions.cut_answers:
        warnings.append(
            f"{_of(completions.cut_answers, summary.completions, 'answer')} ran into the token limit: their"
            " log-likelihood and reward are those of an unfinished answer. Raise max_new_tokens."
        )
    if completions.cut_rewards:
        warnings.append(
            f"{_of(completions.cut_rewards, summary.completions, 'answer')} were longer than the reward model can read:"
            " their reward is that of the part it read."
        )
    if summary.degenerate:
        warnings.append(
            f"{_of(summary.degenerate, summary.prompts, 'prompt')} degenerate (all rewards or all log-likelihoods"
            " equal): left out of every figure and list below."
        )
    return tuple(warnings)


def _of(count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {plural(what, total)} ({percent(count / total)})"


def plural(word: str, count: int) -> str:
    """Put an s to the word unless there is one of it."""
    return word if count == 1 else f"{word}s"


def percent(share: float | None) -> str:
    """Write a share in [0, 1] as people do."""
    if share is None:
        return "–"
    return f"{100 * share:.0f} %" if share >= 0.0995 or share == 0 else f"{100 * share:.1f} %"


def signed(value: float) -> str:
    """Two decimals with a sign, the minus a true one."""
    return f"{value:+.2f}".replace("-", "−")


def number(value: float, decimals: int) -> str:
    """Format a number with a true minus."""
    return f"{value:.{decimals}f}".replace("-", "−")
