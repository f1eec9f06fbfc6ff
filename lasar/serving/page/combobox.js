// A text field with a list of suggestions, after the ARIA pattern "combobox with list autocomplete": the focus stays
// in the field, arrow keys move through the list, Enter takes, Escape closes.

import { el, say, counted } from "./dom.js";

const PAUSE = 120; // ms without a key before the server is asked

/**
 * Bring a field to life.
 *
 * source(text, signal): promise of options {value, label, note}.
 * take(option): an option was taken.
 * takeText(text): Enter without an option; without it, the first option is always the chosen one.
 */
export function combobox(input, list, { source, take, takeText, onProblem }) {
  let options = [];
  let chosen = -1;
  let timer = 0;
  let asking = null;

  const isOpen = () => !list.hidden;

  function drop() {
    clearTimeout(timer);
    timer = 0;
    asking?.abort();
  }

  function close() {
    drop();
    list.hidden = true;
    chosen = -1;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  }

  function choose(index) {
    chosen = index;
    [...list.children].forEach((child, n) => child.setAttribute("aria-selected", String(n === index)));
    if (index < 0) return input.removeAttribute("aria-activedescendant");
    input.setAttribute("aria-activedescendant", list.children[index].id);
    list.children[index].scrollIntoView({ block: "nearest" });
  }

  function show(found) {
    options = found;
    const lines = found.map((option, n) =>
      el(
        "li",
        { role: "option", id: `${list.id}-${n}`, "aria-selected": "false", click: () => finish(option) },
        el("span", {}, option.label),
        option.note && el("small", {}, option.note),
      ),
    );
    if (!found.length) lines.push(el("li", { role: "option", "aria-disabled": "true", "aria-selected": "false" }, "Nothing found"));
    list.replaceChildren(...lines);
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    choose(found.length && !takeText ? 0 : -1);
    say(found.length ? `${counted(found.length, "suggestion")}` : "Nothing found");
  }

  async function open() {
    drop();
    const mine = (asking = new AbortController());
    try {
      const found = await source(input.value.trim(), mine.signal);
      if (!mine.signal.aborted && found) show(found);
    } catch (error) {
      if (error.name !== "AbortError") onProblem(error);
    }
  }

  function finish(option) {
    close();
    input.value = "";
    take(option);
  }

  function move(step) {
    if (!isOpen()) return open();
    if (options.length) choose((chosen + step + options.length + (chosen < 0 && step < 0 ? 1 : 0)) % options.length);
  }

  // Enter may come before the answer to the last key: then it waits for that answer.
  async function enter() {
    if (takeText) {
      const text = input.value.trim();
      if (isOpen() && chosen >= 0) finish(options[chosen]);
      else if (text) {
        close();
        takeText(text);
      }
      return;
    }
    if (!input.value.trim() && !isOpen()) return;
    if (timer || !isOpen()) await open();
    if (isOpen() && chosen >= 0) finish(options[chosen]);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(open, PAUSE);
  });
  input.addEventListener("click", () => isOpen() || open());
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    const keys = {
      ArrowDown: () => move(1),
      ArrowUp: () => move(-1),
      Enter: enter,
      Escape: () => (isOpen() ? close() : (input.value = "")),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  list.addEventListener("pointerdown", (event) => event.preventDefault()); // else the field loses the focus
}
