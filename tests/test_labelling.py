"""From a run folder to labels and out again, through the command line."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dissonance.cli import run
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


def test_a_csv_comes_back_once(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    select()
    output(capsys, *GOLD)
    output(capsys, "export", "run", "--format", "csv", "--out", "labels.csv")
    again = json.loads(output(capsys, "import", "run", "labels.csv", "--json"))
    assert (again["added"], again["already"]) == (0, 10)
    elsewhere = json.loads(output(capsys, "import", "run", "labels.csv", "--as", "someone", "--json"))
    assert elsewhere["added"] == 10


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


def test_a_judges_answers_can_be_checked_by_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    output(capsys, *GOLD)
    from dissonance.labelling import check_judge

    assert check_judge(folder, "gold", 3) == 3
    with labels_of(folder) as store:
        alice = store.annotator("alice")
        while (lease := store.lease(alice.annotator_id)) is not None:
            store.record(alice.annotator_id, lease.question.query_id, Answer("first"), key=lease.lease_id)
        assert sum(label.annotator == "alice" for label in store.labels()) == 3


BAD = {
    "nothing selected": (["label", "run"], "dissonance select"),
    "no run": (["label", "nowhere"], "not a run folder"),
    "gold without a model": (["label", "run", "--annotator", "gold"], "--reward-model"),
    "another's option": (["label", "run", "--flip", "0.1"], "--flip is for --annotator simulated"),
    "judge without endpoint": (["label", "run", "--annotator", "judge", "--model", "m"], "--endpoint"),
    "a rate": ([*SIMULATED, "--flip", "1.5"], "flip of a simulated annotator is 1.5"),
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
    if name == "another suffix":
        output(capsys, *GOLD)
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
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "0 of 10 answers are in" in out


def test_a_store_of_another_run_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select()
    with Store.open(tmp_path / "other.db", "another run"):
        pass
    assert "another run" in output(capsys, *GOLD, "--store", "other.db", code=2)
