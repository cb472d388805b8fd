"""Who may come in: personal tokens, the sessions they open, and what they are worth now.

    token (256 random bits, in a personal link) -> session (256 random bits, in a cookie) -> Person

Both are shown once and kept as SHA-256 only. Look-ups go by the hash, so that how long one takes says nothing of the
secret. A session ends with its time, with its token's time, and when its token is revoked.
"""

import hashlib
import secrets

from sqlalchemy import BindParameter, Executable, and_, bindparam, insert, or_, select, update

from dissonance.errors import DataError
from dissonance.feedback.people import find_by_name
from dissonance.feedback.schema import annotators, sessions, tokens
from dissonance.feedback.store import Person, Store
from dissonance.records import Role

SESSION_SECONDS = 12 * 3600.0
_DAY = 24 * 3600.0
_TOKEN_BYTES = 32

# Built once: every request asks one of these.
_NOW: BindParameter[float] = bindparam("now")
_HASH: BindParameter[str] = bindparam("hash")
_GOOD_TOKEN = and_(tokens.c.revoked_at.is_(None), or_(tokens.c.expires_at.is_(None), tokens.c.expires_at > _NOW))
_PEOPLE = (
    select(annotators.c.annotator_id, annotators.c.name, annotators.c.kind, annotators.c.role)
    .select_from(tokens)
    .join(annotators)
    .where(_GOOD_TOKEN)
)
_BY_TOKEN = _PEOPLE.where(tokens.c.hash == _HASH)
_BY_SESSION = _PEOPLE.join(sessions, sessions.c.token_id == tokens.c.token_id).where(
    sessions.c.hash == _HASH, sessions.c.ended_at.is_(None), sessions.c.expires_at > _NOW
)


def invite(store: Store, name: str, role: Role = "annotator", days: float | None = None) -> str:
    """Give a person, added if there is none of this name, a token; see `issue_token`.

    Whoever's labels were imported under this name takes it over, in this role.

    Raises:
        DataError: the name is no name, or belongs to a model or to a person with another role.
    """
    person = store.annotator(name, "person", role)
    if person.role != role:
        raise DataError(f"{name!r} is there already, with the role {person.role}: use that role or another name")
    return issue_token(store, person.annotator_id, days)


def issue_token(store: Store, annotator_id: int, days: float | None = None) -> str:
    """Make a token for an annotator; it is in no other place than what this returns.

    Args:
        store: where its hash goes.
        annotator_id: whose it is; earlier ones stay good.
        days: how long it is good for; None for until it is revoked.

    Raises:
        DataError: there is no such annotator, or `days` is no positive number.
    """
    if days is not None and not 0 < days < 36_525:
        raise DataError(f"a link cannot be good for {days} days: use a number above 0, or none for no end")
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    now = store.now()
    with store.writing() as connection:
        if connection.scalar(select(annotators.c.name).where(annotators.c.annotator_id == annotator_id)) is None:
            raise DataError(f"there is no annotator {annotator_id}")
        expires_at = None if days is None else now + days * _DAY
        values = {"annotator_id": annotator_id, "hash": _hash(token), "issued_at": now, "expires_at": expires_at}
        connection.execute(insert(tokens).values(values))
        store.log(connection, "invited", annotator_id, expires_at=expires_at)
    return token


def revoke_tokens(store: Store, name: str) -> int:
    """Revoke every token of the annotator of this name, and the sessions they opened; returns how many tokens.

    Raises:
        DataError: there is no annotator of this name.
    """
    now = store.now()
    with store.writing() as connection:
        annotator_id = find_by_name(connection, name).annotator_id
        good = and_(tokens.c.annotator_id == annotator_id, tokens.c.revoked_at.is_(None))
        revoked = connection.execute(update(tokens).where(good).values(revoked_at=now)).rowcount
        store.log(connection, "revoked", annotator_id, tokens=revoked)
    return revoked


def sign_in(store: Store, token: str, seconds: float = SESSION_SECONDS) -> str | None:
    """Open a session for the holder of a token; None where the token opens nothing.

    Args:
        store: where tokens and sessions are.
        token: what the personal link holds.
        seconds: how long the session lasts.
    """
    now = store.now()
    with store.writing() as connection:
        held = connection.execute(select(tokens).where(tokens.c.hash == _hash(token))).one_or_none()
        if held is None or held.revoked_at is not None or (held.expires_at is not None and held.expires_at <= now):
            why = "unknown" if held is None else "expired" if held.revoked_at is None else "revoked"
            store.log(connection, "refused", None if held is None else held.annotator_id, token=why)
            return None
        secret = secrets.token_urlsafe(_TOKEN_BYTES)
        values = {"hash": _hash(secret), "token_id": held.token_id, "started_at": now, "expires_at": now + seconds}
        connection.execute(insert(sessions).values(values))
        store.log(connection, "signed in", held.annotator_id)
    return secret


def end_session(store: Store, secret: str) -> None:
    """Sign out; nothing happens where there is no such session."""
    mine = and_(sessions.c.hash == _hash(secret), sessions.c.ended_at.is_(None))
    with store.writing() as connection:
        ended = connection.execute(update(sessions).where(mine).values(ended_at=store.now())).rowcount
        if ended:
            whose = select(tokens.c.annotator_id).join(sessions).where(sessions.c.hash == _hash(secret))
            store.log(connection, "signed out", connection.scalar(whose))


def person_of_session(store: Store, secret: str) -> Person | None:
    """Whose session this is; None where it opens nothing, now."""
    return _person(store, _BY_SESSION, secret)


def person_of_token(store: Store, token: str) -> Person | None:
    """Whose token this is; None where it opens nothing, now."""
    return _person(store, _BY_TOKEN, token)


def _person(store: Store, chosen: Executable, secret: str) -> Person | None:
    rows = store.rows(chosen, {"hash": _hash(secret), "now": store.now()})
    return Person(rows[0].annotator_id, rows[0].name, rows[0].kind, rows[0].role) if rows else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
