"use strict";
// Every name comes from the service and is only ever set as text. The page keeps its elements and changes what differs,
// so that an open table stays open and a reader's place is kept.

const EVERY_MS = 1000, ANSWER_MS = 10000, LATE_S = 5, KEY = "headroom-key";
const STATUS = {serving: "Serving", starting: "Starting", draining: "Draining", lost: "Lost"};
const BLOCKS = {held: "in use", promised: "granted, not used yet", cached: "cached prefixes", empty: "empty"};
const KINDS = {weights: "weights", kv: "KV cache", reserve: "reserve", free: "free", outside: "outside the budget"};
const whole = new Intl.NumberFormat("en", {maximumFractionDigits: 0});
const $ = (id) => document.getElementById(id);

// ---- elements

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function put(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

// The children of `parent` become one view per item: those of known keys are updated, the others made or removed.
function sync(parent, items, keyOf, make) {
  const before = parent.views ?? new Map(), keys = items.map(keyOf), stay = new Set(keys);
  for (const [key, view] of before) if (!stay.has(key)) view.node.remove();
  parent.views = new Map(items.map((item, place) => {
    const view = before.get(keys[place]) ?? make(item);
    view.update(item);
    if (parent.children[place] !== view.node) parent.insertBefore(view.node, parent.children[place] ?? null);
    return [keys[place], view];
  }));
}

function figures(node, rows) {
  sync(node, rows, ([name]) => name, ([name]) => {
    const value = el("dd");
    return {node: el("div", {}, el("dt", {}, name), value), update: ([, text]) => say(value, text)};
  });
}

// ---- words

function bytes(count) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (count >= size) return `${(count / size).toFixed(count / size < 10 ? 2 : 1)} ${unit}`;
  }
  return `${count} B`;
}

function span(seconds) {
  if (seconds < 90) return `${whole.format(Math.floor(seconds))} s`;
  return seconds < 5400 ? `${whole.format(seconds / 60)} min` : `${whole.format(seconds / 3600)} h`;
}

function percent(part, all) {
  if (!all || !part) return "0 %";
  return Math.abs(part) * 100 < all ? "<1 %" : `${Math.round(100 * part / all)} %`;
}

const count = (number) => number === null ? "–" : whole.format(number);
const plural = (number, word) => `${whole.format(number)} ${word}${number === 1 ? "" : "s"}`;
const rate = (number) => number === null ? "–" : number < 10 && number > 0 ? number.toFixed(1) : whole.format(number);
const sum = (numbers) => numbers.reduce((total, number) => total + (number ?? 0), 0);
const serving = (model) => model.replicas.filter((replica) => replica.status === "serving");
const tokens = (kv, name) => kv[`${name}_blocks`] * kv.block_size;
const headroom = (model) => sum(serving(model).map((replica) => tokens(replica.kv, "headroom")));
const speed = (model) => {
  const known = model.replicas.map((replica) => replica.tokens_per_s).filter((number) => number !== null);
  return known.length ? sum(known) : null;
};

// ---- bars

function kvBar(style) {
  const parts = Object.keys(BLOCKS).map((name) => [name, el("span", {class: name})]);
  const node = el("span", {class: style}, ...parts.map(([, part]) => part));
  return {node, update(kv) {
    for (const [name, part] of parts) part.style.flex = `${kv[`${name}_blocks`]} 0 0`;
  }};
}

