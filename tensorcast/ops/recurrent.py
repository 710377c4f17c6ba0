"""Linear attention, state-space scans and short causal convolutions: one op each, as serving engines run them.

These are trace-only. A real run keeps the kernels that transformers ships or loads, which is why there is no second
implementation here; calling one of these ops on real tensors is an error from the dispatcher.
Symbols: B sequences, S tokens, H heads, D key width, Dv value width, N state width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorcast.ops.library import define


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    new_state = v.new_empty((v.shape[0], v.shape[2], k.shape[-1], v.shape[-1]), dtype=torch.float32)
    return v.new_empty(v.shape), new_state


# Gated delta rule and its kin. q, k [B,S,H,D], v [B,S,Hv,Dv] -> out [B,S,Hv,Dv], state [B,Hv,D,Dv] in fp32.
define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? state, int chunk) -> (Tensor, Tensor)",
    real=None,
    fake=_linear_attention,
)


def _ssm_scan(x: Tensor, b: Tensor, c: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    new_state = x.new_empty((x.shape[0], x.shape[2], x.shape[3], b.shape[-1]), dtype=torch.float32)
    return x.new_empty(x.shape), new_state


# Mamba-2. x [B,S,H,D], b, c [B,S,groups,N] -> out [B,S,H,D], state [B,H,D,N] in fp32.
define(
    "ssm_scan(Tensor x, Tensor b, Tensor c, Tensor? state, int chunk) -> (Tensor, Tensor)", real=None, fake=_ssm_scan
)

# Depthwise causal convolution over [B,C,S] with weight [C,width]; decode keeps the last inputs as state.
define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    real=None,
    fake=lambda x, weight, bias: x.new_empty(x.shape),
)
