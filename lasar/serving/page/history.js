// The history: orders, newest first on the screen, every item with a button that removes it.

import { $, el, counted, nameOf } from "./dom.js";

/** Show the orders of a view; `remove(order, index)` takes an item out. */
export function showHistory(view, { remove, hasOrders, hidden }) {
  const box = $("history");
  const items = view.orders.reduce((sum, order) => sum + order.items.length, 0);
  $("clear").hidden = !items && !view.user;
  $("new-order").hidden = !hasOrders || !view.orders.at(-1)?.items.length;
  if (hidden) {
    box.replaceChildren(el("p", {}, "User ", el("strong", {}, view.user), el("span", { class: "soft" }, ": the server keeps the history to itself.")));
    return;
  }
  if (!view.orders.length) {
    box.replaceChildren(el("p", { class: "soft" }, view.user ? `User ${view.user} has an empty history.` : "No items yet: an empty history."));
    return;
  }
  const owner = view.user ? [el("strong", {}, `User ${view.user}`), ": "] : ["Your own: "];
  const size = `${counted(items, "item")}${hasOrders ? ` in ${counted(view.orders.length, "order")}` : ""}, newest first`;
  const rows = view.orders.map((order, number) => [order, number]).reverse();
  box.replaceChildren(el("p", {}, ...owner, el("span", { class: "soft" }, size)), el("div", { class: "orders" }, ...(hasOrders ? rows.map(orderBox) : [flat(rows)])));

  function orderBox([order, number], place) {
    order.open ??= place < 2 || view.orders.length < 5;
    const made = el(
      "details",
      { open: order.open, toggle: () => (order.open = made.open) },
      el("summary", {}, `Order ${number + 1}`, el("span", { class: "soft" }, order.items.length ? ` ${counted(order.items.length, "item")}` : " empty: the next items go here")),
      el("ul", { class: "items" }, ...order.items.map((item, index) => line(item, order, index)).reverse()),
    );
    return made;
  }

  function flat(ordered) {
    return el("ul", { class: "items" }, ...ordered.flatMap(([order]) => order.items.map((item, index) => line(item, order, index)).reverse()));
  }

  function line(item, order, index) {
    return el(
      "li",
      {},
      el("span", { class: "what" }, el("span", { class: "title" }, nameOf(item)), item.title && el("small", {}, item.item_id), item.problem && el("small", { class: "tag" }, item.problem)),
      el("button", { type: "button", class: "small", "aria-label": `Remove ${nameOf(item)}`, click: () => remove(order, index) }, "\u00d7"),
    );
  }
}
