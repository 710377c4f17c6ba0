"""Flags of one launch: looked up in the engine's table, written as a shell command or into a config file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tensorcast.deploy.engine_limits import Case
from tensorcast.deploy.plan.switches import balances, names_file
from tensorcast.errors import InputError
from tensorcast.profiles.launch import LaunchTable
from tensorcast.profiles.memory import is_latent
from tensorcast.profiles.model import ModelProfile

HEAD, HERE, DRAFT = "HEAD_NODE_IP", "THIS_NODE_IP", "DRAFT_MODEL"
"""Placeholders for the address of the first node, of the node that runs the command, and for a trained drafter."""

Value = str | int | float | bool | list[int] | None


class Setting(NamedTuple):
    """A flag as the engine reads it; ``version`` and ``source`` say where its name was read."""

    flag: str
    value: str
    version: str
    source: str


@dataclass(frozen=True)
class Plan:
    """What is to be launched. Tokens and sequences per data-parallel rank; ``role`` is "" if both phases share GPUs."""

    table: LaunchTable
    case: Case
    model: ModelProfile
    batch: int
    input_len: int
    output_len: int
    chunk_tokens: int
    kv_dtype: str
    quant: str  # scheme to quantise to at load, "" if the checkpoint is as wanted
    memory_fraction: float
    role: str
    encoders: bool = False  # apart, before this server
    encoder_tp_mode: str = "weights"

    @property
    def expert_file(self) -> str:
        """The engine's file of where experts lie, where the placement is one; else empty."""
        placement = self.case.options.placement
        return placement if names_file(placement) else ""

    @property
    def balances(self) -> bool:
        """Whether the engine is to move experts by their load."""
        return balances(self.case.options)

    @property
    def remote_code(self) -> bool:
        """Whether the model's configuration is code of its own repository."""
        return self.model.config.get("model_type") in self.table.remote_code

    @property
    def path(self) -> str:
        """The model's Hugging Face id, or a path to be filled in."""
        return self.model.hf_id if "/" in self.model.hf_id else f"/path/to/{self.model.name}"

    @property
    def draft_model(self) -> str:
        """What drafts, as the engine finds it; a place to be filled in where it is not said, empty where none is."""
        options = self.case.options
        return "" if options.speculative_method in ("mtp", "ngram") else options.draft_model or DRAFT

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, drafts included."""
        return self.input_len + self.output_len + self.case.options.mtp_depth

    @property
    def decode_tokens(self) -> int:
        """Tokens of a decode step per rank, drafts included."""
        return self.batch * (1 + self.case.options.mtp_depth)

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step per rank: a chunk of a prompt, or every sequence's."""
        return self.decode_tokens if self.role == "decode" else max(self.chunk_tokens, self.decode_tokens)


@dataclass
class Settings:
    """Collects settings by our names for them; refuses names and values that the table does not know."""

    table: LaunchTable
    items: list[tuple[str, Setting, Value]] = field(default_factory=list)

    def add(self, name: str, value: Value = "") -> None:
        """Set ``name`` (a key of the table's flags); ``value`` in our words, translated where the table says so."""
        entry = self.table.flags[name]
        if entry.values:
            if value not in entry.values:
                known = ", ".join(entry.values)
                raise InputError(f"{self.table.name} {entry.flag}: no value for {value!r}; it knows {known}")
            value = entry.values[str(value)]
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        setting = Setting(entry.flag, shown, entry.version or self.table.version, self.table.sources[entry.source])
        self.items.append((entry.place, setting, value))

    def at(self, place: str) -> list[tuple[Setting, Value]]:
        return [(setting, value) for where, setting, value in self.items if where == place]

    def command(self, *words: str, launcher: tuple[str, ...] = ()) -> str:
        """The shell command, a flag a line: ``launcher`` with its flags, the program, ``words``, its flags."""
        lines = [f"{s.flag}={shlex.quote(s.value)}" for s, _ in self.at("environment")]
        if launcher:
            lines.append(launcher[0])
            lines += [_typed(s) for s, _ in self.at("launcher")]
            lines += launcher[1:]
        lines.append(shlex.join((*self.table.program, *words)))
        lines += [_typed(s) for s, _ in self.at("command")]
        first = len(self.at("environment"))
        return " \\\n".join(line if i <= first else f"  {line}" for i, line in enumerate(lines))

    def config(self) -> dict[str, Any]:
        """The config file's content, dotted keys nested."""
        content: dict[str, Any] = {}
        for setting, value in self.at("config"):
            *parents, last = setting.flag.split(".")
            inner = content
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = value
        return content


def add_attention(plan: Plan, found: Settings) -> None:
    """Whose attention kernels run, if they are asked for: those over latents may have a name of their own."""
    asked = plan.case.options.attention_kernels
    if asked == "engine":
        return
    if (entry := found.table.flags.get("attention_kernels")) is None:
        raise InputError(f"--attention-kernels {asked}: {found.table.name} is not asked for kernels of attention")
    own = f"latent_{asked}"
    found.add("attention_kernels", own if is_latent(plan.model.config) and own in entry.values else asked)


def _typed(setting: Setting) -> str:
    return f"{setting.flag} {shlex.quote(setting.value)}" if setting.value else setting.flag
