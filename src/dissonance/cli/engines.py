"""Where a command's work runs: the options of every command that can use a cluster."""

from typing import Annotated, Any, Literal

import typer

from dissonance.errors import SettingsError
from dissonance.models import Engine

EngineName = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="Where the work runs: this process, or a Ray cluster.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="A running cluster: auto, or host:6379; default: what RAY_ADDRESS names, else one is started here.",
    ),
]
Workers = Annotated[int | None, typer.Option("--workers", help="Ray actors of a pool, at most; default: all that fit.")]
WorkerCpus = Annotated[float | None, typer.Option("--worker-cpus", help="Cores of each Ray worker; default 1.")]
WorkerGpus = Annotated[float | None, typer.Option("--worker-gpus", help="GPUs of each Ray worker; default 0.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="Where Ray workers leave what is in flight, if nodes share no disk: s3://bucket/folder.",
    ),
]


def ray_options(engine: str, **given: Any) -> Any:
    """What `RayOptions` takes, None for the local engine; an option that needs Ray is a SettingsError without it."""
    named = {name: value for name, value in given.items() if value is not None}
    if engine == "local":
        if named:
            first = next(iter(named))
            option = {"address": "ray-address", "cpus": "worker-cpus", "gpus": "worker-gpus"}.get(first, first)
            raise SettingsError(f"--{option} is for --engine ray: add that, or leave it out")
        return None
    from dissonance.engine.pool import RayOptions

    return RayOptions(**named)


def engine_of(engine: str, **given: Any) -> Engine:
    """The engine that the options name."""
    from dissonance.measuring import LOCAL

    options = ray_options(engine, **given)
    if options is None:
        return LOCAL
    from dissonance.engine.ray import RayEngine

    return RayEngine(options)
