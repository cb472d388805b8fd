"""What a reward model reads of a conversation: text, tokens, and where it is cut; without its weights.

So what it is trained on, what it scores here and what a server scores for it are the same tokens.
"""

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dissonance.config import RewardConfig
from dissonance.huggingface import (
    PLAIN_TEMPLATE,
    join_answer,
    load_tokenizer,
    render_chat,
    render_plain,
    uses_chat_template,
)
from dissonance.records import Message

ROLE = "reward model"
# RoBERTa's kin count positions from two.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"}
# Tokenizers without a limit of their own say 10^30.
_NO_LIMIT = 10**9

TokenIds = tuple[int, ...]


class ConversationEncoder:
    """A reward model's tokenizer and template.

    A conversation goes through the model's own tokenizer: its chat template when it has one; else, for encoders, prompt
    and answer as a pair; else the plain template, the answer, and the end-of-sequence token, as TRL trains it.

    Args:
        config: which model, and how it is read.
        known: the model's configuration.

    Raises:
        ModelError: there is no such tokenizer, or it has no chat template and is to use one.
    """

    def __init__(self, config: RewardConfig, known: PreTrainedConfig) -> None:
        self._config = config
        self.tokenizer = load_tokenizer(config, ROLE)
        self._chat = uses_chat_template(config, self.tokenizer, ROLE)
        self._pair = config.template == "pair" or (
            config.template == "auto" and not self._chat and self.tokenizer.sep_token is not None
        )
        self.max_length = _max_length(config, known, self.tokenizer)

    @property
    def marks_segments(self) -> bool:
        """Whether the model is told which of two segments each token belongs to."""
        return self._pair and "token_type_ids" in self.tokenizer.model_input_names

    def encode(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[TokenIds]:
        """The token ids of each conversation with its answer, whole."""
        both = list(zip(conversations, completions, strict=True))
        if self._chat:
            turns = [[*messages, Message("assistant", text)] for messages, text in both]
            texts = [render_chat(self.tokenizer, turn, add_generation_prompt=False) for turn in turns]
            return self._tokenize(texts, special=False)
        if self._pair:
            return self._tokenize([(render_plain(messages, "{prompt}"), text) for messages, text in both], special=True)
        template = PLAIN_TEMPLATE if self._config.template == "auto" else self._config.template
        end = self.tokenizer.eos_token or ""
        texts = [join_answer(render_plain(messages, template), text) + end for messages, text in both]
        # One that begins with the tokens that the tokenizer would add is not given them twice.
        bos = self.tokenizer.bos_token
        if bos is None or not any(text.startswith(bos) for text in texts):
            return self._tokenize(texts, special=True)
        return [self._tokenize([text], special=not text.startswith(bos))[0] for text in texts]

    def _tokenize(self, texts: Sequence[str | tuple[str, str]], *, special: bool) -> list[TokenIds]:
        if not texts:
            return []
        # Not verbose: what is too long is cut, or left out and counted, by whoever asked.
        encoded = self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return [tuple(ids) for ids in encoded]

    def cut(self, ids: TokenIds) -> TokenIds:
        """Drop the start of what is too long: the answer, and the token that a causal head reads, are at the end.

        The first token stays where it is special: encoders read it. So does a pair's separator.
        """
        excess = len(ids) - self.max_length
        if excess <= 0:
            return ids
        special = {self.tokenizer.cls_token_id, self.tokenizer.bos_token_id}
        kept = ids[: 1 if ids[0] in special else 0]
        if self._pair and self.tokenizer.sep_token_id in ids[: len(kept) + excess]:
            kept += (self.tokenizer.sep_token_id,)
        return kept + ids[excess + len(kept) :]


def _max_length(config: RewardConfig, known: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    text = known.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or _NO_LIMIT
    own = int(min(positions, tokenizer.model_max_length, _NO_LIMIT))
    if text.model_type in _OFFSET_POSITIONS:
        own -= 2
    return min(config.max_length or own, own)