function deviceView(device) {
  const name = el("span"), memory = el("span"), told = el("p", {class: "faint"});
  const bar = el("div", {class: "bar", role: "img"}), kv = kvBar("kv");
  const node = el("section", {class: "device"}, el("h4", {}, name, memory), bar, told);
  for (const part of device.parts) {
    const piece = part.kind === "kv" ? kv.node : el("span", {class: part.colour ? "part" : part.kind});
    piece.style.flex = `${part.bytes} 0 0`;
    piece.title = `${part.name}: ${bytes(part.bytes)}. ${part.why}`;
    if (part.colour && part.kind !== "kv") piece.style.background = part.colour;
    bar.append(piece);
  }
  return {node, update({device: now, cache, most}) {
    const sizes = Object.keys(KINDS).map((kind) => [kind, sum(now.parts.filter((p) => p.kind === kind).map((p) => p.bytes))]);
    const words = sizes.filter(([, size]) => size).map(([kind, size]) =>
      `${KINDS[kind]} ${bytes(size)}` + (kind === "kv" ? ` (${percent(cache.held_blocks, cache.capacity_blocks)} in use)` : ""));
    say(name, `${now.device}: ${now.name}, layers ${now.layers[0]} to ${now.layers[1]}`);
    say(memory, bytes(now.memory_bytes));
    say(told, words.join(" · ") + measured(now));
    put(bar, "aria-label", `Plan of device ${now.device}, ${now.name}: ${words.join(", ")}`);
    bar.style.width = `${100 * Math.max(now.memory_bytes, now.budget_bytes) / most}%`;
    kv.update(cache);
  }};
}

function measured(device) {
  if (!device.measured_bytes || !device.predicted_bytes) return "";
  const off = 100 * (device.measured_bytes / device.predicted_bytes - 1);
  const text = Math.abs(off) < 0.05 ? "as planned" : `${off > 0 ? "+" : "−"}${Math.abs(off).toFixed(1)} % against the plan`;
  return ` · measured ${bytes(device.measured_bytes)}, ${text}`;
}

function planTable(plan) {
  const names = new Map();
  for (const device of plan.devices) for (const part of device.parts) if (!names.has(part.name)) names.set(part.name, part);
  const order = Object.keys(KINDS), parts = [...names.values()];
  parts.sort((one, other) => order.indexOf(one.kind) - order.indexOf(other.kind));
  const sizeOn = (device, name) => sum(device.parts.filter((part) => part.name === name).map((part) => part.bytes));
  const row = (cells, tag) => el("tr", {}, ...cells.map((cell, i) => el(i === 0 || tag ? "th" : "td", tag ?? (i ? {} : {scope: "row"}), cell)));
  const body = parts.map((part) => {
    const swatch = el("span", {class: `swatch ${part.kind === "kv" ? "held" : part.colour ? "" : part.kind}`});
    if (part.colour && part.kind !== "kv") swatch.style.background = part.colour;
    const label = document.createDocumentFragment();
    label.append(swatch, part.name);
    return row([label, ...plan.devices.map((device) => sizeOn(device, part.name) ? bytes(sizeOn(device, part.name)) : "–"), part.why]);
  });
  const sums = [["budget", "budget_bytes"], ["memory", "memory_bytes"]].map(([name, field]) =>
    row([name, ...plan.devices.map((device) => bytes(device[field])), ""]));
  const head = row(["part", ...plan.devices.map((device) => `device ${device.device}`), "what it is"], {scope: "col"});
  return el("table", {}, el("thead", {}, head), el("tbody", {}, ...body, ...sums));
}

// ---- replicas and models

function blocksView() {
  const gauge = kvBar("bar gauge"), list = el("ul", {class: "keys"}), node = el("div", {}, gauge.node, list);
  gauge.node.setAttribute("role", "img");
  return {node, update(kv) {
    gauge.update(kv);
    const words = Object.entries(BLOCKS).map(([name, word]) => [name, `${word} ${whole.format(tokens(kv, name))}`]);
    put(gauge.node, "aria-label", `KV cache of ${whole.format(tokens(kv, "capacity"))} tokens: ${words.map(([, word]) => word).join(", ")}`);
    sync(list, words, ([name]) => name, ([name]) => {
      const text = el("span");
      return {node: el("li", {}, el("span", {class: `swatch ${name}`}), text), update: ([, word]) => say(text, word)};
    });
  }};
}

