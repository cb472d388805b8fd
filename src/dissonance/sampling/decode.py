"""The decoding loop: one prefill per prompt, its keys and values shared by N completions, one token a step.

The log-probability of each token is taken from the logits it was drawn from, so there is no second forward pass, and
no tensor of shape (batch, time, vocabulary) ever exists.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from dissonance.sampling.cache import expand_cache, join_caches
from dissonance.sampling.draw import draw, token_logprobs
from dissonance.sampling.shared_prefix import SharedPrefix, shares_prefixes

# Dropping finished rows copies the cache, so it waits until an eighth of the rows are finished.
_COMPACT_SHARE = 8
# Tokens of prompts read at once where rows share them: more gain nothing there, and pad short prompts to long ones.
_READ_TOGETHER = 512
# Rows x positions of logits held at once under teacher forcing.
_FORCED_LOGITS = 512


@dataclass(frozen=True)
class Drawn:
    """What the policy said in one row."""

    token_ids: tuple[int, ...]
    """With the end-of-sequence id when it came."""

    logprob: float
    """Sum over the tokens, nats."""

    stopped: bool
    """Whether the end-of-sequence id came."""


class CachedForward:
    """A causal LM with the keys and values of a batch: prompts once, then `repeats` rows for each."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], repeats: int, room: int) -> None:
        self._model = model
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._shared: SharedPrefix | None = None
        ids, mask = _left_pad(prompts, model.device)
        padding = None if bool(mask.all()) else mask
        shares = shares_prefixes(model)
        read = self._read(ids, mask, max(1, _READ_TOGETHER // ids.shape[1]) if shares else len(ids))
        self.logits: Tensor = torch.cat([logits for logits, _ in read]).repeat_interleave(repeats, dim=0)
        """Of the next token, (rows, vocabulary)."""
        self._lengths = mask.sum(dim=-1).repeat_interleave(repeats, dim=0)
        self._mask = None if shares or padding is None else padding.repeat_interleave(repeats, dim=0)
        if shares:
            self._cache = join_caches([cache for _, cache in read])
            self._shared = SharedPrefix(self._cache, padding, repeats, room)
        else:
            self._cache = expand_cache(read[0][1], repeats, room)

    def _read(self, ids: Tensor, mask: Tensor, together: int) -> list[tuple[Tensor, Cache]]:
        """What follows some of the prompts at a time, (prompts, vocabulary), and the cache after them."""
        read = []
        for first in range(0, len(ids), together):
            kept = mask[first : first + together]
            longest = int(kept.sum(dim=-1).max())
            kept = kept[:, -longest:]
            padding, positions = None if bool(kept.all()) else kept, (kept.cumsum(dim=-1) - 1).clamp(min=0)
            logits, cache = self._forward(ids[first : first + together, -longest:], padding, positions, None, 1)
            read.append((logits[:, -1], cache))
        return read

    def advance(self, tokens: Tensor) -> Tensor:
        """Feed (rows, time) tokens; logits of what follows each, (rows, time, vocabulary)."""
        time = tokens.shape[1]
        positions = self._lengths.unsqueeze(-1) + torch.arange(time, device=tokens.device)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape)], dim=-1)
        logits, self._cache = self._forward(tokens, self._mask, positions, self._cache, time)
        self._lengths = self._lengths + time
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        (self._shared.select if self._shared is not None else self._cache.batch_select_indices)(rows)
        self._lengths = self._lengths[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Cache | None, keep: int
    ) -> tuple[Tensor, Cache]:
        optional = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        given: dict[str, object] = {name: value for name, value in optional.items() if name in self._accepts}
        if self._shared is not None:
            given["shared_prefix"] = self._shared
        output = self._model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
        return output.logits, output.past_key_values


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids in prompts)
    padded = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(prompts):
        padded[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    return padded.to(device), mask.to(device)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    eos_ids: Sequence[int],
    temperature: float,
    top_p: float,
) -> list[Drawn]:
    """Sample completions.

    Args:
        model: a causal LM in eval mode.
        prompts: P token id lists.
        uniforms: (P * N, max_new_tokens), float64; the N rows of a prompt stand together.
        eos_ids: ids that end a completion.
        temperature: see `draw`.
        top_p: see `draw`.

    Returns:
        P * N records in the order of `uniforms`.
    """
    rows, steps = uniforms.shape
    forward = CachedForward(model, prompts, repeats=rows // len(prompts), room=steps)
    device = forward.logits.device
    uniforms = uniforms.to(device) if device.type != "mps" else uniforms.float().to(device)
    ends = torch.tensor(sorted(eos_ids), device=device)
    tokens = torch.full((rows, steps), -1, dtype=torch.long, device=device)
    sums = torch.zeros(rows, dtype=uniforms.dtype, device=device)
    alive = torch.arange(rows, device=device)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    logits = forward.logits
    for step in range(steps):
        drawn, logprobs = draw(logits, uniforms[alive, step], temperature, top_p)
        tokens[alive[running], step] = drawn[running]
        sums[alive] += torch.where(running, logprobs, 0).to(sums.dtype)
        running = running & ~torch.isin(drawn, ends)
        left = int(running.sum())
        if left == 0 or step + 1 == steps:
            break
        if (len(alive) - left) * _COMPACT_SHARE >= len(alive):
            keep = running.nonzero().squeeze(-1)
            forward.select(keep)
            alive, drawn, running = alive[keep], drawn[keep], running[keep]
        logits = forward.advance(drawn.unsqueeze(-1))[:, -1]
    return _collect(tokens.cpu(), sums.cpu(), set(eos_ids))


def _collect(tokens: Tensor, sums: Tensor, eos_ids: set[int]) -> list[Drawn]:
    drawn = []
    for row, logprob in zip(tokens.tolist(), sums.tolist(), strict=True):
        ids = tuple(token for token in row if token >= 0)
        drawn.append(Drawn(ids, logprob, stopped=ids[-1] in eos_ids))
    return drawn


@torch.inference_mode()
def teacher_force(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """Log-likelihoods of given completions.

    Args:
        model: a causal LM in eval mode.
        prompts: P token id lists.
        completions: P lists of N token id lists each.

    Returns:
        P lists of N sums of log pi(token | prompt, earlier tokens), nats.
    """
    repeats = len(completions[0])
    flat = [ids for group in completions for ids in group]
    longest = max(len(ids) for ids in flat)
    forward = CachedForward(model, prompts, repeats, room=longest)
    tokens = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in flat], device=model.device)
    counts = torch.tensor([len(ids) for ids in flat], device=model.device)
    sums = token_logprobs(forward.logits, tokens[:, 0])
    width = max(1, _FORCED_LOGITS // len(flat))
    for start in range(0, longest - 1, width):
        stop = min(start + width, longest - 1)
        logits = forward.advance(tokens[:, start:stop])
        for offset in range(stop - start):
            position = start + offset + 1
            sums += torch.where(position < counts, token_logprobs(logits[:, offset], tokens[:, position]), 0)
    values = sums.tolist()
    return [values[first : first + repeats] for first in range(0, len(values), repeats)]
