"""Before and after, on held-out prompts, with intervals.

guards.py      what may be evaluated on, and who may grade
collect.py     prompts and models -> tables of answers, pairs and labels
measures.py    the tables -> every figure
detection.py   whether conflict foretold the reward model's errors
statistics.py  means, shares and AUCs with a cluster bootstrap; win rates, KL
"""

from pathlib import Path
from typing import Any

from dissonance.artifacts import write_table
from dissonance.config import EvaluationConfig
from dissonance.errors import SettingsError
from dissonance.evaluate.collect import (
    ANSWERS_SCHEMA,
    LABELS_SCHEMA,
    PAIRS_SCHEMA,
    Asked,
    Models,
    answers_table,
    labels_table,
    pairs_table,
)
from dissonance.evaluate.guards import Grader, HeldOut, normalised, overlaps
from dissonance.evaluate.measures import figures
from dissonance.progress import ProgressFactory, quiet

__all__ = [
    "ANSWERS_SCHEMA",
    "LABELS_SCHEMA",
    "PAIRS_SCHEMA",
    "Asked",
    "Grader",
    "HeldOut",
    "Models",
    "evaluate",
    "figures",
    "normalised",
    "overlaps",
]


def evaluate(
    held_out: HeldOut,
    models: Models,
    grader: Grader | None,
    config: EvaluationConfig,
    out: Path,
    *,
    asked: Asked | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Compare a policy and a reward model with what they were before.

    Leaves in `out`, each atomically, evaluation_answers.parquet, evaluation_pairs.parquet where there are held-out
    pairs, and evaluation_labels.parquet where something was asked; `figures` makes the result from them.

    Args:
        held_out: prompts, and pairs, that nothing was trained on.
        models: what makes each model.
        grader: the gold reward; None leaves out what needs it.
        config: completions per prompt, likelihood, ties, replicates, seed.
        out: a folder that is there.
        asked: what was asked in a round, and what people said.
        progress: opens the progress of each step.

    Returns:
        The figures, as docs/evaluate.md lists them, and `grader`.

    Raises:
        InputError: a model or the data cannot be used as asked.
        DissonanceError: a model gave another number of results than it was asked for.
    """
    if config.likelihood == "relative" and models.reference is None:
        raise SettingsError("likelihood relative needs a reference model: give one, or take another likelihood")
    # What takes longest comes last, so that a mistake in the rest is found out before.
    labels = None if asked is None else labels_table(asked, models, progress)
    pairs = pairs_table(held_out, models, progress) if held_out.pairs else None
    answers = answers_table(held_out, models, grader, config.n, progress)
    for name, table in {"answers": answers, "pairs": pairs, "labels": labels}.items():
        if table is not None:
            write_table(out / f"evaluation_{name}.parquet", table)
    return {
        **figures(answers, pairs, labels, config),
        "grader": None if grader is None else {"fingerprint": grader.fingerprint, "annotated": grader.annotated},
    }
