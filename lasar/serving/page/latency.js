// Where an answer's time went. Explaining is left out: only this page asks for it.

import { $, el, milliseconds } from "./dom.js";

const PARTS = ["prompt", "think", "search", "rest"];

/** Milliseconds of an answer by part, without explaining. */
export function partsOf({ prompt, think, search, explain, total }) {
  return { prompt, think, search, rest: Math.max(0, total - explain - prompt - think - search) };
}

const bare = (time) => milliseconds(time).replace(" ms", "");

export const answerTime = (timing) => timing.total - timing.explain;

/** Show a bar and a row of numbers for every answer in [{label, timing}], on one scale. */
export function showLatency(answers) {
  const longest = Math.max(...answers.map(({ timing }) => answerTime(timing)));
  const bars = answers.map(({ timing }) => {
    const parts = partsOf(timing);
    const pieces = PARTS.map((name) => {
      const piece = el("span", { class: `part ${name}` });
      piece.style.width = `${(parts[name] / longest) * 100}%`;
      return piece;
    });
    return el("div", { class: "parts", "aria-hidden": "true" }, ...pieces); // the table has the numbers
  });
  const heads = PARTS.map((name) => el("th", { scope: "col" }, el("span", { class: `swatch ${name}`, "aria-hidden": "true" }), name));
  const rows = answers.map(({ label, timing }) => {
    const parts = partsOf(timing);
    const cells = PARTS.map((name) => el("td", {}, bare(parts[name])));
    return el("tr", {}, el("th", { scope: "row" }, label), ...cells, el("td", {}, bare(answerTime(timing))));
  });
  $("latency").replaceChildren(
    ...bars,
    el("table", { class: "times" }, el("thead", {}, el("tr", {}, el("td", {}, "ms"), ...heads, el("th", { scope: "col" }, "all"))), el("tbody", {}, ...rows)),
    el("p", { class: "hint" }, `Single requests, so expect noise. The rest is waiting, checking and packing. Explaining took another ${milliseconds(answers[0].timing.explain)}; only this page asks for it.`),
  );
}
