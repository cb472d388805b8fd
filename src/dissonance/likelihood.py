"""The three readings of a completion's log-likelihood.

sum       log pi(y | x), as in Liu et al., arXiv 2512.09212; falls with length
mean      log pi(y | x) / n_tokens, per token
relative  log pi(y | x) - log pi_ref(y | x), which removes fluency and length
"""

from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dissonance.errors import DataError, SettingsError

Likelihood = Literal["sum", "mean", "relative"]
LIKELIHOODS: tuple[Likelihood, ...] = get_args(Likelihood)

_NEEDS = {"sum": ("logprob",), "mean": ("logprob", "n_tokens"), "relative": ("logprob", "ref_logprob")}


def loglikelihood(completions: pa.Table, likelihood: Likelihood) -> NDArray[np.float64]:
    """Read the log-likelihood of each completion, (R,), nats (`mean`: nats per token).

    `completions` has the columns of `records.COMPLETIONS_SCHEMA` that the reading needs. Raises SettingsError for
    an unknown reading or a missing column, DataError for a missing value or a completion without tokens.
    """
    if likelihood not in LIKELIHOODS:
        raise SettingsError(f"unknown likelihood {likelihood!r}: use one of {', '.join(LIKELIHOODS)}")
    logprob, *other = (_column(completions, name, likelihood) for name in _NEEDS[likelihood])
    if likelihood == "mean":
        if (other[0] < 1).any():
            raise DataError(f"row {int(np.argmax(other[0] < 1)) + 1}: n_tokens is below 1, so there is no mean")
        return logprob / other[0]
    return logprob - other[0] if likelihood == "relative" else logprob


def has_reading(completions: pa.Table, likelihood: Likelihood) -> bool:
    """Whether every completion has what a reading takes."""
    if any(name not in completions.column_names or completions[name].null_count for name in _NEEDS[likelihood]):
        return False
    return likelihood != "mean" or not len(completions) or pc.min(completions["n_tokens"]).as_py() >= 1


def _column(completions: pa.Table, name: str, likelihood: str) -> NDArray[np.float64]:
    if name not in completions.column_names or (len(completions) and completions[name].type == pa.null()):
        raise SettingsError(f"likelihood {likelihood!r} needs the column {name!r}: add it, or take another likelihood")
    column = completions[name]
    if column.null_count:
        row = column.is_null().index(True).as_py() + 1
        needed = f"needed for likelihood {likelihood!r}"
        raise DataError(f"row {row}: {name} is missing, {needed}: add it, or take another likelihood")
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return values
