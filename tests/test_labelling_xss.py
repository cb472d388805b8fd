"""Hostile text wherever people or models can put text: in a real browser, none of it runs, loads, leads or deceives."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request

import dissonance.feedback.web.views as views_module
from dissonance.feedback.web.settings import LabelSettings
from dissonance.records import Answer, Message, Question
from labelling_site import Visit, chromium, make_question, serving, visiting

PAYLOADS: list[str] = json.loads((Path(__file__).parent / "xss_payloads.json").read_text(encoding="utf-8"))
NAMES = [name for name in PAYLOADS if name.isprintable() and len(name) <= 200 and name == name.strip()]

# What a payload would call, and everything else that a script could do to be noticed.
_TRAP = """
window.__ran = [];
window.__xss = (what) => { window.__ran.push(String(what)); };
for (const name of ["alert", "confirm", "prompt", "open"]) window[name] = () => window.__ran.push(name);
"""
_FOREIGN = """() => [...document.querySelectorAll(
    "[hx-disable] *, .who *, #live bdi *, .answers bdi *")].flatMap((element) => {
  const name = element.localName;
  const bad = ["script", "style", "iframe", "object", "embed", "img", "svg", "math", "form", "input", "button", "link",
    "meta", "base", "template", "video", "audio", "image", "textarea", "select", "dialog"].includes(name);
  const attributes = [...element.attributes].map((a) => a.name);
  const allowed = {a: ["href", "rel", "target"], ol: ["start"]}[name] ?? [];
  const own = ["class", "tabindex"];
  const strange = attributes.filter((a) => !allowed.includes(a) && !(own.includes(a)));
  const leads = name === "a" && element.hasAttribute("href") && !/^(https?|mailto):$/.test(element.protocol);
  const inward = name === "a" && element.origin === location.origin;
  return bad || strange.length || leads || inward ? [element.outerHTML.slice(0, 200)] : [];
})"""


def test_the_corpus_is_large_and_each_payload_another() -> None:
    assert len(PAYLOADS) == len(set(PAYLOADS)) >= 60
    assert len(NAMES) >= 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


def hostile_questions() -> list[Question]:
    """Every payload as a prompt, a system turn, a tool's turn, a completion, and a category."""
    questions = []
    for start in range(0, len(PAYLOADS), 8):
        some = PAYLOADS[start : start + 8]
        messages = [Message("system", "\n\n".join(some)), *(Message("tool", text) for text in some)]
        messages += [Message("user", text) for text in some]
        number = len(questions)
        kind = ("pairwise", "ranking")[number % 2]
        texts = some[:2] if kind == "pairwise" else some
        question = make_question(number, kind, texts=texts, messages=messages, prompt_id=some[0].replace("\0", ""))  # type: ignore[arg-type]
        fields = {name: getattr(question, name) for name in question.__slots__}
        questions.append(Question(**fields | {"category": some[-1].replace("\0", "")}))
    alone = [make_question(1000 + i, "rating", texts=[text]) for i, text in enumerate(PAYLOADS)]
    return questions + alone


