"""vLLM's side of benchmarks/sampling.py, run by the Python of vLLM's own environment: lines of JSON in, and out."""

import json
import os
import sys


def main() -> None:
    """Load the model, then sample what each line asks for."""
    folder, dtype, threads = sys.argv[1:]
    # A gigabyte holds all that the benchmark has at once. By default one core would be left idle, for serving.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": threads,
    }
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype=dtype, seed=0, disable_log_stats=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        settings = SamplingParams(
            n=asked["n"], temperature=1.0, top_p=1.0, top_k=0, max_tokens=asked["max_tokens"], logprobs=0,
            stop_token_ids=[asked["eos"]], detokenize=False,
        )  # fmt: skip
        found = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
        print(json.dumps({"tokens": sum(len(c.token_ids) for one in found for c in one.outputs)}), flush=True)


if __name__ == "__main__":
    main()
