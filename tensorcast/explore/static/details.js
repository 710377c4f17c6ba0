// One row from close by, in tabs; two rows side by side.

import * as charts from "./charts.js";
import { copy, el, fill } from "./dom.js";
import { verdict } from "./table.js";

export const TABS = { numbers: "Numbers", step: "Step", roofline: "Roofline", line: "Time line", memory: "Memory", launch: "Launch", versus: "A | B" };

export class Details {
  constructor(box, { onTab, onVersus, onClose, meaning }) {
    Object.assign(this, { box, onTab, onVersus, onClose, meaning });
    this.data = this.pair = null;
    this.asked = {};
  }

  // row: the chosen one; versus: the one beside; data and pair come from the server when they come.
  show({ row, versus, tab, limits, page }) {
    Object.assign(this, { row, versus, tab: tab || "numbers", limits, page });
    if (!row) return fill(this.box, el("h2", {}, "From close by"), el("p", { class: "hint" }, "Choose a point, a card or a row: its step, its memory and what starts it appear here."));
    const tabs = Object.entries(TABS).filter(([key]) => key !== "versus" || versus);
    if (this.tab === "versus" && !versus) this.tab = "numbers";
    const strip = el("div", { class: "tabs", role: "tablist" }, tabs.map(([key, name]) => el("button", {
      type: "button", role: "tab", id: `tab-${key}`, "aria-selected": String(key === this.tab), "aria-controls": "tab-body", tabindex: key === this.tab ? "0" : "-1",
      onclick: () => this.onTab(key), onkeydown: (event) => this.turn(event, tabs.map(([k]) => k)),
    }, name)));
    this.body = el("div", { id: "tab-body", role: "tabpanel", "aria-labelledby": `tab-${this.tab}` });
    fill(this.box, el("div", { class: "bar" }, el("h2", { class: "plain" }, row.plain), el("button", { type: "button", class: "small", "aria-label": "Close", onclick: this.onClose }, "✕")),
      el("p", { class: "code" }, row.name, el("span", { class: "hint" }, ` · batch ${row.text.batch} · ${row.options}`)), strip, this.body);
    this.fillBody();
  }

