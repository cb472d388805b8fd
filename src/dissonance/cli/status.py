"""The command that says how far a run is: status."""

from typing import Any

import typer

from dissonance.cli.common import Json, RunFolder, StoreUrl, say

app = typer.Typer()


@app.command()
def status(run: RunFolder, store: StoreUrl = None, as_json: Json = False) -> None:
    """Show how far a run is, how far the asking, and how well annotators agree.

    Example: dissonance status run
    """
    from dissonance.labelling import status as state_of

    found = state_of(run, store=store)
    lines = [f"{name}: done {finished}" for name, finished in found["stages"].items() if name != "label"]
    lines += _label_lines(found["labels"])
    if found["unasked"]:
        lines.append(f"selected since, and not asked yet: {found['unasked']:,}; `dissonance label` asks them")
    say(found, as_json, lines)


def _label_lines(labels: dict[str, Any] | None) -> list[str]:
    if labels is None:
        return ["nobody has been asked yet: `dissonance label`"]
    progress = labels["progress"]
    answers = f"answers: {progress['answered']:,} of {progress['wanted']:,}"
    lines = [f"queries: {progress['closed']:,} of {progress['queries']:,} answered; {answers}"]
    for kind, agreement in labels["agreement"].items():
        alpha = agreement["alpha"]
        said = (
            agreement["reason"] if alpha is None else f"{alpha['mean']:.2f} ({alpha['low']:.2f} to {alpha['high']:.2f})"
        )
        lines.append(f"Krippendorff's alpha, {kind}: {said}")
    lines += [_annotator_line(annotator) for annotator in labels["annotators"]]
    counts = {
        "disagreements to settle": labels["n_unsettled"],
        "flags and notes": labels["n_remarks"],
        "prompts whose preferences run in a circle": len(labels["conflicts"]["cyclic"]),
    }
    return lines + [f"{what}: {count:,}" for what, count in counts.items() if count]


def _annotator_line(annotator: dict[str, Any]) -> str:
    parts = [f"{annotator['answers']:,} answers"]
    if annotator["kind"] == "person" and annotator["per_hour"] is not None:
        parts.append(f"{annotator['per_hour']:,.0f} an hour")
    for key, what in {
        "left_share": "left is better",
        "gold_accuracy": "known answers right",
        "majority_agreement": "agrees with the others",
    }.items():
        if (share := annotator[key]) is not None:
            parts.append(f"{what} {share['mean']:.0%} ({share['low']:.0%} to {share['high']:.0%})")
    return f"{annotator['name']}: {', '.join(parts)}"
