// The labelling page. Markup says what there is to do, and this does it:
//   data-act="name"   a click on it does ACTS[name]
//   data-key="1 a"    a press of one of these keys is a click on it; data-pick: it answers, so plain letters are its first
//   data-answer       a form whose answer goes through the outbox
// Whatever models or annotators wrote stands inside [hx-disable], and is never looked at for any of these.

import { loadDifferences } from "./differences.js";
import { occupied, openOutbox, post } from "./outbox.js";
import { all, announce, answerable, aside, field, form, hint, notice, one, prefer, preference, question } from "./page.js";
import { beginRanking, changeRanking, finishRanking } from "./ranking.js";

const GRACE = 300; // ms in which a new question takes no answer: a second press was meant for the one before
const NARROW = matchMedia("(max-width: 46rem)"); // as in app.css
const THEMES = ["auto", "light", "dark"];

// -- the time that a question was visible -----------------------------------------------------------------------------

const clock = { spent: 0, since: 0 };
const readClock = () => clock.spent + (clock.since ? performance.now() - clock.since : 0);

function startClock() {
  clock.spent = 0;
  clock.since = document.hidden ? 0 : performance.now();
}

document.addEventListener("visibilitychange", () => {
  clock.spent = readClock();
  clock.since = document.hidden ? 0 : performance.now();
});

// -- a question comes -------------------------------------------------------------------------------------------------

/** Put a reply of the server on the page. */
function show(page) {
  htmx.swap("#task", page, { swapStyle: "innerHTML", swapDelay: 0, settleDelay: 0 });
}

/** Make a question that has just come work; `arrived`: in the place of another. */
function present(arrived) {
  const shown = one("#task > [data-fragment]:not([data-presented])");
  if (!shown) return;
  shown.dataset.presented = "";
  if (arrived) {
    shown.focus({ preventScroll: true });
    window.scrollTo(0, 0);
    announce(`${one("h1", shown).textContent} ${one(".progress p", shown)?.textContent ?? ""}`);
  }
  if (shown !== question()) return;
  startClock();
  if (one("#note").value) openNote(false);
  if (shown.dataset.kind === "ranking") beginRanking();
  if (NARROW.matches) gatherEarlierTurns(shown);
  applyViews();
  showShiftedKeys();
  setTimeout(() => { if (shown.dataset.state === "new") shown.dataset.state = "ready"; }, GRACE);
}

/** A letter that picks an answer does the rest with shift. */
function showShiftedKeys() {
  const taken = new Set(all("[data-pick]").flatMap((button) => button.dataset.key.split(" ")));
  all("[data-key]:not([data-pick])").forEach((control) => {
    const cap = one("kbd", control.closest("label") ?? control);
    const letter = cap.textContent.replace("⇧", "");
    cap.textContent = taken.has(letter.toLowerCase()) ? `⇧${letter}` : letter;
  });
}

// -- an answer goes ---------------------------------------------------------------------------------------------------

document.addEventListener("submit", (event) => {
  const answered = event.target;
  if (!answered.matches("[data-answer]")) return;
  event.preventDefault();
  const button = event.submitter;
  if (!answerable() || ((!button || button.matches("[data-send]")) && !complete(answered))) return;
  field("seconds").value = (readClock() / 1000).toFixed(2);
  const fields = Object.fromEntries(new FormData(answered, button));
  delete fields.csrf; // that of the page which sends it counts
  if (button?.matches(".choice")) all(".choice").forEach((choice) => choice.toggleAttribute("data-chosen", choice === button));
  hint("");
  post(answered.getAttribute("action"), fields);
});

function complete(answered) {
  if (question().dataset.kind === "ranking") return finishRanking();
  const missing = all("[data-required]", answered).filter((field) => !field.value).map((field) => field.dataset.required);
  hint(missing.length ? `Still to say: ${missing.join(" and ")}.` : "");
  return missing.length === 0;
}

function set(button) {
  if (!answerable()) return;
  const { name, value } = button.dataset;
  field(name).value = value;
  all(`[data-act=set][data-name=${name}]`).forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
  hint("");
  if (all("[data-required]").every((field) => field.value)) form().requestSubmit();
}

// -- how texts are shown ----------------------------------------------------------------------------------------------

/** What holds for this question and the next ones; `on`: whether it is to. */
function choose(name, on) {
  prefer(name, on ? "on" : "off");
  applyViews();
}

const pressed = (button) => button.getAttribute("aria-pressed") === "true";

