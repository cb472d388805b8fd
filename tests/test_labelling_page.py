"""The labelling page in a real browser, over a real server: what people press is what the store holds."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect

from dissonance.feedback.access import invite
from dissonance.feedback.store import Store
from dissonance.feedback.web.settings import LabelSettings
from dissonance.records import Answer, Label, Message, QueryKind, Question
from labelling_site import ServerProcess, Site, Visit, chromium, make_question, serving, visiting

KINDS: tuple[QueryKind, ...] = ("pairwise", "rating", "ranking")
PHONE = {"viewport": {"width": 360, "height": 780}, "has_touch": True, "is_mobile": True}
GUIDED = LabelSettings(guidelines="# Be kind\n\nAnd [read](https://example.org) this.", ask_safety=True, gold_every=0)
UNREACHABLE = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE", "503", "ERR_FAILED", "htmx:")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def three(browser: Browser, tmp_path: Path) -> Iterator[Visit]:
    """A visit of a site that asks three comparisons."""
    with (
        serving(tmp_path / "labels.db", [make_question(i) for i in range(3)]) as site,
        visiting(browser, site) as visit,
    ):
        visit.question("pairwise/0")
        yield visit


def only(store: Store) -> Label:
    (label,) = store.labels()
    return label


# -- by keyboard -------------------------------------------------------------------------------------------------------


def press_choice(visit: Visit, number: int, question: Question) -> Answer:
    keys = {
        "left": ("1", "a", "ArrowLeft", "A"),
        "right": ("2", "b", "ArrowRight", "B"),
        "tie": ("3", "t"),
        "both_bad": ("4", "x"),
        "skip": ("s",),
    }
    presses = [(choice, key) for choice, names in keys.items() for key in names if key not in {"A", "B"}]
    choice, key = presses[number % len(presses)]
    shown = visit.shown()
    visit.page.keyboard.press(key)
    if choice == "skip":
        return Answer()
    if choice in {"tie", "both_bad"}:
        return Answer("tie" if choice == "tie" else "both_bad")
    meant = shown[0 if choice == "left" else 1]
    return Answer("first" if meant == question.completion_ids[0] else "second")


def press_rating(visit: Visit, number: int, question: Question) -> Answer:
    if number % 11 == 10:
        visit.page.keyboard.press("s")
        return Answer()
    rating, safe = number % 5 + 1, number % 3 == 0
    keys = [str(rating), "y" if safe else "n"]
    if number % 14 == 13:  # a change of mind before the second part
        visit.page.keyboard.press(str((rating + 1) % 5 + 1))
    for key in keys if number % 2 else keys[::-1]:
        visit.page.keyboard.press(key)
    return Answer(rating=rating, safe=safe)


def press_ranking(visit: Visit, number: int, question: Question) -> Answer:
    if number % 10 == 9:
        visit.page.keyboard.press("s")
        return Answer()
    rng = random.Random(number)
    shown = visit.shown()
    order = rng.sample(range(4), 4)
    ties = [False, *(rng.random() < 0.3 for _ in range(3))]
    picks = 4 if ties[3] or number % 2 else 3  # the one that is left over comes last
    for n, (place, tied) in enumerate(zip(order[:picks], ties, strict=False)):
        if rng.random() < 0.2:  # a slip, taken back
            visit.page.keyboard.press("abcd"[order[picks - 1]])
            visit.page.keyboard.press("Backspace")
        visit.page.keyboard.press("abcd"[place] if rng.random() < 0.5 else "1234"[place])
        if tied and n:
            visit.page.keyboard.press("=")
    visit.page.keyboard.press("Enter")
    ranks = dict(zip((shown[place] for place in order), itertools.accumulate(1 - tied for tied in ties), strict=True))
    return Answer(ranks=tuple(ranks[i] for i in question.completion_ids))


PRESS: dict[QueryKind, Callable[[Visit, int, Question], Answer]] = {
    "pairwise": press_choice,
    "rating": press_rating,
    "ranking": press_ranking,
}


@pytest.mark.parametrize("kind", KINDS)
def test_thirty_questions_by_keyboard_alone(kind: QueryKind, browser: Browser, tmp_path: Path) -> None:
    questions = {question.query_id: question for question in (make_question(i, kind) for i in range(30))}
    settings = LabelSettings(ask_safety=True, gold_every=0)
    said: dict[str, tuple[Answer, tuple[int, ...]]] = {}
    with serving(tmp_path / "labels.db", [*questions.values()], settings) as site, visiting(browser, site) as visit:
        visit.question()
        query_id = visit.query_id()
        for number in range(30):
            shown = tuple(visit.shown())
            said[query_id] = (PRESS[kind](visit, number, questions[query_id]), shown)
            query_id = visit.next_question(query_id)
        assert query_id == ""
        expect(visit.page.locator("h1")).to_have_text("All done. Thank you.")
        labels = site.store.labels()
    assert {label.query_id: (label.answer, label.shown) for label in labels} == said
    assert len(labels) == 30
    assert all(label.seconds is not None and label.seconds > 0.2 for label in labels)
    if kind != "rating":
        in_order = {questions[query_id].completion_ids == shown for query_id, (_, shown) in said.items()}
        assert in_order == {True, False} if kind == "pairwise" else False in in_order


@pytest.mark.parametrize("undo", ["u", "Control+z"])
def test_undo_shows_the_answer_and_a_new_one_corrects_it(undo: str, three: Visit) -> None:
    page, store = three.page, three.site.store
    shown = three.shown()
    page.keyboard.press("1")
    three.question("pairwise/1")
    page.keyboard.press(undo)
    three.question("pairwise/0")
    assert three.shown() == shown
    expect(page.locator("[data-chosen]")).to_contain_text("A is better, your answer so far")
    expect(page.locator(".correcting")).to_be_visible()
    page.keyboard.press("2")
    three.question("pairwise/1")
    first, second = store.labels(current=False)
    assert (first.answer.choice, second.answer.choice) in {("first", "second"), ("second", "first")}
    assert second.supersedes == first.label_id
    assert store.labels() == [second]


def test_undo_goes_further_back_and_can_be_left(three: Visit) -> None:
    page = three.page
    for number in (0, 1):
        three.question(f"pairwise/{number}")
        page.keyboard.press("3")
    three.question("pairwise/2")
    page.keyboard.press("u")
    three.question("pairwise/1")
    page.keyboard.press("u")
    three.question("pairwise/0")
    page.keyboard.press("Escape")
    three.question("pairwise/2")
    assert len(three.site.store.labels(current=False)) == 2


@pytest.mark.parametrize(
    ("kind", "keys", "filled"),
    [("rating", "4y", ["4", "yes"]), ("ranking", ["b", "a", "=", "d", "c", "Enter"], ["1,1,3,2", "B = A > D > C"])],
)
def test_undo_fills_in_ratings_and_rankings(
    kind: QueryKind, keys: list[str], filled: list[str], browser: Browser, tmp_path: Path
) -> None:
    settings = LabelSettings(ask_safety=True, gold_every=0)
    questions = [make_question(i, kind) for i in range(2)]
    with serving(tmp_path / "labels.db", questions, settings) as site, visiting(browser, site) as visit:
        visit.question(f"{kind}/0")
        for key in keys:
            visit.page.keyboard.press(key)
        visit.question(f"{kind}/1")
        visit.page.keyboard.press("u")
        visit.question(f"{kind}/0")
        if kind == "rating":
            fields = [visit.page.locator(f"[name={name}][type=hidden]") for name in ("rating", "safe")]
            assert [value.input_value() for value in fields] == filled
        else:
            assert visit.page.locator("[name=ranks][type=hidden]").input_value() == filled[0]
            assert visit.page.locator("[data-order]").inner_text() in {filled[1], "A = B > D > C"}
        visit.page.keyboard.press("Enter")  # as it is
        visit.question(f"{kind}/1")
        before, after = site.store.labels(current=False)
        assert before.answer == after.answer


def test_a_note_takes_every_key_and_is_stored_with_the_flag(three: Visit) -> None:
    page = three.page
    page.keyboard.press("n")
    expect(page.locator("#note")).to_be_focused()
    page.keyboard.type("1 a b s x? u\nboth lie")
    page.keyboard.press("Escape")
    page.keyboard.press("f")
    page.keyboard.press("2")
    three.question("pairwise/1")
    label = only(three.site.store)
    assert (label.note, label.flagged, label.query_id) == ("1 a b s x? u\nboth lie", True, "pairwise/0")
    expect(page.locator(".note")).to_be_hidden()
    page.keyboard.press("u")
    three.question("pairwise/0")
    expect(page.locator("#note")).to_have_value("1 a b s x? u\nboth lie")
    expect(page.locator("[name=flagged]")).to_be_checked()


def test_keys_with_modifiers_are_the_browsers_and_held_keys_count_once(three: Visit) -> None:
    page = three.page
    for key in ("Control+b", "Alt+1", "Meta+a", "Control+s"):
        page.keyboard.press(key)
    page.keyboard.down("1")
    three.question("pairwise/1")
    page.keyboard.down("1")  # a key held down repeats
    page.keyboard.up("1")
    page.evaluate("new Promise(requestAnimationFrame)")
    assert three.query_id() == "pairwise/1"
    assert only(three.site.store).query_id == "pairwise/0"


def test_keys_can_be_switched_off_for_good(three: Visit) -> None:
    page = three.page
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("1")  # behind the dialog, nothing is answered
    page.locator("[data-act=keys]").uncheck()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.reload()
    three.question("pairwise/0")
    page.keyboard.press("1")
    page.locator(".choice.right").click()
    three.question("pairwise/1")
    assert only(three.site.store).shown[1] == only(three.site.store).shown[-1]
    expect(page.locator(".choice kbd").first).to_be_hidden()


def test_letters_of_another_script_answer_by_their_place(three: Visit) -> None:
    key = '{key: "\\u0435", code: "KeyT", bubbles: true}'  # what a Russian keyboard writes where a Latin one has T
    three.page.evaluate(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {key}))")
    three.question("pairwise/1")
    assert only(three.site.store).answer == Answer("tie")


def test_an_unfinished_answer_stays_and_says_what_is_missing(browser: Browser, tmp_path: Path) -> None:
    settings = LabelSettings(ask_safety=True, gold_every=0)
    questions = [make_question(0, "rating"), make_question(1, "ranking")]
    with serving(tmp_path / "labels.db", questions, settings) as site, visiting(browser, site) as visit:
        visit.question("rating/0")
        visit.page.keyboard.press("3")
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator("#hint")).to_have_text("Still to say: safe or unsafe.")
        visit.page.keyboard.press("y")
        visit.question("ranking/1")
        visit.page.keyboard.press("c")
        visit.page.keyboard.press("Enter")
        expect(visit.page.locator("#hint")).to_have_text("Still to rank: A, B, D.")
        assert len(site.store.labels()) == 1


# -- by mouse and touch ------------------------------------------------------------------------------------------------


def test_ranking_by_touch(browser: Browser, tmp_path: Path) -> None:
    question = make_question(0, "ranking")
    with serving(tmp_path / "labels.db", [question]) as site, visiting(browser, site, **PHONE) as visit:
        visit.question()
        shown = visit.shown()

        def tap(letter: str, act: str) -> None:
            visit.page.locator(f"[data-option={letter}] [data-act={act}]").tap()

        for letter in "DABC":
            tap(letter, "pick")
        tap("B", "up")  # D B A C
        tap("D", "down")  # B D A C
        tap("C", "out")
        tap("C", "pick")
        tap("A", "level")  # B > D = A > C
        expect(visit.page.locator("[data-order]")).to_have_text("B > D = A > C")
        visit.page.locator("[data-send]").tap()
        visit.wait("#done")
        ranks = dict(zip(shown, (2, 1, 3, 2), strict=True))
        assert only(site.store).answer.ranks == tuple(ranks[i] for i in question.completion_ids)


def held_back(page: Page) -> list[Route]:
    """The requests with answers, from now on: none gets through."""
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/answers", hold)
    return held


def let_go(visit: Visit, held: Sequence[Route]) -> None:
    """The first of them, once it has come."""
    visit.until(lambda: bool(held))
    held[0].continue_()


@pytest.mark.parametrize("press", ["keys", "clicks"])
def test_a_double_press_answers_once(press: str, three: Visit) -> None:
    page, held = three.page, held_back(three.page)  # until the second press, however slow it is
    if press == "keys":
        page.keyboard.press("1")
        page.keyboard.press("1")
    else:
        page.locator(".choice.left").dblclick()
    let_go(three, held)
    three.question("pairwise/1")
    assert len(held) == 1
    assert only(three.site.store).query_id == "pairwise/0"


def test_a_press_right_after_the_question_came_was_meant_for_the_one_before(three: Visit) -> None:
    three.page.evaluate("""() => {
      const press = () => document.querySelector(".choice.left").click();
      new MutationObserver(() => setTimeout(() => { press(); window.pressed = true; }, 100))
        .observe(document.querySelector("#task"), {childList: true});
    }""")
    three.page.keyboard.press("1")
    three.question("pairwise/1")
    assert three.page.evaluate("window.pressed")
    assert len(three.site.store.labels()) == 1


def test_presses_while_an_answer_is_under_way_are_not_for_the_next_question(three: Visit) -> None:
    held = held_back(three.page)
    for key in "1234us":
        three.page.keyboard.press(key)
    expect(three.page.locator("#question")).to_have_attribute("data-state", "sending")
    let_go(three, held)
    three.question("pairwise/1")
    assert len(held) == 1
    assert len(three.site.store.labels(current=False)) == 1


# -- when the connection goes ------------------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[tuple[ServerProcess, Store]]:
    """A server that can be killed, and its store."""
    with Store.open(tmp_path / "labels.db", "a run") as store:
        store.add_questions([make_question(i) for i in range(3)])
        with ServerProcess(tmp_path / "labels.db") as server:
            yield server, store


def test_an_answer_outlives_the_server(mortal: tuple[ServerProcess, Store], browser: Browser) -> None:
    server, store = mortal
    with visiting(browser, server, excused=UNREACHABLE) as visit:
        visit.question("pairwise/0")
        shown = tuple(visit.shown())
        visit.page.keyboard.press("n")
        visit.page.keyboard.type("kept")
        visit.page.keyboard.press("Escape")
        server.kill()
        visit.page.keyboard.press("2")
        expect(visit.page.locator("#notice")).to_contain_text("kept in this browser")
        visit.page.keyboard.press("1")  # it is answered already
        assert store.labels() == []
        server.start()
        visit.question("pairwise/1")
        expect(visit.page.locator("#notice")).to_be_empty()
        label = only(store)
        assert (label.query_id, label.note, label.shown, label.supersedes) == ("pairwise/0", "kept", shown, None)
        assert visit.page.evaluate("Object.keys(localStorage).filter((k) => k.includes('answer'))") == []


def test_an_answer_outlives_server_and_tab(mortal: tuple[ServerProcess, Store], browser: Browser) -> None:
    server, store = mortal
    with visiting(browser, server, excused=UNREACHABLE) as visit:
        visit.question("pairwise/0")
        server.kill()
        visit.page.keyboard.press("3")
        expect(visit.page.locator("#notice")).to_contain_text("kept in this browser")
        visit.page.close()
        server.start()
        visit.page = visit.context.new_page()
        visit.watch(visit.page)
        visit.open()
        visit.question("pairwise/1")
        assert only(store).answer == Answer("tie")


def test_a_reply_that_is_lost_does_not_store_the_answer_twice(three: Visit) -> None:
    three.excused = UNREACHABLE
    lost: list[int] = []

    def lose(route: Route) -> None:
        if lost:
            route.continue_()
        else:
            lost.append(route.fetch().status)
            route.abort("connectionreset")

    three.page.route("**/answers", lose)
    three.page.keyboard.press("4")
    three.question("pairwise/1")
    assert lost == [200]
    assert len(three.site.store.labels(current=False)) == 1


def test_a_busy_store_is_asked_again_when_it_said(three: Visit) -> None:
    three.excused = UNREACHABLE
    refused: list[float] = []
    free = Event()

    def refuse(route: Route) -> None:
        if free.is_set():
            route.continue_()
        else:
            refused.append(monotonic())
            later = "2" if len(refused) == 1 else "60"
            route.fulfill(status=503, headers={"Retry-After": later}, body="the store is locked")

    three.page.route("**/answers", refuse)
    three.page.keyboard.press("1")
    expect(three.page.locator("#notice")).to_contain_text("cannot be reached")
    three.until(lambda: len(refused) == 2)
    free.set()
    assert refused[1] - refused[0] >= 2
    expect(three.page.locator("#question")).to_have_attribute("data-state", "kept")
    three.page.get_by_role("button", name="Send now").click()
    three.question("pairwise/1")
    assert len(three.site.store.labels(current=False)) == 1


def test_a_page_that_is_none_of_ours_is_no_receipt(three: Visit) -> None:
    replies = iter(["<h1>Welcome to the hotel</h1>"])

    def intercept(route: Route) -> None:
        body = next(replies, None)
        if body is None:
            route.continue_()
        else:
            route.fulfill(status=200, content_type="text/html", body=body)

    three.page.route("**/answers", intercept)
    three.page.keyboard.press("1")
    three.question("pairwise/1")
    assert len(three.site.store.labels()) == 1


def test_what_the_server_refuses_stays_in_the_form(three: Visit) -> None:
    three.excused = ("422",)
    three.page.keyboard.press("n")
    three.page.keyboard.type("words")
    three.page.keyboard.press("Escape")
    three.page.evaluate("document.querySelector('[name=key]').value = ''")
    three.page.keyboard.press("1")
    expect(three.page.locator("#notice")).to_contain_text("The server did not take this answer: key")
    expect(three.page.locator("#note")).to_have_value("words")
    expect(three.page.locator("#question")).to_have_attribute("data-state", "ready")
    key = three.page.locator("[name=key]").input_value()
    three.page.get_by_role("button", name="Load the question again").click()
    three.wait(f"#question[data-state=ready]:not(:has([name=key][value='{key}']))")
    three.page.keyboard.press("1")
    three.question("pairwise/1")


# -- people ------------------------------------------------------------------------------------------------------------


def signed_in(visit: Visit, token: str) -> Page:
    visit.page.goto("about:blank")  # only the part behind # changes otherwise, and nothing is loaded
    page = visit.open(f"/join#{token}")
    page.wait_for_selector("#task")
    return page


def test_a_personal_link_signs_in_and_leaves_no_trace(browser: Browser, tmp_path: Path) -> None:
    settings = LabelSettings(login_required=True, gold_every=0)
    with (
        serving(tmp_path / "labels.db", [make_question(0)], settings) as site,
        visiting(browser, site, excused=("401",)) as visit,
    ):
        assert visit.page.url.endswith("/join")
        visit.page.get_by_label("Personal link").fill("http://host/join#nonsense")
        visit.page.get_by_role("button", name="Sign in").click()
        expect(visit.page.get_by_role("alert")).to_contain_text("ask for a new one")
        page = signed_in(visit, invite(site.store, "ada"))
        assert page.url == f"{site.url}/"
        expect(page.locator(".who")).to_have_text("ada")
        expect(page.get_by_role("link", name="Overview")).to_have_count(0)
        page.go_back()
        assert "#" not in page.url
        visit.open()
        page.get_by_role("button", name="Leave").click()
        page.wait_for_url("**/join")


def test_a_kept_answer_waits_for_the_one_who_gave_it(browser: Browser, tmp_path: Path) -> None:
    settings = LabelSettings(login_required=True, gold_every=0)
    with (
        serving(tmp_path / "labels.db", [make_question(i) for i in range(2)], settings, overlap=2) as site,
        visiting(browser, site, excused=(*UNREACHABLE, "401")) as visit,
    ):
        ada, bob = (invite(site.store, name) for name in ("ada", "bob"))
        page = signed_in(visit, ada)
        visit.question("pairwise/0")
        page.route("**/answers", lambda route: route.abort("connectionreset"))
        visit.context.clear_cookies()
        page.keyboard.press("3")
        expect(page.locator("#notice")).to_contain_text("The server cannot be reached")
        page.unroute("**/answers")  # it is sent again by itself
        expect(page.locator("#notice")).to_contain_text("You are signed out")
        signed_in(visit, bob)
        visit.question("pairwise/0")
        assert site.store.labels() == []
        signed_in(visit, ada)
        visit.question("pairwise/1")
        assert only(site.store).annotator == "ada"


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_page_is_blind(browser: Browser, tmp_path: Path) -> None:
    first = make_question(0, prompt_id="secret-prompt")
    questions = [Question(**{name: getattr(first, name) for name in first.__slots__} | {"category": "secret-category"})]
    known = make_question(1, prompt_id="secret-known")
    settings = LabelSettings(gold_every=1)
    with serving(tmp_path / "labels.db", questions, settings) as site:
        site.store.add_gold([(known, Answer("first"), "secret-why")])
        with visiting(browser, site) as visit:
            pages = []
            for query_id in ("pairwise/1", "pairwise/0"):
                visit.question(query_id)
                pages.append(visit.page.content())
                visit.page.keyboard.press("1")
            visit.wait("#done")
    for page in pages:
        assert "secret" not in page
        assert not any(word in page.lower() for word in ("reward", "logprob", "likelihood", "strategy", "gold"))


def test_views_of_the_texts(browser: Browser, tmp_path: Path) -> None:
    texts = ("Take **one** tablet.", "Take **two** tablets.\n\n" + "Long.\n\n" * 60)
    messages = [Message("system", "Be brief."), *(Message("user", "Hm?"), Message("assistant", "Hm.")) * 5]
    messages += [Message("tool", "42"), Message("user", "How many?")]
    questions = [make_question(i, texts=texts, messages=messages) for i in range(2)]
    with serving(tmp_path / "labels.db", questions) as site, visiting(browser, site) as visit:
        visit.question()
        page = visit.page
        expect(page.locator(".rendered strong").first).to_be_visible()
        expect(page.locator("details.earlier summary")).to_have_text("7 earlier messages")
        assert page.locator(".role").all_inner_texts()[-2:] == ["Tool", "User"]
        long = page.locator(".card:has(.more)")
        more = long.locator(".more")
        expect(more).to_have_attribute("aria-expanded", "false")
        folded = long.locator(".fold").bounding_box()
        more.click()
        expect(more).to_have_attribute("aria-expanded", "true")
        opened = long.locator(".fold").bounding_box()
        assert folded is not None
        assert opened is not None
        assert folded["height"] < 400 < opened["height"]
        page.keyboard.press("d")
        expect(page.locator("[data-option=B] .diff")).to_be_visible()
        expect(page.locator(".card .rendered, .card .raw").filter(visible=True)).to_have_count(0)
        page.keyboard.press("d")
        page.keyboard.press("r")
        expect(page.locator(".turn .raw").last).to_have_text("How many?")
        expect(long.locator(".raw")).to_contain_text("Take **two** tablets.")
        page.keyboard.press("e")
        expect(page.locator("details.earlier")).to_have_attribute("open", "")
        page.keyboard.press("1")
        visit.question("pairwise/1")  # what was chosen holds for the next question
        expect(page.locator(".card .raw").first).to_be_visible()
        expect(page.locator(".fold.folded")).to_have_count(0)


def test_differences_are_marked_on_both_sides_and_kept_in_the_page(browser: Browser, tmp_path: Path) -> None:
    texts = ("Take one <b>tablet</b> a day.", "Take two tablets a day.")
    questions = [make_question(i, texts=texts) for i in range(2)]
    with serving(tmp_path / "labels.db", questions) as site, visiting(browser, site) as visit:
        page = visit.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url) if "/differences" in request.url else None)
        visit.question("pairwise/0")
        only_here = {7: "one <b>tablet</b>", 6: "two tablets"}
        for query_id in ("pairwise/0", "pairwise/1"):  # what was chosen holds for the next question
            visit.question(query_id)
            if query_id == "pairwise/0":
                assert asked == []
                page.keyboard.press("d")
            expect(page.locator("[data-act=diff]")).to_have_attribute("aria-pressed", "true")
            marks = page.locator(".card .diff mark")
            expect(marks).to_have_text([only_here[i] for i in visit.shown()])
            for mark in marks.all():  # not by colour alone, neither for those who see nor for those who listen
                assert mark.evaluate("m => getComputedStyle(m).textDecorationLine") == "underline"
                assert "only here" in mark.evaluate("m => getComputedStyle(m, '::before').content")
            for _ in range(2):
                page.keyboard.press("d")
                expect(marks.first).to_be_hidden()
                page.keyboard.press("d")
                expect(marks.first).to_be_visible()
            page.keyboard.press("1")
        visit.wait("#done")
        assert len(asked) == 2


def test_without_a_connection_there_are_no_differences_and_the_question_can_be_answered(three: Visit) -> None:
    three.excused = UNREACHABLE
    page, button = three.page, three.page.locator("[data-act=diff]")
    page.route("**/differences*", lambda route: route.abort("connectionrefused"))
    page.keyboard.press("d")
    expect(page.locator("#aside")).to_have_text(
        "No differences now. The server cannot be reached. You can answer all the same."
    )
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator(".card .rendered").first).to_be_visible()
    page.unroute("**/differences*")
    page.keyboard.press("d")
    expect(page.locator(".card .diff").first).to_be_visible()
    expect(page.locator("#aside")).to_be_hidden()
    page.route("**/differences*", lambda route: route.fulfill(status=200, body="<h1>Welcome to the hotel</h1>"))
    page.keyboard.press("1")
    three.question("pairwise/1")
    expect(page.locator("#aside")).to_contain_text("does not give them just now")
    page.keyboard.press("1")
    three.question("pairwise/2")
    assert len(three.site.store.labels()) == 2


def test_differences_that_are_late_are_not_put_on_another_question(three: Visit) -> None:
    page, held = three.page, []

    def hold_the_first(route: Route) -> None:
        if held:
            route.continue_()
        held.append(route)

    page.route("**/differences*", hold_the_first)
    page.keyboard.press("d")
    page.keyboard.press("1")
    three.question("pairwise/1")
    diff = page.locator(".card .diff")
    expect(page.locator("#question[data-diff], #aside:not(:empty)")).to_have_attribute("data-diff", "")
    expect(diff).to_have_count(2)
    with page.expect_response("**/differences*"):
        held[0].continue_()
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    expect(diff).to_have_count(2)
    assert all("question 1." in text for text in diff.all_inner_texts())


def test_guidelines_and_theme_stay_as_they_were_left(browser: Browser, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "labels.db", [make_question(0)], GUIDED) as site,
        visiting(browser, site, color_scheme="dark") as visit,
    ):
        page = visit.page
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        dark = page.evaluate(ground)
        visit.question()
        page.keyboard.press("g")
        expect(page.locator("#guidelines .sheet")).to_be_focused()
        expect(page.locator("#guidelines .prose")).to_contain_text("Be kind")
        page.get_by_role("button", name="Theme: auto").click()
        page.reload()
        expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
        assert page.evaluate(ground) != dark
        expect(page.locator("#guidelines")).to_be_visible()
        page.locator("#guidelines .sheet").focus()
        page.keyboard.press("Escape")
        expect(page.locator("#guidelines")).to_be_hidden()
        expect(page.locator(".tools [data-act=guidelines]")).to_be_focused()


@pytest.mark.parametrize("guidelines", ["# Guidelines\n\nBe kind.", "## Guidelines\n\nBe kind.", "Be kind."])
def test_the_guidelines_have_one_title(guidelines: str, browser: Browser, tmp_path: Path) -> None:
    settings = LabelSettings(guidelines=guidelines, gold_every=0)
    with serving(tmp_path / "labels.db", [make_question(0)], settings) as site, visiting(browser, site) as visit:
        visit.page.keyboard.press("g")
        panel = visit.page.get_by_role("complementary", name="Guidelines")
        expect(panel.locator(":is(h1, h2)")).to_have_text(["Guidelines"])
        expect(panel).to_contain_text("Be kind.")


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 400}, {"width": 360, "height": 600}])
def test_the_keys_open_at_their_beginning(viewport: dict[str, int], browser: Browser, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "labels.db", [make_question(0)]) as site,
        visiting(browser, site, viewport=viewport) as visit,
    ):
        page, dialog = visit.page, visit.page.locator("#help")
        visit.question()
        for _ in range(2):
            page.keyboard.press("?")
            expect(page.locator("#help-title")).to_be_focused()
            expect(page.locator("#help-title")).to_be_in_viewport(ratio=1)
            assert dialog.evaluate("d => d.scrollTop") == 0
            assert dialog.evaluate("d => d.scrollHeight > d.clientHeight")
            dialog.evaluate("d => d.scrollTo(0, 1000)")  # where it is left
            expect(dialog.get_by_role("button", name="Close")).to_be_in_viewport(ratio=1)
            dialog.get_by_role("button", name="Close").click()
            expect(dialog).to_be_hidden()
        expect(page.locator("#question")).to_be_visible()


def test_a_new_question_has_the_focus_and_is_announced(three: Visit) -> None:
    page = three.page
    page.evaluate("scrollTo(0, 400)")
    page.locator(".choice.left").focus()
    page.keyboard.press("Enter")
    three.question("pairwise/1")
    expect(page.locator("#question")).to_be_focused()
    expect(page.locator("#announce")).to_contain_text("Which answer is better? 1 done · 2 left")
    assert page.evaluate("scrollY") == 0


def test_seconds_count_while_the_question_is_visible(browser: Browser, tmp_path: Path) -> None:
    at = "([now, hidden]) => { window.now = now; Object.defineProperty(document, 'hidden', {value: hidden,"
    at += " configurable: true}); document.dispatchEvent(new Event('visibilitychange')); }"
    with serving(tmp_path / "labels.db", [make_question(0)]) as site, visiting(browser, site) as visit:
        visit.page.add_init_script("window.now = 500; performance.now = () => window.now;")
        visit.open()
        visit.question()
        visit.page.evaluate(at, [4500, True])
        visit.page.evaluate(at, [64_500, False])
        visit.page.evaluate("window.now = 66_750")
        visit.page.keyboard.press("1")
        visit.wait("#done")
        assert only(site.store).seconds == 6.25


# -- the overview ------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path: Path) -> Iterator[Site]:
    """A store where two people disagree, flag and write notes, and go in a circle."""
    ids = ((0, 1), (1, 2), (2, 0))
    questions = [make_question(i, prompt_id="round", completion_ids=pair) for i, pair in enumerate(ids)]
    questions += [make_question(i) for i in range(3, 30)]
    with serving(tmp_path / "labels.db", questions, overlap=3) as site:
        for name, other in (("ada", "first"), ("bob", "second")):
            person = site.store.annotator(name)
            for i, question in enumerate(questions[:20]):
                said = "first" if i < 3 or i % 3 else other
                note = "no such <law>" if (name, i) == ("ada", 4) else ""
                site.store.record(
                    person.annotator_id,
                    question.query_id,
                    Answer("second" if said == "second" else "first"),
                    key=f"{name}{i}",
                    shown=question.completion_ids,
                    seconds=20.0,
                    note=note,
                    flagged=bool(note),
                )
        yield site


def test_the_overview_is_live_and_keeps_focus_and_scrolling(judged: Site, browser: Browser) -> None:
    with visiting(browser, judged, viewport={"width": 700, "height": 400}) as visit:
        page = visit.open("/overview")
        expect(page.locator("[data-number=answered]")).to_have_text("40 of 90 answers")
        for words in ("ada", "not enough yet", "no such <law>", "is preferred to the first", "⚑ flagged"):
            expect(page.locator("#live")).to_contain_text(words)
        link = page.locator("[id^='d-']").last
        link.focus()
        name = link.get_attribute("id")
        page.locator("#people").evaluate("part => { part.scrollLeft = 40; }")
        scrolled = page.evaluate("scrollY")
        assert scrolled > 0
        cyd = judged.store.annotator("cyd")
        judged.store.record(cyd.annotator_id, "pairwise/25", Answer("tie"), key="c", flagged=True)
        expect(page.locator("[data-number=answered]")).to_have_text("41 of 90 answers")
        expect(page.locator("#people")).to_contain_text("cyd")
        assert page.evaluate("document.activeElement.id") == name
        assert page.locator("#people").evaluate("part => part.scrollLeft") == 40
        assert abs(page.evaluate("scrollY") - scrolled) < 120


def test_a_disagreement_is_settled_from_the_overview(judged: Site, browser: Browser) -> None:
    with visiting(browser, judged) as visit:
        page = visit.open("/overview")
        unsettled = page.locator("[data-number=unsettled]")
        before = unsettled.inner_text()
        page.locator("[id^='d-']").first.click()
        visit.question()
        query_id = visit.query_id()
        rows = page.locator(".answers tbody tr")
        expect(rows).to_have_count(2)
        assert {row.split("\t")[1] for row in rows.all_inner_texts()} == {"A is better", "B is better"}
        page.keyboard.press("2")
        page.wait_for_url("**/overview")
        expect(unsettled).not_to_have_text(before)
        label = judged.store.labels()[-1]
        assert (label.query_id, label.adjudicated, label.annotator) == (query_id, True, "local")


def test_the_overview_calls_answers_what_the_page_of_the_question_calls_them(judged: Site, browser: Browser) -> None:
    with visiting(browser, judged) as visit:
        page = visit.open("/overview")
        n = page.locator("[id^='d-']").count()
        assert n > 3
        for i in range(4):
            item = page.locator("#o-disagree ~ ul > li").nth(i)
            named = dict(zip(item.locator("dt").all_inner_texts(), item.locator("dd").all_inner_texts(), strict=True))
            said = dict(text.split(": ") for text in item.locator(".given li").all_inner_texts())
            assert set(said.values()) == {"A is better", "B is better"}
            item.locator("a").first.click()
            visit.question()
            for letter, text in named.items():
                expect(page.locator(f"[data-option={letter}] .rendered")).to_have_text(text)
            rows = [row.split("\t")[:2] for row in page.locator(".answers tbody tr").all_inner_texts()]
            assert dict(rows) == said
            preferred = named["A" if said["ada"] == "A is better" else "B"]
            label = next(x for x in judged.store.labels(query_id=visit.query_id()) if x.annotator == "ada")
            question = judged.store.question(label.query_id)
            assert preferred == question.completions[label.answer.choice == "second"]
            page.go_back()
            page.wait_for_selector("#live")


def test_the_overview_says_when_it_is_old(mortal: tuple[ServerProcess, Store], browser: Browser) -> None:
    server, _ = mortal
    with visiting(browser, server, excused=UNREACHABLE) as visit:
        page = visit.open("/overview")
        server.kill()
        expect(page.locator("#notice")).to_contain_text("What you see may be old")
        server.start()
        expect(page.locator("#notice")).to_be_empty()


# -- on a phone --------------------------------------------------------------------------------------------------------

PROMPT = "I cannot sleep since I started a new job. Can I take two antihistamine tablets every night? " * 4
VISIBLE = """() => {
  const bar = document.querySelector("[data-bar]").getBoundingClientRect();
  const cards = [...document.querySelectorAll(".card")].map((card) => card.getBoundingClientRect());
  return (Math.min(bar.top, cards.at(-1).bottom) - cards[0].top) / innerHeight;
}"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_leaves_its_room_to_the_answers(kind: QueryKind, browser: Browser, tmp_path: Path) -> None:
    messages = [Message("system", "You are a careful assistant. Say when to ask a doctor."), Message("user", PROMPT)]
    texts = ["word " * 150] * {"pairwise": 2, "rating": 1, "ranking": 4}[kind]
    settings = LabelSettings(guidelines="Be kind.", ask_safety=True, gold_every=0)
    questions = [make_question(i, kind, texts=texts, messages=messages) for i in range(2)]
    with serving(tmp_path / "labels.db", questions, settings) as site, visiting(browser, site, **PHONE) as visit:
        visit.question()
        page = visit.page
        assert page.evaluate(VISIBLE) > 0.4
        prompt = page.locator(".turn.user")
        expect(prompt.locator(".fold")).to_have_css("overflow", "hidden")
        assert prompt.locator(".fold").evaluate("f => f.clientHeight / parseFloat(getComputedStyle(f).lineHeight)") <= 4
        prompt.get_by_role("button", name="Show all").tap()
        expect(prompt.locator(".more")).to_have_attribute("aria-expanded", "true")
        assert prompt.locator(".fold").evaluate("f => f.scrollHeight <= f.clientHeight")
        expect(page.locator(".choices").first).to_be_in_viewport(ratio=1)


