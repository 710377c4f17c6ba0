"use strict";
// Limits, a price and an objective that move here, without a server: every candidate of the page is judged anew, and
// the chart, the table and the sentence above them follow.
(() => {
  const { columns, rows, show, onkept } = candidateTable;
  const at = Object.fromEntries(columns.map((column, i) => [column.key, i]));
  const [FRONT, TTFT_HIGH, TPOT_HIGH] = [columns.length, columns.length + 1, columns.length + 2];
  const $ = (id) => document.getElementById(id);
  const value = (row, key) => (at[key] === undefined ? null : row[at[key]][0]);
  const AXES = {
    tokens_per_s_per_gpu: "tokens/s per GPU", output_tokens_per_s: "tokens/s of all GPUs", concurrency: "users at once",
    cost_per_million_tokens: "USD per million output tokens", usd_per_hour: "USD per hour", ttft_s: "time to first token, s",
  };
  const LESS = new Set(["cost_per_million_tokens", "usd_per_hour", "ttft_s"]);
  const fields = { ttft: $("limit-ttft"), tpot: $("limit-tpot"), users: $("limit-users"), price: $("price"), y: $("live-y") };
  const asked = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));
  const prices = rows.map((row) => (value(row, "usd_per_hour") === null ? null : value(row, "usd_per_hour") / value(row, "gpus")));
  let kept = rows, shown = [], focus = -1;

  const digits = (x) => (x === null ? "-" : x >= 1000 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3))));
  const dollars = (x) => (x === null || x >= 1000 || x < 1e-6 ? digits(x) : x.toPrecision(3)); // 0.0620, as the report's own
  // Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: off by less than 2e-7
  function normal(sigmas) {
    const x = Math.abs(sigmas) / Math.SQRT2, t = 1 / (1 + 0.3275911 * x);
    const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))) * Math.exp(-x * x);
    return sigmas > 0 ? 1 - tail / 2 : tail / 2;
  }
  const words = (share) => (share > 0.995 ? ">99 %" : share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`);
  const chance = (time, high, limit) => normal((1.2816 * Math.log(limit / time)) / Math.log(high / time));

  // Every row under the limits of the fields: its chances, its verdict and its cost.
  function judge() {
    const limits = { ttft: Number(fields.ttft.value) / 1e3, tpot: Number(fields.tpot.value) / 1e3 };
    const users = Number(fields.users.value) || 0, price = Number(fields.price.value) || 0;
    rows.forEach((row, n) => {
      const near = [], over = [];
      for (const [name, high] of [["ttft", TTFT_HIGH], ["tpot", TPOT_HIGH]]) {
        const limit = limits[name];
        if (!(limit > 0)) continue;
        const time = value(row, `${name}_s`), likely = chance(time, row[high], limit);
        if (at[`${name}_chance`] !== undefined) row[at[`${name}_chance`]] = [likely, words(likely)];
        if (time > limit * (1 + 1e-6)) over.push(name.toUpperCase());
        else if (likely < 0.9) near.push(name.toUpperCase());
      }
      if (value(row, "concurrency") < users) over.push("users");
      row[at.verdict] = over.length ? (over[0] === "users" ? "too few users" : `over ${over.join(" and ")}`) : near.length ? `may miss ${near.join(" and ")}` : "keeps limits";
      const hourly = price > 0 ? price : prices[n];
      if (hourly !== null && at.usd_per_hour !== undefined) {
        const hour = hourly * value(row, "gpus"), cost = (hour / 3600 / value(row, "output_tokens_per_s")) * 1e6;
        row[at.usd_per_hour] = [hour, dollars(hour)];
        if (at.cost_per_million_tokens !== undefined) row[at.cost_per_million_tokens] = [cost, dollars(cost)];
      }
    });
  }

  const meets = (row) => !/^(over|too)/.test(row[at.verdict]);

  function tell(line) {
    const y = fields.y.value, good = rows.filter((row) => meets(row) && value(row, y) !== null);
    if (!good.length) { line.textContent = `No candidate of this page keeps these limits.`; return; }
    const best = good.reduce((a, b) => ((value(b, y) - value(a, y)) * (LESS.has(y) ? -1 : 1) > 0 ? b : a));
    const parts = [`${digits(value(best, "output_tokens_per_s"))} tokens/s`, `${digits(value(best, "concurrency"))} users`, `TTFT ${best[at.ttft_s][1]}`, `TPOT ${best[at.tpot_s][1]}`, best[at.verdict]];
    if (value(best, "cost_per_million_tokens") !== null) parts.push(`${dollars(value(best, "cost_per_million_tokens"))} USD per million output tokens`);
    line.replaceChildren(Object.assign(document.createElement("b"), { textContent: best[at.name] }), ` has ${LESS.has(y) ? "the least" : "the most"} ${AXES[y]}: ${digits(value(best, y))}. ${parts.join(", ")}.`);
  }

  const NS = "http://www.w3.org/2000/svg";
  function draw(parent, tag, attributes, text) {
    const made = document.createElementNS(NS, tag);
    for (const [name, one] of Object.entries(attributes)) made.setAttribute(name, one);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function ticks(low, high, log) {
    if (log) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1)
        for (const one of [1, 2, 5]) if (one * 10 ** power >= low && one * 10 ** power <= high) found.push(one * 10 ** power);
      return found;
    }
    const step = 10 ** Math.floor(Math.log10((high - low) / 4 || 1)), wide = [1, 2, 5, 10].find((n) => (high - low) / (n * step) <= 6) * step;
    return Array.from({ length: 9 }, (_, i) => Math.ceil(low / wide) * wide + i * wide).filter((one) => one <= high);
  }

  function chart() {
    const box = $("live-chart"), y = fields.y.value;
    shown = kept.filter((row) => value(row, y) > 0 && value(row, "tokens_per_s_per_user") > 0);
    const width = Math.max(300, box.clientWidth), height = Math.round(Math.min(400, Math.max(260, width * 0.55)));
    const [left, right, top, bottom] = [58, 12, 12, 42];
    const svg = document.createElementNS(NS, "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    box.replaceChildren(svg);
    if (!shown.length) { draw(svg, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no candidate is left to draw"); return; }
    const spread = (key) => [Math.min(...shown.map((r) => value(r, key))), Math.max(...shown.map((r) => value(r, key)))];
    const scale = ([low, high], from, to) => {
      const [a, b] = [Math.log(low / 1.08), Math.log(high * 1.08)];
      return (one) => from + ((Math.log(one) - a) / (b - a)) * (to - from);
    };
    const [xs, ys] = [spread("tokens_per_s_per_user"), spread(y)];
    const x = scale(xs, left, width - right), up = scale(ys, height - bottom, top);
    for (const tick of ticks(xs[0] / 1.05, xs[1] * 1.05, true)) {
      draw(svg, "line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom });
      draw(svg, "text", { x: x(tick), y: height - bottom + 15, "text-anchor": "middle" }, digits(tick));
    }
    for (const tick of ticks(ys[0] / 1.05, ys[1] * 1.05, true)) {
      draw(svg, "line", { class: "grid", x1: left, x2: width - right, y1: up(tick), y2: up(tick) });
      draw(svg, "text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, digits(tick));
    }
    draw(svg, "text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, "tokens/s that a user reads →");
    const fastest = Number(fields.tpot.value) > 0 ? 1e3 / Number(fields.tpot.value) : 0;
    if (fastest > xs[0] / 1.08 && fastest < xs[1] * 1.08) draw(svg, "line", { class: "limit", x1: x(fastest), x2: x(fastest), y1: top, y2: height - bottom });
    const line = front(y);
    draw(svg, "polyline", { class: "front", points: line.map((row) => `${x(value(row, "tokens_per_s_per_user"))},${up(value(row, y))}`).join(" ") });
    const order = shown.map((row, n) => [line.includes(row), n]).sort((a, b) => a[0] - b[0]); // the front lies on top
    order.forEach(([, n]) => {
      const row = shown[n], pools = at.mode !== undefined && row[at.mode] === "disaggregated";
      const dot = draw(svg, pools ? "rect" : "circle", { class: `dot ${meets(row) ? "" : "misses"} ${line.includes(row) ? "best" : ""}`, "data-n": n });
      const [px, py, r] = [x(value(row, "tokens_per_s_per_user")), up(value(row, y)), line.includes(row) ? 5 : 3.5];
      for (const [name, one] of Object.entries(pools ? { x: px - r, y: py - r, width: 2 * r, height: 2 * r } : { cx: px, cy: py, r })) dot.setAttribute(name, one);
    });
  }

  // Of the rows that keep the limits, those that no other beats for a user and on the axis both.
  function front(y) {
    const sign = LESS.has(y) ? -1 : 1;
    const good = shown.filter(meets).sort((a, b) => value(b, "tokens_per_s_per_user") - value(a, "tokens_per_s_per_user") || sign * (value(b, y) - value(a, y)));
    let best = -Infinity;
    return good.filter((row) => sign * value(row, y) > best && ((best = sign * value(row, y)), true));
  }

  function point(row) {
    const box = $("live-tip");
    document.querySelectorAll("#live-chart .pointed").forEach((one) => one.classList.remove("pointed"));
    if (!row) { box.textContent = box.dataset.idle; return; }
    document.querySelector(`#live-chart [data-n="${shown.indexOf(row)}"]`)?.classList.add("pointed");
    const told = columns.filter((column) => column.number && ["tokens_per_s_per_gpu", "output_tokens_per_s", "ttft_s", "tpot_s", "concurrency", "cost_per_million_tokens", "batch"].includes(column.key)).map((column) => `${column.name} ${row[at[column.key]][1]}`);
    box.textContent = `${row[at.name]}: ${told.join(", ")}; ${row[at.verdict]}`;
  }

  const of = (event) => shown[event.target.dataset?.n];
  function choose(row) {
    $("search").value = row[at.name];
    $("search").dispatchEvent(new Event("input", { bubbles: true }));
    $("candidates").scrollIntoView({ block: "start" });
  }
  // What the keys have walked to stays where the mouse points at nothing.
  const walked = () => (document.activeElement === $("live-chart") ? front(fields.y.value)[focus] : null);
  $("live-chart").addEventListener("mouseover", (event) => point(of(event) ?? walked()));
  $("live-chart").addEventListener("mouseleave", () => point(walked()));
  $("live-chart").addEventListener("click", (event) => of(event) && choose(of(event)));
  $("live-chart").addEventListener("keydown", (event) => {
    const line = front(fields.y.value), step = { ArrowRight: -1, ArrowLeft: 1 }[event.key];
    if (event.key === "Enter" && line[focus]) choose(line[focus]);
    if (!step || !line.length) return;
    event.preventDefault();
    focus = Math.max(0, Math.min(line.length - 1, focus < 0 ? 0 : focus + step));
    point(line[focus]);
  });

  function again() {
    judge();
    tell($("live-best"));
    show();
  }
  onkept((found) => { kept = found; chart(); point(null); });
  $("live").addEventListener("input", again);
  $("live").addEventListener("submit", (event) => event.preventDefault());
  $("live").addEventListener("reset", (event) => {
    event.preventDefault(); // to what was asked, at once
    for (const [name, one] of Object.entries(asked)) fields[name].value = one;
    again();
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; chart(); } });
  for (const one of [...fields.y.options]) if (at[one.value] === undefined) one.remove();
  if (at.usd_per_hour === undefined) fields.price.closest("label").remove();
  again();
})();
