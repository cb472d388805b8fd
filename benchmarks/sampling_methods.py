"""The methods that benchmarks/sampling.py compares: each samples all prompts, and counts its tokens up to EOS."""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dissonance.config import PolicyConfig
from dissonance.records import Completion, Prompt
from dissonance.sampling import HFPolicy

_PAGE = 256


class Method:
    """A way to sample."""

    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        raise NotImplementedError

    def cpu_seconds(self) -> float:
        """What its processes have computed so far."""
        return time.process_time()

    def close(self) -> None:
        """Give back what it holds."""


def load(folder: str, dtype: str, device: str) -> PreTrainedModel:
    """A model to sample from."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    return model.to(device)


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    ids: list[int] = tokenizer(_text(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return ids


class Ours(Method):
    """This package's sampler."""

    def __init__(self, arguments: argparse.Namespace, folder: str, dtype: str) -> None:
        config = PolicyConfig(
            model=folder, n=arguments.n, max_new_tokens=arguments.max_new_tokens, dtype=dtype, device=arguments.device,
            tokens_per_batch=arguments.tokens_per_batch,
        )  # fmt: skip
        self._policy = HFPolicy(config)
        self.model = self._policy._model  # noqa: SLF001

    def __call__(self, prompts: list[Prompt]) -> list[Completion]:
        """Sample everything."""
        return [c for batch in self._policy.plan(prompts) for c in self._policy.sample(batch)]

    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        return sum(len(completion.token_ids) for completion in self(prompts))


class Recipe(Method):
    """What people write: generate, decode, tokenise again, a second forward."""

    def __init__(self, arguments: argparse.Namespace, folder: str, dtype: str) -> None:
        self._n, self._steps = arguments.n, arguments.max_new_tokens
        self.model = load(folder, dtype, arguments.device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        return sum(self._one(prompt) for prompt in prompts)

    def _one(self, prompt: Prompt) -> int:
        text = _text(self._tokenizer, prompt)
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
        prefix = _ids(self._tokenizer, prompt)
        ids = torch.tensor([[*prefix, *token_ids]], device=self.model.device)
        return self._logprobs(ids, torch.ones_like(ids), len(prefix))[0]


class ContinuousBatching(Recipe):
    """Transformers' continuous batching: paged keys and values, log-probabilities as it gives them.

    It shares whole pages of a prompt among its answers, and draws from the framework's generator: a token depends on
    the batch that it was drawn in. The cache has a page for every answer, and 512 tokens a step: as it sizes itself on
    a CPU, it takes most of the memory.
    """

    @torch.inference_mode()
    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        ids = [_ids(self._tokenizer, prompt) for prompt in prompts]
        pages = -(-(max(map(len, ids)) + self._steps) // _PAGE)
        found = self.model.generate_batch(
            ids,
            generation_config=GenerationConfig(
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=self._n,
                max_new_tokens=self._steps, eos_token_id=self._tokenizer.eos_token_id,
                pad_token_id=self._tokenizer.pad_token_id,
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                return_logprobs=True, page_size=_PAGE, num_blocks=len(ids) * self._n * pages, max_batch_tokens=512
            ),
            warmup=False,
        )  # fmt: skip
        if len(found) != len(ids) * self._n:
            raise RuntimeError(f"continuous batching gave {len(found)} of {len(ids) * self._n} answers")
        return sum(len(answer.generated_tokens) for answer in found.values())


class VLLM(Method):
    """vLLM's engine in a process and an environment of its own, with log-probabilities."""

    def __init__(self, arguments: argparse.Namespace, folder: str, dtype: str) -> None:
        self._n, self._steps = arguments.n, arguments.max_new_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        script = Path(__file__).with_name("sampling_vllm.py")
        eager = ["eager"] if arguments.vllm_eager else []
        self._process = subprocess.Popen(
            [arguments.vllm / "bin" / "python", script, folder, dtype, str(torch.get_num_threads()), *eager],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer()
        self._cpu_seconds = 0.0

    def tokens(self, prompts: list[Prompt]) -> int:
        """Sample everything; the number of tokens."""
        ids = [_ids(self._tokenizer, prompt) for prompt in prompts]
        asked = {"prompts": ids, "n": self._n, "max_tokens": self._steps, "eos": self._tokenizer.eos_token_id}
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._answer()
        self._cpu_seconds = answer["cpu_seconds"]
        return int(answer["tokens"])

    def cpu_seconds(self) -> float:
        """As it stood after the last answer."""
        return self._cpu_seconds

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError("vLLM ended: what it printed says why")

    def close(self) -> None:
        """End its process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


METHODS: dict[str, type[Ours | Recipe | VLLM]] = {
    "ours": Ours,
    "recipe": Recipe,
    "continuous": ContinuousBatching,
    "vllm": VLLM,
}
