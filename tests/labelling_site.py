"""A real labelling server with a store of chosen questions, and a real browser to open it in.

    with serving(tmp_path / "labels.db", questions) as site, chromium() as browser, visiting(browser, site) as visit:
        visit.page.keyboard.press("1")

`serving` runs the server in a thread, which starts at once; `ServerProcess` in a process of its own, to be killed.
"""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import uvicorn
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from dissonance.feedback.store import Store
from dissonance.feedback.web.app import create_app
from dissonance.feedback.web.settings import LabelSettings
from dissonance.records import Message, QueryKind, Question
from web_clients import given

_PATIENCE = 60_000  # milliseconds: a wait ends as soon as the thing happens, and machines can be very busy
expect.set_options(timeout=_PATIENCE)

RUN_ID = "a run"
PLENTY = LabelSettings(gold_every=0)


def make_question(
    number: int,
    kind: QueryKind = "pairwise",
    *,
    texts: Sequence[str] | None = None,
    messages: Sequence[Message] | None = None,
    prompt_id: str | None = None,
    completion_ids: Sequence[int] | None = None,
) -> Question:
    """A question with as many completions as its kind asks about; the ids are not 0, 1, ..., so that a mix-up shows."""
    n = {"pairwise": 2, "rating": 1, "ranking": 4}[kind]
    texts = tuple(texts or (f"Answer {i} to question {number}." for i in range(n)))
    return Question(
        query_id=f"{kind}/{number}",
        prompt_id=prompt_id or f"p{number}",
        kind=kind,
        messages=tuple(messages or (Message("user", f"What is {number}?"),)),
        completion_ids=tuple(completion_ids or range(7, 7 - len(texts), -1)),
        completions=texts,
    )


@dataclass(frozen=True)
class Site:
    """A server that runs."""

    url: str
    store: Store


class _Server(uvicorn.Server):
    """Says when it is ready to answer."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


def _server(store: Store, settings: LabelSettings) -> _Server:
    config = uvicorn.Config(create_app(store, settings), log_level="critical", timeout_graceful_shutdown=1)
    return _Server(config)


def _listening(port: int = 0) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@contextmanager
def serving(
    path: Path,
    questions: Sequence[Question],
    settings: LabelSettings = PLENTY,
    *,
    overlap: int = 1,
    now: Callable[[], float] = time.time,
) -> Iterator[Site]:
    """A server in a thread, over a SQLite store that asks `questions` in their order."""
    with Store.open(path, RUN_ID, now) as store, _listening() as listener:
        store.add_questions(questions, overlap=overlap)
        server = _server(store, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            assert server.ready.wait(30), "the server does not start"
            yield Site(f"http://127.0.0.1:{listener.getsockname()[1]}", store)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the server does not stop"


@dataclass
class ServerProcess:
    """A server in a process of its own, on one port for good; to be killed and started again."""

    path: Path
    settings: LabelSettings = PLENTY
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def __post_init__(self) -> None:
        if not self.port:
            with _listening() as listener:
                self.port = listener.getsockname()[1]

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, __file__, str(self.path), str(self.port), json.dumps(asdict(self.settings))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n", "the server does not start"

    def kill(self) -> None:
        """End it as a crash would, in the middle of whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve_forever(path: str, port: str, settings: str) -> None:
    with Store.open(Path(path), RUN_ID) as store, _listening(int(port)) as listener:
        server = _server(store, LabelSettings(**json.loads(settings)))
        threading.Thread(target=lambda: server.ready.wait() and print("ready", flush=True), daemon=True).start()
        server.run(sockets=[listener])


# -- the browser -------------------------------------------------------------------------------------------------------


_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
_FLAGS += ["--disable-sync", "--no-first-run"]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A real browser: one that is installed, else Playwright's own; an error, never a skip, where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


# Runs before any script of the page, in every frame.
_WATCH = """
document.addEventListener("securitypolicyviolation", (e) =>
  console.error(`CSP: ${e.effectiveDirective} ${e.blockedURI} ${e.sourceFile}`));
"""


@dataclass
class Visit:
    """A browser's visit of a site, and all that it complained about."""

    context: BrowserContext
    page: Page
    site: Site | ServerProcess
    complaints: list[str] = field(default_factory=list)
    excused: tuple[str, ...] = ()
    """Parts of complaints that a test provokes: those of a browser without a server."""

    def watch(self, page: Page) -> None:
        """Note what goes wrong on a page."""
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.complaints.append(f"{message.type}: {message.text}")

    def open(self, path: str = "/") -> Page:
        """Go to a page of the site."""
        self.page.goto(self.site.url + path)
        return self.page

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the page's requests bring about here."""
        end = time.monotonic() + _PATIENCE / 1000
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            self.page.wait_for_timeout(20)

    def question(self, query_id: str | None = None) -> None:
        """Wait until a question takes answers; that of `query_id`, where it is given."""
        seen: list[str] = []
        while True:
            seen.append(self._handle(seen, "null"))
            if query_id in {None, self._given(seen[-1])[0]}:
                return

    def next_question(self, before: str) -> str:
        """Wait for another question than `before`, or for the end; the id of the question."""
        seen: list[str] = []
        while True:
            seen.append(self._handle(seen, "document.querySelector('#done') && 'done'"))
            query_id = "" if seen[-1] == "done" else self._given(seen[-1])[0]
            if query_id != before:
                return query_id

    def _handle(self, seen: list[str], otherwise: str) -> str:
        """What the page calls the question that takes answers, once it is one that was not seen."""
        look = f"""(seen) => {{
          const handle = document.querySelector("#question[data-state=ready] [name=question]")?.value ?? ({otherwise});
          return seen.includes(handle) ? null : handle;
        }}"""
        found: str = self.page.wait_for_function(look, arg=seen).json_value()
        return found

    def _given(self, handle: str) -> tuple[str, tuple[int, ...]]:
        if isinstance(self.site, Site):
            return given(self.site.store, handle)
        with Store.open(self.site.path, RUN_ID) as store:
            return given(store, handle)

    def wait(self, selector: str) -> None:
        """Wait for an element, frame by frame: `wait_for_selector` looks twice a second only, after its first tries."""
        self.page.wait_for_function("(selector) => document.querySelector(selector) !== null", arg=selector)

    def handle(self) -> str:
        """What the page calls its question; empty where there is none."""
        return self.page.evaluate("document.querySelector('#question [name=question]')?.value ?? ''")

    def query_id(self) -> str:
        """The question on the page; empty where there is none."""
        handle = self.handle()
        return self._given(handle)[0] if handle else ""

    def shown(self) -> list[int]:
        """The completion_ids on the page, from left to right."""
        return list(self._given(self.handle())[1])

    def check(self) -> None:
        """Fail where anything went wrong that was not meant to."""
        left = [c for c in self.complaints if not any(part in c for part in self.excused)]
        assert left == [], left


@contextmanager
def visiting(
    browser: Browser, site: Site | ServerProcess, *, excused: tuple[str, ...] = (), **context: Any
) -> Iterator[Visit]:
    """A fresh browser profile on the labelling page; complaints of the browser fail the test at the end."""
    opened = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | context))
    opened.set_default_timeout(_PATIENCE)
    opened.add_init_script(_WATCH)
    try:
        visit = Visit(opened, opened.new_page(), site, excused=excused)
        visit.watch(visit.page)
        # A page that is open when its first route is set may send a request past it: so one from the start.
        visit.page.route("**/nothing-asks-for-this", lambda route: route.continue_())
        visit.open()
        yield visit
        visit.check()
    finally:
        opened.close()


if __name__ == "__main__":
    _serve_forever(*sys.argv[1:])
