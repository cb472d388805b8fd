"""What an audit costs on GPUs: tokens, floating-point operations and hours, from the sizes and the card's data sheet.

Nothing is measured here. A forward pass takes 2 FLOPs for each parameter and token (Kaplan et al. 2020, section 2.1),
and attention 4 x layers x width for each earlier position. Decoding also reads the weights once a step and each row's
keys and values once a token, from memory. A stage takes the longer of the two times, divided by the share of the card's
limit that an engine reaches.

    python benchmarks/cost.py --prompts 1e6 --n 16 --gpus 8
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder, in bfloat16."""

    parameters: float
    layers: int
    width: int
    kv_width: int
    """Key-value heads x head size."""

    @property
    def cache_bytes(self) -> float:
        """Keys and values of one position."""
        return 2 * 2.0 * self.layers * self.kv_width

    def flops(self, tokens: float, positions: float) -> float:
        """Of a forward pass over so many tokens that look back on so many positions each, on the mean."""
        return tokens * (2 * self.parameters + 4 * self.layers * self.width * positions)


MODEL = Shape(7.2e9, 32, 4096, 1024)
"""As Mistral 7B: 32 layers of width 4,096, 8 key-value heads of 128."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=float, default=1e6)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=float, default=150)
    parser.add_argument("--new-tokens", type=float, default=256)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--flops", type=float, default=989e12, help="of a card, dense bfloat16; default: an H200")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second; default: an H200")
    parser.add_argument("--memory", type=float, default=141e9, help="bytes of a card; default: an H200")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4, 0.2], help="of the limit that is reached")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [cost(arguments, share) for share in arguments.shares]
    print(json.dumps(found) if arguments.json else "\n".join(_lines(arguments, found)))


def cost(given: argparse.Namespace, share: float) -> dict[str, Any]:
    rows, prompt, new = given.prompts * given.n, given.prompt_tokens, given.new_tokens
    context = prompt + new / 2
    batch = (0.85 * given.memory - 2 * MODEL.parameters) / (MODEL.cache_bytes * (prompt + new))
    prefill = MODEL.flops(given.prompts * prompt, prompt / 2)
    decode = MODEL.flops(rows * new, context)
    read = rows * new * (2 * MODEL.parameters / batch + MODEL.cache_bytes * context)
    scoring = MODEL.flops(given.prompts * prompt, prompt / 2) + MODEL.flops(rows * new, context)
    stages = {
        "read the prompts once": (prefill, 0.0),
        "decode": (decode, read),
        "score with a reward model of that size": (scoring, 0.0),
    }
    return {
        "share": share,
        "rows": rows,
        "rows_at_once": batch,
        "new_tokens": rows * new,
        "stages": {
            name: {
                "flops": flops,
                "hours": max(flops / given.flops, bytes_ / given.bandwidth) / share / given.gpus / 3600,
                "bound": "memory" if bytes_ / given.bandwidth > flops / given.flops else "compute",
            }
            for name, (flops, bytes_) in stages.items()
        },
    }


def _lines(given: argparse.Namespace, found: list[dict[str, Any]]) -> list[str]:
    first = found[0]
    size = (
        f"{given.prompts:,.0f} prompts of {given.prompt_tokens:.0f} tokens x {given.n} x {given.new_tokens:.0f} tokens"
    )
    new = f"{first['rows']:,.0f} rows, {first['new_tokens']:.2e} new tokens"
    lines = [f"{size}: {new}; {first['rows_at_once']:,.0f} rows fit a card"]
    shares = "".join(f"{one['share']:>10.0%}" for one in found)
    lines.append(f"{'':42}{'FLOPs':>10} {'bound by':>9}{shares}  of the limit, on {given.gpus} cards")
    for name, stage in first["stages"].items():
        hours = "".join(f"{one['stages'][name]['hours']:8.2f} h" for one in found)
        lines.append(f"{name:42}{stage['flops']:10.2e} {stage['bound']:>9}{hours}")
    hours = "".join(f"{sum(stage['hours'] for stage in one['stages'].values()):8.2f} h" for one in found)
    return [*lines, f"{'all':42}{'':20}{hours}"]


if __name__ == "__main__":
    main()
