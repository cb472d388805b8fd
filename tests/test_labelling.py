"""From a run folder to labels and out again, through the command line."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import read_table

from dissonance import labelling
from dissonance.cli import run
from dissonance.feedback import questions
from dissonance.feedback.snapshot import copied
from dissonance.feedback.store import Store
from dissonance.records import Answer
from dissonance.run_labels import labels_of

WORDS = ["short", "a longer answer", "the longest answer of all of them", "middling words"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder of scores with texts, and a module `judges` to answer with."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "prompt_id": f"p{p}",
            "completion_id": i,
            "prompt": f"Question {p}?",
            "text": f"{WORDS[i]} {p}",
            "reward": float((i * 7 + p) % 4),
            "logprob": -float((i * 5 + 2 * p) % 7) - 1,
        }
        for p in range(12)
        for i in range(4)
    ]
    Path("scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("judges.py").write_text("def length(prompts, completions):\n    return [float(len(c)) for c in completions]\n")
    assert run(["conflicts", "scored.jsonl", "--out", "run", "--quiet"]) == 0
    return tmp_path / "run"


def select(strategy: str = "discordant", budget: int = 10) -> None:
    assert run(["select", "run", "--strategy", strategy, "--budget", str(budget)]) == 0


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert run(list(arguments)) == code, capsys.readouterr().err
    shown = capsys.readouterr()
    return shown.err if code else shown.out


GOLD = ("label", "run", "--annotator", "gold", "--reward-model", "judges:length", "--quiet")
SIMULATED = ("label", "run", "--annotator", "simulated", "--reward-model", "judges:length", "--quiet")


@pytest.mark.parametrize(("strategy", "budget"), [("discordant", 10), ("pacs", 20), ("kendall", 12)])
def test_gold_answers_become_preferences(
    folder: Path, strategy: str, budget: int, capsys: pytest.CaptureFixture[str]
) -> None:
    select(strategy, budget)
    done = json.loads(output(capsys, *GOLD, "--json"))
    queries = pq.read_table(folder / "round-000" / "queries.parquet").num_rows
    assert (done["answered"], done["left"]) == (queries, 0)
    found = json.loads(output(capsys, "export", "run", "--out", "pairs.jsonl", "--json"))
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert found["pairs"] == len(rows) > 0
    for row in rows:
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
        assert row["prompt"][0]["content"].startswith("Question")


def test_a_resumed_annotator_answers_the_rest_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select(budget=4)
    assert json.loads(output(capsys, *GOLD, "--json"))["answered"] == 4
    select(budget=10)
    before = {label.query_id for label in labels(folder)}
    done = json.loads(output(capsys, *GOLD, "--json"))
    after = labels(folder)
    assert done["answered"] == len(after) - len(before)
    assert len({(label.annotator, label.query_id) for label in after}) == len(after)


def labels(folder: Path) -> list:
    with labels_of(folder) as store:
        return store.labels()


def test_overlap_stays_until_it_is_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD)
    assert json.loads(output(capsys, *SIMULATED, "--json"))["answered"] == 0
    assert json.loads(output(capsys, *SIMULATED, "--overlap", "2", "--json"))["answered"] == 10
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv")
    progress = json.loads(output(capsys, "status", "run", "--json"))["labels"]["progress"]
    assert (progress["wanted"], progress["answered"], progress["closed"]) == (20, 20, 10)


@pytest.fixture
def rounds(folder: Path) -> Path:
    """A run of two rounds: the same prompts and completion_ids in both, with other texts in the second."""
    select("random_pairs", 8)
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    # What was long is short now, so that a text of the wrong round would turn a preference round.
    later = [row | {"text": f"{WORDS[::-1][row['completion_id']]} again {row['prompt_id']}"} for row in rows]
    Path("later.jsonl").write_text("".join(json.dumps(row) + "\n" for row in later))
    assert run(["conflicts", "later.jsonl", "--out", "later", "--quiet"]) == 0
    shutil.copytree("later/round-000", folder / "round-001")
    return folder


def test_a_later_round_is_selected_asked_and_exported_with_its_own_texts(
    rounds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = ("select", "run", "--strategy", "random_pairs", "--budget", "8", "--json")
    assert json.loads(output(capsys, *latest))["round"] == 1  # the same seed: the same ids in both rounds
    first, second = (pq.read_table(rounds / f"round-00{n}" / "queries.parquet") for n in range(2))
    assert first.drop(["query_id"]) == second.drop(["query_id"])
    assert json.loads(output(capsys, *GOLD, "--json"))["answered"] == 16
    rows = exported(capsys)
    assert sorted(row["round"] for row in rows) == [0] * 8 + [1] * 8
    for row in rows:
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert len(chosen) > len(rejected)
        assert ("again" in chosen, "again" in rejected) == (row["round"] == 1, row["round"] == 1)
    for number in (0, 1):
        assert exported(capsys, "--round", str(number)) == [row for row in rows if row["round"] == number]
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv", "--round", "1")
    assert json.loads(output(capsys, "import", "run", "labels.csv", "--as", "reader", "--json"))["added"] == 8
    message = output(capsys, "export", "run", "--out", "x.jsonl", "--round", "7", code=2)
    assert "run has no round 7: use 0 or 1" in message


def exported(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    output(capsys, "export", "run", "--out", "pairs.jsonl", *options)
    return [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]


def test_selecting_works_on_the_round_that_is_named(rounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, "select", "run", "--budget", "3", "--round", "0")
    assert not (rounds / "round-001" / "queries.parquet").exists()
    assert pq.read_table(rounds / "round-000" / "queries.parquet").num_rows == 3
    assert "run has no round 2: use 0 or 1" in output(capsys, "select", "run", "--budget", "3", "--round", "2", code=2)
    assert "round-001" in output(capsys, "select", "run", "--budget", "5")
    stages = json.loads((rounds / "run.json").read_text())["stages"]
    assert (stages["select"]["budget"], stages["select-001"]["budget"]) == (3, 5)


def test_a_csv_comes_back_once(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    select()
    output(capsys, *GOLD)
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv")
    again = json.loads(output(capsys, "import", "run", "labels.csv", "--json"))
    assert (again["added"], again["already"]) == (0, 10)
    elsewhere = json.loads(output(capsys, "import", "run", "labels.csv", "--as", "someone", "--json"))
    assert elsewhere["added"] == 10


def test_an_edited_row_corrects_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD)
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv")
    rows = Path("labels.csv").read_text().splitlines()
    rows[1] = rows[1].replace(",first,", ",tie,").replace(",second,", ",tie,")
    Path("labels.csv").write_text("\n".join(rows))
    said = output(capsys, "import", "run", "labels.csv").splitlines()
    assert said == [
        "csv: 0 of 10 labels added",
        "1 corrected what their annotators had said before",
        "9 were there",
    ]
    found = json.loads(output(capsys, "import", "run", "labels.csv", "--json"))
    assert (found["added"], found["corrected"], found["already"]) == (0, 0, 10)


@pytest.mark.parametrize("file_format", ["argilla", "label-studio"])
def test_a_folder_for_another_tool_is_written_whole_or_not_at_all(
    folder: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    select()
    output(capsys, "export", "run", "--format", file_format, "--out", "elsewhere")
    assert any(Path("elsewhere").iterdir())
    message = output(capsys, "export", "run", "--format", file_format, "--out", "elsewhere", code=2)
    assert "is there already" in message
    assert not [path for path in Path().iterdir() if path.name.endswith(".tmp")]


OWN = ["run/labels.db", "run/labels.db-wal", "run/run.json", "run/round-000/completions.parquet", "run"]


@pytest.mark.parametrize("out", OWN)
@pytest.mark.parametrize("file_format", ["trl", "csv", "argilla"])
def test_an_export_never_takes_the_place_of_the_runs_own_files(
    folder: Path, out: str, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    select()
    output(capsys, *GOLD)
    before = (folder / "run.json").read_bytes()
    message = output(capsys, "export", "run", "--format", file_format, "--out", out, code=2)
    assert "one of the run's own files" in message
    assert len(labels(folder)) == 10
    assert (folder / "run.json").read_bytes() == before


def test_an_export_may_lie_in_the_run_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD)
    output(capsys, "export", "run", "--out", "run/preferences.parquet")
    assert pq.read_table(folder / "preferences.parquet").num_rows == 10


def test_what_was_selected_since_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select(budget=4)
    output(capsys, *GOLD)
    select(budget=10)
    found = json.loads(output(capsys, "status", "run", "--json"))
    assert found["unasked"] == 10 - sum(label.query_id in selected(folder) for label in labels(folder))
    assert "not asked yet" in output(capsys, "status", "run")


def selected(folder: Path) -> set[str]:
    return set(pq.read_table(folder / "round-000" / "queries.parquet")["query_id"].to_pylist())


def test_a_command_that_failed_binds_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, *GOLD, "--store", "typo.db", code=2)  # nothing is selected
    select()
    output(capsys, *GOLD)
    assert len(labels(folder)) == 10
    output(capsys, "status", "run", "--store", "run/labels.db")


@pytest.mark.parametrize("url", ["postgresql://lead:s3cret@db:54x2/l", "postgresql://lead@db/l?password=s3cret"])
def test_a_password_is_never_repeated(folder: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    assert "s3cret" not in output(capsys, *GOLD, "--store", url, code=2)
    assert "s3cret" not in (folder / "run.json").read_text()


def said_at_start(*options: str) -> list[str]:
    """What `dissonance label run` says until it serves; it is ended then."""
    command = [sys.executable, "-m", "dissonance", "label", "run", "--port", "0", *options]
    lines: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if line.startswith("labelling at"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, lines
    return lines


def test_a_judges_answers_can_be_checked_by_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD)
    lines = said_at_start("--check", "gold", "--sample", "3")
    assert lines[0] == "3 queries that gold answered are open to people\n"
    assert "3 of 10 queries are open" in lines[1]
    with labels_of(folder) as store:
        alice = store.annotator("alice")
        while (lease := store.lease(alice.annotator_id)) is not None:
            store.record(alice.annotator_id, lease.question.query_id, Answer("first"), key=lease.lease_id)
        assert sum(label.annotator == "alice" for label in store.labels()) == 3


def test_a_gold_question_of_a_kind_that_is_not_asked_gives_itself_away(folder: Path) -> None:
    select()
    pair = {"prompt": "1 + 1?", "completions": ["2", "3"], "answer": {"choice": "first"}}
    rating = {"kind": "rating", "prompt": "Say hello.", "completions": ["Hello!"], "answer": {"rating": 5}}
    Path("gold.jsonl").write_text(json.dumps(pair) + "\n" + json.dumps(rating) + "\n")
    warning, _ = said_at_start("--gold-questions", "gold.jsonl")
    assert "warning: 1 of 2 gold questions give themselves away: their kind is rating" in warning
    assert "this run asks pairwise questions alone" in warning
    Path("gold.jsonl").write_text(json.dumps(pair))
    assert len(said_at_start("--gold-questions", "gold.jsonl")) == 1


@pytest.mark.parametrize(
    ("command", "reads"),
    [
        (GOLD, 1),
        (("import", "run", "labels.csv"), 1),
        (("export", "run", "--format", "csv", "--out", "again.csv"), 1),
        (("export", "run", "--out", "pairs.jsonl"), 0),
        (("status", "run"), 0),
    ],
)
def test_a_command_reads_the_texts_of_a_round_at_most_once(
    folder: Path, command: tuple[str, ...], reads: int, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    select()
    output(capsys, *GOLD)
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv")
    read: list[str] = []
    monkeypatch.setattr(questions.pq, "read_table", lambda path, **o: read.append(path.name) or read_table(path, **o))
    output(capsys, *command)
    assert read.count("completions.parquet") == reads
    assert read.count("queries.parquet") == (1 if command[0] == "status" else reads)


def test_asking_people_and_checking_a_judge_reads_a_round_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    select()
    output(capsys, *GOLD)
    read: list[str] = []
    monkeypatch.setattr(questions.pq, "read_table", lambda path, **o: read.append(path.name) or read_table(path, **o))
    told: list[labelling.Ready] = []

    def ready(found: labelling.Ready) -> None:
        told.append(found)
        os.kill(os.getpid(), signal.SIGINT)

    labelling.label(folder, port=0, check=labelling.Check("gold", 3), ready=ready)
    assert told[0].notes == ("3 queries that gold answered are open to people",)
    assert read.count("completions.parquet") == 1


# -- a run folder that cannot be written -------------------------------------------------------------------------------


@pytest.fixture
def bound() -> list[str]:
    """What to put before a command, so that the modes of files bind it."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("modes do not bind root, and there is no setpriv to make them")
    gone = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={gone}", f"--inh-caps={gone}"]


