"""From a run folder's queries to labels and out again: what label, invite, import, export and status do."""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dissonance.artifacts import atomic_folder, atomic_path, find_run
from dissonance.config import RewardConfig
from dissonance.errors import DataError, SettingsError
from dissonance.feedback import access, exchange
from dissonance.feedback.aggregate import aggregate
from dissonance.feedback.annotators.gold import GoldAnnotator, GoldSettings
from dissonance.feedback.annotators.rewards import score_questions
from dissonance.feedback.annotators.run import annotate
from dissonance.feedback.annotators.simulated import SimulatedAnnotator, SimulatedSettings
from dissonance.feedback.exchange import ImportFormat
from dissonance.feedback.gold_questions import other_kinds, read_gold_questions
from dissonance.feedback.overview import overview
from dissonance.feedback.pairs import Aggregation, Method
from dissonance.feedback.store import Progress, Store
from dissonance.feedback.web.settings import LabelSettings
from dissonance.progress import ProgressFactory, quiet
from dissonance.records import Question, Role
from dissonance.run_labels import ask, check_free, count_unasked, labels_of

if TYPE_CHECKING:
    from dissonance.feedback.annotators.judge import JudgeSettings


@dataclass(frozen=True, slots=True)
class Check:
    """A random sample of what a judge has answered, to ask people about."""

    judge: str
    """Its name."""
    sample: int = 50
    """Queries in all, those of an earlier call counted."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    """What the server says when it takes requests."""

    url: str
    progress: Progress
    notes: tuple[str, ...]
    """Lines for the lead, warnings among them."""


def label(  # noqa: PLR0913
    run: Path | str,
    *,
    settings: LabelSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    overlap: int | None = None,
    gold: Path | None = None,
    check: Check | None = None,
    store: str | None = None,
    ready: Callable[[Ready], None],
) -> dict[str, Any]:
    """Ask people, in the browser, what `select` chose; returns when the server is told to stop.

    Args:
        run: the run folder.
        settings: how the server asks, and whom it lets in; by default, the one at this machine.
        host: where to listen; any but the loopback needs a login.
        port: 0 takes a free one.
        overlap: annotators per query; by default as it was, 1 at first.
        gold: a file of questions whose answer is known.
        check: also ask about a sample of a judge's answers.
        store: where the labels are, as in `labels_of`.
        ready: told so once the server takes requests.

    Returns:
        The keys of `label --json`: how far the asking is.

    Raises:
        InputError: nothing was selected, an option is wrong, the judge to check has answered nothing, or the store
            cannot be used.
    """
    from dissonance.feedback.web.serve import serve

    known = [] if gold is None else read_gold_questions(gold)
    with labels_of(run, store) as opened:
        asked = ask(run, opened, overlap=overlap)
        notes = []
        if known:
            opened.add_gold(known)
            notes.append(other_kinds([question for question, *_ in known], asked))
        if check is not None:
            notes.append(f"{_check(opened, check):,} queries that {check.judge} answered are open to people")

        def said(url: str) -> None:
            ready(Ready(url, opened.progress(), tuple(filter(None, notes))))

        serve(opened, settings or LabelSettings(), host, port, said)
        return asdict(opened.progress())


def _check(store: Store, check: Check) -> int:
    if check.judge not in {label.annotator for label in store.labels()}:
        raise DataError(f"{check.judge!r} has answered nothing of this run: name an annotator that has")
    return store.check_sample(check.judge, check.sample, check.seed)


def label_by_judge(
    run: Path | str,
    settings: "JudgeSettings",
    *,
    overlap: int | None = None,
    store: str | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Have a model behind an OpenAI-compatible endpoint answer what `select` chose; goes on where it was.

    Returns:
        What this call did, and what the judge has done and cost in all.

    Raises:
        InputError: nothing was selected, a setting is wrong, or the endpoint refuses.
    """
    from dissonance.feedback.annotators.judge import Judge  # its client takes a second to load

    with labels_of(run, store) as opened:
        ask(run, opened, overlap=overlap)
        judge = Judge(opened, settings)
        try:
            done = annotate(opened, judge, progress)
        finally:
            judge.close()
        return {**asdict(done), "judge": asdict(judge.summary())}


