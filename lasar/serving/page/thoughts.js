// What every latent step is near to in words, and where the model would go if it stopped there.

import { $, el, bar, counted, nameOf, percent } from "./dom.js";

/** Show the steps of an explanation; `info` says whether the run has words for them. */
export function showThoughts(steps, info) {
  $("thoughts-note").textContent = info.has_rationales
    ? "Segments: the teacher's sentences whose anchors are nearest (cosine); a hint at what a step holds, not a transcript. Directions: the leading first codes if the model stopped there, with their best known items."
    : "Directions: the leading first codes if the model stopped there, with their best known items. This run has no rationales to put steps into words.";
  const tallest = Math.max(...steps.flatMap((step) => step.directions.map((direction) => direction.probability)), 1e-9);
  const wide = matchMedia("(min-width: 48rem)").matches;
  $("thoughts").replaceChildren(
    ...steps.map((step, n) => {
      const earlier = n > 0 && new Set(steps[n - 1].directions.map((direction) => direction.code));
      const last = n === steps.length - 1;
      return el(
        "details",
        { class: "step", open: wide || last },
        el("summary", {}, el("strong", {}, step.number ? `Step ${step.number}` : info.max_depth ? "Before thinking" : "After the history"), el("span", { class: "soft" }, gist(step))),
        el(
          "div",
          { class: "columns" },
          step.segments.length > 0 && el("ul", { class: "segments", "aria-label": "Nearest segments" }, ...step.segments.map(segment)),
          el("ul", { class: "directions", "aria-label": "Directions" }, ...step.directions.map((direction) => directionOf(direction, tallest, earlier))),
        ),
      );
    }),
  );
}

const gist = (step) => (step.directions[0]?.items[0] ? `towards ${nameOf(step.directions[0].items[0])}` : "");

const segment = ({ text, similarity }) => el("li", {}, el("span", { class: "number" }, similarity.toFixed(2)), el("q", {}, text));

function directionOf({ code, probability, num_items, items }, tallest, earlier) {
  return el(
    "li",
    {},
    el(
      "span",
      { class: "measure" },
      el("code", {}, `code ${code}`),
      bar(probability / tallest),
      el("span", { class: "number" }, percent(probability)),
      earlier && !earlier.has(code) && el("small", { class: "tag" }, "new"),
    ),
    el("small", {}, `${counted(num_items, "item")}: ${items.map(nameOf).join("; ")}`),
  );
}
