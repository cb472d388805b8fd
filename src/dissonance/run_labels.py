"""The label store of a run folder: where it is, whose it is, and what is put into it to ask."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from dissonance.artifacts import Run, find_run, open_run
from dissonance.errors import RunError, StoreError
from dissonance.feedback.questions import query_ids_of_round, questions_of_round
from dissonance.feedback.snapshot import can_be_written, copied
from dissonance.feedback.store import Store
from dissonance.records import Question

LABELS = "labels.db"
_LOCK_SECONDS = 5.0
_OWN = re.compile(r"run\.json|config\.yaml|summary\.json|report\.html|labels\.db|round-\d+|\.")


@contextmanager
def labels_of(run: Path | str, store: str | None = None, *, reading: bool = False) -> Iterator[Store]:
    """Open the label store of a run: RUN/labels.db, or where `store` put the run's labels at first.

    Args:
        run: the run folder.
        store: `postgresql://user@host/database` or a file. Once it holds questions or people, run.json remembers it,
            without its password.
        reading: whether nothing that is written now has to last. A file that cannot be written is copied then, and the
            copy opened.

    Raises:
        RunError: this is no run folder, or its labels are somewhere else than `store`.
        StoreError: the store cannot be opened, holds another run's labels, or is to be read and not there.
    """
    found = find_run(Path(run))
    where, plain = _where(found, store)
    with _readable(found, where) if reading else nullcontext(where) as place, Store.open(place, found.run_id) as opened:
        try:
            yield opened
        finally:
            lasts = place == where and os.access(found.path, os.W_OK)
            if lasts and found.finished("label") is None and _in_use(opened):
                with open_run(found.path, wait=_LOCK_SECONDS) as locked:
                    locked.finish("label", store=plain)


def remember_store(run: Run, store: str | None) -> None:
    """Enter in run.json where the labels are; for a process that has the run folder open.

    Raises:
        RunError: they are somewhere else already.
    """
    _, plain = _where(run, store)
    if run.finished("label") is None:
        run.finish("label", store=plain)


@contextmanager
def _readable(run: Run, where: Path | str) -> Iterator[Path | str]:
    """The store's place, or that of a copy."""
    if not isinstance(where, Path) or not where.parent.is_dir():
        yield where
        return
    if not where.exists() and run.finished("label") is not None:
        raise StoreError(f"{where} is missing, and held the labels of {run.path}: put it back")
    if can_be_written(where):
        yield where
        return
    with copied(where) as copy:
        yield copy


def _in_use(store: Store) -> bool:
    try:
        return bool(store.annotators() or store.questions(retired=True))
    except StoreError:  # the error that ends the command says more
        return False


def _where(run: Run, store: str | None) -> tuple[Path | str, str]:
    """What to open, and how run.json names it."""
    entry = run.finished("label")
    remembered = None if entry is None else str(entry["store"])
    plain = remembered or LABELS if store is None else _plain(run, store)
    if remembered is not None and plain != remembered:
        raise RunError(f"the labels of {run.path} are in {remembered}, not in {plain}: leave --store out, or name that")
    if "://" not in plain:
        return run.path / plain, plain
    return store or plain, plain


def _plain(run: Run, store: str) -> str:
    """A store's name for run.json: a URL without its password; a file relative to the run folder it is in, if any."""
    if "://" not in store:
        path = Path(store).resolve()
        return path.name if path.parent == run.path.resolve() else str(path)
    try:
        url = make_url(store)
    except (ArgumentError, ValueError):
        # Whatever was given may hold a password, so it is not repeated.
        raise StoreError("--store is no database URL: write postgresql://user@host/database") from None
    if secret := next((key for key in url.query if "password" in key.lower()), None):
        raise StoreError(f"--store gives a {secret} after the ?: write postgresql://user:password@host/database")
    return url.set(password=None).render_as_string()


def ask(run: Path | str, store: Store, *, overlap: int | None = None) -> list[Question]:
    """Put what `select` chose, in every round, into the store; gives those questions.

    Args:
        run: the run folder.
        store: its store.
        overlap: annotators per query; by default as it was, 1 at first.

    Raises:
        InputError: nothing was selected, or texts are missing; nothing was stored.
    """
    found = find_run(Path(run))
    asked = {number: questions_of_round(found.round(number), number) for number in _selected(found) or [0]}
    for number, questions in asked.items():
        store.add_questions(questions, overlap=overlap, round_number=number)
    return [question for questions in asked.values() for question in questions]


def count_unasked(run: Path | str, store: Store) -> int:
    """Count the queries that were selected since they were last put to anyone."""
    found = find_run(Path(run))
    asked = {question.query_id for question in store.questions()}
    return sum(query_id not in asked for n in _selected(found) for query_id in query_ids_of_round(found.round(n)))


def _selected(run: Run) -> list[int]:
    return [number for number in run.rounds if (run.round(number) / "queries.parquet").is_file()]


def check_free(run: Path | str, out: Path, store: str | None) -> None:
    """An export must not take the place of the run's own files, or of its label store."""
    found = find_run(Path(run))
    where, _ = _where(found, store)
    place, folder = out.resolve(), found.path.resolve()
    own = place == folder or (folder in place.parents and _OWN.match(place.relative_to(folder).parts[0]) is not None)
    database = isinstance(where, Path) and place.parent == where.resolve().parent and place.name.startswith(where.name)
    if own or database:
        raise RunError(f"--out {out} is one of the run's own files: choose another name")
