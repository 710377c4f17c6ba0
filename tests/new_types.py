"""Which release of transformers listed a text model type first: ``tests/data/new_types.json``.

``python tests/new_types.py`` reads the lists in the wheels of the newest releases (network; nothing of them is run) and
writes the file. ``model_types.py`` counts the MoE types among them.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

KEPT = Path(__file__).resolve().parent / "data" / "new_types.json"
BACK = 19
"""Minor releases whose types are new: seven months of them."""

LISTS = tuple(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"))

FILLED: dict[str, dict[str, Any]] = {
    # heads of 256 as its rotary width asks for; 512 entries, one of the numbers of blocks that SGLang 0.5.23 runs
    # (srt/layers/attention/qsa/config.py)
    "qwen4_exp": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 2048,
                  "indexer_compress_ratio": 4},
    # as published of DeepSeek-OCR: a dense layer, then experts, six for a token
    "deepseek_ocr2": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", *["sparse"] * 31]},
    # 28 heads do not divide its width of 2,048
    "qwen3_omni_moe_thinker": {"head_dim": 128},
}  # fmt: skip
"""Sizes of types that their class's defaults leave open: what stands here is ours, what is counted is its class's."""


class Release(NamedTuple):
    """A release of transformers, the day of its wheel and the types that it lists first."""

    version: str
    date: str
    types: list[str]


def load() -> list[Release]:
    """All that are kept, newest first."""
    return [Release(*row) for row in json.loads(KEPT.read_text("utf-8"))]


def listed(source: str) -> set[str]:
    """Types in the lists of ``models/auto/modeling_auto.py``: language models, and those that see or hear and write."""
    found = set[str]()
    for node in ast.walk(ast.parse(source)):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Assign | ast.AnnAssign) and getattr(targets[0], "id", "") in LISTS and node.value:
            rows = [row for part in ast.walk(node.value) if isinstance(part, ast.List) for row in part.elts]
            found |= {str(ast.literal_eval(row.elts[0])) for row in rows if isinstance(row, ast.Tuple)}
    return found


def new_in(lists: list[set[str]]) -> list[list[str]]:
    """Of lists from the newest to the oldest, what each but the last has first. A model that is also listed by its
    text part alone is one."""
    found = []
    for i, one in enumerate(lists[:-1]):
        new = one.difference(*lists[i + 1 :])
        parts = {kind for kind in new if kind.endswith("_text")}
        found.append(sorted(new - {part for part in parts if any(kind.startswith(part[:-5]) for kind in new - parts)}))
    return found


def minor_releases() -> list[str]:
    """The first patch of each of the newest minor releases, newest first, one more than ``BACK``."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first: dict[str, str] = {}
    for version in re.findall(r"\d+\.\d+\.\d+", said.partition("Available versions:")[2].partition("\n")[0]):
        first[version.rpartition(".")[0]] = version
    return list(first.values())[: BACK + 1]


def main() -> None:
    releases, lists, dates = minor_releases(), [], []
    with tempfile.TemporaryDirectory() as folder:
        for version in releases:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"transformers=={version}"]
            subprocess.run(pip, check=True)
            with zipfile.ZipFile(next(Path(folder).glob(f"transformers-{version}-*.whl"))) as wheel:
                place = "transformers/models/auto/modeling_auto.py"
                lists.append(listed(wheel.read(place).decode()))
                dates.append("{:04}-{:02}-{:02}".format(*wheel.getinfo(place).date_time))
    rows = zip(releases, dates, new_in(lists), strict=False)
    KEPT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
