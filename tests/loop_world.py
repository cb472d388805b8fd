"""A world for whole runs: random tiny models, prompts, preferences and an exact gold, none of which takes training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOLD = """
def gold(prompts, completions):
    return [float(len(set(text.split()))) for text in completions]


def other_gold(prompts, completions):
    return [float(len(set(text.split())) + ("w3" in text)) for text in completions]
"""


def write_world(
    folder: Path, make_policy: Callable[..., Path], make_reward_model: Callable[..., Path], prompts: int = 16
) -> dict[str, Any]:
    """Write everything but the models into `folder`; gives the settings of a short run that asks a gold annotator."""
    (folder / "gold_module.py").write_text(GOLD, encoding="utf-8")
    _lines(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"w{i} w{2 * i + 1}"} for i in range(prompts)])
    _lines(folder / "held_out.jsonl", [{"id": f"h{i}", "prompt": f"w{i} w{i + 40} w{i}"} for i in range(8)])
    return {
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "policy": {"model": str(make_policy()), "n": 4, "max_new_tokens": 10},
        "reward_model": {"model": str(make_reward_model())},
        "selection": {"strategy": "discordant", "budget": 12},
        "feedback": {"annotator": "gold", "reward_model": {"model": "gold_module:gold"}, "min_pairs": 4},
        "refine": {
            "reward": {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2},
            "policy": {
                "steps": 2, "prompts_per_step": 4, "n": 2, "learning_rate": 1e-3, "check_every": 1, "check_prompts": 4,
                "max_kl": None, "max_length_ratio": None,
            },
        },
        "evaluation": {
            "prompts": {"source": str(folder / "held_out.jsonl")},
            "gold": {"model": "gold_module:other_gold"},
            "n": 2,
            "replicates": 200,
        },
    }  # fmt: skip


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def gold_preferences(count: int, *, swapped: bool = False, word: str = "w60") -> list[dict[str, Any]]:
    """Pairs whose better answer has more different words, in TRL's form; on prompts that hold `word`."""
    rows = []
    for i in range(count):
        better, worse = f"w{i % 60} w{(i + 1) % 60} w{(i + 7) % 60}", f"w{i % 60} w{i % 60} w{i % 60}"
        chosen, rejected = (worse, better) if swapped else (better, worse)
        rows.append({"prompt": f"w{i % 60} {word} w{i // 60}", "chosen": chosen, "rejected": rejected})
    return rows
