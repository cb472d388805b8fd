"""Conversations that begin alike: which they are, and the keys and values of what they share, computed once.

N answers to a prompt are N rows that differ in their last part only. A causal model makes the same keys and values of
the tokens before, whatever comes after, so that each row need only be read from where it parts from the others.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

TokenIds = tuple[int, ...]
# Of the tokens that a family's rows have together: what fewer would save, a second forward pass costs again.
_LEAST_SAVED = 1 / 8
# Rows of one family: what is looked through for the best families grows with it.
_MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class Family:
    """Rows that begin with the same tokens."""

    shared: int
    """How many; every row goes on after them with a token that a head can read."""
    rows: tuple[TokenIds, ...]

    @property
    def prefix(self) -> TokenIds:
        """The tokens that are shared."""
        return self.rows[0][: self.shared]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(len(row) for row in self.rows)


def can_share(model: PreTrainedModel) -> bool:
    """Whether reading on from a prefix's keys and values gives what reading the whole gives.

    So it is for Transformers' own models with causal attention over everything before. It is not for encoders, for
    windows and states, for rotary embeddings that depend on how long the text is, nor for a head that somebody else
    wrote, which may look at the prompt.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return False
    config = model.config.get_text_config()
    taken = {"past_key_values", "position_ids", "use_cache"} <= _taken(model)
    bidirectional = not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", False)
    return (
        type(_inner(model)).__module__.startswith("transformers.models.")
        and taken
        and not getattr(config, "is_encoder_decoder", False)
        and not bidirectional
        and not _depends_on_length(getattr(config, "rope_parameters", None) or {})
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def keeps_cache(model: PreTrainedModel) -> bool:
    """Whether a forward pass takes `use_cache`."""
    return "use_cache" in _taken(model)


def _taken(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(_inner(model).forward).parameters)


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    return model.get_base_model() if is_peft_model(model) else model


def _depends_on_length(rope: Mapping[str, Any]) -> bool:
    each = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    kinds = [str(one.get("rope_type")) for one in each]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def families(rows: Sequence[TokenIds], pad_id: int | None) -> list[Family]:
    """The families that save most tokens, no row in two of them; rows of none are left out.

    Args:
        rows: distinct.
        pad_id: a causal head reads a row's last token that is not this; that token is never shared.
    """
    rows = sorted(rows)
    limits = [_last_read(row, pad_id) for row in rows]
    common = [_common(a, b) for a, b in pairwise(rows)]
    saved, begins = [0], [0]
    for stop in range(1, len(rows) + 1):
        best, begin = saved[-1], stop - 1
        shared, total = limits[stop - 1], len(rows[stop - 1])
        for start in range(stop - 2, max(stop - _MOST_ROWS, 0) - 1, -1):
            shared, total = min(shared, common[start], limits[start]), total + len(rows[start])
            if not shared:
                break
            saves = (stop - start - 1) * shared
            if saves >= _LEAST_SAVED * total and saved[start] + saves > best:
                best, begin = saved[start] + saves, start
        saved.append(best)
        begins.append(begin)
    found = []
    stop = len(rows)
    while stop:
        start = begins[stop]
        if stop - start > 1:
            shared = min(*limits[start:stop], *common[start : stop - 1])
            found.append(Family(shared, tuple(rows[start:stop])))
        stop = start
    return found[::-1]


def _last_read(row: TokenIds, pad_id: int | None) -> int:
    """The place of the token that a causal head reads."""
    return next((place for place in reversed(range(len(row))) if row[place] != pad_id), 0)


def _common(a: TokenIds, b: TokenIds) -> int:
    """How many tokens two rows have in common at their beginning."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class _PrefixLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A layer's keys and values of several prefixes, handed to each row in front of its own; nothing is added to it."""

    def __init__(self, layer: DynamicLayer, owners: Tensor) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.keys, self.values, self._owners = layer.keys, layer.values, owners

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """What the rows attend to, in this layer, now."""
        return (
            torch.cat([self.keys[self._owners], key_states], dim=-2),
            torch.cat([self.values[self._owners], value_states], dim=-2),
        )


@torch.inference_mode()
def read_families(
    model: PreTrainedModel,
    some: Sequence[Family],
    inputs: Callable[[Sequence[TokenIds]], dict[str, Tensor]],
    at_once: int,
) -> Tensor:
    """The model's logits, (rows, outputs), for the rows of families, in their order.

    Args:
        model: one that `can_share`.
        some: families.
        inputs: gives `input_ids` and `attention_mask` of rows, padded on the right.
        at_once: rows that are read on together.
    """
    device = model.device
    # On the left, as generation pads: there is no hole between a prefix and what follows it.
    prefixes = {name: tensor.to(device) for name, tensor in _on_the_left(inputs([f.prefix for f in some])).items()}
    mask = prefixes["attention_mask"]
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache = model(**prefixes, position_ids=positions, use_cache=True).past_key_values
    owners = torch.tensor([i for i, family in enumerate(some) for _ in family.rows], device=device)
    rests = [row[family.shared :] for family in some for row in family.rows]
    logits = []
    for start in range(0, len(rests), at_once):
        owner = owners[start : start + at_once]
        rest = {name: tensor.to(device) for name, tensor in inputs(rests[start : start + at_once]).items()}
        own = rest["attention_mask"]
        # What is padding has position 0: behind the end there need not be any.
        positions = (mask.sum(dim=-1)[owner].unsqueeze(-1) + own.cumsum(dim=-1) - 1) * own
        output = model(
            input_ids=rest["input_ids"],
            attention_mask=torch.cat([mask[owner], own], dim=-1),
            position_ids=positions,
            past_key_values=Cache(layers=[_PrefixLayer(layer, owner) for layer in cache.layers]),
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits)


def _on_the_left(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same rows with their padding before them."""
    lengths = inputs["attention_mask"].sum(dim=-1)
    width = inputs["attention_mask"].shape[1]
    places = (torch.arange(width) - (width - lengths).unsqueeze(-1)) % width
    return {name: tensor.gather(1, places) for name, tensor in inputs.items()}
