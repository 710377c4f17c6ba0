"""What is kept on disk of a model: a second run of the same model, phase and tp needs neither torch nor transformers.

The key covers the config, the stored format, and the source of the stages that make a table, so a changed tracer never
reads an old table. ``TENSORCAST_CACHE`` moves the folder; ``TENSORCAST_CACHE=off`` switches it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tensorcast.errors import InputError
from tensorcast.files import cache_dir, digest_of, write_atomically
from tensorcast.modeling.checkpoint.read import checkpoint
from tensorcast.modeling.module_rules import NO_RULES
from tensorcast.modeling.quantization import SCHEMES, Quantization, as_run, override
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace.cuts import Cut, cut_widths
from tensorcast.trace.fuse import fuse
from tensorcast.trace.moe import BlockForm, with_block_form, with_fused_shared
from tensorcast.trace.precision import apply_quantization, by_precision
from tensorcast.trace.stored import FORMAT, from_json, to_json
from tensorcast.trace.table import OpTable

Made = TypeVar("Made")

LARGEST = 512
"""Tables and facts that a process keeps; the oldest is dropped first."""

DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError)
"""What reading a file that holds something else, or half of it, raises."""


_PACKAGE = Path(__file__).parent.parent
_STAGES = (file for part in ("ops", "modeling", "trace") for file in sorted((_PACKAGE / part).rglob("*.py")))
_SOURCES = (*(_PACKAGE / "profiles" / name for name in ("facts.py", "model.py", "config_values.py")), *_STAGES)
"""The code that makes tables, and what says of a config what they store."""

for _package, _version in (("torch", "version.py"), ("transformers", "__init__.py")):  # the files with their versions
    _spec = importlib.util.find_spec(_package)  # does not import it
    _SOURCES += (Path(_spec.origin).parent / _version,) if _spec is not None and _spec.origin else ()


_known: dict[tuple[Hashable, ...], tuple[ModelProfile, Any]] = {}


def kept(
    profile: ModelProfile, what: tuple[Hashable, ...], make: Callable[[], Made], *,
    write: Callable[[Made], dict[str, Any]], read: Callable[[dict[str, Any]], Made],
) -> Made:  # fmt: skip
    """``what`` is asked of a model: known in this process, read from disk, or made now and written there.

    The first two of ``what`` are words for the file's name. ``write``, ``read``: what is made to JSON, and back.
    """
    folder = cache_dir()
    full = (id(profile), folder, *what)
    if full not in _known:
        if len(_known) >= LARGEST:
            _known.pop(next(iter(_known)))
        path = None if folder is None else folder / "traces" / _file_name(profile, what)
        stored = made = None
        if path is not None:
            with contextlib.suppress(*DAMAGED):  # made again
                stored = read(json.loads(path.read_bytes()))
        if stored is None:
            made = make()
            if path is not None:
                with contextlib.suppress(OSError):  # a read-only home costs time, not the answer
                    write_atomically(path, json.dumps(write(made), separators=(",", ":")))
        # the profile stays alive, so that its id stays its own
        _known[full] = profile, made if stored is None else stored
    found: Made = _known[full][1]
    return found


def _file_name(profile: ModelProfile, what: tuple[Hashable, ...]) -> str:
    own = Path((profile.model or "").rpartition(":")[0])  # of a class that the profile names, where it lies in a file
    code = own.read_text("utf-8") if own.suffix == ".py" and own.is_file() else ""
    said = [profile.name, profile.config, dict(profile.moe), profile.sharded, profile.model, code]
    said += [profile.kv_dtype, profile.quantization]
    key = json.dumps([FORMAT, digest_of(_SOURCES), *said, *what], sort_keys=True, default=asdict)
    return f"{profile.name}-{what[0]}-{what[1]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def traced(profile: ModelProfile, phase: str, tp: int = 1) -> OpTable:
    """The op table of ``profile`` at ``tp``, as it is traced."""

    def make() -> OpTable:
        whole = traced(profile, phase) if tp > 1 else None
        from tensorcast.trace.tracer import trace  # torch and transformers load only here

        return trace(profile, phase, tp, whole)  # type: ignore[arg-type]

    return kept(profile, (phase, f"tp{tp}"), make, write=to_json, read=lambda data: from_json(data)[0])


@dataclass(frozen=True)
class WholeModel:
    """A model before it is cut: its sizes, the precision of each stored weight, what a cut must leave whole."""

    facts: ModelFacts
    stored: Quantization
    cuts: tuple[Cut, ...]


def whole_model(profile: ModelProfile, phase: str, quant: str | None = None) -> WholeModel:
    """What tracing and the checkpoint's entry tell of a model. ``quant``: what is asked instead of what it ships in.

    Raises :class:`InputError` where nothing is known of how the model is stored, unless ``quant`` says it.
    """

    def make() -> WholeModel:
        stored = _stored(profile, quant)
        table = by_precision(traced(profile, phase), stored)
        weights = stored.of_weights((p.name, p.role, p.stored) for p in table.params)
        return WholeModel(table.facts, weights, cut_widths(table, stored, profile.config.get("architectures") or ()))

    return kept(profile, (phase, "whole", quant), make, write=asdict, read=_whole_from_json)


def _stored(profile: ModelProfile, quant: str | None) -> Quantization:
    try:
        found = checkpoint(profile)
    except InputError:
        if not quant:
            raise
        found = Quantization(kv=profile.kv_dtype)
    return override(found, quant)


def _whole_from_json(data: dict[str, Any]) -> WholeModel:
    roles = ("linear", "experts", "lm_head", "embedding")
    said = data["stored"] | {role: SCHEMES[data["stored"][role]["name"]] for role in roles}
    said |= {name: tuple(said[name]) for name in ("ignore", "asked", "unread")}
    quantization = Quantization(**{**said, "rules": NO_RULES})
    return WholeModel(ModelFacts.stored(data["facts"]), quantization, tuple(Cut(*cut) for cut in data["cuts"]))


@dataclass(frozen=True, kw_only=True)
class RankForm:
    """What makes the table of a rank from a traced one.

    ``quant``: what is asked instead of what the model ships in; ``arithmetic`` and ``architecture`` are the device's,
    ``fusions`` and projections that stay ``apart`` the engine's. ``block``: how MoE blocks run.
    """

    tp: int
    quant: str | None
    arithmetic: tuple[str, ...]
    architecture: str
    fusions: tuple[str, ...]
    apart: tuple[tuple[str, ...], ...]
    block: BlockForm


class RankTables(NamedTuple):
    """A rank's table as it holds weights and cache, and as it runs."""

    held: OpTable
    runs: OpTable


def rank_tables(profile: ModelProfile, phase: str, form: RankForm) -> RankTables:
    """The table of a rank: traced, layers of other precision apart, shared experts placed, quantised, fused."""

    def make() -> RankTables:
        running = as_run(_stored(profile, form.quant), form.arithmetic, form.architecture)
        table = by_precision(traced(profile, phase, form.tp), running)
        held = with_block_form(with_fused_shared(table, running) if form.block.fused else table, form.block)
        return RankTables(held, fuse(apply_quantization(held, running), form.fusions, form.apart))

    what = phase, f"rank{form.tp}", form
    return kept(profile, what, make, write=lambda made: to_json(*made), read=lambda data: RankTables(*from_json(data)))
