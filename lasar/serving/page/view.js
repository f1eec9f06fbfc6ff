// What is asked, and its form in the address: everything after '#', which browsers keep to themselves.
//
//   #user=12347&k=10&depth=3      #items=85123A;71053,84406B&seen=out
//
// Orders are parted by ';', oldest first, the items of one by ','. Values that are the default are left out.

export const DEFAULTS = { k: 10, beam: 50, seen: false, depth: "auto" };

/** A fresh view: `user` while the history is that user's own, `orders` of {item_id, title}. */
export const emptyView = () => ({ user: "", orders: [], ...DEFAULTS });

export function toHash(view) {
  const parts = [];
  if (view.user) parts.push(`user=${encodeURIComponent(view.user)}`);
  const orders = view.user ? [] : filledOrders(view);
  if (orders.length) parts.push(`items=${orders.map((ids) => ids.map(encodeURIComponent).join(",")).join(";")}`);
  if (view.k !== DEFAULTS.k) parts.push(`k=${encodeURIComponent(view.k)}`);
  if (view.beam !== DEFAULTS.beam) parts.push(`beam=${encodeURIComponent(view.beam)}`);
  if (view.seen) parts.push("seen=out");
  if (view.depth !== DEFAULTS.depth) parts.push(`depth=${view.depth}`);
  return parts.length ? `#${parts.join("&")}` : "";
}

/** The view of an address; what cannot be read is left at its default. */
export function fromHash(hash) {
  const view = emptyView();
  for (const part of hash.replace(/^#/, "").split("&")) {
    const at = part.indexOf("=");
    const name = part.slice(0, Math.max(at, 0));
    const value = part.slice(at + 1);
    if (name === "user") view.user = decoded(value);
    else if (name === "items") view.orders = ordersOf(value);
    else if (name === "k" || name === "beam") view[name] = numberOr(value, DEFAULTS[name]);
    else if (name === "seen") view.seen = value === "out";
    else if (name === "depth") view.depth = value === "auto" ? "auto" : numberOr(value, "auto");
  }
  if (view.user) view.orders = [];
  return view;
}

function ordersOf(value) {
  const orders = value.split(";").map((order) => order.split(",").map(decoded).filter(Boolean));
  return orders.filter((ids) => ids.length).map((ids) => ({ items: ids.map((item_id) => ({ item_id, title: "" })) }));
}

function decoded(value) {
  try {
    return decodeURIComponent(value);
  } catch {
    return "";
  }
}

// Numbers out of bounds pass: the server refuses them in its own words.
const numberOr = (value, otherwise) => (/^\d{1,6}$/.test(value) ? Number(value) : otherwise);

const filledOrders = (view) =>
  view.orders.map((order) => order.items.map((item) => item.item_id)).filter((ids) => ids.length);

const MOST = 1000; // of orders in one request; the model reads fewer

/** The request's body, but for its depth. */
export function requestOf(view) {
  const who = view.user ? { user_id: view.user } : { history: filledOrders(view).slice(-MOST) };
  return { ...who, k: view.k, beam_width: view.beam, exclude_seen: view.seen };
}
