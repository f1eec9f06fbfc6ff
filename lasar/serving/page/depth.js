// The depth: what the Policy Head thinks of every number of steps, a slider that forces one, and what each costs.

import { $, el, count, percent, milliseconds } from "./dom.js";

export const spokenDepth = (depth) => (depth === "auto" ? "automatic" : depth === 1 ? "1 step" : `${depth} steps`);

/**
 * The panel; made once, since a slider must not be replaced under a finger.
 *
 * force(depth): the slider was moved, to "auto" or a number. measure(): every depth is wanted.
 */
export function depthPanel(info, { force, measure }) {
  const panel = $("depth-panel");
  if (!info.max_depth) {
    panel.replaceChildren(el("p", { class: "hint" }, "This model answers at once: it was trained without latent steps."));
    return { show() {}, slider: null };
  }
  const depths = ["auto", ...Array(info.max_depth + 1).keys()];
  const lead = el("p", { class: "lead" });
  const columns = depths.map((depth) => el("span", { class: "column", "data-depth": String(depth) }));
  const chart = el("div", { class: "chart grid", role: "img" }, el("span", { class: "gutter" }, "Policy", el("br"), "Head, %"), ...columns);
  const slider = el("input", {
    id: "slider",
    type: "range",
    min: "-1",
    max: String(info.max_depth),
    step: "1",
    "aria-label": "Latent steps",
    input: () => {
      label();
      force(slider.value === "-1" ? "auto" : Number(slider.value));
    },
  });
  const row = (name) => depths.map((depth) => el("td", { "data-row": name, "data-depth": String(depth) }, "\u2013"));
  const [same, time] = [row("same"), row("time")];
  const sameHead = el("th", { scope: "row", class: "gutter" });
  const table = el(
    "table",
    { class: "grid" },
    el("caption", { class: "unseen" }, "Every depth against the automatic one"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "gutter" }, "steps"), ...depths.map((depth) => el("th", { scope: "col" }, String(depth))))),
    el("tbody", {}, el("tr", {}, sameHead, ...same), el("tr", {}, el("th", { scope: "row", class: "gutter" }, "ms"), ...time)),
  );
  const button = el("button", { type: "button", id: "measure", click: measure }, "Measure every depth");
  const note = el("p", { class: "hint", id: "depth-note" });
  const track = el("div", { class: "track" }, slider);
  panel.replaceChildren(lead, el("div", { class: "depths", role: "group", "aria-label": "Depths" }, chart, track, table), el("div", { class: "row" }, button), note);
  panel.style.setProperty("--depths", String(depths.length));

  function label() {
    slider.setAttribute("aria-valuetext", spokenDepth(slider.value === "-1" ? "auto" : Number(slider.value)));
  }

  /** Draw: `wanted` depth, `automatic` response, `known` Map of depth to {items in common, ms}. */
  function show({ wanted, automatic, taken, known, rounds }) {
    slider.value = wanted === "auto" ? "-1" : String(wanted);
    label();
    const distribution = automatic.explanation?.distribution;
    const byDepth = new Map((distribution ?? []).map(({ depth, probability }) => [depth, probability]));
    const tallest = Math.max(...byDepth.values(), 0.01);
    chart.hidden = !distribution;
    columns.forEach((column, n) => {
      const share = byDepth.get(depths[n]);
      const filled = el("span", { class: "fill" });
      filled.style.setProperty("--share", String((share ?? 0) / tallest));
      column.replaceChildren(...(share === undefined ? [] : [el("small", {}, (share * 100).toFixed(0)), filled]));
      column.classList.toggle("taken", depths[n] === taken);
      column.classList.toggle("chosen", depths[n] === automatic.depth);
    });
    const spoken = [...byDepth].map(([depth, share]) => `${depth}: ${percent(share)}`);
    chart.setAttribute("aria-label", `Policy Head's probability of every number of steps. ${spoken.join(", ")}`);
    lead.replaceChildren(...leadOf(wanted, automatic.depth, distribution, info));
    sameHead.textContent = `same ${count(automatic.items.length)}`;
    depths.forEach((depth, n) => {
      const cell = known.get(depth);
      same[n].textContent = cell ? String(cell.both) : "\u2013";
      time[n].textContent = cell ? shortTime(cell.ms) : "\u2013";
      for (const td of [same[n], time[n]]) td.classList.toggle("taken", depth === wanted);
    });
    table.tHead.rows[0].querySelectorAll("th:not(.gutter)").forEach((th, n) => th.classList.toggle("taken", depths[n] === wanted));
    note.textContent = `same: how many items of the automatic list are in the list of that depth. ms: ${rounds ? `median of ${rounds} requests` : "one request, so expect noise"}, without explaining.`;
  }

  return { show, slider, button };
}

function leadOf(wanted, automatic, distribution, info) {
  const chosen = info.fixed_depth === null ? "the Policy Head chose" : "this model always takes";
  const strong = el("strong", {}, spokenDepth(wanted === "auto" ? automatic : wanted));
  if (wanted === "auto") {
    const sure = distribution?.find(({ depth }) => depth === automatic);
    return [strong, `: ${chosen} it`.replace("takes it", "takes that many"), sure ? ` (probability ${percent(sure.probability)}).` : "."];
  }
  return [strong, `, forced; ${chosen} ${spokenDepth(automatic)}.`];
}

function shortTime(ms) {
  return ms >= 1000 ? milliseconds(ms).replace(" ms", "").replace(" ", "") : ms.toFixed(0);
}
