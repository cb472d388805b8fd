"""Strategies compared at equal cost in worlds whose gold is known.

config.py: what is compared. setting.py: a world with its answers, made once. cell.py: one strategy, budget and kind of
feedback in it: labels, a refined reward model, and what it is worth. detection.py: does conflict predict the proxy's
errors? efficiency.py: the horizontal distance of learning curves. run.py: all cells, resumed, and their summary.
"""

from dissonance.bench.config import BenchConfig
from dissonance.bench.run import bench, plan

__all__ = ["BenchConfig", "bench", "plan"]
