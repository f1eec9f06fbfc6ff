// The recommendations, and how they moved against the automatic depth.

import { $, el, nameOf } from "./dom.js";

/**
 * Show the list.
 *
 * automatic: the items at the automatic depth, or null where the list is that one.
 * seen: ids of the history.
 * add(item): take an item into the history.
 */
export function showList(items, { automatic, seen, add }) {
  const before = automatic && new Map(automatic.map((item) => [item.item_id, item.rank]));
  const focused = [...$("list").children].findIndex((row) => row.contains(document.activeElement));
  $("list").replaceChildren(
    ...items.map((item) =>
      el(
        "li",
        {},
        el("span", { class: "rank" }, String(item.rank)),
        el(
          "span",
          { class: "what" },
          el("span", { class: "title" }, nameOf(item)),
          item.title && el("small", {}, item.item_id),
          seen.has(item.item_id) && el("small", { class: "tag" }, "in the history"),
        ),
        before && moved(item.rank, before.get(item.item_id)),
        el("span", { class: "score", title: "log-probability" }, item.score.toFixed(2)),
        el("button", { type: "button", class: "small", "aria-label": `Add ${nameOf(item)} to the history`, click: () => add(item) }, "+"),
      ),
    ),
  );
  if (focused >= 0) $("list").children[Math.min(focused, items.length - 1)]?.querySelector("button").focus();
  const here = new Set(items.map((item) => item.item_id));
  const left = (automatic ?? []).filter((item) => !here.has(item.item_id));
  $("gone").hidden = !left.length;
  $("gone").textContent = `Left the list: ${left.map((item) => `${nameOf(item)} (was ${item.rank})`).join(", ")}`;
}

function moved(rank, was) {
  if (was === undefined) return mark("new", "new", "not in the automatic list");
  if (rank < was) return mark("up", `\u25b2 ${was - rank}`, `up ${was - rank}, was ${was}`);
  if (rank > was) return mark("down", `\u25bc ${rank - was}`, `down ${rank - was}, was ${was}`);
  return mark("same", "=", "same rank");
}

const mark = (kind, shown, spoken) =>
  el("span", { class: `moved ${kind}` }, el("span", { "aria-hidden": "true" }, shown), el("span", { class: "unseen" }, spoken));

/** How two lists compare: items in both, and items at the same rank. */
export function compare(items, automatic) {
  const before = new Map(automatic.map((item) => [item.item_id, item.rank]));
  const both = items.filter((item) => before.has(item.item_id));
  return { both: both.length, unmoved: both.filter((item) => before.get(item.item_id) === item.rank).length };
}
