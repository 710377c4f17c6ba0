"use strict";
// Sorts and filters the candidates. A number's cell is a pair: the value to sort by, the text to show.
const candidateTable = (() => {
  const { columns, rows } = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 30;
  const FRONT = columns.length; // each row ends with whether it is on the Pareto front
  const VERDICT = columns.findIndex((column) => column.key === "verdict");
  const form = document.querySelector("form[role=search]");
  const heads = [...document.querySelectorAll("#table th")];
  const body = document.querySelector("#table tbody");
  const more = document.getElementById("more");
  const status = document.getElementById("shown");
  const text = (row, i) => (columns[i].number ? row[i][1] : row[i]);
  const words = (row) => columns.map((_, i) => text(row, i)).join(" ").toLowerCase();
  const listening = [];
  let order = { column: -1, down: false };
  let limit = PAGE;

  function compare(a, b) {
    const i = order.column;
    const sign = order.down ? -1 : 1;
    if (!columns[i].number) return sign * a[i].localeCompare(b[i], "en", { numeric: true });
    if (a[i][0] === null || b[i][0] === null) return (a[i][0] === null) - (b[i][0] === null); // no number: always last
    return sign * (a[i][0] - b[i][0]);
  }

  function selected() {
    const wanted = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const front = document.getElementById("front").checked;
    const picks = [...form.querySelectorAll("select")]
      .filter((select) => select.value)
      .map((select) => [columns.findIndex((column) => column.key === select.dataset.column), select.value]);
    const kept = rows.filter((row) =>
      (!front || row[FRONT]) && picks.every(([i, value]) => row[i] === value) && wanted.every((w) => words(row).includes(w)));
    return order.column < 0 ? kept : kept.sort(compare);
  }

  function show() {
    const kept = selected();
    body.replaceChildren(...kept.slice(0, limit).map((row) => {
      const line = document.createElement("tr");
      line.classList.toggle("front", row[FRONT]);
      line.classList.toggle("misses", VERDICT >= 0 && /^(over|too)/.test(row[VERDICT]));
      columns.forEach((column, i) => {
        const cell = line.insertCell();
        cell.textContent = text(row, i);
        if (column.number) cell.className = "number";
      });
      return line;
    }));
    heads.forEach((head, i) => {
      if (i === order.column) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const count = Math.min(limit, kept.length);
    status.textContent = `${count} of ${kept.length} matching rows shown, ${rows.length} in all. ● on the Pareto front.`;
    more.hidden = kept.length <= limit;
    listening.forEach((take) => take(kept));
  }

  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const first = columns[i].number && columns[i].key.startsWith("tokens"); // more tokens first, all else the least
    order = { column: i, down: order.column === i ? !order.down : first };
    show();
  }));
  const filter = () => { limit = PAGE; show(); };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => { order = { column: -1, down: false }; filter(); }));
  more.addEventListener("click", () => { limit += 4 * PAGE; show(); });
  document.getElementById("csv").addEventListener("click", () => {
    const quoted = (one) => (/[",\n]/.test(one) ? `"${one.replaceAll('"', '""')}"` : one);
    const line = (cells) => cells.map((one) => quoted(String(one ?? ""))).join(",");
    const lines = [columns.map((column) => column.key), ...selected().map((row) => columns.map((column, i) => (column.number ? row[i][0] : row[i])))];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([`${lines.map(line).join("\n")}\n`], { type: "text/csv" }));
    link.download = "candidates.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  addEventListener("beforeprint", () => { limit = Math.max(limit, 100); show(); });
  show();
  return { columns, rows, show, onkept: (take) => listening.push(take) };
})();
