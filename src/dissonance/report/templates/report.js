"use strict";

// Vega-Embed empties its element by innerHTML = ""; with Trusted Types nothing else on this page can write HTML.
if (window.trustedTypes) {
  trustedTypes.createPolicy("default", { createHTML: (html) => (html === "" ? html : null) });
}

const tooltip = document.getElementById("tooltip");

function hideTooltip() {
  tooltip.hidden = true;
}

// Vega's own tooltip writes HTML; this one writes text only, since prompts and answers are hostile.
function showTooltip(_handler, event, _item, value) {
  if (value === null || value === undefined || value === "") {
    hideTooltip();
    return;
  }
  const rows = Object.entries(value).filter(([, text]) => text !== "").flatMap(([name, text]) => {
    const term = document.createElement("dt");
    const definition = document.createElement("dd");
    term.textContent = name;
    definition.textContent = String(text);
    definition.dir = "auto";
    return [term, definition];
  });
  tooltip.replaceChildren(...rows);
  tooltip.hidden = false;
  const gap = 14;
  const right = event.clientX + gap + tooltip.offsetWidth;
  const bottom = event.clientY + gap + tooltip.offsetHeight;
  const left = right < innerWidth ? event.clientX + gap : Math.max(4, event.clientX - gap - tooltip.offsetWidth);
  const top = bottom < innerHeight ? event.clientY + gap : Math.max(4, event.clientY - gap - tooltip.offsetHeight);
  tooltip.style.left = `${left}px`;
  tooltip.style.top = `${top}px`;
}

addEventListener("scroll", hideTooltip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());

const drawn = [...document.querySelectorAll("[data-chart]")].map((element) => {
  const spec = JSON.parse(document.getElementById(`${element.id}-spec`).textContent);
  // ast: expressions are interpreted, never compiled by eval, which the Content-Security-Policy forbids.
  return vegaEmbed(element, spec, {
    mode: "vega-lite",
    renderer: "svg",
    actions: false,
    ast: true,
    defaultStyle: false,
    tooltip: showTooltip,
  });
});

Promise.allSettled(drawn).then((results) => {
  results.filter((result) => result.reason).forEach((result) => console.error(result.reason));
  document.documentElement.dataset.drawn = "yes";
});
