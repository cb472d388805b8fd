"""Measures a policy in training on prompts of its own: reward, KL from the start policy, length, entropy."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from trl.models import unwrap_model_for_generation

from dissonance.models import RewardModel
from dissonance.records import Prompt
from dissonance.refine.isolation import isolated
from dissonance.refine.learner import as_reference
from dissonance.refine.watch import Measurement

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Answers:
    """What the policy said to the prompts, and how likely that is; each of length P."""

    token_ids: list[list[int]]
    """With the id that ended the answer, where one did."""
    logprobs: list[float]
    """Sums, nats."""
    reference_logprobs: list[float]
    """Under the start policy."""
    entropies: list[float]
    """Sums over the tokens, nats."""

    @property
    def log_ratios(self) -> list[float]:
        """Log pi - log pi_start of each answer."""
        return [own - other for own, other in zip(self.logprobs, self.reference_logprobs, strict=True)]


@dataclass(frozen=True)
class Probe:
    """One answer to each of some prompts, drawn anew from the same random state each time.

    Log-probabilities come from TRL's own forward pass, and from the very reference that TRL measures KL from.
    """

    trainer: Any
    reference: Any
    """A frozen model, or None where the trained model without its adapter, or with a copy of it, is the reference."""
    prompts: Sequence[Prompt]
    prompt_ids: Sequence[TokenIds]
    reward_model: RewardModel
    end_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    rows: int
    """Answers drawn and read at once."""
    seed: int

    def measure(self) -> Measurement:
        """Draw the answers and score them."""
        return self.judge(self.answer())

    def answer(self) -> Answers:
        """Draw the answers; neither the random state nor the mode of the model changes."""
        model = self.trainer.model
        training = model.training
        model.eval()
        try:
            with isolated(self.seed), torch.no_grad():
                parts = [self._answer(self.prompt_ids[i : i + self.rows]) for i in self._starts()]
        finally:
            model.train(training)
        columns = zip(*parts, strict=True)
        return Answers(*([value for part in column for value in part] for column in columns))

    def _starts(self) -> range:
        return range(0, len(self.prompt_ids), self.rows)

    def _answer(self, prompt_ids: Sequence[TokenIds]) -> tuple[list[list[int]], list[float], list[float], list[float]]:
        token_ids = self._generate(prompt_ids)
        with self.trainer.accelerator.autocast():
            own = self._read(self.trainer.model, prompt_ids, token_ids)
            with self._reference():
                reference = self._read(self.reference or self.trainer.model, prompt_ids, token_ids)
        return (
            token_ids,
            own.log_probs.sum(-1).tolist(),
            reference.log_probs.sum(-1).tolist(),
            own.entropy.sum(-1).tolist(),
        )

    def _reference(self) -> AbstractContextManager[None]:
        if self.reference is not None:
            return nullcontext()
        return as_reference(self.trainer.accelerator.unwrap_model(self.trainer.model))

    def _generate(self, prompt_ids: Sequence[TokenIds]) -> list[list[int]]:
        device, pad = self.trainer.accelerator.device, self.end_ids[0]
        longest = max(len(ids) for ids in prompt_ids)
        rows = [[pad] * (longest - len(ids)) + list(ids) for ids in prompt_ids]
        masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids]
        plain = {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        settings = {
            **plain, "max_new_tokens": self.max_new_tokens, "temperature": self.temperature,
            "eos_token_id": list(self.end_ids), "pad_token_id": pad,
        }  # fmt: skip
        with unwrap_model_for_generation(
            self.trainer.model_wrapped, self.trainer.accelerator, generation_kwargs=settings
        ) as model:
            drawn = model.generate(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(masks, device=device),
                generation_config=GenerationConfig(**settings, disable_compile=True),
            )
        return [self._up_to_end(ids) for ids in drawn[:, longest:].tolist()]

    def _up_to_end(self, ids: list[int]) -> list[int]:
        stop = next((place + 1 for place, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[:stop]

    def _read(self, model: Any, prompt_ids: Sequence[TokenIds], token_ids: Sequence[TokenIds]) -> Any:
        """TRL's forward pass over prompt and answer, which keeps the answer's tokens only; padded on the right."""
        both = [[*prompt, *answer] for prompt, answer in zip(prompt_ids, token_ids, strict=True)]
        longest = max(len(ids) for ids in both)
        pad = longest - torch.tensor([len(ids) for ids in both])
        ids = torch.tensor([[*row, *[self.end_ids[0]] * (longest - len(row))] for row in both])
        position = torch.arange(longest)
        begins = torch.tensor([len(prompt) for prompt in prompt_ids])
        inside = position < longest - pad.unsqueeze(-1)
        labels = ids.masked_fill(~(inside & (position >= begins.unsqueeze(-1))), -100)
        device = self.trainer.accelerator.device
        return model(
            input_ids=ids.to(device), attention_mask=inside.long().to(device), labels=labels.to(device),
            fused_lm_head=True,
        )  # fmt: skip

    def judge(self, answers: Answers) -> Measurement:
        """Means over the answers."""
        texts = self.trainer.processing_class.batch_decode(answers.token_ids, skip_special_tokens=True)
        rewards = [r.value for r in self.reward_model.score([p.messages for p in self.prompts], texts)]
        tokens = sum(len(ids) for ids in answers.token_ids)
        n = len(self.prompts)
        return Measurement(
            reward=sum(rewards) / n,
            kl=sum(answers.log_ratios) / n,
            length=tokens / n,
            entropy=sum(answers.entropies) / tokens,
            unfinished=sum(ids[-1] not in self.end_ids for ids in answers.token_ids) / n,
        )
