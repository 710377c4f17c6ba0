"""What is said beside the numbers: limits of the model, options without effect, what fell away, what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tensorcast as tc
from tensorcast.cli import app
from tensorcast.deploy.layout import Layout
from tensorcast.deploy.options import Options, Place, idle_note, idle_options
from tensorcast.profiles.model import ModelProfile
from tensorcast.profiles.store import load_model
from tensorcast.report.compare.choices import View
from tensorcast.report.compare.words import conclusion
from tensorcast.search.axes import Axes
from tensorcast.search.compare import NoLayoutMeets
from tensorcast.search.notes import COUNTED
from tensorcast.search.space import variants
from tensorcast.trace.cache import traced

LOAD: dict[str, Any] = {"input_len": 1024, "output_len": 128}
QWEN: dict[str, Any] = {"model": "qwen3-30b-a3b", "device": "h100", "world_size": 4, **LOAD}


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1"})


def words_of(result: Any) -> str:
    return " ".join(result.output.split())


def test_a_checkpoint_that_keeps_more_than_was_asked_for_is_named() -> None:
    """hf_quant_config.json of nvidia/MiniMax-M2.5-NVFP4 leaves attention out; nobody publishes Mixtral so."""
    asked: dict[str, Any] = {"device": "b200", "world_size": 4, "tp": 4, "batch": 8, "context": 1024}
    for model, quant, named in (
        ("minimax-m2.5", "nvfp4", True), ("minimax-m2.5", "fp8", False), ("mixtral-8x7b", "nvfp4", False),
    ):  # fmt: skip
        notes = tc.simulate(model, quant=quant, **asked).notes
        assert any("nvidia/MiniMax-M2.5-NVFP4 is stored in nvfp4, attention in bf16" in n for n in notes) is named
        compared = tc.compare(model, device="b200", world_size=4, quant=quant, tpot_s=0.1, **LOAD).notes
        assert any("nvidia/MiniMax-M2.5-NVFP4" in n for n in compared) is named


@pytest.mark.parametrize(
    ("model", "asked", "idle"),
    [
        ("deepseek-v3", {"attention_kernels": "triton"}, True),  # attention over latents: no word of it is told
        ("qwen3-30b-a3b", {"attention_kernels": "triton"}, False),
        ("kimi-k2.5", {"experts_kernels": "trtllm"}, False),  # generated kernels of INT4, of another engine's table
        ("kimi-k2.5", {"experts_kernels": "cutlass"}, True),  # of INT4, which no table has
        ("qwen3-30b-a3b", {"experts_kernels": "cutlass"}, False),
        ("qwen3-30b-a3b", {}, False),
    ],
)
def test_kernels_that_are_asked_for_in_vain_are_said_to_be(model: str, asked: dict[str, Any], idle: bool) -> None:
    sizes: dict[str, Any] = {"device": "b200", "world_size": 8, "tp": 8, "batch": 8, "context": 1024, "engine": "vllm"}
    plain, said = tc.simulate(model, **sizes), tc.simulate(model, **sizes, **asked)
    assert any("no effect here: --" in note and "kernels" in note for note in said.notes) is idle
    assert bool(asked) is False or (plain.step_s == said.step_s) is idle


# How long a sequence may be


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}, "max_position_embeddings": 5}, 77),
        # Qwen3's README: factor 4.0 of 32768 original positions for 131072; the config says 40960
        (
            {"max_position_embeddings": 40960, "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072,
        ),
        # DeepSeek-V3's config states what YaRN extends it to
        (
            {"max_position_embeddings": 163840, "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}}, 163840,
        ),
        # and so does Llama 3.1's, with a rule of its own
        (
            {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 2}}, 8192),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, 4096),
    ],
)  # fmt: skip
def test_positions_as_engines_read_them(config: dict[str, Any], longest: int | None) -> None:
    model = ModelProfile(
        name="m", hf_id="m", description="d", sources={}, config={"model_type": "llama", **config}
    )
    assert model.max_positions == longest
    if longest is not None:
        assert not model.too_long(longest) and f"{longest} positions" in model.too_long(longest + 1)


def test_sequences_longer_than_the_model_are_refused() -> None:
    step: dict[str, Any] = {"device": "h100", "world_size": 4}
    assert tc.simulate("qwen3-30b-a3b", **step, context=40959).step_s > 0
    with pytest.raises(tc.InputError, match=r"^context 40960: 40961 tokens, but qwen3-30b-a3b has 40960 positions"):
        tc.simulate("qwen3-30b-a3b", **step, context=40960)
    with pytest.raises(tc.InputError, match=r"^input_len 40000 and context 961: 40961 tokens"):
        tc.simulate("qwen3-30b-a3b", **step, phase="prefill", input_len=40000, context=961)
    with pytest.raises(tc.InputError, match="context 50000: 50001 tokens"):
        tc.explain("qwen3-30b-a3b", **step, layout="tp4", versus="tp4-ep4", context=50000)
    with pytest.raises(tc.InputError, match="input_len 40000 and output_len 961: 40961 tokens"):
        tc.compare(**{**QWEN, "input_len": 40000, "output_len": 961})


# Options that change nothing


@pytest.mark.parametrize(
    ("model", "layout", "options", "flags"),
    [
        ("qwen3-30b-a3b", Layout(1), {"all2all": "low_latency", "dispatch": "bf16"}, ["--all2all", "--dispatch"]),
        ("qwen3-30b-a3b", Layout(1), {"placement": "eplb", "redundant_experts": 2},
         ["--placement", "--redundant-experts"]),
        ("qwen3-30b-a3b", Layout(2, 2), {"shared_expert_tp": False}, ["--no-shared-expert-tp"]),
        ("deepseek-v3", Layout(16, 16), {"shared_expert_tp": False}, []),
        ("qwen3-30b-a3b", Layout(2, 1, 2, 2), {"all2all": "low_latency", "dispatch": "bf16", "placement": "eplb"}, []),
        ("qwen3-30b-a3b", Layout(2, 1, 2, 2), {}, []),
    ],
)  # fmt: skip
def test_options_without_effect_change_no_time(
    model: str, layout: Layout, options: dict[str, Any], flags: list[str]
) -> None:
    """The note names exactly the options that, taken out one by one, leave the step as long as it was."""
    sizes: dict[str, Any] = {"world_size": layout.world_size, "tp": layout.tp, "dp": layout.dp, "ep": layout.ep}

    def step(**chosen: Any) -> Any:
        return tc.simulate(model, device="h200", **sizes, batch=16, context=512, **chosen)

    notes = [note for note in step(**options).notes if note.startswith("no effect here")]
    assert len(notes) == bool(flags)
    assert re.findall(r"--[a-z0-9-]+", notes[0] if notes else "") == flags
    if flags:
        without = {**options, **{flag.removeprefix("--").replace("-", "_"): None for flag in flags}}
        plain = {name: value for name, value in without.items() if value is not None and name != "shared_expert_tp"}
        assert step(**options).step_s == pytest.approx(step(**plain).step_s, rel=0.02)


def test_explain_and_compare_say_so_too() -> None:
    pair = ("explain", "qwen3-30b-a3b", "-d", "h100", "-n", "2", "-l", "tp2")
    assert "note: no effect here: --dispatch" in words_of(run(*pair, "-v", "tp2-ep2", "--dispatch", "bf16"))
    assert "no effect" not in words_of(run(*pair, "-v", "dp2-ep2", "--dispatch", "bf16"))
    asked = {"all2all": ["low_latency"], "mtp_acceptance": 0.5}
    one, several = (
        tc.compare(**{**QWEN, "device": "h200", "world_size": size, **asked}).notes for size in (1, 2)
    )
    assert any(note.startswith("no effect here: --all2all (no tokens travel to other GPUs), --mtp") for note in one)
    assert any(note.startswith("no effect here: --mtp-acceptance") for note in several)


def test_drafts_in_prefill_are_named() -> None:
    table = traced(load_model("deepseek-v3"), "prefill")
    idle = idle_options(Options(mtp_depth=1), Place(Layout(16, 16), table.facts, "none", "prefill"))
    assert idle_note(idle) == "no effect here: --mtp-depth (tokens are drafted in decode)"


@pytest.mark.parametrize(("model", "options", "said"), [
    ("llama-3.1-8b", {"state_dtype": "float32"}, "no effect here: --state-dtype (no layer keeps a state)"),
    ("qwen3-next-80b-a3b", {"state_dtype": "float32"}, ""),
    ("deepseek-v3", {"speculative_method": "eagle3"}, "no effect here: --speculative-method (--mtp-depth is 0)"),
    ("deepseek-v3", {"speculative_method": "eagle3", "mtp_depth": 1}, ""),
])  # fmt: skip
def test_states_and_drafts_that_there_are_not_are_named(model: str, options: dict[str, Any], said: str) -> None:
    run = tc.simulate(model, device="h200", world_size=8, tp=8, allow_oversize=True, **options)
    assert [note for note in run.notes if note.startswith("no effect")] == [said] * bool(said)


def test_every_config_with_draft_modules_is_spoken_of() -> None:
    """Modules are named in the language model's part of a multimodal config, too."""
    for name, said in (("deepseek-v3", True), ("step-3.7-flash", True), ("qwen3-30b-a3b", False)):
        run = tc.simulate(name, device="h200", world_size=16, ep=16, allow_oversize=True)
        assert run.deployment.raw.facts.mtp_modules == load_model(name).mtp_modules
        assert any(note.startswith("multi-token prediction is not simulated") for note in run.notes) == said, name


