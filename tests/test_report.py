"""The audit report: its numbers against oracles, and the page in a real browser, fed with hostile text."""

import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, BrowserContext, Locator, Page, sync_playwright
from scipy import stats

from dissonance.conflict import conflicts
from dissonance.errors import RunError
from dissonance.null import kendall_null, null_pmf
from dissonance.records import COMPLETIONS_SCHEMA, PROMPTS_SCHEMA
from dissonance.report import render_report, write_report
from dissonance.report.headline import Headline, headline, percent
from dissonance.report.page import script_json
from dissonance.report.reading import Reading, reading
from dissonance.report.statistics import (
    category_means,
    distance_histogram,
    extremes,
    length_bands,
    measure,
    rows_by_prompt,
    sample_points,
    top_prompts,
)
from dissonance.report.tables import read_completions, read_prompts, read_rows

FIGURES = ("distance", "pacs", "points", "categories", "lengths")

PAYLOADS = (
    "<script>window.__xss = 1</script>",
    "</script><script>window.__xss = 2</script>",
    "<img src=x onerror=window.__xss=3>",
    '"><svg onload=window.__xss=4>',
    "'><iframe srcdoc='<script>parent.__xss=5</script>'></iframe>",
    "<body onload=alert(6)>",
    "<a href=javascript:alert(7)>x</a>",
    "{{ 7 * 7 }}{% for x in ().__class__.__mro__ %}{% endfor %}",
    "${alert(8)}`;alert(8)//",
    "</title></style></textarea><script>window.__xss = 9</script>",
    "<!--<script>",
    "]]><script>window.__xss = 11</script>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.__xss=12>",
    "<details open ontoggle=window.__xss=13>",
    '" autofocus onfocus=window.__xss=14 x="',
    "</dl></details><video><source onerror=window.__xss=15>",
    "\u2028window.__xss = 16\u2029//",
    "&lt;script&gt;window.__xss = 17&lt;/script&gt;",
    "\\u003cscript\\u003ewindow.__xss = 18",
    "<link rel=stylesheet href=https://example.invalid/x.css><img src=https://example.invalid/x.png>",
    "datum.constructor.constructor('window.__xss = 21')()",
    "\u202ereversed\u202c <b>bold</b>",
)


@dataclass(frozen=True)
class World:
    """Synthetic scores of a run; prompt p has sizes[p] completions."""

    sizes: tuple[int, ...] = (8,) * 40
    texts: Sequence[str] = ("a plain answer", "another one", "no")
    questions: Sequence[str] = ("What is up?", "Why?")
    categories: Sequence[str | None] = ("law", "code", None)
    degenerate: frozenset[int] = frozenset()
    seed: int = 0
    per_token: float = 0.0
    """What a token adds to the log-likelihood, in nats, beside noise with a standard deviation of 1."""

    distinct: int | None = None
    """Distinct answers of a prompt; all of them if None."""

    dropped: frozenset[str] = frozenset()
    """Columns left out of the tables."""

    settings: dict[str, Any] = field(default_factory=lambda: {"policy": {"model": "a/pol"}, "reward_model": "b/rew"})


