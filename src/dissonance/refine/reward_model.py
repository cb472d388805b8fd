"""A reward model made trainable, and saved so that what is loaded is what was trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dissonance.classifier import Classifier, load_classifier, load_for_training
from dissonance.config import RewardConfig, RewardTraining
from dissonance.conversation_encoder import ROLE, TokenIds
from dissonance.errors import DissonanceError, ModelError, SettingsError
from dissonance.huggingface import base_and_adapter, resolve_device, resolve_dtype, resolve_source
from dissonance.records import Preference

_PROBES = 32


def training_config(config: RewardTraining, start: RewardConfig) -> RewardConfig:
    """What is loaded for training: which model, and its weights' type.

    All weights are trained in float32, since bfloat16 swallows small steps. Under an adapter they stay as they are, in
    the type that the model is run in.

    Raises:
        SettingsError: the start is no model that can be trained, or the rank is not that of its adapter.
    """
    if ":" in (config.base or start.model):
        raise SettingsError(f"{ROLE}: {start.model} is a callable, which cannot be trained: set base to a model")
    device = resolve_device(start.device)
    if device.index:
        raise SettingsError(f"device {start.device}: training takes the first one: set CUDA_VISIBLE_DEVICES instead")
    dtype = "float32"
    if config.lora_rank is not None:
        dtype = str(resolve_dtype(start.dtype, device)).removeprefix("torch.")
    chosen: dict[str, str | None] = {"dtype": dtype}
    if config.base is not None:
        chosen |= {"model": config.base, "adapter": None, "index": None}
    return start.model_copy(update=chosen)


def trainable_model(config: RewardTraining, loaded: RewardConfig) -> PreTrainedModel:
    """The model of `training_config`, ready for the trainer, in evaluation mode.

    Raises:
        ModelError: it cannot be loaded, or has several outputs.
        SettingsError: its adapter has another rank.
    """
    source = resolve_source(base_and_adapter(loaded, ROLE)[0], ROLE)
    if source.kwargs and config.lora_rank is not None:
        raise SettingsError(f"{ROLE}: an adapter cannot go on a .gguf file: leave lora_rank out, or give a folder")
    new: frozenset[str] = frozenset()
    if config.base is not None:
        model, new = load_for_training(loaded)
    else:
        model = load_classifier(loaded, trainable=config.lora_rank is not None, merge=config.lora_rank is None)
    if model.config.num_labels != 1:
        raise ModelError(
            f"{ROLE}: {loaded.model} has {model.config.num_labels} outputs, and training needs one: set base to train "
            "a new head"
        )
    if config.lora_rank is None:
        return model.requires_grad_(True)  # what an adapter stood on was frozen
    # Wherever the process runs when the adapter is loaded again.
    base = str(Path(source.name).resolve()) if Path(source.name).is_dir() else source.name
    if not is_peft_model(model):
        model = _with_adapter(model, config.lora_rank, new)
    adapter = model.peft_config[model.active_adapter]
    adapter.base_model_name_or_path = base
    if adapter.r != config.lora_rank:
        raise SettingsError(
            f"{ROLE}: {loaded.adapter or loaded.model} is an adapter of rank {adapter.r}: set lora_rank to that, "
            "or leave it out to merge the adapter and train all weights"
        )
    return model.eval()


def _with_adapter(model: PreTrainedModel, rank: int, new: frozenset[str]) -> PreTrainedModel:
    """LoRA on the backbone's linear layers; the head, and whatever has no trained weights, is trained and saved whole.

    PEFT knows heads by the names `score` and `classifier`; here they are what stands beside the backbone.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    backbone = model.base_model_prefix
    heads = {
        name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
    }
    heads |= {name.rpartition(".")[0] for name in new if name.startswith(f"{backbone}.")}
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, target_modules=layers, modules_to_save=sorted(heads)
    )
    return get_peft_model(model, settings)


def save(classifier: Classifier, folder: Path) -> None:
    """Write the model, or its adapter, with its tokenizer."""
    adapter = {"save_embedding_layers": False} if is_peft_model(classifier.model) else {}
    classifier.model.save_pretrained(folder, **adapter)
    classifier.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Probe:
    """A few texts, and what a model made of them: by these it is known again."""

    pairs: tuple[Preference, ...]
    rows: tuple[TokenIds, ...]
    """Token ids of the chosen, then of the rejected answers."""
    outputs: tuple[float, ...]
    """The model's output for each row."""

    @classmethod
    def of(cls, classifier: Classifier, pairs: Sequence[Preference]) -> "Probe":
        """Score the first few of the pairs; those that are too long are cut."""
        kept = tuple(pairs[:_PROBES])
        answers = [pair.chosen for pair in kept] + [pair.rejected for pair in kept]
        rows = [classifier.cut(ids) for ids in classifier.encode([pair.messages for pair in kept] * 2, answers)]
        return cls(kept, tuple(rows), tuple(classifier.score(rows)))

    def check_trained(self, classifier: Classifier) -> "Probe":
        """The probe after training.

        Raises:
            ModelError: it gives the same outputs as before, or such as are no numbers.
        """
        now = Probe.of(classifier, self.pairs)
        if not all(map(isfinite, now.outputs)):
            raise ModelError(f"{ROLE}: the training diverged: lower learning_rate")
        if now.outputs == self.outputs:
            raise ModelError(f"{ROLE}: the training changed nothing: raise learning_rate or epochs")
        return now

    def check_same(self, loaded: Classifier) -> None:
        """Compare with the model that was loaded from what was saved.

        Raises:
            DissonanceError: it reads another text, or gives another output, if only in the last bit.
        """
        now = Probe.of(loaded, self.pairs)
        if now.rows != self.rows:
            raise DissonanceError(f"{ROLE}: the saved tokenizer reads other tokens than the one that was trained with")
        if now.outputs != self.outputs:
            furthest = max(abs(a - b) for a, b in zip(now.outputs, self.outputs, strict=True))
            raise DissonanceError(
                f"{ROLE}: the saved model is not the trained one: its outputs differ by up to {furthest:.3g}"
            )
