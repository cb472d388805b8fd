"""The policy's training in processes of its own: what they share, what their errors are, and that none is left."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from dissonance.config import PolicyConfig, PolicyTraining, RewardConfig
from dissonance.errors import DissonanceError, ModelError, SettingsError
from dissonance.launch import Request, launch, train
from dissonance.records import Message, Preference, Prompt
from dissonance.sampling import HFPolicy
from waiting import until

TWO = "torchrun --nproc-per-node 2"
RAY = "python -m dissonance.engine.train --workers 2"
ONE = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"


@pytest.fixture
def request_of(policy_folder: Path, reward_folder: Path, tmp_path: Path) -> Callable[..., Request]:
    def make(**changes: Any) -> Request:
        training = PolicyTraining.model_validate(
            {
                "steps": 2,
                "prompts_per_step": 4,
                "n": 2,
                "learning_rate": 1e-3,
                "check_every": 1,
                "check_prompts": 4,
                "max_kl": None,
                "max_length_ratio": None,
                **changes.pop("training", {}),
            }
        )
        return Request(
            **{
                "training": training,
                "start": PolicyConfig(model=str(policy_folder), max_new_tokens=8),
                "reward_model": RewardConfig(model=str(reward_folder)),
                "prompts": [Prompt(f"p{i}", (Message("user", f"w{i} w{2 * i}"),)) for i in range(8)],
                "out": tmp_path / "policy",
                "seed": 3,
                **changes,
            }
        )

    return make


@pytest.mark.parametrize("launcher", [TWO, RAY])
def test_two_processes_share_each_step(
    launcher: str, request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown: list[tuple[int | None, int]] = []

    @contextmanager
    def counted(_: str, total: int | None, __: str) -> Iterator[Callable[[int], None]]:
        yield lambda more: shown.append((total, more))

    found = launch(launcher, request_of(out=Path("policy")), counted)  # as seen from here
    assert {total for total, _ in shown} == {2}
    assert sum(more for _, more in shown) == 2
    assert found["steps"] == found["kept_step"] == found["processes"] == 2
    assert found["start"]["kl"] == 0
    assert len(found["history"]) == 2
    HFPolicy(PolicyConfig(model=str(tmp_path / "policy")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "policy.log"]
    alone = train(request_of(out=tmp_path / "alone"))
    # Both ask the start policy the same; each process draws answers of its own, so that the steps are others.
    assert found["start"] == pytest.approx(alone["start"])
    assert found["history"] != alone["history"]


def test_one_process_of_its_own_comes_to_the_same(request_of: Callable[..., Request], tmp_path: Path) -> None:
    found = launch(ONE, request_of())
    assert found == json.loads(json.dumps(train(request_of(out=tmp_path / "alone"))))


def test_an_error_is_the_one_that_it_would_be_here(request_of: Callable[..., Request], tmp_path: Path) -> None:
    texts = [(f"w{i} w{i + 1}", f"w{i} w{i}") for i in range(30)]
    pairs = [Preference((Message("user", "w1"),), chosen=one, rejected=other) for one, other in texts]
    request = request_of(gold_pairs=[*pairs, *(Preference(p.messages, p.rejected, p.chosen) for p in pairs)])
    with pytest.raises(ModelError) as here:
        train(request)
    with pytest.raises(ModelError) as there:
        launch(TWO, request)
    assert str(there.value) == str(here.value)
    assert "gold" in str(there.value)
    assert [path.name for path in tmp_path.iterdir()] == ["policy.log"]


def test_a_crash_says_where_its_output_is(request_of: Callable[..., Request], tmp_path: Path) -> None:
    with pytest.raises(DissonanceError) as caught:
        launch("sh -c 'echo one two; echo no memory left; exit 3'", request_of())
    assert "ended with 3 and no result" in str(caught.value)
    assert str(tmp_path / "policy.log") in str(caught.value)
    assert "one two | no memory left" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("launcher", ["", "no-such-launcher --x", "python '"])
def test_a_launcher_that_is_none(launcher: str, request_of: Callable[..., Request]) -> None:
    with pytest.raises(SettingsError, match=r"refine\.policy\.launcher"):
        launch(launcher, request_of())


FAILS = """
import os
def reward(prompts, completions):
    if os.environ.get("RANK") == "1":
        raise MemoryError("no room on this device")
    return [0.0 for _ in completions]
"""


def test_a_crash_of_one_process_names_its_cause(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails_module.py").write_text(FAILS)
    with pytest.raises(ModelError, match="fails_module:reward failed: .*no room on this device") as caught:
        launch(TWO, request_of(reward_model=RewardConfig(model="fails_module:reward")))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".policy*"))


def test_an_error_that_nobody_foresaw_names_its_cause_and_its_log(
    request_of: Callable[..., Request], tmp_path: Path
) -> None:
    (tmp_path / "fails.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom dissonance.launch import _answer\n"
        "_answer(Path(sys.argv[3]), OSError('no space\\non device'))\n"
    )
    with pytest.raises(DissonanceError) as caught:
        launch(f"python {tmp_path / 'fails.py'}", request_of())
    assert str(caught.value) == (
        f"the policy's training failed (OSError: no space); all that it printed is in {tmp_path / 'policy.log'}"
    )


def test_processes_that_do_not_know_of_each_other_are_refused(request_of: Callable[..., Request]) -> None:
    """As a launcher starts them that gives no ranks."""
    with pytest.raises(SettingsError, match="do not know of each other"):
        launch(f"""sh -c 'exec 3<&0; {sys.executable} "$@" <&3 & {sys.executable} "$@"; wait' sh""", request_of())


INTERRUPTED = """
import signal, sys
from pathlib import Path
from pydantic import TypeAdapter
from dissonance.launch import Request, launch
signal.signal(signal.SIGINT, signal.default_int_handler)
launch({launcher!r}, TypeAdapter(Request).validate_json(Path({request!r}).read_bytes()))
"""


def trainings(folder: Path) -> list[int]:
    """The processes that were started on a folder: the launcher, and those that it started."""
    name = str(folder / ".policy-").encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are looked for in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_run(request_of: Callable[..., Request], tmp_path: Path, how: signal.Signals) -> None:
    request = request_of(training={"steps": 100_000, "check_every": 100_000})
    (tmp_path / "request").write_bytes(TypeAdapter(Request).dump_json(request))
    script = INTERRUPTED.format(launcher=TWO, request=str(tmp_path / "request"))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)

    def trained() -> bool:
        return any(path.stat().st_size > 0 for path in tmp_path.glob(".policy-*.tmp/steps"))

    try:
        until(trained, 300)
        assert len(trainings(tmp_path)) == 3
        parent.send_signal(how)
        parent.wait(120)
        until(lambda: not trainings(tmp_path))
    finally:
        for left in [parent.pid, *trainings(tmp_path)]:
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
    assert not (tmp_path / "policy").exists()
    assert how == signal.SIGKILL or not list(tmp_path.glob(".policy*"))
