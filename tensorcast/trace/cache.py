"""What is kept of a model: traces that come with the package, and on disk what this machine made.

A shipped model's traces need neither torch nor transformers, nor does a second run of any other. The key on disk covers
the config, the stored format, and the source of the stages that make a table, so a changed tracer never reads an old
table. ``TENSORCAST_CACHE`` moves the folder; ``TENSORCAST_CACHE=off`` switches it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tensorcast.errors import InputError
from tensorcast.files import cache_dir, digest_of, write_atomically
from tensorcast.modeling.module_rules import NO_RULES
from tensorcast.modeling.quantization import SCHEMES, Quantization, as_run, override, runs_as, scales_latents
from tensorcast.profiles.beside_config import KEYS
from tensorcast.profiles.facts import ModelFacts
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import profile_roots
from tensorcast.profiles.vision.said import vision_of
from tensorcast.trace.cuts import Cut, cut_widths
from tensorcast.trace.fuse import fuse, matter
from tensorcast.trace.moe import BlockForm, with_block_form, with_fused_shared
from tensorcast.trace.precision import apply_quantization, by_precision, schemes_of, with_states
from tensorcast.trace.stored import FORMAT, Variants, from_json, to_json, unpacked
from tensorcast.trace.table import CACHING, OpTable

Made = TypeVar("Made")

LARGEST = 8192
"""Tables and facts that a process keeps; the oldest is dropped first."""

DAMAGED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError)
"""What reading a file that holds something else, or half of it, raises."""


_PACKAGE = Path(__file__).parent.parent
_STAGES = (file for part in ("ops", "modeling", "trace") for file in sorted((_PACKAGE / part).rglob("*.py")))
_SAID = ("facts.py", "model.py", "config_values.py", "network/sizes.py")
_SOURCES = (*(_PACKAGE / "profiles" / name for name in _SAID), *_STAGES)
"""The code that makes tables, and what says of a config what they store."""

for _package, _version in (("torch", "version.py"), ("transformers", "__init__.py")):  # the files with their versions
    _spec = importlib.util.find_spec(_package)  # does not import it
    _SOURCES += (Path(_spec.origin).parent / _version,) if _spec is not None and _spec.origin else ()


INSTALL = "pip install torch -i https://download.pytorch.org/whl/cpu && pip install transformers"
"""What gets a machine the libraries that trace, torch in its build without CUDA."""


class NoTracer(InputError):
    """A trace is needed, and the libraries that make it are not installed."""


_known: dict[tuple[Hashable, ...], Any] = {}
"""By what was asked. Also a rank's tables by what they were made of: those of many forms are the same."""
_unwritable: set[Path] = set()
_digests: dict[int, tuple[ModelProfile, tuple[str, str]]] = {}


def digests(profile: ModelProfile, phase: str = "") -> tuple[str, str]:
    """Of what a profile says to tracing, and of that with what it says of precisions: equal ones are traced once. Of
    its vision tower (``encode``) the same twice."""
    if phase == "encode":
        return (tower_digest(profile),) * 2
    if id(profile) not in _digests:
        # of a class that the profile names, where it lies in a file
        own = Path((profile.model or "").rpartition(":")[0])
        code = own.read_text("utf-8") if own.suffix == ".py" and own.is_file() else ""
        network = {name: value for name, value in profile.config.items() if name not in KEYS}
        said = [profile.name, network, dict(profile.moe), profile.sharded, profile.model, code]
        if profile.network is not None:
            said.append(profile.network.model_dump(mode="json", exclude_defaults=True))
        stored = [*said, profile.config, profile.kv_dtype, profile.quantization]
        texts = (json.dumps(part, sort_keys=True, default=asdict) for part in (said, stored))
        one, other = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
        while len(_digests) >= LARGEST:
            _digests.pop(next(iter(_digests)))
        _digests[id(profile)] = profile, (one, other)  # it stays alive, so that its id stays its own
    return _digests[id(profile)][1]


