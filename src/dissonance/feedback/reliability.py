"""What each annotator's answers are worth, and what they say together."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dissonance.feedback.preference_graph import FloatArray, IntArray
from dissonance.feedback.votes import MIRRORED, Coded


@dataclass(frozen=True, eq=False, slots=True)
class DawidSkene:
    """What an annotator's answers are worth, and what they say together."""

    posterior: FloatArray
    """(U, n_values) how probable each value is the true one of each unit."""
    reliability: Mapping[str, float]
    """By annotator, in [0, 1]: the mean posterior of the values they gave."""


def dawid_skene(answers: Coded, known: Mapping[int, int] | None = None) -> DawidSkene:
    """Estimate the true values and each annotator's errors together (Dawid and Skene 1979), by crowd-kit's EM.

    Which completion of a pair is called the first is a name and no property: each pair is given a second time the other
    way round, so that no annotator's errors, and no posterior, depend on it. `known` holds the units whose true value
    is known. With one annotator a unit, the posterior is what was said.
    """
    n_units = len(answers.units)
    if not n_units:
        return DawidSkene(np.zeros((0, answers.n_values)), {})
    unit, worker, value, known = answers.unit, answers.annotator, answers.value, dict(known or {})
    if len(answers.units[0].completion_ids) == 2:
        unit, worker = np.concatenate([unit, unit + n_units]), np.concatenate([worker, worker])
        value = np.concatenate([value, np.array(MIRRORED)[value]])
        known |= {u + n_units: MIRRORED[v] for u, v in known.items()}
    posterior = _expectation_maximization(unit, worker, value, known, answers.n_values)[:n_units]
    right = posterior[answers.unit, answers.value]
    share = np.bincount(answers.annotator, right) / np.bincount(answers.annotator)
    return DawidSkene(posterior, dict(zip(answers.annotators, share.tolist(), strict=True)))


def _expectation_maximization(
    unit: IntArray, worker: IntArray, value: IntArray, known: Mapping[int, int], n_values: int
) -> FloatArray:
    """Posterior (U, n_values) by crowd-kit; pandas stays in here."""
    import pandas as pd
    from crowdkit.aggregation import DawidSkene as Model

    frame = pd.DataFrame({"task": unit, "worker": worker, "label": value})
    given = set(value.tolist())  # the model knows no value that nobody gave
    truth = {u: v for u, v in known.items() if v in given}
    model: Any = Model(n_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # crowd-kit 1.4 on pandas 3
        model.fit(frame, true_labels=pd.Series(truth, dtype=np.int64) if truth else None)
    posterior = model.probas_.reindex(index=range(int(unit.max()) + 1), columns=range(n_values), fill_value=0.0)
    return np.asarray(posterior, np.float64)
