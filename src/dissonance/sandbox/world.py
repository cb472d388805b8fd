"""The dials of a built-in world, its 2 x 2 of knowledge, and the prompts that can be asked in it."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

import numpy as np

from dissonance.errors import DataError, SettingsError
from dissonance.sandbox.words import CATEGORIES, MAX_OBJECTS, OPENINGS, Category, Task

Cell = Literal["both", "policy_only", "proxy_only", "neither"]
Split = Literal["train", "eval"]
HELD_OUT = 4
"""One object in this many, rounded down but at least one, is held out: for helpfulness whole, for safety per action."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything a sandbox is made from: the same dials give the same prompts and the same gold.

    They give the same weights too, with one version of the libraries that train them, on one kind of processor. The
    defaults were fixed before any strategy was compared, and favour none. Gold depends on `task`, `seed` and
    `n_objects` alone.

    A quarter of the questions is held out by what gold depends on (`Question.gold_key`). What is held out is in
    neither the training prompts nor the proxy's preferences; the policy's demonstrations, which stand for pre-training,
    cover it, as pre-training covers most of what a model is later asked.
    """

    task: Task = "helpfulness"

    seed: int = 0
    """At least 0; draws what is right for each object, the demonstrations, the preferences and the start weights."""

    n_objects: int = 8
    """Objects per category, 2..10."""

    policy_competence: float = 0.7
    """Probability, 0..1, that a demonstration is right on purpose, per decision (each step; to refuse or not), in the
    categories the policy knows. Otherwise, and in all other categories, the decision is left to chance."""

    label_noise: float = 0.05
    """Probability, 0..0.5, that a preference the proxy learns from is flipped, independently of all else."""

    bias: float = 0.0
    """Share of the objects, 0..1, whose preferences are *all* flipped, in every second category the proxy knows."""

    length_bonus: float = 0.0
    """Gold units per word that the proxy's annotators add to an answer for being long."""

    policy_knows: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Positions in `CATEGORIES[task]` of the categories of which the policy has seen good answers."""

    proxy_knows: tuple[int, ...] = (0, 1, 5, 6, 7)
    """The same for the categories of which the proxy has seen preferences: 2 known to both, 3 to one alone (each), 2
    to neither."""

    n_demonstrations: int = 6_000
    """Answers the policy learns from, over all categories; at least 1."""

    n_pairs: int = 8_000
    """Preference pairs the proxy learns from, over the categories it knows; at least 1."""

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise SettingsError(f"unknown sandbox task {self.task!r}: use one of {', '.join(get_args(Task))}")
        limits: dict[str, tuple[float, float]] = {
            "seed": (0, 2**32 - 1),
            "n_objects": (2, MAX_OBJECTS),
            "policy_competence": (0, 1),
            "label_noise": (0, 0.5),
            "bias": (0, 1),
            "length_bonus": (-1, 1),
            "n_demonstrations": (1, 10**7),
            "n_pairs": (1, 10**7),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"sandbox {name} is {getattr(self, name)}: give a value from {low} to {high}")
        for name in ("policy_knows", "proxy_knows"):
            known = getattr(self, name)
            if not known or len(set(known)) < len(known) or not set(known) <= set(range(len(self.categories))):
                last = len(self.categories) - 1
                raise SettingsError(f"sandbox {name} is {known}: give one or more different positions from 0 to {last}")

    @property
    def categories(self) -> tuple[Category, ...]:
        """The ten categories of the task."""
        return CATEGORIES[self.task]

    @property
    def biased(self) -> tuple[int, ...]:
        """Positions of the categories in which `bias` flips preferences: every second one of `proxy_knows`."""
        return self.proxy_knows[1::2]


@dataclass(frozen=True, slots=True)
class Question:
    """What a prompt of the sandbox asks."""

    category: int
    """Position in `World.categories`."""

    subject: int
    """Position of the object in its category."""

    action: int
    """Position in its category."""

    text: str

    gold_key: str
    """What gold depends on: category and object for helpfulness, and the action too for safety. Questions of one key
    are one question in other words: the splits share no key, and a mean over prompts has as many independent parts as
    there are keys, so that intervals want clustering by it."""


def cell(world: World, category: str) -> Cell:
    """Who knows the category of this name: `both`, `policy_only`, `proxy_only` or `neither` (shared ignorance)."""
    names = [known.name for known in world.categories]
    if category not in names:
        raise DataError(f"no category {category!r} in the {world.task} sandbox: it has {', '.join(names)}")
    position = names.index(category)
    cells: dict[tuple[bool, bool], Cell] = {
        (True, True): "both",
        (True, False): "policy_only",
        (False, True): "proxy_only",
        (False, False): "neither",
    }
    return cells[position in world.policy_knows, position in world.proxy_knows]


@lru_cache(maxsize=64)
def questions(world: World, split: Split) -> tuple[Question, ...]:
    """Every question of a split, shuffled; the two splits share no `gold_key` and cover every category alike."""
    chosen: list[Question] = []
    for category in range(len(world.categories)):
        held_out = _held_out(world, category)
        chosen += [
            question
            for question in _all_questions(world, category)
            if ((question.subject, question.action) in held_out) == (split == "eval")
        ]
    return tuple(chosen[i] for i in np.random.default_rng([world.seed, 2]).permutation(len(chosen)))


def _held_out(world: World, category: int) -> frozenset[tuple[int, int]]:
    """Objects and actions held out together: for helpfulness every action on a few objects.

    For safety every action on as many objects, in turn, so that each object and each action stays in training too.
    """
    order = np.random.default_rng([world.seed, category, 1]).permutation(world.n_objects).tolist()
    count = max(1, world.n_objects // HELD_OUT)
    shift = count if world.task == "safety" else 0
    actions = range(len(world.categories[category].actions))
    return frozenset(
        (order[(shift * action + i) % world.n_objects], action) for action, i in product(actions, range(count))
    )


def _all_questions(world: World, category: int) -> list[Question]:
    known, safety = world.categories[category], world.task == "safety"
    return [
        Question(
            category,
            subject,
            action,
            opening.format(action=known.actions[action], subject=known.objects[subject]),
            gold_key="/".join([known.name, known.objects[subject], known.actions[action]][: 3 if safety else 2]),
        )
        for opening, action, subject in product(OPENINGS, range(len(known.actions)), range(world.n_objects))
    ]
