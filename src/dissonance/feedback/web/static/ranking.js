// Ranking: letters in order of preference. A tie has the rank of the one before it.

import { all, announce, field, hint, one, question } from "./page.js";

let order = []; // [{letter, tied}]

const letters = () => all(".card").map((card) => card.dataset.option);
const place = (letter) => order.findIndex((item) => item.letter === letter);
const inWords = () => order.map((item, i) => (i ? (item.tied ? " = " : " > ") : "") + item.letter).join("");

function ranks() {
  let rank = 0;
  return new Map(order.map((item) => [item.letter, item.tied ? rank : (rank += 1)]));
}

/** Begin with the ranks that the form holds: none, or those of the answer that is being corrected. */
export function beginRanking() {
  const given = field("ranks").value.split(",").filter(Boolean).map(Number);
  const sorted = given.map((_, i) => i).sort((a, b) => given[a] - given[b] || a - b);
  order = sorted.map((i, n) => ({ letter: letters()[i], tied: n > 0 && given[i] === given[sorted[n - 1]] }));
  draw();
}

/** Do what a button says, to the card it stands on. */
export function changeRanking(act, letter) {
  if (act === "pick" && place(letter) < 0) order.push({ letter, tied: false });
  if (act === "out") order = order.filter((item) => item.letter !== letter);
  if (act === "back") order.pop();
  if (act === "up") exchange(place(letter), -1);
  if (act === "down") exchange(place(letter), 1);
  if (act === "level") tie(place(letter));
  if (act === "tie") tie(order.length - 1);
  hint("");
  draw();
  announce(inWords() || "Nothing ranked");
}

function tie(i) { if (i > 0) order[i].tied = !order[i].tied; }

/** Letters change places; ties stay where they are. */
function exchange(i, by) {
  const [here, there] = [order[i], order[i + by]];
  if (there) [here.letter, there.letter] = [there.letter, here.letter];
}

/** Whether the ranking can go: one that is left over comes last. */
export function finishRanking() {
  const left = letters().filter((letter) => place(letter) < 0);
  if (left.length > 1) hint(`Still to rank: ${left.join(", ")}.`);
  if (left.length === 1) {
    order.push({ letter: left[0], tied: false });
    draw();
  }
  return left.length <= 1;
}

function draw() {
  if (order.length) order[0].tied = false;
  const known = ranks();
  all(".card").forEach((card) => drawCard(card, known.get(card.dataset.option)));
  one("[data-order]").textContent = inWords() || "Pick the best answer first";
  field("ranks").value = known.size === letters().length ? letters().map((letter) => known.get(letter)).join(",") : "";
}

function drawCard(card, rank) {
  const focused = card.contains(document.activeElement) ? document.activeElement : null;
  one("[data-rank]", card).textContent = rank ? ["1st", "2nd", "3rd"][rank - 1] ?? `${rank}th` : "";
  one(".moves", card).hidden = !rank;
  one(".pick", card).hidden = Boolean(rank);
  one("[data-act=level]", card).setAttribute("aria-pressed", String(Boolean(order[place(card.dataset.option)]?.tied)));
  // A control that goes must not take the focus with it.
  if (focused && (focused.closest("[hidden]"))) (one(".moves:not([hidden]) button, .pick:not([hidden])", card) ?? question()).focus();
}
