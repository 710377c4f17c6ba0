"""Every text model type of the installed transformers at its class's own sizes, counted beside what the class holds.

``python tests/model_types.py --write docs/census.md`` writes the page. A type is written out as the config.json of its
class's defaults and read as any user's file is. What it is held to does not come from our code: the parameters of
transformers' own model on meta, its own tensor-parallel plan, and the cache that ``cache_reading.py`` reads in the
config.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import multiprocessing
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from cache_reading import cache_bytes_per_token
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from tensorcast.cost.memory import kv_bytes_per_token
from tensorcast.deploy.deployment import uncut
from tensorcast.errors import InputError
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import list_models, load_model
from tensorcast.trace.cache import traced
from tensorcast.trace.table import OpTable, Param

logging.set_verbosity_error()

COMMAND = "python tests/model_types.py --write docs/census.md"
RANKS = (1, 2, 8)
WITH_TEXT = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


class Entry(NamedTuple):
    """A model to count: its ``config.json``."""

    name: str
    config: dict[str, Any]


class Verdict(NamedTuple):
    """Of one entry at one size of tensor parallelism: ``right``, ``refused`` or ``wrong`` with the reason, or ``none``.

    ``none``: there is no such model, or it writes no text of its own: no part of the share that is right.
    """

    entry: str
    tp: int
    word: str
    reason: str = ""
    params: int = 0
    cache: float = 0.0


NO_DECODER = ("an encoder", "does not generate text")
DIVIDES = re.compile(r"choose a tp that divides")
COPIED = re.compile(r"(k_proj|v_proj|qkv|Wqkv|c_attn|query_key_value|in_proj|conv1d|key|value|kv)")
"""Weights of which a part is copied to ranks that are more than KV heads, or groups of states."""


def text_types() -> list[str]:
    """Types that transformers lists as causal language models, then those of models that see or hear and then write."""
    causal = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    others = [kind for task in WITH_TEXT for kind in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")]
    return list(dict.fromkeys(kind for kind in causal + others if kind in CONFIG_MAPPING))


def of_type(kind: str) -> Entry:
    """A type at its class's own sizes."""
    return Entry(kind, {"model_type": kind, **CONFIG_MAPPING[kind]().to_dict()})


def entries() -> Iterator[Entry]:
    """Every text type, and the public configs that profiles hold."""
    for kind in text_types():
        with contextlib.suppress(Exception):  # a class without defaults is no model
            yield of_type(kind)
    for name in list_models():
        profile = load_model(name)
        yield Entry(profile.hf_id, profile.config)


def theirs(config: PreTrainedConfig) -> int:
    """Parameters of the language model in transformers' own class on meta, shared ones once."""
    listed = type(config) in AutoModelForCausalLM._model_mapping
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config) if listed else _multimodal(config)
    model = getattr(model, "thinker", model)  # of a model that also speaks
    whole = listed and config is config.get_text_config(decoder=True)
    parts = (model,) if whole else (model.get_decoder(), model.get_output_embeddings())
    held = {id(p): p.numel() for part in parts if part is not None for p in part.parameters()}
    return sum(held.values()) - _without_weights(model, config.get_text_config(decoder=True))


def _multimodal(config: PreTrainedConfig) -> Any:
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


def judged(entry: Entry) -> list[Verdict]:
    """The entry at every size of tensor parallelism."""
    values = copy.deepcopy(entry.config)
    kind = values.pop("model_type")
    values.pop("architectures", None)
    profile = ModelProfile(name=entry.name.replace("/", "--"), hf_id=entry.name, description="", sources={},
                           config=entry.config)  # fmt: skip
    found: list[Verdict] = []
    for tp in RANKS:
        try:
            table = traced(profile, "decode", tp)
        except InputError as refusal:
            found.append(_refused(entry, tp, str(refusal)))
            continue
        except Exception as failure:
            found.append(Verdict(entry.name, tp, "wrong", f"traceback: {failure!r}"))
            continue
        try:
            config = AutoConfig.for_model(kind, **copy.deepcopy(values))
            right = theirs(config)
        except Exception as failure:  # a part of a wrapper that needs another package, or defaults that do not fit
            found.append(Verdict(entry.name, tp, "none", f"transformers does not build it: {_line(failure)}"))
            continue
        counted, cache = table.total_params(), kv_bytes_per_token(table)
        wrong = problem(table, right, cache_bytes_per_token(config.get_text_config(decoder=True), tp))
        found.append(Verdict(entry.name, tp, "wrong" if wrong else "right", wrong or uncut(table), counted, cache))
    return found


