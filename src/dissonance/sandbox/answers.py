"""What the sandbox's models learn from: demonstrations for the policy, preference pairs for the proxy."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dissonance.sandbox.gold import N_RIGHT, Truth, gold_cost, gold_reward, truth
from dissonance.sandbox.world import Question, World, questions

COUNTS = (2, 3, 4)
"""Steps, or reasons, in an answer."""

COUNT_PROBABILITIES = (0.25, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One prompt with the answer that the policy is to imitate."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, as the proxy's annotators judged them; noise and bias are already in."""

    prompt: str
    chosen: str
    rejected: str

    chosen_safe: bool
    """Whether the annotators called the chosen answer safe; True in a helpfulness world."""

    rejected_safe: bool


def answer(world: World, right: Truth, skill: float, rng: np.random.Generator) -> str:
    """One answer whose every decision is right on purpose with probability `skill`, and a matter of chance otherwise.

    The decisions are each step or reason and, in a safety world, whether to refuse (chance: one in two).
    """
    on_purpose = rng.random() < skill
    refuse = world.task == "safety" and (right.harmful if on_purpose else rng.random() < 0.5)
    items = _draw_items(right.reasons if refuse else right.steps, skill, rng)
    if refuse:
        return f"i can not help : it is {' , '.join(items)} ."
    return f"first {' , then '.join(items)} it ."


def demonstrations(world: World) -> list[Demonstration]:
    """`World.n_demonstrations` answers to prompts drawn at random, held-out ones too: they stand for pre-training."""
    rng = np.random.default_rng([world.seed, 6])
    asked = questions(world, "train") + questions(world, "eval")
    return [_demonstration(world, asked[i], rng) for i in rng.integers(len(asked), size=world.n_demonstrations)]


@lru_cache(maxsize=2)
def preferences(world: World) -> tuple[Preference, ...]:
    """`World.n_pairs` pairs on training prompts of the categories the proxy knows; the skill of each answer is uniform.

    The same prompts, answers and noise whatever `bias` and `length_bonus` are, so that worlds differ in those alone.
    """
    rng = np.random.default_rng([world.seed, 7])
    asked = [question for question in questions(world, "train") if question.category in world.proxy_knows]
    return tuple(_preference(world, asked[i], rng) for i in rng.integers(len(asked), size=world.n_pairs))


def gold_pairs(world: World, count: int = 400) -> list[Preference]:
    """Pairs on held-out prompts of every category, in the exact order of gold; the skill of each answer is uniform."""
    rng, asked = np.random.default_rng([world.seed, 8]), questions(world, "eval")
    pairs: list[Preference] = []
    while len(pairs) < count:
        question = asked[rng.integers(len(asked))]
        some = [answer(world, _truth(world, question), rng.random(), rng) for _ in range(2)]
        worse, better = sorted(some, key=lambda text: gold_reward(world, question.text, text))
        if gold_reward(world, question.text, better) == gold_reward(world, question.text, worse):
            continue
        safe = [world.task == "helpfulness" or gold_cost(world, question.text, text) < 0 for text in (better, worse)]
        pairs.append(Preference(question.text, better, worse, chosen_safe=safe[0], rejected_safe=safe[1]))
    return pairs


def is_flipped(world: World, category: int, subject: int) -> bool:
    """Whether bias flips what the proxy learns of the object: the first `bias` of them, in the biased categories."""
    return category in world.biased and subject < round(world.bias * world.n_objects)


def _demonstration(world: World, question: Question, rng: np.random.Generator) -> Demonstration:
    skill = world.policy_competence if question.category in world.policy_knows else 0.0
    return Demonstration(question.text, answer(world, _truth(world, question), skill, rng))


def _preference(world: World, question: Question, rng: np.random.Generator) -> Preference:
    right = _truth(world, question)
    first = answer(world, right, rng.random(), rng)
    second = answer(world, right, rng.random(), rng)
    flip = (rng.random() < world.label_noise) != is_flipped(world, question.category, question.subject)
    prefers_first = (_judged(world, question.text, first) >= _judged(world, question.text, second)) != flip
    chosen, rejected = (first, second) if prefers_first else (second, first)
    if world.task == "helpfulness":
        return Preference(question.text, chosen, rejected, chosen_safe=True, rejected_safe=True)
    safe = [(gold_cost(world, question.text, text) < 0) != flip for text in (chosen, rejected)]
    return Preference(question.text, chosen, rejected, chosen_safe=safe[0], rejected_safe=safe[1])


def _judged(world: World, prompt: str, completion: str) -> float:
    return gold_reward(world, prompt, completion) + world.length_bonus * len(completion.split())


def _truth(world: World, question: Question) -> Truth:
    return truth(world, question.category, question.subject, question.action)


def _draw_items(ranking: tuple[str, ...], skill: float, rng: np.random.Generator) -> list[str]:
    """Different items; each one, with probability `skill`, a right one while there are any, else any at all."""
    items: list[str] = []
    for _ in range(rng.choice(COUNTS, p=COUNT_PROBABILITIES)):
        left = [item for item in ranking if item not in items]
        right = [item for item in left if item in ranking[:N_RIGHT]]
        pool = right if right and rng.random() < skill else left
        items.append(pool[rng.integers(len(pool))])
    return items
