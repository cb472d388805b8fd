"""Reward scoring with the prompt shared among its answers, against reading every conversation whole.

Both run in turn in one process, in changing order, on the same conversations, rendering and tokenising included; each
one's peak memory is measured in a process of its own. A causal language model is given a random head: what it says is
worth nothing, how long it takes is what a reward model of its shape takes.

    python benchmarks/rewards.py                                (the built-in world's reward model, on its own prompts)
    python benchmarks/rewards.py --model SmolLM2-135M-Instruct --prompt-tokens 20 100 300
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from dissonance.config import PolicyConfig, RewardConfig
from dissonance.huggingface import quiet_transformers
from dissonance.prompts import load_prompts
from dissonance.records import Message, Reward
from dissonance.rewards import HFRewardModel
from in_turn import choose_clock, conditions, in_turn, ratios, spread
from memory import peak_mb
from sampling import FORMS, TOPICS

Conversations = list[tuple[tuple[Message, ...], str]]
WAYS = ("plain", "shared")


class Scoring:
    """A reward model that shares prompts, or does not."""

    def __init__(self, arguments: argparse.Namespace, folder: str, way: str) -> None:
        self._model = HFRewardModel(
            RewardConfig(
                model=folder,
                dtype=arguments.dtype,
                device=arguments.device,
                tokens_per_batch=arguments.tokens_per_batch,
            )
        )
        self.classifier = self._model._classifier  # noqa: SLF001
        if way == "plain":
            self.classifier._shares = False  # noqa: SLF001
        elif not self.classifier._shares:  # noqa: SLF001
            sys.exit(f"{folder}: not a model whose prompts can be shared")

    def __call__(self, conversations: Conversations) -> list[Reward]:
        """Score everything."""
        rewards = self._model.score([messages for messages, _ in conversations], [text for _, text in conversations])
        if self.classifier.device.type == "cuda":
            torch.cuda.synchronize()
        return rewards


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        scoring = Scoring(arguments, arguments.model, arguments.memory_of)
        conversations = _made(arguments, arguments.prompt_tokens[0]) if arguments.prompt_tokens else _own(arguments)
        scoring.classifier.score([(0, 1)])
        print(peak_mb(lambda: scoring(conversations)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        name = _prepare(arguments, scratch)
        ways = {way: Scoring(arguments, arguments.model, way) for way in WAYS}
        print(f"{name}, {arguments.dtype}, {conditions(arguments)}")
        for tokens in arguments.prompt_tokens or [None]:
            _show(arguments, tokens, ways)
            sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; default: the built-in world's reward model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--prompts", type=int, help="how many; default: 4, of the built-in world's own 64")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", help="length of made-up prompts, before any template")
    parser.add_argument("--n", type=int, default=8, help="answers to a prompt")
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time by the seconds of CPU, not by the clock")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace, scratch: str) -> str:
    """Make `arguments.model` a folder or an id to load a reward model from; what it is called."""
    if arguments.model is None:
        from dissonance.sandbox import World, build_sandbox

        arguments.model = str(build_sandbox(World(task="helpfulness")).reward_model)
        return "the built-in world's reward model"
    name = Path(arguments.model).name
    arguments.prompt_tokens = arguments.prompt_tokens or [20, 100, 300]
    architecture = (AutoConfig.from_pretrained(arguments.model).architectures or [""])[0]
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        torch.manual_seed(0)
        with quiet_transformers():
            made = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=1, dtype="float32")
            made.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(scratch)
        arguments.model = scratch
        return f"{name} with a random head"
    return name


def _own(arguments: argparse.Namespace) -> Conversations:
    """The built-in world's prompts, and its policy's answers."""
    from dissonance.sampling import HFPolicy

    folder = Path(arguments.model).parent
    prompts = list(load_prompts(str(folder / "prompts.jsonl"), limit=arguments.prompts or 64).prompts)
    policy = HFPolicy(PolicyConfig(model=str(folder / "policy"), n=arguments.n, max_new_tokens=arguments.answer_tokens))
    messages = {prompt.prompt_id: prompt.messages for prompt in prompts}
    answers = [answer for batch in policy.plan(prompts) for answer in policy.sample(batch)]
    return [(messages[answer.prompt_id], answer.text) for answer in answers]


def _made(arguments: argparse.Namespace, tokens: int) -> Conversations:
    """Prompts of so many tokens, and answers that part at their first word."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    corpus = " ".join(turn.format(topic=topic) for topic in TOPICS.split() for form in FORMS for turn in form)
    ids = tokenizer(corpus, add_special_tokens=False)["input_ids"]
    conversations: Conversations = []
    for i in range(arguments.prompts or 4):
        messages = (Message("user", _text(tokenizer, ids, 211 * i, tokens)),)
        for j in range(arguments.n):
            conversations.append((messages, _text(tokenizer, ids, 97 * i + 31 * j + 7, arguments.answer_tokens)))
    return conversations


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], start: int, count: int) -> str:
    return str(tokenizer.decode([ids[(start + k) % len(ids)] for k in range(count)]))


def _show(arguments: argparse.Namespace, tokens: int | None, ways: dict[str, Scoring]) -> None:
    conversations = _own(arguments) if tokens is None else _made(arguments, tokens)
    rewards = {way: [r.value for r in scoring(conversations)] for way, scoring in ways.items()}
    now = choose_clock(cpu_time=arguments.cpu_time)
    start = now()
    rows = ways["plain"].classifier.encode([messages for messages, _ in conversations], [t for _, t in conversations])
    encoding = now() - start
    work: dict[str, Any] = {way: lambda way=way: ways[way](conversations) for way in ways}
    seconds = in_turn(work, arguments.repeats, now)
    mean = sum(map(len, rows)) / len(rows)
    kind = "its own prompts" if tokens is None else f"prompts of {tokens} tokens"
    n = len(conversations) // arguments.n
    print(f"  {n} x {kind}, {arguments.n} answers each; {mean:.0f} tokens a conversation")
    for way, taken in seconds.items():
        peak = _memory(arguments, tokens, way)
        print(
            f"    {way:7} answers/s      {spread([len(rows) / s for s in taken], 1)}    {peak:6.0f} MB above the model"
        )
    print(f"    shared / plain         {spread(ratios(seconds['plain'], seconds['shared']))}")
    shares = [f"{encoding / min(taken):.0%} of {way}" for way, taken in seconds.items()]
    print(f"    rendering and tokenising are {' and '.join(shares)}")
    furthest = max(abs(a - b) for a, b in zip(rewards["plain"], rewards["shared"], strict=True))
    print(f"    largest difference in reward {furthest:.1e}, where rewards reach {max(map(abs, rewards['plain'])):.1f}")


def _memory(arguments: argparse.Namespace, tokens: int | None, way: str) -> float:
    options = {
        "memory-of": way, "model": arguments.model, "dtype": arguments.dtype, "device": arguments.device,
        "prompts": arguments.prompts, "n": arguments.n, "answer-tokens": arguments.answer_tokens,
        "tokens-per-batch": arguments.tokens_per_batch, "prompt-tokens": tokens,
    }  # fmt: skip
    given = [str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)]
    done = subprocess.run([sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
