"""TRL's RewardTrainer with weights, ties, costs and a length penalty, and with nothing dropped on the way.

The pairs come encoded, by the code that scores (`dissonance.classifier`), and all of them fit: TRL would re-tokenise
them, and silently drop those that are too long.
"""

import math
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerState,
)
from trl import RewardConfig as TrlArguments
from trl import RewardTrainer

from dissonance.classifier import Classifier
from dissonance.config import RewardTraining, Tracker
from dissonance.progress import Advance, ProgressFactory
from dissonance.refine.losses import LossTerms, PairBatch, pair_loss, reward_loss
from dissonance.refine.session import on_one_device
from dissonance.refine.training_set import COLUMNS, EncodedPairs, collate, columns, length_bins, pair_batch

FULL_LEARNING_RATE, LORA_LEARNING_RATE = 1e-5, 1e-4


@dataclass(frozen=True)
class Objective:
    """What a classifier is trained for."""

    classifier: Classifier
    sign: float
    """1 for a reward model, -1 for a cost model: rewards are sign x outputs."""
    terms: LossTerms
    autocast: bool = False
    """Whether to train float32 weights with bfloat16 arithmetic."""

    def rewards(self, encoded: EncodedPairs) -> tuple[torch.Tensor, torch.Tensor]:
        """The rewards of the chosen and of the rejected answers, float64 (n,) each, no gradient; in evaluation mode."""
        training = self.classifier.model.training
        self.classifier.model.eval()
        values = torch.tensor(self.classifier.score(encoded.rows), dtype=torch.float64)
        self.classifier.model.train(training)
        chosen, rejected = (self.sign * values).chunk(2)
        return chosen, rejected

    def held_out_loss(self, encoded: EncodedPairs, rewards: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """The weighted mean over held-out pairs of what each costs, without the margin and the batches' penalty.

        `rewards` are what `rewards` says of them, where they are known already.
        """
        terms = LossTerms(safe_sign=self.terms.safe_sign)
        batch = pair_batch(columns(encoded.pairs, [(0, 0)] * len(encoded)))
        losses = pair_loss(*(rewards or self.rewards(encoded)), batch, terms)
        return float((batch.weight * losses).sum() / batch.weight.sum())


class PreferenceTrainer(RewardTrainer):  # type: ignore[misc]  # TRL is untyped
    """RewardTrainer on encoded, weighted pairs, with our loss and our held-out loss."""

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        objective: Objective,
        arguments: TrlArguments,
        training: Dataset,
        held_out: EncodedPairs,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._objective, self._held_out = objective, held_out
        classifier = objective.classifier
        settings = classifier.model.config.get_text_config()
        pad_id = settings.pad_token_id
        super().__init__(
            model=classifier.model,
            args=arguments,
            data_collator=partial(collate, classifier),
            train_dataset=training,
            # Held-out pairs are evaluated by `evaluate`; the trainer only asks whether there are any.
            eval_dataset=training.select([0]) if len(held_out) else None,
            processing_class=_tokenizer(classifier, pad_id),
            callbacks=list(callbacks),
        )
        # What TRL and Transformers would set to the tokenizer's, and save with every checkpoint.
        settings.pad_token_id = pad_id
        self.processing_class = None
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the model's type and the machine."""

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The loss of a batch that `collate` made."""
        del num_items_in_batch
        pairs = PairBatch(**{name: inputs[name] for name in COLUMNS})
        classifier = self._objective.classifier
        outputs = model(**{name: value for name, value in inputs.items() if name not in COLUMNS}, **classifier.uncached)
        rewards = self._objective.sign * classifier.outputs(outputs.logits).float()
        chosen, rejected = rewards.chunk(2)
        loss = reward_loss(chosen, rejected, pairs, self._objective.terms)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """The held-out loss, over all held-out pairs at once."""
        metrics = {f"{metric_key_prefix}_loss": self._objective.held_out_loss(self._held_out)}
        self.log(dict(metrics))
        control: Any = self.control  # type: ignore[has-type]  # the trainer's own
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: checkpoints are temporary."""


def _tokenizer(classifier: Classifier, pad_id: int) -> PreTrainedTokenizerBase:
    """A copy that TRL may change; a tokenizer without a pad token would be given another id than the batches have."""
    copy = deepcopy(classifier.tokenizer)
    copy.pad_token = copy.convert_ids_to_tokens(pad_id)
    return copy


class _Progress(TrainerCallback):  # type: ignore[misc]
    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._advance(1)


def training_steps(config: RewardTraining, n_pairs: int) -> int:
    """Optimiser steps of a training on so many pairs."""
    per_epoch = math.ceil(n_pairs / (config.batch_size * config.gradient_accumulation))
    return max(1, math.ceil(per_epoch * config.epochs))


def fit(
    objective: Objective,
    config: RewardTraining,
    training: EncodedPairs,
    held_out: EncodedPairs,
    seed: int,
    progress: ProgressFactory,
    trackers: Sequence[Tracker] = (),
) -> dict[str, Any]:
    """Train the objective's classifier in place, and leave it as it was at its best on the held-out pairs.

    Args:
        objective: what is trained.
        config: how.
        training: pairs with weights whose mean is 1.
        held_out: pairs with weights; without any, training goes to the end.
        seed: of the order of the pairs.
        progress: opens the progress of the training.
        trackers: where it is logged to.

    Returns:
        steps, best_step, stopped_early, and `history`: a list of step, loss and held_out_loss.

    Raises:
        ModelError: the loss became infinite or no number.
    """
    steps = training_steps(config, len(training))
    classifier = objective.classifier
    bins = [(0, 0)] * len(training)
    if config.length_penalty:
        bins = length_bins(classifier, training.pairs, config.length_bins)
    ids = {"chosen_ids": list(map(list, training.chosen)), "rejected_ids": list(map(list, training.rejected))}
    table = Dataset.from_dict({**ids, **columns(training.pairs, bins)})
    with (
        tempfile.TemporaryDirectory() as scratch,
        classifier.one_pad_id([*training.rows, *held_out.rows]),
        progress("reward model: training", steps, "steps") as advance,
    ):
        callbacks: list[TrainerCallback] = [_Progress(advance)]
        if config.patience and len(held_out):
            callbacks.append(EarlyStoppingCallback(config.patience))
        arguments = _arguments(objective, config, scratch, steps, seed, trackers, evaluated=bool(held_out))
        trainer = PreferenceTrainer(objective, on_one_device(arguments), table, held_out, callbacks)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    classifier.model.eval()
    return _history(trainer.state, steps)


def _arguments(
    objective: Objective,
    config: RewardTraining,
    scratch: str,
    steps: int,
    seed: int,
    trackers: Sequence[Tracker],
    *,
    evaluated: bool,
) -> TrlArguments:
    device = objective.classifier.device
    rate = LORA_LEARNING_RATE if is_peft_model(objective.classifier.model) else FULL_LEARNING_RATE
    warmup = steps // 10
    # The first step of a warm-up has a rate of 0: before the next, there is nothing new to evaluate.
    every = max(math.ceil(steps / config.evaluations), warmup + 1)
    return TrlArguments(
        output_dir=scratch,
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        learning_rate=config.learning_rate or rate,
        warmup_steps=warmup,
        weight_decay=0.01,
        bf16=objective.autocast,
        use_cpu=device.type == "cpu",
        max_length=None,  # all pairs fit already
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        eval_strategy="steps" if evaluated else "no",
        eval_steps=every,
        save_strategy="best" if evaluated else "no",
        save_only_model=True,
        save_total_limit=1,
        load_best_model_at_end=evaluated,
        metric_for_best_model="eval_loss" if evaluated else None,
        greater_is_better=False if evaluated else None,
        logging_steps=every,
        logging_nan_inf_filter=False,
        report_to=list(trackers) or "none",
        disable_tqdm=True,
        log_level="error",
    )


def _history(state: TrainerState, steps: int) -> dict[str, Any]:
    """What `fit` returns, from the trainer's log."""
    entries: dict[int, dict[str, float]] = {}
    for logged in state.log_history:
        names = {"loss": "loss", "eval_loss": "held_out_loss"}
        entry = {ours: logged[theirs] for theirs, ours in names.items() if theirs in logged}
        if entry:
            entries.setdefault(logged["step"], {"step": logged["step"]}).update(entry)
    history = [entries[step] for step in sorted(entries)]
    best = min((e for e in history if "held_out_loss" in e), key=lambda e: e["held_out_loss"], default={})
    return {
        "steps": state.global_step,
        "best_step": best.get("step", state.global_step),
        "stopped_early": state.global_step < steps,
        "history": history,
    }