def label_by_rewards(
    run: Path | str,
    reward_model: RewardConfig,
    settings: GoldSettings | SimulatedSettings,
    *,
    overlap: int | None = None,
    store: str | None = None,
    progress: ProgressFactory = quiet,
) -> dict[str, Any]:
    """Have a second reward model, or a callable, answer what `select` chose; exactly, or as a simulated person sees it.

    Returns:
        What this call did.

    Raises:
        InputError: nothing was selected, or the reward model cannot be used.
    """
    from dissonance.rewards import load_reward_model

    with labels_of(run, store) as opened:
        ask(run, opened, overlap=overlap)
        rewards = score_questions(load_reward_model(reward_model), opened.questions(), progress)
        if isinstance(settings, GoldSettings):
            return asdict(annotate(opened, GoldAnnotator(settings, rewards), progress))
        return asdict(annotate(opened, SimulatedAnnotator(settings, rewards), progress))


def invite(
    run: Path | str, name: str, *, role: Role | None = None, days: float | None = None, store: str | None = None
) -> str:
    """Make a personal link's token for a person; it is kept nowhere, so that it can be shown this once.

    Args:
        run: the run folder.
        name: whom; earlier links of theirs stay good.
        role: theirs from now on; by default as it was, annotator at first.
        days: how long the link is good; by default until it is revoked.
        store: where the labels are, as in `labels_of`.

    Raises:
        DataError: the name is no name, or belongs to a model.
    """
    with labels_of(run, store) as opened:
        known = {person.name: person.role for person in opened.annotators() if person.kind == "person"}
        if role is not None and known.get(name, role) != role:
            opened.set_role(name, role)
        return access.invite(opened, name, role or known.get(name, "annotator"), days)


def revoke(run: Path | str, name: str, *, store: str | None = None) -> int:
    """Revoke every link of a person and end their sessions; returns how many links.

    Raises:
        DataError: there is nobody of this name.
    """
    with labels_of(run, store) as opened:
        return access.revoke_tokens(opened, name)


def asks_safety(run: Path | str) -> bool:
    """Whether ratings should ask if an answer is safe: where the reward model is a cost model."""
    settings = find_run(Path(run)).ledger["settings"]
    reward = settings.get("reward_model")
    return "cost" in (settings.get("reward_kind"), reward.get("kind") if isinstance(reward, dict) else None)


def import_labels(
    run: Path | str,
    file: Path | str,
    *,
    file_format: ImportFormat | None = None,
    annotator: str | None = None,
    predictions: bool = False,
    skip_unknown: bool = False,
    store: str | None = None,
) -> dict[str, Any]:
    """Take in labels that were made elsewhere: a TRL preference file, an Argilla or Label Studio export, a CSV.

    The same file twice adds nothing.

    Args:
        run: the run folder that asked the questions.
        file: the file, or a folder of Argilla's.
        file_format: by default, its content says.
        annotator: whose labels they are, whoever the file names.
        predictions: also take models' suggestions, under the models' names.
        skip_unknown: leave out, and count, what the run has not asked.
        store: where the labels are, as in `labels_of`.

    Raises:
        DataError: the first thing that is wrong, with the file and its line; nothing was stored.
    """
    with labels_of(run, store) as opened:
        ask(run, opened)
        found = exchange.import_labels(
            opened,
            Path(file),
            file_format=file_format,
            annotator=annotator,
            predictions=predictions,
            skip_unknown=skip_unknown,
        )
        return asdict(found)


