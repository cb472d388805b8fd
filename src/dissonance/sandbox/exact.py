"""The exact gold of a world as a callable, for wherever a reward model is named: `dissonance.sandbox.exact:safety_0`.

`safety_0` and `helpfulness_3` are the gold rewards of those tasks in the world of that seed, `safety_cost_0` is a cost
(higher is worse). They hold for worlds with the default number of objects.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

from dissonance.sandbox.gold import gold_cost, gold_reward
from dissonance.sandbox.words import Task
from dissonance.sandbox.world import World

_NAME = re.compile(r"(safety|helpfulness)(_cost)?_(\d{1,9})")


def __getattr__(name: str) -> Callable[..., list[float]]:
    found = _NAME.fullmatch(name)
    if found is None:
        raise AttributeError(f"{name!r} is no gold: write a task and a seed, such as safety_0 or safety_cost_0")
    world = World(task=cast("Task", found[1]), seed=int(found[3]))
    judge = gold_cost if found[2] else gold_reward

    def gold(prompts: Sequence[Sequence[dict[str, Any]]], completions: Sequence[str]) -> list[float]:
        return [judge(world, turns[-1]["content"], text) for turns, text in zip(prompts, completions, strict=True)]

    return gold