# What it takes


def test_a_model_too_big_says_how_many_gpus_it_needs() -> None:
    """671 GB of FP8 weights and 92 % of 85.5 GB: at least nine GPUs, sixteen among powers of two."""
    message = words_of(run("simulate", "deepseek-v3", "-d", "h100", "-n", "8"))
    assert "not even one sequence" in message and "it needs at least 16 h100-sxm" in message
    message = words_of(run("simulate", "llama-3.1-70b", "-d", "h100", "-n", "4", "--dp", "4"))
    assert "2 h100-sxm hold it in another layout" in message


def test_layouts_that_cannot_be_are_named_with_their_rule(tmp_path: Path) -> None:
    found = tc.compare(**{**QWEN, "world_size": 6}, layouts=["tp6", "tp2", "tp3-dp2-ep3"])
    left = [note for note in found.notes if note.startswith("left out")]
    assert left == [
        "left out: tp6-dp1 breaks rule 'heads per rank': 32 attention heads do not divide over tp = 6",
        "left out: tp3-dp2-ep3 breaks rule 'heads per rank': 32 attention heads do not divide over tp = 3",
    ]
    assert set(found.candidates["layout"]) == {"tp2-dp1"} and found.pruned["layouts"] == {"heads per rank": 2}
    path = tmp_path / "layouts.yaml"
    path.write_text("[tp2-dp2-ep2]")
    asked = ("compare", "qwen3-30b-a3b", "-d", "h100", "-n", "4", "--layouts", str(path))
    message = words_of(run(*asked))
    assert "tp2-dp2-ep2 cannot be run by vllm (whole experts or all cut); --any-engine" in message
    assert run(*asked, "--any-engine", "--top", "0").exit_code == 0


