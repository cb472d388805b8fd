"""Many requests to one server at once: no more than it is to have, and each again until it is answered.

A request says everything about what it wants and changes nothing, so that sending it again can neither lose nor double
anything: a server that is restarted in the middle is waited for.
"""

import asyncio
import json
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx2

from dissonance.addresses import key_of
from dissonance.config import ModelConfig
from dissonance.errors import ModelError
from dissonance.sections import ServerConfig

_CONNECT_SECONDS = 10.0
_LISTING_SECONDS = 30.0
"""For what takes a server no work."""
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
_LONGEST_ASKED_PAUSE = 60.0
_MOST_FAILURES = 8
"""How often one request may fail by itself, with 5xx, a time-out or half an answer, while others are answered."""
_BUSY = {httpx2.codes.TOO_MANY_REQUESTS, httpx2.codes.SERVICE_UNAVAILABLE}
_AGAIN = {httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_EARLY, *_BUSY}
_log = logging.getLogger(__name__)

T = TypeVar("T")
Body = Mapping[str, Any]


class UnfinishedError(Exception):
    """A reply that is not the whole answer, as a server gives that is being stopped: it is asked again."""


class Remote:
    """A server, safe to ask from many threads; its connections close when it is in no reach any more.

    Args:
        config: where it is, and how patient to be.
        role: whose part it plays, for errors.

    Raises:
        SettingsError: the key's variable is not set.
    """

    def __init__(self, config: ServerConfig, role: str) -> None:
        self._config, self._role = config, role
        key = key_of(config.api_key_env)
        self._client = httpx2.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(config.timeout, connect=min(_CONNECT_SECONDS, config.timeout), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.requests),
        )
        self._slots = asyncio.Semaphore(config.requests)
        self._failing_since: float | None = None
        self._said = False
        self._answered = 0
        self._sent: dict[object, float] = {}
        """When each request was sent that waits for its reply."""
        self._calls: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_serve, args=(self._loop,), name=f"{role} server", daemon=True).start()
        self._end = weakref.finalize(self, _end, self._loop, self._client)

    def get(self, path: str) -> Any:
        """The JSON of one address; errors as `ask`."""
        return self._wait(self._answer("GET", path, None, lambda _, reply: reply))

    def ask(self, path: str, bodies: Sequence[Body], read: Callable[[Body, Any], T]) -> list[T]:
        """Send requests, `requests` of them at a time, each until it is answered.

        Args:
            path: after the server's root.
            bodies: one for each request.
            read: makes the result of a request and its reply's JSON; an `UnfinishedError` has it asked again.

        Raises:
            ModelError: the server refuses a request, or was out of reach for longer than `patience`.
        """
        return self._wait(self._all(path, bodies, read))

    def cancel(self) -> None:
        """End the calls of every thread with an error, and close their connections."""
        for call in list(self._calls):
            call.cancel()

    def close(self) -> None:
        """Close every connection."""
        self._end()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if not self._calls:  # what failed before these calls is no failure of theirs
            self._failing_since, self._said = None, False
        call = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._calls.add(call)
        try:
            return call.result()
        finally:  # Ctrl-C comes here too
            call.cancel()
            self._calls.discard(call)

    async def _all(self, path: str, bodies: Sequence[Body], read: Callable[[Body, Any], T]) -> list[T]:
        tasks = [asyncio.ensure_future(self._answer("POST", path, body, read)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, method: str, path: str, body: Body | None, read: Callable[[Body, Any], T]) -> T:
        failures = attempts = 0
        async with self._slots:
            answered = self._answered
            while True:
                attempts += 1
                pause, busy = None, False
                try:
                    response = await self._send(method, path, body)
                    if response.is_success:
                        answer = read(body or {}, _parsed(response))
                        self._failing_since, self._said = None, False
                        self._answered += 1
                        return answer
                    why, pause = _said(response), retry_after(response.headers)
                    self._refused_for_good(response, why)
                    busy = response.status_code in _BUSY
                    failures += not busy
                except UnfinishedError as error:
                    why = str(error)
                    failures += 1
                except (httpx2.TransportError, httpx2.DecodingError) as error:
                    why = f"{type(error).__name__}: {error}".removesuffix(": ")
                    failures += not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
                if failures >= _MOST_FAILURES and self._answered > answered:
                    raise ModelError(f"{self._name} failed {failures} times at one request, at last with: {why}")
                self._out_of_patience(why, busy=busy)
                await asyncio.sleep(_growing(attempts) if pause is None else max(pause, _SHORTEST_PAUSE))

    async def _send(self, method: str, path: str, body: Body | None) -> httpx2.Response:
        key = object()
        self._sent[key] = time.monotonic()
        try:
            timeout = self._client.timeout
            if method == "GET":
                timeout = httpx2.Timeout(min(_LISTING_SECONDS, self._config.timeout))
            return await self._client.request(method, self._config.url + path, json=body, timeout=timeout)
        finally:
            del self._sent[key]

    @property
    def _name(self) -> str:
        return f"{self._role}: the server {self._config.url}"

    def _refused_for_good(self, response: httpx2.Response, why: str) -> None:
        """Raise unless the same request may be answered later."""
        lasting = response.status_code == httpx2.codes.NOT_IMPLEMENTED or not response.is_server_error
        if response.status_code not in _AGAIN and lasting:
            raise ModelError(f"{self._name} refuses a request: {why}{_hint(response)}")

    def _out_of_patience(self, why: str, *, busy: bool) -> None:
        """Raise where nothing was answered for so long; the first time, say that it is waited for.

        A server that is too busy for more works at what it took before: as long as it does, it is waited for.
        """
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        patience = self._config.patience
        works = busy and min(self._sent.values(), default=now) <= self._failing_since
        if now - self._failing_since >= patience and not works:
            raise ModelError(
                f"{self._name} gave no answer for {patience:g} seconds ({why}): is it running, and is this its address?"
                + (" What was done is stored; the same command goes on" if self._answered else "")
            )
        if not self._said:
            self._said = True
            _log.warning("%s gives no answer (%s): waiting for up to %g seconds", self._name, why, patience)


def served_as(remote: Remote, config: ModelConfig, role: str, adapter: str | None) -> tuple[str, int | None]:
    """What an OpenAI-compatible server calls the model, and the most tokens that it takes, where it says.

    With an adapter it has another name there than its base, which the server may have too.

    Raises:
        ModelError: it has no such model, or several and none of that name, or one with an adapter is not named.
    """
    server, listed = config.server, remote.get("/v1/models")
    try:
        models = {str(one["id"]): one.get("max_model_len") for one in listed["data"]}
    except (TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{role}: the server lists no models: is it OpenAI-compatible?") from error
    given = None if server is None else server.served_name
    if adapter is not None and given is None:
        raise ModelError(
            f"{role}: {adapter} is an adapter: say as server.served_name what the server calls the model with it"
        )
    name = given or (next(iter(models)) if len(models) == 1 else config.model)
    if name not in models:
        there = ", ".join(models) or "none"
        raise ModelError(
            f"{role}: the server has no model {name!r}: set server.served_name to one of its own ({there})"
        )
    return name, models[name]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient) -> None:
    """Close the client in its own loop, then the loop; waits for neither, since any thread may come here."""

    async def closing() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await client.aclose()
        loop.stop()

    loop.call_soon_threadsafe(lambda: asyncio.ensure_future(closing()))


def _growing(attempts: int) -> float:
    """Twice as long each time, each request a little off the others."""
    return min(_SHORTEST_PAUSE * 2.0 ** (attempts - 1), _LONGEST_PAUSE) * random.uniform(0.8, 1.2)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """What Retry-After says, in seconds, a minute at most; None where it says nothing, or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        said = headers.get(name, "").strip()
        if said.replace(".", "", 1).isdecimal():
            return min(float(said) * unit, _LONGEST_ASKED_PAUSE)
    return None


def _parsed(response: httpx2.Response) -> Any:
    try:
        return response.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnfinishedError(f"a reply that is no JSON: {_one_line(response.text)}") from error


def _hint(response: httpx2.Response) -> str:
    """What a wrong address may be."""
    if response.status_code != httpx2.codes.NOT_FOUND:
        return ""
    return (
        f": there is no {response.request.url.path}: is this the root of a server of vLLM's protocol? (The address of "
        "one that speaks OpenRLHF's ends in /get_reward)"
    )


def _said(response: httpx2.Response) -> str:
    """The status and the message of a refusal."""
    try:
        body = response.json()
        said = body.get("error", body.get("detail", body))
        text = said["message"] if isinstance(said, dict) and "message" in said else str(said)
    except (ValueError, AttributeError):
        text = "" if response.text.lstrip().startswith("<") else response.text  # a page for people
    return _one_line(f"{response.status_code} {text or response.reason_phrase}")


def _one_line(text: str) -> str:
    return " ".join(str(text)[:3000].split())[:300]
