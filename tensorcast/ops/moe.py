"""Mixture-of-experts ops: gate, permute, layouts of the experts' rows, their matmuls, unpermute.

Symbols: T tokens, E experts, k chosen per token, R = T*k rows, H hidden, N and K a projection's output and input
width, C capacity of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tensorcast.ops.library import define


def _check_choice(logits: Tensor, k: int) -> None:
    torch._check_value(
        0 < k <= logits.shape[-1], lambda: f"k = {k} of {logits.shape[-1]} experts: must be from 1 to as many"
    )


def _gating(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check_choice(logits, k)
    weights, indices = torch.softmax(logits.float(), dim=-1).topk(k, dim=-1)
    return weights.to(logits.dtype), indices


def _gating_fake(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check_choice(logits, k)
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


define(
    "moe_gating_top_k_softmax(Tensor logits, SymInt k) -> (Tensor weights, Tensor indices)",
    real=_gating,
    fake=_gating_fake,
)


def _grouped_gating(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    groups: int = 1,
    chosen_groups: int = 1,
    sigmoid: bool = True,
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check_choice(logits, k)
    scores = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
    ranked = scores if bias is None else scores + bias
    if groups > 1:
        by_group = ranked.unflatten(-1, (groups, -1))
        # a group is worth its two best experts with a bias (DeepSeek-V3), its best one without (DeepSeek-V2)
        worth = by_group.topk(2 if bias is not None else 1, dim=-1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(chosen_groups, dim=-1).indices, True)
        ranked = by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    indices = ranked.topk(k, dim=-1).indices
    weights = scores.gather(-1, indices)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights * scale).to(logits.dtype), indices


# The router of DeepSeek-V3 and its kin (arXiv 2412.19437, section 2.1.2): the bias steers the choice, not the weight;
# experts come from the best groups only. logits [T,E], bias [E] -> weights and indices [T,k].
define(
    "moe_gating_grouped_top_k(Tensor logits, Tensor? bias, SymInt k, int groups=1, int chosen_groups=1, "
    "bool sigmoid=True, bool renormalize=True, float scale=1.0) -> (Tensor weights, Tensor indices)",
    real=_grouped_gating,
    fake=lambda logits, bias, k, *_, **__: _gating_fake(logits, k),
)


def _order(expert_indices: Tensor) -> Tensor:
    """Positions in the flattened ``[T*k]`` choices, ordered by expert id; stable, so tokens keep their order.

    Id -1 stands for an expert that is not on this rank, as in expert maps: its rows come last.
    """
    flat = expert_indices.reshape(-1)
    return torch.argsort(torch.where(flat < 0, torch.iinfo(flat.dtype).max, flat), stable=True)


def _check_ids(op: str, expert_indices: Tensor) -> None:
    whole = not (expert_indices.is_floating_point() or expert_indices.is_complex())
    torch._check_value(whole, lambda: f"{op}: expert ids are {expert_indices.dtype}: must be whole numbers")


def _check_tokens(x: Tensor, expert_indices: Tensor) -> None:
    _check_ids("init_routing_v2", expert_indices)
    same = x.dim() == expert_indices.dim() and all(
        a == b for a, b in zip(x.shape[:-1], expert_indices.shape[:-1], strict=True)
    )
    torch._check_value(
        same, lambda: f"init_routing_v2: rows {list(x.shape)} and indices {list(expert_indices.shape)}: "
        "all but their last dimension must be the same"
    )  # fmt: skip


def _init_routing(x: Tensor, expert_indices: Tensor) -> Tensor:
    _check_tokens(x, expert_indices)
    return x.reshape(-1, x.shape[-1])[_order(expert_indices) // expert_indices.shape[-1]]


def _init_routing_fake(x: Tensor, expert_indices: Tensor) -> Tensor:
    _check_tokens(x, expert_indices)
    return x.new_empty((expert_indices.numel(), x.shape[-1]))


define(
    # [..., H], [..., k] -> [T*k, H] for T tokens in all: ordered by expert id, rows of id -1 last
    "init_routing_v2(Tensor x, Tensor expert_indices) -> Tensor",
    real=_init_routing,
    fake=_init_routing_fake,
)


def _check_rows(x: Tensor, expert_indices: Tensor) -> None:
    _check_ids("unpermute_tokens", expert_indices)
    torch._check_value(
        x.dim() == 2 and x.shape[0] == expert_indices.numel(),
        lambda: f"unpermute_tokens: rows {list(x.shape)} for indices {list(expert_indices.shape)}: "
        f"must be [{expert_indices.numel()}, H], one row per choice",
    )


def _unpermute(x: Tensor, expert_indices: Tensor) -> Tensor:
    _check_rows(x, expert_indices)
    order = _order(expert_indices)
    out = torch.empty_like(x)
    out[order] = x
    out = out.view(*expert_indices.shape, x.shape[-1])
    absent = expert_indices < 0
    if absent.is_cuda or bool(absent.any()):  # a host that waited for the GPU would cost more than the fill
        out.masked_fill_(absent.unsqueeze(-1), 0.0)
    return out


def _unpermute_fake(x: Tensor, expert_indices: Tensor) -> Tensor:
    _check_rows(x, expert_indices)
    return x.new_empty((*expert_indices.shape, x.shape[-1]))


define(
    "unpermute_tokens(Tensor x, Tensor expert_indices) -> Tensor",  # [T*k,H], [..., k] -> [..., k,H]; zero for id -1
    real=_unpermute,
    fake=_unpermute_fake,
)


def _expert_counts(expert_indices: Tensor, num_experts: int) -> Tensor:
    _check_ids("expert_counts", expert_indices)
    flat = expert_indices.reshape(-1)
    if flat.is_cuda:  # no host waits: the device itself stops
        torch._assert_async(((flat >= -1) & (flat < num_experts)).all(), "expert_counts: an expert id out of range")
    elif flat.numel() and not -1 <= int(flat.min()) <= int(flat.max()) < num_experts:
        raise ValueError(
            f"expert_counts: ids from {int(flat.min())} to {int(flat.max())}: must be below {num_experts}, or -1"
        )
    return torch.bincount(flat + 1, minlength=num_experts + 1)[1:].clone()


def _expert_counts_fake(expert_indices: Tensor, num_experts: int) -> Tensor:
    _check_ids("expert_counts", expert_indices)
    return expert_indices.new_empty((num_experts,))


define(
    # [..., k] -> rows per expert [E]; id -1 is counted nowhere
    "expert_counts(Tensor expert_indices, SymInt num_experts) -> Tensor",
    real=_expert_counts,
    fake=_expert_counts_fake,
)


def row_experts(counts: Tensor, rows: int) -> Tensor:
    """Expert of each of ``rows`` rows ordered by expert, ``[rows]``; rows beyond the counts' sum go to the last one."""
    ends = counts.cumsum(0)
    found = torch.searchsorted(ends, torch.arange(rows, device=counts.device), right=True)
    return found.clamp(max=counts.shape[0] - 1)


