"""Reward models behind a server: vLLM's /classify, and /get_reward as OpenRLHF asks it."""

import json
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from dissonance.classifier import check_classifies, output_index
from dissonance.config import RewardConfig
from dissonance.conversation_encoder import ROLE, ConversationEncoder, TokenIds
from dissonance.errors import DataError, ModelError, SettingsError
from dissonance.huggingface import (
    PLAIN_TEMPLATE,
    base_and_adapter,
    join_answer,
    load_tokenizer,
    render_chat,
    render_plain,
)
from dissonance.huggingface import uses_chat_template as uses_chat
from dissonance.records import Message, Reward
from dissonance.remote import Body, Remote, served_as

_ROWS_IN_REQUEST = 16
_MOST_THREADS = 32
_SAME = 0.01
_PROBES = ("Yes.", "No, I will not.", "word " * 20)


class _Served:
    """What both kinds have in common: a server, the sign, and many requests at once."""

    def __init__(self, config: RewardConfig) -> None:
        if config.server is None:
            raise SettingsError(f"{ROLE}: server.url says where the server is")
        self._config = config
        self._sign = -1.0 if config.kind == "cost" else 1.0
        self._remote = Remote(config.server, ROLE)
        self._tokenizing = threading.Lock()
        self.concurrency = min(config.server.requests, _MOST_THREADS)

    def cancel(self) -> None:
        """End every call of `score`."""
        self._remote.cancel()


