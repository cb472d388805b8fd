"""Who gets in, with what, for how long; what is refused; what is never written down."""

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts
from sqlalchemy import select
from starlette.testclient import TestClient

from dissonance.errors import DataError
from dissonance.feedback.access import (
    end_session,
    invite,
    issue_token,
    person_of_session,
    person_of_token,
    revoke_tokens,
    sign_in,
)
from dissonance.feedback.schema import events
from dissonance.feedback.store import Store
from dissonance.feedback.web.security import BODY_BYTES, SIGN_IN_FAILURES
from dissonance.feedback.web.settings import LabelSettings
from web_clients import LOGIN, URL, ask, client_of, fields, given, signed_in, store_of

DAY = 24 * 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    with store_of(tmp_path, now=clock) as opened:
        yield opened


# -- tokens and sessions -----------------------------------------------------------------------------------------------


def test_a_token_opens_a_session_for_its_person(store: Store) -> None:
    token = invite(store, "ann", "lead")
    secret = sign_in(store, token)
    assert secret is not None
    for person in (person_of_token(store, token), person_of_session(store, secret)):
        assert person is not None
        assert (person.name, person.role, person.kind) == ("ann", "lead", "person")
    assert person_of_token(store, secret) is None
    assert person_of_session(store, token) is None


def test_secrets_are_long_and_never_the_same(store: Store) -> None:
    tokens = {invite(store, "ann") for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) >= 43 for token in tokens)  # 256 bits in base64


def test_a_token_ends_with_its_days(store: Store, clock: Clock) -> None:
    token = invite(store, "ann", days=2)
    secret = sign_in(store, token, seconds=10 * DAY)
    assert secret is not None
    clock.now += 2 * DAY - 1
    assert person_of_session(store, secret)
    clock.now += 1
    assert person_of_token(store, token) is None
    assert person_of_session(store, secret) is None
    assert sign_in(store, token) is None


def test_a_session_ends_with_its_time_or_by_leaving(store: Store, clock: Clock) -> None:
    token = invite(store, "ann")
    first, second = sign_in(store, token, seconds=60), sign_in(store, token, seconds=120)
    assert first is not None
    assert second is not None
    clock.now += 60
    assert person_of_session(store, first) is None
    assert person_of_session(store, second)
    end_session(store, second)
    assert person_of_session(store, second) is None
    assert person_of_token(store, token)


def test_revoking_ends_every_token_and_session_of_that_person_alone(store: Store) -> None:
    mine, another, theirs = invite(store, "ann"), invite(store, "ann"), invite(store, "bob")
    secret = sign_in(store, mine)
    assert secret is not None
    assert revoke_tokens(store, "ann") == 2
    assert person_of_token(store, mine) is None
    assert person_of_token(store, another) is None
    assert person_of_session(store, secret) is None
    assert sign_in(store, mine) is None
    assert person_of_token(store, theirs)
    assert revoke_tokens(store, "ann") == 0
    assert person_of_token(store, invite(store, "ann"))


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_a_link_good_for_no_time_is_refused(store: Store, days: float) -> None:
    with pytest.raises(DataError, match="cannot be good for"):
        invite(store, "ann", days=days)


def test_tokens_are_for_people_who_are_there(store: Store) -> None:
    with pytest.raises(DataError, match="no annotator 99"):
        issue_token(store, 99)
    with pytest.raises(DataError, match="no annotator 'nobody'"):
        revoke_tokens(store, "nobody")
    invite(store, "ann")
    with pytest.raises(DataError, match="'ann' is there already, with the role annotator"):
        invite(store, "ann", "lead")
    store.annotator("gpt", "judge")
    with pytest.raises(DataError, match="is a judge"):
        invite(store, "gpt")


def test_the_audit_trail_tells_who_came_and_who_was_refused(store: Store) -> None:
    token = invite(store, "ann")
    secret = sign_in(store, token)
    assert secret is not None
    end_session(store, secret)
    revoke_tokens(store, "ann")
    sign_in(store, token)
    sign_in(store, "made up")
    with store.reading() as connection:
        rows = connection.execute(select(events).order_by(events.c.event_id)).all()
    trail = [(row.action, row.annotator_id, row.details) for row in rows][-6:]
    ann = store.annotator("ann").annotator_id
    assert trail == [
        ("invited", ann, {"expires_at": None}),
        ("signed in", ann, {}),
        ("signed out", ann, {}),
        ("revoked", ann, {"tokens": 1}),
        ("refused", ann, {"token": "revoked"}),
        ("refused", None, {"token": "unknown"}),
    ]


