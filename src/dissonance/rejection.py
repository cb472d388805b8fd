"""Statistical rejection sampling of answers by their rewards (Liu et al. 2023, arXiv 2309.06657, algorithm 1)."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rejection_sample(rewards: NDArray[np.float64], keep: int, beta: float, rng: np.random.Generator) -> list[int]:
    """Draw `keep` of N answers without replacement by statistical rejection sampling; their positions.

    Passes go over what is left, and accept each with probability exp((r - max r of what is left) / beta), until
    enough are kept. The best of what is left is always accepted, so that every pass keeps at least one.

    Args:
        rewards: (N,), finite.
        keep: at most N.
        beta: above 0.
        rng: one uniform per answer and pass.
    """
    kept: list[int] = []
    left = list(range(len(rewards)))
    while len(kept) < keep:
        highest = max(rewards[i] for i in left)
        accepted = [i for i in left if rng.random() < math.exp((rewards[i] - highest) / beta)]
        kept += accepted[: keep - len(kept)]
        left = [i for i in left if i not in accepted]
    return kept


def pooled_deviation(rewards: Sequence[NDArray[np.float64]]) -> float:
    """The standard deviation of rewards within a prompt, pooled over the prompts; 1 where there is none."""
    squares = sum(float(((some - some.mean()) ** 2).sum()) for some in rewards)
    deviation = math.sqrt(squares / sum(len(some) for some in rewards))
    return deviation if deviation > 0 else 1.0
