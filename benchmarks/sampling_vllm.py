"""vLLM's side of benchmarks/sampling.py, run by the Python of vLLM's own environment: lines of JSON in, and out."""

import json
import os
import sys


def main() -> None:
    """Load the model, then sample what each line asks for."""
    folder, dtype, threads, *eager = sys.argv[1:]
    cores = sorted(os.sched_getaffinity(0))[: int(threads)]
    # A gigabyte holds all that the benchmark has at once. By default one core would be left idle, for serving.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    # Everything else is as it comes, with compilation, which takes minutes the first time, unless it is asked not to.
    engine = LLM(folder, dtype=dtype, seed=0, enforce_eager=bool(eager), disable_log_stats=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        settings = SamplingParams(
            n=asked["n"], temperature=1.0, top_p=1.0, top_k=0, max_tokens=asked["max_tokens"], logprobs=0,
            stop_token_ids=[asked["eos"]], detokenize=False,
        )  # fmt: skip
        found = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
        tokens = sum(len(completion.token_ids) for one in found for completion in one.outputs)
        print(json.dumps({"tokens": tokens, "cpu_seconds": _cpu_seconds()}), flush=True)


def _cpu_seconds() -> float:
    """Of this process and of the engine's, which are its children."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(time.user + time.system for time in times)


if __name__ == "__main__":
    main()