def test_a_wide_page_shows_the_whole_prompt(browser: Browser, tmp_path: Path) -> None:
    question = make_question(0, messages=[Message("user", PROMPT)])
    with serving(tmp_path / "labels.db", [question]) as site, visiting(browser, site) as visit:
        visit.question()
        assert visit.page.locator(".turn .fold").evaluate("f => f.scrollHeight <= f.clientHeight")
        expect(visit.page.locator(".turn .more")).to_be_hidden()


def test_a_conversation_shows_its_end_on_a_phone(browser: Browser, tmp_path: Path) -> None:
    turns = [Message(("user", "assistant")[i % 2], f"turn {i}") for i in range(9)]
    with (
        serving(tmp_path / "labels.db", [make_question(0, messages=turns)]) as site,
        visiting(browser, site, **PHONE) as visit,
    ):
        visit.question()
        shown = visit.page.locator(".turn").filter(visible=True)
        expect(shown.locator(".rendered")).to_have_text(["turn 8"])
        visit.page.get_by_text("8 earlier messages").tap()
        expect(shown.locator(".rendered")).to_have_text([f"turn {i}" for i in range(9)])
    with (
        serving(tmp_path / "more.db", [make_question(0, messages=turns)]) as site,
        visiting(browser, site) as visit,
    ):
        visit.question()
        expect(visit.page.locator(".turn").filter(visible=True)).to_have_count(6)


