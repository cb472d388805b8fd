"""The sampler against other ways to sample, and against what the machine can do at all.

ours        this package
recipe      the usual one, a prompt at a time: `generate` with N return sequences, the text decoded and tokenised again,
            and a second full forward pass with log_softmax over all logits
continuous  Transformers' continuous batching, with the log-probabilities that it gives
vllm        vLLM's engine in an environment of its own, likewise; left out where there is none, and in the built-in
            world

All sample the same prompts at temperature 1, N completions each, in the same dtype, to the same end-of-sequence id; the
tokens up to it count. The limit is a teacher-forced forward pass, language model head and all, at the batch size that
reads most tokens a second. The methods run in turn, in changing order. The peak memory of ours and of the recipe is
measured in a process of its own, from the same starting point: the model loaded, and every weight touched once.

Where other programs compute beside it, threads wait for each other, and the clock says nothing: --cpu-time with
OMP_NUM_THREADS=1 counts the CPU's own seconds, those of vLLM's processes too.

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
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dissonance.huggingface import resolve_source
from dissonance.prompts import load_prompts
from dissonance.records import Message, Prompt
from in_turn import choose_clock, conditions, ratios, spread
from memory import peak_mb
from sampling_methods import METHODS, Method, Ours, Recipe, load

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
MEASURED = ("ours", "recipe")
CHECKED = 4
"""Prompts whose completions' log-likelihoods are compared."""
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
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--vllm", type=Path, help="an environment with vLLM in it; default: .venv-vllm, where it is")
    parser.add_argument("--vllm-eager", action="store_true", help="without the compilation, which takes minutes")
    parser.add_argument("--cpu-time", action="store_true", help="time by the seconds of CPU, not by the clock")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", choices=MEASURED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "ours" not in arguments.methods:
        parser.error("--methods: the others are compared with ours")
    if arguments.vllm is None and "vllm" in arguments.methods:
        arguments.vllm = Path(__file__).parents[1] / ".venv-vllm"
        why = None
        if arguments.device != "cpu" or not (arguments.vllm / "bin" / "python").exists():
            why = f"there is no {arguments.vllm} for this device"
        elif arguments.model is None:
            why = "its engine for CPUs dies of the built-in world's policy"
        if why is not None:
            print(f"vllm is left out: {why}", file=sys.stderr)
            arguments.methods.remove("vllm")
    return arguments


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


@torch.inference_mode()
def limit(model: PreTrainedModel, *, cpu_time: bool) -> tuple[float, int]:
    """Tokens a second of a teacher-forced forward pass, and the batch size at which it reads most."""
    text = model.config.get_text_config()
    length, best = min(128, text.max_position_embeddings), (0.0, 0)
    now = choose_clock(cpu_time=cpu_time)
    for rows in (1, 2, 4, 8, 16, 32, 64):
        ids = torch.randint(0, text.vocab_size, (rows, length), device=model.device)
        seconds = []
        for _ in range(3):
            start = now()
            model(ids)
            _wait()
            seconds.append(now() - start)
        rate = rows * length / statistics.median(seconds)
        if rate < 0.9 * best[0]:
            break
        best = max(best, (rate, rows))
    return best


def _timed(method: Method, prompts: list[Prompt], *, cpu_time: bool) -> tuple[int, float]:
    """How many tokens it samples, and the seconds."""
    now = method.cpu_seconds if cpu_time else time.perf_counter
    start = now()
    tokens = method.tokens(prompts)
    _wait()
    return tokens, now() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _compare(arguments: argparse.Namespace, folder: str, dtype: str) -> dict[str, Any]:
    prompts = _prompts(arguments)
    methods = {name: METHODS[name](arguments, folder, dtype) for name in arguments.methods}
    for method in methods.values():
        method.tokens(prompts[:2])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for repeat in range(arguments.repeats):
        for name in sorted(methods, reverse=repeat % 2 == 1):
            tokens, seconds = _timed(methods[name], prompts, cpu_time=arguments.cpu_time)
            print(f"{dtype}, {name}: {tokens} tokens in {seconds:.1f} s", file=sys.stderr, flush=True)
            runs[name].append({"tokens_per_second": tokens / seconds, "prompts_per_second": len(prompts) / seconds})
    for method in methods.values():
        method.close()
    most, rows = limit(load(folder, dtype, arguments.device), cpu_time=arguments.cpu_time)
    found = {
        "dtype": dtype,
        "runs": runs,
        "ratios": {name: ratios(_speeds(runs["ours"]), _speeds(runs[name])) for name in runs if name != "ours"},
        "limit": {"tokens_per_second": most, "rows": rows},
        "share_of_limit": [speed / most for speed in _speeds(runs["ours"])],
        "memory_mb": {name: _memory_in_child(arguments, folder, dtype, name) for name in runs if name in MEASURED},
    }
    recipe = methods.get("recipe")
    if isinstance(recipe, Recipe) and isinstance(methods["ours"], Ours):
        found["differences"] = _differences(methods["ours"], recipe, prompts[:CHECKED])
    return found


def _differences(ours: Ours, recipe: Recipe, prompts: list[Prompt]) -> dict[str, list[float]]:
    """Between log-likelihoods of the same completions: each way's, and those of the same weights in float32."""
    told = [(prompt, completion) for prompt in prompts for completion in ours([prompt])]
    again = [recipe.logprob(prompt, completion.token_ids) for prompt, completion in told]
    recipe.model.float()
    exact = [recipe.logprob(prompt, completion.token_ids) for prompt, completion in told]
    drawn = [completion.logprob for _, completion in told]
    pairs = {
        "ours and the recipe": (drawn, again),
        "ours and float32": (drawn, exact),
        "recipe and float32": (again, exact),
    }
    return {name: [abs(a - b) for a, b in zip(*both, strict=True)] for name, both in pairs.items()}


def _speeds(runs: list[dict[str, float]]) -> list[float]:
    return [run["tokens_per_second"] for run in runs]


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
    model = method.model
    with torch.inference_mode():
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device))
    prompts = _prompts(arguments)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        method.tokens(prompts)
        return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    return {"peak_mb": peak_mb(lambda: method.tokens(prompts))}


def _show(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    name = Path(arguments.model).name if arguments.model else "the built-in world's policy"
    shape = f"{arguments.prompts} prompts x {arguments.n} x {arguments.max_new_tokens} tokens"
    print(f"{name}, {result['dtype']}, {shape}, {conditions(arguments)}")
    for method, runs in result["runs"].items():
        print(f"  {method:10} prompts/s         {spread([run['prompts_per_second'] for run in runs])}")
        print(f"  {method:10} tokens/s          {spread(_speeds(runs))}")
    for method, speedups in result["ratios"].items():
        print(f"  ours / {method:10} tokens/s   {spread(speedups)}")
    most = result["limit"]
    print(f"  limit (forward pass)          {most['tokens_per_second']:9.0f} tokens/s, at {most['rows']} rows")
    print(f"  ours, share of the limit      {spread(result['share_of_limit'])}")
    for method, memory in result["memory_mb"].items():
        print(f"  {method:10} peak memory       {memory:9.0f} MB above the model")
    for between, values in result.get("differences", {}).items():
        print(f"  log-likelihoods of {between}: {statistics.mean(values):.1e} nats apart, {max(values):.1e} at most")


if __name__ == "__main__":
    main()