class Attack:
    """Watches a browser for anything that a payload achieves."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.achieved: list[str] = []
        visit.context.add_init_script(_TRAP)
        visit.context.on("request", self._on_request)
        visit.context.on("page", lambda page: self.achieved.append(f"opened {page.url}"))
        visit.page.on("dialog", lambda dialog: (self.achieved.append(f"dialog {dialog.message}"), dialog.dismiss()))
        visit.page.on("framenavigated", lambda frame: self._on_navigated(frame.url))

    def _on_request(self, request: Request) -> None:
        if not request.url.startswith(self.visit.site.url):
            self.achieved.append(f"request {request.url}")
        if request.url.endswith(("/leave", "/x")):
            self.achieved.append(f"request {request.url}")

    def _on_navigated(self, url: str) -> None:
        if not url.startswith((self.visit.site.url, "about:blank")):
            self.achieved.append(f"navigated to {url}")

    def look(self) -> None:
        """Do what a person does to texts: point at them, focus them; then say what came of it."""
        page = self.visit.page
        page.evaluate("""() => {
          for (const element of document.querySelectorAll("[hx-disable] *, bdi *")) {
            for (const type of ["pointerover", "mouseover", "mouseenter", "focusin", "focus"])
              element.dispatchEvent(new Event(type, {bubbles: true}));
            if (element.localName !== "a" && element.localName !== "summary") element.click?.();
          }
        }""")
        self.achieved += [f"ran {what}" for what in page.evaluate("window.__ran")]
        self.achieved += [f"foreign {what}" for what in page.evaluate(_FOREIGN)]


def label_and_look(visit: Visit, attack: Attack, answers: dict[str, Callable[[Page], None]], count: int) -> None:
    """Answer question after question, looking at each in every view."""
    for _ in range(count):
        visit.question()
        query_id = visit.query_id()
        views = [
            ("e", ""),
            ("r", "[data-raw]"),
            ("r", ""),
            ("Shift+D", "[data-diff]"),
            ("Shift+D", ":not([data-diff])"),
        ]
        for key, shown in views:
            visit.page.keyboard.press(key)
            visit.wait(f"#question{shown}")  # differences come from the server
            attack.look()
        answers[query_id.split("/")[0]](visit.page)
        visit.next_question(query_id)


def test_nothing_runs_on_the_labelling_page(browser: Browser, tmp_path: Path) -> None:
    questions = [question for question in hostile_questions() if question.kind != "rating"]
    settings = LabelSettings(guidelines="\n\n".join(PAYLOADS), local_name=NAMES[0], gold_every=0)
    answers: dict[str, Callable[[Page], None]] = {
        "pairwise": lambda page: page.keyboard.press("1"),
        "ranking": lambda page: page.keyboard.press("s"),
    }
    with serving(tmp_path / "labels.db", questions, settings) as site, visiting(browser, site) as visit:
        attack = Attack(visit)
        visit.open()
        visit.page.keyboard.press("g")
        label_and_look(visit, attack, answers, len(questions))
        assert attack.achieved == []
        assert len(site.store.labels()) == len(questions)


def test_every_payload_alone(browser: Browser, tmp_path: Path) -> None:
    """One after another in one page: none can hide behind another's broken markup."""
    questions = [question for question in hostile_questions() if question.kind == "rating"]
    with serving(tmp_path / "labels.db", questions) as site, visiting(browser, site) as visit:
        attack = Attack(visit)
        visit.open()
        for question in questions:
            path = f"/overview/queries/{question.query_id}"
            html = visit.page.evaluate("(path) => fetch(path).then((reply) => reply.text())", path)
            visit.page.evaluate(
                """(html) => {
                  const task = new DOMParser().parseFromString(html, "text/html").querySelector("#task").innerHTML;
                  htmx.swap("#task", task, {swapStyle: "innerHTML", swapDelay: 0, settleDelay: 0});
                }""",
                html,
            )
            attack.look()
            shown = visit.page.locator(".card .raw").evaluate("text => text.textContent")
            assert readable(shown) == readable(question.completions[0])
        assert attack.achieved == []


def readable(text: str) -> str:
    """Text without what the page makes visible instead of obeying it."""
    text = re.sub(r"\[U\+[0-9A-F]{4}\]|[\u2400-\u2421]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


def test_nothing_runs_on_the_overview_and_the_query_pages(browser: Browser, tmp_path: Path) -> None:
    questions = [question for question in hostile_questions() if question.kind == "pairwise"]
    with serving(tmp_path / "labels.db", questions, overlap=len(NAMES)) as site:
        for i, name in enumerate(NAMES):
            person = site.store.annotator(name)
            for j, question in enumerate(questions):
                if j == i % len(questions) or i < 2:
                    answer = Answer("first" if i % 2 else "second")
                    note = PAYLOADS[(i + j) % len(PAYLOADS)].replace("\0", "")
                    site.store.record(
                        person.annotator_id, question.query_id, answer, key=f"{i}-{j}", note=note, flagged=True
                    )
        with visiting(browser, site) as visit:
            attack = Attack(visit)
            for page in ("/overview", *(f"/overview/queries/{question.query_id}" for question in questions)):
                visit.open(page)
                attack.look()
            visit.open("/overview")
            with visit.page.expect_response("**/overview/live"):
                pass
            visit.page.wait_for_function("document.querySelector('#live .tiles') !== null")
            attack.look()
            assert attack.achieved == []
            assert visit.page.locator("#people tbody tr").count() == len(NAMES)


@pytest.mark.parametrize("policy", ["with the policy", "without"])
def test_the_trap_catches_what_is_not_sanitised(
    policy: str, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof that the tests above can fail: with Markdown let through as it is, the same look finds it."""
    monkeypatch.setattr(views_module, "render_markdown", lambda text: text)
    questions = [make_question(0, "rating", texts=["<img src=x onerror=window.__xss('caught')>"])]
    context: dict[str, Any] = {"bypass_csp": policy == "without"}
    with (
        serving(tmp_path / "labels.db", questions) as site,
        visiting(browser, site, excused=("404", "CSP", "Content Security Policy", "__xss"), **context) as visit,
    ):
        attack = Attack(visit)
        visit.open()
        visit.question()
        attack.look()
        assert any(what.startswith("foreign <img") for what in attack.achieved)
        assert ("ran caught" in attack.achieved) == (policy == "without")
