"""Every text model type of the installed transformers, and public configs, counted beside what their class holds.

``python tests/model_types.py --write docs/census.md`` writes the page. A type is written out as the config.json of its
class's defaults and read as any user's file is. What it is held to does not come from our code: the parameters of
transformers' own model on meta, the count that ``parameter_formula.py`` works out from the config by hand, and the
cache that ``cache_reading.py`` reads in it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import json
import multiprocessing
import re
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import new_types
import public_configs
import torch
import transformers
from cache_reading import cache_bytes_per_token
from census_page import RANKS, Verdict, page
from parameter_formula import parameters
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from tensorcast.cost.memory import kv_bytes_per_token
from tensorcast.deploy.plan.remarks import uncut
from tensorcast.errors import InputError
from tensorcast.files import digest_of, write_atomically
from tensorcast.modeling.checkpoint.read import checkpoint
from tensorcast.modeling.config import hf_config
from tensorcast.profiles.config_values import LANGUAGE_PARTS
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.network.like import described_like
from tensorcast.profiles.store import list_models, load_model, profile_roots
from tensorcast.trace.cache import _SOURCES, traced
from tensorcast.trace.table import OpTable, Param

logging.set_verbosity_error()

WITH_TEXT = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
SECONDS = 100
"""Of CPU time for one entry; after that it is refused, with "time" as its reason."""

class Entry(NamedTuple):
    """A model to count: its ``config.json``, with what lies beside it, and which set of the page it is of."""

    name: str
    config: dict[str, Any]
    kept_in: str = "types"


BY_CLASS = ("types", "filled")
"""Sets whose configs are a class's defaults: nothing else says what they hold."""

NO_DECODER = ("an encoder", "does not generate text")
DIVIDES = re.compile(r"choose a tp that divides")
COPIED = re.compile(r"(k_proj|v_proj|qkv|Wqkv|c_attn|query_key_value|in_proj|conv1d|key|value|kv)")
"""Weights of which a part is copied to ranks that are more than KV heads, or groups of states."""


class TimeIsUp(BaseException):
    """An entry took longer than ``SECONDS``; no handler of errors may take it for one."""


