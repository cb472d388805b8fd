"""Running the server until it is told to stop."""

import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from dissonance.errors import SettingsError
from dissonance.feedback.store import Store
from dissonance.feedback.web.app import create_app
from dissonance.feedback.web.security import is_loopback
from dissonance.feedback.web.settings import LabelSettings

_BACKLOG = 1024
_LAST_PORT = 65_535
_SWITCH_SECONDS = 0.0002


def serve(
    store: Store,
    settings: LabelSettings,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Serve a store until SIGINT or SIGTERM; answers in flight are finished first.

    Args:
        store: the questions, and where answers go; it stays open.
        settings: what the lead decided.
        host: the name or address to listen at.
        port: 0 for any that is free.
        ready: told the server's address once it takes requests.

    Raises:
        SettingsError: the address cannot be listened at, or is open to others without login.
    """
    if not 0 <= port <= _LAST_PORT:  # getaddrinfo would wrap it round
        raise SettingsError(f"port {port} is none: use 1 to {_LAST_PORT}, or 0 for any that is free")
    if not settings.login_required and not is_loopback(host):
        raise SettingsError(f"{host} can be reached from other machines: require a login (--login), or use 127.0.0.1")
    config = uvicorn.Config(
        create_app(store, settings),
        access_log=False,
        log_config=None,
        log_level=logging.WARNING,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=10,
        ws="none",
        lifespan="off",
    )
    with _listen(host, port) as listener:
        server = _Server(config, lambda: ready(_url(host, listener)))
        # What the libraries made on loading stays: walking over it in every full collection would hold up requests.
        gc.collect()
        gc.freeze()
        # A thread comes back from the database many times for an answer, and each time would wait for others this long.
        sys.setswitchinterval(_SWITCH_SECONDS)
        with _ended_by_signals(server):
            server.run([listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


@contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Take the signals that uvicorn, when it has ended, sends once more: the caller still has things to close."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"cannot listen at {host} port {port}: {reason}: use another --port or --host") from error


def _url(host: str, listener: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
