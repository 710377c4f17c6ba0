// Charts, by Observable Plot (https://observablehq.com/plot), in the page's own colours.

import { el, fill } from "./dom.js";

const Plot = window.Plot;

export const MODES = { aggregated: "one pool", disaggregated: "two pools" };
export const AXES = {
  tokens_per_s_per_gpu: "tokens/s per GPU",
  output_tokens_per_s: "tokens/s of all GPUs",
  cost_per_million_tokens: "USD per million output tokens",
  concurrency: "users at once",
};
const PALETTE = ["var(--one)", "var(--two)", "var(--three)", "var(--four)", "var(--five)", "var(--six)"];

const narrow = () => window.innerWidth < 700;
const width = (box) => Math.max(280, Math.floor(box.clientWidth || 600));
const style = { background: "none", color: "var(--ink)", fontFamily: "inherit", fontSize: "12px", overflow: "visible" };

// Axes stay while a slider moves, but grow where points leave them; a settled answer fits them anew.
let held = null;

function domains(rows, y, quick, limit) {
  const least = limit ? 0.5 * limit : 0; // far slower than asked, nobody looks
  const seen = rows.filter((r) => r.tokens_per_s_per_user >= least && r[y] > 0);
  const xs = seen.map((r) => r.tokens_per_s_per_user), ys = seen.map((r) => r[y]);
  if (!seen.length) return held ?? { y, x: [1, 100], at: [1, 100] };
  const found = { y, x: [Math.min(...xs, limit ?? Infinity) * 0.82, Math.max(...xs) * 1.12], at: [Math.min(...ys) * 0.8, Math.max(...ys) * 1.25] };
  if (quick && held && held.y === y)
    for (const axis of ["x", "at"]) found[axis] = [Math.min(found[axis][0], held[axis][0]), Math.max(found[axis][1], held[axis][1])];
  held = found;
  return found;
}

// The best of y that each speed allows, over rows: from slow to fast, only what beats all faster ones.
export function frontOf(rows, y) {
  const less = y === "cost_per_million_tokens";
  const found = [];
  for (const row of [...rows].filter((r) => r[y] > 0).sort((a, b) => b.tokens_per_s_per_user - a.tokens_per_s_per_user || (less ? a[y] - b[y] : b[y] - a[y])))
    if (!found.length || (less ? row[y] < found.at(-1)[y] : row[y] > found.at(-1)[y])) found.push(row);
  return found.reverse();
}

