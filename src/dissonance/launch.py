"""The policy's training in several processes: a launcher starts them, this process watches.

    this process                                  each process of the launcher
    request  ----------------------------------->  refine_policy
    progress <- a byte for each step -----------   the first of them
    metrics, or the error <- answer.json --------  the first of them

A launcher is anything that runs `-m MODULE ARGUMENTS` in every process: `accelerate launch`, `torchrun`, `srun python`.
"""

import os
import pickle
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from typing import Any

from dissonance import errors
from dissonance.artifacts import read_json, write_json
from dissonance.config import PolicyConfig, PolicyTraining, RewardConfig, Tracker
from dissonance.errors import DissonanceError, SettingsError
from dissonance.progress import Advance, ProgressFactory, quiet
from dissonance.records import Completion, Preference, Prompt

_LOOK_EVERY, _PATIENCE = 0.2, 20.0
_SHOWN = 3
"""Lines of a crashed launcher's output that the error repeats."""


@dataclass(frozen=True)
class Request:
    """What `refine_policy` is called with, in every process."""

    training: PolicyTraining
    start: PolicyConfig
    reward_model: RewardConfig
    prompts: Sequence[Prompt]
    out: Path
    seed: int
    gold_pairs: Sequence[Preference] | None = None
    completions: Sequence[Completion] | None = None
    trackers: Sequence[Tracker] = ()


def train(request: Request, progress: ProgressFactory = quiet) -> dict[str, Any]:
    """Train a policy in this process; as `refine_policy`."""
    from dissonance.refine.policy import refine_policy
    from dissonance.rewards import load_reward_model

    return refine_policy(
        request.training,
        request.start,
        load_reward_model(request.reward_model),
        request.prompts,
        request.out,
        seed=request.seed,
        progress=progress,
        gold_pairs=request.gold_pairs,
        completions=request.completions,
        trackers=request.trackers,
    )


def launch(launcher: str, request: Request, progress: ProgressFactory = quiet) -> dict[str, Any]:
    """Train a policy under a launcher; the processes end when this one does, however it ends.

    What they print goes to a `.log` beside the folder that they leave.

    Args:
        launcher: its command, such as "accelerate launch --config_file fsdp.yaml".
        request: what to train.
        progress: opens the progress of the training.

    Returns:
        What `refine_policy` returns.

    Raises:
        InputError: as `refine_policy` and `command_of`.
        DissonanceError: the processes ended without a result.
    """
    log = request.out.with_name(f"{request.out.name}.log")
    with tempfile.TemporaryDirectory(prefix=f".{request.out.name}-", suffix=".tmp", dir=request.out.parent) as name:
        folder = Path(name)
        (folder / "request").write_bytes(pickle.dumps(request))
        (folder / "steps").touch()
        with log.open("wb") as printed, _started(launcher, folder, printed) as process:
            _watch(process, folder / "steps", request.training, progress)
        if not (folder / "answer.json").is_file():
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_SHOWN:]
            raise DissonanceError(
                f"refine.policy.launcher: {launcher!r} ended with {process.returncode} and no result; all that it "
                f"printed is in {log}: {' | '.join(last)}"
            )
        answer = read_json(folder / "answer.json")
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return dict(answer["metrics"])


def command_of(launcher: str) -> list[str]:
    """A launcher's words, the first of them found: on the path, or beside this Python.

    Raises:
        SettingsError: it is no command, or there is no such program.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise SettingsError(f"refine.policy.launcher: {launcher!r} is no command: {error}") from error
    here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    found = shutil.which(words[0], path=here) if words else None
    if found is None:
        raise SettingsError(f"refine.policy.launcher: {launcher!r}: there is no program of that name")
    return [found, *words[1:]]


@contextmanager
def _started(launcher: str, folder: Path, printed: Any) -> Iterator[Popen[bytes]]:
    """The launcher; its processes hold the other end of a pipe, and so see this one end."""
    process = Popen([*command_of(launcher), "-m", __name__, str(folder)], stdin=PIPE, stdout=printed, stderr=STDOUT)
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(_PATIENCE)
        except TimeoutExpired:
            process.kill()
            process.wait()


def _watch(process: Popen[bytes], steps: Path, training: PolicyTraining, progress: ProgressFactory) -> None:
    with progress(f"{training.method}: training the policy", training.steps, "steps") as advance:
        seen = 0
        while True:
            ended = process.poll() is not None
            now = steps.stat().st_size
            advance(now - seen)
            seen = now
            if ended:
                return
            time.sleep(_LOOK_EVERY)


def work(folder: Path) -> int:
    """What each process does; gives its exit code."""
    import torch
    from accelerate import PartialState

    from dissonance.huggingface import resolve_device

    threading.Thread(target=_end_with_parent, daemon=True).start()
    request: Request = pickle.loads((folder / "request").read_bytes())  # noqa: S301 - our own, in a folder of our own
    # First of all, so that every model is loaded onto the process's own device.
    state = PartialState(cpu=resolve_device(request.start.device).type == "cpu")
    try:
        metrics = train(request, _to(folder / "steps") if state.is_main_process else quiet)
    except DissonanceError as error:  # in every process alike; the launcher stops all when the first has ended
        write_json(folder / "answer.json", {"error": type(error).__name__, "message": str(error)})
        return 1
    if state.is_main_process:
        write_json(folder / "answer.json", {"metrics": metrics})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _to(steps: Path) -> ProgressFactory:
    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        del label, total, unit
        with steps.open("ab", buffering=0) as written:

            def advance(done: int) -> None:
                written.write(b"." * done)

            yield advance

    return progress


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock Python wants when it ends
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
