// Questions to the server: at most one of a kind under way, the newest next, those between dropped.

const browser = crypto.randomUUID ? crypto.randomUUID() : String(Math.random());

export async function post(kind, state, about = {}) {
  const reply = await fetch(`/api/${kind}`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ browser, state, about }),
  });
  const found = await reply.json().catch(() => ({ error: `the server said ${reply.status}`, field: "" }));
  return { ok: reply.ok, found };
}

export class Line {
  constructor(kind, take) {
    this.kind = kind;
    this.take = take;
    this.waiting = null;
    this.busy = false;
  }

  ask(state, about) {
    this.waiting = { state: { ...state }, about, since: performance.now() };
    if (!this.busy) this.run();
  }

  drop() {
    this.waiting = null;
  }

  async run() {
    this.busy = true;
    while (this.waiting) {
      const one = this.waiting;
      this.waiting = null;
      try {
        const { ok, found } = await post(this.kind, one.state, one.about);
        if (!found.superseded) this.take(one, ok, found, performance.now() - one.since);
      } catch {
        this.take(one, false, { error: "no server answers: is tensorcast explore still running?", field: "" }, 0);
      }
    }
    this.busy = false;
  }
}
