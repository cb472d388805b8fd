"""A policy that a server samples: vLLM, or another that gives token ids and raw log-probabilities.

The server gets token ids and gives token ids: text is made of them here, by the policy's own tokenizer and template.
"""

import hashlib
import math
import threading
from collections.abc import Sequence
from typing import Any

from dissonance.config import PolicyConfig
from dissonance.errors import ModelError, SettingsError
from dissonance.huggingface import base_and_adapter
from dissonance.language_model import PromptEncoder, check_generates, end_ids, generation_config
from dissonance.records import Completion, FinishReason, Message, Prompt
from dissonance.remote import Body, Remote, UnfinishedError, served_as
from dissonance.sampling.common import check_room, one_likelihood

_PATH = "/v1/completions"
_PROMPTS_IN_BATCH = 16
"""Stored together. No setting: a run that goes on with more requests in flight has the batches that it had."""
_NO_LOGPROB = -9999.0
"""What vLLM writes for minus infinity."""
_PROBE = Prompt("probe", (Message("user", "Say hello."),))
_PROBE_TOKENS = 16
_PROBE_NUCLEUS = 1e-4
"""Top-p that leaves nothing but the likeliest token, which has then a processed log-probability of 0."""
_PROBE_TOLERANCE = 0.1
"""Nats a token: between decoding and reading the same tokens, bfloat16 is off by less."""

_Row = tuple[tuple[int, ...], list[float]]
"""An answer's token ids and their log-probabilities."""