def build(run: Path, world: World) -> Path:
    """Write the run folder of a world."""
    rng = np.random.default_rng(world.seed)
    offsets = np.cumsum([0, *world.sizes])
    prompt = np.repeat(np.arange(len(world.sizes)), world.sizes)
    reward = np.where(np.isin(prompt, list(world.degenerate)), 1.0, rng.normal(size=len(prompt)))
    n_tokens = rng.integers(1, 60, len(prompt))
    logprob = world.per_token * n_tokens - 20 + np.maximum(-20, rng.normal(size=len(prompt)))
    if world.distinct:
        answer = offsets[prompt] + (np.arange(len(prompt)) - offsets[prompt]) % world.distinct
        reward, n_tokens, logprob = reward[answer], n_tokens[answer], logprob[answer]
    found = conflicts(reward, logprob, offsets)
    ids = [f"p{p}-{world.questions[p % len(world.questions)]}" for p in range(len(world.sizes))]
    prompts = pa.table(
        {
            "prompt_id": ids,
            "messages": [[{"role": "user", "content": ids[p].split("-", 1)[1]}] for p in range(len(ids))],
            "category": pa.array([world.categories[p % len(world.categories)] for p in range(len(ids))], pa.string()),
            "n_completions": found.n_completions,
            "kendall_tau_distance": found.kendall_tau_distance,
            "mean_abs_pacs": found.mean_abs_pacs,
            "max_abs_pacs": found.max_abs_pacs,
            "degenerate": found.degenerate,
        }
    ).cast(PROMPTS_SCHEMA)
    completions = pa.table(
        {
            "prompt_id": [ids[p] for p in prompt],
            "completion_id": np.concatenate([np.arange(n) for n in world.sizes]),
            "text": [world.texts[i % len(world.texts)] for i in range(len(prompt))],
            "token_ids": [[1]] * len(prompt),
            "n_tokens": n_tokens,
            "finish_reason": ["length" if i < 2 else "stop" for i in range(len(prompt))],
            "logprob": logprob,
            "ref_logprob": pa.nulls(len(prompt)),
            "reward": reward,
            "reward_truncated": [i == 0 for i in range(len(prompt))],
            "pacs": found.pacs,
        }
    ).cast(COMPLETIONS_SCHEMA)
    folder = run / "round-000"
    folder.mkdir(parents=True)
    for name, table in (("prompts", prompts), ("completions", completions)):
        kept = [column for column in table.column_names if column not in world.dropped]
        pq.write_table(table.select(kept), folder / f"{name}.parquet", row_group_size=50)
    ledger = {"command": "audit", "created": "2026-01-02T03:04:05+00:00", "settings": world.settings}
    (run / "run.json").write_text(json.dumps({**ledger, "versions": {"torch": "9.9"}, "stages": {}}))
    (run / "summary.json").write_text(json.dumps({"seconds": 3.5}))
    return run


# The page in a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    flags = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(found, None), args=[*flags, "--disable-sync", "--no-first-run"]
        )
        yield browser
        browser.close()


@dataclass
class Opened:
    """A report in the browser, and everything it did that it should not."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    """Console messages, errors, dialogs, Content-Security-Policy violations, requests other than for the file."""


def opened(browser: Browser, report: Path, **options: Any) -> Opened:
    context: BrowserContext = browser.new_context(**options)
    result = Opened(context.new_page())
    page, complain = result.page, result.complaints.append

    def guard(route: Any) -> None:
        if route.request.url == report.as_uri():
            route.continue_()
        else:
            complain(f"request {route.request.url}")
            route.abort()

    def dismiss(dialog: Any) -> None:
        complain(f"dialog {dialog.message}")
        dialog.dismiss()

    context.route("**/*", guard)
    page.on("console", lambda message: complain(f"console {message.text}"))
    page.on("pageerror", lambda error: complain(f"error {error}"))
    page.on("dialog", dismiss)
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]")
    return result


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(build(tmp_path_factory.mktemp("plain"), World()))


def drawn(page: Page) -> list[str]:
    """Name the pictures that hold at least one mark with an extent."""
    ids: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("[data-chart]")].filter((chart) =>
            [...chart.querySelectorAll("svg .role-mark path")].some((mark) => {
              const box = mark.getBoundingClientRect();
              return box.width > 0 && box.height > 0;
            })).map((chart) => chart.id.replace("chart-", ""))"""
    )
    return ids


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_all_pictures_are_drawn_without_network_or_complaint(
    browser: Browser, plain: Path, scheme: Any, width: int
) -> None:
    report = opened(browser, plain, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert drawn(report.page) == list(FIGURES)
    assert report.complaints == []
    for chart in report.page.locator("[data-chart]").all():
        assert len(chart.get_attribute("aria-label") or "") > 30
    assert report.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "the page is wider than the screen"
    )
    dark = report.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", dark))) < 60) == (scheme == "dark")


