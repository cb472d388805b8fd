"""Exports and imports against the real parts: TRL's trainer, a Label Studio server, Argilla's own classes.

Label Studio and Argilla live in environments of their own, which `make test` makes; where they are missing, these tests
fail. Without network: the server listens on loopback, and Argilla's classes are used without a server.
"""

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
from datasets import load_dataset
from trl import RewardConfig, RewardTrainer

from conftest import CLASSIFIERS, make_tokenizer
from dissonance.feedback.aggregate import PreferencePair
from dissonance.feedback.exchange import import_labels, write_argilla, write_label_studio, write_preferences
from dissonance.feedback.exchange.argilla import argilla_user_id
from dissonance.feedback.store import Store
from dissonance.records import Answer, Message, Question

ENVIRONMENTS = Path(os.environ.get("DISSONANCE_TEST_ENVS", Path(__file__).parent.parent))
ASKED = (Message("system", "w0"), Message("user", "w1 w2"))
QUESTIONS = (
    Question("pair", "p1", "pairwise", ASKED, (3, 0), ("w3 <b>w4</b>", "w5\n\nw6 & 🙂")),
    Question("flip", "p2", "pairwise", ASKED[1:], (0, 1), ("w7", "http://w8")),
    Question("rate", "p1", "rating", ASKED, (2,), ("w9",)),
    Question("rank", "p2", "ranking", ASKED[1:], (0, 1, 2), ("w7", "http://w8", "w10")),
)
OURS = (
    ("anna", "person", "pair", Answer("second"), "two\nlines <i>"),
    ("anna", "person", "rate", Answer(rating=4, safe=False), ""),
    ("anna", "person", "rank", Answer(ranks=(2, 1, 3)), ""),
    ("judge", "judge", "pair", Answer("tie"), ""),
    ("judge", "judge", "rate", Answer(rating=5, safe=True), ""),
    ("judge", "judge", "rank", Answer(ranks=(3, 2, 1)), ""),
)


def program(environment: str, name: str) -> Path:
    path = ENVIRONMENTS / environment / "bin" / name
    assert path.exists(), f"{path} is missing: run make test-environments"
    return path


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "labels.db", "run") as opened:
        opened.add_questions(QUESTIONS)
        for number, (name, kind, query_id, answer, note) in enumerate(OURS):
            person = opened.annotator(name, kind)
            opened.record(person.annotator_id, query_id, answer, key=str(number), note=note, seconds=2.5)
        yield opened


def said(store):
    return {(label.annotator, label.query_id): (label.answer, label.note) for label in store.labels()}


