"""How to start the best candidate: its launch commands under the engine it was priced for, and under the others."""

from __future__ import annotations

from dataclasses import dataclass

from tensorcast.deploy.engine_limits import engine_can_run
from tensorcast.errors import InputError
from tensorcast.launch.launch import WRITERS, launch, script
from tensorcast.report.compare.choices import Choice, View


@dataclass(frozen=True)
class Takeaway:
    """One engine's shell script for the best candidate, or why that engine cannot run it."""

    engine: str
    version: str
    script: str
    problem: str

    @property
    def file(self) -> str:
        return f"launch-{self.engine}.sh"


def takeaways(view: View) -> list[Takeaway]:
    """One per engine that has launch commands, the comparison's own first; none without a best candidate."""
    choice = next(iter(view.shown), None)
    if choice is None or view.best is None or choice.row["candidate"] != view.best["candidate"]:
        return []
    own = view.comparison.engine.name
    return [_of(view, choice, engine) for engine in sorted(WRITERS, key=lambda name: (name != own, name))]


def _of(view: View, choice: Choice, engine: str) -> Takeaway:
    pools: list[str | None] = [None]
    said: list[str] = []
    if choice.row["mode"] == "disaggregated":
        pools = ["prefill", "decode"]
        count = {role: int(choice.row["replicas"] * choice.row[f"{role}_workers"]) for role in pools}
        said = [f"{number} x {role} worker" for role, number in count.items()]
    own_engine = view.comparison.engine
    release = f"{engine}=={own_engine.version}" if engine == own_engine.name else engine
    if len(pools) == 1 and (problem := _mixed(choice, engine)):
        return Takeaway(engine, "", "", problem)
    parts = []
    for role in pools:
        deployment = choice.prefill if role == "prefill" else choice.decode
        # a pool reads prompts in steps as large as its engine's own, one engine for both phases in the candidate's
        own = view.comparison.engine.tokens_per_step(deployment.device)
        chunk = int(choice.row["chunk_tokens"]) if len(pools) == 1 else own
        try:
            found = launch(
                release, deployment.model, deployment.layout, deployment.options,
                batch=max(1, round(choice.row["batch"])), input_len=view.comparison.input_len,
                output_len=view.comparison.output_len, chunk_tokens=chunk, role=role,
                gpus_per_node=deployment.device.interconnect[0].size, device=deployment.device,
                prefill=choice.prefill.options if role is None else None,
            )  # fmt: skip
        except InputError as error:
            return Takeaway(engine, "", "", str(error))
        if found.problem:
            return Takeaway(engine, found.version, "", found.problem)
        parts.append(found)
    text = script(*parts, roles=[role or "" for role in pools], said=said)
    return Takeaway(engine, parts[-1].version, text + "\n", "")


def _mixed(choice: Choice, engine: str) -> str:
    """Why one server of ``engine`` cannot run the candidate's two phases together; empty if it can."""
    one, facts = choice.decode, choice.decode.model.stated_facts
    node = one.device.interconnect[0].size
    return engine_can_run(engine, one.layout, facts, one.options, node, prefill=choice.prefill.options)
