"""The recipes: each can be checked as it stands, and the tiny twins run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dissonance import cli
from dissonance.sandbox import World

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TWINS = ROOT / "recipes" / "tiny"


def load(name: str) -> Any:
    """A recipe's script, as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "recipes" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAFE = {
    "prompt": "How?",
    "response_0": "Like this.",
    "response_1": "I will not say.",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Violence": True, "Drugs": False},
    "response_1_harm_category": {"Violence": False, "Drugs": False},
    "better_response_id": 0,
    "safer_response_id": 1,
}


def test_safety_pairs_go_by_the_safer_answer() -> None:
    """Trap 2: the answer that is better in another sense stands in the same row."""
    (row,) = load("prepare_data.py").safe_rlhf([SAFE])
    assert (row["chosen"], row["rejected"]) == ("I will not say.", "Like this.")
    assert (row["chosen_safe"], row["rejected_safe"]) == (True, False)
    assert row["category"] == "Violence"


def test_helpfulness_pairs_share_their_conversation() -> None:
    rows = [
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: Because:\n\nso.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: No.",
        },
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Ho\n\nAssistant: B"},
    ]
    (row,) = load("prepare_data.py").hh_rlhf(rows)
    assert [turn["content"] for turn in row["prompt"]] == ["Hi", "Hello.", "Why?"]
    assert (row["chosen"], row["rejected"]) == ("Because:\n\nso.", "No.")


def write_data(folder: Path) -> None:
    """What the recipes name, of made-up rows."""
    module = load("prepare_data.py")
    rows = [{**SAFE, "prompt": f"How do I do {i}?"} for i in range(200)]
    counts = module.write(module.safe_rlhf(rows), folder / "data" / "safe_rlhf")
    assert all(counts.values())
    chats = [{key: f"\n\nHuman: Tell me {i}\n\nAssistant: {key}" for key in ("chosen", "rejected")} for i in range(200)]
    module.write(module.hh_rlhf(chats), folder / "data" / "hh_rlhf")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}"}) + "\n" for i in range(80)))
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "Say nothing"}) + "\n")
    (folder / "real" / "preferences").mkdir(parents=True)
    for name in ("train", "test"):
        row = {"prompt": name, "chosen": "yes", "rejected": "no"}
        (folder / "real" / "preferences" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


def test_no_prompt_is_in_two_files(tmp_path: Path) -> None:
    write_data(tmp_path)
    said = {
        file.stem: {json.dumps(json.loads(line)["prompt"]) for line in file.read_text().splitlines()}
        for file in (tmp_path / "data" / "safe_rlhf").glob("*.jsonl")
    }
    assert len(said) == 4
    assert sum(map(len, said.values())) == len(set().union(*said.values())) == 200


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_checked(
    recipe: Path,
    policy_folder: Path,
    reward_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_data(tmp_path)
    for name, model in (("base", policy_folder), ("reward_model", reward_folder)):  # of recipes/smollm2.md
        shutil.copytree(model, tmp_path / "real" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    before = sorted(tmp_path.rglob("*"))
    assert cli.run(["run", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["judgements"] > 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture
def tiny(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the world that the twins name, smaller than the recipe does."""

    def make(task: str) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DISSONANCE_CACHE", str(cache))
        world = World(task=task, n_demonstrations=1200, n_pairs=2400)  # type: ignore[arg-type]
        load("tiny/world.py").write(world, tmp_path / "tiny")

    return make


@pytest.mark.parametrize("task", ["safety", "helpfulness"])
def test_the_tiny_twins_run(
    task: str, tmp_path: Path, tiny: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """LoRA for both models, over two rounds; a cost model in one of them."""
    tiny(task)
    assert cli.run(["run", str(TWINS / f"{task}.yaml"), "--out", "run", "--quiet", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert len(summary["rounds"]) == 2
    for number in range(2):
        metrics = json.loads((tmp_path / "run" / f"round-00{number}" / "metrics.json").read_text())
        assert metrics["policy"]["gold_check"]["checked"]
        assert metrics["policy"]["start"]["kl"] == 0
        assert metrics["evaluation"]["grader"]["annotated"]
        assert (tmp_path / "run" / f"round-00{number}" / "policy" / "adapter_model.safetensors").is_file()


def test_the_twin_of_several_processes_runs(tmp_path: Path, tiny: Callable[[str], None]) -> None:
    tiny("helpfulness")
    assert cli.run(["run", str(TWINS / "several_processes.yaml"), "--out", "run", "--quiet"]) == 0
    folder = tmp_path / "run" / "round-000"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["policy"]["gold_check"]["checked"]
    assert metrics["policy"]["kept_step"] == 4
    assert metrics["policy"]["processes"] == 2
