"""Experts backends: equal to transformers' eager experts and each other, by phase and sub-config, and quantised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_blocks import MOE, block_of, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tensorcast.errors import InputError
from tensorcast.modeling.moe.backends import BACKENDS, Phase, choose_backend
from tensorcast.modeling.moe.experts import FusedMoEBase
from tensorcast.modeling.moe.groups import ParallelGroup
from tensorcast.modeling.moe.layer import MoELayer
from tensorcast.ops.quantized import FORMATS, dequantize_weight, parts_of
from tensorcast.trace.record import Recorder

TC = torch.ops.tensor_cast


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _counts(total: int, experts: int, seed: int = 0) -> Tensor:
    """Uneven, some experts without rows."""
    torch.manual_seed(seed)
    ids = torch.randint(0, max(1, experts // 2), (total,)) * 2 % experts
    return torch.bincount(ids, minlength=experts)


def _routed(block: nn.Module, x: Tensor, backend: str) -> Tensor:
    """A block's output with its own routing, its experts through a backend."""
    layer = MoELayer(block)
    indices, weights = layer.route(x)
    rows = TC.init_routing_v2(x, indices)
    if layer.weight_on_input:
        rows, weights = rows * TC.init_routing_v2(weights.view(-1, 1), indices.view(-1, 1)), torch.ones_like(weights)
    experts = FusedMoEBase(layer.wrapper.stacked(), range(len(layer.wrapper)), backend=backend)
    out = experts(rows, TC.expert_counts(indices, len(layer.wrapper)))
    out = (TC.unpermute_tokens(out, indices) * weights.unsqueeze(-1).to(out.dtype)).sum(1)
    shared = layer.shared(x)
    return out if shared is None else out + shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MOE)
def test_every_backend_equals_transformers_eager(family: str, dtype: torch.dtype) -> None:
    """Biases, interleaved and clamped gates, transposed weights, weights on the input: whatever the family has."""
    block = block_of(family, dtype)
    for tokens in (1, 23):  # with one token most experts have no rows
        x = torch.randn(1, tokens, 64).to(dtype)
        with torch.no_grad():
            expected = block(x)
            expected = (expected[0] if isinstance(expected, tuple) else expected).view(tokens, 64)
            found = {backend: _routed(block, x[0], backend) for backend in BACKENDS}
        limit = 1e-5 if dtype == torch.float32 else 0.05  # bf16 keeps 8 bits, and sums in another order
        errors = {backend: _error(out.float(), expected.float()) for backend, out in found.items()}
        assert max(errors.values()) < limit, errors


def _experts(kind: str, **config: Any) -> nn.Module:
    """Experts outside the small families: without a gate (NemotronH), with a norm after them (Muse Spark)."""
    if kind == "nemotron_h":
        from transformers.models.nemotron_h import modeling_nemotron_h as source

        module: Any = source.NemotronHExperts
        given: dict[str, Any] = {
            "n_routed_experts": 6,
            "hidden_size": 32,
            "moe_intermediate_size": 48,
            "moe_latent_size": None,
        }
        given |= {"mlp_hidden_act": "relu2"}
    else:
        from transformers.models.muse_spark import modeling_muse_spark as other

        module = other.MuseSparkExperts
        given = {"num_local_experts": 6, "moe_hidden_size": 32, "moe_intermediate_size": 48}
        given |= {"hidden_act": "silu", "post_norm_eps": 1e-6}
    settings: Any = type("Config", (), {**given, **config, "_experts_implementation": "eager"})()
    torch.manual_seed(1)
    return randomize(module(settings))


@pytest.mark.parametrize("kind", ["nemotron_h", "muse_spark"])
def test_experts_without_a_gate_and_with_a_norm(kind: str) -> None:
    experts, counts = _experts(kind), _counts(20, 6)
    rows, index = torch.randn(20, 32), torch.arange(6).repeat_interleave(counts)[:, None]
    with torch.no_grad():
        expected = experts(rows, index, torch.ones(20, 1))
        for backend in BACKENDS:
            found = FusedMoEBase(experts, range(6), backend=backend)(rows, counts)
            assert _error(found, expected) < 1e-5, backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block", "mxfp4"])
