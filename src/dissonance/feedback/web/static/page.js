// What every part of the page needs: finding things, keeping things in the browser, telling people.

export const one = (selector, from = document) => from.querySelector(selector);
export const all = (selector, from = document) => [...from.querySelectorAll(selector)];
export const question = () => one("#question");
export const form = () => one("#question form");
/** A hidden field of the form; a button may have the same name. */
export const field = (name) => one(`#question input[name="${name}"]`);

const memory = new Map(); // where the browser lets us keep nothing

/** Strings by name, kept in this browser. */
export const kept = {
  get(name) {
    try { return localStorage.getItem(name) ?? memory.get(name) ?? null; } catch { return memory.get(name) ?? null; }
  },
  /** Whether it outlives this page. */
  set(name, value) {
    memory.set(name, value);
    try { localStorage.setItem(name, value); return true; } catch { return false; }
  },
  remove(name) {
    memory.delete(name);
    try { localStorage.removeItem(name); } catch { /* it was in memory only */ }
  },
  names() {
    try { return [...new Set([...Object.keys(localStorage), ...memory.keys()])]; } catch { return [...memory.keys()]; }
  },
};

export const preference = (name) => kept.get(`dissonance:${name}`);
export const prefer = (name, value) => kept.set(`dissonance:${name}`, value);

/** Say something to those who listen to the page. */
export function announce(text) { one("#announce").textContent = text; }

/** Show a line above the question, with buttons [label, action]; without text, take it away. */
export function notice(text, bad = false, buttons = []) {
  const place = one("#notice");
  place.replaceChildren();
  if (!text) return;
  const line = document.createElement("p");
  line.className = bad ? "notice bad" : "notice";
  line.append(text);
  for (const [label, action] of buttons) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet";
    button.textContent = label;
    button.addEventListener("click", action);
    line.append(" ", button);
  }
  place.append(line);
}

/** Say something about how the question is shown; without text, take it away. */
export function aside(text) { const place = one("#aside"); if (place) place.textContent = text; }

/** Say under the answers what is still missing. */
export function hint(text) { const place = one("#hint"); if (place) place.textContent = text; }

/** "new" (just shown), "ready", "sending" or "kept" (waiting for the server): only "ready" takes an answer. */
export function setState(name) {
  const shown = question();
  if (!shown) return;
  shown.dataset.state = name;
  shown.setAttribute("aria-busy", String(name === "sending"));
}

export const answerable = () => question()?.dataset.state === "ready";