@functools.cache
def text_types() -> list[str]:
    """Types that transformers lists as causal language models, then those of models that see or hear and then write."""
    causal = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    others = [kind for task in WITH_TEXT for kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")]
    return list(dict.fromkeys(kind for kind in causal + others if kind in CONFIG_MAPPING))


def of_type(kind: str) -> Entry:
    """A type at its class's own sizes."""
    return Entry(kind, {"model_type": kind, **CONFIG_MAPPING[kind]().to_dict()})


def entries() -> Iterator[Entry]:
    """Every text type, the public configs that profiles hold, and those of ``public_configs.py``."""
    for kind in text_types():
        with contextlib.suppress(Exception):  # a class without defaults is no model
            yield of_type(kind)
    for kind in new_types.FILLED:
        yield filled(of_type(kind))
    for name in list_models():
        profile = load_model(name)
        yield Entry(profile.hf_id, profile.config, "profiles")
    for one in public_configs.load():
        beside = {"quantization_config": {"quant_method": "modelopt", **one.beside}} if one.beside else {}
        yield Entry(one.name, beside | one.config, "public")


def filled(entry: Entry) -> Entry:
    """A type with the sizes that its class's defaults leave open."""
    sizes, config = new_types.FILLED[entry.name], entry.config
    inner = {"text_config": config["text_config"] | sizes} if "text_config" in config else sizes
    return Entry(f"{entry.name} with {', '.join(sizes)}", config | inner, "filled")


class Class(NamedTuple):
    """What transformers' own class says of a config: its text part and its parameters, shared ones once."""

    text: PreTrainedConfig
    parameters: int


def theirs(config: PreTrainedConfig) -> int:
    """Parameters of the language model in transformers' own class on meta, shared ones once."""
    model = _on_meta(config)
    model = getattr(model, "thinker", model)  # of a model that also speaks
    text = config.get_text_config(decoder=True)
    whole = type(config) in AutoModelForCausalLM._model_mapping and config is text
    parts = (model,) if whole else (model.get_decoder(), model.get_output_embeddings())
    held = {id(p): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(held.values()) - _without_weights(model, text)


def _on_meta(config: PreTrainedConfig) -> Any:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if type(config) in AutoModelForCausalLM._model_mapping:
            return AutoModelForCausalLM.from_config(config)
        name = next(
            found for task in WITH_TEXT
            if (found := getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(config.model_type))
        )  # fmt: skip
        return getattr(transformers, name if isinstance(name, str) else name[0])._from_config(config)


def _without_weights(model: nn.Module, text: PreTrainedConfig) -> int:
    """Elements that transformers stacks for experts that hand their input back (LongCat): in no checkpoint."""
    zero = getattr(text, "zero_expert_num", None) or 0
    stacked = [p for name, p in model.named_parameters() if zero and name.endswith("experts.gate_up_proj")]
    return sum(p.numel() // p.shape[0] * zero for p in stacked)


def class_of(entry: Entry) -> Class | str:
    """What the class says, or why transformers builds no model of the entry (a package, defaults that do not fit)."""
    values = copy.deepcopy(entry.config)
    kind = values.pop("model_type")
    for name in ("architectures", "quantization_config"):
        values.pop(name, None)
    if "block_configs" in values:
        return "its layers are of forms that no class of transformers has"
    try:
        if kind not in CONFIG_MAPPING:  # a file whose code is its own
            config = hf_config(_profile(entry))
        elif "text_config" in CONFIG_MAPPING[kind].sub_configs and not set(LANGUAGE_PARTS) & set(values):  # flat
            config = AutoConfig.for_model(kind, text_config=values)
        else:
            config = AutoConfig.for_model(kind, **values)
        return Class(config.get_text_config(decoder=True), theirs(config))
    except Exception as failure:
        return " ".join(str(failure).split())[:100]


def judged(entry: Entry, seconds: float = SECONDS) -> list[Verdict]:
    """The entry at every size of tensor parallelism."""

    over = False

    def stop(*_: Any) -> None:
        if not over:
            raise TimeIsUp

    found: list[Verdict] = []
    before = signal.signal(signal.SIGPROF, stop)
    # again and again: what is raised in a finalizer or where garbage is collected, Python ignores
    signal.setitimer(signal.ITIMER_PROF, seconds, min(seconds, 0.05))
    try:
        for verdict in _judged(entry):
            found.append(verdict)
    except TimeIsUp:
        over = True
        rest = RANKS[len(found) :]
        found += [Verdict(entry.name, entry.kept_in, tp, "refused", f"time: over {seconds:g} s") for tp in rest]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return found


def same_shapes(found: Iterator[Entry]) -> list[list[Entry]]:
    """Entries by what they are without their quantisation, each group in its order."""
    groups: dict[str, list[Entry]] = {}
    for entry in found:
        shapes = {name: value for name, value in entry.config.items() if name != "quantization_config"}
        groups.setdefault(json.dumps(shapes, sort_keys=True, default=str), []).append(entry)
    return list(groups.values())


def judged_alike(group: list[Entry]) -> list[Verdict]:
    """Entries of one shape: the first is counted, and each one's own quantisation read."""
    first = judged(group[0])
    found = list(first)
    for entry in group[1:]:
        found += [v._replace(entry=entry.name, kept_in=entry.kept_in) for v in _with_precision(entry, first)]
    return found


def _with_precision(entry: Entry, verdicts: list[Verdict]) -> list[Verdict]:
    try:
        checkpoint(_profile(entry))
    except InputError as refusal:
        return [v if v.word == "none" else v._replace(word="refused", reason=str(refusal)) for v in verdicts]
    except Exception as failure:
        return [v._replace(word="wrong", reason=f"traceback: {failure!r}") for v in verdicts]
    return verdicts


def _profile(entry: Entry) -> ModelProfile:
    root = profile_roots()[-1]
    described = described_like(entry.config["model_type"], (root / "models").iterdir(), root)
    content = {"name": entry.name.replace("/", "--"), "hf_id": entry.name, "config": entry.config, **described}
    return ModelProfile.model_validate(content)


def _judged(entry: Entry) -> Iterator[Verdict]:
    """At tp = 1 the whole model; at others the first layers that show every kind there is."""
    verdict, table = _at(entry, 1)
    yield verdict
    parts = entry if table is None else shortened(entry, table)
    for tp in RANKS[1:]:
        found = _at(parts, tp)[0]
        if found.word != "right" and parts is not entry:
            found = _at(entry, tp)[0]
        unlike = found.word == "none" and table is not None and not DIVIDES.search(found.reason)
        yield found._replace(word="refused") if unlike and verdict.word == "right" else found


def _at(entry: Entry, tp: int) -> tuple[Verdict, OpTable | None]:
    """The verdict, and the table if there is one."""
    profile, blank = _profile(entry), Verdict(entry.name, entry.kept_in, tp, "wrong")
    try:
        table = traced(profile, "decode", tp)
        prompt = traced(profile, "prefill", tp) if tp == 1 else table
        checkpoint(profile)
    except InputError as refusal:
        reason = str(refusal)
        nothing = any(word in reason for word in NO_DECODER) or DIVIDES.search(reason)
        known = entry.config["model_type"] in CONFIG_MAPPING
        other = known and entry.config["model_type"] not in text_types()  # by transformers' own lists
        word = "none" if nothing or other or not runs(entry) else "refused"
        return blank._replace(word=word, reason=reason.partition(": ")[2]), None
    except Exception as failure:
        return blank._replace(reason=f"traceback: {failure!r}"), None
    said = class_of(entry)
    by_hand = parameters(entry.config) if entry.kept_in not in BY_CLASS else None
    right = by_hand if isinstance(said, str) else said.parameters
    if right is None:
        return blank._replace(word="none", reason=f"transformers does not build it: {said}"), table
    wrong = "" if prompt.total_params() == table.total_params() else f"{prompt.total_params():,} parameters in prefill"
    wrong = wrong or problem(table, right, None if isinstance(said, str) else cache_bytes_per_token(said.text, tp))
    if not wrong and by_hand is not None and by_hand != right:
        wrong = f"{right:,} parameters, {by_hand:,} by hand"
    left = uncut(table)
    found = blank._replace(
        word="wrong" if wrong else "whole" if left else "right", reason=wrong or left, params=table.total_params(),
        experts=table.facts.num_experts, cache=kv_bytes_per_token(table), formula=by_hand is not None,
    )
    return found, table


DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")


def shortened(entry: Entry, table: OpTable) -> Entry:
    """The entry with its first layers alone, as many as show every kind of the ``table``; whole, where that fails."""
    kinds = list(table.layer_kinds)
    depth = len(kinds)
    least = 1 + max((kinds.index(kind) for kind in kinds), default=0)

    def cut(values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            if isinstance(value, list | tuple) and len(value) == depth:
                value = value[:least]
            value = least if name in DEPTHS and value == depth else value
            found[name] = cut(value) if isinstance(value, dict) else value
        return found

    if least >= depth:
        return entry
    short = entry._replace(config=cut(entry.config))
    try:
        fits = list(traced(_profile(short), "decode", 1).layer_kinds) == kinds[:least]
        return short if fits and isinstance(class_of(short), Class) else entry
    except Exception:
        return entry


def runs(entry: Entry) -> bool:
    """Whether transformers' own class runs with the config, alone and on tokens alone; a public config always does."""
    if entry.kept_in not in BY_CLASS:
        return True
    config = copy.deepcopy(entry.config)
    kind = config.pop("model_type")
    config.pop("architectures", None)
    try:
        whole = AutoConfig.for_model(kind, **config)
        with torch.device("meta"), torch.no_grad():
            _on_meta(whole).eval()(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)
    except NotImplementedError:
        return True  # it asks what only data tells
    except Exception as failure:
        return "no data" in str(failure) or "meta" in str(failure)
    return True


def problem(table: OpTable, params: int, cache: float | None) -> str:
    """What a table counts otherwise than its class or its config."""
    if table.total_params() != params:
        return f"{table.total_params():,} parameters, {params:,} in the class"
    if table.tp > 1 and (
        odd := next(filter(None, (_odd(p, table.tp, table.facts.kv_heads) for p in table.params)), "")
    ):
        return odd
    writes, reads = (
        [op.kind for op in table.ops if op.name == name and op.attrs.get("kind") != "indexer"]
        for name in ("kv_cache_write", "attention")
    )
    if set(writes) - set(reads):
        return "keys and values are written that no attention reads"
    ours = kv_bytes_per_token(table)
    fits = cache is None or ours == cache or uncut(table)
    return "" if fits else f"{ours:,.0f} bytes of cache a token, {cache:,.0f} in the config"


def _odd(param: Param, tp: int, heads: int) -> str:
    """Why a rank's part of a weight is neither the whole of it nor its share, with what must be padded or copied."""
    if param.role == "experts" or param.numel in (param.full_numel, param.full_numel / tp):
        return ""
    if heads and heads < tp and param.numel * heads == param.full_numel:  # of one KV head
        return ""
    padded = 0 <= param.numel * tp - param.full_numel < tp * param.full_numel // max(param.shape[0] * (tp - 1), 1)
    if param.role in ("embedding", "lm_head") or padded or "embed" in param.name:
        return ""
    less = param.numel * tp < param.full_numel
    return "" if COPIED.search(param.name) and not less else f"{param.name}: {param.numel} of {param.full_numel} a rank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the page goes")
    parser.add_argument("--kept", type=Path, default=Path("out/census"), metavar="DIR", help="what a stop leaves here")
    arguments = parser.parse_args()
    folder: Path = arguments.kept
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    groups = same_shapes(entries())
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=40) as pool:
        counted = pool.imap(functools.partial(kept, folder, digest_of((*_SOURCES, *SOURCES))), groups)
        verdicts = [verdict for found in counted for verdict in found]
    arguments.write.write_text(page(verdicts), encoding="utf-8")


READ = ("cache_reading", "model_types", "new_types", "parameter_formula")
SOURCES = [Path(__file__).with_name(f"{name}.py") for name in READ]


def kept(folder: Path, code: str, group: list[Entry]) -> list[Verdict]:
    """Verdicts on a group, from a run before that was stopped, if the code is the same."""
    key = hashlib.sha256(json.dumps([code, group], sort_keys=True, default=str).encode()).hexdigest()
    file = folder / f"{key[:24]}.json"
    if file.exists():
        return [Verdict(*row) for row in json.loads(file.read_text("utf-8"))]
    found = judged_alike(group)
    write_atomically(file, json.dumps(found))
    return found


if __name__ == "__main__":
    main()