export function front(box, { rows, ghost, y, quick, limits, selected, versus, onhover, onchoose }) {
  const devices = [...new Set(rows.map((r) => r.device))];
  const several = devices.length > 1;
  const group = (r) => (several ? r.device : MODES[r.mode]);
  const groups = several ? devices : Object.values(MODES);
  const limit = limits.tpot_s ? 1 / limits.tpot_s : null;
  const { x, at } = domains(rows, y, quick, limit);
  rows = rows.filter((r) => r.tokens_per_s_per_user >= x[0] && r[y] >= at[0]);
  const line = frontOf(rows, y), inside = frontOf(rows.filter((r) => r.meets), y);
  const shape = (r) => (r.mode === "disaggregated" ? "square" : "circle");
  const channels = { x: "tokens_per_s_per_user", y };
  const mark = (data, options) => Plot.dot(data, { ...channels, symbol: shape, r: narrow() ? 3 : 3.5, ...options });
  const marks = [
    Plot.gridX({ stroke: "var(--rule)", strokeOpacity: 1 }), Plot.gridY({ stroke: "var(--rule)", strokeOpacity: 1 }),
    limit && limit > x[0] ? Plot.rectX([0], { x1: x[0], x2: Math.min(limit, x[1]), fill: "var(--soft)" }) : null,
    limit && limit > x[0] ? Plot.ruleX([limit], { stroke: "var(--muted)", strokeDasharray: "3,3" }) : null,
    limit && limit > x[0] ? Plot.text(["slower than asked"], { x: limit, frameAnchor: "bottom", textAnchor: "end", dx: -4, dy: -4, rotate: 0, fill: "var(--muted)", fontSize: 10.5, lineWidth: 6 }) : null,
    ghost?.length > 1 ? Plot.line(ghost, { ...channels, stroke: "var(--muted)", strokeDasharray: "2,3", strokeOpacity: 0.8 }) : null,
    mark(rows.filter((r) => !r.meets), { stroke: group, strokeOpacity: 0.32, strokeWidth: 1 }),
    mark(rows.filter((r) => r.meets), { fill: group, fillOpacity: 0.55 }),
    Plot.line(line, { ...channels, stroke: "var(--ink)", strokeOpacity: 0.35, strokeWidth: 1.2 }),
    Plot.line(inside, { ...channels, stroke: "var(--ink)", strokeWidth: 2, strokeOpacity: quick ? 0.6 : 1 }),
    mark(line, { fill: (r) => (r.meets ? group(r) : "none"), stroke: group, strokeWidth: 1.4, r: 4.2 }),
    mark(rows.filter((r) => r.is_best), { r: 8, stroke: "var(--ink)", strokeWidth: 2, fill: group }),
    versus ? mark([versus], { r: 9, stroke: "var(--accent)", strokeWidth: 2, strokeDasharray: "3,2" }) : null,
    versus ? Plot.text([versus], { ...channels, text: () => "B", dx: 12, dy: -8, fontWeight: 600, fill: "var(--accent)" }) : null,
    selected ? Plot.ruleY([selected], { y, x1: (r) => Math.max(x[0], 1 / r.tpot_high_s), x2: (r) => Math.min(x[1], 1 / r.tpot_low_s), stroke: "var(--accent)", strokeWidth: 1.5 }) : null,
    selected ? mark([selected], { r: 9, stroke: "var(--accent)", strokeWidth: 2.5 }) : null,
    selected ? Plot.text([selected], { ...channels, text: () => (versus ? "A" : ""), dx: -12, dy: -8, fontWeight: 600, fill: "var(--accent)" }) : null,
    mark(rows, Plot.pointer({ ...channels, symbol: shape, r: 6, stroke: "var(--accent)", strokeWidth: 2, maxRadius: 30 })),
  ];
  const drawn = Plot.plot({
    style, width: width(box), height: narrow() ? 300 : Math.max(320, Math.min(460, Math.round(width(box) * 0.56))),
    marginLeft: 52, marginBottom: 38, marginTop: 22, marginRight: 16,
    x: { type: "log", domain: x, label: "tokens/s that a user reads →", ticks: 6, tickFormat: "~s", labelAnchor: "right" },
    y: { type: "log", domain: at, label: `↑ ${AXES[y]}`, ticks: 6, tickFormat: "~s" },
    color: { domain: groups, range: PALETTE.slice(0, Math.max(groups.length, 2)) },
    symbol: { domain: ["circle", "square"], range: ["circle", "square"] },
    marks,
  });
  drawn.addEventListener("input", () => onhover(drawn.value ?? null));
  drawn.addEventListener("click", () => drawn.value && onchoose(drawn.value));
  drawn.setAttribute("aria-hidden", "true");
  fill(box, legend(groups, several, quick), drawn);
}

function legend(groups, several, quick) {
  const key = (name, i) => el("span", { class: "key" }, el("i", { class: several ? "circle" : i ? "square" : "circle", style: `--c:${PALETTE[i]}` }), name);
  return el("div", { class: "legend" }, groups.map(key), several && el("span", { class: "key" }, "● one pool  ■ two pools"),
    el("span", { class: "key" }, el("i", { class: "stroke" }), "best trade-offs"), quick && el("span", { class: "key moving" }, "provisional"));
}

