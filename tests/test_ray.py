"""A Ray cluster of several nodes on this machine: what it measures is what one process measures, whatever is killed."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from conftest import WORDS
from dissonance.config import AuditConfig
from dissonance.engine.pool import RayOptions, Shared, connect
from dissonance.engine.ray import _check_devices
from dissonance.errors import SettingsError
from dissonance.sections import parse_section
from loop_world import write_world
from model_server import Models, ModelServer
from storage import ftp
from waiting import until

STORE = 80 << 20
REWARDS = """
import os
import time
from pathlib import Path
HERE = Path(__file__).parent
def quick(prompts, completions):
    return [float(len(set(c.split()))) for c in completions]
def slow(prompts, completions):
    time.sleep(0.25)
    return quick(prompts, completions)
def gated(prompts, completions):
    if len(completions) > 1:
        (HERE / f"busy-{os.getpid()}").touch()
        while not (HERE / "go").exists():
            time.sleep(0.05)
        with (HERE / "scored").open("a") as file:
            file.write(f"{len(completions)}\\n")
    return quick(prompts, completions)
"""


pytestmark = pytest.mark.timeout(1500)  # its processes are many, and each loads PyTorch


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head and two nodes, of a core each."""
    cluster = Cluster()
    for _ in range(3):
        add_node(cluster, include_dashboard=False)
    yield cluster
    cluster.shutdown()