# -- for everyone ------------------------------------------------------------------------------------------------------

WIDE = "| " + " | ".join("column" for _ in range(12)) + " |\n" + "|---" * 12 + "|\n\n"
WIDE += "```\n" + "x = 1; " * 60 + "\n```\n\n" + "w" * 300 + "\n\n" + "https://example.org/" + "long/" * 60


def everything() -> list[Question]:
    """A question of each kind, with texts that are too wide and too long."""
    messages = [Message("system", WIDE), Message("user", "Why?"), Message("assistant", WIDE)]
    messages += [Message("tool", "{}" * 300), Message("user", WIDE)]
    return [
        make_question(i, kind, messages=messages, texts=[f"[link](https://e.org) {n}\n\n{WIDE}" for n in range(count)])
        for i, (kind, count) in enumerate((("pairwise", 2), ("rating", 1), ("ranking", 5)))
    ]


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Site]:
    """A site that has something to show on every page."""
    settings = LabelSettings(guidelines=GUIDED.guidelines + "\n\n" + WIDE, ask_safety=True, gold_every=0)
    with serving(tmp_path / "labels.db", everything(), settings, overlap=3) as site:
        for name in ("ada", "w" * 190):
            person = site.store.annotator(name)
            for question in everything():
                answer = {
                    "pairwise": Answer("first" if name == "ada" else "second"),
                    "rating": Answer(rating=2),
                    "ranking": Answer(ranks=(1, 2, 3, 3, 4)),
                }[question.kind]
                site.store.record(
                    person.annotator_id, question.query_id, answer, key=f"{name[:8]}{question.query_id}", note=WIDE
                )
        yield site


