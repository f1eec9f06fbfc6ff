// The page: what is asked (view), what was answered (answers), and which part shows what.

import { ask, findItem, listUsers, Problem, searchItems, userHistory } from "./api.js";
import { foldAll, showBeam } from "./beam.js";
import { combobox } from "./combobox.js";
import { depthPanel, spokenDepth } from "./depth.js";
import { $, count, counted, el, milliseconds, nameOf, say } from "./dom.js";
import { showHistory } from "./history.js";
import { answerTime, showLatency } from "./latency.js";
import { compare, showList } from "./list.js";
import { showThoughts } from "./thoughts.js";
import { emptyView, fromHash, requestOf, toHash } from "./view.js";

const PAUSE = 150; // ms a slider must rest before the server is asked
const ROUNDS = 3; // requests per depth when every depth is measured

let info;
let view = emptyView();
let answers = noAnswers("");
let running = null;
let panel;
let pause = 0;
const names = new Map(); // item_id to title

// Answers to one request at several depths: `byDepth` explained, `times` and `lists` measured.
function noAnswers(key) {
  return { key, byDepth: new Map(), lists: new Map(), times: new Map(), measuring: false, rounds: 0 };
}

// What was asked

/** The history is another one: answer it, or wait where there is none. */
function changed() {
  remember();
  drawHistory();
  if (hasHistory()) recommend();
  else rest();
}

/** A setting is another one; a list for an empty history stays, too. */
function adjusted() {
  remember();
  if (hasHistory() || !$("results").hidden || !$("problem").hidden) recommend();
}

const hasHistory = () => Boolean(view.user) || view.orders.some((order) => order.items.length);
const remember = () => history.replaceState(null, "", toHash(view) || location.pathname);

/** Nothing is asked: back to the beginning. */
function rest() {
  running?.abort();
  hideProblem();
  $("answer").removeAttribute("aria-busy");
  $("results").hidden = true;
  $("outcome").textContent = "Pick a user or add items; the list appears here.";
}

function drawHistory() {
  const hidden = Boolean(view.user) && !info.show_users;
  showHistory(view, { remove, hasOrders: info.has_orders, hidden });
  $("starters").hidden = Boolean(view.user || view.orders.length);
}

function drawSettings() {
  $("k").value = view.k;
  $("beam").value = view.beam;
  $("seen").checked = view.seen;
}

function add(item) {
  if (view.user) {
    if (info.show_users) view.orders.push({ items: [] });
    else view.orders = [];
    view.user = "";
  }
  const title = item.title ?? item.label;
  names.set(item.item_id, title);
  if (!view.orders.length || !info.has_orders) view.orders.push({ items: [] });
  view.orders.at(-1).items.push({ item_id: item.item_id, title });
  view.orders.at(-1).open = true;
  say(`Added ${title || item.item_id}`);
  changed();
}

function remove(order, index) {
  const position = [...$("history").querySelectorAll("button")].indexOf(document.activeElement);
  const [item] = order.items.splice(index, 1);
  view.user = "";
  view.orders = view.orders.filter((kept) => kept.items.length);
  changed();
  say(`Removed ${nameOf(item)}`);
  const buttons = $("history").querySelectorAll("button");
  if (position >= 0) (buttons[Math.min(position, buttons.length - 1)] ?? $("item")).focus();
}

/** Take over a view, with the titles of its items. */
async function open(wanted) {
  view = wanted;
  drawSettings();
  try {
    if (view.user && info.show_users) {
      const { orders } = await userHistory(view.user);
      if (view !== wanted) return;
      view.orders = orders.map((items) => ({ items }));
    }
  } catch (error) {
    if (view !== wanted) return;
    drawHistory();
    return fail(error);
  }
  changed();
  await nameItems(wanted);
}

async function nameItems(wanted) {
  const waiting = wanted.orders.flatMap((order) => order.items).filter((item) => !item.title);
  const one = async () => {
    for (let item = waiting.pop(); item && view === wanted; item = waiting.pop()) {
      try {
        if (!names.has(item.item_id)) names.set(item.item_id, (await findItem(item.item_id)).title);
        item.title = names.get(item.item_id);
      } catch (error) {
        item.problem = error instanceof Problem ? "unknown" : "";
      }
    }
  };
  if (!waiting.length) return;
  await Promise.all([one(), one(), one(), one()]);
  if (view === wanted) drawHistory();
}

