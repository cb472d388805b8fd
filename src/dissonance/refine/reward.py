"""Pairs -> a refined reward model: a Hugging Face folder that scores as the model in memory did, to the bit.

    encode -> measure -> train -> save -> load -> compare -> measure

What has gone wrong in published code for this method is checked here rather than hoped for: that rewards are oriented
before and after (a cost model prefers the lower output), that no pair is dropped silently, and that what is loaded
from the folder is what was trained, its head included.
"""

import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dissonance.artifacts import atomic_folder
from dissonance.classifier import Classifier
from dissonance.config import RewardConfig, RewardTraining, Tracker
from dissonance.errors import DataError, ModelError
from dissonance.huggingface import free_memory, resolve_device, resolve_dtype
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import Preference
from dissonance.refine.calibration import accuracy, calibration, proportion
from dissonance.refine.losses import LossTerms
from dissonance.refine.pairs import mix, new_share
from dissonance.refine.reward_model import Probe, save, trainable_model, training_config
from dissonance.refine.reward_trainer import Objective, fit
from dissonance.refine.session import check_trackers, training_session
from dissonance.refine.training_set import EncodedPairs, encode_pairs

MEASURED = ("new", "held_out_original", "held_out_new")
"""The sets that are measured before and after."""

_OVERTURNED = "; if it was people who contradicted them, set may_overturn"

_CHECKED = 512
"""Of the original pairs, so many are looked at before training."""


def refine_reward_model(  # noqa: PLR0913
    config: RewardTraining,
    start: RewardConfig,
    original: Sequence[Preference],
    new: Sequence[Preference],
    held_out_original: Sequence[Preference],
    held_out_new: Sequence[Preference],
    out: Path,
    *,
    seed: int = 0,
    progress: ProgressFactory = quiet,
    trackers: Sequence[Tracker] = (),
) -> dict[str, Any]:
    """Train a reward model on original and new preferences together.

    Args:
        config: how.
        start: the current reward model; its template, length, device and kind hold for the refined one, so that
            `start.trained(out)` loads that.
        original: what the current model learnt from; may be empty.
        new: what people said since; may be empty.
        held_out_original: pairs of the first kind that are not trained on; may be empty.
        held_out_new: likewise of the second.
        out: the folder to make: a model, or with `lora_rank` an adapter that names its base.
        seed: decides everything that is drawn.
        progress: opens the progress of the training.
        trackers: where the training is logged to.

    Returns:
        `kind`, `base`, `lora_rank`; `pairs` and `left_out` by set; `new_weight`, the share in force; `steps`,
        `best_step`, `stopped_early`, `history`, `seconds`; and for each set of `MEASURED` what `measure` says `before`
        (None from a base) and `after`.

    Raises:
        SettingsError: the settings contradict each other, the model, or what is installed.
        DataError: there is nothing to train on, or too many pairs do not fit.
        ModelError: a model cannot be loaded or trained, or ranks the original pairs worse than chance.
        RunError: the folder is there already.
        DissonanceError: what was saved is not what was trained.
    """
    started = time.perf_counter()
    check_trackers(trackers)
    with training_session(out, seed), atomic_folder(out) as folder:
        loaded = training_config(config, start)
        objective = _objective(config, start, Classifier(loaded, trainable_model(config, loaded)))
        given = {"original": original, "new": new}
        given |= {"held_out_original": held_out_original, "held_out_new": held_out_new}
        encoded, left_out = _encoded(objective.classifier, given, config, seed)
        training = _mixed(encoded["original"], encoded["new"], config.new_weight)
        held_out = _mixed(encoded["held_out_original"], encoded["held_out_new"], config.new_weight)
        if not training:
            raise DataError("there are no pairs to train on: give original or new ones")
        before = None if config.base else {name: measure(objective, encoded[name]) for name in MEASURED}
        if before is not None:
            _check_orientation(before, objective, encoded["original"], start)
        probe = Probe.of(objective.classifier, training.pairs)
        learned = fit(objective, config, training, held_out, seed, progress, trackers)
        probe = probe.check_trained(objective.classifier)
        save(objective.classifier, folder)
        del objective
        free_memory()  # there need not be room for two models
        saved = loaded.trained(folder)
        refined = _objective(config, start, Classifier(saved))
        probe.check_same(refined.classifier)
        after = {name: measure(refined, encoded[name]) for name in MEASURED}
        if not config.may_overturn:
            _check_orientation(after, refined, encoded["original"], start, _OVERTURNED)
    return {
        "kind": start.kind,
        "base": config.base,
        "lora_rank": config.lora_rank,
        "pairs": {name: len(pairs) for name, pairs in encoded.items()},
        "ties": {name: sum(pair.tie for pair in pairs.pairs) for name, pairs in encoded.items()},
        "left_out": left_out,
        "new_weight": _share(encoded["original"], encoded["new"], config.new_weight),
        **learned,
        **{name: {"before": before and before[name], "after": after[name]} for name in MEASURED},
        "seconds": time.perf_counter() - started,
    }


