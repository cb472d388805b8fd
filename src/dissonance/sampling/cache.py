"""A key-value cache that is allocated once and does not move as it grows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """A `DynamicLayer` that writes into room reserved in advance.

    The stock layer concatenates, which copies every key and value at every step: a third of a decoding step's time at
    128 rows. It hands out views of the filled part, so attention sees exactly what it would have seen.
    """

    def __init__(self, like: DynamicLayer, keys: Tensor, values: Tensor, room: int) -> None:
        """Hold these keys and values, with room for `room` more positions; data type and device are `like`'s."""
        super().__init__()
        self._room = room
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self._adopt(keys, values)

    @classmethod
    def from_dynamic(cls, layer: DynamicLayer, repeats: int, room: int) -> "PreallocatedLayer":
        """Repeat a prompt's keys and values for its completions, with room for `room` more positions."""
        keys, values = (part.repeat_interleave(repeats, dim=0) for part in (layer.keys, layer.values))
        return cls(layer, keys, values, room)

    def _adopt(self, keys: Tensor, values: Tensor) -> None:
        length = keys.shape[-2]
        self._key_buffer, self._value_buffer = (
            torch.cat([part, part.new_empty(*part.shape[:-2], self._room, part.shape[-1])], dim=-2)
            for part in (keys, values)
        )
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys = self._key_buffer[..., :length, :]
        self.values = self._value_buffer[..., :length, :]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new positions behind the filled part."""
        start, new = self.keys.shape[-2], key_states.shape[-2]
        self._key_buffer[..., start : start + new, :] = key_states
        self._value_buffer[..., start : start + new, :] = value_states
        self._room -= new
        self._show(start + new)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        length = self.keys.shape[-2]
        self._key_buffer = self._key_buffer[indices]
        self._value_buffer = self._value_buffer[indices]
        self._show(length)


def expand_cache(cache: Cache, repeats: int, room: int) -> Cache:
    """Give every prompt's cache to its completions; layers of other kinds than plain attention grow as they do."""
    if all(type(layer) is DynamicLayer for layer in cache.layers):
        cache.layers = [PreallocatedLayer.from_dynamic(layer, repeats, room) for layer in cache.layers]
    else:
        cache.batch_repeat_interleave(repeats)
    return cache


def join_caches(caches: Sequence[Cache]) -> Cache:
    """One cache of the prompts of several, padded on the left to the longest."""
    first = caches[0]
    for index, layer in enumerate(first.layers):
        parts = [cache.layers[index] for cache in caches]
        layer.keys, layer.values = _join([part.keys for part in parts]), _join([part.values for part in parts])
    return first


def _join(parts: Sequence[Tensor]) -> Tensor:
    longest = max(part.shape[-2] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in parts])
