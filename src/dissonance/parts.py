"""Parts of stages in flight: one small Parquet file for each finished batch, in a folder or in any storage of fsspec's.

A batch is known by its stage, its window of prompts and its number in the window; since batches are planned from the
settings alone, a batch whose file stands need not be computed again, and gives what it would have given.
"""

import io
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.artifacts import find_run, read_json, write_json, write_table
from dissonance.errors import DissonanceError, RunError, SettingsError

_NOTE = "storage.json"


@dataclass(frozen=True)
class Parts:
    """The parts of one round."""

    place: Path | str
    """A folder, or a URL that fsspec knows: `s3://bucket/run`."""

    def name(self, stage: str, window: int, batch: int) -> str:
        """Where a batch rests."""
        return f"{self.place}/{stage}-{window:06d}-{batch:05d}.parquet"

    def names(self) -> frozenset[str]:
        """Every batch that is there; one listing, since a storage far away answers slowly."""
        if isinstance(self.place, Path):
            return frozenset(str(path) for path in self.place.glob("*.parquet"))
        with _storage(self.place) as (storage, folder):
            found = storage.ls(folder, detail=False) if storage.exists(folder) else []
        names = (name.rsplit("/", 1)[-1] for name in found)
        return frozenset(f"{self.place}/{name}" for name in names if name.endswith(".parquet"))

    def has(self, stage: str, window: int, batch: int) -> bool:
        """Whether a batch is there."""
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            return Path(name).exists()
        with _storage(name) as (storage, path):
            return bool(storage.exists(path))

    def write(self, stage: str, window: int, batch: int, table: pa.Table, seconds: float) -> None:
        """Store a batch and the time it took; it is there whole or not at all.

        Raises:
            DissonanceError: the disk is full, or the storage does not take it.
        """
        metadata = {**(table.schema.metadata or {}), b"seconds": str(seconds).encode()}
        table = table.replace_schema_metadata(metadata)
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            self.place.mkdir(exist_ok=True)
            write_table(Path(name), table)
            return
        whole = io.BytesIO()
        pq.write_table(table, whole, compression="zstd")
        with _storage(name) as (storage, path):
            storage.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            # Not every storage has a file whole or not at all: a worker may be killed as it writes.
            temporary = f"{path}.{secrets.token_hex(4)}.tmp"
            with storage.open(temporary, "wb") as file:
                file.write(whole.getvalue())
            storage.mv(temporary, path)

    def read(self, stage: str, window: int, batch: int) -> pa.Table:
        """One batch.

        Raises:
            RunError: it is missing or damaged; the message names the file.
        """
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            with _readable(name):
                return pq.read_table(name)
        with _storage(name) as (storage, path), _readable(name), storage.open(path, "rb") as file:
            return pq.read_table(io.BytesIO(file.read()))

    def drop(self, stage: str, window: int, batch: int) -> None:
        """Forget one batch."""
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            Path(name).unlink(missing_ok=True)
            return
        with _storage(name) as (storage, path):
            storage.rm(path)

    def remove(self) -> None:
        """Forget every batch."""
        if isinstance(self.place, Path):
            shutil.rmtree(self.place, ignore_errors=True)
            return
        with _storage(self.place) as (storage, folder):
            if storage.exists(folder):
                storage.rm(folder, recursive=True)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{name} is missing: run the same command again, which computes it") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise RunError(f"{name} cannot be read ({error}): delete it and run the same command again") from error


def check_storage(storage: str) -> None:
    """Find out whether a storage can be used: put a part there, read it, and remove it.

    Raises:
        SettingsError: as `check_url`, or fsspec does not know it, it does not answer, or it does not let us do that.
    """
    check_url(storage)
    trial = Parts(f"{storage.rstrip('/')}/trial-{secrets.token_hex(8)}")
    try:
        try:
            trial.write("trial", 0, 0, pa.table({"x": [0]}), 0.0)
            trial.names()
            trial.read("trial", 0, 0)
        finally:
            trial.remove()
    except DissonanceError as error:
        raise SettingsError(f"--storage {storage} cannot be used: {error.__cause__ or error}") from error


def check_url(storage: str) -> None:
    """Look at the address of a storage.

    Raises:
        SettingsError: it is no URL, or holds a password.
    """
    if "://" not in storage:
        raise SettingsError(
            f"--storage {storage} is no URL: leave it out for the run folder, or write s3://bucket/folder"
        )
    if urlsplit(storage).password:
        raise SettingsError(
            "--storage holds a password: keep it in a configuration file of fsspec's, or in the variables that the "
            "storage reads, on every node"
        )


def parts_of(folder: Path, storage: str | None = None) -> Parts:
    """The parts of a round: in its folder, or in a storage, which a note in the folder names from then on.

    Raises:
        RunError: the round was begun with its parts in another place.
    """
    note = folder / "parts" / _NOTE
    began = read_json(note)["storage"] if note.is_file() else None
    if began != storage and (note.is_file() or any(folder.glob("parts/*.parquet"))):
        where = f"--storage {began}" if began else "no --storage"
        raise RunError(f"{folder} was begun with {where}: go on with that, or choose another --out")
    if storage is None:
        return Parts(folder.resolve() / "parts")
    if began is None:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"storage": storage})
    return Parts(f"{storage.rstrip('/')}/{find_run(folder.parent).run_id}/{folder.name}")


@contextmanager
def _storage(url: str) -> Iterator[tuple[Any, str]]:
    """A storage, and a URL's path in it; its many errors become one of ours.

    Nothing is remembered of a listing: other processes write beside this one.
    """
    try:
        yield fsspec.core.url_to_fs(url, use_listings_cache=False)
    except DissonanceError:
        raise
    except (ImportError, ValueError) as error:
        raise SettingsError(f"{url} is no storage that can be used here: {error}") from error
    except Exception as error:  # each storage has its own
        said = " ".join(str(error).split()) or type(error).__name__
        raise DissonanceError(f"{url}: the storage says: {said}: what is done is kept, run it again") from error
