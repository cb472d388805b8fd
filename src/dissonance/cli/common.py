"""What every command shares: options, and how a result is said."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dissonance.errors import DataError, SettingsError
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

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as refine.policy.steps=200; repeatable."),
]


def progress_of(silent: bool) -> ProgressFactory:
    """Progress on stderr, or none."""
    return quiet if silent else console


def say(summary: Mapping[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print a result: one JSON object, or lines for people."""
    print(json.dumps(summary, ensure_ascii=False, allow_nan=False) if as_json else "\n".join(lines))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings; a file that holds none is a DataError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no settings: write `name: value`, as docs/run.md shows")
    return found


def changed(settings: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply what --set says; what is no KEY=VALUE is a SettingsError."""
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not all(parts := key.split(".")):
            raise SettingsError(f"--set {change!r}: write KEY=VALUE, such as rounds.most=2")
        section = settings
        for part in parts[:-1]:
            section[part] = dict(section.get(part) or {}) if isinstance(section.get(part) or {}, Mapping) else {}
            section = section[part]
        try:
            section[parts[-1]] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {change!r}: the value is no YAML") from error
    return settings


def said(interval: Mapping[str, float | None] | None) -> str:
    """An estimate with its interval, for people."""
    if interval is None:
        return "unknown"
    ends = "" if interval["low"] is None else f" ({interval['low']:.3f} to {interval['high']:.3f})"
    return f"{interval['mean']:.3f}{ends}"
