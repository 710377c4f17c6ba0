"""How the running layer takes the place of each family's MoE blocks: a section of ``docs/families.md``."""

from __future__ import annotations

import torch

from tensorcast.modeling.build import causal_lm
from tensorcast.modeling.config import hf_config
from tensorcast.modeling.moe.apply import moe_blocks
from tensorcast.modeling.moe.rewrite import prove
from tensorcast.profiles.model import ModelProfile, MoEFields

NOT_REWRITTEN: dict[str, tuple[str, str]] = {
    "nllb_moe": ("an encoder and a decoder", "not built"),
    "openai_privacy_filter": ("a token classifier", "not built"),
    "switch_transformers": ("an encoder and a decoder", "not built"),
}
"""Family -> why the running layer does not take the place of its MoE blocks, and whether its model is built at all."""

NAMED = {
    "jetmoe": MoEFields(
        block="JetMoeMoE", experts=".", gate="router.layer", top_k="router.top_k", bias="bias", activation="activation",
        matrices=("input_linear.weight", "output_linear.weight"),
    ),
}
"""Families whose blocks are taken by the names of their parts, and are refused without them."""


def is_kept(profile: ModelProfile) -> bool:
    """Whether the blocks' own code runs around rewritten experts; else they are read by their fields."""
    with torch.device("meta"):
        stock = causal_lm(hf_config(profile), torch.float32)
    return any(prove(block, model=profile.name).kept for _, block in moe_blocks(stock))


def section(profiles: dict[str, ModelProfile]) -> list[str]:
    """What is proved equal, and what is refused."""
    how = {family: is_kept(profile) for family, profile in profiles.items() if family not in {*NOT_REWRITTEN, *NAMED}}
    kept = [family for family in how if how[family]]
    run = len(how) + len(NAMED)
    built = run + sum(kind == "refused" for _, kind in NOT_REWRITTEN.values())
    return [
        "## Running layers",
        "",
        f"Of the {built} families whose causal language model is built, {run} run on the package's MoE layer with",
        "the logits of transformers' own (`tests/test_moe_rewrite.py`: within 1e-6 in fp32). A block is read by its",
        f"fields, or its own code runs around rewritten experts ({len(kept)}): {', '.join(kept)}.",
        f"By names in `moe` alone, here of its MLP, whose attention is a mixture too: {', '.join(NAMED)}.",
        "",
        "At full size, on meta, every rank's block of every shipped MoE profile is built, tp8 x ep8 and dp32 x ep32:",
        "ranks hold all experts once, or more ranks than experts are refused (`tests/test_moe_full_size.py`, slow).",
        "",
        "| family | not rewritten because |",
        "| --- | --- |",
        *(f"| {family} | {why} |" for family, (why, _) in NOT_REWRITTEN.items()),
        "",
    ]