# -- TRL -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # by TRL's own default
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("ties", [False, True])
def test_trls_reward_trainer_trains_on_the_export(suffix, ties, tmp_path):
    pairs = [
        PreferencePair("p1", 3, 0, 0.75, False, "pairwise/majority", 2, True, None),
        PreferencePair("p2", 1, 0, 1.0, False, "pairwise/majority", 1),
        PreferencePair("p2", 0, 2, 0.5, True, "ranking/majority", 1),
        PreferencePair("p2", 1, 2, 0.5, False, "ranking/majority", 1, False, True),
    ]
    path = tmp_path / f"pairs{suffix}"
    rows = write_preferences(path, pairs, QUESTIONS, suffix=suffix, ties=ties).rows
    loader = "json" if suffix == ".jsonl" else "parquet"
    data = load_dataset(loader, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.num_rows == rows == len(pairs) - (not ties)
    arguments = RewardConfig(
        output_dir=str(tmp_path / "model"),
        per_device_train_batch_size=rows,
        max_steps=2,
        max_length=64,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    model = CLASSIFIERS["llama"](num_labels=1)
    tokenizer = make_tokenizer()
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    assert len(trainer.train_dataset) == rows
    before = model.score.weight.detach().clone()
    steps = trainer.train().global_step
    assert steps == 2
    assert not before.equal(model.score.weight)


# -- Label Studio ----------------------------------------------------------------------------------------------------


class LabelStudio:
    """A Label Studio server on loopback, without network, on a database of its own."""

    token = 40 * "0"

    def __init__(self, folder: Path) -> None:
        command = program(".venv-label-studio", "label-studio")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        migrated = command.parent.parent / "data" / "label_studio.sqlite3"
        folder.mkdir()
        if migrated.exists():  # its migrations take most of a minute
            (folder / migrated.name).write_bytes(migrated.read_bytes())
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
            "LABEL_STUDIO_USERNAME": "lead@example.org",
            "LABEL_STUDIO_PASSWORD": "correct horse",
            "LABEL_STUDIO_USER_TOKEN": self.token,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
            "COLLECT_ANALYTICS": "false",
            "LATEST_VERSION_CHECK": "false",
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
        }
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            arguments = ["start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
            self.process = subprocess.Popen(
                [command, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{self.url}/health", timeout=10).ok:
                    return
            time.sleep(0.2)  # the server says by nothing else that it is up
        raise AssertionError(self.log.read_text()[-2000:])

    def call(self, method: str, path: str, **options) -> requests.Response:
        headers = {"Authorization": f"Token {self.token}"}
        reply = requests.request(method, self.url + path, headers=headers, timeout=60, **options)
        assert reply.ok, f"{method} {path}: {reply.status_code} {reply.text[:1000]}"
        return reply

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = LabelStudio(tmp_path_factory.mktemp("server") / "data")
    try:
        started.wait()
        yield started
    finally:
        started.close()


def on_the_page(kind, task, better, note):
    """What Label Studio's page sends when somebody answers."""
    shown = [int(i) for i in task["data"]["shown"].split(",")]
    if kind == "pairwise":
        chosen = "Both are bad" if better is None else f"Answer {shown.index(better) + 1} is better"
        target, item = "answer_1", {"from_name": "choice", "type": "choices", "value": {"choices": [chosen]}}
    elif kind == "rating":
        target, item = "answer_1", {"from_name": "rating", "type": "rating", "value": {"rating": 2}}
    else:
        target, item = (
            "answers",
            {
                "from_name": "ranks",
                "type": "ranker",
                "value": {"ranker": {"ranks": [f"answer_{shown.index(i) + 1}" for i in better]}},
            },
        )
    result = [{"id": "a1B2c3D4e5", "to_name": target, "origin": "manual", **item}]
    if note:
        item = {"from_name": "note", "type": "textarea", "value": {"text": [note]}}
        target = "conversation" if kind == "ranking" else "answer_1"
        result.append({"id": "f6G7h8I9j0", "to_name": target, "origin": "manual", **item})
    return {"result": result, "lead_time": 3.25, "was_cancelled": False}


ON_THE_PAGE = {"pair": (0, "hm"), "flip": (None, ""), "rate": (None, "so-so"), "rank": ([2, 0, 1], "")}
THEIRS = {
    "pair": (Answer("second"), "hm"),
    "flip": (Answer("both_bad"), ""),
    "rate": (Answer(rating=2), "so-so"),
    "rank": (Answer(ranks=(2, 3, 1)), ""),
}


@pytest.fixture(scope="module")
def exports(server, tmp_path_factory):
    """Our tasks in a project of each kind, answered there, and exported in both formats."""
    folder = tmp_path_factory.mktemp("exports")
    with Store.open(folder / "labels.db", "run") as store:
        store.add_questions(QUESTIONS)
        for number, (name, kind, query_id, answer, note) in enumerate(OURS):
            person = store.annotator(name, kind)
            store.record(person.annotator_id, query_id, answer, key=str(number), note=note, seconds=2.5)
        assert write_label_studio(folder / "out", QUESTIONS, store.labels()).left_out == 0
    files = {}
    for kind in ("pairwise", "rating", "ranking"):
        config = (folder / "out" / f"{kind}.xml").read_text()
        tasks = json.loads((folder / "out" / f"{kind}.json").read_text())
        project = server.call("POST", "/api/projects/", json={"title": kind, "label_config": config}).json()["id"]
        counts = server.call("POST", f"/api/projects/{project}/import", json=tasks).json()
        sent = {name: sum(len(task[f"{name}s"]) for task in tasks) for name in ("annotation", "prediction")}
        assert counts["task_count"] == len(tasks)
        assert {name: counts[f"{name}_count"] for name in sent} == sent
        for task in server.call("GET", "/api/tasks", params={"project": project, "fields": "all"}).json()["tasks"]:
            answer = on_the_page(kind, task, *ON_THE_PAGE[task["data"]["query_id"]])
            server.call("POST", f"/api/tasks/{task['id']}/annotations/", json=answer)
        for file_format in ("JSON", "JSON_MIN"):
            options = {"exportType": file_format, "download_all_tasks": "true"}
            reply = server.call("GET", f"/api/projects/{project}/export", params=options)
            files[kind, file_format] = folder / f"{kind}.{file_format}.json"
            files[kind, file_format].write_bytes(reply.content)
    return files


@pytest.mark.parametrize("file_format", ["JSON", "JSON_MIN"])
def test_a_label_studio_server_takes_the_tasks_and_its_export_comes_back(file_format, exports, store, tmp_path):
    people = {(name, query): (answer, note) for name, kind, query, answer, note in OURS if kind == "person"}
    theirs = {("label-studio user 1", query_id): what for query_id, what in THEIRS.items()}
    with Store.open(tmp_path / "fresh.db", "other") as fresh:
        fresh.add_questions(QUESTIONS)
        for kind in ("pairwise", "rating", "ranking"):
            report = import_labels(fresh, exports[kind, file_format])
            assert (report.format, report.added) == ("label-studio", report.labels)
        assert said(fresh) == people | theirs
        seconds = {label.annotator: label.seconds for label in fresh.labels()}
        assert seconds == {"anna": 2.5, "label-studio user 1": 3.25}
        for kind in ("pairwise", "rating", "ranking"):
            assert import_labels(fresh, exports[kind, file_format]).added == 0
    # Into the run itself: the server's user is new, what anna and the judge said is not.
    before = said(store)
    for kind in ("pairwise", "rating", "ranking"):
        import_labels(store, exports[kind, file_format])
    assert said(store) == before | theirs


def test_a_skip_in_label_studio_is_a_skip(server, exports, tmp_path):
    folder = tmp_path / "out"
    write_label_studio(folder, QUESTIONS[2:3])
    config = (folder / "rating.xml").read_text()
    project = server.call("POST", "/api/projects/", json={"title": "skips", "label_config": config}).json()["id"]
    server.call("POST", f"/api/projects/{project}/import", json=json.loads((folder / "rating.json").read_text()))
    (task,) = server.call("GET", "/api/tasks", params={"project": project}).json()["tasks"]
    skip = {"result": [], "lead_time": 1.0, "was_cancelled": True}
    server.call("POST", f"/api/tasks/{task['id']}/annotations/", params={"was_cancelled": "1"}, json=skip)
    reply = server.call("GET", f"/api/projects/{project}/export", params={"exportType": "JSON"})
    (tmp_path / "skips.json").write_bytes(reply.content)
    with Store.open(tmp_path / "fresh.db", "other") as fresh:
        fresh.add_questions(QUESTIONS)
        assert import_labels(fresh, tmp_path / "skips.json").added == 1
        assert said(fresh) == {("label-studio user 1", "rate"): (Answer(), "")}


# -- Argilla ---------------------------------------------------------------------------------------------------------

# Runs in Argilla's environment: loads a dataset's folder as `Dataset.from_disk` does, lets a user answer, and writes
# the records as `dataset.records.to_json` does. Behind the settings stands a client that never calls its server.
IN_ARGILLA = """
import json, sys, uuid, warnings
from pathlib import Path
from argilla._api._client import ArgillaAPI
import argilla as rg
import httpx
from argilla._models import DatasetModel
from argilla.records._io import JsonIO

warnings.simplefilter("error")
client = object.__new__(rg.Argilla)
client.api = ArgillaAPI(httpx.Client(base_url="http://127.0.0.1:9"))
rg.Argilla._set_default(client)

folder, out, answers = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
settings = rg.Settings.from_json(folder / ".argilla" / "settings.json")
settings.validate()
dataset = DatasetModel(**json.loads((folder / ".argilla" / "dataset.json").read_text()))
loaded = rg.Dataset(name=dataset.name, settings=settings, client=client)
records = JsonIO._records_from_json(folder / "records.json")
questions = {q.name: q for q in settings.questions}
for record in records:
    assert set(record.fields) == {f.name for f in settings.fields}, record.fields
    for said in [*record.responses, *record.suggestions]:
        question = questions[said.question_name]
        allowed = getattr(question, "labels", None) or getattr(question, "values", None)
        assert allowed is None or said.value in allowed, (said.question_name, said.value, allowed)
    for name, value in answers.get(record.id, {}).items():
        record.responses.add(rg.Response(name, value, user_id=uuid.UUID(int=7), status="submitted"))
    record.dataset = loaded
    record.api_model()  # what would be sent
JsonIO.to_json(records, out)
print(json.dumps({"name": dataset.name, "records": len(records),
                  "responses": sum(len(r.responses) for r in records)}))
"""


def in_argilla(folder, out, answers):
    python = program(".venv-argilla", "python")
    environment = {"PATH": os.environ["PATH"], "HOME": str(out.parent)}
    command = [python, "-c", IN_ARGILLA, str(folder), str(out), json.dumps(answers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_argillas_own_classes_take_the_records_and_give_them_back(store, tmp_path):
    write_argilla(tmp_path / "out", QUESTIONS, store.labels())
    first = json.loads((tmp_path / "out" / "pairwise" / "records.json").read_text())[0]["metadata"]["shown"]
    answers = {
        "pair": {"choice": "answer_1", "note": "hm"},
        "flip": {"choice": "both_bad"},
        "rate": {"rating": 2, "safe": "safe"},
        "rank": {"rank_1": "1", "rank_2": "2", "rank_3": "1"},
    }
    for name, records in (("pairwise", 2), ("rating", 1), ("ranking-3", 1)):
        done = in_argilla(tmp_path / "out" / name, tmp_path / f"{name}.json", answers)
        assert (done["name"], done["records"]) == (name, records)
    order = json.loads((tmp_path / "out" / "ranking-3" / "records.json").read_text())[0]["metadata"]["shown"]
    places = dict(zip(order.split(","), (1, 2, 1), strict=True))
    with Store.open(tmp_path / "fresh.db", "other") as fresh:
        fresh.add_questions(QUESTIONS)
        user = "argilla user 00000000-0000-0000-0000-000000000007"
        for name in ("pairwise", "rating", "ranking-3"):
            report = import_labels(fresh, tmp_path / f"{name}.json", predictions=True)
            assert (report.format, report.added) == ("argilla", report.labels)
        ours = {(name, query): (answer, note) for name, _, query, answer, note in OURS}
        assert said(fresh) == ours | {
            (user, "pair"): (Answer("first" if first.startswith("3") else "second"), "hm"),
            (user, "flip"): (Answer("both_bad"), ""),
            (user, "rate"): (Answer(rating=2, safe=True), ""),
            (user, "rank"): (Answer(ranks=tuple(places[i] for i in "012")), ""),
        }


def test_a_user_of_argilla_can_be_made_with_the_id_of_an_annotator():
    code = "import sys, argilla as rg, argilla._models as m; print(m.UserModel(username='anna', id=sys.argv[1]).id)"
    done = subprocess.run(
        [program(".venv-argilla", "python"), "-c", code, argilla_user_id("anna")],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == argilla_user_id("anna")