def hover_first(marks: Locator) -> None:
    box = marks.first.bounding_box()
    assert box is not None
    marks.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_hovering_a_point_shows_its_texts(browser: Browser, plain: Path) -> None:
    page = opened(browser, plain, viewport={"width": 1100, "height": 800}).page
    page.locator("#chart-points").scroll_into_view_if_needed()
    tooltip = page.locator("#tooltip")
    assert tooltip.is_hidden()
    hover_first(page.locator("#chart-points svg .mark-symbol.role-mark path"))
    tooltip.wait_for(state="visible")
    assert re.search(r"What is up\?|Why\?", tooltip.inner_text())
    assert re.search(r"a plain answer|another one|no", tooltip.inner_text())
    page.keyboard.press("Escape")
    assert tooltip.is_hidden()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = World(
        sizes=(11,) * 20,
        texts=PAYLOADS,
        questions=PAYLOADS,
        categories=PAYLOADS,
        settings={PAYLOADS[0]: PAYLOADS[1], "policy": PAYLOADS[2], "reward_model": {"model": PAYLOADS[3]}},
    )
    return write_report(build(tmp_path_factory.mktemp("hostile"), world))


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["policy", "escaping-alone"])
def test_hostile_text_stays_text(browser: Browser, hostile: Path, bypass_csp: bool) -> None:
    report = opened(browser, hostile, bypass_csp=bypass_csp)
    page = report.page
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    page.locator("#chart-points").scroll_into_view_if_needed()
    hover_first(page.locator("#chart-points svg .mark-symbol.role-mark path"))
    page.locator("#tooltip").wait_for(state="visible")
    assert any(payload.strip()[:20] in (page.locator("#tooltip").text_content() or "") for payload in PAYLOADS)
    assert page.evaluate("window.__xss") is None
    assert report.complaints == []
    foreign = (
        "img, iframe, video, math, link, a[href], [onload], [onerror], b:not(.models b), svg:not([data-chart] svg)"
    )
    assert page.locator(foreign).count() == 0
    shown = {" ".join(text.split()) for text in page.locator(".text, .question").all_text_contents()}
    missing = [payload for payload in PAYLOADS if " ".join(payload.split()) not in shown]
    assert missing == []


def test_the_policy_stops_what_escaping_would_miss(browser: Browser, plain: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    injected = "<img src=x onerror=window.__xss=1><script>window.__xss=2</script><main>"
    broken.write_text(plain.read_text(encoding="utf-8").replace("<main>", injected, 1), encoding="utf-8")
    report = opened(browser, broken)
    assert report.page.evaluate("window.__xss") is None
    assert len([c for c in report.complaints if "Content Security Policy" in c]) >= 2


def test_the_policy_names_hashes_and_allows_nothing_loose(plain: Path) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', plain.read_text(encoding="utf-8"))
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;")
    assert policy[1].count("sha256-") == 3
    assert not re.search("unsafe|http|data:|\\*", policy[1])


def test_scores_without_texts_make_a_smaller_report(browser: Browser, tmp_path: Path) -> None:
    dropped = {"messages", "category", "text", "token_ids", "n_tokens", "finish_reason", "ref_logprob"}
    run = build(tmp_path / "run", World(dropped=frozenset(dropped | {"reward_truncated"})))
    report = opened(browser, write_report(run))
    assert drawn(report.page) == ["distance", "pacs", "points"]
    assert report.complaints == []
    questions = report.page.locator(".case .question").all_text_contents()
    assert len(questions) == 20
    assert all(re.fullmatch(r"p\d+-(What is up\?|Why\?)", question) for question in questions)


def test_one_prompt(browser: Browser, tmp_path: Path) -> None:
    report = opened(browser, write_report(build(tmp_path / "run", World(sizes=(8,), categories=("law",)))))
    assert drawn(report.page) == list(FIGURES)
    assert report.complaints == []
    assert "1 prompts" not in report.page.inner_text("body")


def test_a_run_of_degenerate_prompts_says_so(browser: Browser, tmp_path: Path) -> None:
    report = opened(
        browser, write_report(build(tmp_path / "run", World(sizes=(4,) * 3, degenerate=frozenset(range(3)))))
    )
    assert drawn(report.page) == []
    assert report.complaints == []
    assert "Every prompt is degenerate" in report.page.inner_text("main")


# What it says.


def test_headline_figures_and_warnings(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(per_token=-1.0, degenerate=frozenset({0})))
    html = render_report(run)
    table = pq.read_table(run / "round-000" / "prompts.parquet")
    distance = table["kendall_tau_distance"].to_numpy()[1:]
    assert f"<dd>{distance.mean():.2f}</dd>" in html
    assert "unrelated: 0.50, ± 0.14 a prompt" in html
    assert "8 answers each, 320 in all" in html
    assert re.search(r"Conflict follows length: .* ρ = \+0\.[67]\d\.", html)
    assert "K above chance mean</dt><dd>" in html
    assert "unrelated: 45 %" in html
    assert "2 of 320 answers (0.6 %) ran into the token limit" in html
    assert "1 of 320 answers (0.3 %) was longer than the reward model can read" in html
    assert "1 of 40 prompts (2.5 %) is degenerate" in html
    assert "2026-01-02 03:04:05 UTC" in html
    assert "<td>9.9</td>" in html


def summed_up(run: Path, likelihood: str = "sum") -> Headline:
    """Make the headline of a run alone."""
    how = reading({"likelihood": likelihood})
    prompts, ids = read_prompts(run / "round-000" / "prompts.parquet")
    completions = read_completions(run / "round-000" / "completions.parquet", ids, how.likelihood)
    return headline(completions, measure(prompts, completions), np.zeros(len(ids), np.bool_), how)


@pytest.mark.parametrize(
    ("per_token", "likelihood", "warned", "advised"),
    [(-1.0, "sum", True, True), (0.0, "sum", False, False), (0.0, "mean", True, False)],
)
def test_length_warning_and_its_advice_follow_the_reading(
    tmp_path: Path, per_token: float, likelihood: str, warned: bool, advised: bool
) -> None:
    # Where tokens cost nothing, dividing by their number is what brings length in.
    warnings = " ".join(summed_up(build(tmp_path / "run", World(per_token=per_token)), likelihood).warnings)
    assert ("Conflict follows length" in warnings) == warned
    assert ("compare with the mean" in warnings) == advised


def test_the_length_warning_needs_no_summary_and_no_order(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(per_token=-1.0, sizes=(5, 8, 3) * 9))
    warnings = summed_up(run).warnings
    path = run / "round-000" / "completions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), path)
    assert summed_up(run).warnings == warnings
    pq.write_table(table.drop_columns(["n_tokens"]), path)
    assert "length" not in " ".join(summed_up(run).warnings)


@pytest.mark.parametrize(("sign", "finding"), [(1, "the two agree"), (-1, "the two pull apart")])
def test_the_finding_follows_the_mean_distance(tmp_path: Path, sign: int, finding: str) -> None:
    run = build(tmp_path / "run", World(sizes=(6,) * 30))
    path = run / "round-000" / "completions.parquet"
    table = pq.read_table(path)
    logprob = table["logprob"].to_numpy()
    reward = sign * logprob + np.random.default_rng(2).normal(size=len(table))
    pq.write_table(table.set_column(table.column_names.index("reward"), "reward", pa.array(reward)), path)
    html = render_report(run)
    assert f"On the whole {finding}" in html
    assert re.search(r"in [67]\d % of the pairs \(unrelated: 50 %\)", html)


def test_repeated_answers_of_unrelated_scores_are_no_agreement(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(8,) * 200, distinct=4))
    html = render_report(run)
    assert "On the whole the two cannot be told from unrelated" in html
    assert "50 % of the answers repeat another of their prompt" in html
    assert "unrelated: 0.43, ± 0.25 a prompt" in html
    assert "repeat another" not in render_report(build(tmp_path / "all", World(sizes=(8,) * 3)))


