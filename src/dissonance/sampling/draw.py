"""One token per row by inverse-CDF sampling, and its log-probability under the untouched model.

Each completion owns a stream of uniforms keyed by (seed, prompt, completion), one per step, so a token depends on the
batch it was drawn in through floating-point rounding alone, and a resumed run draws what it would have drawn.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dissonance.errors import ModelError

_NUCLEUS_START = 256
# Tokens whose probabilities are summed before they are searched.
_BLOCK = 256
# Logits turned into a cumulative distribution at once: in float64 they are four times what the model gave.
_DRAWN_AT_ONCE = 1 << 21


def keyed_uniforms(seed: int, prompt_id: str, completion_id: int, steps: int) -> NDArray[np.float64]:
    """The uniforms of one completion, shape (steps,), in [0, 1).

    Philox keyed by a hash: the numbers of a completion do not depend on any other, and a longer stream begins with the
    shorter one.
    """
    key = hashlib.blake2b(f"{seed}\0{prompt_id}\0{completion_id}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(steps)


def stack_uniforms(seed: int, prompt_ids: Sequence[str], completion_ids: Sequence[int], steps: int) -> Tensor:
    """Uniforms of a batch, shape (prompts * completions, steps), float64; completions of a prompt stand together."""
    rows = [keyed_uniforms(seed, prompt, completion, steps) for prompt in prompt_ids for completion in completion_ids]
    return torch.from_numpy(np.stack(rows))


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: (rows, vocabulary), raw.
        uniforms: (rows,), float64, in [0, 1).
        temperature: divides the logits before sampling.
        top_p: nucleus sampling (Holtzman et al. 2020): the smallest set of likeliest tokens that holds this mass.

    Returns:
        tokens (rows,) int64, and their log-probabilities (rows,) float64 from the raw logits, at temperature 1 and
        before top-p: log pi(y_t | x, y_<t).
    """
    rows = max(1, _DRAWN_AT_ONCE // logits.shape[-1])
    parts = zip(torch.split(logits, rows), torch.split(uniforms, rows), strict=True)
    tokens, logprobs = zip(*(_draw(some.float(), u, temperature, top_p) for some, u in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(logits if temperature == 1 else logits / temperature, dim=-1)
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    tokens = _inverse_cdf(probabilities, uniforms)
    if temperature == 1 and top_p == 1:
        return tokens, probabilities.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double().log()
    return tokens, token_logprobs(logits, tokens)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log softmax(logits)[token] per row, without a second (rows, vocabulary) tensor; (rows,) float64."""
    logits = logits.float()
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen.double() - torch.logsumexp(logits, dim=-1).double()


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability is above uniform * total: found by its block, then within it.

    Summing is faster than cumulating; the token is the same unless the uniform meets a boundary to the last bit.
    """
    # float64 where the device has it: at 10^5 tokens a float32 sum is off by more than rare tokens weigh.
    exact = torch.float32 if probabilities.device.type == "mps" else torch.float64
    padding = -probabilities.shape[-1] % _BLOCK
    blocks = torch.nn.functional.pad(probabilities, (0, padding)) if padding else probabilities
    blocks = blocks.view(len(blocks), -1, _BLOCK)
    cumulative = blocks.to(exact).sum(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1]
    if not bool(torch.isfinite(total).all()):
        raise ModelError("policy: it gave NaN or infinite logits: try another --dtype, or a higher --temperature")
    target = uniforms.to(exact) * total
    block = _first_above(cumulative, target)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block.unsqueeze(-1)).squeeze(-1)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block].to(exact).cumsum(dim=-1)
    return block * _BLOCK + _first_above(inside, target - before)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Per row, the first entry above the target; kept below the total, so that it always exists and has mass."""
    total = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero outside the nucleus; tokens as likely as its last member stay, so ties do not depend on sort order."""
    size = probabilities.shape[-1]
    count = min(_NUCLEUS_START, size)
    while True:
        likeliest = probabilities.topk(count, dim=-1).values
        mass = likeliest.cumsum(dim=-1)
        if count == size or bool((mass[:, -1] >= top_p).all()):
            break
        count = min(4 * count, size)
    last = (mass < top_p).sum(dim=-1, keepdim=True).clamp(max=count - 1)
    return torch.where(probabilities >= likeliest.gather(-1, last), probabilities, 0)
