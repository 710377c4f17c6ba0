"""Public ``config.json`` files, kept as shapes and counts in ``tests/data/public_configs.json.gz``.

``python tests/public_configs.py FOLDER_OR_FILE...`` writes the file anew from checkouts of the repositories that
``SOURCES`` names, in their order. Of a file stay numbers, truth values, and words that choose a form (types of layers,
of activations, of quantisation); tokens, code and descriptions do not.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

KEPT = Path(__file__).resolve().parent / "data" / "public_configs.json.gz"

SOURCES = (
    "ai-dynamo/aiconfigurator aic-core/src/aiconfigurator_core/model_configs 095f58a",
    "sgl-project/ome pkg/hfutil/modelconfig/testdata 17b77ed",
    "mlc-ai/mlc-llm python/mlc_llm/model/model_preset.py 79d603f",
)
"""Repository, place in it, commit."""

NOISE = re.compile(
    r"token|transformers_version|_name_or_path|auto_map|initializer|dropout|label|template|problem_type|"
    r"task_specific|use_cache|use_flash|context_window|prefill_chunk|pretraining_tp|producer|^_|description|loss|"
    r"pruned|return_dict|output_attentions|output_hidden|torchscript|bfloat|fp32|softmax_in|seq_length|^fp16$|^bf16$|"
    r"early_stopping|num_beams|temperature|^top_p$|^top_k$|penalty|length$|begin_sup|do_sample|forced|decoder_start|"
    r"ngram|remove_invalid|num_return|diversity|exponential|bad_words|finetuning|sep_|prefix$|processor"
)
ABOUT_TOKENS = frozenset({"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "audio_num_codebooks"})


class PublicConfig(NamedTuple):
    """A file: its release, where it was read (an index of ``SOURCES``), and ``hf_quant_config.json`` beside it."""

    name: str
    source: int
    config: dict[str, Any]
    beside: dict[str, Any]


def load() -> list[PublicConfig]:
    """All that are kept."""
    return [PublicConfig(*row) for row in json.loads(gzip.decompress(KEPT.read_bytes()))]


def shapes(values: dict[str, Any]) -> dict[str, Any]:
    """What of a config says shapes, counts, forms and precision."""
    found = {}
    for key, value in values.items():
        if key in ("quantization_config", "compression_config"):
            found[key] = value
        elif NOISE.search(key) and key not in ABOUT_TOKENS:
            continue
        elif isinstance(value, dict):
            found[key] = shapes(value)
        else:
            found[key] = value
    return found


def read(place: Path, source: int) -> list[PublicConfig]:
    """Configs of a folder of ``NAME_config.json`` or ``NAME.json``, or of a Python file with a dictionary of them."""
    if place.is_file():
        tree = ast.parse(place.read_text("utf-8"))
        values = next(node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value is not None)
        return [PublicConfig(name, source, shapes(config), {}) for name, config in ast.literal_eval(values).items()]
    found = []
    for file in sorted(place.glob("*.json")):
        if file.name.endswith("hf_quant_config.json"):
            continue
        config = json.loads(file.read_text("utf-8"))
        if "model_type" not in config:
            continue
        beside = file.with_name(file.name.replace("_config.json", "_hf_quant_config.json"))
        more = json.loads(beside.read_text("utf-8")) if beside != file and beside.exists() else {}
        name = str(config.get("_name_or_path") or "").strip("./")
        said = file.name.removesuffix(".json").removesuffix("_config").replace("--", "/")
        found.append(PublicConfig(said if "/" in said or name.count("/") != 1 else name, source, shapes(config), more))
    return found


def main() -> None:
    rows: dict[str, PublicConfig] = {}
    for source, place in enumerate(map(Path, sys.argv[1:])):
        for one in read(place, source):
            rows.setdefault(json.dumps([one.config, one.beside], sort_keys=True), one)
    text = json.dumps([*rows.values()], separators=(",", ":"))
    KEPT.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(rows)} configs, {KEPT.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
