// The page: a question in the address, quick answers while a slider moves, the full one once it rests.

import { Line } from "./ask.js";
import * as charts from "./charts.js";
import { Controls } from "./controls.js";
import { Details, command, sentence } from "./details.js";
import { $, copy, el, fill, say, tooltips } from "./dom.js";
import { State } from "./state.js";
import { Table, kept, verdict } from "./table.js";

const REST_MS = 60; // a slider that rests so long is where it should be; a drag moves it every 16 ms

// They choose among candidates that are priced: all layouts are answered about as soon as a few would be.
const CHOOSE = new Set(["ttft_ms", "tpot_ms", "price", "budget", "confidence", "objective", "users", "request_rate"]);

let catalog, state, controls, table, details, page = null, ghost = null, timer = 0, rests = 0, hovered = null, shownAt = "";
const swift = new Line("quick", (one, ok, found, ms) => take(one, ok, found, ms, true));
const whole = new Line("answer", (one, ok, found, ms) => take(one, ok, found, ms, false));
const close = new Line("details", (one, ok, found) => details.take(found));
const beside = new Line("versus", (one, ok, found) => details.takePair(found));

const meaning = (word) => catalog.glossary[word] ?? catalog.glossary[{ TTFT: "traffic", users: "concurrency", batch: "B" }[word]] ?? "";
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
const priced = (asked) => Object.entries(asked).every(([key, value]) => CHOOSE.has(key) || state.asked[key] === value);

function changed(key, value, settled) {
  if (state.asked[key] === value && !settled) return;
  if (page && !page.quick) ghost = charts.frontOf(page.rows, axis());
  state.asked[key] = value;
  state.write();
  ask(settled, key);
}

// The quick question first, so that nothing competes with it; all layouts once it is answered and the slider rests. All
// layouts at once where the answer that stands has their prices.
function ask(settled, key) {
  clearTimeout(timer);
  if (CHOOSE.has(key) && page && !page.quick && priced(page.of)) {
    swift.drop();
    whole.ask(state.asked, {});
    status("moving");
    return;
  }
  rests = performance.now() + (settled ? 0 : REST_MS);
  swift.ask(state.asked, {});
  status("moving");
}

function askWhole() {
  clearTimeout(timer);
  timer = setTimeout(() => whole.ask(state.asked, {}), Math.max(0, rests - performance.now()));
}

const axis = () => state.view.y || "tokens_per_s_per_gpu";

// An answer: shown where the question is still the same, or a quick one while nothing newer is there.
function take(one, ok, found, ms, quick) {
  const current = same(one.state, state.asked);
  if (quick && current && ok) askWhole();
  if (!current && !quick && !(ok && priced(one.state))) return;
  if (quick && page && !page.quick && page.of && same(page.of, one.state)) return; // the full answer came first
  if (!ok) {
    if (!current) return;
    problem(found.error, found.field);
    status("", "");
    return;
  }
  problem("", "");
  const begun = performance.now();
  page = { ...found, of: one.state, ms, rows: rowsOf(found) };
  draw();
  if (!quick && current) lookClose();
  if (!quick && !current) status("moving");
  performance.measure("draw", { start: begun });
  document.body.dataset.answer = `${quick ? "quick" : "full"} ${new URLSearchParams(one.state)}`;
}

// Cells of a number are pairs: to draw and sort by, and to read.
function rowsOf(found) {
  return found.rows.map((cells) => {
    const row = { text: {} };
    found.columns.forEach((column, i) => {
      row[column.key] = column.number ? cells[i][0] : cells[i];
      if (column.number) row.text[column.key] = cells[i][1];
    });
    return row;
  });
}

function problem(line, field) {
  controls.problem(field, line);
  $("error").hidden = !line;
  $("error").textContent = line;
}

function status(kind, text) {
  const box = $("status");
  if (kind === "moving") {
    box.dataset.kind = "moving";
    if (!page) box.textContent = "Asking …";
    return;
  }
  box.dataset.kind = kind;
  box.textContent = text;
}

const rowOf = (key, batch) => {
  const found = page.rows.filter((r) => r.key === key);
  return found.sort((a, b) => Math.abs(a.batch - batch) - Math.abs(b.batch - batch))[0] ?? null;
};
// Nothing chosen is the best; a chosen layout stays chosen while its best batch moves.
const chosen = () => (page && state.view.sel ? rowOf(state.view.sel, Number(state.view.b)) : null);
const near = () => chosen() ?? page?.rows.find((r) => r.is_best) ?? null;
const other = () => (page && state.view.vs ? rowOf(state.view.vs, Number(state.view.vb)) : null);

