"""A Hugging Face sequence classifier as a reward model or a cost model."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from dissonance.config import RewardConfig
from dissonance.errors import DataError, DissonanceError, ModelError
from dissonance.huggingface import (
    PLAIN_TEMPLATE,
    base_and_adapter,
    encode_text,
    is_out_of_memory,
    join_answer,
    load_tokenizer,
    loading,
    render_chat,
    render_plain,
    resolve_device,
    resolve_dtype,
    resolve_source,
    resolve_tokens_per_batch,
    uses_chat_template,
)
from dissonance.records import Message, Reward

_ROLE = "reward model"
# RoBERTa's kin count positions from two.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"}
# Tokenizers without a limit of their own say 10^30.
_NO_LIMIT = 10**9


class HFRewardModel:
    """A sequence classifier with one output, or the output that `index` names; `cost` models are negated.

    A conversation goes through the model's own tokenizer: its chat template when it has one; else, for encoders, prompt
    and answer as a pair; else the plain template, the answer, and the end-of-sequence token, as TRL trains it.
    Batches are padded on the right whatever the tokenizer's side, so that every position is counted from the start.

    Raises:
        ModelError: it cannot be loaded, is a causal LM, has several outputs and no index, or a head without weights.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._sign = -1.0 if config.kind == "cost" else 1.0
        self._device = resolve_device(config.device)
        self._model = _load(config, self._device)
        self._tokenizer = load_tokenizer(config, _ROLE)
        self._chat = uses_chat_template(config, self._tokenizer, _ROLE)
        self._pair = config.template == "pair" or (
            config.template == "auto" and not self._chat and self._tokenizer.sep_token is not None
        )
        self._max_length = _max_length(config, self._model, self._tokenizer)
        self._index = _output_index(config, self._model.config.num_labels)
        self._pad_id: int | None = self._model.config.get_text_config().pad_token_id
        self._budget = resolve_tokens_per_batch(config, self._device)

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per pair conversations[i], completions[i], whatever the batches.

        What reads the same is scored once, so that rounding cannot break a tie.

        Raises:
            DataError: the model returned NaN or infinity.
        """
        encoded = [self._encode(m, text) for m, text in zip(conversations, completions, strict=True)]
        read = [self._cut(ids) for ids in encoded]
        distinct = sorted(set(read), key=lambda ids: (len(ids), ids))
        values = dict(zip(distinct, self._score_all(distinct), strict=True))
        for ids, text in zip(read, completions, strict=True):
            if not math.isfinite(values[ids]):
                raise DataError(f"{_ROLE}: {self._config.model} gave {values[ids]} for {text[:60]!r}")
        pairs = zip(encoded, read, strict=True)
        return [Reward(self._sign * values[kept], truncated=kept != whole) for whole, kept in pairs]

    def _encode(self, messages: Sequence[Message], completion: str) -> tuple[int, ...]:
        if self._chat:
            text = render_chat(
                self._tokenizer, [*messages, Message("assistant", completion)], add_generation_prompt=False
            )
            return tuple(encode_text(self._tokenizer, text, rendered=True))
        if self._pair:
            return tuple(self._tokenizer(render_plain(messages, "{prompt}"), completion)["input_ids"])
        template = PLAIN_TEMPLATE if self._config.template == "auto" else self._config.template
        text = join_answer(render_plain(messages, template), completion)
        return tuple(encode_text(self._tokenizer, text + (self._tokenizer.eos_token or ""), rendered=False))

    def _cut(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Drop the start of what is too long: the answer, and the token that a causal head reads, are at the end.

        The first token stays where it is special: encoders read it. So does a pair's separator.
        """
        excess = len(ids) - self._max_length
        if excess <= 0:
            return ids
        special = {self._tokenizer.cls_token_id, self._tokenizer.bos_token_id}
        kept = ids[: 1 if ids[0] in special else 0]
        if self._pair and self._tokenizer.sep_token_id in ids[: len(kept) + excess]:
            kept += (self._tokenizer.sep_token_id,)
        return kept + ids[excess + len(kept) :]

    def _score_all(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        """Scores of rows sorted by length."""
        values: list[float] = []
        while len(values) < len(rows):
            start = len(values)
            stop = start + 1
            while stop < len(rows) and (stop + 1 - start) * len(rows[stop]) <= self._budget:
                stop += 1
            values += self._score_batch(rows[start:stop])
        return values

    def _score_batch(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        try:
            return self._forward(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise DissonanceError(f"{_ROLE}: out of memory on a text of {len(rows[0])} tokens") from error
        self._budget = max(1, self._budget // 2)
        middle = len(rows) // 2
        return self._score_batch(rows[:middle]) + self._score_batch(rows[middle:])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[tuple[int, ...]]) -> list[float]:
        pad = self._pad_id
        if pad is None:
            # A model without a pad id was trained one row at a time; an id that no row holds makes its head read each
            # row's true last token.
            pad = self._model.config.get_text_config().pad_token_id = _unused_id(rows)
        longest = max(len(ids) for ids in rows)
        ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = (torch.arange(longest, device=self._device) < lengths.unsqueeze(-1)).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._pair and "token_type_ids" in self._tokenizer.model_input_names:
            inputs["token_type_ids"] = self._segments(ids, mask)
        values: list[float] = self._model.to(self._device)(**inputs).logits[:, self._index].double().tolist()
        return values

    def _segments(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """1 after the first separator, as BERT's second segment is."""
        separators = (ids == self._tokenizer.sep_token_id).long()
        second: torch.Tensor = (separators.cumsum(dim=-1) - separators).clamp(max=1)
        return second * mask


def _load(config: RewardConfig, device: torch.device) -> PreTrainedModel:
    base, adapter = base_and_adapter(config, _ROLE)
    source = resolve_source(base, _ROLE)
    with loading(_ROLE, config.model):
        known = AutoConfig.from_pretrained(source.name, trust_remote_code=config.trust_remote_code, **source.kwargs)
        architecture = (known.architectures or ["unknown"])[0]
        if adapter is None and architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(
                f"{_ROLE}: {config.model} is a causal LM ({architecture}); its reward head would be random: "
                "train one first, with `trl reward` for example"
            )
        _output_index(config, 1 if adapter is not None else known.num_labels)
        heads = {"num_labels": 1} if adapter is not None and known.num_labels != 1 else {}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source.name, dtype=resolve_dtype(config.dtype, device), output_loading_info=True,
            trust_remote_code=config.trust_remote_code, **heads, **source.model_kwargs(),
        )  # fmt: skip
        missing = set(info["missing_keys"]) | set(info.get("mismatched_keys", ()))
        if adapter is not None:
            from peft import PeftModel

            missing -= _adapter_covers(Path(adapter), missing)
            model = PeftModel.from_pretrained(model, adapter)
        if missing:
            raise ModelError(
                f"{_ROLE}: {config.model} has no weights for {', '.join(sorted(map(str, missing))[:3])}: they would be "
                "random (a LoRA adapter must be saved with modules_to_save=['score'])"
            )
    _keep_head_exact(model)
    return model.eval()


def _keep_head_exact(model: PreTrainedModel) -> None:
    """Compute the head in float32: bfloat16 near 3 has steps of 1/64, which would tie rewards that differ."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name in ("score", "classifier"):
        head = getattr(base, name, None)
        if isinstance(head, torch.nn.Module):
            head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))


def _adapter_covers(adapter: Path, missing: Iterable[str]) -> set[str]:
    """Which of the base's missing weights the adapter brings."""
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(f"{_ROLE}: {adapter} has no adapter_model.safetensors")
    with safe_open(weights, framework="pt") as stored:
        saved = set(stored.keys())
    return {name for name in missing if any(key.endswith(name) for key in saved)}


def _output_index(config: RewardConfig, outputs: int) -> int:
    if config.index is None and outputs != 1:
        raise ModelError(f"{_ROLE}: {config.model} has {outputs} outputs: name the one to use with --reward-index")
    if config.index is not None and config.index >= outputs:
        raise ModelError(f"{_ROLE}: --reward-index {config.index}: {config.model} has outputs 0 to {outputs - 1}")
    return config.index or 0


def _max_length(config: RewardConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    known = model.config.get_text_config()
    positions = getattr(known, "max_position_embeddings", None) or _NO_LIMIT
    own = int(min(positions, tokenizer.model_max_length, _NO_LIMIT))
    if known.model_type in _OFFSET_POSITIONS:
        own -= 2
    return min(config.max_length or own, own)


def _unused_id(rows: Sequence[tuple[int, ...]]) -> int:
    used = {token for row in rows for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)