@pytest.mark.parametrize(
    ("likelihood", "shown"),
    [
        ("sum", "log-likelihood −48.0 "),
        ("mean", "log-likelihood per token −4.000 "),
        ("relative", "log-likelihood relative to ref −40.00 "),
    ],
)
def test_the_log_likelihood_shown_is_the_one_that_was_measured(tmp_path: Path, likelihood: str, shown: str) -> None:
    settings = {"likelihood": likelihood, "policy": {"model": "a/pol", "reference": "./models/ref/"}}
    run = build(tmp_path / "run", World(sizes=(2,), settings=settings))
    path = run / "round-000" / "completions.parquet"
    columns = {"logprob": [-48.0, -30.0], "ref_logprob": [-8.0, -7.0], "n_tokens": [12, 12]}
    table = pq.read_table(path)
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)
    html = render_report(run)
    assert shown in html
    assert f'"title":"{reading(settings).label} (z-score within the prompt)"' in html
    assert ("A summed log-likelihood falls" in html) == (likelihood == "sum")


def test_a_reading_that_the_settings_do_not_name_is_the_sum() -> None:
    assert reading({}) == Reading("sum", "log-likelihood", 1)


@pytest.mark.parametrize(
    ("share", "written"),
    [
        (None, "–"),
        (0, "0 %"),
        (0.0001, "< 0.1 %"),
        (0.016, "1.6 %"),
        (0.4521, "45 %"),
        (0.9949, "99 %"),
        (0.996, "99.6 %"),
        (0.9996, "> 99.9 %"),
        (1, "100 %"),
    ],
)
def test_shares_round_to_nothing_or_all_only_where_they_are(share: float | None, written: str) -> None:
    assert percent(share) == written


