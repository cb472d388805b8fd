"""The run's reading of the log-likelihood, as the page names it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dissonance.likelihood import Likelihood
from dissonance.report.examples import clip

_NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Reading:
    """How log-likelihoods are read, and written."""

    likelihood: Likelihood
    label: str
    """With the unit or the reference model."""

    decimals: int


def reading(settings: Mapping[str, Any]) -> Reading:
    """Read it off the settings in `run.json`; the sum where they do not say."""
    likelihood: Likelihood = settings.get("likelihood", "sum")
    if likelihood == "mean":
        return Reading(likelihood, "log-likelihood per token", 3)
    if likelihood == "relative":
        policy = settings.get("policy")
        reference = str(policy.get("reference", "")) if isinstance(policy, Mapping) else ""
        return Reading(likelihood, f"log-likelihood relative to {base_name(reference)}", 2)
    return Reading(likelihood, "log-likelihood", 1)


def base_name(source: str) -> str:
    """Name a model by the last part of its path or hub id."""
    return clip(source.rstrip("/").rsplit("/", 1)[-1], _NAME_CHARACTERS)