function draw() {
  const n = (x) => x.toLocaleString("en");
  const seconds = page.ms >= 1000 ? `${(page.ms / 1000).toFixed(1)} s` : `${Math.round(page.ms)} ms`;
  if (page.quick) status("quick", `Provisional: ${n(page.kept)} candidates of the layouts that led before, in ${seconds}; searching all …`);
  else status("full", `All layouts searched: ${n(page.examined)} candidates, ${n(page.kept)} kept, ${seconds}.`);
  headline();
  cards();
  chart();
  rows();
  closeBy();
  said();
  $("share").dataset.asked = page.asked;
}

function headline() {
  const best = page.rows.find((r) => r.is_best);
  const asked = el("p", { class: "question" }, page.asked);
  if (!best) return fill($("headline"), asked, el("h1", {}, "Nothing keeps the limits"), el("p", { class: "warning" }, page.missed));
  fill($("headline"), asked, el("h1", {}, best.plain),
    el("p", { class: "code" }, best.name, el("span", { class: `verdict ${verdict(best)}`, "data-tip": sentence(best) }, best.verdict)),
    page.warning && el("p", { class: "warning" }, page.warning));
  document.title = `${best.name} · ${state.asked.model} · tensorcast explore`;
}

function cards() {
  const shown = page.cards.map((card) => ({ ...card, row: rowOf(card.key, card.batch) })).filter((card) => card.row);
  const cost = (r) => (r.cost_per_million_tokens === null ? null : `${r.text.cost_per_million_tokens} USD/M`);
  fill($("cards"), shown.map(({ title, row: r }, i) => el("button", {
    type: "button", class: `card ${i === 0 ? "first" : ""} ${r === near() ? "selected" : ""}`, "data-tip": r.plain,
    onclick: () => choose(r), onmouseenter: () => hover(r), onmouseleave: () => hover(null),
  }, el("span", { class: "title" }, title.split(" · ")[0]), el("span", { class: "also" }, title.split(" · ").slice(1).join(", ").toLowerCase()), el("span", { class: "name" }, r.name),
    el("strong", {}, r.text.output_tokens_per_s, el("small", {}, " tokens/s")),
    el("span", {}, [`${r.text.tokens_per_s_per_user} per user`, `${r.text.concurrency} users`, cost(r)].filter(Boolean).join(" · ")),
    el("span", { class: verdict(r), "data-tip": sentence(r) }, `${r.text.ttft_s}${kept(r, "ttft")} · ${r.text.tpot_s}${kept(r, "tpot")}`, r.idle_gpus ? ` · ${r.text.idle_gpus} idle` : ""))));
}

function chart() {
  charts.front($("front"), {
    rows: page.rows, ghost, y: axis(), quick: page.quick, limits: page.limits, selected: near(), versus: other(),
    onhover: (row) => { hovered = row; table.mark(row); hint(row); }, onchoose: (row) => choose(row),
  });
  hint(hovered);
}

function hint(row) {
  const box = $("front-help");
  if (!row) {
    box.textContent = "Right is faster for a user, up is more of each GPU. Hover for numbers; click, or focus and use the arrow keys and Enter, to look closer. Hollow marks break a limit; the bar through the chosen one is its 80 % interval.";
    return;
  }
  fill(box, el("b", {}, row.name), ` ${row.plain}. ${row.text.output_tokens_per_s} tokens/s (${row.text.tokens_per_s_per_gpu} per GPU), ${row.text.tokens_per_s_per_user} per user, first token ${row.text.ttft_s}, each ${row.text.tpot_s}, ${row.text.concurrency} users; ${row.verdict}.`);
}

function hover(row) {
  hovered = row;
  hint(row);
}

function rows() {
  table.show(page.columns, page.rows, { find: $("find").value, only: $("only").checked, every: $("every").checked, selected: chosen(), versus: other() });
}

function choose(row) {
  const [before, beforeBatch] = [state.view.sel, state.view.b];
  if (state.view.vs && state.view.vs === row.key && Number(state.view.vb) === row.batch) return;
  Object.assign(state.view, { sel: row.key, b: String(row.batch) });
  if (state.view.tab === "") state.view.tab = "numbers";
  state.write(before === "" && beforeBatch === "");
  again();
  say(`${row.plain}. ${row.verdict}. ${row.text.output_tokens_per_s} tokens per second.`);
}

function compareWith(row) {
  const now = near();
  if (!now || now === row) return choose(row);
  Object.assign(state.view, { sel: now.key, b: String(now.batch) });
  Object.assign(state.view, { vs: row.key, vb: String(row.batch), tab: "versus" });
  state.write(true);
  again();
}

function again() {
  cards();
  chart();
  rows();
  lookClose();
}

