"""The sampler against the usual recipe, and against what the machine can do at all.

The usual recipe takes one prompt at a time: `generate` with N return sequences, the text decoded and tokenised again,
and a second full forward pass with log_softmax over all logits. The limit is a teacher-forced forward pass at its best
batch size, which reads as many tokens a second as the machine can. Both methods run in turn in one process; each one's
peak memory is measured in a process of its own, as resident memory above the loaded model's.

    python benchmarks/sampling.py --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype float32 bfloat16
    python benchmarks/sampling.py                              (the built-in world's policy)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dissonance.config import PolicyConfig
from dissonance.huggingface import resolve_source
from dissonance.records import Message, Prompt
from dissonance.sampling import HFPolicy

TOPICS = "tides volcanoes bread chess rain bridges honey glaciers clocks paper silk wolves maps salt opera bicycles"
QUESTION = (
    "I would like to understand {topic} a little better than I do now. Please explain in a few sentences how {topic} "
    "came to matter to people, and what one should look at first."
)


def main() -> None:
    arguments = _arguments()
    if arguments.memory_of:
        print(json.dumps(_memory(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, prompts = _prepare(arguments, Path(scratch))
        results = [_compare(arguments, folder, prompts, dtype) for dtype in arguments.dtype]
    if arguments.json:
        print(json.dumps(results))
    else:
        for result in results:
            _show(arguments, result)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: the built-in world's policy")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens-per-batch", type=int)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=["ours", "recipe"], help=argparse.SUPPRESS)
    parser.add_argument("--prompts-file", help=argparse.SUPPRESS)
    return parser.parse_args()


def _prepare(arguments: argparse.Namespace, scratch: Path) -> tuple[str, list[str]]:
    """A folder to load from (a GGUF file is unpacked once, so that its loading is no part of any peak) and prompts."""
    if arguments.model is None:
        from dissonance.sandbox import World, build_sandbox

        sandbox = build_sandbox(World(task="helpfulness"))
        rows = [json.loads(line) for line in sandbox.prompts.read_text().splitlines()[: arguments.prompts]]
        return str(sandbox.policy), [row["prompt"][-1]["content"] for row in rows]
    topics = TOPICS.split()
    prompts = [QUESTION.format(topic=f"{topics[i % 16]} (part {i // 16 + 1})") for i in range(arguments.prompts)]
    source = resolve_source(arguments.model, "model")
    if not source.kwargs:
        return source.name, prompts
    model = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32, **source.model_kwargs())
    model.save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(source.name, **source.kwargs).save_pretrained(scratch / "model")
    return str(scratch / "model"), prompts


def _policy(arguments: argparse.Namespace, folder: str, dtype: str) -> HFPolicy:
    return HFPolicy(
        PolicyConfig(
            model=folder, n=arguments.n, max_new_tokens=arguments.max_new_tokens, dtype=dtype,
            tokens_per_batch=arguments.tokens_per_batch,
        )
    )  # fmt: skip


def ours(policy: HFPolicy, prompts: list[str]) -> int:
    """Sample everything; returns the number of tokens."""
    asked = [Prompt(str(i), (Message("user", text),)) for i, text in enumerate(prompts)]
    return sum(len(c.token_ids) for batch in policy.plan(asked) for c in policy.sample(batch))


@torch.inference_mode()
def recipe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], n: int, max_new_tokens: int
) -> int:
    """What people write: generate, decode, tokenise again, a second forward; returns the number of tokens."""
    tokens = 0
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        answers = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        again = tokenizer(
            [text + answer for answer in answers], return_tensors="pt", padding=True, padding_side="right",
            add_special_tokens=False,
        )  # fmt: skip
        logprobs = model(input_ids=again["input_ids"], attention_mask=again["attention_mask"]).logits.log_softmax(-1)
        chosen = logprobs[:, :-1].gather(-1, again["input_ids"][:, 1:, None]).squeeze(-1)
        (chosen * again["attention_mask"][:, 1:])[:, length - 1 :].sum(-1).tolist()
        tokens += int((output[:, length:] != tokenizer.pad_token_id).sum())
    return tokens


@torch.inference_mode()
def limit(model: PreTrainedModel) -> float:
    """Tokens a second of a teacher-forced forward pass at the best of a few batch sizes."""
    vocabulary = model.config.get_text_config().vocab_size
    length = min(128, model.config.get_text_config().max_position_embeddings)
    rates = []
    for rows in (4, 16, 32):
        ids = torch.randint(0, vocabulary, (rows, length))
        model.get_decoder()(ids)
        start = time.perf_counter()
        model.get_decoder()(ids)
        rates.append(rows * length / (time.perf_counter() - start))
    return max(rates)


def _compare(arguments: argparse.Namespace, folder: str, prompts: list[str], dtype: str) -> dict[str, Any]:
    policy = _policy(arguments, folder, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    methods: dict[str, Callable[[], int]] = {
        "ours": lambda: ours(policy, prompts),
        "recipe": lambda: recipe(model, tokenizer, prompts, arguments.n, arguments.max_new_tokens),
    }
    ours(policy, prompts[:1])
    recipe(model, tokenizer, prompts[:1], arguments.n, 2)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for _ in range(arguments.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            tokens = method()
            seconds = time.perf_counter() - start
            runs[name].append({"tokens_per_second": tokens / seconds, "prompts_per_second": len(prompts) / seconds})
    most = limit(model)
    pairs = zip(runs["ours"], runs["recipe"], strict=True)
    ratios = [a["prompts_per_second"] / b["prompts_per_second"] for a, b in pairs]
    share = [run["tokens_per_second"] / most for run in runs["ours"]]
    memory = {name: _memory_in_child(arguments, folder, prompts, dtype, name) for name in methods}
    return {"dtype": dtype, "runs": runs, "ratio": ratios, "limit": most, "share_of_limit": share, "memory_mb": memory}


def _memory_in_child(arguments: argparse.Namespace, folder: str, prompts: list[str], dtype: str, method: str) -> float:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(prompts, file)
        file.flush()
        command = [
            sys.executable, __file__, "--memory-of", method, "--model", folder, "--dtype", dtype, "--n",
            str(arguments.n), "--max-new-tokens", str(arguments.max_new_tokens), "--prompts-file", file.name,
        ]  # fmt: skip
        if arguments.tokens_per_batch:
            command += ["--tokens-per-batch", str(arguments.tokens_per_batch)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["peak_mb"])


def _memory(arguments: argparse.Namespace) -> dict[str, float]:
    prompts = json.loads(Path(arguments.prompts_file).read_text())
    dtype = arguments.dtype[0]
    if arguments.memory_of == "ours":
        policy = _policy(arguments, arguments.model, dtype)
        ours(policy, prompts[:1])
        return {"peak_mb": _peak(lambda: ours(policy, prompts))}
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with torch.inference_mode():  # touch every weight, as the warm-up of ours does
        model(torch.zeros(1, 2, dtype=torch.long))
    return {"peak_mb": _peak(lambda: recipe(model, tokenizer, prompts, arguments.n, arguments.max_new_tokens))}


def _peak(work: Callable[[], object]) -> float:
    """Largest resident memory during the work, above what it was before, MB."""
    process, done = psutil.Process(os.getpid()), threading.Event()
    before = seen = process.memory_info().rss

    def watch() -> None:
        nonlocal seen
        while not done.wait(0.005):
            seen = max(seen, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return (seen - before) / 1e6


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
    print(f"  limit (forward pass)       {result['limit']:9.0f} tokens/s")
    print(f"  ours, share of the limit   {spread(result['share_of_limit'])}")


if __name__ == "__main__":
    main()
