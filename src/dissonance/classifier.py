"""A Hugging Face sequence classifier that reads conversations: what scoring and training a reward model share.

What a model is trained on is then exactly what it is scored on: the same text, the same tokens, the same padding.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from dissonance.config import RewardConfig
from dissonance.conversation_encoder import ROLE, ConversationEncoder, TokenIds
from dissonance.errors import DissonanceError, ModelError
from dissonance.huggingface import (
    Source,
    base_and_adapter,
    is_out_of_memory,
    loading,
    resolve_device,
    resolve_dtype,
    resolve_source,
    resolve_tokens_per_batch,
)
from dissonance.shared_prefix import Family, can_share, families, keeps_cache, read_families


class Classifier(ConversationEncoder):
    """A sequence classifier with one output, or the output that `index` names; scores are as the model gives them.

    Batches are padded on the right whatever the tokenizer's side, so that every position is counted from the start.

    Args:
        config: which model, and how it is read.
        model: the model if it is loaded already, else it is loaded here.

    Raises:
        ModelError: it cannot be loaded, is a causal LM, has several outputs and no index, or a head without weights.
    """

    def __init__(self, config: RewardConfig, model: PreTrainedModel | None = None) -> None:
        self.device = resolve_device(config.device)
        self.model = load_classifier(config) if model is None else model
        super().__init__(config, self.model.config)
        self._index = output_index(config, self.model.config.num_labels)
        self._pad_id: int | None = self.model.config.get_text_config().pad_token_id
        self._budget = resolve_tokens_per_batch(config, self.device)
        self._shares = not self._pair and can_share(self.model)
        self.uncached = {"use_cache": False} if keeps_cache(self.model) else {}
        """What a forward pass over whole conversations is told: to keep no keys and values, which nobody reads."""

    def score(self, rows: Sequence[TokenIds]) -> list[float]:
        """The model's output for each row, none longer than `max_length`, whatever the batches.

        Equal rows are scored once, so that rounding cannot break a tie. What rows share at their beginning is read
        once, where the model allows it. Leaves the model's mode as it is.
        """
        distinct = set(rows)
        known = self._score_families(families([*distinct], self._pad_id)) if self._shares else {}
        alone = sorted(distinct - known.keys(), key=lambda ids: (len(ids), ids))
        values: list[float] = []
        while len(values) < len(alone):
            start = len(values)
            stop = start + 1
            while stop < len(alone) and (stop + 1 - start) * len(alone[stop]) <= self._budget:
                stop += 1
            values += self._score_batch(alone[start:stop])
        known |= zip(alone, values, strict=True)
        return [known[ids] for ids in rows]

    def _score_families(self, some: Sequence[Family]) -> dict[TokenIds, float]:
        """The outputs for the rows of families; those that the memory or the budget has no room for are left out."""
        waiting = sorted((f for f in some if f.shared + f.width <= self._budget), key=lambda f: (f.shared, f.rows))
        known: dict[TokenIds, float] = {}
        while waiting:
            stop = _that_fit(waiting, self._budget)
            known |= self._score_some(waiting[:stop])
            waiting = waiting[stop:]
        return known

    def _score_some(self, some: Sequence[Family]) -> dict[TokenIds, float]:
        rows = [row for family in some for row in family.rows]
        held = max(family.shared for family in some) * len(some)
        at_once = max(1, (self._budget - held) // max(family.width for family in some))
        try:
            with self.one_pad_id(rows):
                logits = read_families(self.model.to(self.device), some, self.inputs, at_once)
            return dict(zip(rows, self.outputs(logits).double().tolist(), strict=True))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._budget = max(1, self._budget // 2)
        if len(some) == 1:
            return {}
        middle = len(some) // 2
        return self._score_some(some[:middle]) | self._score_some(some[middle:])

    def _score_batch(self, rows: Sequence[TokenIds]) -> list[float]:
        try:
            return self._forward(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise DissonanceError(f"{ROLE}: out of memory on a text of {len(rows[0])} tokens") from error
        self._budget = max(1, self._budget // 2)
        middle = len(rows) // 2
        return self._score_batch(rows[:middle]) + self._score_batch(rows[middle:])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[TokenIds]) -> list[float]:
        with self.one_pad_id(rows):
            inputs = {name: tensor.to(self.device) for name, tensor in self.inputs(rows).items()}
            logits = self.model.to(self.device)(**inputs, **self.uncached).logits
        values: list[float] = self.outputs(logits).double().tolist()
        return values

    def outputs(self, logits: torch.Tensor) -> torch.Tensor:
        """The output that is read, (B,), of a model's logits (B, outputs)."""
        return logits[:, self._index]

    def inputs(self, rows: Sequence[TokenIds]) -> dict[str, torch.Tensor]:
        """What the model takes for a batch of rows, on the CPU; each tensor is (rows, longest).

        To be used inside `one_pad_id`, for these rows or for more.
        """
        longest = max(len(ids) for ids in rows)
        ids = torch.tensor([[*row, *[self._pad_id] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(longest) < lengths.unsqueeze(-1)).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.marks_segments:
            inputs["token_type_ids"] = self._segments(ids, mask)
        return inputs

    @contextmanager
    def one_pad_id(self, rows: Sequence[TokenIds]) -> Iterator[None]:
        """Settle the pad id for batches of these rows, which may be made ahead of their use.

        A model without one was trained a row at a time. It gets an id that no row holds, and its head then reads each
        row's true last token; afterwards its settings are what they were.
        """
        settings, own = self.model.config.get_text_config(), self._pad_id
        if own is None:
            self._pad_id = settings.pad_token_id = self._free_id(rows)
        try:
            yield
        finally:
            self._pad_id = settings.pad_token_id = own

    def _free_id(self, rows: Sequence[TokenIds]) -> int:
        """An id that no row holds; where all are held, one that no row ends with does too."""
        vocabulary = range(self.model.config.get_text_config().vocab_size)
        used, last = {token for row in rows for token in row}, {row[-1] for row in rows}
        return next((i for i in vocabulary if i not in used), next(i for i in vocabulary if i not in last))

    def _segments(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """1 after the first separator, as BERT's second segment is."""
        separators = (ids == self.tokenizer.sep_token_id).long()
        second: torch.Tensor = (separators.cumsum(dim=-1) - separators).clamp(max=1)
        return second * mask


def _that_fit(some: Sequence[Family], budget: int) -> int:
    """How many of the families, one at least, are read together: rows x (longest prefix + rest), and the prefixes."""
    shared = rest = rows = 0
    for count, family in enumerate(some):
        shared, rest = max(shared, family.shared), max(rest, family.width - family.shared)
        rows += len(family.rows)
        if count and shared * (count + 1) + (shared + rest) * rows > budget:
            return count
    return len(some)


def check_classifies(config: RewardConfig) -> PreTrainedConfig:
    """A reward model's configuration, if what it names can be one; reads no weights.

    Raises:
        ModelError: it is a causal LM.
    """
    base, adapter = base_and_adapter(config, ROLE)
    source = resolve_source(base, ROLE)
    with loading(ROLE, config.model):
        known = AutoConfig.from_pretrained(source.name, trust_remote_code=config.trust_remote_code, **source.kwargs)
    architecture = (known.architectures or ["unknown"])[0]
    if adapter is None and architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{ROLE}: {config.model} is a causal LM ({architecture}); its reward head would be random: "
            "train one first, with `trl reward` for example"
        )
    return known


def load_classifier(config: RewardConfig, *, trainable: bool = False, merge: bool = False) -> PreTrainedModel:
    """Load a classifier whose every weight is known, in evaluation mode.

    Args:
        config: which model, in which type.
        trainable: an adapter's weights are to be trained further.
        merge: an adapter becomes part of the model's own weights.

    Raises:
        ModelError: see `Classifier`.
    """
    base, adapter = base_and_adapter(config, ROLE)
    source = resolve_source(base, ROLE)
    with loading(ROLE, config.model):
        known = check_classifies(config)
        output_index(config, 1 if adapter is not None else known.num_labels)
        heads = {"num_labels": 1} if adapter is not None and known.num_labels != 1 else {}
        model, missing = _from_pretrained(config, source, heads)
        _keep_head_exact(model)  # before an adapter brings its own head, which would be rounded
        if adapter is not None:
            from peft import PeftModel

            missing -= _adapter_covers(Path(adapter), missing)
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
            model = model.merge_and_unload() if merge else model
        if missing:
            raise ModelError(
                f"{ROLE}: {config.model} has no weights for {', '.join(sorted(missing)[:3])}: they would be "
                "random (a LoRA adapter must be saved with modules_to_save=['score'])"
            )
    return model.eval()


def load_for_training(config: RewardConfig) -> tuple[PreTrainedModel, frozenset[str]]:
    """Load a base model with one output, in evaluation mode, and name the weights of its head that are new and random.

    A causal or masked LM gets a new head, and so does a classifier with several outputs; a classifier with one output
    keeps its own.

    Raises:
        ModelError: it cannot be loaded, is an adapter, or lacks weights that are not the head's.
    """
    base, adapter = base_and_adapter(config, ROLE)
    if adapter is not None:
        raise ModelError(f"{ROLE}: the base {config.model} is an adapter: name the model that it goes on")
    source = resolve_source(base, ROLE)
    with loading(ROLE, config.model):
        model, missing = _from_pretrained(config, source, {"num_labels": 1, "ignore_mismatched_sizes": True})
    backbone = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(backbone) and "pooler" not in name)
    if lost:
        raise ModelError(
            f"{ROLE}: {config.model} has no weights for {', '.join(lost[:3])}: it is no base to train from"
        )
    _keep_head_exact(model)
    return model.eval(), frozenset(missing)


def _from_pretrained(
    config: RewardConfig, source: Source, settings: Mapping[str, object]
) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of the weights that it did not find."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source.name, dtype=resolve_dtype(config.dtype, resolve_device(config.device)), output_loading_info=True,
        trust_remote_code=config.trust_remote_code, **settings, **source.model_kwargs(),
    )  # fmt: skip
    mismatched = {found if isinstance(found, str) else found[0] for found in info.get("mismatched_keys", ())}
    return model, set(map(str, info["missing_keys"])) | mismatched


def _keep_head_exact(model: PreTrainedModel) -> None:
    """Compute the head in float32: bfloat16 near 3 has steps of 1/64, which would tie rewards that differ."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _adapter_covers(adapter: Path, missing: Iterable[str]) -> set[str]:
    """Which of the base's missing weights the adapter brings."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{ROLE}: {adapter} has no adapter_model.safetensors")
    with safe_open(weights, framework="pt") as stored:
        saved = set(stored.keys())
    return {name for name in missing if any(key.endswith(name) for key in saved)}


def output_index(config: RewardConfig, outputs: int) -> int:
    """Which of a model's outputs is the reward; a ModelError where that is not said, or there is no such output."""
    if config.index is None and outputs != 1:
        raise ModelError(f"{ROLE}: {config.model} has {outputs} outputs: name the one to use with --reward-index")
    if config.index is not None and config.index >= outputs:
        raise ModelError(f"{ROLE}: --reward-index {config.index}: {config.model} has outputs 0 to {outputs - 1}")
    return config.index or 0