// What was answered

async function recommend({ fresh = false } = {}) {
  clearTimeout(pause);
  running?.abort();
  const mine = (running = new AbortController());
  const request = requestOf(view);
  const key = JSON.stringify(request);
  if (fresh || key !== answers.key) answers = noAnswers(key);
  $("answer").setAttribute("aria-busy", "true");
  const answer = async (depth) => {
    if (!answers.byDepth.has(depth)) {
      const body = { ...request, depth, explain: true };
      const response = await ask("v1/recommend", { body, signal: mine.signal });
      if (answers.key === key) answers.byDepth.set(depth, response);
    }
    return answers.byDepth.get(depth);
  };
  hideProblem();
  try {
    await answer("auto");
    try {
      await answer(view.depth);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      showProblem(error); // the automatic list still stands
      view.depth = "auto";
      remember();
    }
    if (running === mine) showAnswer();
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    if (running === mine) $("answer").removeAttribute("aria-busy");
  }
}

function showAnswer() {
  const automatic = answers.byDepth.get("auto");
  const shown = answers.byDepth.get(view.depth);
  const forced = view.depth !== "auto";
  const seen = new Set(view.orders.flatMap((order) => order.items.map((item) => item.item_id)));
  $("results").hidden = false;
  const known = knownDepths();
  $("outcome").textContent = outcome(shown, known, automatic);
  showList(shown.items, { automatic: forced ? automatic.items : null, seen, add });
  showLatency(
    forced
      ? [{ label: `Depth ${view.depth}`, timing: shown.timing_ms }, { label: "Automatic", timing: automatic.timing_ms }]
      : [{ label: `Depth ${shown.depth}`, timing: shown.timing_ms }],
  );
  showThoughts(shown.explanation.steps, info);
  showBeam(shown.explanation.beam);
  showDepths(known);
}

function outcome(shown, known, automatic) {
  if (!shown.items.length) return "No item is left: the history covers them all. Allow items of the history, or add others.";
  const list = counted(shown.items.length, "item");
  const [time, usual] = [view.depth, "auto"].map((depth) => milliseconds(known.get(depth).ms));
  if (view.depth === "auto") return info.max_depth ? `${list} after ${spokenDepth(shown.depth)}, in ${time}.` : `${list} in ${time}.`;
  const { both, unmoved } = compare(shown.items, automatic.items);
  const against = `${both} of the automatic ${automatic.items.length}, ${unmoved} at the same rank`;
  const noise = answers.rounds ? `medians of ${answers.rounds}` : "single requests";
  return `${list}, forced to ${spokenDepth(view.depth)}: ${against}. ${time}; automatic ${usual} (${noise}).`;
}

/** Of every depth asked so far: items in common with the automatic list, and milliseconds. */
function knownDepths() {
  const automatic = answers.byDepth.get("auto");
  const known = new Map();
  for (const [depth, response] of answers.byDepth) {
    known.set(depth, { both: compare(response.items, automatic.items).both, ms: answerTime(response.timing_ms) });
  }
  for (const [depth, times] of answers.times) {
    known.set(depth, { both: compare(answers.lists.get(depth), automatic.items).both, ms: median(times) });
  }
  return known;
}

function showDepths(known) {
  const automatic = answers.byDepth.get("auto");
  panel.show({ wanted: view.depth, taken: answers.byDepth.get(view.depth).depth, automatic, known, rounds: answers.rounds });
}

const median = (times) => times.toSorted((a, b) => a - b)[Math.floor(times.length / 2)];

