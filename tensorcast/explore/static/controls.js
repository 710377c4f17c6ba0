// Controls from the fields that the server describes: a slider beside each bounded value, menus, proposals.

import { el, fill } from "./dom.js";

const STEPS = 240;
const SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 72, 96, 128, 192, 256];

// Position of a slider from a value, and back; a logarithmic one has even ratios.
function scale(field) {
  if (field.key === "world_size") {
    const nearest = (v) => SIZES.reduce((best, one, i) => (Math.abs(Math.log(one / v)) < Math.abs(Math.log(SIZES[best] / v)) ? i : best), 0);
    return { least: 0, most: SIZES.length - 1, to: nearest, from: (at) => String(SIZES[at]) };
  }
  const { least, most, log } = field;
  const to = (v) => STEPS * (log ? Math.log(v / least) / Math.log(most / least) : (v - least) / (most - least));
  const from = (at) => {
    const value = log ? least * (most / least) ** (at / STEPS) : least + ((most - least) * at) / STEPS;
    return rounded(value, field);
  };
  return { least: 0, most: STEPS, to, from };
}

function rounded(value, field) {
  if (field.key === "mtp_acceptance") return String(Math.round(value * 100) / 100);
  if (field.key === "cached") return String(Math.round(value));
  const digits = value >= 10000 ? 100 : value >= 1000 ? 10 : value >= 30 || field.kind === "whole" ? 1 : value >= 3 ? 0.1 : 0.05;
  return String(Number((Math.round(value / digits) * digits).toFixed(2)));
}

export class Controls {
  // changed(key, value, settled): settled is false while a slider moves.
  constructor(fields, state, changed) {
    this.fields = fields;
    this.state = state;
    this.changed = changed;
    this.inputs = {};
  }

  build(form, head) {
    const groups = Map.groupBy ? Map.groupBy(this.fields, (f) => f.group) : grouped(this.fields);
    for (const [group, members] of groups) {
      const controls = members.map((field) => this.control(field));
      if (group === "Deployment") fill(head, controls);
      else if (group === "Load" || group === "Limits and price")
        form.append(el("fieldset", {}, el("legend", {}, group), controls));
      else form.append(el("details", { class: "more", open: false }, el("summary", {}, group), controls));
    }
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  control(field) {
    const id = `f-${field.key}`;
    const tip = field.flag.startsWith("--") ? `${field.help}  ${field.flag}` : field.help;
    const label = el("label", { for: id }, el("span", { "data-tip": tip }, field.label), field.unit && el("small", {}, ` ${field.unit}`));
    const problem = el("p", { class: "problem", id: `${id}-problem`, hidden: true });
    if (field.kind === "several") return this.several(field, tip, problem);
    let input;
    const set = (value, settled) => this.changed(field.key, value, settled);
    if (field.kind === "choice") {
      input = el("select", { id, onchange: () => set(input.value, true) }, field.choices.map((one, i) => el("option", { value: one }, field.words[i] ?? one)));
    } else {
      const list = field.choices.length ? `${id}-list` : null;
      input = el("input", {
        id, type: "text", list, inputmode: field.kind === "text" ? null : "decimal", spellcheck: "false",
        placeholder: field.unasked || null, "aria-describedby": `${id}-problem`, maxlength: "400",
        oninput: () => { this.slide(field); clearTimeout(this.typing); this.typing = setTimeout(() => set(input.value.trim(), true), 250); },
        onchange: () => { clearTimeout(this.typing); set(input.value.trim(), true); },
      });
      if (list) problem.before(input);
    }
    this.inputs[field.key] = { input, problem };
    const parts = [label, input];
    if (field.choices.length && field.kind === "text")
      parts.push(el("datalist", { id: `${id}-list` }, field.choices.map((one) => el("option", { value: one }))));
    if (field.least !== null && field.most !== null) {
      const { least, most, from } = scale(field);
      const slider = el("input", {
        type: "range", min: String(least), max: String(most), step: "1", id: `${id}-slider`, "aria-label": `${field.label} ${field.unit}`.trim(),
        oninput: () => { input.value = from(Number(slider.value)); slider.setAttribute("aria-valuetext", `${input.value} ${field.unit}`); slider.classList.remove("unset"); set(input.value, false); },
        onchange: () => set(input.value, true),
      });
      this.inputs[field.key].slider = slider;
      parts.push(slider);
    }
    return el("div", { class: `field ${field.kind} ${field.least !== null ? "slid" : ""}`, id: `${id}-field` }, parts, problem);
  }

  several(field, tip, problem) {
    const id = `f-${field.key}`;
    const boxes = field.choices.map((one) => el("input", { type: "checkbox", value: one, onchange: () => {
      const chosen = boxes.filter((box) => box.checked).map((box) => box.value);
      if (!chosen.length) { boxes.find((box) => box.value === one).checked = true; return; }
      this.changed(field.key, chosen.join(","), true);
    } }));
    const summary = el("summary", { id });
    this.inputs[field.key] = { boxes, problem, summary };
    const inner = el("div", {}, boxes.map((box, i) => el("label", { class: "inline" }, box, ` ${field.words[i] ?? box.value}`)));
    const head = field.group === "Deployment" || field.choices.length > 4;
    return el("div", { class: "field several", id: `${id}-field` },
      el("span", { class: "label", "data-tip": tip }, field.label),
      head ? el("details", { class: "menu" }, summary, inner) : inner, problem);
  }

  slide(field) {
    const { input, slider } = this.inputs[field.key];
    if (!slider) return;
    const value = parseFloat(input.value);
    slider.classList.toggle("unset", !(value > 0 || input.value === "0"));
    if (Number.isFinite(value)) slider.value = String(scale(field).to(Math.max(value, field.least || 1e-9)));
    else slider.value = String(Math.round(Number(slider.max) * 0.6));
    slider.setAttribute("aria-valuetext", input.value || field.unasked);
  }

  // Show the state; what a reader types in stays as it is.
  show() {
    for (const field of this.fields) {
      const { input, boxes, summary } = this.inputs[field.key];
      const value = this.state.asked[field.key];
      if (boxes) {
        const chosen = value.split(",");
        for (const box of boxes) box.checked = chosen.includes(box.value);
        if (summary) summary.textContent = chosen.length > 2 ? `${chosen.length} chosen` : chosen.join(", ");
        continue;
      }
      if (document.activeElement !== input) {
        if (input.tagName === "SELECT" && ![...input.options].some((o) => o.value === value)) input.append(el("option", { value }, value));
        input.value = value;
      }
      if (document.activeElement !== this.inputs[field.key].slider) this.slide(field);
    }
  }

  // One line beside the field that it is about; true where it has one.
  problem(key, line) {
    for (const [name, { input, problem, summary }] of Object.entries(this.inputs)) {
      const here = name === key;
      problem.hidden = !here;
      problem.textContent = here ? line : "";
      (input ?? summary)?.setAttribute("aria-invalid", String(here));
      if (here) problem.closest("details.more")?.setAttribute("open", "");
    }
  }
}

function grouped(fields) {
  const found = new Map();
  for (const field of fields) found.set(field.group, [...(found.get(field.group) ?? []), field]);
  return found;
}
