"""The commands that ask and what comes of it: label, invite, revoke, import, export, status."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dissonance.cli.common import Json, Quiet, RunFolder, StoreUrl, progress_of, say
from dissonance.config import RewardConfig, RewardKind, parse_section
from dissonance.errors import DataError, SettingsError
from dissonance.records import Role

app = typer.Typer()

Who = Literal["people", "judge", "gold", "simulated"]
_OPTIONS: dict[str, set[str]] = {
    "people": {
        "host", "port", "login", "https", "gold-questions", "gold-every", "requests", "check", "sample",
        "safety", "guidelines",
    },
    "judge": {
        "endpoint", "model", "api-key-env", "template", "attempts", "concurrency", "max-tokens", "max-tokens-total",
        "max-cost", "price-in", "price-out", "timeout", "safety", "guidelines",
    },
    "gold": {"reward-model", "reward-kind", "tie-margin"},
    "simulated": {
        "reward-model", "reward-kind", "temperature", "flip", "lapse", "position-bias", "tie-band", "seed",
    },
}  # fmt: skip
"""Which options of `label` belong to whom; --as, --overlap and --store are everyone's."""


@app.command()
def label(
    run: RunFolder,
    annotator: Annotated[Who, typer.Option(help="Who answers: people, in the browser, or a model.")] = "people",
    name: Annotated[
        str | None, typer.Option("--as", help="The name the answers stand under; people without --login, or a model.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(min=1, help="Annotators wanted per query; 1 at first.")] = None,
    store: StoreUrl = None,
    guidelines: Annotated[Path | None, typer.Option(help="People, judge: a Markdown file of what counts.")] = None,
    safety: Annotated[
        bool | None,
        typer.Option("--safety/--no-safety", help="People, judge: ratings say safe or unsafe; default: cost models."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="People: where to listen, 127.0.0.1; others need --login.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="People: 8000; 0 takes a free one.")] = None,
    login: Annotated[bool | None, typer.Option("--login", help="People: by personal links of `invite` only.")] = None,
    https: Annotated[
        bool | None, typer.Option("--https", help="People: behind HTTPS; cookies go nowhere else.")
    ] = None,
    gold_questions: Annotated[Path | None, typer.Option(help="People: JSONL of questions of known answer.")] = None,
    gold_every: Annotated[int | None, typer.Option(min=0, help="People: one of those every so many; 10.")] = None,
    requests: Annotated[bool | None, typer.Option("--requests", help="People: a line per request on stderr.")] = None,
    check: Annotated[str | None, typer.Option(help="People: open a sample of this judge's answers to them.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="People: the size of that sample; 50.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Judge: the address, up to and with /v1.")] = None,
    model: Annotated[str | None, typer.Option(help="Judge: the model, as the endpoint calls it.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Judge: the variable that holds the API key.")] = None,
    template: Annotated[Path | None, typer.Option(help="Judge: a Jinja2 file instead of the built-in prompt.")] = None,
    attempts: Annotated[int | None, typer.Option(help="Judge: replies per question before giving up; 3.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Judge: questions at once; 8.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Judge: seconds to wait for a reply; 120.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Judge: of one reply; 512.")] = None,
    max_tokens_total: Annotated[int | None, typer.Option(help="Judge: budget, prompts and replies together.")] = None,
    max_cost: Annotated[float | None, typer.Option(help="Judge: budget, in the currency of the prices.")] = None,
    price_in: Annotated[float | None, typer.Option(help="Judge: per million prompt tokens.")] = None,
    price_out: Annotated[float | None, typer.Option(help="Judge: per million reply tokens.")] = None,
    reward_model: Annotated[
        str | None, typer.Option(help="Gold, simulated: a sequence classifier or module:callable.")
    ] = None,
    reward_kind: Annotated[RewardKind | None, typer.Option(help="Gold, simulated: cost: higher is worse.")] = None,
    tie_margin: Annotated[float | None, typer.Option(help="Gold: rewards no further apart are a tie; 0.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Simulated: Bradley-Terry, in units of reward; 1.")] = None,
    flip: Annotated[float | None, typer.Option(help="Simulated: probability of the opposite answer; 0.")] = None,
    lapse: Annotated[float | None, typer.Option(help="Simulated: probability of a random answer; 0.")] = None,
    position_bias: Annotated[float | None, typer.Option(help="Simulated: log-odds towards the left; 0.")] = None,
    tie_band: Annotated[float | None, typer.Option(help="Simulated: rewards closer than this are a tie; 0.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Simulated, or of --check's sample; 0.")] = None,
    as_json: Json = False,
    silent: Quiet = False,
) -> None:
    """Ask people, in the browser, or a model, what `select` chose. Ends any time; goes on where it was.

    Example: dissonance label run
    """
    given = {n.replace("_", "-"): v for n, v in locals().items() if v is not None}
    _check_options(annotator, given)
    common: dict[str, Any] = {"overlap": overlap, "store": store}
    if annotator == "people":
        _label_people(run, given, common, as_json)
        return
    from dissonance import labelling

    progress = progress_of(silent)
    if annotator == "judge":
        found = labelling.label_by_judge(run, _judge(run, given), **common, progress=progress)
    elif annotator == "gold":
        reward = _reward(given)
        found = labelling.label_by_gold(run, reward, _gold(given, reward), **common, progress=progress)
    else:
        reward = _reward(given)
        found = labelling.label_by_simulated(run, reward, _simulated(given, reward), **common, progress=progress)
    say(found, as_json, _annotated_lines(found))
    if found["stopped"]:
        raise typer.Exit(130 if found["stopped"] == "interrupted" else 1)


def _check_options(annotator: Who, given: dict[str, Any]) -> None:
    allowed = _OPTIONS[annotator] | ({"seed"} if "check" in given else set())
    every = set().union(*_OPTIONS.values())
    wrong = sorted((set(given) & every) - allowed)
    if wrong:
        owners = [who for who, options in _OPTIONS.items() if wrong[0] in options]
        raise SettingsError(f"--{wrong[0]} is for --annotator {' or '.join(owners)}, not {annotator}: leave it out")
    needed = {"judge": ("endpoint", "model"), "gold": ("reward-model",), "simulated": ("reward-model",), "people": ()}
    for option in needed[annotator]:
        if option not in given:
            raise SettingsError(f"--annotator {annotator} needs --{option}")


def _label_people(run: Path, given: dict[str, Any], common: dict[str, Any], as_json: bool) -> None:
    from dissonance import labelling
    from dissonance.feedback.web.settings import LabelSettings

    if "sample" in given and "check" not in given:
        raise SettingsError("--sample is of --check JUDGE: name the judge")
    level = logging.INFO if "requests" in given else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", stream=sys.stderr)
    settings = LabelSettings(
        guidelines=_text(given.get("guidelines"), "--guidelines"),
        login_required=given.get("login", False),
        local_name=given.get("name", "local"),
        ask_safety=given.get("safety", labelling.asks_safety(run)),
        gold_every=given.get("gold-every", 10),
        secure_cookies=given.get("https", False),
    )
    if "check" in given:
        opened = labelling.check_judge(
            run, given["check"], given.get("sample", 50), seed=given.get("seed", 0), store=common["store"]
        )
        print(f"{opened} queries that {given['check']} answered are open to people", file=sys.stderr)

    def ready(url: str, progress: Any) -> None:
        how = "; people sign in by their personal links" if settings.login_required else ""
        waiting = f"{progress.queries - progress.closed:,} of {progress.queries:,} queries are open"
        print(f"labelling at {url}{how}; {waiting}; Ctrl-C ends it", file=sys.stderr, flush=True)

    found = labelling.label(
        run,
        settings=settings,
        host=given.get("host", "127.0.0.1"),
        port=given.get("port", 8000),
        gold=given.get("gold-questions"),
        ready=ready,
        **common,
    )
    say(found, as_json, [f"{found['answered']:,} of {found['wanted']:,} answers are in"])


def _judge(run: Path, given: dict[str, Any]) -> Any:
    from dissonance import labelling
    from dissonance.feedback.annotators.budget import Budget
    from dissonance.feedback.annotators.endpoint import EndpointSettings
    from dissonance.feedback.annotators.judge import JudgeSettings

    endpoint = EndpointSettings(
        model=given["model"], base_url=given["endpoint"], **_named(given, "api-key-env", "timeout", "max-tokens")
    )
    budget = Budget(**_named(given, "max-tokens-total", "max-cost", "price-in", "price-out"))
    template: dict[str, Any] = {"template": _text(given["template"], "--template")} if "template" in given else {}
    return JudgeSettings(
        endpoint=endpoint,
        budget=budget,
        guidelines=_text(given.get("guidelines"), "--guidelines"),
        ask_safety=given.get("safety", labelling.asks_safety(run)),
        **_named(given, "name", "attempts", "concurrency"),
        **template,
    )


def _gold(given: dict[str, Any], reward: RewardConfig) -> Any:
    from dissonance.feedback.annotators.gold import GoldSettings

    return GoldSettings(source=reward.model, kind=reward.kind, **_named(given, "name", "tie-margin"))


def _simulated(given: dict[str, Any], reward: RewardConfig) -> Any:
    from dissonance.feedback.annotators.simulated import SimulatedSettings

    names = ("name", "seed", "temperature", "flip", "lapse", "position-bias", "tie-band")
    return SimulatedSettings(source=reward.model, kind=reward.kind, **_named(given, *names))


def _reward(given: dict[str, Any]) -> RewardConfig:
    return parse_section(RewardConfig, {"model": given["reward-model"], "kind": given.get("reward-kind", "reward")})


def _named(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name.replace("-", "_"): given[name] for name in names if name in given}


def _text(path: Path | None, option: str) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path} cannot be read: {error}") from error


def _annotated_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['annotator']}: {found['answered']:,} answered, {found['left']:,} left"]
    if not (found["answered"] or found["left"]):
        lines.append("every query has as many answers as are wanted: --overlap asks for more")
    if found["stopped"]:
        lines.append(f"stopped: {found['reason']}")
    if (judge := found.get("judge")) is not None:
        tokens = judge["prompt_tokens"] + judge["completion_tokens"]
        lines.append(f"in all: {judge['calls']:,} calls, {tokens:,} tokens, cost {judge['cost']:.4f}")
        if judge["compared"]:
            lines.append(f"the two orders disagreed on {judge['inconsistent']:,} of {judge['compared']:,} questions")
        lines += [f"{count:,} times: {problem}" for problem, count in judge["problems"].items()]
    return lines


@app.command()
def invite(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="Whom.")],
    role: Annotated[
        Role | None, typer.Option(help="A lead sees the overview, and settles disagreements; annotator at first.")
    ] = None,
    days: Annotated[float | None, typer.Option(help="How long the link is good; default: until revoked.")] = None,
    url: Annotated[str, typer.Option(help="The server's address, as people reach it.")] = "http://127.0.0.1:8000",
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Make a personal link for `label --login`. It is shown this once.

    Example: dissonance invite run alice
    """
    from dissonance.labelling import invite as make

    if not url.startswith(("http://", "https://")):
        raise SettingsError(f"--url is {url!r}: write it as https://labels.example.org")
    link = f"{url.rstrip('/')}/join#{make(run, name, role=role, days=days, store=store)}"
    say({"name": name, "link": link}, as_json, [link])


@app.command()
def revoke(
    run: RunFolder,
    name: Annotated[str, typer.Argument(help="Whose.")],
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Revoke every link of a person, and end their sessions.

    Example: dissonance revoke run alice
    """
    from dissonance.labelling import revoke as end

    links = end(run, name, store=store)
    say({"name": name, "revoked": links}, as_json, [f"links revoked: {links}"])


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
    store: StoreUrl = None,
    as_json: Json = False,
) -> None:
    """Write preferences to train on, or questions and labels for another tool.

    Example: dissonance export run --format trl --out preferences.jsonl
    """
    from dissonance.labelling import export_labels, export_pairs

    if file_format == "trl":
        found = export_pairs(
            run, out, method=method or "majority", only=only or (), exclude=exclude or (), ties=bool(ties), store=store
        )
        lines = [*found["explanation"], f"{found['pairs']:,} pairs: {out}"]
        if found["ties_left_out"]:
            lines.insert(-1, f"left out: {found['ties_left_out']:,} ties, which --ties writes too")
        say(found, as_json, lines)
        return
    for option, value in {"method": method, "only": only, "exclude": exclude, "ties": ties}.items():
        if value is not None:
            raise SettingsError(f"--{option} is for --format trl, not {file_format}: leave it out")
    found = export_labels(run, out, file_format, store=store)
    if "labels" in found:
        say(found, as_json, [f"{found['labels']:,} labels: {out}"])
        return
    lines = [f"{name}: {count:,} questions" for name, count in found["files"].items()]
    if found["left_out"]:
        lines.append(f"left out: {found['left_out']:,} labels that the format cannot carry")
    say(found, as_json, [*lines, f"folder: {out}"])


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
