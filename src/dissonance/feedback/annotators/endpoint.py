"""One chat completion from an OpenAI-compatible endpoint; says of every failure whether it can have cost anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletion

from dissonance.addresses import checked_address, key_of
from dissonance.errors import ModelError, SettingsError
from dissonance.feedback.annotators.budget import Usage
from dissonance.feedback.annotators.texts import storable
from dissonance.remote import retry_after

_NOTHING_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
    httpx2.LocalProtocolError,
)
_OPTIONAL = ("response_format", "max_tokens", "temperature", "seed")
_LARGEST_COUNT = 2**31 - 1


class RefusedError(Exception):
    """The endpoint turned the request down (4xx), after all retries; nothing was paid."""


class LostReplyError(openai.OpenAIError):
    """A request went out and no whole reply came back, or the server failed at it; it may have been paid for."""

    def __init__(self, message: str, pause: float | None = 0.0) -> None:
        super().__init__(message)
        self.pause = pause
        """Seconds to wait before the next request; None where the server did not say, and needs a while."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the endpoint answered."""

    text: str
    """Storable; empty where the model said nothing or the endpoint did not keep to the protocol."""
    usage: Usage | None
    """None where the endpoint did not say, or nothing that can be."""


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Where a model is and how it is asked."""

    model: str
    """As the endpoint calls it."""
    base_url: str
    """Up to and with /v1."""
    api_key_env: str | None = None
    """The environment variable that holds the key; None for servers that need none. The key itself is kept nowhere."""
    timeout: float = 120.0
    """Seconds to wait for a reply."""
    retries: int = 5
    """How often a request that was refused (429) or found no server is sent again, for free, waiting longer each
    time. One that the server failed at (5xx) is not: it may have been paid for, and counts as a call."""
    max_tokens: int = 512
    """Of a reply."""
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            checked_address(self.base_url)
        except ValueError as error:
            raise SettingsError(f"base_url {error}") from error
        if not self.model:
            raise SettingsError("the judge's model is empty: name it as the endpoint does")
        limits = {"timeout": 1e-3, "retries": 0, "max_tokens": 1, "temperature": 0}
        for name, least in limits.items():
            if not least <= getattr(self, name) < float("inf"):
                raise SettingsError(f"{name} is {getattr(self, name)}: use at least {least:g}")


class Endpoint:
    """Sends chats; safe to use from many threads.

    What a failure costs:

    - no connection, and 4xx but 408: nothing. No connection, 409 and 429 are sent again up to `retries` times.
    - 5xx, 408, a time-out, a reply that breaks off: perhaps everything, for a gateway may give up on a model that goes
      on writing. It is a `LostReplyError` at once: whoever asked counts it with its worst case, and may ask again.

    Options that an endpoint refuses by name are left out from then on.

    Raises:
        SettingsError: the key's variable is not set.
    """

    def __init__(self, settings: EndpointSettings, connections: int) -> None:
        key = key_of(settings.api_key_env) or "EMPTY"
        self.settings = settings
        self._left_out: frozenset[str] = frozenset()
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = openai.OpenAI(
            api_key=key,
            base_url=settings.base_url,
            max_retries=settings.retries,
            http_client=_Client(timeout=settings.timeout, limits=limits),
        )

    def close(self) -> None:
        """Close every connection."""
        self._client.close()

    def ask(self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any]) -> Reply:
        """Send a chat, and again while the endpoint refuses it without cost.

        Raises:
            RefusedError: it was refused every time; free.
            LostReplyError: no reply came, or a server error; not known to be free.
            ModelError: there is no such server or model, or the key is wrong.
        """
        left_out = self._left_out
        while True:
            try:
                completion = self._create(messages, schema, left_out)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                offending = _offending(str(error), left_out)
                if offending is None:
                    raise RefusedError(_said(error)) from error
                left_out |= {offending}
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                what = f"{self.settings.base_url} refuses model {self.settings.model!r}"
                raise ModelError(f"judge: {what}: {_said(error)}: check the address, the model and the key") from error
            except openai.APIStatusError as error:
                raise RefusedError(_said(error)) from error
            except openai.APIConnectionError as error:
                raise ModelError(
                    f"judge: no connection to {self.settings.base_url} ({error.__cause__ or error}): is the server"
                    " running? What was answered is stored; run again to go on"
                ) from error
            else:
                self._left_out |= left_out
                return _reply(completion)

    def _create(
        self, messages: Sequence[Mapping[str, str]], schema: Mapping[str, Any], left_out: frozenset[str]
    ) -> Any:
        settings = self.settings
        options: dict[str, Any] = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema, "strict": True},
            },
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
        }
        if "max_tokens" in left_out:  # its newer name
            options["max_completion_tokens"] = settings.max_tokens
        wanted = {name: value for name, value in options.items() if name not in left_out}
        chat: list[Any] = list(messages)
        try:
            return self._client.chat.completions.create(model=settings.model, messages=chat, **wanted)
        except ValueError:  # a body that is no JSON, though the status said 200
            return None


class _Client(httpx2.Client):
    """Tells the OpenAI client, which would send again whatever failed, of requests that may have been paid for."""

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            response = super().send(request, **options)
        except _NOTHING_SENT:
            raise
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise LostReplyError(f"{type(error).__name__}: {error}") from error
        if response.status_code == httpx2.codes.REQUEST_TIMEOUT or response.is_server_error:
            raise LostReplyError(_one_line(f"{response.status_code} {response.text}"), retry_after(response.headers))
        return response


def worst_case(messages: Sequence[Mapping[str, str]], schema_text: str, max_tokens: int) -> Usage:
    """The most tokens a call can take: a token is at least one byte of text.

    Chat templates add a few around each message, and some begin with a few sentences of their own.
    """
    text = sum(len(message["content"].encode()) + 64 for message in messages)
    return Usage(text + len(schema_text.encode()) + 512, max_tokens)


def _offending(said: str, left_out: frozenset[str]) -> str | None:
    """Which of our options a refusal is about; where it names none, the rarest, once."""
    if "context" in said:  # too long a prompt; the message speaks of max_tokens too
        return None
    named = [name for name in _OPTIONAL if name in said and name not in left_out]
    return named[0] if named else "response_format" if "response_format" not in left_out else None


def _reply(completion: object) -> Reply:
    if not isinstance(completion, ChatCompletion):
        return Reply(storable(completion) if isinstance(completion, str) else "", None)
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):  # the client builds the object from whatever came
        text = None
    return Reply(storable(text) if isinstance(text, str) else "", _usage(completion))


def _usage(completion: ChatCompletion) -> Usage | None:
    counts = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= _LARGEST_COUNT for n in counts):
        return None
    prompt, completed = counts
    return Usage(prompt or 0, completed or 0)


def _said(error: openai.APIStatusError) -> str:
    return _one_line(str(error))


def _one_line(text: str) -> str:
    return storable(" ".join(text[:3000].split())[:300])