def test_nothing_to_compare_is_not_called_too_big() -> None:
    with pytest.raises(tc.InputError, match=r"no layout is left to compare on 1 h200-sxm: .*vllm: balanced experts 1"):
        tc.compare(**{**QWEN, "device": "h200", "world_size": 1, "placement": "eplb"})


def test_a_dense_quantised_model_has_no_dispatch_to_search() -> None:
    found = tc.compare("llama-3.1-8b", device="h100", world_size=2, quant="fp8", **LOAD)
    assert found.best is not None and set(found.candidates["dispatch"]) == {""}


# What fell away


def test_pruned_counts_say_what_they_count() -> None:
    found = tc.compare("deepseek-v3", device="h200", world_size=8, **LOAD, tpot_s=0.1)
    assert set(found.pruned) == set(COUNTED)
    assert "batch fits memory" in found.pruned["variants"] and set(found.pruned["candidates"]) <= {"prefill keeps pace"}
    assert all(number > 0 for by_rule in found.pruned.values() for number in by_rule.values())


def test_no_layout_meets_it_and_the_report_is_there_all_the_same(tmp_path: Path) -> None:
    asked = ("compare", "qwen3-30b-a3b", "-d", "h100", "-n", "2", "-i", "1024", "-o", "128", "--tpot", "1ms")
    result = run(*asked, "--out", str(tmp_path / "out"))
    assert result.exit_code == 3 and result.stdout == ""
    assert result.stderr.startswith("error: no layout meets TPOT <= 1 ms: the limit on TPOT binds; the closest, ")
    assert result.stderr.endswith(f"all candidates are in {tmp_path / 'out'}\n")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["best"] is None and summary["answer"] == "No layout meets the targets: TPOT binds"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "where 1.00 ms was asked" in page and not list((tmp_path / "out").glob("launch-*.sh"))
    with pytest.raises(NoLayoutMeets) as caught:
        tc.compare(**{**QWEN, "world_size": 2, "tpot_s": 0.001})
    row, binding = caught.value.comparison.closest
    assert binding == ["tpot"] and row["tpot_s"] == caught.value.comparison.candidates["tpot_s"].min()


