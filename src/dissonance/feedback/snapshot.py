"""A copy of an SQLite store whose place cannot be written, to read from: SQLite writes even where it only reads.

It makes files beside a database of ours to open it. Opened as immutable it would not, but then it passes over what is
still in the write-ahead log: labels would be missing, and nobody told. A copy also can be brought up to date where an
older version of this package made the store.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from dissonance.errors import StoreError


def can_be_written(path: Path) -> bool:
    """Whether SQLite can write a database here: the file, where there is one, and others beside it."""
    return os.access(path.parent, os.W_OK) and (not path.exists() or os.access(path, os.W_OK))


@contextmanager
def copied(path: Path) -> Iterator[Path]:
    """Yield a copy of a database, gone again afterwards; where there is none, a place for an empty one.

    Raises:
        StoreError: it cannot be read; and what using the copy raises, in terms of the database that was copied.
    """
    with TemporaryDirectory(prefix="dissonance-") as folder:
        copy = Path(folder) / "labels.db"
        if path.exists():
            try:
                _copy(path, copy)
            except OSError as error:
                raise StoreError(f"label store {path}: {error.strerror or error}") from error
        try:
            yield copy
        except StoreError as error:
            raise StoreError(str(error).replace(str(copy), str(path))) from error


def _copy(path: Path, copy: Path) -> None:
    """Copy a database as it is now, with what its write-ahead log holds."""
    try:
        with (
            closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as held,
            closing(sqlite3.connect(copy)) as made,
        ):
            held.backup(made)
    except sqlite3.Error:
        # Where others have it open, SQLite reads beside them. Where nobody has, nothing changes while it is copied.
        shutil.copyfile(path, copy)
        log = path.with_name(f"{path.name}-wal")
        if log.exists():
            shutil.copyfile(log, copy.with_name(f"{copy.name}-wal"))
