"""What the templates show: a question as one annotator sees it; nothing of rewards, likelihoods or models.

Every `html` is sanitised and goes into the page as it is; every `raw` is plain text, for the template to escape.
"""

import difflib
import html
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from dissonance.feedback.web.markdown import render_markdown, visible
from dissonance.records import QueryKind, Question

LONG_CHARACTERS = 1200
LONG_LINES = 20
_DIFF_WORDS = 3000
_DIFF_PAIRS = 50_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation."""

    role: str
    html: str
    raw: str


@dataclass(frozen=True, slots=True)
class Option:
    """One completion."""

    letter: str
    """A, B, ... from left to right."""
    completion_id: int
    html: str
    raw: str
    diff_html: str | None
    """How the words differ from option A: escaped text with <ins> and <del>; None for A, and where it is not known."""
    long: bool
    """Whether to fold it."""


@dataclass(frozen=True, slots=True)
class PersonProgress:
    """How far one person is."""

    done: int
    """Questions answered or skipped."""
    left: int | None
    """Questions this person could still be asked, as things stand."""
    per_hour: float | None
    """The pace of the latest answers; breaks do not count."""


@dataclass(frozen=True, slots=True)
class QuestionView:
    """A question on the page."""

    query_id: str
    kind: QueryKind
    key: str
    """The idempotency key to send the answer with."""
    shown: str
    """completion_ids from left to right: "3,1"."""
    turns: tuple[Turn, ...]
    options: tuple[Option, ...]
    progress: PersonProgress
    ask_safety: bool = False
    chosen: Mapping[str, str] = field(default_factory=dict)
    """The form's values (choice, rating, safe, ranks) of the answer that is being corrected."""
    note: str = ""
    flagged: bool = False
    correcting: bool = False
    previous_before: int | None = None
    """`before` for the next step back; None steps back to the latest answer."""


def question_view(
    question: Question, shown: tuple[int, ...], key: str, progress: PersonProgress, *, ask_safety: bool
) -> QuestionView:
    """Show a question with its completions in the order of `shown`."""
    texts = dict(zip(question.completion_ids, question.completions, strict=True))
    first = texts[shown[0]]
    options = tuple(
        Option(
            letter=_letter(place),
            completion_id=completion_id,
            html=render_markdown(texts[completion_id]),
            raw=visible(texts[completion_id]),
            diff_html=word_difference(first, texts[completion_id]) if place else None,
            long=is_long(texts[completion_id]),
        )
        for place, completion_id in enumerate(shown)
    )
    return QuestionView(
        query_id=question.query_id,
        kind=question.kind,
        key=key,
        shown=",".join(map(str, shown)),
        turns=tuple(Turn(m.role, render_markdown(m.content), visible(m.content)) for m in question.messages),
        options=options,
        progress=progress,
        ask_safety=ask_safety and question.kind == "rating",
    )


def is_long(text: str) -> bool:
    """Whether a text fills more than about one screen."""
    return len(text) > LONG_CHARACTERS or text.count("\n") >= LONG_LINES


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else _letter(place // 26 - 1) + _letter(place % 26)


@lru_cache(maxsize=2048)
def word_difference(old: str, new: str) -> str | None:
    """`new` as escaped text, <del> around words that only `old` has and <ins> around those that only `new` has.

    None where comparing them would take too long.
    """
    before, after = (re.findall(r"\S+\s*|\s+", visible(text)) for text in (old, new))
    counts = Counter(after)
    # difflib looks at every pair of equal words, more than once when they repeat.
    if max(len(before), len(after)) > _DIFF_WORDS or sum(counts[word] for word in before) > _DIFF_PAIRS:
        return None
    parts = []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        removed, added = html.escape("".join(before[i1:i2])), html.escape("".join(after[j1:j2]))
        if tag == "equal":
            parts.append(added)
            continue
        parts.append(f"<del>{removed}</del>" if removed else "")
        parts.append(f"<ins>{added}</ins>" if added else "")
    return "".join(parts)