def test_too_few_gpus_for_a_rate_are_said_in_the_report(tmp_path: Path) -> None:
    asked = ("compare", "qwen3-30b-a3b", "-d", "h100", "-n", "2", "-i", "1024", "-o", "128", "--objective", "gpus")
    assert run(*asked, "--request-rate", "9999", "--out", str(tmp_path)).exit_code == 3
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["answer"] == "No layout meets the targets: the number of GPUs binds"
    assert summary["explanation"][0].endswith("where there are 2.")


def test_without_limits_the_answer_leads_with_a_warning() -> None:
    free = tc.compare(**QWEN)
    said = conclusion(View(free))
    assert free.warning == said.warning == said.paragraphs[0]
    assert said.warning.startswith("No limit on TTFT or TPOT: the busiest batch wins")
    ends = re.search(r"--ttft \(from ([\d.]+) ms up\) and --tpot \(from ([\d.]+) ms up\)", said.warning)
    assert ends
    for column, end in zip(("ttft_s", "tpot_s"), ends.groups(), strict=True):
        assert float(end) / 1e3 == pytest.approx(free.candidates[column].min(), rel=0.01)
    half = tc.compare(**QWEN, tpot_s=0.05)
    assert half.warning.startswith("No limit on TTFT: ") and "--tpot" not in half.warning
    assert not tc.compare(**QWEN, ttft_s=2, tpot_s=0.05).warning
    assert not tc.compare(**QWEN, objective="latency").warning


# Results that travel back


def test_results_dtype_is_an_axis() -> None:
    found = tc.compare(**QWEN, tpot_s=0.05, combine=["bf16", "fp8_block"], all2all=["low_latency"])
    sent = found.candidates[found.candidates["all2all"] == "low_latency"]
    assert set(sent["combine"]) <= {"bf16", "fp8_block"} and (found.candidates["combine"] == "fp8_block").any()
    assert set(found.candidates.loc[found.candidates["all2all"] == "none", "combine"]) == {""}


def test_ten_bit_logarithms_travel_at_low_latency_alone() -> None:
    table = traced(load_model("qwen3-30b-a3b"), "decode")
    axes = Axes(exchange=("allgather_reducescatter", "deepep"), combine=("logfmt10", "bf16"), dispatch=(None,))
    made = variants(Layout(4, 1, 4, 4), table.facts, axes, Options(routing="uniform"))
    assert len(made) == len(set(made))
    for one in made:
        for options in (one.prefill, one.decode):
            assert options.combine != "logfmt10" or options.all2all == "low_latency"
    assert any(one.decode.combine == "logfmt10" and one.prefill.combine is None for one in made)
    with pytest.raises(tc.InputError, match="combine logfmt10: only the low_latency exchange"):
        Axes(exchange=("direct",), combine=("logfmt10",))


SENT: dict[str, Any] = {"tp": 4, "dp": 2, "ep": 8, "all2all": "low_latency"}


@pytest.mark.parametrize(
    ("engine", "asked", "said"),
    [
        ("sglang", {"tp": 8, "shared_experts_fusion": False}, ""),
        ("vllm", {"tp": 8, "shared_experts_fusion": False}, "--no-shared-experts-fusion (the engine runs shared"),
        ("sglang", {**SENT, "shared_experts_fusion": False}, "runs shared"),
        ("sglang", {**SENT, "shared_expert_tp": False}, "whole here"),
        ("sglang", {"tp": 8, "shared_expert_tp": False}, ""),  # whole ones are not among the routed ones
    ],
)
def test_choices_on_shared_experts_that_change_nothing_are_named(
    engine: str, asked: dict[str, Any], said: str
) -> None:
    found = tc.simulate("deepseek-v3", device="h200", world_size=8, engine=engine, batch=16, **asked).notes
    idle = [note for note in found if note.startswith("no effect here") and "shared" in note]
    assert bool(idle) == bool(said)
    assert all(said in note for note in idle)
