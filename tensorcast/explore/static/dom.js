// Elements from plain values: text is always text, never markup.

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const $ = (id) => document.getElementById(id);

export function fill(where, ...children) {
  where.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
}

export const say = (text) => { $("spoken").textContent = text; };

// A word with its meaning from the glossary, shown on hover and focus.
export function term(word, meaning) {
  if (!meaning) return document.createTextNode(word);
  return el("abbr", { tabindex: "0", "data-tip": meaning }, word);
}

export function tooltips() {
  const tip = $("tip");
  const show = (event) => {
    const on = event.target.closest?.("[data-tip]");
    if (!on) return hide();
    tip.textContent = on.dataset.tip;
    tip.hidden = false;
    const at = on.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8));
    const above = at.bottom + tip.offsetHeight + 12 > innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${above ? at.top - tip.offsetHeight - 6 : at.bottom + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, show);
  for (const kind of ["mouseout", "focusout", "scroll"]) document.addEventListener(kind, hide);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
}

export async function copy(text, button) {
  const was = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    prompt("Copy this:", text);
  }
  setTimeout(() => { button.textContent = was; }, 1200);
}
