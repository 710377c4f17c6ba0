"""Widths of a model that a layout cuts, and the blocks of its checkpoint's scales that a cut must leave whole."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from tensorcast.modeling.quantization import Quantization
from tensorcast.trace.moe import blocks_of, is_shared_param
from tensorcast.trace.table import OpTable, Param

ATTENTION_OUT = frozenset(("o_proj", "out_proj", "wo", "o_b_proj"))
MLP_OUT = frozenset(("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h", "output_linear"))
"""Last names of row-parallel projections, whose inputs are cut. What leads up to them has the same widths."""

FROM_LATENT = frozenset(("q_b_proj", "kv_b_proj"))
"""Column-parallel projections of latent attention, whose outputs are cut: heads of their own width."""

HALVED_DOWN_TO = 32
"""Smallest group that engines halve a GPTQ or AWQ expert's groups to where they are cut (vLLM 0.24.0,
quantization/moe_wna16.py, create_weights; SGLang 0.5.14, the file of the same name)."""

FEWER_RANKS = frozenset(
    ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV4ForCausalLM", "KimiK25ForConditionalGeneration",
     "Glm4MoeForCausalLM", "GlmMoeDsaForCausalLM")
)  # fmt: skip
"""Classes whose shared experts and dense MLPs TensorRT-LLM cuts over fewer ranks where all of them would split a block
(main at 000561d, _torch/models/modeling_deepseekv3.py and modeling_glm.py, _compute_shared_expert_tp_size)."""

HALVING = frozenset(("gptq", "gptq-marlin", "auto-gptq", "awq", "awq-marlin", "auto-awq", "auto-round"))
"""Methods whose experts fall back to those kernels (vLLM 0.24.0, quantization/auto_gptq.py and auto_awq.py)."""


class Cut(NamedTuple):
    """A width that ranks divide among them, in units of ``block`` elements that share a scale of ``scheme``.

    ``halves``: an engine may share out halves of these blocks. ``fewer``: it may cut over fewer ranks.
    """

    part: str
    size: int
    block: int
    scheme: str
    halves: bool = False
    fewer: bool = False


def _cut_of(param: Param, shared: bool, quantization: Quantization, *, width: int, fewer: bool) -> Cut | None:
    scheme = quantization.scheme(param.name, param.role, param.stored)
    rows, columns = scheme.block
    name = param.name.removesuffix(".weight").rpartition(".")[2]
    if param.role == "experts":
        halves = quantization.method in HALVING and "experts" not in quantization.asked
        return Cut("routed experts", width, math.lcm(rows, columns), scheme.name, halves)
    if param.role != "linear" or len(param.shape) != 2:
        return None
    if name in FROM_LATENT:
        return Cut("latent attention", param.shape[0], rows, scheme.name)
    if name in MLP_OUT:
        return Cut("shared expert" if shared else "dense MLP", param.shape[1], columns, scheme.name, fewer=fewer)
    return Cut("attention output", param.shape[1], columns, scheme.name) if name in ATTENTION_OUT else None


def cut_widths(table: OpTable, quantization: Quantization, classes: Iterable[str]) -> tuple[Cut, ...]:
    """The widths of a model of these ``classes`` whose parts must be whole blocks, each module in its own precision.

    ``table``: of the whole model, layers of other precision apart.
    """
    if not quantization.in_blocks:
        return ()
    blocks, width = blocks_of(table.ops), table.facts.moe_intermediate_size
    fewer = not FEWER_RANKS.isdisjoint(classes)
    found = (_cut_of(p, is_shared_param(p, blocks), quantization, width=width, fewer=fewer) for p in table.params)
    return tuple(dict.fromkeys(cut for cut in found if cut is not None and cut.block > 1))