// Stacked bars, one per step, by part.
export function stepBars(box, steps) {
  const rows = steps.flatMap((s) => s.parts.map((p) => ({ ...p, step: `${s.name}\n${s.text}`, share: p.seconds / s.seconds })));
  const names = [...new Map(rows.map((r) => [r.part, r.colour]))];
  fill(box,
    el("div", { class: "legend" }, names.map(([name, colour]) => el("span", { class: "key" }, el("i", { class: "square", style: `--c:${colour}` }), name))),
    Plot.plot({
      style, width: width(box), height: 46 + 54 * steps.length, marginLeft: 66, marginBottom: 34, marginTop: 6,
      x: { percent: true, label: "share of the step, %", labelAnchor: "right" }, y: { label: null, domain: [...new Set(rows.map((r) => r.step))] },
      marks: [
        Plot.barX(rows, Plot.stackX({ x: "share", y: "step", fill: "colour", order: names.map(([, c]) => c), insetLeft: 0.5, insetRight: 0.5, title: (r) => `${r.part}: ${r.text}`, ariaLabel: (r) => `${r.part} ${r.text}` })),
        Plot.text(rows, Plot.stackX({ x: "share", y: "step", z: "colour", order: names.map(([, c]) => c), text: (r) => (r.share > 0.09 ? r.text : ""), fill: "white", stroke: "rgba(0,0,0,.45)", strokeWidth: 2, fontSize: 11 })),
      ],
    }));
}

export function roofline(box, { ops, roofs, bandwidth, bandwidth_text }) {
  const top = roofs.at(-1).peak;
  const low = Math.min(...ops.map((o) => o.intensity), (0.3 * roofs[0].peak) / bandwidth) / 2;
  const high = Math.max(...ops.map((o) => o.intensity), top / bandwidth) * 3;
  const floor = Math.min(...ops.map((o) => o.rate)) / 3;
  const slope = [Math.max(low, floor / bandwidth), top / bandwidth].map((x) => ({ x, y: x * bandwidth }));
  fill(box, Plot.plot({
    style, width: width(box), height: narrow() ? 280 : 330, marginLeft: 52, marginBottom: 38, marginTop: 20, marginRight: 20,
    x: { type: "log", domain: [low, high], label: "FLOP per byte of memory traffic →", ticks: 6, tickFormat: "~s", labelAnchor: "right" },
    y: { type: "log", domain: [floor, top * 1.8], label: "↑ FLOP/s of one GPU", ticks: 5, tickFormat: "~s" },
    r: { range: [3, 22], domain: [0, 1] },
    marks: [
      Plot.gridX({ stroke: "var(--rule)" }), Plot.gridY({ stroke: "var(--rule)" }),
      Plot.line(slope, { x: "x", y: "y", stroke: "var(--ink)" }),
      Plot.text([slope[1]], { x: () => slope[0].x * (slope[1].x / slope[0].x) ** 0.6, y: () => slope[0].y * (slope[1].y / slope[0].y) ** 0.6, text: () => `memory, ${bandwidth_text}`, dx: -6, textAnchor: "end", fill: "var(--muted)" }),
      Plot.ruleY(roofs, { y: "peak", x1: (r) => r.peak / bandwidth, x2: high, stroke: "var(--ink)" }),
      Plot.text(roofs, { x: () => high, y: "peak", text: (r) => `${r.name}, ${r.text}`, textAnchor: "end", dy: -7, fill: "var(--muted)" }),
      Plot.dot(ops, { x: "intensity", y: "rate", r: "share", fill: "colour", fillOpacity: 0.8, title: (o) => `${o.name}: ${o.share_text} of kernel time, ${o.rate_text}, ${o.roof_share} of its roof` }),
      Plot.text(ops, { x: "intensity", y: "rate", text: (_, i) => String(i + 1), fontSize: 11, fontWeight: 600, stroke: "var(--paper)", strokeWidth: 3, fill: "var(--ink)" }),
    ],
  }), el("ol", { class: "ops" }, ops.map((o) => el("li", {}, el("i", { class: "square", style: `--c:${o.colour}` }), o.name, el("span", {}, `${o.share_text} of kernel time · ${o.roof_share} of its roof`)))));
}

