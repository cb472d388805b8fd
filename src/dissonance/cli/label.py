"""The commands that ask: label, invite, revoke."""

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dissonance.cli.common import Json, Quiet, RunFolder, StoreUrl, progress_of, say
from dissonance.config import RewardConfig, RewardKind
from dissonance.errors import DataError, SettingsError
from dissonance.records import Role
from dissonance.sections import parse_section

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
_SETTINGS = {
    name.replace("-", "_"): f"--{name}"
    for name in (
        "api-key-env", "attempts", "concurrency", "flip", "gold-every", "lapse", "max-cost", "max-tokens",
        "max-tokens-total", "position-bias", "price-in", "price-out", "temperature", "tie-band", "tie-margin",
        "timeout",
    )
} | {"base_url": "--endpoint"}  # fmt: skip
"""What errors call a setting -> the option it was given by."""


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
        with _options_named():
            _label_people(run, given, common, as_json)
        return
    from dissonance import labelling

    common["progress"] = progress_of(silent)
    with _options_named():
        if annotator == "judge":
            found = labelling.label_by_judge(run, _judge(run, given), **common)
        else:
            reward = _reward(given)
            settings = (_gold if annotator == "gold" else _simulated)(given, reward)
            found = labelling.label_by_rewards(run, reward, settings, **common)
    say(found, as_json, _annotated_lines(found))
    if found["stopped"]:
        raise typer.Exit(130 if found["stopped"] == "interrupted" else 1)


@contextmanager
def _options_named() -> Iterator[None]:
    """Name options in errors as they were typed, rather than the settings they become; what is quoted stays."""
    try:
        yield
    except SettingsError as error:
        found = re.sub(r"(?<!\w)'[^']*'|(?<![-\w])\w+", lambda word: _SETTINGS.get(word[0], word[0]), str(error))
        raise SettingsError(found) from error


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

    def ready(found: labelling.Ready) -> None:
        how = "; people sign in by their personal links" if settings.login_required else ""
        open_ones = found.progress.queries - found.progress.closed
        waiting = f"{open_ones:,} of {found.progress.queries:,} queries are open"
        lines = [*found.notes, f"labelling at {found.url}{how}; {waiting}; Ctrl-C ends it"]
        print("\n".join(lines), file=sys.stderr, flush=True)

    found = labelling.label(
        run,
        settings=settings,
        host=given.get("host", "127.0.0.1"),
        port=given.get("port", 8000),
        gold=given.get("gold-questions"),
        check=labelling.Check(given["check"], **_named(given, "sample", "seed")) if "check" in given else None,
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
