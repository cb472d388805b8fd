"""The built-in world: tiny Hugging Face models of known ignorance, and an exact gold reward to judge them by.

words.py: the words of the two tasks. world.py: the dials, the 2 x 2 of knowledge, the prompts. gold.py: the exact
reward of an answer; exact.py: the same as a callable. answers.py: demonstrations and preferences. train.py: tokenizer,
policy and proxy (needs torch). build.py: all of it in a cached folder.
"""

from dissonance.sandbox.build import Sandbox, build_sandbox
from dissonance.sandbox.gold import gold_cost, gold_reward
from dissonance.sandbox.words import Task
from dissonance.sandbox.world import World, cell, questions

__all__ = ["Sandbox", "Task", "World", "build_sandbox", "cell", "gold_cost", "gold_reward", "questions"]
