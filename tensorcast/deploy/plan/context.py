"""Decode context parallelism: a sequence's cached tokens dealt out to ranks, each with the attention over its part.

As vLLM 0.33.0 runs it (``v1/attention/ops/common.py``, ``cp_lse_ag_out_rs``; ``dcp_comm_backend`` unasked) and SGLang
0.5.23 by ``--dcp-comm-backend ag_rs``: queries of all ranks of a group are gathered, each rank attends with them over
its part of the cache, log-sum-exps are gathered to weigh the parts, and the weighted results are summed and scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorcast.cost.collectives import group_extent
from tensorcast.deploy.plan.plan import Collective, Plan, Row
from tensorcast.errors import InputError
from tensorcast.profiles.device import DeviceProfile
from tensorcast.trace.table import Op

SUMS = 4.0
"""Bytes of a log-sum-exp: fp32."""


def context_cut(plan: Plan, dcp: int, device: DeviceProfile) -> Plan:
    """The plan of a decode step in which ``dcp`` tensor-parallel ranks share each sequence's cache.

    Raises :class:`InputError` for attention that picks tokens or slides over them, whose parts are not even.
    """
    rows: list[Row] = []
    for row in plan.rows:
        if not isinstance(row, Op) or row.name not in ("attention", "sparse_indexer"):
            rows.append(row)
            continue
        if row.name == "sparse_indexer" or any(row.attrs[name] for name in ("selected", "window", "chunk")):
            raise InputError(f"--dcp {dcp}: {row.module} picks or slides over tokens; only whole contexts are cut")
        rows += _cut(row, dcp, device)
    return replace(plan, rows=tuple(rows))


def prompt_cut(plan: Plan, pcp: int, tp: int, device: DeviceProfile) -> Plan:
    """The plan of a prefill step in which ``pcp`` groups of ``tp`` ranks read each prompt together.

    As vLLM 0.33.0 runs it (``prefill_context_parallel_size``): a rank has the queries of its part, an early and a late
    one, and gathers the keys and values, or the latents, of all parts in every layer. Raises :class:`InputError` for
    attention that picks tokens or slides over them, and for states that pass from token to token.
    """
    rows: list[Row] = []
    for row in plan.rows:
        if isinstance(row, Op) and row.name in ("linear_attention", "causal_conv1d", "ssm_scan", "sparse_indexer"):
            raise InputError(f"--pcp {pcp}: {row.module} ({row.name}) cannot read a prompt in parts")
        if isinstance(row, Op) and row.name == "attention":
            if any(row.attrs[name] for name in ("selected", "window", "chunk")):
                raise InputError(f"--pcp {pcp}: {row.module} picks or slides over tokens; only whole contexts are cut")
            _, keys, values = row.inputs[:3]
            width = row.attrs["latent"] + row.attrs["rope"]
            width = width or sum(one.dims[1].coef * one.dims[-1].coef for one in (keys, values))
            rows.append(Collective(
                op="all_gather", module=row.module, kind=row.kind, group="pcp", ranks=pcp,
                extent=group_extent(pcp, tp, device), scale=2.0 * pcp * width, label="keys and values of a prompt",
            ))  # fmt: skip
        rows.append(row)
    return replace(plan, rows=tuple(rows))


def _cut(op: Op, dcp: int, device: DeviceProfile) -> Sequence[Row]:
    heads, width = op.inputs[0].dims[1].coef, op.inputs[0].dims[-1].coef
    value = op.inputs[2].dims[-1].coef
    if op.attrs["latent"]:  # absorbed: queries and results are as wide as latents
        width, value = op.attrs["latent"] + op.attrs["rope"], op.attrs["latent"]
    extent = group_extent(dcp, 1, device)

    def shared(name: str, scale: float, label: str) -> Collective:
        return Collective(
            op="all_gather" if name == "all_gather" else "reduce_scatter", module=op.module, kind=op.kind, group="dcp",
            ranks=dcp, extent=extent, scale=scale, label=label,
        )

    every = dcp * heads
    return (
        shared("all_gather", 2.0 * every * width, "queries"),
        op.but(attrs={**op.attrs, "context_ranks": dcp}),
        shared("all_gather", SUMS * dcp * every, "log-sum-exps"),
        shared("reduce_scatter", 2.0 * every * value, "parts of a context"),
    )
