"""What the templates show: a question as one annotator sees it; nothing of rewards, likelihoods or models.

Every `html` is sanitised and goes into the page as it is; every `raw` is plain text, for the template to escape.
"""

import difflib
import html
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Literal

from dissonance.feedback.blind import letter
from dissonance.feedback.web.markdown import render_markdown, visible
from dissonance.records import QueryKind, Question

LONG_CHARACTERS = 1200
LONG_LINES = 20
BRIEF_CHARACTERS = 180
BRIEF_LINES = 5
_DIFF_WORDS = 3000
_DIFF_PAIRS = 50_000


Fold = Literal["", "brief", "long"]
"""Whether to fold a text: not, only where the page is narrow, or everywhere."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the conversation."""

    role: str
    html: str
    raw: str
    fold: Fold


@dataclass(frozen=True, slots=True)
class Option:
    """One completion."""

    letter: str
    """A, B, ... from left to right."""
    completion_id: int
    """For the lead's pages only."""
    html: str
    raw: str
    fold: Fold


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

    handle: str
    """What the form calls it, which tells nothing of it; its query_id is nowhere."""
    kind: QueryKind
    key: str
    """The idempotency key to send the answer with."""
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
    """Show a question, under the handle that stands in the place of its query_id, in the order of `shown`."""
    texts = dict(zip(question.completion_ids, question.completions, strict=True))
    options = tuple(
        Option(
            letter=letter(place),
            completion_id=completion_id,
            html=render_markdown(texts[completion_id]),
            raw=visible(texts[completion_id]),
            fold="long" if is_long(texts[completion_id]) else "",
        )
        for place, completion_id in enumerate(shown)
    )
    return QuestionView(
        handle=question.query_id,
        kind=question.kind,
        key=key,
        turns=tuple(
            Turn(m.role, render_markdown(m.content), visible(m.content), _fold_of_turn(m.content))
            for m in question.messages
        ),
        options=options,
        progress=progress,
        ask_safety=ask_safety and question.kind == "rating",
    )


def _fold_of_turn(text: str) -> Fold:
    if is_long(text):
        return "long"
    return "brief" if len(text) > BRIEF_CHARACTERS or text.count("\n") >= BRIEF_LINES else ""


def is_long(text: str) -> bool:
    """Whether a text fills more than about one screen."""
    return len(text) > LONG_CHARACTERS or text.count("\n") >= LONG_LINES


def differences(question: Question, shown: tuple[int, ...]) -> tuple[str | None, ...]:
    """The texts in the order of `shown`, escaped, with <mark> around words that stand in one of them alone.

    Each is compared with the first, and the first with all others: what is marked in it stands in none of them. None
    where comparing takes too long; for the first, where no comparison was made.
    """
    texts = dict(zip(question.completion_ids, question.completions, strict=True))
    first, *others = (_words(texts[completion_id]) for completion_id in shown)
    alone: frozenset[int] | None = None
    marked: list[str | None] = []
    for other in others:
        found = _alone(_bare(first), _bare(other))
        if found is not None:
            alone = found[0] if alone is None else alone & found[0]
        marked.append(None if found is None else _marked(other, found[1]))
    return (None if alone is None else _marked(first, alone), *marked)


def _words(text: str) -> list[str]:
    """The words of a text, each with the white space behind it; what stands before the first is by itself."""
    return re.findall(r"\S+\s*|\s+", visible(text))


def _bare(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(word.rstrip() for word in words)


@lru_cache(maxsize=256)
def _alone(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[frozenset[int], frozenset[int]] | None:
    """Which words of two texts have no partner in the other; None where finding out would take too long."""
    counts = Counter(right)
    # difflib looks at every pair of equal words, more than once when they repeat.
    if max(len(left), len(right)) > _DIFF_WORDS or sum(counts[word] for word in left) > _DIFF_PAIRS:
        return None
    blocks = difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    paired = [(block.a + i, block.b + i) for block in blocks for i in range(block.size)]
    return (
        frozenset(range(len(left))) - {a for a, _ in paired},
        frozenset(range(len(right))) - {b for _, b in paired},
    )


def _marked(words: Sequence[str], alone: Collection[int]) -> str:
    parts = []
    for is_alone, run in groupby(range(len(words)), key=lambda i: i in alone and bool(words[i].strip())):
        text = "".join(words[i] for i in run)
        bare = text.rstrip()
        space = text[len(bare) :]
        parts.append(f"<mark>{html.escape(bare)}</mark>{space}" if is_alone else html.escape(text))
    return "".join(parts)