def export_pairs(
    run: Path | str,
    out: Path | str,
    *,
    method: Method = "majority",
    only: Collection[str] = (),
    exclude: Collection[str] = (),
    ties: bool = False,
    round_number: int | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Write what the labels come to as TRL's conversational preferences, .jsonl or .parquet.

    Args:
        run: the run folder.
        out: the file.
        method: how labels become pairs: majority, dawid_skene or dgr.
        only: kinds or names of the annotators to count; empty for all.
        exclude: kinds or names of those not to count.
        ties: also write ties, marked by a column of that name.
        round_number: of which round; by default of all.
        store: where the labels are, as in `labels_of`.
    """
    out = Path(out)
    check_free(run, out, store)
    found, questions = aggregated(run, method, only=only, exclude=exclude, round_number=round_number, store=store)
    if not found.pairs:
        raise DataError(f"the labels of {run} come to no preference: {'; '.join(found.explanation)}")
    with _atomic_file(out) as temporary:
        written = exchange.write_preferences(temporary, found.pairs, questions, suffix=out.suffix, ties=ties)
    return {
        "format": "trl",
        "method": method,
        "pairs": written.rows,
        "ties_left_out": written.ties_left_out,
        "labels": found.labels,
        "used": found.used,
        "left_out": dict(found.left_out),
        "explanation": list(found.explanation),
    }


def aggregated(
    run: Path | str,
    method: Method,
    *,
    only: Collection[str] = (),
    exclude: Collection[str] = (),
    round_number: int | None = None,
    store: str | None = None,
) -> tuple[Aggregation, list[Question]]:
    """What the labels of a round, or of all, come to, and the questions that they answer."""
    with labels_of(run, store, reading=True) as opened:
        gold = opened.gold()
        questions = _of_round(run, opened.questions(retired=True), gold, round_number)
        labels = [label for label in opened.labels() if label.query_id in questions]
    return aggregate(labels, questions, gold, method, only=only, exclude=exclude), list(questions.values())


def export_labels(
    run: Path | str,
    out: Path | str,
    file_format: Literal["argilla", "label-studio", "csv"],
    *,
    round_number: int | None = None,
    store: str | None = None,
) -> dict[str, Any]:
    """Write questions and labels for another tool: a folder for Argilla or Label Studio, a file of CSV.

    Args:
        run: the run folder.
        out: the folder or file.
        file_format: for which tool.
        round_number: of which round; by default of all.
        store: where the labels are, as in `labels_of`.

    Raises:
        DataError: the folder is there already, or there is nothing to write.
    """
    out = Path(out)
    check_free(run, out, store)
    if file_format == "csv" and out.suffix != ".csv":
        raise SettingsError(f"--out {out} is not named .csv: change its name, or choose another --format")
    with labels_of(run, store, reading=True) as opened:
        ask(run, opened)
        of_round = _of_round(run, opened.questions(retired=True), opened.gold(), round_number)
        labels = [label for label in opened.labels() if label.query_id in of_round]
        wanted = {q.query_id for q in opened.questions()} | {label.query_id for label in labels}
    questions = [question for query_id, question in of_round.items() if query_id in wanted]
    if file_format == "csv":
        with _atomic_file(out) as temporary:
            return {"format": file_format, "labels": exchange.write_csv(temporary, labels, questions)}
    write = exchange.write_argilla if file_format == "argilla" else exchange.write_label_studio
    with atomic_folder(out) as temporary:
        written = write(temporary, questions, labels)
    return {"format": file_format, "files": written.files, "left_out": written.left_out}


def _of_round(
    run: Path | str, questions: Iterable[Question], gold: Collection[str], number: int | None
) -> dict[str, Question]:
    """The questions of a round, or of all, by query_id; those of known answer are everyone's.

    Raises:
        RunError: there is no such round.
    """
    if number is not None:
        find_run(Path(run)).find_round(number)
    return {q.query_id: q for q in questions if number in (None, q.round) or q.query_id in gold}


def status(run: Path | str, *, store: str | None = None) -> dict[str, Any]:
    """How far a run is: its stages, the asking, and how well the annotators agree.

    Returns:
        The keys of `status --json`; `labels` is None while nobody was asked, `unasked` counts queries selected since.
    """
    found = find_run(Path(run))
    ledger = found.ledger
    stages = {name: entry["finished"] for name, entry in ledger["stages"].items()}
    state: dict[str, Any] = {
        "run": str(found.path),
        "command": ledger["command"],
        "stages": stages,
        "labels": None,
        "unasked": 0,
    }
    if found.finished("label") is not None:
        with labels_of(run, store, reading=True) as opened:
            state["labels"] = overview(opened).to_json()
            state["unasked"] = count_unasked(run, opened)
    return state


@contextmanager
def _atomic_file(path: Path) -> Iterator[Path]:
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise DataError(f"--out {path} cannot be written: {error.strerror or error}") from error
