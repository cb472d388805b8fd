"""A Hugging Face causal LM as a policy, and as a reference model."""

from collections.abc import Sequence

from dissonance.config import PolicyConfig
from dissonance.errors import DissonanceError, ModelError
from dissonance.huggingface import free_memory, is_out_of_memory, load_tokenizer, resolve_device
from dissonance.language_model import PromptEncoder, end_ids, load_language_model
from dissonance.records import Completion, FinishReason, Prompt
from dissonance.sampling.common import one_likelihood
from dissonance.sampling.decode import Drawn, decode, teacher_force
from dissonance.sampling.draw import stack_uniforms
from dissonance.sampling.planner import HFPlanner
from dissonance.sampling.shared_prefix import share_prefixes


class HFPolicy:
    """Any causal LM: a hub id, a local folder or a .gguf file, with or without a PEFT adapter.

    Sampling is plain: temperature and top-p, no other processor of the model's generation config.

    Raises:
        ModelError: the model cannot be loaded, or is not a causal LM.
    """

    def __init__(self, config: PolicyConfig, seed: int = 0) -> None:
        self._config, self._seed = config, seed
        self._planner = HFPlanner(config)
        self._encode = self._planner.encode
        self._model = load_language_model(config, "policy").to(resolve_device(config.device))
        if self._model.device.type == "cpu":
            share_prefixes(self._model)
        self._eos_ids = end_ids(self._model.generation_config, self._encode.tokenizer)
        self._row_limit: int | None = None

    def plan(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """As `HFPlanner.plan`."""
        return self._planner.plan(prompts)

    def sample(self, batch: Sequence[Prompt]) -> list[Completion]:
        """All completions of a batch, ordered by prompt and completion_id.

        Out of memory halves the batch, and remembers the size that fitted. Equal token ids in a prompt get the same
        log-likelihood: rounding must not break a tie.
        """
        return one_likelihood(self._sample(list(batch), range(self._config.n)))

    def _sample(self, batch: list[Prompt], completion_ids: range) -> list[Completion]:
        rows = len(batch) * len(completion_ids)
        if self._row_limit is None or rows <= self._row_limit:
            try:
                return self._sample_once(batch, completion_ids)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            if rows == 1:
                raise DissonanceError(f"out of memory for one completion of prompt {batch[0].prompt_id!r}")
            self._row_limit = rows // 2
            free_memory()
        if len(batch) > 1:
            middle = len(batch) // 2
            return self._sample(batch[:middle], completion_ids) + self._sample(batch[middle:], completion_ids)
        middle = len(completion_ids) // 2
        return self._sample(batch, completion_ids[:middle]) + self._sample(batch, completion_ids[middle:])

    def _sample_once(self, batch: list[Prompt], completion_ids: range) -> list[Completion]:
        config = self._config
        names = [prompt.prompt_id for prompt in batch]
        drawn = decode(
            self._model,
            [self._encode(prompt) for prompt in batch],
            stack_uniforms(self._seed, names, completion_ids, config.max_new_tokens),
            eos_ids=self._eos_ids,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        keys = [(name, completion_id) for name in names for completion_id in completion_ids]
        return [self._completion(*key, row) for key, row in zip(keys, drawn, strict=True)]

    def _completion(self, prompt_id: str, completion_id: int, row: Drawn) -> Completion:
        text = self._encode.tokenizer.decode(row.token_ids, skip_special_tokens=True)
        reason: FinishReason = "stop" if row.stopped else "length"
        return Completion(prompt_id, completion_id, text, row.token_ids, reason, row.logprob)


class HFReference:
    """A causal LM that gives log-likelihoods of the policy's token ids.

    Raises:
        ModelError: it cannot be loaded, or its vocabulary is not the policy's, so that the ids mean other words.
    """

    def __init__(self, config: PolicyConfig, reference: str | PolicyConfig) -> None:
        self._device = resolve_device(config.device)
        self._encode = PromptEncoder(config)
        if isinstance(reference, PolicyConfig):
            model, adapter = reference.model, reference.adapter
        else:
            model, adapter = reference, None
        own = config.model_copy(update={"model": model, "adapter": adapter})
        if load_tokenizer(own, "reference").get_vocab() != self._encode.tokenizer.get_vocab():
            raise ModelError(f"reference: {model} has another vocabulary than the policy: use the policy's own base")
        self._model = load_language_model(own, "reference")
        if self._device.type == "cpu":
            share_prefixes(self._model)

    def logprobs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Sums of log pi_ref over token_ids[i][j], nats; every prompt has equally many completions.

        Equal token ids of a prompt get the same sum: rounding must not break a tie.
        """
        sums = self._logprobs(prompts, token_ids)
        for ids, values in zip(token_ids, sums, strict=True):
            first: dict[tuple[int, ...], float] = {}
            values[:] = [first.setdefault(tuple(some), value) for some, value in zip(ids, values, strict=True)]
        return sums

    def _logprobs(self, prompts: Sequence[Prompt], token_ids: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        try:
            model = self._model.to(self._device)
            return teacher_force(model, [self._encode(prompt) for prompt in prompts], token_ids)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        if len(prompts) > 1:
            half = len(prompts) // 2
            return self._logprobs(prompts[:half], token_ids[:half]) + self._logprobs(prompts[half:], token_ids[half:])
        if len(token_ids[0]) == 1:
            raise DissonanceError(f"reference: out of memory on prompt {prompts[0].prompt_id!r}")
        half = len(token_ids[0]) // 2
        parts = (self._logprobs(prompts, [some]) for some in (token_ids[0][:half], token_ids[0][half:]))
        return [[value for part in parts for value in part[0]]]
