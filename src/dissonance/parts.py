"""Parts of stages in flight: one small Parquet file for each finished batch, in a folder or in any storage of fsspec's.

A batch is known by its stage, its window of prompts and its number in the window; since batches are planned from the
settings alone, a batch whose file stands need not be computed again, and gives what it would have given.
"""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from dissonance.artifacts import read_table, write_table
from dissonance.errors import DissonanceError, RunError, SettingsError


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
        storage, folder = self._storage()
        if not storage.exists(folder):
            return frozenset()
        return frozenset(f"{self.place}/{name.rsplit('/', 1)[-1]}" for name in storage.ls(folder, detail=False))

    def has(self, stage: str, window: int, batch: int) -> bool:
        """Whether a batch is there."""
        name = self.name(stage, window, batch)
        return Path(name).exists() if isinstance(self.place, Path) else bool(self._storage()[0].exists(name))

    def write(self, stage: str, window: int, batch: int, table: pa.Table, seconds: float) -> None:
        """Store a batch and the time it took; it is there whole or not at all.

        Raises:
            DissonanceError: the disk is full, or the storage does not take it.
        """
        metadata = {**(table.schema.metadata or {}), b"seconds": str(seconds).encode()}
        table = table.replace_schema_metadata(metadata)
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            self.place.mkdir(parents=True, exist_ok=True)
            write_table(Path(name), table)
            return
        storage, folder = self._storage()
        whole = io.BytesIO()
        pq.write_table(table, whole, compression="zstd")
        try:
            storage.makedirs(folder, exist_ok=True)
            with fsspec.open(name, "wb") as file:
                file.write(whole.getvalue())
        except OSError as error:
            raise DissonanceError(f"{name} cannot be written: {error}: what is done is kept, run it again") from error

    def read(self, stage: str, window: int, batch: int) -> pa.Table:
        """One batch.

        Raises:
            RunError: it is missing or damaged; the message names the file.
        """
        name = self.name(stage, window, batch)
        if isinstance(self.place, Path):
            return read_table(Path(name))
        try:
            with fsspec.open(name, "rb") as file:
                return pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"{name} cannot be read: {error}") from error

    def remove(self) -> None:
        """Forget every batch."""
        if isinstance(self.place, Path):
            shutil.rmtree(self.place, ignore_errors=True)
            return
        storage, folder = self._storage()
        if storage.exists(folder):
            storage.rm(folder, recursive=True)

    def _storage(self) -> tuple[Any, str]:
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(str(self.place))
        except (ImportError, ValueError) as error:
            raise SettingsError(f"{self.place} is no storage that can be used here: {error}") from error
        return found