def test_too_few_answers_to_tell_from_chance(tmp_path: Path) -> None:
    html = render_report(build(tmp_path / "run", World(sizes=(3,) * 40)))
    assert "no single prompt can be told from chance" in html
    assert "cannot be told from unrelated" in html


def test_rendering_is_reproducible_and_the_order_of_completions_is_free(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(5, 8, 3) * 6))
    first = render_report(run)
    assert render_report(run) == first
    path = run / "round-000" / "completions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(1).permutation(len(table))), path)
    settled = [re.sub(r"<script.*", "", html, flags=re.DOTALL) for html in (first, render_report(run))]
    assert settled[0] == settled[1]


def test_large_hostile_texts_stay_below_five_megabytes(tmp_path: Path) -> None:
    world = World(sizes=(40,) * 80, texts=("<" * 4000, "'漢" * 3000), questions=("&" * 5000,), categories=("😀" * 999,))
    report = write_report(build(tmp_path / "run", world))
    assert report.stat().st_size < 5_000_000
    assert "more characters" in report.read_text(encoding="utf-8")


# What it refuses.


@pytest.mark.parametrize(
    "name", ["run.json", "summary.json", "round-000/prompts.parquet", "round-000/completions.parquet"]
)
def test_an_unfinished_run_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    run = build(tmp_path / "run", World(sizes=(3,)))
    (run / name).unlink()
    with pytest.raises(RunError, match=re.escape(Path(name).name)) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


def test_damaged_tables_are_errors(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(3, 3)))
    path = run / "round-000" / "completions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["pacs"]), path)
    with pytest.raises(RunError, match="no column 'pacs'"):
        render_report(run)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(RunError, match="no rows"):
        render_report(run)
    pq.write_table(table.set_column(0, "prompt_id", pa.array(["stranger"] * len(table))), path)
    with pytest.raises(RunError, match="lacks"):
        render_report(run)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(RunError, match="cannot be read"):
        render_report(run)


def test_writing_replaces_the_old_report_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(3, 3)))
    before = {path.name for path in run.iterdir()}
    (run / "report.html").write_text("old")
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8").lstrip().startswith("<!doctype html>")
    assert {path.name for path in run.iterdir()} == before | {"report.html"}


