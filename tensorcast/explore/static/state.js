// The question and the view live in the address, so that a link shows the same.

export const VIEW = { sel: "", b: "", vs: "", vb: "", tab: "", y: "" };

export class State {
  constructor(fields) {
    this.fields = fields;
    this.defaults = Object.fromEntries(fields.map((f) => [f.key, f.default]));
    this.asked = { ...this.defaults };
    this.view = { ...VIEW };
  }

  read(text) {
    const found = new URLSearchParams(text);
    const ours = (keys, base) => Object.fromEntries(Object.keys(keys).map((k) => [k, found.has(k) ? found.get(k) : base[k]]));
    this.asked = ours(this.defaults, this.defaults);
    this.view = ours(VIEW, VIEW);
  }

  // What differs from the defaults, and always what names the deployment.
  text() {
    const always = ["model", "device", "world_size"];
    const parts = Object.entries(this.asked).filter(([k, v]) => always.includes(k) || v !== this.defaults[k]);
    const view = Object.entries(this.view).filter(([, v]) => v !== "");
    return new URLSearchParams([...parts, ...view]).toString();
  }

  write(push = false) {
    const address = `?${this.text()}`;
    if (address !== location.search) history[push ? "pushState" : "replaceState"](null, "", address);
  }
}