/** Ask for every depth, a few times in turn, so that a slow moment does not fall on one of them. */
async function measure() {
  const mine = answers;
  if (mine.measuring) return;
  Object.assign(mine, { measuring: true, rounds: 0, times: new Map() });
  const depths = ["auto", ...Array(info.max_depth + 1).keys()];
  const request = JSON.parse(mine.key);
  try {
    for (let round = 1; round <= ROUNDS; round++) {
      for (const depth of depths) {
        if (answers !== mine) return;
        const response = await ask("v1/recommend", { body: { ...request, depth } });
        mine.lists.set(depth, response.items);
        mine.times.set(depth, [...(mine.times.get(depth) ?? []), answerTime(response.timing_ms)]);
      }
      panel.button.textContent = `Measured ${round} of ${ROUNDS} times`;
    }
    mine.rounds = ROUNDS;
    if (answers === mine) showAnswer();
    say("Every depth is measured.");
  } catch (error) {
    showProblem(error);
  } finally {
    mine.measuring = false;
    panel.button.textContent = "Measure every depth";
  }
}

// What went wrong

function showProblem(error) {
  const problem = error instanceof Problem ? error : new Problem("This page made a mistake.", [String(error)]);
  const fixes = problem.fixes.filter((fix) => !problem.message.includes(fix));
  $("problem").hidden = false;
  $("problem").replaceChildren(el("strong", {}, problem.message), fixes.length > 0 && el("ul", {}, ...fixes.map((fix) => el("li", {}, fix))));
  $("problem").scrollIntoView({ block: "nearest" });
}

function hideProblem() {
  $("problem").hidden = true;
  $("problem").replaceChildren();
}

function fail(error) {
  $("results").hidden = true;
  $("outcome").textContent = "";
  showProblem(error);
}

// Controls

async function start() {
  try {
    info = await ask("v1/info");
  } catch (error) {
    return fail(error);
  }
  const ids = `semantic IDs of ${counted(info.num_levels, "code")}`;
  const steps = info.max_depth ? `up to ${counted(info.max_depth, "latent step")}` : "no latent steps";
  $("facts").textContent = [info.model, counted(info.num_active, "item"), ids, steps, `catalogue version ${info.catalogue_version}`].join(" \u00b7 ");
  $("k").max = info.max_k;
  $("beam").max = info.max_beam_width;
  $("user-hint").textContent = info.show_users
    ? `${info.has_users ? "The start of an id, or choose one." : "An id whose events the server has stored."} Enter takes it.`
    : "This server does not show its users: type an id, Enter takes it.";
  panel = depthPanel(info, {
    force(depth) {
      view.depth = depth;
      clearTimeout(pause);
      pause = setTimeout(adjusted, PAUSE);
    },
    measure,
  });
  wire();
  await open(fromHash(location.hash));
  await showStarters();
}

function wire() {
  combobox($("item"), $("item-options"), {
    source: async (text, signal) =>
      (await searchItems(text, signal)).items.map(({ item_id, title, active }) => ({
        item_id, title, label: title || item_id, note: [title && item_id, !active && "not sold any more"].filter(Boolean).join(" \u00b7 "),
      })),
    take: add,
    onProblem: showProblem,
  });
  const takeUser = (id) => open({ ...view, user: id, orders: [] });
  combobox($("user"), $("user-options"), {
    source: async (text, signal) => info.show_users && (await listUsers(text, signal)).user_ids.map((id) => ({ label: id })),
    take: (option) => takeUser(option.label),
    takeText(text) {
      $("user").value = "";
      takeUser(text);
    },
    onProblem: showProblem,
  });
  $("new-order").addEventListener("click", () => {
    view.user = "";
    view.orders.push({ items: [], open: true });
    drawHistory();
    $("item").focus();
  });
  $("clear").addEventListener("click", () => {
    Object.assign(view, { user: "", orders: [] });
    changed();
    $("item").focus();
  });
  $("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    recommend({ fresh: true });
  });
  $("settings").addEventListener("change", () => {
    Object.assign(view, { k: numberIn("k"), beam: numberIn("beam"), seen: $("seen").checked });
    adjusted();
  });
  $("unfold").addEventListener("click", foldAll);
  addEventListener("hashchange", () => open(fromHash(location.hash)));
}

const numberIn = (id) => ($(id).value === "" ? null : Number($(id).value));

async function showStarters() {
  try {
    const { items } = await searchItems("");
    const known = items.slice(0, 4).map((item) => el("button", { type: "button", click: () => add(item) }, nameOf(item)));
    $("starters").replaceChildren("Or start with what sells best: ", el("span", { class: "chips" }, ...known));
  } catch (error) {
    showProblem(error);
  }
}

start();