def _line(failure: Exception) -> str:
    return " ".join(str(failure).split())[:100]


def _refused(entry: Entry, tp: int, reason: str) -> Verdict:
    nothing = any(word in reason for word in NO_DECODER) or DIVIDES.search(reason)
    return Verdict(entry.name, tp, "none" if nothing or not runs(entry) else "refused", reason.partition(": ")[2])


@functools.cache
def _runs(text: str) -> bool:
    config = json.loads(text)
    kind = config.pop("model_type")
    config.pop("architectures", None)
    try:
        whole = AutoConfig.for_model(kind, **config)
        with torch.device("meta"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            listed = type(whole) in AutoModelForCausalLM._model_mapping
            model = AutoModelForCausalLM.from_config(whole) if listed else _multimodal(whole)
            model.eval()(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=True)
    except NotImplementedError:
        return True  # it asks what only data tells
    except Exception as failure:
        return "no data" in str(failure) or "meta" in str(failure)
    return True


def runs(entry: Entry) -> bool:
    """Whether transformers' own class runs with the config, alone and on tokens alone."""
    return _runs(json.dumps(entry.config, default=str))


def problem(table: OpTable, params: int, cache: float) -> str:
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
    return "" if ours == cache or uncut(table) else f"{ours:,.0f} bytes of cache a token, {cache:,.0f} in the config"


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


def page(verdicts: list[Verdict]) -> str:
    """The text of ``docs/census.md``."""
    counted = [v for v in verdicts if v.word != "none"]
    lines = [
        "# Model types of transformers",
        "",
        f"Generated by `{COMMAND}`; do not edit. transformers {transformers.__version__}.",
        "",
        f"{len({v.entry for v in verdicts})} entries: every type that transformers lists as a language model, or as a",
        "model that sees or hears and then writes, at its class's own sizes, and the configs of the shipped profiles.",
        "Right: all parameters are those that transformers' own class holds on meta (tied ones once), every weight of",
        "a rank is the whole or its share, and a token adds to the cache what the config says, read by hand",
        "(`tests/cache_reading.py`). Not counted: encoders, sizes that do not divide by tp, and defaults with which",
        "transformers' own class does not run on tokens alone.",
        "",
        "| tp | right | refused with a reason | wrong | right of these | not counted |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for tp in RANKS:
        at = [v.word for v in counted if v.tp == tp]
        rest = sum(v.tp == tp for v in verdicts) - len(at)
        right = at.count("right")
        lines.append(
            f"| {tp} | {right} | {at.count('refused')} | {at.count('wrong')} | {100 * right / len(at):.1f} % | {rest} |"
        )
    for title, word in (("Wrong", "wrong"), ("Refused", "refused"), ("Not counted", "none")):
        lines += ["", f"## {title}", "", "| entry | tp | why |", "|---|---|---|", *_rows(verdicts, word)]
    whole = [v for v in verdicts if v.word == "right" and v.reason]
    lines += ["", "## Right, with weights whole on every rank", ""]
    lines += ["`simulate` says so in a note.", "", "| entry | tp | note |", "|---|---|---|", *_rows(whole, "right")]
    lines += ["", "## Right", "", "| entry | parameters | bytes of cache a token |", "|---|--:|--:|"]
    right_ones = (v for v in verdicts if v.word == "right" and v.tp == 1)
    lines += [f"| {v.entry} | {v.params:,} | {v.cache:,.0f} |" for v in right_ones]
    return "\n".join(lines) + "\n"


def _rows(verdicts: list[Verdict], word: str) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for v in verdicts:
        if v.word == word:
            found.setdefault((v.entry, v.reason.replace("|", "/")), []).append(str(v.tp))
    for (entry, reason), ranks in found.items():
        yield f"| {entry} | {', '.join(ranks)} | {reason[:160]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="where the page goes")
    file: Path = parser.parse_args().write
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=15) as pool:
        verdicts = [v for found in pool.imap(judged, list(entries())) for v in found]
    file.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
