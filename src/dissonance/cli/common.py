"""What every command shares: options, and how a result is said."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dissonance.progress import ProgressFactory, console, quiet

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Out = Annotated[Path, typer.Option("--out", help="The run folder: made anew, or gone on with.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="DISSONANCE_STORE",
        show_envvar=True,
        help="Where the labels are: postgresql://user@host/database, or a file; default RUN/labels.db.",
    ),
]


def progress_of(silent: bool) -> ProgressFactory:
    """Progress on stderr, or none."""
    return quiet if silent else console


def say(summary: Mapping[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a result: one JSON object, or lines for people."""
    print(json.dumps(summary, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))