export function timeLine(box, { spans, text, layers, hidden }) {
  if (!spans.length) return fill(box, el("p", { class: "hint" }, "No layer to draw."));
  const scale = spans.map((s) => ({ ...s, from: s.start * 1e6, to: s.end * 1e6 }));
  const names = [...new Map(spans.map((s) => [s.group, s.colour]))];
  const tracks = ["compute", ...(spans.some((s) => s.track === "network") ? ["network"] : [])];
  fill(box,
    el("p", { class: "hint" }, `One layer of a decode step, kernel by kernel: ${text}, ${layers} layers like it. `,
      hidden ? `${hidden} of what is sent passes while arithmetic runs.` : "What is sent is waited for."),
    el("div", { class: "legend" }, names.map(([name, colour]) => el("span", { class: "key" }, el("i", { class: "square", style: `--c:${colour}` }), name))),
    Plot.plot({
      style, width: width(box), height: 60 + 46 * tracks.length, marginLeft: 66, marginBottom: 36, marginTop: 4,
      x: { label: "microseconds →", labelAnchor: "right" }, y: { label: null, domain: tracks },
      marks: [
        Plot.barX(scale, { x1: "from", x2: "to", y: "track", fill: "colour", insetLeft: 0.3, insetRight: 0.3, title: (s) => `${s.name}: ${s.text}`, ariaLabel: (s) => `${s.name} ${s.text}` }),
        Plot.ruleX([0], { stroke: "var(--muted)" }),
      ],
    }),
    el("ol", { class: "ops" }, [...spans].sort((a, b) => b.end - b.start - (a.end - a.start)).slice(0, 6).map((s) => el("li", {}, el("i", { class: "square", style: `--c:${s.colour}` }), s.name, el("span", {}, s.text)))));
}

export function memoryBar(box, { parts, capacity, capacity_text, batch, largest }) {
  const rows = parts.map((p) => ({ ...p, gb: p.bytes / 1e9, at: "fullest GPU" }));
  fill(box,
    el("div", { class: "legend" }, parts.map((p) => el("span", { class: "key" }, el("i", { class: "square", style: `--c:${p.colour}` }), `${p.part} ${p.text}`))),
    Plot.plot({
      style, width: width(box), height: 108, marginLeft: 20, marginBottom: 36, marginTop: 12, marginRight: 24,
      x: { label: "GB →", domain: [0, (capacity / 1e9) * 1.05], labelAnchor: "right" }, y: { axis: null },
      marks: [
        Plot.barX(rows, Plot.stackX({ x: "gb", y: "at", fill: "colour", order: parts.map((p) => p.colour), title: (p) => `${p.part}: ${p.text}`, ariaLabel: (p) => `${p.part} ${p.text}` })),
        Plot.ruleX([capacity / 1e9], { stroke: "var(--ink)", strokeWidth: 2 }),
        Plot.text([capacity / 1e9], { x: (d) => d, text: () => capacity_text, frameAnchor: "top", dy: -8, textAnchor: "end", fill: "var(--muted)" }),
      ],
    }),
    el("p", { class: "hint" }, `A batch of ${batch} of the ${largest} sequences per data-parallel rank that fit.`));
}

export function versusBars(box, groups) {
  const most = Math.max(...groups.map((g) => Math.max(g.seconds_a, g.seconds_b)));
  groups = groups.filter((g) => Math.max(Math.abs(g.seconds_a), Math.abs(g.seconds_b)) > 0.01 * most);
  const rows = groups.flatMap((g) => ["a", "b"].map((side) => ({ group: g.group, side: side.toUpperCase(), ms: 1e3 * g[`seconds_${side}`], text: g[`${side}_text`], why: g.why })));
  fill(box, Plot.plot({
    style, width: width(box), height: 40 + 34 * groups.length, marginLeft: narrow() ? 110 : 140, marginBottom: 34, marginTop: 4, marginRight: 60,
    x: { label: "ms of a decode step →", labelAnchor: "right", grid: true }, fy: { label: null, domain: groups.map((g) => g.group) }, y: { axis: null, domain: ["A", "B"] },
    color: { domain: ["A", "B"], range: ["var(--one)", "var(--two)"] },
    marks: [
      Plot.axisFy({ anchor: "left", label: null, textAnchor: "end" }),
      Plot.barX(rows, { x: "ms", y: "side", fy: "group", fill: "side", title: (r) => `${r.group}, ${r.side}: ${r.text}. ${r.why}` }),
      Plot.text(rows, { x: (r) => Math.max(r.ms, 0), y: "side", fy: "group", text: (r) => `${r.side} ${r.text}`, dx: 4, textAnchor: "start", fontSize: 11 }),
      Plot.ruleX([0]),
    ],
  }));
}
