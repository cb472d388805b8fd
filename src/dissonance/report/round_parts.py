"""What the pictures of the rounds have in common: what a round left, and how estimates are drawn and said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dissonance.report.figures import Figure
from dissonance.report.headline import number
from dissonance.report.round_charts import rounds_chart

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Round:
    """What one round left; whatever it did not have is empty."""

    policy: Values = field(default_factory=dict)
    """What refining the policy came to: `history`, a dict for each measurement of step, reward, kl, length and entropy,
    as far as they are there; `stopped`, the step and the reason where it was stopped."""

    reward_model: Values = field(default_factory=dict)
    """What refining the reward model came to."""

    evaluation: Values = field(default_factory=dict)
    """The figures of the evaluation."""

    labels: Sequence[Values] = ()
    """Rows of `evaluation_labels.parquet`."""

    prompts: Mapping[str, str] = field(default_factory=dict)
    """The questions that were asked about, by prompt_id."""


def estimate(place: int, series: str, interval: Values | None) -> dict[str, Any] | None:
    """A row of `rounds_chart`; None where there is no estimate."""
    return None if interval is None else {"round": str(place), "series": series, **interval}


def by_round(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[dict[str, Any] | None],
    axis: str,
    colours: dict[str, str],
    reference: float | None = None,
) -> Figure | None:
    """Draw estimates with their intervals round by round, a colour for each series that is there; None of none."""
    known = [row for row in rows if row is not None]
    if not known:
        return None
    last = [row for row in known if row["round"] == known[-1]["round"]]
    said = "; ".join(f"{row['series']} {in_words(row, 3)}" for row in last)
    drawn = {series: colour for series, colour in colours.items() if any(row["series"] == series for row in known)}
    return Figure(
        name=name,
        title=title,
        caption=caption.strip(),
        description=f"{axis[0].upper()}{axis[1:]} after round {known[-1]['round']}: {said}.",
        spec=rounds_chart(known, axis, drawn, reference),
    )


def in_words(interval: Values, decimals: int) -> str:
    """An estimate, with its interval in brackets where it has one."""
    mean = number(interval["mean"], decimals)
    if interval["low"] is None:
        return mean
    return f"{mean} ({number(interval['low'], decimals)} to {number(interval['high'], decimals)})"