def every_page(visit: Visit) -> Iterator[str]:
    """Go to one page after another, and say which it is."""
    page = visit.page
    for path in ("/overview", "/overview/queries/pairwise%2F0", "/overview/queries/ranking%2F2", "/nowhere"):
        visit.open(path)
        yield path
    visit.open("/")
    for kind, keys in (("pairwise", "d1"), ("rating", "r4y"), ("ranking", ["a", "b", "c", "d", "e", "Enter"])):
        visit.question(f"{kind}/{KINDS.index(kind)}")
        yield kind
        if kind == "pairwise":
            page.keyboard.press("g")
            page.keyboard.press("n")
            yield "guidelines and note"
            page.keyboard.press("Escape")
            page.keyboard.press("?")
            yield "help"
            page.keyboard.press("Escape")
        for key in keys[:-1]:
            page.keyboard.press(key)
        visit.wait("#question[data-diff]" if kind == "pairwise" else "#question")  # they come from the server
        yield f"{kind}, answered"
        page.keyboard.press(keys[-1])
    page.wait_for_selector("#done")
    yield "done"


DEVICES: dict[str, dict[str, Any]] = {"desktop": {}, "phone": PHONE}


STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
# What models wrote may skip levels of headings; that is theirs, and people should see it.
EVERYTHING = {"runOnly": STANDARDS, "rules": {"heading-order": {"enabled": False}}}
COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}