def _places(counts: Tensor, rows: int, starts: Tensor) -> Tensor:
    """Where rows ordered by expert go if expert e's segment begins at ``starts[e]``; ``[rows]``, no host sync."""
    experts = row_experts(counts, rows)
    return torch.arange(rows, device=counts.device) - (counts.cumsum(0) - counts)[experts] + starts[experts]


def align_counts(counts: Tensor, block: int) -> Tensor:
    """Rows that each expert's segment takes in :func:`align_rows`' layout, ``[E]``."""
    return (counts + (block - 1)) // block * block


def aligned_rows(rows: int, experts: int, block: int) -> int:
    """Most rows that the aligned layout can need: every expert hit, each one row into its last block."""
    return torch.sym_min(rows * block, (rows + experts * (block - 1)) // block * block)


def _aligned_starts(counts: Tensor, block: int) -> Tensor:
    aligned = align_counts(counts, block)
    return aligned.cumsum(0) - aligned


def _align_rows(rows: Tensor, counts: Tensor, block: int = 128) -> Tensor:
    out = rows.new_zeros((aligned_rows(rows.shape[0], counts.shape[0], block), *rows.shape[1:]))
    out[_places(counts, rows.shape[0], _aligned_starts(counts, block))] = rows
    return out


define(
    # DeepGEMM's contiguous layout: rows [R,H] ordered by expert, each expert's segment filled up with zeros to a
    # multiple of block (align_counts); as many rows as any counts may need, so the shape depends on R and E only
    "align_rows(Tensor rows, Tensor counts, int block=128) -> Tensor",
    real=_align_rows,
    fake=lambda rows, counts, block=128: rows.new_empty(
        (aligned_rows(rows.shape[0], counts.shape[0], block), *rows.shape[1:])
    ),
)


def _unalign_rows(aligned: Tensor, counts: Tensor, total: int, block: int = 128) -> Tensor:
    return aligned[_places(counts, total, _aligned_starts(counts, block))]


define(
    "unalign_rows(Tensor aligned, Tensor counts, SymInt total, int block=128) -> Tensor",  # -> [total,H], as before
    real=_unalign_rows,
    fake=lambda aligned, counts, total, block=128: aligned.new_empty((total, *aligned.shape[1:])),
)


def check_capacity(op: str, counts: Tensor, capacity: int, wait: bool) -> None:
    """An expert's rows beyond its capacity would be lost: never silently. Without ``wait`` no host looks at counts on
    a GPU; the device itself stops."""
    if counts.is_cuda and not wait:
        torch._assert_async((counts <= capacity).all(), f"{op}: an expert has more rows than its capacity")
        return
    most = int(counts.max()) if counts.numel() else 0
    if most > capacity:
        raise ValueError(
            f"{op}: expert {int(counts.argmax())} has {most} rows, more than its capacity of {capacity}; "
            f"raise the capacity, or use a layout without one (contiguous, grouped_mm)"
        )


def capacity_places(counts: Tensor, rows: int, capacity: int) -> Tensor:
    """Where row i of ``rows`` ordered by expert lies when expert e's rows start at ``e * capacity``."""
    return _places(counts, rows, torch.arange(counts.shape[0], device=counts.device) * capacity)


def _to_capacity(rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
    # while a graph is captured no host may wait; the replay checks itself
    check_capacity("to_capacity", counts, capacity, not (counts.is_cuda and torch.cuda.is_current_stream_capturing()))
    return spread_to_capacity(rows, counts, capacity)


def spread_to_capacity(rows: Tensor, counts: Tensor, capacity: int) -> Tensor:
    """Rows ordered by expert -> ``[E,C,H]``, zeros after each expert's; no count may exceed the capacity."""
    out = rows.new_zeros((counts.shape[0] * capacity, *rows.shape[1:]))
    out[capacity_places(counts, rows.shape[0], capacity)] = rows
    return out.view(counts.shape[0], capacity, *rows.shape[1:])


define(
    # rows [R,H] ordered by expert -> [E,C,H], zeros beyond an expert's count; an error if a count exceeds the capacity
    "to_capacity(Tensor rows, Tensor counts, SymInt capacity) -> Tensor",
    real=_to_capacity,
    fake=lambda rows, counts, capacity: rows.new_empty((counts.shape[0], capacity, *rows.shape[1:])),
)

define(
    "from_capacity(Tensor x, Tensor counts, SymInt total) -> Tensor",  # [E,C,H] -> [total,H] ordered by expert
    real=lambda x, counts, total: x.flatten(0, 1)[capacity_places(counts, total, x.shape[1])],
    fake=lambda x, counts, total: x.new_empty((total, *x.shape[2:])),
)


def _check_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> None:
    """Of every form: rows as wide as the weights take them, a count (and a bias) for every expert."""
    outputs, inputs = (weight.shape[-1], weight.shape[-2]) if transposed else (weight.shape[-2], weight.shape[-1])
    fits = weight.dim() == 3 and x.shape[-1] == inputs and counts.dim() == 1 and counts.shape[0] == weight.shape[0]
    fits = fits and (x.dim() == 2 or x.shape[0] == weight.shape[0])
    if bias is not None:
        fits = fits and tuple(bias.shape) == (weight.shape[0], outputs)
    torch._check_value(
        fits, lambda: f"experts' matmul: rows {list(x.shape)}, weight {list(weight.shape)}, counts "
        f"{list(counts.shape)}{'' if bias is None else f', bias {list(bias.shape)}'}: must be [R,K] or [E,C,K], "
        f"{'[E,K,N]' if transposed else '[E,N,K]'}, [E]{'' if bias is None else ', [E,N]'}"
    )  # fmt: skip


def _stacked(weight: Tensor, transposed: bool) -> Tensor:
    return weight if transposed else weight.transpose(-2, -1)  # [E,K,N]


def finish_grouped(out: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """The bias ``[E,N]`` on rows ``[R,N]`` ordered by expert."""
    return out if bias is None else out + bias[row_experts(counts, out.shape[0])]


def finish_masked(out: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """The bias on ``[E,C,N]``, and zeros beyond each expert's count."""
    out = out if bias is None else out + bias.unsqueeze(1)
    empty = torch.arange(out.shape[1], device=out.device) >= counts.unsqueeze(1)
    return out.masked_fill_(empty.unsqueeze(2), 0.0)


def _grouped_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    _check_matmul(x, weight, counts, bias, transposed)
    stacked, offsets = _stacked(weight, transposed), counts.cumsum(0).to(torch.int32)
    short = [-n % (16 // x.element_size()) for n in stacked.shape[1:]]  # grouped_mm reads rows of whole 16 bytes
    if any(short):
        x, stacked = F.pad(x, (0, short[0])), F.pad(stacked, (0, short[1], 0, short[0]))
        out = F.grouped_mm(x, stacked, offs=offsets)[:, : stacked.shape[2] - short[1]]
    else:
        out = F.grouped_mm(x, stacked, offs=offsets)
    return finish_grouped(out.contiguous(), counts, bias)


def _rows_fake(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    _check_matmul(x, weight, counts, bias, transposed)
    return x.new_empty((*x.shape[:-1], weight.shape[-1] if transposed else weight.shape[-2]))


def _batched_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    _check_matmul(x, weight, counts, bias, transposed)
    experts = row_experts(counts, x.shape[0])
    out = torch.bmm(x.unsqueeze(1), _stacked(weight[experts], transposed)).squeeze(1)
    return out if bias is None else out + bias[experts]


def _masked_grouped_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Tensor:
    _check_matmul(x, weight, counts, bias, transposed)
    return finish_masked(torch.bmm(x, _stacked(weight, transposed)), counts, bias)


MATMULS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    # rows [R,K] ordered by expert, counts [E] sum to R (rows beyond them: undefined) -> [R,N], one grouped GEMM
    "grouped_matmul": (_grouped_matmul, _rows_fake),
    # the same function as one GEMM per row, on a copy of its expert's weights
    "batched_matmul": (_batched_matmul, _rows_fake),
    # [E,C,K] with counts [E] <= C -> [E,C,N], zero beyond an expert's count; computes the whole capacity
    "masked_grouped_matmul": (_masked_grouped_matmul, _rows_fake),
}
"""Real and fake kernel of each form of the experts' matmul. weight [E,N,K], or [E,K,N] when transposed; bias [E,N]."""

for _name, (_real, _fake) in MATMULS.items():
    define(
        f"{_name}(Tensor x, Tensor weight, Tensor counts, Tensor? bias=None, bool transposed=False) -> Tensor",
        real=_real,
        fake=_fake,
    )


def _grouped_outer(a: Tensor, b: Tensor, counts: Tensor) -> Tensor:
    ends = counts.tolist()
    parts = zip(a[: sum(ends)].split(ends), b[: sum(ends)].split(ends), strict=True)
    return torch.stack([x.t() @ y for x, y in parts])


define(
    # rows [R,N] and [R,K] ordered by expert -> the sum of their outer products for each expert [E,N,K]: a weight's
    # gradient
    "grouped_outer(Tensor a, Tensor b, Tensor counts) -> Tensor",
    real=_grouped_outer,
    fake=lambda a, b, counts: a.new_empty((counts.shape[0], a.shape[-1], b.shape[-1])),
)
