"""The sampler against the usual recipe, and against what the machine can do at all.

The usual recipe takes one prompt at a time: `generate` with N return sequences, the text decoded and tokenised again,
and a second full forward pass with log_softmax over all logits. The limit is a teacher-forced forward pass, language
model head and all, at the batch size that reads most tokens a second. Both methods run in turn in one process, in
changing order; each one's peak memory is measured in a process of its own, from the same starting point: the model
loaded, and every weight touched once.

    python benchmarks/sampling.py --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype float32 bfloat16
    python benchmarks/sampling.py                              (the built-in world's policy)
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dissonance.config import PolicyConfig
from dissonance.huggingface import resolve_source
from dissonance.prompts import load_prompts
from dissonance.records import Completion, Message, Prompt
from dissonance.sampling import HFPolicy

TOPICS = "tides volcanoes bread chess rain bridges honey glaciers clocks paper silk wolves maps salt opera bicycles"
# Short, middling, long, and a conversation: the lengths of real prompts differ, and padding is paid for.
PLAIN = "What should everyone know about {topic}?"
POLITE = (
    "I would like to understand {topic} a little better than I do now. Please explain in a few sentences how {topic} "
    "came to matter to people, and what one should look at first."
)
NOTES = (
    "Here are my notes on {topic}. They were more widespread once. The oldest written source that mentions them is a "
    "letter from a merchant to his brother, who did not believe him. Several regions claim to have had them first, and "
    "the claims cannot all be right. Today they are studied in three countries, for different reasons, and the results "
    "are seldom compared. Write a summary of these notes for a school newspaper, in a friendly tone, without lists."
)
TALK = ("Do you know anything about {topic}?", "Yes, quite a lot. What would you like?", "Tell me the oddest fact.")
FORMS = ((PLAIN,), (POLITE,), (NOTES,), TALK)


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        print(json.dumps(_memory(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = _prepare(arguments, Path(scratch))
        results = [_compare(arguments, folder, dtype) for dtype in arguments.dtype]
    if arguments.json:
        print(json.dumps(results))
    else:
        for result in results:
            _show(arguments, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the built-in world's policy")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for both methods")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompts-file", help="default: prompts of four lengths, or the built-in world's own")
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "recipe"], help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace, scratch: Path) -> str:
    """A folder to load from: a GGUF file is unpacked once, so that its loading is no part of any peak."""
    if arguments.model is None:
        from dissonance.sandbox import World, build_sandbox

        sandbox = build_sandbox(World(task="helpfulness"))
        arguments.prompts_file = arguments.prompts_file or str(sandbox.prompts)
        return str(sandbox.policy)
    source = resolve_source(arguments.model, "model")
    if not source.kwargs:
        return source.name
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32, **source.model_kwargs())
    model.save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(source.name, **source.kwargs).save_pretrained(scratch / "model")
    return str(scratch / "model")


def _prompts(arguments: argparse.Namespace) -> list[Prompt]:
    count = arguments.prompts
    if arguments.prompts_file:
        return list(load_prompts(arguments.prompts_file, limit=count).prompts)
    topics, prompts = TOPICS.split(), []
    for i in range(count):
        turns = (turn.format(topic=topics[i % len(topics)]) for turn in FORMS[i % len(FORMS)])
        roles = ("user", "assistant", "user")
        messages = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
        prompts.append(Prompt(f"{i}", messages))
    return prompts


class Ours:
    """This package's sampler."""

    def __init__(self, arguments: argparse.Namespace, folder: str, dtype: str) -> None:
        config = PolicyConfig(
            model=folder, n=arguments.n, max_new_tokens=arguments.max_new_tokens, dtype=dtype, device=arguments.device,
            tokens_per_batch=arguments.tokens_per_batch,
        )  # fmt: skip
        self._policy = HFPolicy(config)

    def __call__(self, prompts: list[Prompt]) -> list[Completion]:
        """Sample everything."""
        return [c for batch in self._policy.plan(prompts) for c in self._policy.sample(batch)]

    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        return sum(len(completion.token_ids) for completion in self(prompts))


class Recipe:
    """What people write: generate, decode, tokenise again, a second forward."""

    def __init__(self, arguments: argparse.Namespace, folder: str, dtype: str) -> None:
        self._n, self._steps = arguments.n, arguments.max_new_tokens
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.model = self.model.to(arguments.device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        return sum(self._one(prompt) for prompt in prompts)

    def _one(self, prompt: Prompt) -> int:
        text = self._text(prompt)
        inputs = self._tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=self._n,
            max_new_tokens=self._steps, pad_token_id=self._tokenizer.pad_token_id,
        )[:, length:]  # fmt: skip
        answers = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        again = self._tokenizer(
            [text + answer for answer in answers], return_tensors="pt", padding=True, padding_side="right",
            add_special_tokens=False,
        ).to(self.model.device)  # fmt: skip
        self._logprobs(again["input_ids"], again["attention_mask"], length)
        ended = (output == self._tokenizer.eos_token_id).cumsum(-1)
        return int((ended - (output == self._tokenizer.eos_token_id).long() == 0).sum())

    def _logprobs(self, ids: torch.Tensor, mask: torch.Tensor, length: int) -> list[float]:
        logprobs = self.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        chosen = logprobs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        values: list[float] = (chosen * mask[:, 1:])[:, length - 1 :].sum(-1).tolist()
        return values

    @torch.inference_mode()
    def logprob(self, prompt: Prompt, token_ids: tuple[int, ...]) -> float:
        """The log-likelihood of one completion, by the second forward pass."""
        prefix = self._tokenizer(self._text(prompt), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prefix, *token_ids]], device=self.model.device)
        return self._logprobs(ids, torch.ones_like(ids), len(prefix))[0]

    def _text(self, prompt: Prompt) -> str:
        turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


