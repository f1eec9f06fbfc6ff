// Making elements. Text goes in as text nodes only: a title with markup in it is shown, never parsed.

export const $ = (id) => document.getElementById(id);

/** An element: `el("p", {class: "soft"}, "text", child)`. A property that is a function listens to that event. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null && child !== false));
  return made;
}

/** A bar of a share of its track; the number stands beside it, so readers of screens skip it. */
export function bar(share, kind = "") {
  const filled = el("span");
  filled.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span", { class: `bar ${kind}`, "aria-hidden": "true" }, filled);
}

const whole = new Intl.NumberFormat("en");
export const count = (number) => whole.format(number);
export const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function percent(share) {
  const shown = share * 100;
  return `${shown >= 10 || shown === 0 ? shown.toFixed(0) : shown.toFixed(1)} %`;
}

export function milliseconds(time) {
  return time >= 10000 ? `${(time / 1000).toFixed(0)} s` : `${time.toFixed(time < 10 ? 1 : 0)} ms`;
}

/** What a person calls an item: its title, or its id where the shop has no titles. */
export const nameOf = (item) => item.title || item.item_id;

/** Say something to readers of screens, without moving the focus. */
export function say(text) {
  $("said").textContent = text;
}
