"""Clients of a labelling server that runs in this process, on a real store."""

from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from sqlalchemy import select
from starlette.testclient import TestClient

from dissonance.feedback import schema
from dissonance.feedback.access import invite
from dissonance.feedback.store import Store
from dissonance.feedback.web.app import create_app
from dissonance.feedback.web.settings import LabelSettings
from dissonance.records import Message, QueryKind, Question

URL = "http://127.0.0.1:8000"
LOGIN = LabelSettings(login_required=True, gold_every=0)


def ask(name: str, kind: QueryKind = "pairwise", texts: tuple[str, ...] | None = None, prompt: str = "Hi") -> Question:
    """A question whose completion_ids are not 0, 1, ..., so that a mix-up shows."""
    texts = texts or tuple(f"text {i} of {name}" for i in range({"pairwise": 2, "rating": 1, "ranking": 4}[kind]))
    ids = tuple(range(6, 6 - len(texts), -1))
    return Question(name, f"prompt of {name}", kind, (Message("user", prompt),), ids, texts, category="a category")


@contextmanager
def store_of(folder: Path, *questions: Question, **options: Any) -> Iterator[Store]:
    """A store with these questions, for two annotators each."""
    with Store.open(folder / "labels.db", "a run", **options) as store:
        store.add_questions(questions or [ask("q1"), ask("q2")], overlap=2)
        yield store


def client_of(
    store: Store, settings: LabelSettings | None = None, token: str | None = None, address: str = "127.0.0.1"
) -> TestClient:
    """A client without a session; with `token`, one that sends it with every request."""
    app = create_app(store, settings or LabelSettings(gold_every=0))
    client = TestClient(app, base_url=URL, follow_redirects=False, client=(address, 50000))
    if token is not None:
        client.headers["Authorization"] = f"Bearer {token}"
    return client


def signed_in(store: Store, name: str, role: Any = "annotator", settings: LabelSettings = LOGIN) -> TestClient:
    """A client with a session of its own."""
    client = client_of(store, settings)
    assert client.post("/join", data={"token": invite(store, name, role)}).status_code == 303
    return client


class _Fields(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "input" and given.get("type") == "hidden":
            self.values[str(given["name"])] = given.get("value") or ""


def fields(html: str) -> dict[str, str]:
    """The hidden fields of the page's form: csrf, key, question."""
    parser = _Fields()
    parser.feed(html)
    return {name: parser.values[name] for name in ("csrf", "key", "question")}


def given(store: Store, handle: str) -> tuple[str, tuple[int, ...]]:
    """What a page calls by this handle: the query_id, and the completion_ids from left to right."""
    if handle.startswith("query:"):
        return handle.removeprefix("query:"), ()
    table, column, value = schema.leases, schema.leases.c.lease_id, handle
    if handle.startswith("label:"):
        table, column, value = schema.labels, schema.labels.c.label_id, int(handle.removeprefix("label:"))  # type: ignore[assignment]
    with store.reading() as connection:
        row = connection.execute(select(table.c.query_id, table.c.shown).where(column == value)).one()
    return row.query_id, tuple(row.shown)
