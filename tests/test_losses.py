"""The losses against NumPy written out pair by pair, and the identities that make them what they are called."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dissonance.refine.losses import (
    LossTerms,
    PairBatch,
    bradley_terry,
    centring,
    length_mmd,
    pair_loss,
    reward_loss,
    safe_sign,
)

REWARDS = st.floats(-30, 30, allow_nan=False, width=64)
SIZES = st.integers(1, 12)


def arrays(elements: st.SearchStrategy[float], n: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float64, n, elements=elements)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float64))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def batch(n: int, **changes: object) -> PairBatch:
    fields = {name: tensor(np.zeros(n)) for name in ("chosen_sign", "rejected_sign")}
    fields |= {name: torch.zeros(n, dtype=torch.int64) for name in ("chosen_bin", "rejected_bin")}
    return PairBatch(**{**fields, "target": tensor(np.ones(n)), "weight": tensor(np.ones(n)), **changes})  # type: ignore[arg-type]


@given(st.data(), SIZES, st.floats(0, 3))
def test_bradley_terry_is_the_cross_entropy_written_out(data: st.DataObject, n: int, margin: float) -> None:
    chosen, rejected = data.draw(arrays(REWARDS, n)), data.draw(arrays(REWARDS, n))
    target = data.draw(arrays(st.sampled_from([0.0, 0.5, 1.0]), n))
    expected = []
    for c, r, t in zip(chosen, rejected, target, strict=True):
        if t == 0.5:
            expected.append(-0.5 * log_sigma(c - r) - 0.5 * log_sigma(r - c))
        else:
            lead = c - r if t == 1 else r - c
            expected.append(-log_sigma(lead - margin))
    got = bradley_terry(tensor(chosen), tensor(rejected), tensor(target), margin).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@given(REWARDS, REWARDS)
def test_a_tie_pulls_the_two_rewards_together_and_knows_no_sides(first: float, second: float) -> None:
    rewards = tensor([first, second]).requires_grad_()
    half = tensor([0.5])
    loss = bradley_terry(rewards[:1], rewards[1:], half, margin=0.7)
    loss.backward()
    gradient = rewards.grad
    assert gradient is not None
    assert loss.item() >= math.log(2) - 1e-12
    assert loss.item() == pytest.approx(bradley_terry(rewards[1:], rewards[:1], half).item())
    # Going down the gradient moves the higher reward down and the lower up, the more the further they are apart.
    assert gradient[0].item() == pytest.approx(0.5 * math.tanh((first - second) / 2))
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected() -> None:
    chosen, rejected = tensor([0.0]).requires_grad_(), tensor([0.0]).requires_grad_()
    bradley_terry(chosen, rejected, tensor([1.0])).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == (-0.5, 0.5)


@given(st.data(), SIZES)
def test_safe_sign_is_the_log_sigmoid_of_signed_costs(data: st.DataObject, n: int) -> None:
    costs = data.draw(arrays(REWARDS, n))
    signs = data.draw(arrays(st.sampled_from([-1.0, 0.0, 1.0]), n))
    expected = [0.0 if s == 0 else -log_sigma(s * c) for c, s in zip(costs, signs, strict=True)]
    np.testing.assert_allclose(safe_sign(tensor(costs), tensor(signs)).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_an_unsafe_answer_wants_a_cost_above_zero() -> None:
    costs = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    safe_sign(costs, tensor([1.0, -1.0, 0.0])).sum().backward()
    assert costs.grad is not None
    assert costs.grad.tolist() == [-0.5, 0.5, 0.0]


def reference_mmd(rewards: np.ndarray, bins: np.ndarray, weights: np.ndarray) -> float:
    """Sums over pairs, as the definition has them."""
    n = len(rewards)
    distances = sorted(d for i in range(n) for j in range(i) if (d := abs(rewards[i] - rewards[j])) > 0)
    width = distances[(len(distances) - 1) // 2] if distances else 1.0
    kept = [b for b in sorted(set(bins.tolist())) if (bins == b).sum() > 1]

    def mean_kernel(first: int, second: int) -> float:
        total = mass = 0.0
        for i in np.flatnonzero(bins == first):
            for j in np.flatnonzero(bins == second):
                if i != j:
                    w = weights[i] * weights[j]
                    total += w * math.exp(-((rewards[i] - rewards[j]) ** 2) / (2 * width**2))
                    mass += w
        return total / mass

    total = mass = 0.0
    for position, first in enumerate(kept):
        for second in kept[position + 1 :]:
            share = weights[bins == first].sum() * weights[bins == second].sum()
            squared = mean_kernel(first, first) + mean_kernel(second, second) - 2 * mean_kernel(first, second)
            total, mass = total + share * squared, mass + share
    return total / mass if mass else 0.0


@given(st.data(), st.integers(2, 14), st.integers(1, 4))
def test_length_mmd_is_the_definition_written_out(data: st.DataObject, n: int, n_bins: int) -> None:
    rewards = data.draw(arrays(st.floats(-5, 5).map(lambda x: round(x, 2)), n))
    bins = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, n_bins - 1)))
    weights = data.draw(arrays(st.floats(0.1, 4), n))
    got = length_mmd(tensor(rewards), torch.tensor(bins), tensor(weights)).item()
    assert got == pytest.approx(reference_mmd(rewards, bins, weights), rel=1e-7, abs=1e-9)


@given(st.floats(0.1, 50), st.floats(-50, 50))
def test_length_mmd_depends_on_no_scale_or_origin(scale: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    rewards, bins = tensor(rng.normal(size=40)), torch.tensor(rng.integers(4, size=40))
    weights = torch.ones(40, dtype=torch.float64)
    moved = length_mmd(scale * rewards + shift, bins, weights).item()
    assert moved == pytest.approx(length_mmd(rewards, bins, weights).item(), abs=1e-9)


def test_length_mmd_is_large_where_length_decides_and_zero_on_average_where_it_does_not() -> None:
    rng = np.random.default_rng(1)
    bins, ones = torch.tensor(np.repeat([0, 1, 2, 3], 8)), torch.ones(32, dtype=torch.float64)
    by_length = length_mmd(bins.double() + tensor(0.1 * rng.normal(size=32)), bins, ones).item()
    by_chance = [length_mmd(tensor(rng.normal(size=32)), bins, ones).item() for _ in range(400)]
    assert by_length > 0.5
    assert abs(np.mean(by_chance)) < 4 * np.std(by_chance) / 20
    assert min(by_chance) < 0  # an unbiased estimate of 0 must be


def test_going_down_the_length_penalty_brings_the_bins_together() -> None:
    bins, ones = torch.tensor([0] * 6 + [1] * 6), torch.ones(12)
    rewards = torch.cat([torch.linspace(-1, 0, 6), torch.linspace(0.5, 1.5, 6)]).requires_grad_()
    before = (rewards[6:].mean() - rewards[:6].mean()).item()
    for _ in range(50):
        (gradient,) = torch.autograd.grad(length_mmd(rewards, bins, ones), rewards)
        rewards = (rewards - 0.5 * gradient).detach().requires_grad_()
    after = (rewards[6:].mean() - rewards[:6].mean()).item()
    assert abs(after) < 0.2 * before


@pytest.mark.parametrize("bins", [[0, 0, 0], [0, 1, 2], [0, 0, 1]])
def test_length_mmd_without_two_bins_to_compare_is_zero_with_a_gradient_of_zero(bins: list[int]) -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    length_mmd(rewards, torch.tensor(bins), torch.ones(3)).backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [0, 0, 0]


@given(st.data(), SIZES)
def test_the_whole_loss_is_the_weighted_mean_of_its_parts(data: st.DataObject, n: int) -> None:
    chosen, rejected = data.draw(arrays(REWARDS, n)), data.draw(arrays(REWARDS, n))
    weight = data.draw(arrays(st.floats(0.01, 5), n))
    signs = [data.draw(arrays(st.sampled_from([-1.0, 0.0, 1.0]), n)) for _ in range(2)]
    target = data.draw(arrays(st.sampled_from([0.5, 1.0]), n))
    terms = LossTerms(margin=0.3, center=0.01, safe_sign=0.7)
    pairs = batch(
        n,
        target=tensor(target),
        weight=tensor(weight),
        chosen_sign=tensor(signs[0]),
        rejected_sign=tensor(signs[1]),
    )
    expected = 0.0
    for i in range(n):
        lead = chosen[i] - rejected[i]
        preference = -log_sigma(lead - 0.3) if target[i] == 1 else -0.5 * (log_sigma(lead) + log_sigma(-lead))
        costs = [(-chosen[i], signs[0][i]), (-rejected[i], signs[1][i])]
        sign_terms = sum(-log_sigma(s * c) for c, s in costs if s)
        expected += weight[i] * (preference + 0.01 * (chosen[i] + rejected[i]) ** 2 + 0.7 * sign_terms) / n
    got = reward_loss(tensor(chosen), tensor(rejected), pairs, terms).item()
    assert got == pytest.approx(expected, rel=1e-9)


def test_terms_that_are_switched_off_change_nothing() -> None:
    chosen, rejected = tensor([2.0, -1.0]), tensor([0.5, 0.0])
    pairs = batch(2, chosen_sign=tensor([1.0, -1.0]), rejected_sign=tensor([1.0, 1.0]))
    plain = bradley_terry(chosen, rejected, pairs.target)
    assert torch.equal(pair_loss(chosen, rejected, pairs, LossTerms()), plain)
    assert centring(tensor([1.0]), tensor([-1.0])).item() == 0


def test_the_length_penalty_is_part_of_the_loss_of_a_batch() -> None:
    chosen, rejected = tensor([3.0, 2.5, 3.5, 3.2]), tensor([0.0, 0.1, -0.2, 0.3])
    bins = torch.tensor([1, 1, 1, 1])
    pairs = batch(4, chosen_bin=bins, weight=tensor([1.0, 2.0, 0.5, 0.5]))
    terms = LossTerms(length_penalty=2.0)
    rewards = torch.cat([chosen, rejected])
    penalty = length_mmd(rewards, torch.cat([bins, pairs.rejected_bin]), pairs.weight.repeat(2))
    expected = (pairs.weight * pair_loss(chosen, rejected, pairs, terms)).mean() + 2 * penalty
    assert penalty.item() > 0.5
    assert torch.equal(reward_loss(chosen, rejected, pairs, terms), expected)
