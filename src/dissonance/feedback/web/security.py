"""What stands before every request, and on every reply: whose pages may call, how much, how often, and what is logged.

Without login, whoever reaches the server is the lead; then a page from elsewhere, open in the same browser, must not
reach it: neither by posting here (Sec-Fetch-Site and Origin tell) nor under a name of its own that it lets point to
this machine (Host tells).
"""

import ipaddress
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES = 256 * 1024
SIGN_IN_FAILURES = 10
"""How many wrong tokens one address may send in a minute; right ones always work, since many may share an address."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Other sites learn nothing. With no-referrer, browsers also call the origin of our own forms "null", and a form of
    # ours could not be told from theirs.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
_log = logging.getLogger(__name__)

ErrorReply = Callable[[Request, int, str], Response]
"""(request, status, message of one line) -> the reply in the form that the asker can read."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not let in."""

    status: int
    message: str


class Guard:
    """ASGI middleware around the whole site."""

    def __init__(self, app: ASGIApp, *, loopback_only: bool, reply: ErrorReply) -> None:
        self.app = app
        self.loopback_only = loopback_only
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._answer(scope, receive, send_guarded)
        except ClientDisconnect:
            pass
        except Exception:
            _log.exception("%s %s failed", scope["method"], _page(scope))
            if status == 0:
                message = "something went wrong in the server; what it has acknowledged is safe"
                await self.reply(Request(scope), 500, message)(scope, receive, send_guarded)
        milliseconds = 1000 * (time.perf_counter() - began)
        _log.info("%s %s %s %.0f ms", scope["method"], _page(scope), status or "-", milliseconds)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        refusal = _refuse_host(headers, self.loopback_only) or _refuse_origin(scope["method"], headers)
        if refusal is None and scope["method"] not in SAFE_METHODS:
            body = await _read(headers, receive)
            if body is None:
                refusal = Refusal(413, f"the request is larger than {BODY_BYTES // 1024} KiB: send less")
            else:
                receive = _replay(body, receive)
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await self.reply(Request(scope), refusal.status, refusal.message)(scope, receive, send)


def _page(scope: Scope) -> str:
    """Where a request went, as the server calls it: the address itself is the sender's words, and may hold anything."""
    if route := getattr(scope.get("route"), "path", None):
        return str(route)
    return "/static" if scope["path"].startswith("/static/") else "(no such page)"


async def _read(headers: Headers, receive: Receive) -> bytes | None:
    """Read the whole body; None where it is larger than the server takes, whether or not it said so."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length[:12]) > BODY_BYTES:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect  # half an answer is none
        part = message.get("body", b"")
        size += len(part)
        if size > BODY_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means this machine alone."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_host(headers: Headers, loopback_only: bool) -> Refusal | None:
    address = _address("http", headers.get("host", ""))
    if address is None:
        return Refusal(400, "the request names no host")
    if not loopback_only or is_loopback(address[0]):
        return None
    return Refusal(403, "this server answers to localhost and 127.0.0.1 only: open it under one of these")


def _refuse_origin(method: str, headers: Headers) -> Refusal | None:
    site = headers.get("sec-fetch-site")
    if site in {"same-origin", "none"}:
        return None
    if method in SAFE_METHODS:
        # A link from elsewhere may lead here; nothing else of another site may load from here.
        followed_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        foreign = site is not None and not followed_link
    else:
        origin = headers.get("origin")
        foreign = site is not None or (origin is not None and not _same_origin(origin, headers.get("host", "")))
    return Refusal(403, "this request comes from another site's page: open this server's own page") if foreign else None


def _same_origin(origin: str, host: str) -> bool:
    scheme, _, rest = origin.partition("://")
    address = _address(scheme, rest)
    return address is not None and address == _address(scheme, host)


def _address(scheme: str, host: str) -> tuple[str, int] | None:
    """Host and port of `host[:port]`; None where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or parts.netloc != host or "@" in host:
        return None
    return parts.hostname, port if port is not None else {"https": 443}.get(scheme, 80)


class SignInLimit:
    """Counts wrong tokens by the address they came from."""

    def __init__(self, per_minute: int = SIGN_IN_FAILURES) -> None:
        self._allowed = RateLimitItemPerMinute(per_minute)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def wait(self, request: Request) -> int:
        """For how many seconds a wrong token of this client is one too many; 0 where it is not."""
        who = _client(request)
        if self._limiter.test(self._allowed, who):
            return 0
        reset_time = self._limiter.get_window_stats(self._allowed, who).reset_time
        return max(1, math.ceil(reset_time - time.time()))

    def failed(self, request: Request) -> None:
        """Note a wrong token."""
        self._limiter.hit(self._allowed, _client(request))


def _client(request: Request) -> str:
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    # One machine has a whole /64 of IPv6 addresses to come from.
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host
