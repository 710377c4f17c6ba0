"""What is kept on disk of a model: tables as made anew, nothing made twice, damage repaired, off where asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import SMALL

from tensorcast.errors import InputError
from tensorcast.profiles.model import ModelProfile
from tensorcast.trace import cache, tracer
from tensorcast.trace.cache import RankForm, RankTables, WholeModel, rank_tables, traced, whole_model
from tensorcast.trace.moe import BlockForm, Whole
from tensorcast.trace.table import OpTable

FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["model.layers.2"]}
FORM = RankForm(
    tp=2, quant=None, arithmetic=("bf16", "fp8"), architecture="Hopper", fusions=("merged_gemm", "pointwise"),
    apart=(), states="", block=BlockForm(Whole(0.5)),
)  # fmt: skip


def _profile(**entry: Any) -> ModelProfile:
    config = {**SMALL["deepseek_v3"], "architectures": ["DeepseekV3ForCausalLM"], **entry}
    return ModelProfile(name="small", hf_id="small", description="d", sources={}, config=config)


def _all(profile: ModelProfile) -> tuple[WholeModel, RankTables]:
    return whole_model(profile, "decode"), rank_tables(profile, "decode", FORM)


def _refuses(*_: Any, **__: Any) -> Any:
    raise AssertionError("made a second time")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    return tmp_path / "traces"


def test_a_second_process_makes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config is read, traced, quantised and fused once; what is read back is what was made."""
    made = _all(_profile(quantization_config={**FP8, "weight_block_size": [128, 128]}))
    assert {path.name.rsplit("-", 1)[0] for path in folder.iterdir()} == {
        "small-decode-tp1", "small-decode-tp2", "small-decode-whole", "small-decode-rank2",
    }  # fmt: skip
    monkeypatch.setattr(cache, "_known", {})
    monkeypatch.setattr("tensorcast.modeling.checkpoint.read.checkpoint", _refuses)
    for step in ("by_precision", "apply_quantization", "fuse", "with_block_form", "cut_widths"):
        monkeypatch.setattr(cache, step, _refuses)
    monkeypatch.setattr(tracer, "trace", _refuses)
    assert _all(_profile(quantization_config={**FP8, "weight_block_size": [128, 128]})) == made
    whole, _ = made
    assert whole.stored.scheme("model.layers.1.self_attn.o_proj.weight", "linear").name == "fp8_block"
    assert whole.stored.scheme("model.layers.2.self_attn.o_proj.weight", "linear").name == "bf16"


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2], lambda text: "[]", lambda text: "{}", lambda text: "\x00",
    lambda text: json.dumps({**json.loads(text.splitlines()[0]), "tensors": [], "facts": 1, "stored": None}),
    lambda text: text.replace("1", "2", 1),  # still JSON, and other numbers
])  # fmt: skip
def test_a_damaged_file_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[str], str]
) -> None:
    profile = _profile()
    made = _all(profile)
    kept = {path: path.read_text() for path in folder.iterdir()}
    for path, text in kept.items():
        path.write_text(damage(text))
    monkeypatch.setattr(cache, "_known", {})
    assert _all(profile) == made
    assert {path: path.read_text() for path in folder.iterdir()} == kept, "and written anew, with nothing beside"


def test_what_is_asked_is_part_of_the_key(folder: Path) -> None:
    profile = _profile()
    forms = [FORM, *(RankForm(**{**vars(FORM), **change}) for change in (
        {"quant": "fp8"}, {"architecture": "Ampere"}, {"arithmetic": ("bf16",)}, {"fusions": ()},
        {"block": BlockForm()},
    ))]  # fmt: skip
    for form in forms:
        rank_tables(profile, "decode", form)
    (path,) = folder.glob("small-decode-rank2-*")
    assert len(json.loads(path.read_text().splitlines()[0])["forms"]) == len(forms) - 1, "fp8 is no matter to bf16"
    assert whole_model(profile, "decode").stored.linear.name == "bf16"
    assert whole_model(profile, "decode", "fp8").stored.linear.name == "fp8"


def test_forms_that_make_the_same_table_share_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What devices and engines say beside what a table takes of it makes no second one; what is shared is as made."""
    profile = _profile(quantization_config={**FP8, "weight_block_size": [128, 128]})
    every = [
        RankForm(**{**vars(FORM), "arithmetic": arithmetic, "architecture": architecture, "fusions": fusions})
        for arithmetic in (("bf16",), ("bf16", "fp8"), ("bf16", "fp8", "fp4"))
        for architecture in ("Hopper", "Ampere")
        for fusions in ((), ("pointwise",), ("pointwise", "norm_quant:fp8_block"), ("pointwise", "norm_quant:nvfp4"))
    ]
    shared = [rank_tables(profile, "decode", form) for form in every]
    (path,) = folder.glob("small-decode-rank2-*")
    kept = json.loads(path.read_text().splitlines()[0])
    assert len(kept["each"]) == len({id(tables.runs) for tables in shared})
    rows = [op for tables in {id(one.runs): one for one in shared}.values() for table in tables for op in table.ops]
    assert len(kept["heads"][0]["ops"][0]) == len({*map(id, rows)}) < len(rows) / 2, "each row once"
    monkeypatch.setenv("TENSORCAST_CACHE", "off")
    for form, table in zip(every, shared, strict=True):
        traces = {key: known for key, known in cache._known.items() if isinstance(known, OpTable)}
        monkeypatch.setattr(cache, "_known", traces)
        assert rank_tables(profile, "decode", form) == table
    assert len({repr(one) for one in shared}) == len({id(one.runs) for one in shared}) < len(every)


def test_off_keeps_nothing_and_traces_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORCAST_CACHE", "off")
    monkeypatch.setenv("HOME", str(tmp_path))
    calls, trace = [], tracer.trace

    def counted(profile: ModelProfile, phase: Any, tp: int = 1, *rest: Any) -> Any:
        calls.append(tp)
        return trace(profile, phase, tp, *rest)

    monkeypatch.setattr(tracer, "trace", counted)
    for _ in range(2):
        profile = _profile()  # read anew, as commands do: it is the same model all the same
        _all(profile)
        rank_tables(profile, "decode", RankForm(**{**vars(FORM), "fusions": ()}))
    assert sorted(calls) == [1, 2]
    assert not list(tmp_path.iterdir())


def test_an_entry_that_nobody_knows_needs_a_precision(folder: Path) -> None:
    profile = _profile(quantization_config={"quant_method": "strange"})
    assert traced(profile, "decode").facts.layers == 4
    with pytest.raises(InputError, match="strange"):
        whole_model(profile, "decode")
    assert whole_model(profile, "decode", "fp8").stored.experts.name == "fp8"


def test_precisions_share_a_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a checkpoint stores its weights in is no matter of tracing; what its layers are is."""
    plain = traced(_profile(), "decode")
    monkeypatch.setattr(tracer, "trace", _refuses)
    assert traced(_profile(quantization_config=FP8), "decode") is plain
    with pytest.raises(AssertionError, match="second time"):
        traced(_profile(intermediate_size=160), "decode")


def test_a_folder_that_takes_nothing_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path / "file"))
    made = _all(_profile())
    monkeypatch.setattr(cache, "_known", {})
    assert _all(_profile()) == made
    assert [record.getMessage().partition(" in ")[0] for record in caplog.records] == ["note: nothing is kept"]
