"""How a policy's prompts are batched: by its tokenizer and its configuration, without its weights."""

from collections.abc import Sequence

from dissonance.config import PolicyConfig
from dissonance.huggingface import resolve_device, resolve_tokens_per_batch
from dissonance.language_model import PromptEncoder, check_generates
from dissonance.records import Prompt
from dissonance.sampling.common import check_room


class HFPlanner:
    """Plans the batches of a causal LM.

    Raises:
        ModelError: its tokenizer or its configuration cannot be loaded.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self._config = config
        device = resolve_device(config.device)
        self._budget = resolve_tokens_per_batch(config, device)
        self._copies = 1 if device.type == "cpu" else config.n  # of a prompt's keys: on CPUs its answers share them
        self._context = getattr(check_generates(config, "policy").get_text_config(), "max_position_embeddings", None)
        self.encode = PromptEncoder(config)
        """Prompt -> token ids."""

    def plan(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Split prompts into batches by length, each within the token budget; depends on nothing but the settings.

        Raises:
            DataError: a prompt leaves no room for max_new_tokens in the policy's context.
        """
        lengths = {prompt.prompt_id: len(self.encode(prompt)) for prompt in prompts}
        check_room(lengths, self._config.max_new_tokens, self._context)
        batches: list[list[Prompt]] = []
        for prompt in sorted(prompts, key=lambda p: -lengths[p.prompt_id]):
            # Longest first: a batch's first prompt bounds its width, and memory runs out early or not at all.
            if batches and self._tokens_held(len(batches[-1]) + 1, lengths[batches[-1][0].prompt_id]) <= self._budget:
                batches[-1].append(prompt)
            else:
                batches.append([prompt])
        return batches

    def _tokens_held(self, prompts: int, longest: int) -> int:
        return prompts * (self._copies * longest + self._config.n * self._config.max_new_tokens)
