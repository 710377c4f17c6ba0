"""For which experts an engine ships tuned Triton tiles, from the names of its files."""

from __future__ import annotations

import re

from tensorcast.validate.engines.source import Source

DEVICES = {
    "NVIDIA_A100-SXM4-80GB": "a100-sxm", "NVIDIA_H100_80GB_HBM3": "h100-sxm", "NVIDIA_H200": "h200-sxm",
    "NVIDIA_B200": "b200-sxm", "NVIDIA_GB200": "gb200",
}  # fmt: skip
"""Devices as engines name them that kernels were measured on, and our profiles."""

_NAME = re.compile(
    r"E=(?P<experts>\d+),N=(?P<width>\d+),device_name=(?P<device>[^,]+?)"
    r"(?:,dtype=(?P<dtype>[^,]+))?(?P<block>,block_shape=\[128, ?128\])?\.json"
)


def tuned_tiles(source: Source, folder: str) -> dict[str, dict[str, dict[int, list[int]]]]:
    """Device profile -> dtype -> experts that a rank holds -> widths of an expert on it."""
    found: dict[str, dict[str, dict[int, list[int]]]] = {}
    for path in source.files(folder, ".json"):
        name = _NAME.fullmatch(path.rpartition("/")[2])
        if name is None or name["device"] not in DEVICES:
            continue
        kind = name["dtype"], bool(name["block"])
        dtype = {(None, False): "bf16", ("bf16", False): "bf16", ("fp8_w8a8", True): "fp8_block"}.get(kind)
        if dtype is not None:
            sizes = found.setdefault(DEVICES[name["device"]], {}).setdefault(dtype, {})
            widths = sizes.setdefault(int(name["experts"]), [])
            widths += [] if int(name["width"]) in widths else [int(name["width"])]
    return {
        device: {dtype: {one: sorted(sizes[one]) for one in sorted(sizes)} for dtype, sizes in kinds.items()}
        for device, kinds in found.items()
    }