  turn(event, keys) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = keys[(keys.indexOf(this.tab) + step + keys.length) % keys.length];
    this.onTab(next);
    document.getElementById(`tab-${next}`)?.focus();
  }

  take(data) {
    this.data = data;
    this.fillBody();
  }

  takePair(pair) {
    this.pair = pair;
    this.fillBody();
  }

  fillBody() {
    if (!this.body || !this.row) return;
    const wait = () => fill(this.body, el("p", { class: "hint" }, "Pricing this step …"));
    if (this.tab === "numbers") return this.numbers();
    if (this.tab === "versus") return this.pair ? this.sideBySide() : wait();
    if (!this.data) return wait();
    if (this.data.error) return fill(this.body, el("p", { class: "problem" }, this.data.error));
    this[this.tab]();
  }

  numbers() {
    const r = this.row;
    const between = (low, high) => `${r.text[low]} to ${r.text[high]}`;
    const limit = (key, name) => (this.limits[key] ? ` · limit ${name}` : "");
    const ms = (s) => (s >= 1 ? `${+(s).toPrecision(3)} s` : `${+(s * 1e3).toPrecision(3)} ms`);
    const pairs = [
      ["tokens/s of all GPUs", r.text.output_tokens_per_s, `${r.text.tokens_per_s_per_gpu} per GPU`],
      ["users at once", r.text.concurrency, `${r.text.requests_per_s} requests/s`],
      ["a user reads", `${r.text.tokens_per_s_per_user} tokens/s`, "1 / TPOT"],
      ["time to first token", r.text.ttft_s, between("ttft_low_s", "ttft_high_s") + limit("ttft_s", this.limits.ttft_s && ms(this.limits.ttft_s))],
      ["time per output token", r.text.tpot_s, between("tpot_low_s", "tpot_high_s") + limit("tpot_s", this.limits.tpot_s && ms(this.limits.tpot_s))],
      ["USD per hour", r.text.usd_per_hour, `${r.text.usd_per_month} a month`],
      ["USD per million output tokens", r.text.cost_per_million_tokens, r.usd_per_million_in === null ? "" : `or ${r.text.usd_per_million_in} per million tokens in and ${r.text.usd_per_million_out} out`],
      ["GPUs used", r.text.gpus, r.idle_gpus ? `${r.text.idle_gpus} stand idle, and cost` : "none idle"],
      ["memory of the fullest GPU", r.text.memory_share, "in use"],
    ];
    fill(this.body, el("p", { class: `verdict ${verdict(r)}` }, sentence(r)),
      el("dl", { class: "numbers" }, pairs.filter(([, v]) => v !== "-").map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, el("strong", {}, value), note && el("span", {}, note))))),
      el("p", {}, el("button", { type: "button", onclick: () => this.onVersus(r) }, "Set as B"), el("span", { class: "hint" }, " then choose another point: both side by side.")));
  }

  step() {
    const chart = el("div", { class: "chart" });
    fill(this.body, chart, this.data.steps.map((s) => el("p", { class: "hint" }, el("b", {}, s.name), ` ${s.text}: ${s.what}; ${s.words} (${s.layout})`, s.hidden_s > 0 ? `; hides ${s.hidden} of what is sent` : "", ".")),
      command(this.data.simulate, "its decode step in a shell"));
    charts.stepBars(chart, this.data.steps);
  }

  roofline() {
    const chart = el("div", { class: "chart" });
    fill(this.body, el("p", { class: "hint" }, "The costliest kernels of a decode step under the GPU's roofs; a larger mark takes more of it. Far below both roofs: latency, small tiles or padding."), chart);
    charts.roofline(chart, this.data.roofline);
  }

  line() {
    const chart = el("div", { class: "chart" });
    fill(this.body, chart);
    charts.timeLine(chart, this.data.line);
  }

  memory() {
    const chart = el("div", { class: "chart" });
    fill(this.body, chart);
    charts.memoryBar(chart, this.data.memory);
  }

  launch() {
    fill(this.body, this.data.launch.map((one, i) => (one.problem
      ? el("p", { class: "hint" }, el("b", {}, one.engine), ` cannot run it: ${one.problem}`)
      : el("details", { open: i === 0 }, el("summary", {}, `${one.engine} ${one.version}`), script(one)))));
  }

  sideBySide() {
    if (this.pair.error) return fill(this.body, el("p", { class: "problem" }, this.pair.error));
    const [a, b] = [this.row, this.versus];
    const rows = [["tokens/s of all GPUs", "output_tokens_per_s"], ["per GPU", "tokens_per_s_per_gpu"], ["a user reads, tokens/s", "tokens_per_s_per_user"], ["time to first token", "ttft_s"], ["time per output token", "tpot_s"], ["users at once", "concurrency"], ["USD per million tokens", "cost_per_million_tokens"], ["GPUs", "gpus"], ["memory in use", "memory_share"]];
    const more = (key) => {
      const change = b[key] / a[key] - 1;
      return Number.isFinite(change) ? (Math.abs(change) < 0.0005 ? "same" : `${change > 0 ? "+" : "−"}${(100 * Math.abs(change)).toFixed(1)} %`) : "";
    };
    const chart = el("div", { class: "chart" });
    const gain = (x) => `${x >= 0 ? "+" : "−"}${Math.abs(100 * x).toFixed(1)} %`;
    fill(this.body,
      el("table", { class: "plain" }, el("thead", {}, el("tr", {}, el("th", {}, ""), el("th", { class: "number", title: a.plain }, `A  ${a.name}`), el("th", { class: "number", title: b.plain }, `B  ${b.name}`), el("th", { class: "number" }, "B to A"))),
        el("tbody", {}, rows.map(([name, key]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, a.text[key]), el("td", { class: "number" }, b.text[key]), el("td", { class: "number" }, more(key)))))),
      el("h3", {}, "Where a decode step goes, each at its own batch"), chart,
      el("table", { class: "plain" }, el("tbody", {}, this.pair.groups.filter((g) => g.why && g.why !== "the same").map((g) => el("tr", {}, el("th", { scope: "row" }, g.group), el("td", {}, g.why))))),
      el("h3", {}, "Tokens/s gained from 10 % more of a resource"),
      el("table", { class: "plain" }, el("tbody", {}, this.pair.elasticities.map((e) => el("tr", {}, el("th", { scope: "row" }, e.resource), el("td", { class: "number" }, `A ${gain(e.gain_a)}`), el("td", { class: "number" }, `B ${gain(e.gain_b)}`))))));
    charts.versusBars(chart, this.pair.groups);
  }
}

export function sentence(r) {
  if (!r.meets) return `Breaks a limit: ${r.verdict}.`;
  const chances = ["ttft", "tpot"].filter((what) => r[`${what}_chance`] !== null).map((what) => `${what.toUpperCase()} with a chance of ${r.text[`${what}_chance`]}`).join(", ");
  if (r.verdict.startsWith("may")) return `Keeps the limits by its expected numbers, but ${r.verdict}: ${chances}.`;
  return chances ? `Keeps the limits: ${chances}.` : "No limit on times was asked for.";
}

function script(one) {
  const button = el("button", { type: "button", class: "small", onclick: () => copy(one.script, button) }, "Copy");
  const link = el("a", { class: "small", download: one.file, href: `data:text/x-shellscript;charset=utf-8,${encodeURIComponent(one.script)}` }, one.file);
  return el("div", { class: "script" }, el("div", { class: "bar" }, link, button), el("pre", { tabindex: "0" }, one.script));
}

export function command(text, what = "the same in a shell") {
  const button = el("button", { type: "button", class: "small", onclick: () => copy(text, button) }, "Copy");
  return el("div", { class: "script" }, el("div", { class: "bar" }, el("span", { class: "hint" }, what), button), el("pre", { tabindex: "0" }, text));
}
