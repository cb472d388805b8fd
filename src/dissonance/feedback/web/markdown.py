"""Markdown that others wrote -> HTML that can do nothing; what could deceive the eye is made visible.

markdown-it-py reads it with raw HTML switched off, and nh3 lets through a short list of tags and no attribute but a
link's address. Images would load from elsewhere and tell who reads what when, so they become links.
"""

import html
import re
from collections.abc import MutableMapping, Sequence
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from markdown_it.utils import OptionsDict

MAX_CHARACTERS = 50_000
MAX_MARKS = 3_000
MAX_CELLS = 20_000

_TAGS = {"a", "blockquote", "br", "code", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "s"}
_TAGS |= {"strong", "table", "tbody", "td", "th", "thead", "tr", "ul"}
_OUTWARD = re.compile(r"(?i:https?://|mailto:)[^\s]")
_MARKS = re.compile(r"[*_~`\[\]<>!&\\|]")


def _visible_characters() -> dict[int, str]:
    pictures = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
    directions = [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    named = {code: f"[U+{code:04X}]" for code in [*range(0x80, 0xA0), *directions]}
    return pictures | {0x7F: "\N{SYMBOL FOR DELETE}"} | named


_VISIBLE = _visible_characters()


def visible(text: str) -> str:
    """The text with control characters and overrides of the writing direction shown instead of obeyed."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


@lru_cache(maxsize=1024)
def render_markdown(text: str) -> str:
    """Render Markdown as safe HTML; a text that is too long or too tangled comes as it is, in <pre>."""
    text = visible(text)
    if _is_simple(text):
        try:
            return _sanitised(str(_parser().render(text)))
        except RecursionError:
            pass
    return f"<pre>{html.escape(text)}</pre>"


def _is_simple(text: str) -> bool:
    # Emphasis and brackets cost a parser more than linear time, and a table makes as many cells of each row as its head
    # has, written or not.
    if len(text) > MAX_CHARACTERS or sum(1 for _ in _MARKS.finditer(text)) > MAX_MARKS:
        return False
    lines = text.split("\n")
    return len(lines) * max(line.count("|") for line in lines) <= MAX_CELLS


def _sanitised(markup: str) -> str:
    return nh3.clean(
        markup,
        tags=_TAGS,
        attributes={"a": {"href"}, "ol": {"start"}, "*": set()},
        attribute_filter=_attribute,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _attribute(tag: str, name: str, value: str) -> str | None:
    # A relative address would lead into this server.
    return None if tag == "a" and name == "href" and not _OUTWARD.match(value) else value


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    # Answers of chat models mean their line breaks. What is nested deeper than maxNesting would be left out, and the
    # annotator would not know: so no such limit, and a text that is too deep for Python comes as it is.
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "maxNesting": 1_000_000})
    parser.enable(["table", "strikethrough"])
    parser.disable("reference")  # it would swallow lines of the answer
    parser.add_render_rule("image", _image_as_link)
    parser.core.ruler.push("name_links", _name_links)
    return parser


def _image_as_link(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: OptionsDict, env: MutableMapping[str, Any]
) -> str:
    source = str(tokens[index].attrs.get("src", ""))
    alt = renderer.renderInlineAsText(tokens[index].children, options, env)
    return f'<a href="{html.escape(source)}">{html.escape(alt.strip() or source)}</a>'


def _name_links(state: StateCore) -> None:
    """Give a link without text its address as text: a screen reader has nothing else to say."""
    for block in state.tokens:
        children: list[Token] = []
        for token in block.children or []:
            if token.type == "link_close" and children and children[-1].type == "link_open":
                children.append(Token("text", "", 0, content=str(children[-1].attrs.get("href", ""))))
            children.append(token)
        if block.children is not None:
            block.children = children
