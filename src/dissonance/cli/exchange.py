"""The commands that take labels in and give them out: import, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dissonance.cli.common import Json, RunFolder, StoreUrl, say
from dissonance.errors import SettingsError

app = typer.Typer()


@app.command("import")
def import_(
    run: RunFolder,
    file: Annotated[Path, typer.Argument(help="TRL preferences, an Argilla or Label Studio export, or CSV.")],
    file_format: Annotated[
        Literal["trl", "argilla", "label-studio", "csv"] | None,
        typer.Option("--format", help="What it is; by default its content says."),
    ] = None,
    name: Annotated[str | None, typer.Option("--as", help="Whose labels these are, whoever the file names.")] = None,
    predictions: Annotated[bool, typer.Option("--predictions", help="Also take models' suggestions.")] = False,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="Leave out what this run has not asked.")
    ] = False,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Take in labels that were made elsewhere. The same file twice adds nothing.

    Example: dissonance import run project-1.json
    """
    from dissonance.labelling import import_labels

    found = import_labels(
        run,
        file,
        file_format=file_format,
        annotator=name,
        predictions=predictions,
        skip_unknown=skip_unknown,
        store=store,
    )
    lines = [f"{found['format']}: {found['added']:,} of {found['labels']:,} labels added"]
    notes = {
        "corrected": "corrected what their annotators had said before",
        "already": "were there",
        "superseded": "were there, and their annotators have said something else since",
        "unknown": "about questions that this run has not asked",
        "unfinished": "drafts, left out",
        "by_models": "by models, left out: --predictions takes them",
    }
    say(found, as_json, lines + [f"{found[key]:,} {what}" for key, what in notes.items() if found[key]])


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option("--out", help="A file (trl: .jsonl or .parquet; csv), else a new folder.")],
    file_format: Annotated[
        Literal["trl", "argilla", "label-studio", "csv"], typer.Option("--format", help="For which tool.")
    ] = "trl",
    method: Annotated[
        Literal["majority", "dawid_skene", "dgr"] | None, typer.Option(help="trl: how labels become pairs; majority.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="trl: count this annotator, or kind (judge), alone.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="trl: do not count this annotator or kind.")] = None,
    ties: Annotated[bool | None, typer.Option("--ties", help="trl: also ties, in a column tie.")] = None,
    round_number: Annotated[
        int | None, typer.Option("--round", min=0, help="Of which round; by default of all.")
    ] = None,
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Write preferences to train on, or questions and labels for another tool.

    Example: dissonance export run --format trl --out preferences.jsonl
    """
    from dissonance.labelling import export_labels, export_pairs

    if file_format == "trl":
        found = export_pairs(
            run,
            out,
            method=method or "majority",
            only=only or (),
            exclude=exclude or (),
            ties=bool(ties),
            round_number=round_number,
            store=store,
        )
        lines = [*found["explanation"], f"{found['pairs']:,} pairs: {out}"]
        if found["ties_left_out"]:
            lines.insert(-1, f"left out: {found['ties_left_out']:,} ties, which --ties writes too")
        say(found, as_json, lines)
        return
    for option, value in {"method": method, "only": only, "exclude": exclude, "ties": ties}.items():
        if value is not None:
            raise SettingsError(f"--{option} is for --format trl, not {file_format}: leave it out")
    found = export_labels(run, out, file_format, round_number=round_number, store=store)
    if "labels" in found:
        say(found, as_json, [f"{found['labels']:,} labels: {out}"])
        return
    lines = [f"{name}: {count:,} questions" for name, count in found["files"].items()]
    if found["left_out"]:
        lines.append(f"left out: {found['left_out']:,} labels that the format cannot carry")
    say(found, as_json, [*lines, f"folder: {out}"])