@pytest.mark.parametrize("device", DEVICES)
def test_axe_finds_nothing(device: str, full: Site, browser: Browser) -> None:
    with visiting(browser, full, reduced_motion="reduce", excused=("404",), **DEVICES[device]) as visit:
        found = {}
        for name in every_page(visit):
            for scheme, options in (("light", EVERYTHING), ("dark", COLOURS)):  # the themes differ in colours alone
                visit.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                results = Axe().run(visit.page, options=options)
                if results.violations_count:
                    found[name, scheme] = results.generate_report()
        assert found == {}


def test_axe_finds_nothing_where_people_sign_in(browser: Browser, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "labels.db", [], LabelSettings(login_required=True)) as site,
        visiting(browser, site, excused=("401",)) as visit,
    ):
        assert Axe().run(visit.page).violations_count == 0
        visit.page.get_by_label("Personal link").fill("wrong")
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_role("alert")).to_be_visible()
        results = Axe().run(visit.page)
        assert results.violations_count == 0, results.generate_report()


def test_nothing_is_wider_than_a_phone(full: Site, browser: Browser) -> None:
    with visiting(browser, full, excused=("404",), **PHONE) as visit:
        for name in every_page(visit):
            width = visit.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
            assert width == [360, 360], name


def test_tab_reaches_every_control_and_shows_where_it_is(full: Site, browser: Browser) -> None:
    controls = """() => {
      const found = [...document.querySelectorAll("a[href], button, input, textarea, summary, [tabindex='0']")]
        .filter((c) => !c.disabled && c.type !== "hidden" && c.checkVisibility());
      found.forEach((control, i) => { control.dataset.control = i; });
      return found.length;
    }"""
    at = """() => {
      const element = document.activeElement;
      const style = getComputedStyle(element);
      return [element.dataset.control ?? null, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
    }"""
    with visiting(browser, full, excused=("404",)) as visit:
        for name in every_page(visit):
            if name in {"help", "/nowhere"}:
                continue
            visit.page.evaluate("document.activeElement.blur(); document.querySelector('.skip').focus()")
            count = visit.page.evaluate(controls)
            reached, shown = set(), set()
            for _ in range(2 * count + 10):
                control, visible = visit.page.evaluate(at)
                reached.add(control)
                shown |= {control} if visible else set()
                visit.page.keyboard.press("Tab")
                if len(reached - {None}) == count:
                    break
            assert len(reached - {None}) == count, name
            assert reached - {None} == shown - {None}, name
            visit.page.evaluate("document.activeElement.blur()")  # Enter is for the control that has the focus
