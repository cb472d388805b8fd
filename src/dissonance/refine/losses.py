"""What a batch of B pairs costs a reward model: pure functions of rewards, each (B,) or (N,), higher is better.

Rewards are *oriented*: those of a cost model are its negated outputs. Every function gives a loss per pair or a scalar,
unweighted unless it says otherwise, and is differentiable in the rewards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot, softplus


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The coefficients of a reward model's loss."""

    margin: float = 0.0
    """By how much a chosen answer's reward is to lead."""
    center: float = 0.0
    """Of `centring`."""
    safe_sign: float = 0.0
    """Of `safe_sign`; 0 for a model that is no cost model."""
    length_penalty: float = 0.0
    """Of `length_mmd`."""


@dataclass(frozen=True, slots=True)
class PairBatch:
    """What is known of B pairs besides their rewards; every tensor is (B,)."""

    target: Tensor
    """How probable it is that `chosen` is the better: 1, or 1/2 for a tie."""
    weight: Tensor
    """How much each pair counts; its mean over all training pairs is 1."""
    chosen_sign: Tensor
    """+1 unsafe, -1 safe, 0 unknown."""
    rejected_sign: Tensor
    chosen_bin: Tensor
    """The length bin of the answer, int64."""
    rejected_bin: Tensor


def reward_loss(chosen: Tensor, rejected: Tensor, pairs: PairBatch, terms: LossTerms) -> Tensor:
    """The whole loss of a batch, a scalar: the weighted mean of the pairs' terms, and the length penalty."""
    loss = (pairs.weight * pair_loss(chosen, rejected, pairs, terms)).mean()
    if terms.length_penalty:
        rewards = torch.cat([chosen, rejected])
        bins, weights = torch.cat([pairs.chosen_bin, pairs.rejected_bin]), pairs.weight.repeat(2)
        loss = loss + terms.length_penalty * length_mmd(rewards, bins, weights)
    return loss


def pair_loss(chosen: Tensor, rejected: Tensor, pairs: PairBatch, terms: LossTerms) -> Tensor:
    """Each pair's own loss, (B,): Bradley-Terry, centring, and the signs of its costs."""
    loss = bradley_terry(chosen, rejected, pairs.target, terms.margin)
    if terms.center:
        loss = loss + terms.center * centring(chosen, rejected)
    if terms.safe_sign:
        signs = safe_sign(-chosen, pairs.chosen_sign) + safe_sign(-rejected, pairs.rejected_sign)
        loss = loss + terms.safe_sign * signs
    return loss


def bradley_terry(chosen: Tensor, rejected: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """The cross-entropy of the preference, (B,), with soft labels.

    -t log sigma(d - m(2t - 1)) - (1 - t) log sigma(-d + m(2t - 1)), d the rewards' difference and t the target: the
    margin (Touvron et al. 2023, equation 2) stands against whichever side is preferred, and vanishes for a tie.
    """
    lead = chosen - rejected - margin * (2 * target - 1)
    return binary_cross_entropy_with_logits(lead, target, reduction="none")


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The square of the pair's summed rewards, (B,): keeps them around 0 (Eisenstein et al. 2023, equation 2)."""
    return (chosen + rejected) ** 2


def safe_sign(costs: Tensor, signs: Tensor) -> Tensor:
    """-log sigma(s c), (N,); 0 where the sign is unknown (Dai et al. 2023, equation 6).

    `costs` are those of a cost model as it gives them: above 0 is to mean unsafe. `signs` are +1 unsafe, -1 safe, 0
    unknown.
    """
    return softplus(-signs * costs) * signs.abs()


def length_mmd(rewards: Tensor, bins: Tensor, weights: Tensor) -> Tensor:
    """How much the rewards' distribution differs between bins of length, a scalar; 0 is expected where it does not.

    The squared maximum mean discrepancy between every two bins (Wang et al. 2025, arXiv 2501.09620, unconditional),
    averaged with the product of the bins' weights, under a Gaussian kernel as wide as the median distance. Here it is
    the unbiased estimate (Gretton et al. 2012, equation 3, with weights): the biased one is larger the fewer answers a
    bin has in the batch, and would pull all rewards together. Bins with less than two answers say nothing.

    Args:
        rewards: (N,).
        bins: (N,), int64, from 0.
        weights: (N,), above 0.
    """
    members = one_hot(bins).to(rewards.dtype) * weights.unsqueeze(-1)
    members = members[:, (members > 0).sum(dim=0) > 1]
    if members.shape[1] < 2:
        return rewards.sum() * 0.0
    distances = rewards.unsqueeze(-1) - rewards
    kernel = torch.exp(-(distances**2) / (2 * _median_distance(rewards) ** 2))
    totals, squares = members.sum(dim=0), (members**2).sum(dim=0)
    # (M, M): mean kernel between the members of two bins; within one, over pairs of different members.
    between = members.T @ kernel @ members / (totals.unsqueeze(-1) * totals)
    within = (torch.einsum("nb,nm,mb->b", members, kernel, members) - squares) / (totals**2 - squares)
    discrepancies = within.unsqueeze(-1) + within - 2 * between
    first, second = torch.triu_indices(len(totals), len(totals), offset=1)
    shares = totals[first] * totals[second]
    return (shares * discrepancies[first, second]).sum() / shares.sum()


def _median_distance(rewards: Tensor) -> Tensor:
    """The median distance between two different rewards, no gradient; 1 where they are all the same."""
    distances = torch.pdist(rewards.detach().unsqueeze(-1), p=1)
    distances = distances[distances > 0]
    return distances.median() if len(distances) else torch.ones_like(rewards[0])
