"""Encoders of images on GPUs of their own, and servers of the language model that take their embeddings (EPD).

vLLM: an instance that produces an encoder cache alone runs the tower alone; producers over Mooncake are one GPU each
(0.33.0, ``ec_connector/mooncake/config.py``); 0.24.0 hands over by files in a shared folder only. SGLang: an encoder
registers with the server of the language model, for the classes that both releases list (0.5.23,
``arg_groups/pd_disaggregation_hook.py``; 0.5.14, ``srt/server_args.py``).
"""

from __future__ import annotations

import json

from tensorcast.errors import InputError
from tensorcast.launch.settings import HERE, Plan, Settings
from tensorcast.profiles.launch import LaunchTable
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.vision.said import vision_of

SHARED_FOLDER = "SHARED_FOLDER"
"""Placeholder for a folder that encoders and servers of the language model both see."""
SHARED_ALONE = ("0.24.0",)
"""Releases of vLLM whose encoders hand over by files alone (``ec_connector/factory.py``: no Mooncake)."""
LANGUAGE = "LANGUAGE_SERVER_IP"
"""Placeholder for the address of the server that an encoder works for."""
BOOTSTRAP_PORT = 8997
"""Where encoders register (``--encoder-bootstrap-port`` of sglang 0.5.23, ``fields/disagg.py``)."""

SGLANG_TYPES = frozenset("qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe kimi_vl kimi_k25".split())
SGLANG_TYPES_SINCE = {"0.5.23": frozenset("minimax_m3_vl glm5_next muse_spark kimi_k3".split())}
"""Types whose classes SGLang runs apart from their encoders, and those that a release added."""


def broken_encoders(table: LaunchTable, model: ModelProfile) -> str:
    """Why an engine's release cannot have a model's encoders apart; empty if it can. Raises :class:`InputError` for a
    model that takes no images."""
    kind = vision_of(model).model_type
    if "encoder_only" not in table.flags:
        return f"encoders apart: {table.name} {table.version} has no flag here"
    if table.name == "sglang" and kind not in SGLANG_TYPES | SGLANG_TYPES_SINCE.get(table.version, frozenset()):
        return f"encoders apart: {table.name} {table.version} does not list model_type {kind}"
    return ""


def check_tp_mode(table: LaunchTable, model: ModelProfile, tp_mode: str) -> str:
    """Why a server cannot share its tower so; empty if it can. Raises :class:`InputError` on an unknown way."""
    vision_of(model)
    if tp_mode not in ("weights", "data"):
        raise InputError(f"--encoder-tp-mode {tp_mode!r}: must be weights or data")
    if tp_mode == "data" and "encoder_tp_mode" not in table.flags:
        return f"whole towers: {table.name} {table.version} has no flag here for --encoder-tp-mode data"
    return ""


def add_encoding(plan: Plan, found: Settings) -> None:
    """What a server of the language model says of its tower, or of the encoders before it."""
    if plan.encoders:
        if plan.table.name == "sglang":
            found.add("language_only")
        else:
            found.add("embeddings", json.dumps(_handing_over(plan.table, "ec_consumer")))
    if plan.encoder_tp_mode == "data" and not plan.encoders:
        found.add("encoder_tp_mode", *(["data"] if plan.table.flags["encoder_tp_mode"].values else []))


def encoder_settings(plan: Plan, port: int) -> Settings:
    """Flags of one encoder, one GPU with the whole tower."""
    found = Settings(plan.table)
    if plan.table.name == "sglang":
        found.add("model", plan.path)
    found.add("host", "0.0.0.0")
    found.add("port", port)
    found.add("tensor_parallel", 1)
    found.add("encoder_only")
    found.add("context_length", plan.context)
    found.add("max_batch", plan.batch)
    if plan.table.name == "sglang":
        found.add("registers", f"http://{LANGUAGE}:{BOOTSTRAP_PORT}")
        return found
    found.add("chunk_tokens", plan.step_tokens)
    found.add("embeddings", json.dumps(_handing_over(plan.table, "ec_producer")))
    return found


def _handing_over(table: LaunchTable, role: str) -> dict[str, object]:
    """vLLM's connector of encoder caches, and what it needs to know."""
    if table.version not in SHARED_ALONE:
        return {"ec_connector": "ECMooncakeConnector", "ec_role": role, "ec_ip": HERE}
    extra = {"shared_storage_path": SHARED_FOLDER}
    return {"ec_connector": "ECExampleConnector", "ec_role": role, "ec_connector_extra_config": extra}


def notes(plan: Plan, *, encoder: bool) -> list[str]:
    """What the flags cannot say."""
    if not (encoder or plan.encoders):
        return []
    if plan.table.name == "sglang":
        return [f"{LANGUAGE}: the address of the server of the language model, which is started first"] * encoder
    said = ["a proxy in front sends a request's images to an encoder, then the request to the language model's server"]
    if plan.table.version in SHARED_ALONE:
        said.append(f"{SHARED_FOLDER}: a folder that encoders and the language model's servers share")
    return said
