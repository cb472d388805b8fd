"""Prompts for PPO on a cluster, with the conversation where the reward server looks for it.

python recipes/ppo_prompts.py prompts.jsonl --openrlhf openrlhf.jsonl --verl verl.parquet

OpenRLHF: a line per prompt, `prompt` (the conversation) and `label` (the same as JSON, which it hands to the server).
verl: a row per prompt, with the conversation as JSON in `extra_info.messages`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.prompts import load_prompts
from dissonance.records import Prompt


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The conversation, as JSON has it."""
    return [{"role": message.role, "content": message.content} for message in prompt.messages]


def write_openrlhf(prompts: Sequence[Prompt], path: Path) -> None:
    """JSON lines for `--data.prompt_dataset`, with `--data.input_key prompt --data.label_key label`."""
    rows = [{"prompt": turns(prompt), "label": json.dumps(turns(prompt))} for prompt in prompts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_verl(prompts: Sequence[Prompt], path: Path) -> None:
    """Parquet for `data.train_files`."""
    rows = [
        {
            "data_source": "dissonance",
            "prompt": turns(prompt),
            "reward_model": {"style": "model", "ground_truth": ""},
            "extra_info": {"index": number, "messages": json.dumps(turns(prompt))},
        }
        for number, prompt in enumerate(prompts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def main() -> None:
    """Convert one file of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="what `dissonance audit --prompts` takes")
    parser.add_argument("--openrlhf", type=Path)
    parser.add_argument("--verl", type=Path)
    arguments = parser.parse_args()
    prompts = load_prompts(arguments.prompts).prompts
    if arguments.openrlhf:
        write_openrlhf(prompts, arguments.openrlhf)
    if arguments.verl:
        write_verl(prompts, arguments.verl)


if __name__ == "__main__":
    main()