def add_node(cluster: Cluster, **options: Any) -> Any:
    """One core more."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
            patch.delenv(name)  # Ray kills its workers as they write what they covered
        return cluster.add_node(num_cpus=1, object_store_memory=STORE, **options)


@pytest.fixture
def many_prompts(tmp_path: Path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


def write_prompts(path: Path) -> Path:
    prompts = [f"{WORDS[i % len(WORDS)]} {WORDS[i // len(WORDS)]} {WORDS[(7 * i) % len(WORDS)]}" for i in range(120)]
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(prompts)))
    return path


SMALL_WINDOWS = ("-c", "from dissonance import cli, stages; stages.WINDOW = 50; cli.main()")


def command(*arguments: object, cwd: Path, start: tuple[str, str] = ("-m", "dissonance")) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, *start, *map(str, arguments)],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def audit(policy: Path, reward: object, prompts: Path, out: Path, **options: Any) -> list[object]:
    settings = {
        "policy": policy, "reward-model": reward, "prompts": prompts, "out": out, "n": 4, "max-new-tokens": 10,
        "tokens-per-batch": 300, **options,
    }  # fmt: skip
    return ["audit", "--json", *(x for name, value in settings.items() for x in (f"--{name.replace('_', '-')}", value))]


def on(cluster: Cluster, **options: Any) -> dict[str, Any]:
    """Where to run; by two actors a pool where a test does not want more, since each loads PyTorch for seconds."""
    chosen = {"engine": "ray", "ray-address": cluster.address, "workers": 2, **options}
    return {name: value for name, value in chosen.items() if value is not None}


def tables(run: Path, number: int = 0) -> dict[str, Any]:
    return {name: pq.read_table(run / f"round-{number:03d}" / f"{name}.parquet") for name in ("prompts", "completions")}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name].equals(other[name]) for name in one)


def parts(out: Path, stage: str) -> int:
    return len(list(out.glob(f"round-000/parts/{stage}-*.parquet")))


def test_a_cluster_measures_what_one_process_measures(
    cluster: Cluster, make_policy: Any, reward_folder: Path, many_prompts: Path, tmp_path: Path
) -> None:
    policy, reference = make_policy(), make_policy(seed=5)
    options = {"reference": reference, "likelihood": "relative"}
    found = {}
    for name, where in (("here", {}), ("there", on(cluster))):
        settings = audit(policy, reward_folder, many_prompts, tmp_path / name, **options, **where)
        code, found[name], err = ended(command(*settings, cwd=tmp_path, start=SMALL_WINDOWS))
        assert code == 0, err
    assert same(tables(tmp_path / "here"), tables(tmp_path / "there"))
    assert not (tmp_path / "there" / "round-000" / "parts").exists()
    assert "sampling: 480/480 completions" in err
    assert "Dataset" not in err
    assert "Warning" not in err
    assert "logging.cc" not in err
    timeless = {"seconds", "tokens_per_second"}
    here, there = ({**json.loads(found[name]), **dict.fromkeys(timeless)} for name in ("here", "there"))
    assert here == there


def test_models_behind_a_server_are_asked_by_the_nodes(
    cluster: Cluster, policy_folder: Path, reward_folder: Path, many_prompts: Path, tmp_path: Path
) -> None:
    server = ModelServer(Models(policy_folder, reward_folder)).start()
    try:
        served = {"policy_server": server.url, "reward_server": server.url}
        asked: dict[str, Counter[tuple[int, ...]]] = {}
        for name, where in (("here", {}), ("there", on(cluster))):
            settings = audit(policy_folder, reward_folder, many_prompts, tmp_path / name, **served, **where)
            code, _, err = ended(command(*settings, cwd=tmp_path))
            assert code == 0, err
            asked[name] = Counter(tuple(body["prompt"]) for body in server.bodies if body.get("n") == 4)
            server.bodies.clear()
    finally:
        server.stop()
    assert same(tables(tmp_path / "here"), tables(tmp_path / "there"))
    assert asked["here"] == asked["there"]  # each prompt once


@pytest.fixture(scope="module")
def undisturbed(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with prompts and rewards, and the tables of an audit of theirs in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_prompts(folder / "prompts.jsonl")
    (folder / "rewards.py").write_text(REWARDS)
    here = command(*audit(policy_folder, "rewards:quick", folder / "prompts.jsonl", folder / "run"), cwd=folder)
    assert ended(here)[0] == 0
    return folder, tables(folder / "run")


@pytest.mark.parametrize("victim", ["node", "actor"])
def test_what_is_killed_in_the_middle_costs_its_batches_only(
    victim: str, cluster: Cluster, policy_folder: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = undisturbed
    doomed = add_node(cluster)
    raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
    out = tmp_path / "run"
    running = command(
        *audit(policy_folder, "rewards:gated", folder / "prompts.jsonl", out, **on(cluster, workers=None)), cwd=folder
    )
    # The pool grows until every node has an actor, and each is at a batch.
    busy = until(lambda: [one for one in raylet.children(recursive=True) if (folder / f"busy-{one.pid}").exists()], 400)
    assert not parts(out, "rewards")
    if victim == "node":
        cluster.remove_node(doomed, allow_graceful=False)
    else:
        busy[0].kill()
    (folder / "go").touch()
    code, _, err = ended(running)
    (folder / "go").unlink()
    assert code == 0, err
    if victim != "node":
        cluster.remove_node(doomed)
    assert same(expected, tables(out))
    scored = [int(line) for line in (folder / "scored").read_text().split()]
    (folder / "scored").unlink()
    # What was lost was at the gate, which a worker of a node that is gone may pass before it ends: no more is new.
    assert 480 <= sum(scored) <= 480 + max(scored)


def test_rounds_begin_on_a_cluster_with_what_the_round_before_has_trained(
    cluster: Cluster, make_policy: Any, make_reward_model: Any, tmp_path: Path
) -> None:
    settings = write_world(tmp_path, make_policy, make_reward_model) | {"rounds": {"most": 2}}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # which is YAML too
    for name, where in (("here", {}), ("there", on(cluster, workers=1))):
        options = [x for option, value in where.items() for x in (f"--{option}", value)]
        code, _, err = ended(command("run", "run.yaml", "--out", name, *options, cwd=tmp_path))
        assert code == 0, err
    for number in range(2):
        assert same(tables(tmp_path / "here", number), tables(tmp_path / "there", number))
        assert not (tmp_path / "there" / f"round-{number:03d}" / "parts").exists()


def test_a_killed_run_goes_on_and_names_a_part_that_cannot_be_read(
    cluster: Cluster, policy_folder: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = undisturbed
    out = tmp_path / "run"
    settings = audit(policy_folder, "rewards:slow", folder / "prompts.jsonl", out, **on(cluster, workers=1))
    running = command(*settings, cwd=folder)
    until(lambda: parts(out, "rewards") >= 2, 400)
    running.kill()
    running.communicate()
    sampled = {path: path.stat().st_mtime_ns for path in out.glob("round-000/parts/completions-*")}
    damaged = sorted(out.glob("round-000/parts/rewards-*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    code, _, err = ended(command(*settings, cwd=folder))
    assert code == 2
    assert damaged.name in err
    assert {path: path.stat().st_mtime_ns for path in sampled} == sampled
    damaged.unlink()
    code, _, err = ended(command(*settings, cwd=folder))
    assert code == 0, err
    assert same(expected, tables(out))


def test_what_a_worker_finds_wrong_is_said_as_here(
    cluster: Cluster, policy_folder: Path, reward_folder: Path, many_prompts: Path, tmp_path: Path
) -> None:
    long = audit(policy_folder, reward_folder, many_prompts, tmp_path / "run", **on(cluster, max_new_tokens=62))
    code, _, err = ended(command(*long, cwd=tmp_path))
    assert code == 2
    assert "no room for 62 new tokens" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "bad.py").write_text(
        "def reward(prompts, completions):\n    return [float('nan')] * len(completions)\n"
    )
    code, _, err = ended(
        command(*audit(policy_folder, "bad:reward", many_prompts, tmp_path / "run", **on(cluster)), cwd=tmp_path)
    )
    assert code == 2
    assert "bad:reward returned nan" in err
    code, _, err = ended(
        command(
            *audit(
                policy_folder, reward_folder, many_prompts, tmp_path / "run", **on(cluster, worker_gpus=1, workers=None)
            ),
            cwd=tmp_path,
        )
    )
    assert code == 2
    assert "no node has room for a worker of 1 CPU, 1 GPU" in err
    nowhere = audit(policy_folder, reward_folder, many_prompts, tmp_path / "run", **on(cluster, storage="nowhere://x"))
    code, _, err = ended(command(*nowhere, cwd=tmp_path))
    assert code == 2
    assert "--storage nowhere://x cannot be used" in err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
def test_no_cluster_at_an_address_is_said_at_once(address: str) -> None:
    # Not below 0, as the errors of those who resolve names are: this is an address.
    with pytest.raises(SettingsError, match=rf"there is no Ray cluster at {re.escape(address)}: \[Errno \d"):
        connect(address)


def test_gpus_are_neither_left_unused_nor_shared_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})

    def check(device: str, **options: Any) -> None:
        models = {"policy": {"model": "p", "device": device}, "reward_model": {"model": "r", "device": device}}
        _check_devices(parse_section(AuditConfig, {**models, "prompts": {"source": "x"}}), RayOptions(**options))

    with pytest.raises(SettingsError, match="the cluster has 2 GPUs: give --worker-gpus 1, or --device cpu"):
        check("auto")
    check("cpu")
    check("auto", gpus=0.5)


def test_a_worker_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    shared = Shared.of(tmp_path / "parts")
    shared.check()
    shared.mark.unlink()  # as on a node with a disk of its own
    with pytest.raises(SettingsError, match=r"does not see .*parts: choose an --out that every node sees, or"):
        shared.check()


def test_nodes_that_share_no_disk_leave_their_parts_in_a_storage(
    cluster: Cluster, policy_folder: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, expected = undisturbed
    (tmp_path / "served").mkdir()
    with ftp(tmp_path / "served") as address:
        options = on(cluster, storage=f"{address}/audits", workers=1)
        settings = audit(policy_folder, "rewards:slow", folder / "prompts.jsonl", tmp_path / "run", **options)
        running = command(*settings, cwd=folder)
        stored = until(lambda: list((tmp_path / "served" / "audits").glob("*/round-000/rewards-*")), 400)
        code, _, err = ended(running)
        assert code == 0, err
    assert stored
    assert not list((tmp_path / "served").rglob("*.parquet"))
    assert same(expected, tables(tmp_path / "run"))


def test_a_benchmark_spreads_its_cells(cluster: Cluster, tmp_path: Path) -> None:
    tiny = Path(__file__).parent.parent / "benchmarks" / "label_efficiency_tiny.yaml"
    less = ["tasks=[helpfulness]", "seeds.confirmation=[0]", "worlds={even: {n_demonstrations: 200, n_pairs: 200}}"]
    less += ["strategies={random_pairs: {}, likelihood_gap: {}}", "policy=null"]
    found = {}
    for name, options in {"here": [], "there": ["--engine", "ray", "--ray-address", cluster.address]}.items():
        changes = [word for change in less for word in ("--set", change)]
        running = command("bench", tiny, "--out", tmp_path / name, "--json", *changes, *options, cwd=tmp_path)
        code, out, err = ended(running)
        assert code == 0, err
        found[name] = json.loads(out)
    assert found["there"]["cells"] == found["here"]["cells"]
    assert found["there"]["baselines"] == found["here"]["baselines"]
