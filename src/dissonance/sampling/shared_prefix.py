"""Attention in which the rows of a prompt share its keys and values (cascade attention), on CPUs.

A row's attention is over its prompt, which all rows of that prompt have in common, and over what it said itself. The
two parts are computed apart and joined by their log-sum-exps, which is exact:

    softmax([a, b]) [V; W] = w softmax(a) V + (1 - w) softmax(b) W,    w = sigmoid(logsumexp a - logsumexp b)

So a prompt's keys are held once, and read once a step instead of once a row. The attention function is plugged in by
Transformers' own interface; models with attention of another kind keep theirs.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from dissonance.sampling.cache import PreallocatedLayer

_NAME = "dissonance_shared_prefix"
_NEEDED = {"position_ids", "attention_mask", "past_key_values"}


@dataclass
class _Seen:
    """Which layers came to the attention function in one forward pass, and whether each is plain causal attention."""

    plain: dict[int, bool] = field(default_factory=dict)


class SharedPrefix:
    """The prompts of a batch, and which rows are whose; rows of a prompt stand together."""

    def __init__(self, cache: Cache, mask: Tensor | None, repeats: int, room: int) -> None:
        prompts = cache.layers[0].keys.shape[0]
        self.cache = cache
        self._padding = None if mask is None else torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf)
        self._place(torch.arange(prompts).repeat_interleave(repeats))
        cache.layers = [SharedPrefixLayer.behind(layer, prompts * repeats, room) for layer in cache.layers]

    def _place(self, owners: Tensor) -> None:
        """Give each row a slot among its prompt's, and each slot a row: any row where the prompt has no more."""
        self._owners = owners
        counts = torch.bincount(owners)
        slot = torch.arange(len(owners)) - (counts.cumsum(0) - counts)[owners]
        self._shape = (len(counts), int(counts.max()))
        self._slots = owners * self._shape[1] + slot
        self._rows = torch.zeros(self._shape[0] * self._shape[1], dtype=torch.long)
        self._rows[self._slots] = torch.arange(len(owners))

    def select(self, rows: Tensor) -> None:
        """Keep these rows, and the prompts that still have one."""
        self.cache.batch_select_indices(rows)
        prompts, owners = torch.unique(self._owners[rows], return_inverse=True)
        if len(prompts) < self._shape[0]:
            self._padding = None if self._padding is None else self._padding[prompts]
            for layer in self.cache.layers:
                layer.select_prompts(prompts)
        self._place(owners)

    def attend(self, query: Tensor, layer: "SharedPrefixLayer", scale: float | None) -> Tensor:
        """Attention of (rows, heads, time, width) queries, in the shape that models expect: heads behind time."""
        rows, heads, time, width = query.shape
        groups = layer.keys.shape[1]
        # Query heads that share a key head are queries of one attention: nothing is repeated.
        packed = query.reshape(rows, groups, heads // groups * time, width)
        own, own_weight = _attention(packed, layer.keys, layer.values, _causal(packed, layer.keys, time), scale)
        by_prompt = packed[self._rows].view(*self._shape, *packed.shape[1:]).transpose(1, 2).flatten(2, 3)
        padding = None if self._padding is None else self._padding[:, None, None].to(query.dtype)
        parts = _attention(by_prompt, layer.prefix_keys, layer.prefix_values, padding, scale)
        prefix, weight = (self._by_row(part) for part in parts)
        share = torch.sigmoid(own_weight - weight).unsqueeze(-1)
        joined = torch.lerp(prefix.float(), own.float(), share).to(query.dtype)
        return joined.view(rows, heads, time, width).transpose(1, 2).contiguous()

    def _by_row(self, part: Tensor) -> Tensor:
        """(prompts, groups, slots * queries, ...) to (rows, groups, queries, ...)."""
        prompts, slots = self._shape
        split = part.reshape(prompts, part.shape[1], slots, -1, *part.shape[3:])
        return split.transpose(1, 2).flatten(0, 1)[self._slots]


class SharedPrefixLayer(PreallocatedLayer):
    """What each row said itself, behind what its prompt says."""

    prefix_keys: Tensor
    prefix_values: Tensor

    @classmethod
    def behind(cls, layer: DynamicLayer, rows: int, room: int) -> "SharedPrefixLayer":
        """An empty layer of `rows` rows behind the filled one of their prompts."""
        empty = layer.keys.new_empty(rows, layer.keys.shape[1], 0, layer.keys.shape[-1])
        self = cls(layer, empty, empty, room)
        self.prefix_keys, self.prefix_values = layer.keys, layer.values
        return self

    def select_prompts(self, prompts: Tensor) -> None:
        """Keep some prompts."""
        self.prefix_keys, self.prefix_values = self.prefix_keys[prompts], self.prefix_values[prompts]


def share_prefixes(model: PreTrainedModel) -> None:
    """Let a model on a CPU share prefixes, if it attends plainly; found out by two tokens that it reads.

    It does if every layer of its cache grows plainly, and every layer calls the attention function that is plugged in,
    with nothing that changes the scores of plain causal attention. Other models stay as they are.
    """
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    plain = model.config._attn_implementation  # noqa: SLF001
    if plain != "sdpa" or not passes_on or not parameters.keys() >= _NEEDED or not model._supports_attention_backend:  # noqa: SLF001
        return
    model.set_attn_implementation(_NAME)
    seen = _Seen()
    with torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        cache = model(input_ids=ids, use_cache=True, shared_prefix=seen).past_key_values
    layers = getattr(cache, "layers", [])
    grows = len(layers) > 0 and all(type(layer) is DynamicLayer for layer in layers)
    if not (grows and seen.plain.keys() == set(range(len(layers))) and all(seen.plain.values())):
        model.set_attn_implementation(plain)


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether `share_prefixes` found that the model can."""
    return bool(model.config._attn_implementation == _NAME)  # noqa: SLF001


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, shared_prefix: SharedPrefix | _Seen | None = None, scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface."""
    if isinstance(shared_prefix, SharedPrefix):
        return shared_prefix.attend(query, shared_prefix.cache.layers[module.layer_idx], scaling), None
    if isinstance(shared_prefix, _Seen):
        changes = any(kwargs.get(name) is not None for name in ("position_bias", "sliding_window", "softcap", "s_aux"))
        causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        index = getattr(module, "layer_idx", -1)
        shared_prefix.plain[index] = causal and not changes and query.shape[-1] == value.shape[-1]
    result: tuple[Tensor, None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return result


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores, float32; the public function keeps the latter to itself."""
    output: tuple[Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
        query, keys, values, attn_mask=mask, scale=scale
    )
    return output


def _causal(packed: Tensor, keys: Tensor, time: int) -> Tensor | None:
    """No token sees a later one: (1, 1, heads of a group * time, positions), added to the scores."""
    if time == 1:
        return None
    positions = keys.shape[-2]
    later = torch.ones(time, positions, dtype=torch.bool).triu(positions - time + 1)
    mask = torch.zeros(time, positions, dtype=packed.dtype).masked_fill(later, -torch.inf)
    return mask.repeat(packed.shape[-2] // time, 1)[None, None]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])
