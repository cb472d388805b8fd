"""Opening a label store's database: SQLite in a file or PostgreSQL by URL, migrated to this version's tables."""

import math
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from dissonance.errors import StoreError

BUSY_SECONDS = 10.0
"""How long a writer waits for another process's writer before it gives up."""

_CONNECTIONS = 40
"""As many as the server has threads: what is beyond would be opened and closed with every use."""
MIGRATIONS = Path(__file__).parent / "migrations"
_VERSION_TABLE = "dissonance_version"
_MIGRATING = threading.Lock()
"""Alembic keeps what it is working on in module globals."""

_ADVICE = {
    "database is locked": "another process holds it for too long: stop that one, or try again",
    "lock timeout": "another process holds it for too long: stop that one, or try again",
    "readonly": "make the file and its folder writable",
    "read-only": "make it writable",
    "is full": "make room and try again; every answer that was acknowledged is safe",
    "no space left": "make room and try again; every answer that was acknowledged is safe",
    "unable to open": "is the folder there, and writable?",
    "not a database": "this file is something else: name another",
    "malformed": "the file is damaged: restore it from a backup",
    "disk i/o error": "is the disk in order, and the file where it was?",
    "connection refused": "is the server running, and the address right?",
    "no such file or directory": "is the server running, and the address right?",
    "name or service not known": "is the address right?",
    "timeout": "is the server running, and the address right?",
    "authentication failed": "check the user name and the password",
    "does not exist": "create it first, or name another",
    "permission denied": "let this user create tables in it",
    "too many clients": "let the server take more connections, or use fewer processes",
    "pool limit": "too much at once: try again",
    "terminating connection": "the server went away: try again",
    "closed the connection": "the server went away: try again",
}


def open_engine(where: Path | str, busy_seconds: float = BUSY_SECONDS) -> Engine:
    """Open the database at a path (SQLite) or URL (`postgresql://...`) and bring its tables up to date.

    Raises:
        StoreError: it cannot be opened or written, it is something else's, or a newer version of this package made it.
    """
    url = _url(where)
    engine = _create_engine(url, busy_seconds)
    try:
        with translated(shown(url)):
            _migrate(engine)
    except BaseException:
        engine.dispose()
        raise
    return engine


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn what the database says into one StoreError that says what to do."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise StoreError(f"label store {where}: {_with_advice(error)}") from error


def _with_advice(error: Exception) -> str:
    said = getattr(error, "orig", None) or error
    # PostgreSQL adds the values of the row at fault: the first line names what is wrong without them.
    primary = getattr(getattr(said, "diag", None), "message_primary", None)
    reason = " ".join(str(primary or (said.args[0] if said.args else said)).split())
    advice = next((advice for sign, advice in _ADVICE.items() if sign in reason.lower()), None)
    return reason if advice is None else f"{reason}: {advice}"


def shown(url: URL) -> str:
    """What a message may say of a URL: no user, no password, none of the options."""
    if url.drivername == "sqlite":
        return str(url.database)
    port = f":{url.port}" if url.port else ""
    return f"postgresql://{url.host or url.query.get('host', '')}{port}/{url.database or ''}"


def _url(where: Path | str) -> URL:
    if isinstance(where, Path) or "://" not in where:
        if str(where) in {"", ":memory:"}:
            raise StoreError(f"{str(where)!r} is no place to keep labels: name a file")
        return URL.create("sqlite", database=str(where))
    scheme, _, rest = where.partition("://")
    if rest.partition("?")[0].count("@") > 1:
        raise StoreError(f"{scheme}://...: write an @ in a user name or password as %40")
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        # The text may hold a password, and so may the error.
        raise StoreError(f"{scheme}://... is no database URL: write postgresql://user@host/database") from None
    if url.drivername in {"postgresql", "postgres", "postgresql+psycopg"}:
        return url.set(drivername="postgresql+psycopg")
    if url.drivername != "sqlite" or url.database in {None, "", ":memory:"}:
        raise StoreError(f"{scheme}://...: label stores are SQLite files or postgresql:// databases")
    if url.query and url.query.get("uri") != "true":
        raise StoreError(f"{where}: SQLite takes options after a ? only with uri=true among them")
    return url


def _create_engine(url: URL, busy_seconds: float) -> Engine:
    sqlite = url.drivername == "sqlite"
    options: dict[str, Any] = {"timeout": busy_seconds}
    if not sqlite:
        options = {} if "connect_timeout" in url.query else {"connect_timeout": max(2, math.ceil(busy_seconds))}
    try:
        engine = create_engine(
            url,
            connect_args=options,
            pool_size=_CONNECTIONS,
            max_overflow=8,
            pool_pre_ping=not sqlite,
            hide_parameters=True,
        )
    except ImportError as error:
        raise StoreError(f"{shown(url)}: install the driver with pip install 'dissonance[postgres]'") from error
    set_up = _set_up_sqlite if sqlite else _set_up_postgres
    event.listen(engine, "connect", lambda connection, _: set_up(connection, busy_seconds))
    if sqlite:
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, busy_seconds: float) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy begins them, in _begin_sqlite
    try:
        _use_write_ahead_log(connection, busy_seconds)
        # FULL: a commit returns once it is on disk. Recursive triggers: REPLACE deletes, and is refused as such.
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "recursive_triggers=ON"):
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise


def _use_write_ahead_log(connection: Any, busy_seconds: float) -> None:
    """Let readers never wait for the writer. SQLite does not wait for its turn to switch a new file over: we do."""
    until = time.monotonic() + busy_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            return


def _set_up_postgres(connection: Any, busy_seconds: float) -> None:
    try:
        connection.execute(f"SET lock_timeout = {max(1, round(1000 * busy_seconds))}")
        # Every look-up has its index; a plan made while a table was small must not stay when it has grown.
        connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
        connection.commit()
    except BaseException:
        connection.close()
        raise


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that will write takes its lock at once: upgraded halfway, it could fail without waiting.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def alone(connection: Connection) -> None:
    """Wait until no other transaction that asked to be alone goes on; SQLite's writers are alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7246)")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    script = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if _revision(connection) == script.get_current_head():
            return
    with _MIGRATING, engine.connect().execution_options(writes=True) as connection, connection.begin():
        alone(connection)
        _check_is_ours(connection, script)
        config.attributes |= {"connection": connection, "version_table": _VERSION_TABLE}
        command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection, opts={"version_table": _VERSION_TABLE}).get_current_revision()


def _check_is_ours(connection: Connection, script: ScriptDirectory) -> None:
    where = shown(connection.engine.url)
    revision = _revision(connection)
    if revision is None:
        if others := inspect(connection).get_table_names():
            raise StoreError(f"label store {where} holds other tables, such as {others[0]}: name another database")
        return
    try:
        script.get_revision(revision)
    except CommandError as error:
        raise StoreError(f"label store {where} was made by a newer version of dissonance: upgrade") from error
