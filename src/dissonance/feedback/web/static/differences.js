// Differences between the answers: the server works them out when somebody first asks for them, and the page keeps them.

import { all, field, one } from "./page.js";

const TIMEOUT = 20_000; // ms until a request counts as lost

const fetching = new WeakMap(); // question -> the promise of what is under way, or has come

/** Put a question's differences on the page, if they are not there; gives why they cannot be shown, or "". */
export function loadDifferences(shown) {
  if (!fetching.has(shown)) fetching.set(shown, load(shown).catch(() => "The server cannot be reached."));
  return fetching.get(shown).then((problem) => {
    if (problem) fetching.delete(shown); // the next press tries again
    return problem;
  });
}

async function load(shown) {
  const reply = await fetch(`/question/differences?${new URLSearchParams({ question: field("question").value })}`, {
    headers: { "HX-Request": "true" },
    redirect: "manual",
    signal: AbortSignal.timeout(TIMEOUT),
  });
  const text = await reply.text();
  if (reply.status === 401) return "You are signed out.";
  const part = new DOMParser().parseFromString(text, "text/html");
  // A reply that is none of ours, from a hotel's sign-in page perhaps, is as good as no reply.
  if (!reply.ok || !one("[data-fragment]", part)) return "The server does not give them just now.";
  const found = all(".diff", part);
  if (!found.length) return "These texts are too long to be compared.";
  const cards = all(".card .fold", shown);
  for (const text of found) {
    cards[text.dataset.place].append(text);
    delete text.dataset.place; // inside [hx-disable] no element carries more than a class
  }
  return "";
}