def test_no_rows_at_all(backend: str, scheme: str) -> None:
    experts = FusedMoEBase(block_of("gpt_oss").experts, range(8), backend=backend, scheme=scheme)
    rows = torch.empty(0, 64)
    with torch.no_grad():
        assert experts(rows, torch.zeros(8, dtype=torch.long)).shape == (0, 64)


@pytest.mark.parametrize("backend", ["batched_mm", "contiguous", "masked"])
def test_some_experts_cut_over_ranks(backend: str) -> None:
    """The ranks' partial sums add up; an expert that is held twice serves both its shares."""
    source, counts, rows = block_of("gpt_oss").experts, torch.tensor([3, 0, 5, 2]), torch.randn(10, 64)
    held = [1, 4, 4, 7]
    with torch.no_grad():
        expected = FusedMoEBase(source, held, backend="eager")(rows, counts)
        groups = [ParallelGroup("etp", 4, rank) for rank in range(4)]
        parts = [FusedMoEBase(source, held, group, backend=backend, capacity=9) for group in groups]
        assert _error(sum((part(rows, counts) for part in parts), torch.zeros(())), expected) < 1e-5


def test_rows_at_capacity_go_in_and_out_as_they_are() -> None:
    experts, counts, rows = FusedMoEBase(block_of("mixtral").experts, range(8)), _counts(20, 8), torch.randn(20, 64)
    with torch.no_grad():
        held = experts(TC.to_capacity(rows, counts, 20), counts)
        assert held.shape == (8, 20, 64) and _error(TC.from_capacity(held, counts, 20), experts(rows, counts)) < 1e-5


def test_one_call_may_run_another_backend() -> None:
    experts, counts, rows = FusedMoEBase(block_of("mixtral").experts, range(8)), _counts(20, 8), torch.randn(20, 64)
    recorder = Recorder(experts)
    with torch.no_grad(), recorder:
        default, masked = experts(rows, counts), experts(rows, counts, backend="masked", capacity=20)
    assert _error(masked, default) < 1e-5
    names = [call.name for call in recorder.calls if call.name.endswith("matmul")]
    assert names == ["grouped_matmul"] * 2 + ["masked_grouped_matmul"] * 2