function replicaView(replica) {
  const badge = el("span", {class: "badge"}), live = el("dl", {class: "figures"}), blocks = blocksView();
  const title = el("p", {class: "faint"}), devices = el("div", {class: "devices"}), table = el("div", {class: "scroll", role: "region", tabindex: "0", "aria-label": "Every part of the plan"});
  const more = el("details", {}, el("summary", {}, "Every part of the plan"), table);
  const heading = el("h3", {}, replica.pool, " ", el("small", {}, replica.id));
  const node = el("article", {class: "card"}, el("header", {}, heading, badge), live, blocks.node, title, devices, more);
  let drawn = "";
  return {node, update(now) {
    put(node, "data-status", now.status);
    say(badge, STATUS[now.status] + (now.status === "lost" || now.silent_s >= 5 ? `, silent for ${span(now.silent_s)}` : ""));
    figures(live, [
      ["Headroom", `${whole.format(tokens(now.kv, "headroom"))} tokens, ${percent(now.kv.headroom_blocks, now.kv.capacity_blocks)}`],
      ["Running", count(now.running)], ["In its queue", count(now.waiting)], ["Tokens/s", rate(now.tokens_per_s)],
      ["Preempted", count(now.preemptions)],
    ]);
    blocks.update(now.kv);
    say(title, now.plan ? `${now.plan.title}. ${now.plan.capacity}.` : "It has not told its plan yet; it does every 10 s.");
    more.hidden = !now.plan;
    const bars = now.plan ? now.plan.devices : [];
    const most = Math.max(...bars.map((device) => Math.max(device.memory_bytes, device.budget_bytes)));
    const shape = JSON.stringify(bars.map((device) => [device.name, device.parts]));
    if (shape !== drawn) {
      sync(devices, [], String, deviceView);
      table.replaceChildren(...(now.plan ? [planTable(now.plan)] : []));
      drawn = shape;
    }
    sync(devices, bars.map((device) => ({device, cache: now.kv, most})), (item) => item.device.device, (item) => deviceView(item.device));
  }};
}

function absentView() {
  const text = el("p");
  return {node: el("article", {class: "card absent"}, text), update: (item) => say(text, item.absent)};
}

function absent(model) {
  if (model.ledger === "unknown") return [{absent: "Its ledger has not answered yet: nothing is known of its replicas."}];
  if (!model.missing_replicas) return [];
  const of = `${whole.format(model.missing_replicas)} of ${plural(model.expected_replicas, "replica")}`;
  return [{absent: `${of} missing: loading the model, waiting for devices, or lost and being replaced.`}];
}

function modelView() {
  const name = el("h2"), totals = el("dl", {class: "figures"}), pools = el("ul", {class: "pools faint"});
  const notice = el("p", {class: "banner"}), cards = el("div", {class: "cards"});
  const node = el("section", {class: "model"}, el("header", {}, name, totals), notice, pools, cards);
  return {node, update(model) {
    say(name, model.name);
    figures(totals, [
      ["Serving", `${serving(model).length} of ${model.expected_replicas}`], ["Headroom", `${whole.format(headroom(model))} tokens`],
      ["Waiting", `${whole.format(model.waiting)}` + (model.waiting ? ` (${whole.format(model.waiting_tokens)} tokens)` : "")],
      ["Tokens/s", rate(speed(model))],
    ]);
    const told = notices(model);
    say(notice, told);
    notice.hidden = !told;
    put(notice, "data-tone", model.ledger === "up" ? "note" : "bad");
    sync(pools, model.pools, (pool) => pool.name, () => {
      const item = el("li");
      return {node: item, update: (pool) => say(item, poolText(pool, model))};
    });
    const items = [...model.replicas, ...absent(model)];
    sync(cards, items, (item) => item.absent ? "" : `${item.id} ${item.pool}`, (item) => item.absent ? absentView() : replicaView(item));
  }};
}