# The numbers.


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_null_counts_the_inversions_of_all_permutations(n: int) -> None:
    inversions = [sum(a > b for a, b in itertools.combinations(order, 2)) for order in itertools.permutations(range(n))]
    expected = np.bincount(inversions, minlength=n * (n - 1) // 2 + 1) / math.factorial(n)
    np.testing.assert_allclose(null_pmf(n), expected, atol=1e-12)


@pytest.mark.parametrize("sizes", [(8,), (4, 9, 30), (60,)])
def test_distance_histogram_keeps_all_mass_and_its_null_matches_permutations(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    n = np.repeat(sizes, 2000 // len(sizes))
    values = [rng.permuted(np.tile(np.arange(size), (2000 // len(sizes), 1)), axis=1) for size in sizes]
    distance = np.concatenate(
        [
            sum((v[:, i] > v[:, j]).astype(float) for i, j in itertools.combinations(range(v.shape[1]), 2))
            / (v.shape[1] * (v.shape[1] - 1) / 2)
            for v in values
        ]
    )
    histogram = distance_histogram(n, distance, distance > 0.8, distance < 0.2)
    total = histogram.above + histogram.within + histogram.below
    assert total.sum() == pytest.approx(1)
    assert histogram.null.sum() == pytest.approx(1)
    assert histogram.above.sum() == pytest.approx((distance > 0.8).mean())
    np.testing.assert_allclose(total, histogram.null, atol=0.03)


def test_a_tie_counts_half_in_either_bin() -> None:
    none = np.zeros(1, np.bool_)
    histogram = distance_histogram(np.array([3]), np.array([0.5]), none, none)
    np.testing.assert_allclose(histogram.within, [0, 0.5, 0.5, 0])


def test_category_means_agree_with_scipy(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(5,) * 31, degenerate=frozenset({3})))
    prompts, ids = read_prompts(run / "round-000" / "prompts.parquet")
    completions = read_completions(run / "round-000" / "completions.parquet", ids, "sum")
    found = measure(prompts, completions).conflicts
    means = category_means(prompts, found, 10)
    assert {mean.name for mean in means} == {"law", "code"}
    assert means[0].mean >= means[1].mean
    law = next(mean for mean in means if mean.name == "law")
    values = prompts.distance[[p for p in range(0, 31, 3) if p != 3]]
    assert (law.prompts, law.mean) == (10, pytest.approx(values.mean()))
    assert law.half_width == pytest.approx(1.96 * max(stats.sem(values), kendall_null(5).sd / math.sqrt(10)))
    assert law.interval == (pytest.approx(law.mean - law.half_width), pytest.approx(law.mean + law.half_width))
    assert [m.name for m in category_means(prompts, found, 1)] in (["law"], ["code"])


@pytest.mark.parametrize(
    ("prompts", "distance", "interval", "side"),
    [(3, 0.6, False, 0), (5, 0.6, True, 0), (200, 0.6, True, 1), (200, 0.4, True, -1), (1, 1.0, False, 1)],
)
def test_prompts_that_share_one_value_are_not_certain(
    tmp_path: Path, prompts: int, distance: float, interval: bool, side: int
) -> None:
    run = build(tmp_path / "run", World(sizes=(6,) * prompts, categories=("law",)))
    table, ids = read_prompts(run / "round-000" / "prompts.parquet")
    completions = read_completions(run / "round-000" / "completions.parquet", ids, "sum")
    found = measure(table, completions).conflicts
    (law,) = category_means(table, replace(found, distinct_distance=np.full(prompts, distance)), 10)
    assert law.half_width == pytest.approx(1.96 * kendall_null(6).sd / math.sqrt(prompts))
    assert (law.interval is not None, law.side) == (interval, side)


def test_chosen_rows(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(6,) * 50))
    prompts, ids = read_prompts(run / "round-000" / "prompts.parquet")
    completions = read_completions(run / "round-000" / "completions.parquet", ids, "sum")
    rows = np.arange(300)
    high, low = extremes(completions, rows, 5)
    assert completions.pacs[high[0]] == completions.pacs.max()
    assert completions.pacs[low[0]] == completions.pacs.min()
    best = np.sort(np.maximum.reduceat(completions.pacs, np.arange(0, 300, 6)))[::-1][:5]
    np.testing.assert_array_equal(completions.pacs[high], best)
    assert len(set(completions.prompt[low].tolist())) == 5
    points = sample_points(completions, rows, 100, np.random.default_rng(0))
    assert len(set(points.tolist())) == 100
    assert set(np.argsort(-np.abs(completions.pacs))[:50].tolist()) <= set(points.tolist())
    top = top_prompts(prompts, np.arange(50) != 7, 50)
    assert sorted([*top, 7]) == list(range(50))
    assert prompts.distance[top].tolist() == sorted(prompts.distance[top], reverse=True)
    groups = rows_by_prompt(completions, [9, 2, 9])
    assert {p: r.tolist() for p, r in groups.items()} == {2: list(range(12, 18)), 9: list(range(54, 60))}


def test_no_extremes_without_conflict(tmp_path: Path) -> None:
    run = build(tmp_path / "run", World(sizes=(6,)))
    _, ids = read_prompts(run / "round-000" / "prompts.parquet")
    completions = read_completions(run / "round-000" / "completions.parquet", ids, "sum")
    assert extremes(replace(completions, pacs=np.zeros(6)), np.arange(6), 5) == ([], [])
    assert extremes(completions, np.arange(0), 5) == ([], [])


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(-3, 3)), min_size=1, max_size=90))
def test_length_bands_share_out_all_answers(rows: list[tuple[int, float]]) -> None:
    n_tokens, pacs = np.array([n for n, _ in rows]), np.array([p for _, p in rows])
    bands = length_bands(n_tokens, pacs)
    assert sum(band.completions for band in bands) == len(rows)
    assert len(bands) <= 12
    for band, following in itertools.pairwise(bands):
        assert band.longest < following.shortest
    for band in bands:
        inside = pacs[(n_tokens >= band.shortest) & (n_tokens <= band.longest)]
        assert band.quantiles[2] == pytest.approx(np.median(inside))


def test_rows_are_read_across_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(1000)], "n": range(1000)}), path, row_group_size=64)
    wanted = [999, 0, 63, 64, 500, 500]
    assert read_rows(path, wanted, ("text", "absent")) == {row: {"text": f"t{row}"} for row in wanted}
    assert read_rows(path, [], ("text",)) == {}
    assert read_rows(path, [1], ("absent",)) == {}


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=30) | st.sampled_from(PAYLOADS) | st.lists(st.integers())))
def test_json_in_a_script_element_is_inert_and_whole(value: Any) -> None:
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value