def test_more_rows_than_capacity_are_an_error_not_a_loss() -> None:
    experts = FusedMoEBase(block_of("mixtral").experts, range(8), backend="masked", capacity=5)
    with pytest.raises(ValueError, match="expert 3 has 6 rows, more than its capacity of 5"):
        experts(torch.randn(6, 64), torch.tensor([0, 0, 0, 6, 0, 0, 0, 0]))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block", "nvfp4", "w4a16"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_traced_sizes_are_those_of_the_layout(backend: str, scheme: str) -> None:
    """On meta: rows that each matmul computes, as counted by hand for 40 rows of 8 experts at capacity 16."""
    experts = FusedMoEBase(
        block_of("mixtral").to("meta").experts, range(8), backend=backend, capacity=16, scheme=scheme
    )
    recorder = Recorder(experts)
    with torch.no_grad(), recorder:
        out = experts(torch.empty(40, 64, device="meta"), torch.empty(8, dtype=torch.long, device="meta"))
    assert out.shape == (40, 64) and out.is_meta
    rows = {"contiguous": ((40 + 8 * 127) // 128 * 128,), "masked": (8, 16)}.get(backend, (40,))
    found = [call.outputs[0].shape for call in recorder.calls if call.name.endswith("_matmul")]
    assert found == [(*rows, 192), (*rows, 64)]
    expected = 2 if FORMATS.get(scheme) and FORMATS[scheme].activation is not None else 0
    assert sum(call.name == "quantize_activation" for call in recorder.calls) == expected


def test_eager_cannot_be_traced_and_says_so() -> None:
    block = block_of("mixtral")
    with pytest.raises(InputError, match="'eager': its loop over the experts hit depends on data"):
        FusedMoEBase(block.to("meta").experts, range(8), backend="eager")(
            torch.empty(4, 64, device="meta"), torch.empty(8, dtype=torch.long, device="meta")
        )
    experts = FusedMoEBase(block_of("mixtral").experts, range(8), backend="eager")
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(InputError, match="cannot be traced"):
        experts(torch.empty(4, 64), torch.empty(8, dtype=torch.long))


@pytest.mark.parametrize(
    ("wanted", "phase", "part", "expected"),
    [
        ("auto", "prefill", "", "contiguous"),
        ("auto", "decode", "", "masked"),
        ("eager", "decode", "", "eager"),
        ("grouped_mm", "prefill", "", "grouped_mm"),
        ("grouped_mm", "decode", "", "batched_mm"),
        ({"decode": "grouped_mm"}, "decode", "", "grouped_mm"),  # named for decode: meant
        ({"decode": "eager"}, "prefill", "", "contiguous"),
        ({"": "batched_mm", "decode": "masked"}, "prefill", "", "batched_mm"),
        ({"": "batched_mm", "decode": "masked"}, "decode", "", "masked"),
        ({"": "eager", "text_config": "contiguous"}, "decode", "text_config", "contiguous"),
        ({"": "eager", "text_config": "contiguous"}, "decode", "audio_config", "eager"),
        ({"text_config": {"decode": "eager"}}, "decode", "text_config", "eager"),
        ({"text_config": {"decode": "eager", "": "masked"}}, "prefill", "text_config", "masked"),
        ("text_config=eager, decode=batched_mm", "decode", "text_config", "eager"),
        ("text_config=eager, decode=batched_mm", "decode", "", "batched_mm"),
    ],
)
def test_backend_by_phase_and_sub_config(wanted: Any, phase: Phase, part: str, expected: str) -> None:
    assert choose_backend(wanted, phase, part=part) == expected


def test_backend_of_a_cpu_and_of_an_engine() -> None:
    assert choose_backend("grouped_mm", "decode", device="cpu") == "grouped_mm"
    assert choose_backend("auto", "decode", auto={"prefill": "eager"}) == "auto"
    assert choose_backend("auto", "prefill", auto={"prefill": "eager"}) == "eager"


@pytest.mark.parametrize("wanted", ["grouped", {"decode": "grouped"}, {"text_config": {"": "grouped"}}, "a=grouped"])
def test_unknown_backends_are_named_with_the_choices(wanted: Any) -> None:
    line = "unknown experts backend 'grouped': choose one of auto, eager, batched_mm, grouped_mm, contiguous, masked"
    with pytest.raises(InputError, match=f"^{line}$"):
        choose_backend(wanted, "prefill")
    with pytest.raises(InputError, match="unknown experts backend 'auto': choose one of eager"):
        FusedMoEBase(block_of("mixtral").experts, range(8), backend="auto")


@pytest.mark.parametrize(
    ("wanted", "key"),
    [
        ("foo=masked", "foo"),
        ("prefil=eager,decode=masked", "prefil"),
        ({"text": "masked"}, "text"),
        ({"text_config": {"decoding": "masked"}}, "decoding"),
    ],
)
def test_backends_of_nothing_are_refused(wanted: Any, key: str) -> None:
    line = f"experts backend of '{key}': choose prefill, decode or a sub-config such as text_config"
    with pytest.raises(InputError, match=f"^{line}$"):
        choose_backend(wanted, "prefill")


def _rounding(part: Tensor, rounded: Tensor) -> float:
    """Root mean square of a quantised operand's error, relative to the operand."""
    return float((rounded - part).norm() / part.norm())


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_quantised_experts_are_as_near_as_their_format_allows(family: str, scheme: str) -> None:
    """Independent rounding errors of the four operands add in squares; nothing else may add to them.

    The gate multiplies two results of the first matmul, so its error enters the hidden rows up to sqrt(2) times.
    """
    torch.manual_seed(2)
    source, rows, counts = block_of(family).experts, torch.randn(400, 64), _counts(400, 8)
    plain, held = FusedMoEBase(source, range(8)), FusedMoEBase(source, range(8), scheme=scheme)
    with torch.no_grad():
        expected, found = plain(rows, counts), held(rows, counts)
        errors = []
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(plain, name).transpose(1, 2) if plain.is_transposed else getattr(plain, name)
            parts = [getattr(held, name + suffix) for suffix in ("", *(f"_{p}" for p in parts_of(scheme)[1:]))]
            errors.append(_rounding(weight, dequantize_weight(parts, scheme, torch.float32)))
        bias = plain.gate_up_proj_bias if plain.has_bias else None
        hidden = TC.grouped_matmul(rows, plain.gate_up_proj, counts, bias, plain.is_transposed)
        for x in (rows, source._apply_gate(hidden)):
            kept = FORMATS[scheme].activation is None
            parts = [] if kept else TC.quantize_activation(x, scheme)
            errors.append(0.0 if kept else _rounding(x, TC.dequantize_activation(parts, scheme, torch.float32)))
    up, down, first, second = errors
    allowed = (2 * (up**2 + first**2) + down**2 + second**2) ** 0.5
    assert 0.25 * allowed < _rounding(expected, found) < 1.1 * allowed


@pytest.mark.parametrize("scheme", FORMATS)
def test_quantised_backends_agree_and_slices_keep_their_weights(scheme: str) -> None:
    source, counts, rows = block_of("gpt_oss").experts, torch.tensor([7, 0, 2]), torch.randn(9, 64)
    whole = FusedMoEBase(source, range(8), scheme=scheme)
    with torch.no_grad():
        expected = FusedMoEBase(source, [2, 5, 6], backend="eager", scheme=scheme)(rows, counts)
        for backend in BACKENDS:
            found = FusedMoEBase(whole, [2, 5, 6], backend=backend)(rows, counts)
            # a hidden value on the edge of two steps may go either way
            assert float((found - expected).norm() / expected.norm()) < 0.01, backend
    with pytest.raises(InputError, match=f"experts quantised as {scheme}: cannot be cut over 2 ranks"):
        FusedMoEBase(whole, [0], ParallelGroup("etp", 2, 0))


@pytest.mark.parametrize("scheme", ["fp8", "fp8_block", "int8", "nvfp4"])
def test_rows_may_come_quantised_already(scheme: str) -> None:
    """As after a dispatch in FP8: the same result, and nothing is quantised twice."""
    experts, counts = FusedMoEBase(block_of("mixtral", torch.bfloat16).experts, range(8), scheme=scheme), _counts(20, 8)
    rows = torch.randn(20, 64, dtype=torch.bfloat16)
    parts = TC.quantize_activation(rows, scheme)
    with torch.no_grad():
        for backend in BACKENDS:
            found = experts(parts, counts, backend=backend)
            assert found.dtype == torch.bfloat16
            expected = experts(rows, counts, backend=backend)
            assert float((found - expected).norm() / expected.norm()) < 0.01, backend
        held = experts([TC.to_capacity(part, counts, 20) for part in parts], counts)
        assert torch.equal(TC.from_capacity(held, counts, 20), experts(rows, counts, backend="masked"))
        with pytest.raises(InputError, match="rows come quantised, but experts in bf16"):
            FusedMoEBase(block_of("mixtral").experts, range(8))(parts, counts)


def test_quantised_experts_hold_no_floats_beside() -> None:
    """Parameters of an mxfp4 expert: packed values and scales, 4.25 bits a weight (and gpt-oss' biases)."""
    held = FusedMoEBase(block_of("gpt_oss").experts, range(8), scheme="mxfp4")
    weights = {name: p for name, p in held.named_parameters() if "bias" not in name}
    assert {str(p.dtype) for p in weights.values()} == {"torch.uint8", "torch.float8_e8m0fnu"}
    elements = 8 * 3 * 64 * 96
    assert sum(p.numel() * p.element_size() for p in weights.values()) == elements * (4.25 / 8)