function poolText(pool, model) {
  const waiting = model.pools.length > 1 || pool.waiting ? `, ${whole.format(pool.waiting)} waiting for it alone` : "";
  return `Pool ${pool.name}: ${pool.serving} of ${plural(pool.replicas, "replica")} serving${waiting}`;
}

function notices(model) {
  if (model.ledger === "unknown") return "The ledger of this model has never answered.";
  if (model.ledger === "gone") {
    return `The ledger of this model does not answer. What follows is ${span(model.age_s)} old; meanwhile requests are placed without it.`;
  }
  return model.warming ? "The ledger is new and waits for the replicas' reports: it grants nothing for some seconds." : "";
}

// ---- the page

let last = null, shownAt = 0, failure = "", timer = 0, asking = false;

function show(state) {
  const models = state.models, all = models.flatMap((model) => model.replicas);
  figures($("totals"), [
    ["Replicas serving", `${sum(models.map((model) => serving(model).length))} of ${sum(models.map((model) => model.expected_replicas))}`],
    ["Waiting", whole.format(sum(models.map((model) => model.waiting)))],
    ["Tokens/s", rate(all.some((replica) => replica.tokens_per_s !== null) ? sum(models.map(speed)) : null)],
  ]);
  sync($("models"), models, (model) => model.name, modelView);
  put($("models"), "aria-busy", "false");
  const news = models.flatMap((model) => [
    ...(model.ledger === "up" ? [] : [`The ledger of ${model.name} does not answer`]),
    ...model.replicas.filter((r) => r.status !== "serving").map((r) => `Replica ${r.id} of ${model.name}: ${STATUS[r.status]}`),
  ]);
  say($("news"), news.join(". "));
}

function pulse() {
  const locked = !$("key-form").hidden;
  const age = last ? (performance.now() - shownAt) / 1000 : 0, stale = failure !== "" || age >= LATE_S;
  put($("pulse"), "data-state", stale ? "stale" : last ? "live" : "loading");
  say($("pulse-text"), locked ? "Locked" : stale ? (last ? `No news; values are ${span(age)} old` : "No answer") : last ? "Live" : "Loading");
  $("banner").hidden = !failure || locked;
  put($("banner"), "data-tone", "bad");
  say($("banner"), failure);
}

async function ask() {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? {authorization: `Bearer ${key}`} : {};
  const path = location.pathname.replace(/\/+$/, "") + "/state";
  const answer = await fetch(path, {headers, cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS)}).catch((error) => {
    console.warn(error);
    throw new Error("The service does not answer. It is asked again each second.");
  });
  if (answer.status === 401 || answer.status === 403) {
    sessionStorage.removeItem(KEY);
    say($("key-why"), key ? "This key is not accepted." : "This service asks for a key.");
    $("key-form").hidden = false;
    $("key").focus();
    throw new Error("A key is needed.");
  }
  if (!answer.ok) throw new Error(`The service answered with status ${answer.status}.`);
  const state = await answer.json();
  if (state.schema !== "headroom.fleet/1") throw new Error(`The service speaks ${state.schema}, this page headroom.fleet/1: load the page again.`);
  return state;
}

async function poll() {
  clearTimeout(timer);
  if (asking || document.hidden || !$("key-form").hidden) return;
  asking = true;
  try {
    const state = await ask();
    show(state);
    [last, shownAt, failure] = [state, performance.now(), ""];
  } catch (error) {
    failure = error.message;
  } finally {
    asking = false;
    pulse();
    if ($("key-form").hidden) timer = setTimeout(poll, EVERY_MS);  // else there is nothing to ask without a key
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  $("key").value = "";
  if (!/^[\x21-\x7e]+$/.test(key)) return;  // no header could carry it
  sessionStorage.setItem(KEY, key);
  $("key-form").hidden = true;
  poll();
});
document.addEventListener("visibilitychange", poll);
setInterval(pulse, EVERY_MS);
poll();
