"""A reward or cost model from a base model and preference pairs: the proxy that a recipe's run begins with.

python recipes/train_proxy.py data/safe_rlhf/original.jsonl --base models/sft --kind cost --out models/proxy
"""

import argparse
import json
from pathlib import Path

from dissonance.config import RewardConfig, RewardTraining
from dissonance.progress import console
from dissonance.refine.pairs import read_preferences
from dissonance.refine.reward import refine_reward_model


def main() -> None:
    """Train it, and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--base", required=True, help="a causal LM, which gets a head")
    parser.add_argument("--kind", choices=("reward", "cost"), default="reward")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the pairs, the last ones")
    arguments = parser.parse_args()
    pairs = read_preferences(arguments.pairs)
    kept = len(pairs) - round(arguments.held_out * len(pairs))
    config = RewardTraining(
        base=arguments.base,
        lora_rank=arguments.lora_rank,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
    )
    found = refine_reward_model(
        config,
        RewardConfig(model=arguments.base, kind=arguments.kind),
        pairs[:kept],
        [],
        pairs[kept:],
        [],
        arguments.out,
        progress=console,
    )
    print(json.dumps(found["held_out_original"]["after"], indent=2))


if __name__ == "__main__":
    main()
