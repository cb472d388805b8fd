"""A launcher on Ray Train: `refine.policy.launcher: "python -m dissonance.engine.train --workers 8 --gpus 1"`.

It is to a Ray cluster what `accelerate launch` is to one machine: it runs `-m MODULE ARGUMENTS` in so many workers,
each of which knows its rank. Every node must see the run folder.
"""

import argparse
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

from dissonance.engine.pool import RayOptions, connect, last_line, tokens, workers_of
from dissonance.engine.processes import end_with_input
from dissonance.errors import DissonanceError, SettingsError


def main() -> None:
    """Run a module in Ray Train's workers; the exit code is 1 when it failed in one."""
    parser = argparse.ArgumentParser(prog="python -m dissonance.engine.train", description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="processes in all")
    parser.add_argument("--cpus", type=float, default=1.0, help="cores of each")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs of each")
    parser.add_argument("--ray-address", default=os.environ.get("RAY_ADDRESS"), help="of a running cluster")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, required=True, help="the module, its arguments")
    arguments = parser.parse_args()
    if not arguments.module:
        parser.error("-m takes a module and its arguments")
    end_with_input()
    try:
        connect(arguments.ray_address)
        _train(arguments)
    except DissonanceError as error:
        sys.exit(f"dissonance: {error}")


def _train(arguments: argparse.Namespace) -> None:
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    room = workers_of(RayOptions(cpus=arguments.cpus, gpus=arguments.gpus))
    if room < arguments.workers:
        raise SettingsError(f"the cluster has room for {room} such workers, not for {arguments.workers}")
    resources = {"CPU": arguments.cpus, **({"GPU": arguments.gpus} if arguments.gpus else {})}
    scaling = ScalingConfig(num_workers=arguments.workers, use_gpu=arguments.gpus > 0, resources_per_worker=resources)
    module, *its = arguments.module
    with tempfile.TemporaryDirectory(prefix="dissonance-") as notes:  # Ray Train's own; ours are in the run folder
        trainer = TorchTrainer(
            _work,
            train_loop_config={"module": module, "arguments": its, "folder": str(Path.cwd()), "environment": tokens()},
            scaling_config=scaling,
            run_config=RunConfig(storage_path=notes),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise DissonanceError(f"{module} failed on a worker: {last_line(error)}") from error


def _work(config: dict[str, Any]) -> None:
    """In each worker: what `python -m MODULE ARGUMENTS` does."""
    # The module ends when its standard input does: here Ray ends it, and nothing is ever read.
    reading, _ = os.pipe()
    os.dup2(reading, 0)
    os.chdir(config["folder"])  # Ray Train has each worker stand in a folder of its own
    os.environ.update(config["environment"])
    sys.argv = [config["module"], *config["arguments"]]
    try:
        runpy.run_module(config["module"], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"{config['module']} ended with {ended.code}") from ended


if __name__ == "__main__":
    main()