class ClassifyRewardModel(_Served):
    """A sequence classifier that vLLM serves, read as `HFRewardModel` reads it: the same tokens, cut the same way.

    What it gives are the model's own outputs: vLLM would put them through a sigmoid or a softmax, and z-scores of
    squashed rewards are others.

    Raises:
        ModelError: the server is out of reach, has another model, or gives squashed outputs.
    """

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        known = check_classifies(config)
        self._encoder = ConversationEncoder(config, known)
        if self._encoder.marks_segments:
            raise ModelError(
                f"{ROLE}: {config.model} tells the prompt from the answer by segments, which cannot be sent: leave the "
                "server out"
            )
        self._outputs, self._index = known.num_labels, output_index(config, known.num_labels)
        self._pad_id = known.get_text_config().pad_token_id
        adapter = base_and_adapter(config, ROLE)[1]
        self._name, longest = served_as(self._remote, config, ROLE, adapter)
        if longest is not None and longest < self._encoder.max_length:
            raise ModelError(
                f"{ROLE}: the server takes {longest} tokens, and the model {self._encoder.max_length}: start it with a "
                f"larger --max-model-len, or set --reward-max-length {longest}"
            )
        self._check_server()

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per pair conversations[i], completions[i]; what reads the same is scored once.

        Raises:
            ModelError: the server is out of reach for too long, or does not do as it is asked.
            DataError: the model's output is NaN or infinite.
        """
        with self._tokenizing:
            encoded = self._encoder.encode(conversations, completions)
        read = [self._encoder.cut(ids) for ids in encoded]
        distinct = sorted(set(read), key=lambda ids: (len(ids), ids))
        known = dict(zip(distinct, self._ask(distinct, activation=False), strict=True))
        rows = zip(encoded, read, strict=True)
        return [Reward(self._sign * known[kept][self._index], truncated=kept != whole) for whole, kept in rows]

    def _ask(self, rows: Sequence[TokenIds], *, activation: bool) -> list[list[float]]:
        """Every output for each row."""
        parts = [rows[at : at + _ROWS_IN_REQUEST] for at in range(0, len(rows), _ROWS_IN_REQUEST)]
        bodies = [
            {"model": self._name, "input": [self._unpadded(row) for row in part], "use_activation": activation}
            for part in parts
        ]
        found = self._remote.ask("/classify", bodies, self._outputs_of)
        return [outputs for part in found for outputs in part]

    def _unpadded(self, row: TokenIds) -> list[int]:
        """Without pad tokens at the end: here a head reads the last token that is none, and there the last of all."""
        end = len(row)
        while end > 1 and row[end - 1] == self._pad_id:
            end -= 1
        return list(row[:end])

    def _outputs_of(self, body: Body, reply: Any) -> list[list[float]]:
        rows = len(body["input"])
        try:
            by_index = {one["index"]: [float(value) for value in one["probs"]] for one in reply["data"]}
            found = [by_index[i] for i in range(rows)]
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(f"{ROLE}: the server's reply is not that of vLLM's /classify for {rows} texts") from error
        if len(reply["data"]) != rows or any(len(outputs) != self._outputs for outputs in found):
            raise ModelError(
                f"{ROLE}: the server gave {len(reply['data'])} times {len(found[0])} outputs for {rows} texts, and "
                f"{self._config.model} has {self._outputs}: does it serve this model?"
            )
        if not all(math.isfinite(value) for outputs in found for value in outputs):
            raise DataError(f"{ROLE}: the server gave NaN or infinity: see whether the model's weights are sound")
        return found

    def _check_server(self) -> None:
        """Ask for outputs with and without the activation: a server that cannot leave it out gives the same twice.

        The same within the rounding of bfloat16, which batches may change.
        """
        with self._tokenizing:
            encoded = self._encoder.encode([(Message("user", "Tell me."),)] * len(_PROBES), _PROBES)
        probes = [self._encoder.cut(ids) for ids in encoded]
        raw, squashed = (self._ask(probes, activation=activation) for activation in (False, True))
        pairs = [both for two in zip(raw, squashed, strict=True) for both in zip(*two, strict=True)]
        if all(abs(a - b) < _SAME and 0 <= a <= 1 for a, b in pairs):
            raise ModelError(
                f"{ROLE}: the server squashes its outputs into 0 to 1 whatever `use_activation` says: use vLLM 0.12 or "
                "newer"
            )


class GetRewardModel(_Served):
    """A server that is asked as OpenRLHF asks its remote reward models: texts in, one number for each out.

    It gets `query`, the prompt and the answer as the template of `model` has them; `prompts`, where the query's prompt
    ends; and `labels`, the conversation as JSON. What it makes of a text that is too long is up to it: where it says so
    in `extra_logs.reward_truncated`, that is what `truncated` says.

    Raises:
        SettingsError: a setting is one that such a server cannot be told.
        ModelError: there is no such tokenizer.
    """

    def __init__(self, config: RewardConfig) -> None:
        super().__init__(config)
        for name in ("index", "max_length"):
            if getattr(config, name) is not None:
                raise SettingsError(f"{ROLE}: {name} is up to a /get_reward server: leave it out")
        if config.template == "pair":
            raise SettingsError(f"{ROLE}: a /get_reward server is sent one text: use another template than pair")
        self._tokenizer = load_tokenizer(config, ROLE)
        self._chat = uses_chat(config, self._tokenizer, ROLE)
        self._template = PLAIN_TEMPLATE if config.template == "auto" else config.template

    def score(self, conversations: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Reward]:
        """One reward per pair conversations[i], completions[i]; what reads the same is scored once.

        Raises:
            ModelError: the server is out of reach for too long, or does not do as it is asked.
            DataError: a reward is no finite number.
        """
        pairs = [(tuple(messages), text) for messages, text in zip(conversations, completions, strict=True)]
        distinct = list(dict.fromkeys(pairs))
        parts = [distinct[at : at + _ROWS_IN_REQUEST] for at in range(0, len(distinct), _ROWS_IN_REQUEST)]
        with self._tokenizing:
            bodies = [self._body(part) for part in parts]
        found = [reward for rewards in self._remote.ask("", bodies, self._rewards_of) for reward in rewards]
        known = dict(zip(distinct, found, strict=True))
        return [known[pair] for pair in pairs]

    def _body(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> dict[str, list[str]]:
        prompts = [self._prompt(messages) for messages, _ in pairs]
        end = self._tokenizer.eos_token or ""
        texts = [
            text if self._chat else join_answer(prompt, text)[len(prompt) :]
            for prompt, (_, text) in zip(prompts, pairs, strict=True)
        ]
        turns = [[{"role": m.role, "content": m.content} for m in messages] for messages, _ in pairs]
        return {
            "query": [prompt + text + end for prompt, text in zip(prompts, texts, strict=True)],
            "prompts": prompts,
            "labels": [json.dumps(one, ensure_ascii=False) for one in turns],
        }

    def _prompt(self, messages: Sequence[Message]) -> str:
        if self._chat:
            return render_chat(self._tokenizer, messages, add_generation_prompt=True)
        return render_plain(messages, self._template)

    def _rewards_of(self, body: Body, reply: Any) -> list[Reward]:
        texts = body["query"]
        values = reply.get("rewards") if isinstance(reply, Mapping) else None
        if not isinstance(values, list) or len(values) != len(texts):
            given = f"{len(values)} rewards" if isinstance(values, list) else "no list of rewards"
            raise ModelError(f"{ROLE}: the server gave {given} for {len(texts)} texts")
        for value, text in zip(values, texts, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(f"{ROLE}: the server gave {value!r} for {text[:60]!r}: rewards must be finite numbers")
        logs = reply.get("extra_logs")
        said = logs.get("reward_truncated") if isinstance(logs, dict) else None
        cut = said if isinstance(said, list) and len(said) == len(values) else [0.0] * len(values)
        return [Reward(self._sign * value, bool(was)) for value, was in zip(values, cut, strict=True)]
