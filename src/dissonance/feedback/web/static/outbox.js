// The outbox. An answer is written down in the browser before it is sent, and crossed out when the server has said that
// it is stored. In between the connection, the server or this tab may go: the page sends it again, now or when it is next
// opened, with the same key, and the server stores a key once.

import { all, field, kept, notice, one, setState } from "./page.js";

const PREFIX = "dissonance:answer:";
const TIMEOUT = 20_000; // ms until a request counts as lost
const LONGEST_PAUSE = 30; // s between two tries

const refused = new Set(); // keys that the server will not have; tried again when the page is next opened
let busy = false;
let lasting = true; // whether what is kept outlives this page
let tries = 0;
let timer = 0;
let show = () => {};

const me = () => document.body.dataset.person;

/** Whether an answer is under way, or waits to be. */
export const occupied = () => busy || waiting().length > 0;

/** Start: `showPage` puts a reply on the page. */
export function openOutbox(showPage) {
  show = showPage;
  window.addEventListener("online", flush);
  window.addEventListener("beforeunload", (event) => { if (!lasting && waiting().length) event.preventDefault(); });
  flush();
}

/** Keep an answer, and send it. */
export function post(action, fields) {
  lasting = put({ person: me(), action, fields, at: Date.now() });
  flush();
}

function put(entry) { return kept.set(PREFIX + entry.fields.key, JSON.stringify(entry)); }
function drop(entry) { kept.remove(PREFIX + entry.fields.key); }

/** This person's answers, the oldest first; another's wait for that one. */
function waiting() {
  const entries = [];
  for (const name of kept.names().filter((n) => n.startsWith(PREFIX))) {
    try {
      const entry = JSON.parse(kept.get(name));
      if (entry.person === me() && !refused.has(entry.fields.key)) entries.push(entry);
    } catch { kept.remove(name); }
  }
  return entries.sort((a, b) => a.at - b.at);
}

/** Send what is waiting until all is stored or the server cannot be reached. */
async function flush() {
  const [entry] = waiting();
  if (busy || !entry) return;
  clearTimeout(timer);
  busy = true;
  setState("sending");
  const result = await send(entry);
  busy = false;
  if ("later" in result) return postpone(result.later);
  tries = 0;
  if (result.closed) return signedOut();
  if (result.refused) refuse(entry, result.refused);
  else settle(entry, result);
  return flush();
}

function settle(entry, { stored, next }) {
  drop(entry);
  notice("");
  if (stored && one("#task")) show(stored);
  else if (next && isHere(entry)) location.assign(next);
  else setState("ready");
}

/** Whether an answer is to the question on the page. */
const isHere = (entry) => field("key")?.value === entry.fields.key;

/** Send one answer: {stored: page, next: address}, {later: seconds}, {closed: true} or {refused: reason}. */
async function send(entry, again = true) {
  let reply;
  let text;
  try {
    reply = await fetch(entry.action, {
      method: "POST",
      headers: { "HX-Request": "true" },
      body: new URLSearchParams({ ...entry.fields, csrf: csrf() }),
      redirect: "manual",
      signal: AbortSignal.timeout(TIMEOUT),
    });
    text = await reply.text();
    if (reply.status === 403 && again && await renewCsrf()) return await send(entry, false);
  } catch { return { later: 0 }; }
  if (reply.ok && text.includes("data-fragment")) return { stored: text };
  if (reply.status === 204 && reply.headers.has("HX-Redirect")) return { stored: "", next: reply.headers.get("HX-Redirect") };
  if (reply.type === "opaqueredirect" || reply.status === 401) return { closed: true };
  // A reply that is none of ours, from a hotel's sign-in page perhaps, is as good as no reply.
  if (reply.ok || reply.status >= 500 || [403, 408, 429].includes(reply.status)) {
    return { later: Number(reply.headers.get("Retry-After")) || 0 };
  }
  return { refused: reply.headers.get("Content-Type")?.startsWith("text/plain") ? text : `status ${reply.status}` };
}

const csrf = () => field("csrf")?.value ?? document.body.dataset.csrf ?? "";

/** Take a fresh CSRF token: the person may have signed in again since this page was made. */
async function renewCsrf() {
  const reply = await fetch("/", { redirect: "manual", signal: AbortSignal.timeout(TIMEOUT) });
  const { csrf: fresh } = new DOMParser().parseFromString(await reply.text(), "text/html").body.dataset;
  if (!fresh || fresh === csrf()) return false;
  document.body.dataset.csrf = fresh;
  all("input[name=csrf]").forEach((field) => { field.value = fresh; });
  return true;
}

function postpone(seconds) {
  tries += 1;
  const pause = Math.max(seconds, Math.min(LONGEST_PAUSE, 2 ** (tries - 1)) * (0.5 + Math.random() / 2));
  timer = setTimeout(flush, pause * 1000);
  setState("kept");
  if (tries > 1 && one("#notice .notice")) return; // it says so already
  const what = lasting
    ? "Your answer is kept in this browser and will be sent by itself. You may close the page."
    : "Keep this page open: your answer will be sent by itself.";
  notice(`The server cannot be reached. ${what}`, true, [["Send now", flush]]);
}

function signedOut() {
  setState("kept");
  notice("You are signed out. Your answer is kept in this browser and will be sent when you open your personal link again.", true);
}

/** The server does not want it: whoever answered decides what becomes of it. */
function refuse(entry, reason) {
  setState("ready");
  if (isHere(entry)) {
    drop(entry); // it stands in the form, to be answered again
    const load = () => { notice(""); htmx.ajax("GET", "/question", "#task"); };
    notice(`The server did not take this answer: ${reason}`, true, [["Load the question again", load]]);
  } else {
    refused.add(entry.fields.key);
    const away = () => { drop(entry); notice(""); };
    notice(`The server did not take an earlier answer: ${reason}`, true, [["Throw it away", away]]);
  }
}