def measure(objective: Objective, encoded: EncodedPairs) -> dict[str, Any] | None:
    """How a reward model orders pairs; None where there are none.

    `pairs` and `ties`; `accuracy`, an interval over the pairs that are no ties; `loss`, what `Objective.held_out_loss`
    says; `mean_lead`, r(chosen) - r(rejected) over the same; `calibration`; and for a cost model `sign_accuracy`, the
    share of the answers of known safety whose cost has the right sign.
    """
    if not encoded:
        return None
    rewards = objective.rewards(encoded)
    chosen, rejected = (side.numpy() for side in rewards)
    decided = np.array([not pair.tie for pair in encoded.pairs])
    leads = (chosen - rejected)[decided]
    groups = [_group(pair) for pair in encoded.pairs]
    found = {
        "pairs": int(decided.sum()),
        "ties": int((~decided).sum()),
        "accuracy": accuracy(leads, [g for g, kept in zip(groups, decided, strict=True) if kept]),
        "loss": objective.held_out_loss(encoded, rewards),
        "mean_lead": float(leads.mean()) if len(leads) else None,
        "calibration": calibration(leads),
    }
    if objective.sign < 0:
        found["sign_accuracy"] = _sign_accuracy(np.concatenate([chosen, rejected]), encoded, groups)
    return found


def _sign_accuracy(
    rewards: np.ndarray[Any, np.dtype[np.float64]], encoded: EncodedPairs, groups: Sequence[Hashable]
) -> dict[str, float] | None:
    safe = [pair.chosen_safe for pair in encoded.pairs] + [pair.rejected_safe for pair in encoded.pairs]
    known = [i for i, value in enumerate(safe) if value is not None]
    hits = np.array([float((rewards[i] > 0) == safe[i]) for i in known])
    return proportion(hits, [groups[i % len(groups)] for i in known])


def _group(pair: Preference) -> Hashable:
    """Pairs on one prompt are not independent."""
    return pair.prompt_id or pair.messages


def _objective(config: RewardTraining, start: RewardConfig, classifier: Classifier) -> Objective:
    cost = start.kind == "cost"
    terms = LossTerms(config.margin, config.center, config.safe_sign if cost else 0.0, config.length_penalty)
    native = resolve_dtype(start.dtype, resolve_device(start.device))
    autocast = config.lora_rank is None and native == torch.bfloat16
    return Objective(classifier, -1.0 if cost else 1.0, terms, autocast)


def _encoded(
    classifier: Classifier, given: dict[str, Sequence[Preference]], config: RewardTraining, seed: int
) -> tuple[dict[str, EncodedPairs], dict[str, Any]]:
    """Every set encoded, and by set what was left out; of too many original pairs some are drawn before."""
    encoded, left_out = {}, {}
    for name, pairs in given.items():
        rows = list(range(len(pairs)))
        if name == "original" and config.max_original is not None and config.max_original < len(pairs):
            drawn = np.random.default_rng(seed).choice(len(pairs), config.max_original, replace=False)
            rows = sorted(drawn.tolist())
        taken = [pairs[i] for i in rows]
        encoded[name], dropped = encode_pairs(classifier, taken, name, config.max_left_out, rows)
        left_out[name] = dropped.summary()
    return encoded, left_out


def _mixed(original: EncodedPairs, new: EncodedPairs, new_weight: float | None) -> EncodedPairs:
    return (original + new).reweighted(mix(original.pairs, new.pairs, new_weight))


def _share(original: EncodedPairs, new: EncodedPairs, new_weight: float | None) -> float:
    sums = [sum(pair.weight for pair in part.pairs) for part in (original, new)]
    return new_share(sums[0], sums[1], new_weight)


def _check_orientation(
    measured: Mapping[str, Any], objective: Objective, original: EncodedPairs, start: RewardConfig, otherwise: str = ""
) -> None:
    """Refuse a model that ranks what it learnt from worse than chance: its sign, or the pairs' sides, must be wrong.

    New pairs say nothing here: they may have been chosen because the model errs on them.
    """
    found = measured["held_out_original"] or measure(objective, original.first(_CHECKED))
    if found and found["accuracy"] and found["accuracy"]["high"] < 0.5:
        other = "reward" if start.kind == "cost" else "cost"
        raise ModelError(
            f"reward model: {start.model}, read as a {start.kind} model, prefers the rejected answer in "
            f"{1 - found['accuracy']['mean']:.0%} of {found['pairs']:,} original pairs: set kind to {other}, or turn "
            f"the pairs round if chosen and rejected are swapped{otherwise}"
        )