function applyViews() {
  for (const name of ["raw", "unfold"]) showAs(name, preference(name) === "on");
  const open = preference("unfold") === "on";
  all("[data-act=fold]").forEach((button) => fold(button, !open));
  all("details.earlier").forEach((details) => { details.open = open; });
  showDifferences();
  makeReachable();
}

function showAs(name, on) {
  question().toggleAttribute(`data-${name}`, on);
  one(`[data-act=${name}]`)?.setAttribute("aria-pressed", String(on));
}

async function showDifferences() {
  const shown = question();
  if (!one("[data-act=diff]")) return;
  const problem = preference("diff") === "on" ? await loadDifferences(shown) : "";
  if (shown !== question()) return;
  const wanted = preference("diff") === "on"; // which may have changed while they were on their way
  showAs("diff", wanted && !problem);
  aside(wanted && problem ? `No differences now. ${problem} You can answer all the same.` : "");
}

/** On a narrow page, a conversation leaves its room to the answers: all but its end are earlier messages. */
function gatherEarlierTurns(shown) {
  const earlier = one("details.earlier", shown);
  const recent = all(".conversation > .chat > .turn", shown).slice(0, -1);
  if (recent.length < 2) return;
  one(".chat", earlier).append(...recent);
  one("summary", earlier).textContent = `${all(".turn", earlier).length} earlier messages`;
  one(".conversation > .chat", shown).start = all(".turn", earlier).length + 1;
  earlier.hidden = false;
}

/** Keys must be able to scroll what is too wide; what is hidden has no width yet. */
function makeReachable() {
  all(".prose :is(pre, table)").filter((wide) => wide.scrollWidth > wide.clientWidth).forEach((wide) => { wide.tabIndex = 0; });
}

window.addEventListener("resize", makeReachable);
document.addEventListener("toggle", makeReachable, true); // earlier turns

function fold(button, folded) {
  document.getElementById(button.getAttribute("aria-controls")).classList.toggle("folded", folded);
  button.setAttribute("aria-expanded", String(!folded));
  button.textContent = folded ? "Show all" : "Show less";
}

// A link in a folded text that gets the focus must be seen.
document.addEventListener("focusin", (event) => {
  const folded = event.target.closest(".fold.folded");
  if (folded) fold(one(`[aria-controls="${CSS.escape(folded.id)}"]`), false);
});

// -- note, guidelines, theme, keys ------------------------------------------------------------------------------------

function openNote(focus = true) {
  one(".note").hidden = false;
  one("[data-act=note]").setAttribute("aria-expanded", "true");
  if (focus) one("#note").focus();
}

function leaveNote() {
  const empty = !one("#note").value.trim();
  one(".note").hidden = empty;
  one("[data-act=note]").setAttribute("aria-expanded", String(!empty));
  question().focus({ preventScroll: true });
}

function openGuidelines(open, focus = true) {
  const panel = one("#guidelines");
  const button = one(".tools [data-act=guidelines]");
  if (!panel) return;
  panel.hidden = !open;
  button.setAttribute("aria-expanded", String(open));
  prefer("guidelines", open ? "on" : "off");
  makeReachable();
  if (focus) (open ? one(".sheet", panel) : button).focus();
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  all("[data-theme-name]").forEach((name) => { name.textContent = theme; });
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  prefer("theme", theme);
  showTheme(theme);
  announce(`Theme: ${theme}`);
}

function useKeys(on) {
  prefer("keys", on ? "on" : "off");
  document.documentElement.dataset.keys = on ? "on" : "off";
  all("[data-act=keys]").forEach((box) => { box.checked = on; });
}

// -- clicks -----------------------------------------------------------------------------------------------------------

function openHelp() {
  one("#help").showModal();
  one("#help").scrollTop = 0; // not where it was left
}

const rank = (button) => { if (answerable()) changeRanking(button.dataset.act, button.closest(".card")?.dataset.option); };

const ACTS = {
  set,
  pick: rank, out: rank, up: rank, down: rank, level: rank, tie: rank, back: rank,
  diff: (button) => choose("diff", !pressed(button)),
  raw: (button) => choose("raw", !pressed(button)),
  unfold: (button) => choose("unfold", !pressed(button)),
  fold: (button) => fold(button, button.getAttribute("aria-expanded") === "true"),
  note: () => openNote(),
  guidelines: () => openGuidelines(one("#guidelines").hidden),
  theme: nextTheme,
  help: openHelp,
  close: () => one("#help").close(),
  keys: (box) => useKeys(box.checked),
};

