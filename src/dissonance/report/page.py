"""All parts of the report as one HTML page.

Prompts, answers, categories and ids are hostile input. Jinja2 escapes all text, data for the pictures stands in
`application/json` blocks that cannot end early, and a Content-Security-Policy lets nothing run or load but the two
scripts and the style sheet whose hashes it names: no eval (Vega's expressions are interpreted), no network.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
import vl_convert

from dissonance.artifacts import read_json
from dissonance.errors import RunError
from dissonance.null import SIGNIFICANCE, p_values
from dissonance.report.examples import Case, Extreme, clip, extreme, read_cases
from dissonance.report.figures import Sides, figures
from dissonance.report.headline import headline, number, plural, signed
from dissonance.report.reading import base_name, reading
from dissonance.report.rounds import round_figures
from dissonance.report.statistics import extremes, measure, rows_by_prompt, top_prompts
from dissonance.report.story import read_rounds
from dissonance.report.tables import Booleans, Completions, Floats, Prompts, read_completions, read_prompts
from dissonance.round_sample import sampled

_EXTREMES = 10
_TOP_PROMPTS = 20
_VALUE_CHARACTERS = 400


def render_report(run: Path) -> str:
    """Render the report of a finished run folder.

    Raises:
        RunError: the folder is no run, or the run is not finished.
    """
    ledger, summary = _read_object(run, "run.json"), _read_object(run, "summary.json")
    # `config.yaml` is JSON, and has what a run does after its audit.
    config = _read_object(run, "config.yaml") if (run / "config.yaml").is_file() else None
    with sampled(run / "round-000") as folder:
        return _render(run, folder, ledger, summary, config)


def _render(
    run: Path, folder: Path, ledger: Mapping[str, Any], summary: Mapping[str, Any], config: Mapping[str, Any] | None
) -> str:
    """Render a run with the tables in `folder`, which may be a sample of its own."""
    settings = ledger.get("settings")
    how = reading(settings if isinstance(settings, Mapping) else {})
    prompts, prompt_ids = read_prompts(folder / "prompts.parquet")
    completions = read_completions(folder / "completions.parquet", prompt_ids, how.likelihood)
    measured = measure(prompts, completions)
    found = measured.conflicts
    p = p_values(found.distinct_distance, found.n_distinct)
    proper = ~found.degenerate
    significant = proper & (p < SIGNIFICANCE)
    sides = Sides(proper, significant & (found.distinct_distance > 0.5), significant & (found.distinct_distance < 0.5))
    likes, dislikes, top = _examples(folder, prompts, completions, p, proper)
    rounds, stories = read_rounds(run)
    told = {figure.name: figure for figure in round_figures(rounds)}
    return render_page(
        "report.html",
        title=_title(ledger),
        created=str(ledger.get("created", "")).replace("T", " ").replace("+00:00", " UTC"),
        command=str(ledger.get("command", "audit")),
        sample=_sample(folder, run / "round-000"),
        headline=headline(completions, measured, sides.agreeing, how),
        figures={f.name: f for f in figures(folder, prompts, completions, measured, sides, how)} | told,
        stories=stories,
        told=list(told),
        reading=how,
        likes=likes,
        dislikes=dislikes,
        top=top,
        significance=SIGNIFICANCE,
        sections=_sections(ledger, summary, config),
    )


def _sample(shown: Path, whole: Path) -> str | None:
    """What to say where the page shows a sample."""
    if shown == whole:
        return None
    some, all_of_them = (pq.read_metadata(folder / "prompts.parquet").num_rows for folder in (shown, whole))
    return (
        f"This page shows {some:,} prompts, drawn at random from {all_of_them:,}, with all their answers. The figures "
        "of all prompts are at the end of the page, under Figures."
    )


def _read_object(run: Path, name: str) -> dict[str, Any]:
    if not run.is_dir():
        raise RunError(f"{run} is not a run folder: name the folder that --out gave")
    if not (run / name).is_file():
        raise RunError(f"{run} has no {name}: it is no run folder, or the run is not finished: run its command again")
    return read_json(run / name)


def _examples(
    folder: Path, prompts: Prompts, completions: Completions, p: Floats, proper: Booleans
) -> tuple[list[Extreme], list[Extreme], list[Case]]:
    """Choose the answers with the highest and the lowest PACS, and the prompts with the largest K."""
    rows = np.flatnonzero(proper[completions.prompt])
    likes, dislikes = extremes(completions, rows, _EXTREMES)
    top = top_prompts(prompts, proper, _TOP_PROMPTS)
    groups = rows_by_prompt(completions, [*top, *completions.prompt[[*likes, *dislikes]].tolist()])
    cases = read_cases(folder, prompts, completions, p, groups)
    of = completions.prompt
    return (
        [extreme(cases[int(of[row])], row) for row in likes],
        [extreme(cases[int(of[row])], row) for row in dislikes],
        [cases[row] for row in top],
    )


def _title(ledger: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name the reward model and the policy, where the settings tell them."""
    settings = ledger.get("settings")
    if not isinstance(settings, Mapping):
        return None
    names = [
        str(value.get("model", "")) if isinstance(value, Mapping) else str(value or "")
        for value in (settings.get("reward_model"), settings.get("policy"))
    ]
    return (base_name(names[0]), base_name(names[1])) if all(names) else None


def _sections(
    ledger: Mapping[str, Any], summary: Mapping[str, Any], config: Mapping[str, Any] | None
) -> dict[str, list[tuple[str, str]]]:
    """List what the page ends with: settings, versions and the run's own figures, as (name, value)."""
    sections = {
        "Settings": config or ledger.get("settings"),
        "Inputs": ledger.get("inputs"),
        "Versions": ledger.get("versions"),
        "Figures": summary,
    }
    return {title: _flat(value) for title, value in sections.items() if isinstance(value, Mapping) and value}


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            rows += _flat(entry, f"{prefix}{key}.")
        else:
            text = entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)
            rows.append((clip(f"{prefix}{key}", _VALUE_CHARACTERS), clip(text, _VALUE_CHARACTERS)))
    return rows


def render_page(template: str, **context: Any) -> str:
    """Fill in a template; `figures` must be among the context."""
    templates = files("dissonance.report") / "templates"
    style = (templates / "report.css").read_text(encoding="utf-8")
    scripts = [_vega(), (templates / "report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dissonance.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"signed": signed, "number": number, "plural": plural, "script_json": script_json}
    return environment.get_template(template).render(
        context, policy=_content_policy(style, scripts), style=style, scripts=scripts
    )


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; making it takes two seconds."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle


def _content_policy(style: str, scripts: list[str]) -> str:
    """Forbid everything but these very texts; Trusted Types stop writing HTML from scripts where browsers know them."""
    hashes = " ".join(_digest(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src {_digest(style)}; base-uri 'none'; form-action 'none';"
        " require-trusted-types-for 'script'; trusted-types default"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def script_json(value: object) -> str:
    """Write JSON that may stand inside a <script> element: nothing in it can close the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