def test_secrets_are_in_no_file_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with store_of(tmp_path) as store:
        token, wrong = invite(store, "ann"), "W" * 43
        client = client_of(store, LOGIN)
        client.post("/join", data={"token": wrong})
        client.post("/join", data={"token": token})
        secret = client.cookies["dissonance"]
        page = client.get("/", params={"token": token}).text
        client.get(f"/{token}")
        client.get("/api/question", headers={"Authorization": f"Bearer {wrong}"})
        client.post("/answers", data=fields(page) | {"choice": "left", "note": "a note between us"})
        client.post("/leave", data={"csrf": fields(page)["csrf"]})
        # The WAL file is there as long as the store is open.
        written = b"".join(path.read_bytes() for path in tmp_path.glob("labels.db*"))
    logged = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    assert "POST /join 303" in logged
    assert b"a note between us" in written
    for hidden in (token, secret, wrong, fields(page)["csrf"]):
        assert hidden not in logged
        assert hidden.encode() not in written
    assert "a note between us" not in logged
    assert token not in page


# -- the doors ---------------------------------------------------------------------------------------------------------

PUBLIC = {("GET", "/healthz"), ("GET", "/join"), ("POST", "/join")}
FOR_ANNOTATORS = {
    ("GET", "/"),
    ("GET", "/question"),
    ("GET", "/question/previous"),
    ("GET", "/question/differences"),
    ("POST", "/answers"),
    ("POST", "/leave"),
    ("GET", "/api/question"),
    ("POST", "/api/answers"),
    ("GET", "/api/progress"),
    ("GET", "/api/openapi.json"),
}


def doors(client: TestClient) -> list[tuple[str, str]]:
    """Every method and path of the app but the static files."""
    found = [
        (method, context.path)
        for context in iter_route_contexts(client.app.routes)
        for method in (context.methods or ())
        if method != "HEAD"
    ]
    assert set(found) >= PUBLIC | FOR_ANNOTATORS
    return sorted(set(found))


def knock(client: TestClient, method: str, path: str) -> int:
    address = path.replace("{query_id:path}", "q1").replace("{name:path}", "bob")
    assert "{" not in address
    return client.request(method, address).status_code


def assert_shut(client: TestClient, method: str, path: str) -> None:
    address = path.replace("{query_id:path}", "q1").replace("{name:path}", "bob")
    response = client.request(method, address)
    if path.startswith("/api/"):
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
    else:
        assert response.status_code in {303, 401}, (method, path, response.text)
        assert response.status_code == 401 or response.headers["Location"] == "/join"


def test_an_annotator_opens_no_lead_page(store: Store) -> None:
    session = signed_in(store, "ann")
    invite(store, "bob")
    token = client_of(store, LOGIN, invite(store, "ann"))
    lead = client_of(store, LOGIN, invite(store, "lea", "lead"))
    csrf = fields(session.get("/").text)["csrf"]
    session.headers["X-CSRF-Token"] = csrf
    shut = set()
    for method, path in doors(session):
        if (method, path) in PUBLIC | FOR_ANNOTATORS - {("POST", "/leave")}:
            assert knock(token, method, path) not in {403, 404, 405} or path == "/question/previous"
        elif (method, path) != ("POST", "/leave"):
            shut.add((method, path))
            for client in (session, token):
                assert knock(client, method, path) == 403, (method, path)
            assert knock(lead, method, path) not in {401, 403, 404, 405}, (method, path)
    assert len(shut) >= 8


def test_nobody_opens_nothing(store: Store) -> None:
    client = client_of(store, LOGIN)
    for method, path in doors(client):
        if (method, path) not in PUBLIC:
            assert_shut(client, method, path)
    part = client.get("/question", headers={"HX-Request": "true"})
    assert part.status_code == 401
    assert part.headers["HX-Redirect"] == "/join"
    assert "html" not in part.headers["Content-Type"]


def test_expired_and_revoked_tokens_and_sessions_open_nothing(store: Store, clock: Clock) -> None:
    short = LabelSettings(login_required=True, session_seconds=60)
    expired_session = signed_in(store, "lea", "lead", short)
    ended = signed_in(store, "len", "lead")
    ended.post("/leave", headers={"X-CSRF-Token": fields(ended.get("/").text)["csrf"]})
    revoked_session = signed_in(store, "liz", "lead")
    revoked = client_of(store, LOGIN, invite(store, "liz", "lead"))
    expired = client_of(store, LOGIN, invite(store, "lou", "lead", days=1 / DAY))
    assert revoked_session.get("/overview/live").status_code != 401
    revoke_tokens(store, "liz")
    clock.now += 60
    for client in (expired_session, ended, revoked_session):
        for method, path in doors(client):
            if (method, path) not in PUBLIC:
                assert_shut(client, method, path)
    for client in (revoked, expired):
        routes = [door for door in doors(client) if door not in PUBLIC]
        for method, path in routes[:SIGN_IN_FAILURES]:
            assert_shut(client, method, path)
        assert knock(client, *routes[SIGN_IN_FAILURES]) == 429


