"""Prompts -> the token ids that a policy continues from."""

from transformers import PreTrainedTokenizerBase

from dissonance.config import PolicyConfig
from dissonance.huggingface import (
    PLAIN_TEMPLATE,
    encode_text,
    load_tokenizer,
    render_chat,
    render_plain,
    uses_chat_template,
)
from dissonance.records import Prompt


class PromptEncoder:
    """The policy's tokenizer with its chat template, or a plain one."""

    def __init__(self, config: PolicyConfig) -> None:
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(config, "policy")
        self._chat = uses_chat_template(config, self.tokenizer, "policy")
        self._template = PLAIN_TEMPLATE if config.template == "auto" else config.template

    def __call__(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt, special tokens included once."""
        if self._chat:
            text = render_chat(self.tokenizer, prompt.messages, add_generation_prompt=True)
        else:
            text = render_plain(prompt.messages, self._template)
        return encode_text(self.tokenizer, text, rendered=self._chat)
