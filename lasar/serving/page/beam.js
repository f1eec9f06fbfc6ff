// The beam as a tree: every prefix of a semantic ID that leads to an item the search ended with.

import { $, el, bar, count, counted, nameOf, percent } from "./dom.js";

/** Show the tree, unfolded along the path to the first item. */
export function showBeam(root) {
  const items = leaves(root).length;
  $("beam-note").textContent = `The search ended with ${counted(items, "item")} of ${count(root.num_items)}. Bars and first percentages: how probable the codes so far are together; then the last code's share of the one before it.`;
  const tallest = Math.max(...root.children.map((child) => Math.exp(child.score)), 1e-9);
  $("tree").replaceChildren(...branches(root, [], tallest));
  foldButton(false);
  $("unfold").hidden = !items;
}

/** Unfold or fold all of the tree. */
export function foldAll() {
  const open = $("unfold").getAttribute("aria-pressed") !== "true";
  for (const details of $("tree").querySelectorAll("details")) details.open = open;
  foldButton(open);
}

function foldButton(open) {
  $("unfold").setAttribute("aria-pressed", String(open));
  $("unfold").textContent = open ? "Fold all" : "Unfold all";
}

function leaves(node) {
  return node.children.length ? node.children.flatMap(leaves) : node.item ? [node] : [];
}

const ranksOf = (node) => leaves(node).map((leaf) => leaf.rank).filter(Boolean).sort((a, b) => a - b);

function branches(node, path, tallest) {
  const rows = node.children.map((child) => branch(child, [...path, child.code], tallest));
  const share = 1 - node.children.reduce((sum, child) => sum + child.probability, 0);
  const others = node.num_items - node.children.reduce((sum, child) => sum + child.num_items, 0);
  if (rows.length && others > 0) {
    rows.push(el("li", { class: "others soft" }, `not followed: ${counted(others, "item")}, ${percent(Math.max(0, share))}`));
  }
  return rows;
}

function branch(node, path, tallest) {
  const whole = Math.exp(node.score);
  const parent = path.at(-2);
  const measure = [
    bar(whole / tallest),
    el("span", { class: "number" }, fine(whole)),
    parent !== undefined && el("span", { class: "given soft" }, `${percent(node.probability)} of ${parent}`),
  ];
  if (node.item) {
    const name = el("span", { class: "title" }, nameOf(node.item));
    const rank = node.rank ? el("span", { class: "badge" }, `#${node.rank}`) : el("span", { class: "badge none", "aria-label": "not in the list" }, "\u2013");
    return el("li", { class: "leaf" }, el("code", {}, path.join("\u00b7")), ...measure, rank, name);
  }
  const ranks = ranksOf(node);
  const within = leaves(node).length;
  return el(
    "li",
    {},
    el(
      "details",
      { open: ranks[0] === 1 },
      el(
        "summary",
        {},
        el("code", {}, path.join("\u00b7")),
        ...measure,
        el("span", { class: "soft" }, `${count(within)} of ${counted(node.num_items, "item")}`),
        ranks.length > 0 && el("span", { class: "ranks" }, ranks.map((rank) => `#${rank}`).join(" ")),
      ),
      el("ul", {}, ...branches(node, path, tallest)),
    ),
  );
}

const fine = (share) => (share >= 0.001 ? `${(share * 100).toFixed(1)} %` : "<0.1 %");