METHODS: dict[str, Callable[[argparse.Namespace, str, str], Ours | Recipe]] = {"ours": Ours, "recipe": Recipe}


@torch.inference_mode()
def limit(model: PreTrainedModel) -> tuple[float, int]:
    """Tokens a second of a teacher-forced forward pass, and the batch size at which it reads most."""
    text = model.config.get_text_config()
    length, best = min(128, text.max_position_embeddings), (0.0, 0)
    for rows in (1, 2, 4, 8, 16, 32, 64):
        ids = torch.randint(0, text.vocab_size, (rows, length), device=model.device)
        rate = rows * length / statistics.median(_clock(lambda ids=ids: model(ids)) for _ in range(3))
        if rate < 0.9 * best[0]:
            break
        best = max(best, (rate, rows))
    return best


def _clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _compare(arguments: argparse.Namespace, folder: str, dtype: str) -> dict[str, Any]:
    prompts = _prompts(arguments)
    methods = {name: method(arguments, folder, dtype) for name, method in METHODS.items()}
    for method in methods.values():
        method.tokens(prompts[:2])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for repeat in range(arguments.repeats):
        for name in sorted(methods, reverse=repeat % 2 == 1):
            tokens = 0

            def work(method: Ours | Recipe = methods[name]) -> None:
                nonlocal tokens
                tokens = method.tokens(prompts)

            seconds = _clock(work)
            runs[name].append({"tokens_per_second": tokens / seconds, "prompts_per_second": len(prompts) / seconds})
    ours, recipe = methods["ours"], methods["recipe"]
    assert isinstance(ours, Ours)
    assert isinstance(recipe, Recipe)
    differences = [abs(c.logprob - recipe.logprob(prompts[0], c.token_ids)) for c in ours(prompts[:1])]
    most, rows = limit(recipe.model)
    pairs = zip(runs["ours"], runs["recipe"], strict=True)
    return {
        "dtype": dtype,
        "runs": runs,
        "ratio": [a["prompts_per_second"] / b["prompts_per_second"] for a, b in pairs],
        "limit": {"tokens_per_second": most, "rows": rows},
        "share_of_limit": [run["tokens_per_second"] / most for run in runs["ours"]],
        "memory_mb": {name: _memory_in_child(arguments, folder, dtype, name) for name in methods},
        "largest_logprob_difference": max(differences),
    }


def _memory_in_child(arguments: argparse.Namespace, folder: str, dtype: str, method: str) -> float:
    options = {
        "memory-of": method, "model": folder, "dtype": dtype, "device": arguments.device, "n": arguments.n,
        "prompts": arguments.prompts, "max-new-tokens": arguments.max_new_tokens,
        "tokens-per-batch": arguments.tokens_per_batch, "prompts-file": arguments.prompts_file,
    }  # fmt: skip
    given = [str(x) for name, value in options.items() if value is not None for x in (f"--{name}", value)]
    done = subprocess.run([sys.executable, __file__, *given], check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout)["peak_mb"])


def _memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Largest memory during the work above what the loaded model takes, MB."""
    method = METHODS[arguments.memory_of](arguments, arguments.model, arguments.dtype[0])
    model = method.model if isinstance(method, Recipe) else method._policy._model  # noqa: SLF001
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    prompts = _prompts(arguments)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.tokens(prompts)
        return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    # Linux keeps the peak itself; writing 5 starts it anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    method.tokens(prompts)
    return {"peak_mb": (_status("VmHWM") - before) / 1e6}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _show(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):9.2f}   ({min(values):.2f} to {max(values):.2f})"

    name = Path(arguments.model).name if arguments.model else "the built-in world's policy"
    shape = f"{arguments.prompts} prompts x {arguments.n} x {arguments.max_new_tokens} tokens"
    print(f"{name}, {result['dtype']}, {shape}, {torch.get_num_threads()} threads, {arguments.repeats} repeats")
    for method, runs in result["runs"].items():
        print(f"  {method:7} prompts/s      {spread([run['prompts_per_second'] for run in runs])}")
        print(f"  {method:7} tokens/s       {spread([run['tokens_per_second'] for run in runs])}")
        print(f"  {method:7} peak memory    {result['memory_mb'][method]:9.0f} MB above the model")
    memory = result["memory_mb"]
    print(f"  ours / recipe, prompts/s   {spread(result['ratio'])}")
    print(f"  ours / recipe, memory      {memory['ours'] / memory['recipe']:9.2f}")
    most = result["limit"]
    print(f"  limit (forward pass)       {most['tokens_per_second']:9.0f} tokens/s, at {most['rows']} rows")
    print(f"  ours, share of the limit   {spread(result['share_of_limit'])}")
    print(f"  largest difference between the two log-likelihoods: {result['largest_logprob_difference']:.1e} nats")


if __name__ == "__main__":
    main()
