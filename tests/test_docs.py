"""What the documentation tells people to type is run here, and what it lists is compared with the code."""

import doctest
import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from dissonance.cli import app, run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    language: str
    text: str
    line: int


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [Snippet(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]


def commands(console: str) -> Iterator[tuple[str, str]]:
    """Each command of a console block, with the output that stands under it."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


@pytest.fixture(scope="module")
def workplace(
    make_policy: Callable[..., Path], make_reward_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What the documentation takes for granted: ./policy, ./reference, ./reward and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("documentation")
    for name, model in (("policy", make_policy()), ("reference", make_policy(seed=5)), ("reward", make_reward_model())):
        shutil.copytree(model, folder / name)
    rows = [{"prompt": f"w{i} w{i + 1} w{2 * i}", "category": "even" if i % 2 == 0 else "odd"} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = next(s.text for s in snippets(ROOT / "docs" / "conflicts.md") if s.text.startswith("prompt_id,"))
    (folder / "scored.csv").write_text(scored)
    return folder


AUDIT = "audit --policy ./policy --reward-model ./reward --prompts prompts.jsonl --max-new-tokens 16 --out run --quiet"


WITHOUT_PROGRESS = ("select", "report", "invite", "revoke", "import", "export", "status")
SELECT = "select run --strategy discordant --budget 10"
GOLD = "label run --annotator gold --reward-model ./reward --quiet"
BEFORE = {  # what a page takes to be there
    "select.md": [AUDIT],
    "label.md": [AUDIT, SELECT],
    "annotators.md": [AUDIT, SELECT],
    "quality.md": [AUDIT, SELECT, GOLD, GOLD.replace("gold", "simulated", 1) + " --overlap 2"],
    "exchange.md": [AUDIT, SELECT, GOLD],
}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if {"console", "python"} & {s.language for s in snippets(p)}], ids=lambda p: p.name
)
def test_what_the_page_shows_works(
    page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(workplace, folder)
    monkeypatch.chdir(folder)
    for command in BEFORE.get(page.name, ()):
        assert run(command.split()) == 0
    names = {"__name__": "snippet"}  # a page's later snippets go on from its earlier ones
    for snippet in snippets(page):
        where = f"{page.name}:{snippet.line}"
        if snippet.language == "python":
            exec(compile(snippet.text, where, "exec"), names)  # noqa: S102 - our own documentation
        elif snippet.language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", snippet.text)):
            (folder / named[1]).write_text(snippet.text)
        elif snippet.language == "console":
            for command, expected in commands(snippet.text):
                check_command(where, command, expected, capsys)


def check_command(where: str, command: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = shlex.split(command)
    assert program == "dissonance", f"{where}: a console block runs dissonance; use bash for {command!r}"
    capsys.readouterr()
    code = run([*arguments, *([] if arguments[0] in WITHOUT_PROGRESS else ["--quiet"])])
    shown = capsys.readouterr()
    fails = expected.startswith("dissonance: error:")
    assert code == (2 if fails else 0), f"{where}: {command!r} exits with {code}: {shown.err}"
    if expected:
        printed = shown.err if fails else shown.out
        matches = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
        assert matches, f"{where}: {command!r} prints\n{printed}\nbut the page shows\n{expected}"


def test_the_snippets_of_a_page_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```console\n$ dissonance report run\nreport: ...\n$ dissonance demo\n```\n")
    (snippet,) = snippets(page)
    assert (snippet.language, snippet.line) == ("console", 3)
    assert list(commands(snippet.text)) == [("dissonance report run", "report: ...\n"), ("dissonance demo", "")]


def test_every_page_with_commands_uses_console_blocks() -> None:
    """A command in another kind of block would not be run."""
    for page in PAGES:
        unchecked = [s for s in snippets(page) if s.language != "console" and s.text.startswith("$ ")]
        assert not unchecked, f"{page.name}:{unchecked[0].line}: write ```console"


@pytest.fixture(scope="module")
def reference() -> str:
    text: str = runpy.run_path(str(ROOT / "docs" / "conf.py"))["command_reference"]()
    return text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_an_example_and_all_options(name: str, reference: str) -> None:
    section = reference.partition(f"## dissonance {name}\n")[2].partition("\n## ")[0]
    assert f"Example: dissonance {name} " in section
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")]
    assert options
    missing = [option for option in options if not re.search(rf"{option}\b", section)]
    assert not missing, f"{missing} of {name} are not in the reference"


def test_the_example_of_every_command_can_be_parsed() -> None:
    for name, command in COMMANDS.items():
        text = re.sub(r"\s+", " ", command.help.partition("Example: ")[2])
        program, verb, *arguments = shlex.split(text)
        assert (program, verb) == ("dissonance", name)
        command.make_context(name, arguments)


def test_the_reference_stands_in_the_page() -> None:
    mark = runpy.run_path(str(ROOT / "docs" / "conf.py"))["HELP_MARK"]
    assert mark in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").splitlines()


def declared_dependencies() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    return {re.split(r"[<>=!~\[; ]", name)[0] for name in [*project["dependencies"], *extras]}


def test_every_dependency_has_its_reason() -> None:
    rows = re.findall(
        r"^\| `([\w-]+)` \|.*\w", (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(rows) == sorted(declared_dependencies())


def test_every_dependency_has_its_tested_version() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {re.sub(r"[_.]", "-", line.partition("==")[0]).lower() for line in lines if "==" in line}
    assert declared_dependencies() <= pinned


def test_the_documentation_stands_alone() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\.\./shared|/work/|/tmp/|/root/|DESIGN", text), page.name


def test_the_links_of_the_readme_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        targets = re.findall(r"\]\((?!http|#)([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, f"{name} links to {missing}"
