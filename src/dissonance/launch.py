"""The policy's training in several processes: a launcher starts them, this process watches.

    this process                                  each process of the launcher
    request  ----------------------------------->  refine_policy
    progress <- a byte for each step -----------   the first of them
    metrics, or the error <- answer.json --------  the first of them

A launcher is anything that runs `-m MODULE ARGUMENTS` in every process, tells each its rank as PyTorch expects it, and
lets it read our standard input: `accelerate launch`, `torchrun`.
"""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from typing import Any

from pydantic import TypeAdapter

from dissonance import errors
from dissonance.artifacts import read_json, write_json
from dissonance.config import PolicyConfig, PolicyTraining, RewardConfig, Tracker
from dissonance.engine.processes import end_with_input
from dissonance.errors import DissonanceError, SettingsError
from dissonance.progress import Advance, ProgressFactory, quiet
from dissonance.records import Completion, Preference, Prompt

_LOOK_EVERY = 0.2
_PATIENCE = 90.0
"""Seconds until a launcher that was told to end is killed; torchrun gives its processes 30."""
_WAIT = 7200.0
"""Seconds that one process waits for another, which may be writing a large policy."""
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


_JSON = TypeAdapter(Request)


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
        (folder / "request.json").write_bytes(_JSON.dump_json(request))
        (folder / "steps").touch()
        try:
            with log.open("wb") as printed, _started(launcher, folder, printed) as process:
                _watch(process, folder, request.training, progress)
        finally:
            # The workplaces of processes that could not remove theirs.
            for left in request.out.parent.glob(f".{request.out.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        answer = _answered(folder)
        if not answer:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_SHOWN:]
            raise DissonanceError(
                f"refine.policy.launcher: {launcher!r} ended with {process.returncode} and no result (it must run `-m "
                f"MODULE ARGUMENTS` in each process); all that it printed is in {log}: {' | '.join(last)}"
            )
    if "error" in answer:
        kind = getattr(errors, answer["error"], None)
        if kind is None:
            said = f"{answer['error']}: {answer['message']}"
            raise DissonanceError(f"the policy's training failed ({said}); all that it printed is in {log}")
        raise kind(answer["message"])
    if not request.out.is_dir():
        raise DissonanceError(
            f"refine.policy.launcher: {launcher!r} left no {request.out}: do all nodes see that folder?"
        )
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


def _watch(process: Popen[bytes], folder: Path, training: PolicyTraining, progress: ProgressFactory) -> None:
    """Return when the launcher has ended, or one of its processes has failed: the others may wait for it for hours."""
    with progress(f"{training.method}: training the policy", training.steps, "steps") as advance:
        seen = 0
        while True:
            ended = process.poll() is not None or "error" in _answered(folder)
            now = (folder / "steps").stat().st_size
            advance(now - seen)
            seen = now
            if ended:
                return
            time.sleep(_LOOK_EVERY)


def _answered(folder: Path) -> dict[str, Any]:
    """`metrics`, or `error` and `message`; nothing as yet where there is no answer."""
    path = folder / "answer.json"
    return read_json(path) if path.is_file() else {}


def work(folder: Path) -> int:
    """What each process does; gives its exit code."""
    import torch
    from accelerate import PartialState

    from dissonance.huggingface import resolve_device

    end_with_input()
    request = _JSON.validate_json((folder / "request.json").read_bytes())
    # First of all, so that every model is loaded onto the process's own device.
    wait = timedelta(seconds=request.training.trl_arguments.get("ddp_timeout", _WAIT))
    state = PartialState(cpu=resolve_device(request.start.device).type == "cpu", timeout=wait)
    try:
        if state.is_main_process:
            _only_one(folder)
        metrics = train(request, _to(folder / "steps") if state.is_main_process else quiet)
    except Exception as error:
        _answer(folder, error)  # the launcher stops all when the first has ended
        if isinstance(error, DissonanceError):
            return 1
        raise
    if state.is_main_process and not _answered(folder):
        write_json(folder / "answer.json", {"metrics": metrics})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _only_one(folder: Path) -> None:
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        raise SettingsError(
            "refine.policy.launcher: its processes do not know of each other, and each would train by itself: start "
            "them with torchrun or accelerate launch"
        ) from None


def _answer(folder: Path, error: Exception) -> None:
    """Leave the error as the answer; the first one stands."""
    if _answered(folder):
        return
    message = str(error).strip().partition("\n")[0]
    write_json(folder / "answer.json", {"error": type(error).__name__, "message": message})


def _to(steps: Path) -> ProgressFactory:
    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        del label, total, unit
        with steps.open("ab", buffering=0) as written:

            def advance(done: int) -> None:
                written.write(b"." * done)

            yield advance

    return progress


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