def test_without_login_everyone_is_the_lead(store: Store) -> None:
    client = client_of(store)
    assert client.get("/join").headers["Location"] == "/"
    assert client.post("/join", data={"token": "x"}).headers["Location"] == "/"
    assert client.get("/api/annotators").json() == [{"name": "local", "kind": "person", "role": "lead"}]
    assert client.get("/api/question", headers={"Authorization": "Bearer nonsense"}).status_code == 401
    client.headers["Authorization"] = f"Bearer {invite(store, 'ann')}"
    assert client.get("/api/annotators").status_code == 403


def test_an_annotator_answers_only_what_was_given_and_sees_no_answer_of_others(store: Store) -> None:
    lead, ann = signed_in(store, "lea", "lead"), signed_in(store, "ann")
    form = fields(lead.get("/").text)
    assert lead.post("/answers", data=form | {"choice": "left", "note": "the lead's own words"}).status_code == 200
    mine = fields(ann.get("/").text)
    assert given(store, mine["question"])[0] == "q1"
    (label,) = store.labels()
    # The lead's own question, though it is about the same query; the lead's answer; what only leads may name so.
    for handle in (
        form["question"],
        f"label:{label.label_id}",
        "query:q1",
        "query:q2",
        "q1",
        "q2",
        "label:",
        "label:x",
    ):
        refused = ann.post("/answers", data=mine | {"question": handle, "choice": "left"})
        nothing = ann.post("/answers", data=mine | {"question": "no such", "choice": "left"})
        assert (refused.status_code, refused.text) == (404, nothing.text.replace("no such", handle))
        assert ann.get("/question/differences", params={"question": handle}).status_code == 404
    assert ann.get("/question/differences", params={"question": mine["question"]}).status_code == 200
    assert {label.annotator for label in store.labels()} == {"lea"}
    for path in ("/", "/question", "/question/previous", "/api/question", "/api/progress"):
        assert "the lead's own words" not in ann.get(path).text
    assert ann.get("/question/previous?before=100").status_code == 404


# -- CSRF, other sites, other names ------------------------------------------------------------------------------------


def test_a_session_posts_with_its_own_csrf_token_only(store: Store) -> None:
    client, other = signed_in(store, "ann"), signed_in(store, "bob")
    form = fields(client.get("/").text) | {"choice": "left"}
    stolen = fields(other.get("/").text)["csrf"]
    assert stolen != form["csrf"]
    for wrong in ("", stolen, form["csrf"][:-1], "ä"):
        assert client.post("/answers", data=form | {"csrf": wrong}).status_code == 403
        assert client.post("/leave", data={"csrf": wrong}).status_code == 403
        assert client.post("/api/answers", json={}, headers={"X-CSRF-Token": wrong.encode()}).status_code == 403
    without = {name: value for name, value in form.items() if name != "csrf"}
    assert client.post("/answers", data=without).status_code == 403
    assert client.post("/answers", files={"csrf": ("f", b"x")}, data=without).status_code == 403
    assert store.labels() == []
    assert client.post("/answers", data=without, headers={"X-CSRF-Token": form["csrf"]}).status_code == 200
    assert client.post("/answers", data=form | {"key": "again"}).status_code == 200
    assert len(store.labels()) == 1
    assert client.post("/leave", data={"csrf": form["csrf"]}).headers["Location"] == "/join"


def test_a_token_needs_no_csrf_token(store: Store) -> None:
    client = client_of(store, LOGIN, invite(store, "ann"))
    form = fields(client.get("/").text)
    assert client.post("/answers", data=form | {"choice": "left"}).status_code == 200


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:9999"},
    {"Origin": "https://127.0.0.1:8000.evil.example"},
    {"Origin": "http://user@127.0.0.1:8000"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"Sec-Fetch-Site": "cross-site", "Origin": URL},
]
OWN = [{}, {"Origin": URL}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}]


