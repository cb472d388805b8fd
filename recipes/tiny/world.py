"""The built-in world as the tiny recipes name it: ./tiny/safety and ./tiny/helpfulness.

python recipes/tiny/world.py --out tiny
"""

import argparse
import shutil
from pathlib import Path
from typing import get_args

from dissonance.sandbox import Task, World, build_sandbox


def main() -> None:
    """Build both tasks' worlds, or take them from the cache, and copy them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for task in get_args(Task):
        write(World(task=task, seed=arguments.seed), arguments.out)


def write(world: World, out: Path) -> None:
    """Copy a world to a folder of its task's name."""
    shutil.copytree(build_sandbox(world).folder, out / world.task, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
