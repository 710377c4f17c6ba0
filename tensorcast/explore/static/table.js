// The table of rows: best of each layout, or every batch; sorted by any column; a row leads to the same as its point.

import { el, fill } from "./dom.js";

const FIRST = 25;

export class Table {
  constructor(table, shown, { choose, hover, compare, meaning }) {
    Object.assign(this, { table, shown, choose, hover, compare, meaning });
    this.sort = null;
    this.all = false;
    this.rows = [];
  }

  show(columns, rows, { find, only, every, selected, versus }) {
    this.given = [columns, rows, { find, only, every, selected, versus }];
    const named = columns.filter((c) => c.name && (!c.number || c.key === "gpus" || rows.some((r) => r[c.key] !== null)))
      .filter((c) => ["name", "verdict", "options"].includes(c.key) || c.number || new Set(rows.map((r) => r[c.key])).size > 1);
    const words = find.toLowerCase().split(/\s+/).filter(Boolean);
    const seen = new Set();
    let kept = rows.filter((r) => {
      if (only && !r.meets) return false;
      const text = `${r.name} ${r.plain} ${r.mode} ${r.mode === "disaggregated" ? "two pools" : "one pool"} ${r.device} ${r.family} ${r.verdict} ${r.options}`.toLowerCase();
      if (!words.every((word) => text.includes(word))) return false;
      if (every || !seen.has(r.key)) { seen.add(r.key); return true; }
      return r === selected || r === versus;
    });
    if (this.sort) {
      const { key, down } = this.sort;
      const value = (r) => r[key] ?? (down ? -Infinity : Infinity);
      kept = [...kept].sort((a, b) => (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0) * (down ? -1 : 1));
    }
    const drawn = this.all ? kept : kept.slice(0, FIRST);
    this.shown.textContent = `${drawn.length} of ${kept.length}`;
    const head = named.map((c) => {
      const mine = this.sort?.key === c.key;
      return el("th", { scope: "col", class: c.number ? "number" : "", "aria-sort": mine ? (this.sort.down ? "descending" : "ascending") : null },
        el("button", { type: "button", "data-tip": c.hint || this.meaning(c.name) || null, onclick: () => this.by(c) }, c.name, mine && el("span", { "aria-hidden": "true" }, this.sort.down ? " ↓" : " ↑")));
    });
    const line = (r) => el("tr", {
      class: [r.meets ? "" : "misses", r.is_best ? "best" : "", r === selected ? "selected" : "", r === versus ? "versus" : ""].join(" ").trim(),
      "data-key": r.key, onmouseenter: () => this.hover(r), onmouseleave: () => this.hover(null), onclick: () => this.choose(r),
    }, named.map((c, i) => (i === 0
      ? el("th", { scope: "row" }, el("button", { type: "button", "data-tip": r.plain, onclick: (e) => { e.stopPropagation(); this.choose(r); } }, r.name), r.front && el("span", { class: "dot", title: "among the best trade-offs" }, "●"))
      : el("td", { class: c.number ? "number" : c.key === "verdict" ? verdict(r) : "" }, c.number ? r.text[c.key] : words_of(c.key, r)))),
      el("td", {}, el("button", { type: "button", class: "small", title: "Set beside the chosen one", "aria-label": `Compare with ${r.name}`, onclick: (e) => { e.stopPropagation(); this.compare(r); } }, "A|B")));
    fill(this.table, el("thead", {}, el("tr", {}, head, el("th", { scope: "col" }, el("span", { class: "spoken" }, "compare")))), el("tbody", {}, drawn.map(line)),
      kept.length > FIRST && el("tfoot", {}, el("tr", {}, el("td", { colspan: String(named.length + 1) },
        el("button", { type: "button", onclick: () => { this.all = !this.all; this.again(); } }, this.all ? "Show fewer" : `Show all ${kept.length}`)))));
  }

  again() {
    if (this.given) this.show(...this.given);
  }

  by(column) {
    const down = this.sort?.key === column.key ? !this.sort.down : column.number && !/ttft|tpot|cost|gpus|memory/.test(column.key);
    this.sort = { key: column.key, down };
    this.again();
  }

  mark(row) {
    for (const line of this.table.querySelectorAll("tr.hovered")) line.classList.remove("hovered");
    if (row) this.table.querySelector(`tr[data-key="${CSS.escape(row.key)}"]`)?.classList.add("hovered");
  }
}

export const verdict = (r) => (r.meets ? (r.verdict.startsWith("may") ? "near" : "keeps") : "over");

// The chance to keep a limit, in brackets; nothing where no limit is.
export const kept = (row, what) => (row[`${what}_chance`] === null ? "" : ` (${row.text[`${what}_chance`]})`);

function words_of(key, row) {
  if (key === "verdict" && row.meets && row.verdict.startsWith("may")) {
    const least = ["ttft", "tpot"].filter((what) => row[`${what}_chance`] !== null).sort((a, b) => row[`${a}_chance`] - row[`${b}_chance`])[0];
    return `${row.verdict}${kept(row, least)}`;
  }
  if (key === "mode") return row.mode === "disaggregated" ? "two pools" : "one pool";
  return row[key];
}
