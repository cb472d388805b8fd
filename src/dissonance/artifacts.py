"""The run folder: atomic writes, fingerprints, the ledger `run.json`, and parts of stages in flight.

    RUN/
      run.json        what was asked, with which versions, and the stages that are done
      summary.json    the numbers, as `--json` prints them
      report.html
      round-000/      prompts.parquet completions.parquet queries.parquet
        parts/        batches of a stage in flight; gone when the round's tables stand

A file appears under its name complete or not at all: it is written beside it, flushed to disk, and renamed.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from dissonance.errors import DissonanceError, RunError
from dissonance.parquet import open_parquet

_FORMAT = 1
_VERSIONED = ("dissonance", "torch", "transformers", "tokenizers", "trl", "peft", "numpy", "pyarrow")
_HASHED_WHOLE = 1 << 30
_BLOCK = 1 << 16
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it, on error remove it.

    Raises:
        DissonanceError: there is no room for it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the umask has its say
    try:
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        why = os.strerror(error.errno)
        raise DissonanceError(f"{path} cannot be written: {why}: make room, and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to make a folder under; on success rename it, on error remove it.

    Raises:
        RunError: the folder is there already, or cannot be made.
    """
    if path.exists():
        raise RunError(f"{path} is there already: name a folder that is not, or remove it")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        for inside in (*temporary.rglob("*"), temporary):
            _fsync(inside)
        temporary.rename(path)
        _fsync(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_table(path: Path, table: pa.Table) -> None:
    """Write one Parquet table atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Read one Parquet table of a run folder; a missing or damaged one is a RunError."""
    _check_there(path)
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def read_pieces(path: Path, *, without: Collection[str] = ()) -> Iterator[pa.Table]:
    """One Parquet table of a run folder, as many pieces that each fit into memory, less some columns.

    Raises:
        RunError: it is missing or damaged.
    """
    _check_there(path)
    try:
        with open_parquet(path) as file:
            names = [name for name in file.schema_arrow.names if name not in without]
            yield file.schema_arrow.empty_table().select(names)
            for batch in file.iter_batches(columns=names):
                yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise RunError(f"{path} is missing: finish the run first, with the command that made it")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of a run folder; a broken one is a RunError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object")
    return value


def fingerprint(value: object) -> str:
    """SHA-256 over the canonical JSON of a value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def source_fingerprint(source: str) -> str:
    """Identify a model or a file by its content, so that a model retrained in place is another model.

    Of a file beyond a GiB, a thousand blocks spread over it and its time of change stand for the whole. What is no
    local file or folder, a hub id, counts by its name.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return fingerprint(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=32)
    for file in files:
        state = file.stat()
        digest.update(f"{file.relative_to(path) if path.is_dir() else file.name}\0{state.st_size}\0".encode())
        with file.open("rb") as stream:
            if state.st_size <= _HASHED_WHOLE:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
                continue
            digest.update(str(state.st_mtime_ns).encode())
            for start in range(0, state.st_size, state.st_size // 1000):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions a result may depend on."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Run:
    """An open run folder; use `create_run` or `open_run`."""

    path: Path

    fresh: bool = False
    """Whether this process began it."""
    made: bool = False
    """Whether this process made its folder."""

    @property
    def run_id(self) -> str:
        """What tells this run from every other, wherever its folder is copied to."""
        ledger = self.ledger
        return fingerprint({name: ledger[name] for name in ("command", "created", "settings", "inputs")})[:32]

    @property
    def rounds(self) -> list[int]:
        """The numbers of the rounds there are."""
        return sorted(int(folder.name[6:]) for folder in self.path.glob("round-[0-9][0-9][0-9]"))

    def round(self, number: int = 0) -> Path:
        """The folder of one round."""
        return self.path / f"round-{number:03d}"

    def find_round(self, number: int | None = None) -> int:
        """The number of a round that there is; the latest by default.

        Raises:
            RunError: there is no such round.
        """
        rounds = self.rounds
        if not rounds or (number is not None and number not in rounds):
            there = f"use {' or '.join(map(str, rounds))}" if rounds else "make the run first"
            raise RunError(f"{self.path} has no round{'s' if number is None else f' {number}'}: {there}")
        return rounds[-1] if number is None else number

    @property
    def ledger(self) -> dict[str, Any]:
        """What `run.json` says now."""
        return read_json(self.path / "run.json")

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The ledger's entry of a stage, or None while it is not done."""
        entry: dict[str, Any] | None = self.ledger["stages"].get(stage)
        return entry

    def discard(self) -> None:
        """Remove what this process began, and nothing that was in the folder before."""
        if self.made:
            shutil.rmtree(self.path)
            return
        shutil.rmtree(self.round(), ignore_errors=True)
        for name in ("config.yaml", "run.json"):
            (self.path / name).unlink(missing_ok=True)

    def finish(self, stage: str, **facts: Any) -> None:
        """Enter a stage as done."""
        ledger = self.ledger
        ledger["stages"][stage] = {"finished": _now(), **facts}
        write_json(self.path / "run.json", ledger)


def matching_run(path: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Run | None:
    """The run folder if it was made from the same settings and inputs, None if there is none yet; writes nothing.

    Raises:
        RunError: the folder holds something else, or was made with other settings or inputs.
    """
    if not (path / "run.json").exists():
        if path.exists() and any(not p.name.startswith(".") for p in _listing(path)):
            raise RunError(f"{path} is not empty and is not a run folder: choose another --out")
        return None
    if _nothing_done(path):
        return None
    _check_same(path, command, settings, inputs)
    return Run(path)


def _nothing_done(path: Path) -> bool:
    """Whether a run was killed before it had made anything: what it was to be with does not matter then."""
    made = any(path.glob("round-*/*")) or any(path.glob("labels.db*"))
    return not made and not find_run(path).ledger["stages"]


@contextmanager
def create_run(path: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> Iterator[Run]:
    """Create the run folder, or go on with the one that was made from the same settings and inputs.

    `inputs` maps a name to a fingerprint: of a model, of the prompts. The folder is locked while it is open.

    Raises:
        RunError: as `matching_run`, or the folder is in use.
    """
    matching_run(path, command, settings, inputs)
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {path} cannot be made: {error.strerror}") from error
    with locked(path):
        sweep(path)
        fresh = matching_run(path, command, settings, inputs) is None
        if fresh:
            ledger = {"format": _FORMAT, "command": command, "created": _now(), "settings": dict(settings)}
            write_json(path / "run.json", {**ledger, "inputs": dict(inputs), "versions": versions(), "stages": {}})
        run = Run(path, fresh, made)
        run.round().mkdir(exist_ok=True)
        yield run


def sweep(path: Path) -> None:
    """Remove what a killed process left unfinished; only whoever holds the run folder may."""
    for folder in (path, *path.glob("round-*")):
        for leftover in (*folder.glob(".*.tmp"), *folder.glob(".conflicts-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def find_run(path: Path) -> Run:
    """An existing run folder, to read its finished tables while others may work on it."""
    if not (path / "run.json").is_file():
        raise RunError(f"{path} is not a run folder: it has no run.json")
    ledger = read_json(path / "run.json")
    if ledger.get("format") != _FORMAT:
        raise RunError(f"{path} was made by another version of dissonance: make it anew")
    parts = {"command": str, "created": str, "settings": dict, "inputs": dict, "stages": dict}
    if broken := [name for name, kind in parts.items() if not isinstance(ledger.get(name), kind)]:
        raise RunError(f"{path / 'run.json'} is damaged: it has no {broken[0]}")
    return Run(path)


@contextmanager
def open_run(path: Path, wait: float = 0.0) -> Iterator[Run]:
    """Open and lock an existing run folder, waiting so many seconds for another process that has it."""
    run = find_run(path)
    with locked(path, wait):
        yield run


def _listing(path: Path) -> list[Path]:
    try:
        return list(path.iterdir())
    except NotADirectoryError as error:
        raise RunError(f"{path} is a file: --out names a folder") from error


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process, waiting so many seconds for another one that has it."""
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=wait)
    except Timeout as error:
        raise RunError(f"{path} is in use by another dissonance process: wait for it, or stop it") from error
    try:
        yield
    finally:
        lock.release()


def _check_same(path: Path, command: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> None:
    ledger = read_json(path / "run.json")
    if ledger.get("format") != _FORMAT:
        raise RunError(f"{path} was made by another version of dissonance: choose another --out")
    if ledger["command"] != command:
        raise RunError(f"{path} holds a run of `{ledger['command']}`, not of `{command}`: choose another --out")
    if changed := changes(ledger, settings, inputs):
        raise RunError(f"{path} was made with other settings ({'; '.join(changed)}): choose another --out")
    if command not in ledger["stages"] and ledger["versions"] != versions():
        was = ", ".join(f"{name} {number}" for name, number in ledger["versions"].items())
        raise RunError(f"{path} was begun with other versions ({was}): go on with those, or choose another --out")


def changes(ledger: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """What differs between a run's settings and inputs and these, in words."""
    other = [f"the content of {k}" for k in inputs if ledger["inputs"].get(k) != inputs[k]]
    return [*differences(ledger["settings"], settings), *other]


def differences(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, in words."""
    before, now = _flatten(earlier), _flatten(later)
    names = {**before, **now}
    return [f"{k}: {before.get(k)!r}, now {now.get(k)!r}" for k in names if before.get(k) != now.get(k)]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
