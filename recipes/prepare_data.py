"""Public preference data -> the files that the recipes name. Needs a network, and `datasets`.

python recipes/prepare_data.py safe-rlhf --out data/safe_rlhf     PKU-Alignment/PKU-SafeRLHF, for a cost model
python recipes/prepare_data.py hh-rlhf --out data/hh_rlhf         Anthropic/hh-rlhf, helpful-base, for a reward model

Each leaves prompts.jsonl, held_out.jsonl, original.jsonl and gold.jsonl. For safety, original.jsonl holds the pairs of
five categories of harm alone, which is what the proxy is to know; prompts and held-out prompts are of all. No prompt is
in two files.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

KNOWN = ("Endangering National Security", "Insulting Behavior", "Discriminatory Behavior", "Drugs", "Violence")
"""Categories of harm that the safety proxy has seen."""

SHARES = {"held_out": 0.1, "gold": 0.1, "original": 0.5, "prompts": 0.3}
"""Of all prompts, by a hash of the text, so that the files never share one."""

Row = dict[str, Any]


def main() -> None:
    """Download, convert, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("safe-rlhf", "hh-rlhf"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from datasets import load_dataset

    if arguments.data == "safe-rlhf":
        rows = safe_rlhf(load_dataset("PKU-Alignment/PKU-SafeRLHF", split="train"))
    else:
        rows = hh_rlhf(load_dataset("Anthropic/hh-rlhf", data_dir="helpful-base", split="train"))
    counts = write(rows, arguments.out)
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))


def safe_rlhf(rows: Iterable[Row]) -> Iterator[Row]:
    """Pairs by the safer answer, each side with its safety, and the category of harm of the less safe one."""
    for row in rows:
        safer = row["safer_response_id"]
        harms = row[f"response_{1 - safer}_harm_category"]
        yield {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": row[f"response_{safer}"],
            "rejected": row[f"response_{1 - safer}"],
            "chosen_safe": row[f"is_response_{safer}_safe"],
            "rejected_safe": row[f"is_response_{1 - safer}_safe"],
            "category": next((name for name, found in harms.items() if found), "none"),
        }


def hh_rlhf(rows: Iterable[Row]) -> Iterator[Row]:
    """Pairs of last answers to one conversation; rows whose sides part earlier are left out."""
    for row in rows:
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
        if (
            chosen[:-1] == rejected[:-1]
            and len(chosen) > 1
            and chosen[-1]["role"] == rejected[-1]["role"] == "assistant"
        ):
            yield {"prompt": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def turns(text: str) -> list[Row]:
    r"""Read "\n\nHuman: ...\n\nAssistant: ..."."""
    parts = re.split(r"\n\n(Human|Assistant): ?", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def write(rows: Iterable[Row], out: Path) -> dict[str, int]:
    """Write the four files; how many rows each has."""
    out.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(SHARES, 0)
    seen: set[str] = set()
    with ExitStack() as stack:
        files = {name: stack.enter_context((out / f"{name}.jsonl").open("w", encoding="utf-8")) for name in SHARES}
        for row in rows:
            said = json.dumps(row["prompt"], ensure_ascii=False)
            place = _place(said)
            kept = row
            if place in ("prompts", "held_out"):
                kept = {"prompt": row["prompt"], "category": row.get("category")}
            unknown = place == "original" and row.get("category", "none") not in (*KNOWN, "none")
            if unknown or (kept is not row and said in seen):
                continue
            seen.add(said)
            files[place].write(json.dumps(kept, ensure_ascii=False) + "\n")
            counts[place] += 1
    return counts


def _place(said: str) -> str:
    drawn = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest()) / 2**64
    for name, share in SHARES.items():
        if drawn < share:
            return name
        drawn -= share
    return name


if __name__ == "__main__":
    main()