@pytest.mark.parametrize("headers", FOREIGN)
def test_other_sites_cannot_post_here_even_without_login(store: Store, headers: dict[str, str]) -> None:
    client = client_of(store)
    form = fields(client.get("/").text) | {"choice": "left"}
    response = client.post("/answers", data=form, headers=headers)
    assert response.status_code == 403
    assert client.post("/api/annotators", json={"name": "eve"}, headers=headers).status_code == 403
    assert client.delete("/api/annotators/local/tokens", headers=headers).status_code == 403
    assert store.labels() == []
    assert [person.name for person in store.annotators()] == ["local"]


@pytest.mark.parametrize("headers", OWN)
def test_our_own_pages_and_scripts_can(store: Store, headers: dict[str, str]) -> None:
    client = client_of(store)
    form = fields(client.get("/", headers=headers).text) | {"choice": "left"}
    assert client.post("/answers", data=form, headers=headers).status_code == 200


def test_other_sites_may_link_here_but_load_nothing(store: Store) -> None:
    client = client_of(store)
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    for change in ({"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}):
        assert client.get("/question", headers=link | change).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1"])
def test_without_login_the_server_answers_to_no_other_name(store: Store, host: str) -> None:
    client = client_of(store)
    for path in ("/", "/api/question", "/static/app.js"):
        assert client.get(path, headers={"Host": host, "Sec-Fetch-Site": "same-origin"}).status_code == 403
    with_login = client_of(store, LOGIN)
    assert with_login.get("/join", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.9.1:80", "[::1]:8000", "[::1]"])
def test_this_machine_has_several_names(store: Store, host: str) -> None:
    client = client_of(store)
    form = fields(client.get("/", headers={"Host": host}).text) | {"choice": "left"}
    headers = {"Host": host, "Origin": f"http://{host.lower()}"}
    assert client.post("/answers", data=form, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["", "[", "a:b", "user@localhost", "localhost/x", "127.0.0.1:99999"])
def test_a_host_that_is_none_is_refused(store: Store, host: str) -> None:
    for settings in (LOGIN, LabelSettings()):
        assert client_of(store, settings).get("/join", headers={"Host": host}).status_code == 400


def test_cookies_are_for_this_server_alone(store: Store) -> None:
    token = invite(store, "ann")
    cookie = client_of(store, LOGIN).post("/join", data={"token": f"{URL}/join#{token}"}).headers["Set-Cookie"]
    parts = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/", f"max-age={12 * 3600}"} <= parts
    assert "secure" not in parts
    secure = LabelSettings(login_required=True, secure_cookies=True)
    cookie = client_of(store, secure).post("/join", data={"token": token}).headers["Set-Cookie"]
    assert cookie.startswith("__Host-")
    assert "secure" in {part.strip().lower() for part in cookie.split(";")}


def test_signing_in_again_ends_the_session_before(store: Store) -> None:
    client = signed_in(store, "ann")
    before = client.cookies["dissonance"]
    client.post("/join", data={"token": invite(store, "bob")})
    assert person_of_session(store, before) is None
    person = person_of_session(store, client.cookies["dissonance"])
    assert person is not None
    assert person.name == "bob"


# -- limits ------------------------------------------------------------------------------------------------------------


def test_wrong_tokens_are_few_from_one_address(store: Store) -> None:
    token = invite(store, "ann")
    client = client_of(store, LOGIN)
    for i in range(SIGN_IN_FAILURES):
        if i % 2:
            assert client.post("/join", data={"token": f"guess {i}"}).status_code == 401
        else:
            bearer = {"Authorization": f"Bearer guess{i}"}
            assert client.get("/api/progress", headers=bearer).status_code == 401
    with store.reading() as connection:
        refusals = len(connection.execute(select(events)).all())
    for _ in range(2):
        refused = client.post("/join", data={"token": "guess"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        bearer = {"Authorization": "Bearer guess"}
        assert client.get("/api/progress", headers=bearer).status_code == 429
    with store.reading() as connection:  # what is refused without a look is not written down without end
        assert len(connection.execute(select(events)).all()) == refusals
    # Others come from that address too, such as through a proxy: a right token works, and makes no room for wrong ones.
    assert client.get("/api/progress", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert client.post("/join", data={"token": f"{URL}/join#{token}"}).status_code == 303
    assert client.get("/api/progress").status_code == 200
    assert client.post("/join", data={"token": "guess"}).status_code == 429
    elsewhere = TestClient(client.app, base_url=URL, follow_redirects=False, client=("10.0.0.9", 50000))
    assert elsewhere.post("/join", data={"token": "guess"}).status_code == 401


def test_one_machine_has_many_addresses_of_ipv6(store: Store) -> None:
    app = client_of(store, LOGIN).app
    for i in range(SIGN_IN_FAILURES + 1):
        client = TestClient(app, base_url=URL, client=(f"2001:db8::{i}", 50000))
        last = client.post("/join", data={"token": "guess"}).status_code
    assert last == 429


def test_right_tokens_are_not_counted(store: Store) -> None:
    token = invite(store, "ann")
    client = client_of(store, LOGIN)
    assert {client.post("/join", data={"token": token}).status_code for _ in range(3 * SIGN_IN_FAILURES)} == {303}


def test_bodies_are_limited_whether_or_not_they_say_how_large_they_are(store: Store) -> None:
    client = client_of(store)
    form = fields(client.get("/").text)
    note = "x" * BODY_BYTES

    def chunks() -> Iterator[bytes]:
        yield b"choice=left&note="
        for _ in range(100):
            yield note.encode()

    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/answers", data=form | {"choice": "left", "note": note}).status_code == 413
    assert client.post("/answers", content=chunks(), headers=kind).status_code == 413
    api = client.post("/api/answers", json={"note": note})
    assert api.status_code == 413
    assert "256 KiB" in api.json()["detail"]
    assert client.post("/api/answers", content=b"{}", headers={"Content-Length": "9" * 5000}).status_code == 413
    assert store.labels() == []
    assert client.post("/answers", data=form | {"choice": "left", "note": "x" * 20_000}).status_code == 200


# -- what every reply carries ------------------------------------------------------------------------------------------


def test_every_reply_carries_the_security_headers(tmp_path: Path) -> None:
    def boom() -> None:
        raise RuntimeError("inner secret")

    with store_of(tmp_path, ask("q1"), busy_seconds=0.05) as store:
        client = client_of(store)
        client.app.add_api_route("/boom", boom)
        client.app.add_api_route("/api/boom", boom)
        form = fields(client.get("/").text) | {"choice": "left"}
        other = sqlite3.connect(tmp_path / "labels.db")
        other.execute("BEGIN IMMEDIATE")
        replies = {
            503: client.post("/answers", data=form),
            200: client.get("/api/progress"),
            303: client.get("/join"),
            401: client.get("/api/progress", headers={"Authorization": "Bearer x"}),
            403: client.get("/", headers={"Host": "evil.example"}),
            404: client.get("/nowhere"),
            405: client.put("/answers"),
            413: client.post("/answers", content=b"x" * (BODY_BYTES + 1)),
            422: client.post("/answers", data={}),
            500: client.get("/boom"),
        }
        other.close()
        statics = [client.get("/static/htmx.min.js"), client.get("/static/none.js"), client.get("/static/../app.py")]
        for status, reply in [*replies.items(), (500, client.get("/api/boom")), *[(0, reply) for reply in statics]]:
            assert status in {reply.status_code, 0}
            assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in reply.headers["Content-Security-Policy"]
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert reply.headers["Referrer-Policy"] in {"no-referrer", "same-origin"}
            assert reply.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert "server" not in reply.headers
            assert "Traceback" not in reply.text
            assert "inner secret" not in reply.text
            assert reply.headers["Cache-Control"] == ("no-cache" if reply is statics[0] else "no-store")
        assert [reply.status_code for reply in statics] == [200, 404, 404]


def test_a_locked_store_says_when_to_try_again_and_the_answer_is_stored_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with store_of(tmp_path, busy_seconds=0.05) as store:
        client = signed_in(store, "ann")
        form = fields(client.get("/").text) | {"choice": "left"}
        other = sqlite3.connect(tmp_path / "labels.db")
        other.execute("BEGIN IMMEDIATE")
        for path, reply in (
            ("/answers", client.post("/answers", data=form)),
            ("/answers", client.post("/answers", data=form, headers={"HX-Request": "true"})),
        ):
            assert reply.status_code == 503, path
            assert int(reply.headers["Retry-After"]) >= 1
            assert str(tmp_path) not in reply.text
        assert "locked" in caplog.text
        other.close()
        assert client.post("/answers", data=form).status_code == 200
        assert client.post("/answers", data=form).status_code == 200
        assert len(store.labels()) == 1
        local = client_of(store)
        form = fields(local.get("/").text) | {"choice": "left"}
        other = sqlite3.connect(tmp_path / "labels.db")
        other.execute("BEGIN IMMEDIATE")
        reply = local.post("/answers", data=form, headers={"HX-Request": "true"})
        other.close()
        assert (reply.status_code, reply.text.count("\n")) == (503, 0)
        assert "locked" in reply.text
