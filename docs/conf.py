"""Sphinx settings: `make check` builds with warnings as errors and every reference resolved, without a network."""

import re
from typing import Any

import typer
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from typer.main import get_command

import dissonance.cli
from dissonance import __version__
from dissonance.cli import app as command_line

project = "dissonance"
author = "The dissonance developers"
copyright = "The dissonance developers, Apache-2.0"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "dissonance"
html_math_renderer = "mathml"
default_role = "code"

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# What the annotations name, and stands in the documentation of others.
nitpick_ignore_regex = [
    ("py:.*", r"(pathlib|numpy|np|pa|pyarrow|collections|annotated_types|types|dissonance\.progress)\..*"),
    ("py:.*", r"ArrayLike|NDArray"),
    # How pydantic and dataclasses spell a field's type.
    ("py:.*", r"typing\.(Annotated|Literal)\[.*|dict\[str|dataclasses\.InitVar|dissonance\.sections\.Settings"),
]

HELP_WIDTH = 100
HELP_MARK = "<!-- help -->"
HIDDEN_COLON = "\ue000"


def help_text(name: str | None) -> str:
    """What `dissonance NAME --help` prints; None for `dissonance --help`."""
    group: Any = get_command(command_line)
    context = typer.Context(group, info_name="dissonance", terminal_width=HELP_WIDTH, max_content_width=HELP_WIDTH)
    if name is None:
        return str(group.get_help(context))
    command = group.commands[name]
    return str(command.get_help(type(context)(command, parent=context, info_name=name)))


def command_reference() -> str:
    """Build the sections of the command reference, in the order of `dissonance --help`, in Markdown."""
    names: list[str] = list(get_command(command_line).commands)  # type: ignore[attr-defined]
    sections = [f"## dissonance {name}\n\n```text\n{help_text(name)}\n```" for name in names]
    return "\n\n".join([f"```text\n{help_text(None)}\n```", *sections])


def insert_help(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the help of every command where cli.md asks for it."""
    if docname == "cli":
        app.env.note_dependency(str(dissonance.cli.__file__))
        source[0] = source[0].replace(HELP_MARK, command_reference())


def escape_bars(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Keep reStructuredText from reading |PACS| as a substitution."""
    lines[:] = [re.sub(r"(`[^`]*`)|\|", lambda found: found[1] or r"\|", line) for line in lines]


def hide_colons(_app: Sphinx, what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Keep napoleon from reading what stands before the colon in a field's docstring as its type."""
    if what in {"attribute", "property"}:
        lines[:] = [line.replace(":", HIDDEN_COLON) for line in lines]


def show_colons(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Undo `hide_colons`, after napoleon."""
    lines[:] = [line.replace(HIDDEN_COLON, ":") for line in lines]


def inline_math(translator: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers draw themselves: MathJax would come from a network."""
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(translator: Any, node: nodes.math_block) -> None:
    """Write a displayed formula likewise."""
    translator.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def shorten_types(
    _app: Sphinx, _what: str, _name: str, _obj: object, _options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Write NumPy's types by their usual names, and leave out pydantic's bounds."""

    def short(text: str) -> str:
        text = re.sub(r"~numpy\._typing\._array_like\._Buffer \|.*? \| bytes \| str\]", "ArrayLike", text)
        text = re.sub(
            r"~numpy\.ndarray\[tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[([^]]*)\]\]", r"NDArray[\1]", text
        )
        return re.sub(r"~types\.Annotated\[([^,]*), [^]]*\]", r"\1", text)

    return signature and short(signature), returns and short(returns)


def setup(app: Sphinx) -> None:
    """Connect the functions above; napoleon's priority is 500."""
    analyzer = ModuleAnalyzer.for_module("dissonance.conflict")
    analyzer.analyze()
    analyzer.overloads.clear()  # autodoc would print them with NumPy's types in full, whatever signature it is given
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.connect("source-read", insert_help)
    app.connect("autodoc-process-signature", shorten_types)
    app.connect("autodoc-process-docstring", hide_colons, priority=100)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("autodoc-process-docstring", show_colons, priority=900)