document.addEventListener("click", (event) => {
  const control = event.target.closest("[data-act]");
  if (control && !control.closest("[hx-disable]")) ACTS[control.dataset.act]?.(control);
});

// -- keys -------------------------------------------------------------------------------------------------------------

/** The control that a key is for; with shift, a letter is for what does not answer. */
function controlFor(key, shift) {
  const controls = all("[data-key]").filter((c) => c.dataset.key.split(" ").includes(key) && !c.disabled && (c.checkVisibility() || c.matches("[data-always]")));
  const other = controls.find((control) => !control.matches("[data-pick]"));
  return shift && /^[a-z]$/.test(key) ? other : controls.find((control) => control.matches("[data-pick]")) ?? other;
}

/** The key's name; its Latin letter where the keyboard writes another script. */
function nameOf(event) {
  const latin = /^Key([A-Z])$/.exec(event.code);
  return latin && event.key.length === 1 && event.key > "\x7f" ? latin[1].toLowerCase() : event.key.toLowerCase();
}

/** The key to act on, or null where the browser, a field or a dialog wants it. */
function wanted(event) {
  if (event.defaultPrevented || event.isComposing || event.altKey || one("dialog[open]")) return null;
  const modified = event.ctrlKey || event.metaKey;
  if (modified) return event.key.toLowerCase() === "z" && !event.shiftKey ? "u" : null;
  const key = nameOf(event);
  const at = event.target;
  if (event.repeat || preference("keys") === "off") return null;
  if (key.startsWith("arrow") && at.closest("[hx-disable], .scroll, .sheet")) return null; // they scroll it
  // Enter on a control that was reached by keys is a click on that control.
  return key === "enter" && at.matches("a, button, summary, input, :any-link") && at.matches(":focus-visible") ? null : key;
}

document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (event.key === "Escape" && at.id === "note") return leaveNote();
  if (event.key === "Escape" && at.closest("#guidelines")) return openGuidelines(false);
  if (at.matches("textarea, select, input:not([type=checkbox])")) return undefined;
  const key = wanted(event);
  const control = key && controlFor(key, event.shiftKey);
  if (!control) return undefined;
  event.preventDefault();
  return control.click();
});

// -- what htmx loads: other questions, and the overview ---------------------------------------------------------------

// While an answer is under way there is no going elsewhere; a hidden overview needs no news.
document.addEventListener("htmx:beforeRequest", (event) => {
  if (event.target.matches("[data-live]") ? document.hidden : occupied()) event.preventDefault();
});

let latest = ""; // the overview as it stands

document.addEventListener("htmx:beforeSwap", (event) => {
  const { target, serverResponse, xhr } = event.detail;
  if (xhr.status !== 200 || !serverResponse.includes("data-fragment")) event.detail.shouldSwap = false;
  else if (target.matches("[data-live]")) refresh(event, target, serverResponse);
});

function refresh(event, target, serverResponse) {
  notice("");
  if (serverResponse === latest) { // what is the same stays, with focus, selection and scrolling
    event.detail.shouldSwap = false;
    return;
  }
  latest = serverResponse;
  const scrolled = all("[data-keep-scroll]", target).map((part) => [part.id, part.scrollLeft]);
  target.addEventListener("htmx:afterSwap", () => {
    scrolled.forEach(([id, left]) => { const part = document.getElementById(id); if (part) part.scrollLeft = left; });
  }, { once: true });
}

for (const name of ["htmx:sendError", "htmx:timeout", "htmx:responseError"]) {
  document.addEventListener(name, (event) => {
    const { status, responseText } = event.detail.xhr;
    const refused = status >= 400 && status < 500;
    notice(refused ? `That cannot be done: ${responseText.slice(0, 300)}` : "The server cannot be reached. What you see may be old.", true);
  });
}

// -- signing in -------------------------------------------------------------------------------------------------------

/** A personal link is /join#TOKEN: what stands after # is never sent by itself, so it is put into the form. */
function join(entrance) {
  const secret = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  entrance.addEventListener("submit", () => {
    entrance.elements.token.value = entrance.elements.token.value.trim().replace(/^.*#/, "");
  });
  if (!secret) return;
  entrance.elements.token.value = secret;
  entrance.requestSubmit();
}

// -- the page ---------------------------------------------------------------------------------------------------------

showTheme(document.documentElement.dataset.theme);
useKeys(preference("keys") !== "off");
if (preference("guidelines") === "on") openGuidelines(true, false);
present(false);
htmx.onLoad(() => present(true));
if (one("#task")) openOutbox(show);
if (one("[data-join]")) join(one("[data-join]"));