def tower_digest(profile: ModelProfile) -> str:
    """Of what a profile says of its vision tower. Raises :class:`InputError` where it has none."""
    said = vision_of(profile)
    text = json.dumps(
        [profile.name, said.model_type, said.vision_config, said.beside, said.hidden_size,
         profile.config.get("architectures")], sort_keys=True
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()


def kept(
    profile: ModelProfile, what: tuple[Hashable, ...], make: Callable[[], Made], *, said: str,
    write: Callable[[Made], dict[str, Any]], read: Callable[[dict[str, Any]], Made], folder: Path | None,
) -> Made:  # fmt: skip
    """``what`` is asked of a model: known in this process, read from disk, or made now and written there.

    The first two of ``what`` are words for the file's name. ``said``: a digest of what the profile says of it;
    ``write``, ``read``: what is made to JSON, and back. ``folder``: of the cache; None: nothing is read or written.
    """
    full = (said, folder, *what)
    if full not in _known:
        path = None if folder is None else _path(profile, what, said, folder)
        found = None if path is None else _read(path, read)
        if found is None:
            found = make()
            if path is not None:
                _write(path, write(found))
        _keep(full, found)
    known: Made = _known[full]
    return known


def _keep(key: tuple[Hashable, ...], found: Any) -> None:
    while len(_known) >= LARGEST:
        _known.pop(next(iter(_known)))
    _known[key] = found


def _path(profile: ModelProfile, what: tuple[Hashable, ...], said: str, folder: Path) -> Path:
    key = json.dumps([FORMAT, digest_of(_SOURCES), said, *what], sort_keys=True, default=vars)
    short = hashlib.sha256(key.encode()).hexdigest()[:16]
    return folder / "traces" / f"{profile.name}-{what[0]}-{what[1]}-{short}.json"


def _read(path: Path, read: Callable[[dict[str, Any]], Made]) -> Made | None:
    """What a file holds; None where there is none, or one that is damaged."""
    with contextlib.suppress(*DAMAGED):
        content, _, digest = path.read_bytes().rpartition(b"\n")
        if digest.decode() == hashlib.sha256(content).hexdigest():
            return read(json.loads(content))
    return None


def _write(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, separators=(",", ":"))
    try:
        write_atomically(path, f"{text}\n{hashlib.sha256(text.encode()).hexdigest()}")
    except OSError as error:  # a read-only home costs time, not the answer
        if path.parent not in _unwritable:
            why = error.strerror or error
            logging.getLogger("tensorcast").warning("note: nothing is kept in %s: %s", path.parent, why)
        _unwritable.add(path.parent)


def traced(profile: ModelProfile, phase: str, tp: int = 1) -> OpTable:
    """The op table of ``profile`` at ``tp``, as it is traced: shipped, kept, or traced now.

    Raises :class:`InputError` where the model cannot be traced so, :class:`NoTracer` where it would have to be.
    """
    tower = phase == "encode"
    said = digests(profile, phase)[0]
    folder = profile_roots()[-1] / "traces" / ("vision" if tower else "")
    shipped = unpacked(folder / f"{profile.name}.json.xz", said).get(f"{phase}-tp{tp}")

    def make() -> OpTable:
        if shipped is not None:
            data = json.loads(shipped)
            if "problem" in data:
                raise InputError(data["problem"])
            return from_json(data)[0]
        whole = traced(profile, phase) if tp > 1 else None
        try:
            from tensorcast.trace.tracer import trace  # torch and transformers load only here
            from tensorcast.trace.vision.tracer import trace_tower
        except ModuleNotFoundError as missing:
            problem = f"model {profile.name} at tp = {tp} has to be traced, and there is no {missing.name} to do it"
            raise NoTracer(f"{problem}: {INSTALL}") from None
        return trace_tower(profile, tp, whole) if tower else trace(profile, phase, tp, whole)  # type: ignore[arg-type]

    return kept(
        profile, (phase, f"tp{tp}"), make, said=said, write=to_json, read=lambda data: from_json(data)[0],
        folder=cache_dir() if shipped is None else None,
    )


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
        stored = _stored(profile, quant, phase)
        table = by_precision(traced(profile, phase), stored)
        weights = stored.of_weights((p.name, p.role, p.stored) for p in table.params)
        return WholeModel(table.facts, weights, cut_widths(table, stored, profile.config.get("architectures") or ()))

    return kept(
        profile, (phase, "whole", quant), make, said=digests(profile, phase)[1], write=asdict, read=_whole_from_json,
        folder=cache_dir(),
    )


def _stored(profile: ModelProfile, quant: str | None, phase: str) -> Quantization:
    if phase == "encode":  # towers stay as they are, whatever is done to the language model
        return Quantization()
    from tensorcast.modeling.checkpoint.read import checkpoint  # where nothing is kept

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
    ``fusions``, projections that stay ``apart`` and the precision of recurrent ``states`` (empty: as traced) the
    engine's. ``block``: how MoE blocks run.
    """

    tp: int
    quant: str | None
    arithmetic: tuple[str, ...]
    architecture: str
    fusions: tuple[str, ...]
    apart: tuple[tuple[str, ...], ...]
    states: str
    block: BlockForm


class RankTables(NamedTuple):
    """A rank's table as it holds weights and cache, with the rows alone that tell of these, and as it runs."""

    held: OpTable
    runs: OpTable


def rank_tables(profile: ModelProfile, phase: str, form: RankForm) -> RankTables:
    """The table of a rank: traced, layers of other precision apart, shared experts placed, quantised, fused. All of a
    model at one tensor-parallel size are in one file."""
    (traced_as, said), folder = digests(profile, phase), cache_dir()
    what = phase, f"rank{form.tp}"
    key = "variants", said, folder, *what
    if key not in _known:
        path = None if folder is None else _path(profile, what, said, folder)
        _keep(key, (path, (None if path is None else _read(path, Variants.from_json)) or Variants()))
    path, variants = _known[key]
    if (known := variants.asked.get(form)) is not None:
        return RankTables(*known)
    # devices and engines differ in more than what they do to a table
    names = runs_as(whole_model(profile, phase, form.quant).stored, form.arithmetic)
    scaled, some = scales_latents(form.architecture), matter(form.fusions, [names])
    asked = json.dumps([form.quant, names, scaled, some, form.apart, form.states, form.block], default=vars)
    if variants.find(asked) is None:
        bare, running = traced(profile, phase, form.tp), _running(profile, phase, form)
        schemes = schemes_of(bare, running)
        made = "rank", traced_as, phase, form.tp, schemes, some, form.apart, form.states, form.block
        if made not in _known:
            _keep(made, _rank(bare, running, form, some))
        variants.add(asked, _known[made])
        if path is not None:
            _write(path, variants.to_json())
    variants.asked[form] = known = variants.find(asked)
    return RankTables(*known)


def _running(profile: ModelProfile, phase: str, form: RankForm) -> Quantization:
    """What the device of a form makes of how the model is stored."""
    key = "running", phase == "encode", digests(profile)[1], form.quant, form.arithmetic, form.architecture
    if key not in _known:
        _keep(key, as_run(_stored(profile, form.quant, phase), form.arithmetic, form.architecture))
    found: Quantization = _known[key]
    return found


def _rank(traced: OpTable, running: Quantization, form: RankForm, fusions: tuple[str, ...]) -> RankTables:
    table = with_states(by_precision(traced, running), form.states)
    held = with_block_form(with_fused_shared(table, running) if form.block.fused else table, form.block)
    runs = fuse(apply_quantization(held, running), fusions, form.apart)
    return RankTables(replace(held, ops=tuple(op for op in held.ops if op.name in CACHING)), runs)
