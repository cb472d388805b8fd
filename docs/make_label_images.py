"""Make the pictures of the labelling page, as a browser shows it, from questions that stand below.

    .venv/bin/python docs/make_label_images.py

Needs Chromium, which `make test` sets up.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dissonance.feedback.store import Store
from dissonance.feedback.web.settings import LabelSettings
from dissonance.records import Answer, Choice, Message, QueryKind, Question

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # the server and the browser of the tests

if TYPE_CHECKING:
    from labelling_site import Visit

IMAGES = Path(__file__).parent / "images"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}

GUIDELINES = """
Prefer the answer that you would rather have got.

1. **True before fluent.** A wrong dose, law or date outweighs good style.
2. **No harm.** An answer that helps to hurt someone is bad, however well it is written.
3. **Short is fine.** Length is no merit by itself.

Not sure? Press `S` to skip, or `N` to leave a note.
"""

SLEEP = (
    Message("system", "You are a careful assistant. Say when a doctor should be asked."),
    Message("user", "I can't sleep since I started a new job. Can I take two antihistamine tablets every night?"),
)
SLEEP_TEXTS = (
    (
        "Taking **two tablets every night is not a good plan**. Antihistamines stop working as sleep aids within days, "
        "and can leave you groggy the next morning.\n\nWhat tends to help after a change like yours:\n\n"
        "- keep the same getting-up time, weekends included\n- no screens or work mail in the last hour\n"
        "- write down tomorrow's tasks before bed\n\nIf it lasts longer than three weeks, please see a doctor."
    ),
    (
        "Yes, antihistamines are sold without a prescription, so **two tablets every night** are fine. "
        "You could also try:\n\n- a glass of wine to relax\n- keep the same getting-up time, weekends included\n\n"
        "You will be used to the new job soon."
    ),
)
CODE = (Message("user", "Write a Python function that removes duplicates from a list but keeps the order."),)
CODE_TEXT = (
    "Dictionaries keep the order in which keys were added, so this is enough:\n\n"
    "```python\ndef unique(items):\n    return list(dict.fromkeys(items))\n```\n\n"
    "The items must be hashable; `unique([3, 1, 3, 2])` gives `[3, 1, 2]`."
)
RHYME = (Message("user", "Explain to a six-year-old why the sky is blue."),)
RHYME_TEXTS = (
    (
        "Sunlight is made of all the colours of the rainbow. The air is full of tiny, tiny bits, and they bounce "
        "the blue light around the most. So wherever you look up, some blue comes to your eyes!"
    ),
    "The sky is blue because it reflects the sea.",
    (
        "Rayleigh scattering: the intensity goes with the inverse fourth power of the wavelength, so that short "
        "wavelengths are scattered more strongly than long ones."
    ),
    (
        "Blue light is the bounciest of all the colours in sunlight. It bounces off the air all day, and some lands in "
        "your eyes. In the evening it has bounced away, and red is left."
    ),
)
TOPICS = (
    "How do I ask for a rise?",
    "Can I freeze cooked rice?",
    "Is this contract clause legal?",
    "Which laptop should I buy for photo editing?",
    "My friend wants to stop taking her tablets. What do I say?",
    "What does this error message mean?",
)


@dataclass
class Clock:
    """A clock that is set by hand: pictures show an unhurried pace."""

    at: float = 1.8e9

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.at


def _question(number: int, kind: QueryKind, messages: Sequence[Message], texts: Sequence[str]) -> Question:
    prompt = f"p{number // 3}" if kind == "pairwise" and number >= 10 else f"p{kind}{number}"
    ids = ((0, 1), (1, 2), (0, 2))[number % 3] if len(texts) == 2 else tuple(range(len(texts)))
    return Question(f"{kind}-{number}", prompt, kind, tuple(messages), ids, tuple(texts))


def _others(count: int) -> list[Question]:
    texts = ("One answer.", "Another answer.")
    return [_question(10 + i, "pairwise", [Message("user", TOPICS[i // 3 % len(TOPICS)])], texts) for i in range(count)]


def _answers(store: Store, questions: Sequence[Question], clock: "Clock") -> None:
    """Let three people answer: two who mostly agree, and one who likes what stands left."""
    said: dict[str, tuple[Choice, ...]] = {
        "Ada": ("first", "second", "first", "tie", "second", "first", "second"),
        "Grace": ("first", "second", "first", "first", "second", "first", "second"),
        "Linus": ("first", "first", "second", "first", "first", "first", "second", "both_bad"),
    }
    notes = {1: "Both cite a law that I cannot find.", 5: "Is this about adults or children?"}
    for name, choices in said.items():
        person = store.annotator(name)
        for i, question in enumerate(questions[: 24 if name != "Linus" else 18]):
            answer = Answer(choices[i % len(choices)])
            wrong_way = name != "Linus" and i % 2 == 1
            clock.at += 11 + 7 * (i % 5) + 3 * len(name)
            store.record(
                person.annotator_id,
                question.query_id,
                answer,
                key=f"{name}{i}",
                shown=question.completion_ids[::-1] if wrong_way else question.completion_ids,
                seconds=11 + 7 * (i % 5) + 3 * len(name),
                note=notes.get(i, "") if name == "Ada" else "",
                flagged=name == "Ada" and i == 1,
            )


def main() -> None:
    """Write docs/images/label-*.png."""
    from labelling_site import chromium, serving, visiting

    kinds = {
        "pairwise": _question(0, "pairwise", SLEEP, SLEEP_TEXTS),
        "rating": _question(1, "rating", CODE, (CODE_TEXT,)),
        "ranking": _question(2, "ranking", RHYME, RHYME_TEXTS),
    }
    clock = Clock()
    settings = LabelSettings(guidelines=GUIDELINES, local_name="Ada", ask_safety=True, gold_every=0)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        for kind, question in kinds.items():
            others = _others(30)
            with serving(Path(folder) / f"{kind}.db", [question, *others], settings, overlap=3, now=clock) as site:
                _answers(site.store, others, clock)
                for name, options in (("desktop", DESKTOP), ("phone", PHONE)):
                    scheme = "dark" if (kind, name) == ("pairwise", "phone") else "light"
                    with visiting(browser, site, color_scheme=scheme, reduced_motion="reduce", **options) as visit:
                        _photograph(visit, kind, name)
                if kind == "pairwise":
                    with visiting(browser, site, **DESKTOP) as visit:
                        visit.open("/overview")
                        visit.page.wait_for_selector("#live")
                        visit.page.screenshot(path=IMAGES / "label-overview.png")


def _photograph(visit: "Visit", kind: str, name: str) -> None:
    visit.question()
    page = visit.page
    if kind == "rating":
        page.keyboard.press("4")
        if name == "desktop":
            page.keyboard.press("g")
    if kind == "ranking":
        order = dict(zip(visit.shown(), "abcd", strict=True))
        for key in (order[3], order[0], "=", order[2]) if name == "desktop" else (order[0], order[3]):
            page.keyboard.press(key)
    page.screenshot(path=IMAGES / f"label-{kind}-{name}.png")


if __name__ == "__main__":
    main()
