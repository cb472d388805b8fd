"""The label store of a run folder: where it is, whose it is, and what is put into it to ask."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from dissonance.artifacts import Run, find_run, open_run
from dissonance.errors import RunError, StoreError
from dissonance.feedback.gold_questions import read_gold_questions
from dissonance.feedback.questions import questions_of_round
from dissonance.feedback.store import Store

LABELS = "labels.db"
_LOCK_SECONDS = 5.0
_OWN = re.compile(r"run\.json|config\.yaml|summary\.json|report\.html|labels\.db|round-\d+|\.")


@contextmanager
def labels_of(run: Path | str, store: str | None = None) -> Iterator[Store]:
    """Open the label store of a run: RUN/labels.db, or where `store` put the run's labels at first.

    Args:
        run: the run folder.
        store: `postgresql://user@host/database` or a file. Once it holds questions or people, run.json remembers it,
            without its password.

    Raises:
        RunError: this is no run folder, or its labels are somewhere else than `store`.
        StoreError: the store cannot be opened, or holds another run's labels.
    """
    found = find_run(Path(run))
    where, plain = _where(found, store)
    with Store.open(where, found.run_id) as opened:
        try:
            yield opened
        finally:
            if found.finished("label") is None and _in_use(opened):
                with open_run(found.path, wait=_LOCK_SECONDS) as locked:
                    locked.finish("label", store=plain)


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


def ask(run: Path | str, store: Store, *, overlap: int | None = None, gold: Path | None = None) -> int:
    """Put what `select` chose, in every round, into the store, with gold questions; returns how many are new.

    Args:
        run: the run folder.
        store: its store.
        overlap: annotators per query; by default as it was, 1 at first.
        gold: a file of questions whose answer is known.

    Raises:
        InputError: nothing was selected, texts are missing, or the file of gold questions is wrong; nothing was stored.
    """
    found = find_run(Path(run))
    known = [] if gold is None else read_gold_questions(gold)
    rounds = [n for n in found.rounds if (found.round(n) / "queries.parquet").is_file()]
    asked = {number: questions_of_round(found.round(number)) for number in rounds or [0]}
    new = sum(store.add_questions(qs, overlap=overlap, round_number=n) for n, qs in asked.items())
    return new + (store.add_gold(known) if known else 0)


def check_free(run: Path | str, out: Path, store: str | None) -> None:
    """An export must not take the place of the run's own files, or of its label store."""
    found = find_run(Path(run))
    where, _ = _where(found, store)
    place, folder = out.resolve(), found.path.resolve()
    own = place == folder or (folder in place.parents and _OWN.match(place.relative_to(folder).parts[0]) is not None)
    database = isinstance(where, Path) and place.parent == where.resolve().parent and place.name.startswith(where.name)
    if own or database:
        raise RunError(f"--out {out} is one of the run's own files: choose another name")
