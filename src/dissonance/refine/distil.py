"""Sampled answers and their rewards -> what an offline method learns from (pure).

`ranked_pairs` and `rejection_pairs` are for DPO, `best_answers` is for supervised fine-tuning. Everything stays in the
token ids that the policy produced: text that is tokenised again may be other tokens, and has lost its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dissonance.errors import DataError
from dissonance.models import RewardModel
from dissonance.records import Completion, Prompt
from dissonance.rejection import pooled_deviation, rejection_sample


@dataclass(frozen=True, slots=True)
class Candidates:
    """The answers to one prompt, and what they are worth."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: NDArray[np.float64]
    """(N,), higher is better; of an answer without an end, less the penalty for that."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the first of higher reward."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


@dataclass(frozen=True, slots=True)
class Pairs:
    """What pairing left."""

    pairs: tuple[Pair, ...]
    tied: int
    """Pairs left out because their rewards or their token ids are the same."""


def score_candidates(
    reward_model: RewardModel, prompts: Sequence[Prompt], completions: Sequence[Completion], missing_eos_penalty: float
) -> list[Candidates]:
    """Score the answers, prompt by prompt in the order of `prompts`.

    Raises:
        DataError: a prompt has fewer than two answers, or an answer belongs to none of the prompts.
    """
    answers: dict[str, list[Completion]] = {prompt.prompt_id: [] for prompt in prompts}
    for completion in completions:
        if completion.prompt_id not in answers:
            raise DataError(f"there is an answer to prompt {completion.prompt_id!r}, which is not among the prompts")
        answers[completion.prompt_id].append(completion)
    few = [name for name, some in answers.items() if len(some) < 2]
    if few:
        raise DataError(f"{len(few)} prompts have fewer than two answers to choose from; the first is {few[0]!r}")
    flat = [(prompt, completion) for prompt in prompts for completion in answers[prompt.prompt_id]]
    scored = reward_model.score([prompt.messages for prompt, _ in flat], [answer.text for _, answer in flat])
    penalties = [missing_eos_penalty if answer.finish_reason == "length" else 0.0 for _, answer in flat]
    values = np.array([reward.value for reward in scored]) - np.array(penalties)
    stops = np.cumsum([len(answers[prompt.prompt_id]) for prompt in prompts])
    parts = np.split(values, stops[:-1])
    return [Candidates(p, tuple(answers[p.prompt_id]), part) for p, part in zip(prompts, parts, strict=True)]


def best_answers(candidates: Sequence[Candidates]) -> list[tuple[Prompt, Completion]]:
    """Each prompt's answer of the highest reward; of several, the first."""
    return [(some.prompt, some.completions[int(some.rewards.argmax())]) for some in candidates]


def ranked_pairs(candidates: Sequence[Candidates]) -> Pairs:
    """Each prompt's best answer against its worst."""
    return _pairs([(some, int(some.rewards.argmax()), int(some.rewards.argmin())) for some in candidates])


def rejection_pairs(candidates: Sequence[Candidates], keep: int, beta: float, rng: np.random.Generator) -> Pairs:
    """Pairs of answers that statistical rejection sampling kept: near samples of the policy that RL aims at.

    Liu et al. 2023 (arXiv 2309.06657), algorithm 1, then first-round ranking: what is kept is paired off at random,
    and the rewards order each pair. Rewards are divided by their standard deviation within a prompt, pooled over the
    prompts, so that `beta` does not depend on the reward model's scale.

    Args:
        candidates: of each prompt.
        keep: answers to keep of each prompt, an even number.
        beta: the lower, the more the best answers are favoured.
        rng: draws what is kept and who meets whom.

    Raises:
        DataError: a prompt has fewer answers than are to be kept.
    """
    short = min(len(some.completions) for some in candidates)
    if short < keep:
        raise DataError(f"rso_keep is {keep}, but a prompt has only {short} answers: sample more, or keep fewer")
    scale = pooled_deviation([some.rewards for some in candidates])
    drawn: list[tuple[Candidates, int, int]] = []
    for some in candidates:
        kept = rng.permutation(rejection_sample(some.rewards / scale, keep, beta, rng))
        drawn += [(some, int(a), int(b)) for a, b in kept.reshape(-1, 2)]
    return _pairs(drawn)


def _pairs(drawn: Sequence[tuple[Candidates, int, int]]) -> Pairs:
    """Order each pair by reward; what cannot be ordered, or is the same answer twice, teaches nothing."""
    pairs = []
    for some, a, b in drawn:
        better, worse = (a, b) if some.rewards[a] > some.rewards[b] else (b, a)
        chosen, rejected = some.completions[better], some.completions[worse]
        if some.rewards[better] != some.rewards[worse] and chosen.token_ids != rejected.token_ids:
            pairs.append(Pair(some.prompt, chosen, rejected))
    return Pairs(tuple(pairs), len(drawn) - len(pairs))