class HTTPPolicy:
    """A policy behind a server. One request asks for all completions of a prompt: there is none without the others.

    Sampling is plain, whatever the model's generation config says, and log-likelihoods are of the raw logits.

    Raises:
        ModelError: the server is out of reach, has another model, or gives no token ids or no raw log-probabilities.
    """

    def __init__(self, config: PolicyConfig, seed: int = 0) -> None:
        if config.server is None or config.server.protocol != "openai":
            raise SettingsError("policy: server.url must be an OpenAI-compatible server, as http://127.0.0.1:8000")
        self._config, self._seed = config, seed
        self._encode, self._tokenizing = PromptEncoder(config), threading.Lock()
        known = check_generates(config, "policy")
        self._ends = end_ids(generation_config(config, known, "policy"), self._encode.tokenizer)
        self._remote = Remote(config.server, "policy")
        adapter = base_and_adapter(config, "policy")[1]
        self._name, longest = served_as(self._remote, config, "policy", adapter)
        limits = (getattr(known.get_text_config(), "max_position_embeddings", None), longest)
        self._context = min((limit for limit in limits if limit), default=None)
        self.concurrency = math.ceil(config.server.requests / _PROMPTS_IN_BATCH) + 1
        self._check_server()

    def cancel(self) -> None:
        """End every call of `sample`."""
        self._remote.cancel()

    def plan(self, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
        """Split prompts into batches of a fixed number, in their order: the server makes its own batches.

        Raises:
            DataError: a prompt leaves no room for max_new_tokens in the model's context, or in the server's.
        """
        with self._tokenizing:
            lengths = {prompt.prompt_id: len(self._encode(prompt)) for prompt in prompts}
        check_room(lengths, self._config.max_new_tokens, self._context)
        return [list(prompts[at : at + _PROMPTS_IN_BATCH]) for at in range(0, len(prompts), _PROMPTS_IN_BATCH)]

    def sample(self, batch: Sequence[Prompt]) -> list[Completion]:
        """All completions of a batch, ordered by prompt and completion_id.

        Raises:
            ModelError: the server is out of reach for too long, or does not do as it is asked.
        """
        config = self._config
        with self._tokenizing:
            bodies = [
                {**self._request(self._encode(prompt), config.max_new_tokens, config.temperature, config.top_p),
                 "n": config.n, "seed": _seed(self._seed, prompt.prompt_id), "stop_token_ids": self._ends}
                for prompt in batch
            ]  # fmt: skip
        found = self._remote.ask(_PATH, bodies, self._answers)
        rows = [
            (prompt.prompt_id, i, row) for prompt, rows in zip(batch, found, strict=True) for i, row in enumerate(rows)
        ]
        with self._tokenizing:
            return one_likelihood([self._completion(*row) for row in rows])

    def _request(self, ids: Sequence[int], new: int, temperature: float = 1.0, top_p: float = 1.0) -> dict[str, Any]:
        """What every request has; a server takes what is not said from the model's generation config."""
        return {
            "model": self._name,
            "prompt": list(ids),
            "max_tokens": new,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,  # of the drawn token, and no other
            "return_token_ids": True,
        }

    def _completion(self, prompt_id: str, completion_id: int, row: _Row) -> Completion:
        ids, logprobs = row
        text = self._encode.tokenizer.decode(ids, skip_special_tokens=True)
        reason: FinishReason = "stop" if ids[-1] in self._ends else "length"
        return Completion(prompt_id, completion_id, text, ids, reason, min(math.fsum(logprobs), 0.0))

    def _answers(self, body: Body, reply: Any) -> list[_Row]:
        """Every answer to one prompt, in order; each ends where the policy's own rules have it end."""
        rows = read_choices(reply, body["n"])
        for ids, _ in rows:
            if any(token in self._ends for token in ids[:-1]) or len(ids) > body["max_tokens"]:
                raise ModelError("policy: the server goes on after an end-of-sequence token: it ignores stop_token_ids")
            if ids[-1] not in self._ends and len(ids) < body["max_tokens"]:
                raise ModelError(
                    f"policy: the server ended an answer after {len(ids)} of {body['max_tokens']} tokens, at token "
                    f"{ids[-1]}, which ends none: start it with `--generation-config vllm` and a larger --max-model-len"
                )
        return rows

    def _check_server(self) -> None:
        """Draw a few tokens, and have the server read them: it must say the same of them, and in the same words."""
        prompt = self._encode(_PROBE)
        new = min(_PROBE_TOKENS, (self._context or len(prompt) + _PROBE_TOKENS) - len(prompt) - 1)
        if new < 1:
            return
        drawing = {**self._request(prompt, new, top_p=_PROBE_NUCLEUS), "n": 1, "seed": 0, "ignore_eos": True}
        (((ids, drawn), text),) = self._remote.ask(_PATH, [drawing], _row_and_text)
        reading = {**self._request([*prompt, *ids], 1), "n": 1, "prompt_logprobs": 0}
        (read,) = self._remote.ask(_PATH, [reading], lambda _, reply: _read(reply, ids))
        if all(value > -1e-6 for value in drawn) and sum(read) < -1e-3:
            raise ModelError(
                "policy: the server gives the log-probabilities of what it samples from, after temperature and top-p: "
                "start it with `--logprobs-mode raw_logprobs`, vLLM's default"
            )
        if sum(abs(a - b) for a, b in zip(drawn, read, strict=True)) > _PROBE_TOLERANCE * len(ids):
            raise ModelError(
                f"policy: the server says {sum(drawn):.3f} of tokens as it draws them and {sum(read):.3f} as it reads "
                "them: its logprobs are no raw log-probabilities; start vLLM with `--logprobs-mode raw_logprobs`"
            )
        own = self._encode.tokenizer.decode(ids, skip_special_tokens=True)
        if _letters(text) != _letters(own):
            raise ModelError(
                f"policy: the server reads token ids as {text[:60]!r}, and the tokenizer of {self._config.model} as "
                f"{own[:60]!r}: it serves another model"
            )


def read_choices(reply: Any, n: int) -> list[_Row]:
    """Token ids and log-probabilities of every choice, in order.

    Raises:
        ModelError: the server leaves something out that is needed.
        UnfinishedError: an answer was not finished, as when the server is being stopped.
    """
    choices = _part(reply, "choices", list)
    by_index = {_part(choice, "index", int): choice for choice in choices}
    if len(choices) != n or sorted(by_index) != list(range(n)):
        raise ModelError(f"policy: the server gave {len(choices)} answers, numbered {sorted(by_index)}, and not {n}")
    return [_read_choice(by_index[i]) for i in range(n)]


def _read_choice(choice: Any) -> _Row:
    reason = choice.get("finish_reason")
    if reason not in {"stop", "length"}:
        raise UnfinishedError(f"an answer that ended with finish_reason {reason!r}")
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(isinstance(token, int) for token in ids):
        raise ModelError("policy: the server gives no token ids, which vLLM does for `return_token_ids`")
    values = _part(_part(choice, "logprobs", dict), "token_logprobs", list)
    if len(values) != len(ids):
        raise ModelError(f"policy: the server gave {len(values)} log-probabilities for {len(ids)} tokens")
    for value in values:
        if not isinstance(value, float | int) or not _NO_LOGPROB < value <= 1e-4:
            raise ModelError(
                f"policy: the server gave {value!r} as a log-probability: start vLLM with `--logprobs-mode "
                "raw_logprobs`, its default, and see whether the model's weights are sound"
            )
    return tuple(ids), [float(value) for value in values]


def _row_and_text(body: Body, reply: Any) -> tuple[_Row, str]:
    (row,) = read_choices(reply, body["n"])
    return row, str(reply["choices"][0].get("text", ""))


def _read(reply: Any, ids: Sequence[int]) -> list[float]:
    """The log-probabilities of the last tokens of a prompt."""
    (choice,) = _part(reply, "choices", list)[:1] or [{}]
    given = choice.get("prompt_logprobs") or reply.get("prompt_logprobs")
    try:
        return [float(one[str(token)]["logprob"]) for token, one in zip(ids, given[-len(ids) :], strict=True)]
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(
            "policy: the server gives no `prompt_logprobs`, as vLLM does: whether its log-probabilities are raw cannot "
            "be told"
        ) from error


def _part(holder: Any, name: str, kind: type[Any]) -> Any:
    found = holder.get(name) if isinstance(holder, dict) else None
    if not isinstance(found, kind):
        raise ModelError(f"policy: the server's reply has no {name}: it must be an OpenAI-compatible one, as vLLM is")
    return found


def _seed(seed: int, prompt_id: str) -> int:
    """Of a prompt's request; vLLM adds completion_id to it, so that there must be room in 63 bits."""
    digest = hashlib.blake2b(f"{seed}\0{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def _letters(text: str) -> str:
    """Without spaces, and without a character that its last token may have left half."""
    return "".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())