@contextmanager
def protected(folder: Path) -> Iterator[None]:
    """Nobody may write in the folder whom modes bind."""
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)


STATES = ["in order", "with a log", "with a log alone", "in use"]


@pytest.mark.parametrize("state", STATES)
def test_a_run_folder_that_cannot_be_written_can_be_read(
    folder: Path, state: str, bound: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select()
    output(capsys, *GOLD)
    select(budget=12)  # some queries were not asked yet
    archive = tmp_path / "archive"

    def dissonance(*arguments: str, code: int = 0) -> str:
        command = [*bound, sys.executable, "-m", "dissonance", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    with ExitStack() as stack:
        store = stack.enter_context(labels_of(folder))
        alice = store.annotator("alice")
        for question in store.questions()[:5]:
            store.record(alice.annotator_id, question.query_id, Answer("first"), key=question.query_id)
        if state == "in order":
            stack.close()
        shutil.copytree(folder, archive)
        if state == "with a log alone":
            (archive / "labels.db-shm").unlink()
        if state == "in use":
            stack.close()
            store = stack.enter_context(labels_of(archive))
            assert store.labels()
        assert (archive / "labels.db-wal").exists() == (state != "in order")
        before = {path.name: path.read_bytes() for path in archive.iterdir() if path.is_file()}
        with protected(archive):
            assert subprocess.run([*bound, "test", "-w", str(archive)], check=False).returncode == 1
            status = json.loads(dissonance("status", "archive", "--json"))
            written = json.loads(dissonance("export", "archive", "--out", "a.jsonl", "--json"))
            dissonance("export", "archive", "--format", "csv", "--out", "a.csv")
            dissonance("export", "archive", "--format", "label-studio", "--out", "a")
            refused = dissonance("invite", "archive", "ben", code=2)
        assert {path.name: path.read_bytes() for path in archive.iterdir() if path.is_file()} == before
    assert refused.count("\n") == 1
    assert "label store archive/labels.db: " in refused
    assert "writable" in refused
    alices = {person["name"]: person["answers"] for person in status["labels"]["annotators"]}
    assert alices == {"alice": 5, "gold": 10}
    assert status["unasked"] > 0
    assert json.loads(output(capsys, "status", "run", "--json")) == status | {"run": "run"}
    assert json.loads(output(capsys, "export", "run", "--out", "b.jsonl", "--json")) == written
    output(capsys, "export", "run", "--format", "csv", "--out", "b.csv")
    output(capsys, "export", "run", "--format", "label-studio", "--out", "b")
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()
    assert Path("a/pairwise.json").read_bytes() == Path("b/pairwise.json").read_bytes()


BUSY = """
import itertools, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
for pragma in ("journal_mode=WAL", "synchronous=OFF", "wal_autocheckpoint=3"):
    connection.execute("PRAGMA " + pragma)
connection.execute("CREATE TABLE numbers (n INTEGER, filling TEXT)")
for n in itertools.count(1):
    connection.execute("INSERT INTO numbers VALUES (?, ?)", (n, "x" * (10_000_000 if n == 1 else 3000)))
    if n == 1:
        print("busy", flush=True)
"""


def test_a_copy_is_of_one_moment_while_others_write(tmp_path: Path) -> None:
    """A copy of the database before a checkpoint, and of its log after it, would have gaps."""
    path = tmp_path / "busy.db"
    with subprocess.Popen([sys.executable, "-c", BUSY, str(path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"busy\n"
        try:
            for _ in range(5):
                with closing(sqlite3.connect(path)) as connection:
                    (least,) = connection.execute("SELECT max(n) FROM numbers").fetchone()
                with copied(path) as copy, closing(sqlite3.connect(copy)) as connection:
                    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                    count, highest = connection.execute("SELECT count(*), max(n) FROM numbers").fetchone()
                    assert count == highest >= least
        finally:
            writer.kill()


def test_a_protected_run_of_which_nothing_was_asked_can_be_read(folder: Path, bound: list[str]) -> None:
    select()
    with protected(folder):
        base = [*bound, sys.executable, "-m", "dissonance"]
        subprocess.run([*base, "status", "run"], check=True)
        subprocess.run([*base, "export", "run", "--format", "argilla", "--out", "argilla"], check=True)
    assert len(json.loads(Path("argilla/pairwise/records.json").read_text())) == 10
    assert not (folder / "labels.db").exists()


def test_a_store_that_went_missing_is_not_made_anew_to_be_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select()
    output(capsys, *GOLD)
    (folder / "labels.db").unlink()
    assert "labels.db is missing, and held the labels of run: put it back" in output(capsys, "status", "run", code=2)
    assert not (folder / "labels.db").exists()


def test_what_a_damaged_store_is_called_by_is_its_own_name(
    folder: Path, bound: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    select()
    output(capsys, *GOLD)
    (folder / "labels.db").write_bytes(b"nonsense" * 500)
    with protected(folder):
        command = [*bound, sys.executable, "-m", "dissonance", "status", "run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "label store run/labels.db: file is not a database" in done.stderr


# -- what is wrong -----------------------------------------------------------------------------------------------------

JUDGE = ("label", "run", "--annotator", "judge", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m")
BAD = {
    "nothing selected": (["label", "run"], "dissonance select"),
    "no run": (["label", "nowhere"], "not a run folder"),
    "gold without a model": (["label", "run", "--annotator", "gold"], "--reward-model"),
    "another's option": (["label", "run", "--flip", "0.1"], "--flip is for --annotator simulated"),
    "judge without endpoint": (["label", "run", "--annotator", "judge", "--model", "m"], "--endpoint"),
    "a rate": ([*SIMULATED, "--flip", "1.5"], "error: --flip of a simulated annotator is 1.5"),
    "a bias without noise": (
        [*SIMULATED, "--temperature", "0", "--position-bias", "1"],
        "with --temperature 0 has no --position-bias: raise the --temperature",
    ),
    "a margin": ([*GOLD, "--tie-margin", "-1"], "--tie-margin is -1.0: use"),
    "a cost without prices": (
        [*JUDGE, "--max-cost", "5"],
        "--max-cost is 5.0, but no prices are given: set --price-in and --price-out",
    ),
    "no attempts": ([*JUDGE, "--attempts", "0"], "the judge's --attempts is 0"),
    "no time": ([*JUDGE, "--timeout", "0"], "--timeout is 0.0"),
    "no address": ([*JUDGE[:5], "timeout", *JUDGE[6:]], "--endpoint is 'timeout': write it as"),
    "labels of nobody": (
        ["import", "run", "nobody.csv"],
        "nobody.csv:2: names no annotator: say whose labels the file's",
    ),
    "open to the network": (["label", "run", "--host", "192.0.2.1"], "login"),
    "guidelines": (["label", "run", "--guidelines", "nowhere.md"], "nowhere.md cannot be read"),
    "a foreign store": (["label", "run", "--store", "mysql://host/db"], "postgresql"),
    "no store": (["label", "run", "--store", "no/such/folder/labels.db"], "label store"),
    "an unknown annotator": (["revoke", "run", "nobody"], "nobody"),
    "a missing file": (["import", "run", "nowhere.csv"], "nowhere.csv"),
    "no preference": (["export", "run", "--out", "p.jsonl"], "no preference"),
    "another suffix": (["export", "run", "--out", "p.txt"], ".jsonl or .parquet"),
    "a method for csv": (["export", "run", "--format", "csv", "--method", "dgr", "--out", "x.csv"], "--method is for"),
    "an unknown format": (["export", "run", "--format", "xml", "--out", "x"], "xml"),
    "nobody to check": (["label", "run", "--check", "gold"], "answered nothing"),
    "a port": (["label", "run", "--port", "70000"], "--port"),
    "csv by another name": (["export", "run", "--format", "csv", "--out", "x.db"], "not named .csv"),
    "a sample of nothing": (["label", "run", "--sample", "5"], "--check"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_changes_nothing(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, expected = BAD[name]
    if name not in ("nothing selected", "no run"):
        select()
    if name in ("another suffix", "labels of nobody"):
        output(capsys, *GOLD)
    if name == "labels of nobody":
        Path("nobody.csv").write_text(f"query_id,choice\n{min(selected(folder))},tie\n")
    message = output(capsys, *arguments, code=2)
    assert expected in message
    assert message.count("\n") == 1
    assert "Traceback" not in message


def test_labels_stay_where_they_were_put(folder: Path, postgres_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD, "--store", postgres_url)
    assert json.loads(output(capsys, "status", "run", "--json"))["labels"]["progress"]["answered"] == 10
    assert not (folder / "labels.db").exists()
    message = output(capsys, *GOLD, "--store", "other.db", code=2)
    assert "are in postgresql" in message
    assert not Path("other.db").exists()


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`dissonance label` as a user starts it."""
    select()
    command = [sys.executable, "-m", "dissonance", "label", "run", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert "labelling at http://127.0.0.1:" in said, said
        yield process, said.split()[2].rstrip(";")
        process.kill()


def test_label_serves_until_it_is_stopped(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    with urllib.request.urlopen(url) as page:  # noqa: S310 - our own server
        assert b"Question" in page.read()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "0 of 10 answers are in" in out


def test_a_store_of_another_run_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    with Store.open(tmp_path / "other.db", "another run"):
        pass
    assert "another run" in output(capsys, *GOLD, "--store", "other.db", code=2)