// What only the server knows of the chosen row, asked once it is shown.
function lookClose() {
  const [row, versus] = [near(), other()], tab = state.view.tab || "numbers";
  const at = JSON.stringify([page.of, row?.key, row?.batch, versus?.key, versus?.batch]);
  if (at !== shownAt) {
    shownAt = at;
    details.data = details.pair = null;
    details.asked = {};
  }
  closeBy();
  if (!row || page.quick || tab === "numbers") return;
  const line = tab === "versus" ? beside : close;
  if (details.asked[line.kind] || (tab === "versus" && !versus)) return;
  details.asked[line.kind] = true;
  const id = (r) => ({ key: r.key, batch: r.batch });
  line.ask(page.of, tab === "versus" ? { a: id(row), b: id(versus) } : id(row));
}

function closeBy() {
  details.show({ row: near(), versus: other(), tab: state.view.tab, limits: page.limits, page });
}

function said() {
  if (page.quick) return;
  const list = (title, items) => items.length > 0 && el("div", {}, el("h2", {}, title), el("ul", {}, items.map((text) => el("li", {}, text))));
  const fell = Object.entries(page.pruned).flatMap(([what, rules]) => Object.entries(rules).map(([rule, count]) => `${count.toLocaleString("en")} ${what}: ${rule}`));
  fill($("said"), list("Why", page.said), list("What to know", page.notes),
    fell.length > 0 && el("details", {}, el("summary", {}, "What fell away, by rule"), el("ul", {}, fell.map((text) => el("li", {}, text)))), command(page.command));
}

function keys(event) {
  const line = page ? charts.frontOf(page.rows, axis()) : [];
  const step = { ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, ArrowDown: 1, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Enter" && hovered) return choose(hovered);
  if (event.key === "Escape") return closeDetails();
  if (!step || !line.length) return;
  event.preventDefault();
  const at = line.indexOf(hovered ?? chosen());
  hovered = line[Math.max(0, Math.min(line.length - 1, at < 0 ? (step > 0 ? 0 : line.length - 1) : at + step))];
  hint(hovered);
  table.mark(hovered);
  say(`${hovered.plain}: ${hovered.text.tokens_per_s_per_user} tokens per second for a user, ${hovered.text.tokens_per_s_per_gpu} per GPU; ${hovered.verdict}`);
}

function closeDetails() {
  Object.assign(state.view, { sel: "", b: "", vs: "", vb: "", tab: "" });
  state.write();
  again();
}

function exports_() {
  const names = { report: "Report page (HTML)", csv: "All candidates (CSV)", json: "Answer (JSON)", config: "Question (YAML)" };
  fill($("exports").querySelector("div"), Object.entries(catalog.exports).map(([kind, file]) => el("button", {
    type: "button", onclick: (event) => save(kind, file, event.target) }, names[kind] ?? file)));
}

async function save(kind, file, button) {
  const was = button.textContent;
  button.textContent = "Making …";
  try {
    const reply = await fetch(`/api/export/${kind}?${new URLSearchParams(state.asked)}`);
    if (!reply.ok) return problem((await reply.json()).error, "");
    const link = el("a", { download: file, href: URL.createObjectURL(await reply.blob()) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } finally {
    button.textContent = was;
    $("exports").open = false;
  }
}

function theme() {
  const was = localStorage.getItem("theme");
  if (was) document.documentElement.dataset.theme = was;
  $("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", dark ? "light" : "dark");
  });
}

function fromAddress() {
  state.read(location.search || `?${new URLSearchParams(catalog.start)}`);
  ghost = null;
  controls.show();
  $("y-axis").value = axis();
  ask(true);
  whole.ask(state.asked, {});
}

async function start() {
  theme();
  tooltips();
  catalog = await (await fetch("/api/catalog")).json();
  state = new State(catalog.fields);
  controls = new Controls(catalog.fields, state, changed);
  controls.build($("controls"), $("deployment"));
  table = new Table($("table"), $("shown"), { choose, hover, compare: compareWith, meaning });
  details = new Details($("details"), {
    onTab: (tab) => { state.view.tab = tab; state.write(); lookClose(); },
    onVersus: (row) => { Object.assign(state.view, { vs: row.key, vb: String(row.batch), sel: "", b: "" }); state.write(); again(); },
    onClose: closeDetails, meaning,
  });
  fill($("y-axis"), Object.entries(charts.AXES).map(([value, name]) => el("option", { value }, name)));
  $("y-axis").addEventListener("change", () => { state.view.y = $("y-axis").value; ghost = null; state.write(); chart(); });
  for (const id of ["find", "only", "every"]) $(id).addEventListener("input", () => page && rows());
  $("share").addEventListener("click", () => copy(location.href, $("share")));
  $("front").addEventListener("keydown", keys);
  addEventListener("popstate", fromAddress);
  let width = innerWidth;
  addEventListener("resize", () => { if (page && innerWidth !== width) { width = innerWidth; chart(); closeBy(); } });
  if (innerWidth < 900) $("panel").open = false;
  exports_();
  fromAddress();
}

start().catch((error) => { $("error").hidden = false; $("error").textContent = `The page could not start: ${error.message}`; });
