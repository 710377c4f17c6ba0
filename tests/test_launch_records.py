"""How public records were launched: found by sizes, lengths, users and release; a row's own cells come first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tensorcast.calibrate.engines.launches import KEY, OPTIONS, launches
from tensorcast.errors import InputError
from tensorcast.predict import launch_records
from tensorcast.predict.launch_records import POOLS as POOL_COLUMNS
from tensorcast.predict.launch_records import wait_steps
from tensorcast.predict.predict import predict
from tensorcast.predict.run_columns import Run, read_run
from tensorcast.predict.serve_runs import engine_of
from tensorcast.profiles.store import load_engine, load_model

RECORD = {
    "model": "MiniMaxAI/MiniMax-M2.5", "device": "b200_sxm", "engine": "vllm", "precision": "fp8", "isl": "1024",
    "osl": "1024", "concurrency": "128", "tp": "4", "dp": "1", "ep": "4", "moe_tp": "1", "release": "0.19.0",
}  # fmt: skip
NAMES = frozenset({"moe_ep_size", "attention_dp_size"})


def read(**cells: str) -> Run:
    return read_run({**RECORD, **cells}, NAMES)


def test_a_record_is_priced_as_its_script_launched_it() -> None:
    """benchmarks/single_node/minimaxm2.5_fp8_b200.sh at bddbf4031771: --max-num-batched-tokens, --kv-cache-dtype."""
    short, long = read(), read(isl="8192")
    assert (short.chunk_tokens, long.chunk_tokens) == (2048, 16384)
    assert short.options.kv_dtype == long.options.kv_dtype == "fp8"
    assert "launched with chunk_tokens 2048, kv_dtype fp8" in "; ".join(short.assumed)
    assert read(release="0.17.0").options.kv_dtype is None  # the script of an earlier release
    assert read(device="h100_sxm").options.kv_dtype is None


def test_a_release_without_a_launch_is_taken_as_the_nearest_that_has_one() -> None:
    """Of the one before it; of the oldest where none is; a build that is no release as the most frequent launch."""
    later, earlier = read(release="0.20.1"), read(release="0.17.1")
    assert (later.chunk_tokens, later.options.kv_dtype) == (read().chunk_tokens, "fp8")
    assert earlier.options.kv_dtype is None is read(release="0.9.0").options.kv_dtype
    assert read(release="nightly-abc").chunk_tokens is not None


@pytest.mark.parametrize(("depth", "share"), [("3", 0.85), ("0", 0.9)])
def test_a_record_that_states_its_drafts_is_of_the_launch_that_drafts_so(depth: str, share: float) -> None:
    """benchmarks/single_node/glm5_fp4_b200.sh leaves more memory free for drafts: --mem-fraction-static."""
    glm = {"model": "zai-org/GLM-5", "engine": "sglang", "precision": "fp4", "isl": "8192", "ep": "1", "moe_tp": "4"}
    found = read(**glm, release="0.5.12", mtp_depth=depth)
    assert (found.options.memory_fraction, found.options.mtp_depth, found.other_depths) == (share, int(depth), ())


def test_a_launch_that_says_nothing_of_when_the_scheduler_looks_leaves_it_at_once() -> None:
    """glm5_fp8_b200.sh has no --scheduler-recv-interval; of a model without a script it is taken as others have it."""
    glm = {"model": "zai-org/GLM-5", "engine": "sglang", "tp": "8", "ep": "1", "moe_tp": "8"}
    assert read(**glm, release="nightly-dev-cu13-20260317-1eea7448").wait_steps == 0
    assert read(**{**glm, "model": "qwen3-30b-a3b"}).wait_steps == wait_steps("b200", "aggregated", 128) > 0


@pytest.mark.parametrize(("device", "most"), [("mi355x", None), ("b200_sxm", 128)])
def test_a_launch_without_a_number_of_sequences_runs_as_many_as_the_engine_does(device: str, most: int | None) -> None:
    """glm5_fp8_mi355x_mtp.sh leaves SGLang its 48 with drafts: 64 and 128 users measure 55.0 and 55.4 ms a token
    (InferenceX, 2026-05-20); glm5_fp8_b200_mtp.sh asks for as many as its users."""
    cells = {"model": "zai-org/GLM-5", "engine": "sglang", "release": "0.5.10", "isl": "8192", "ep": "1"}
    sizes = {"tp": "4", "moe_tp": "4"} if most is None else {"tp": "8", "moe_tp": "8"}
    found = read(**cells, **sizes, device=device, mtp_depth="3")
    assert found.max_sequences == most
    assert found.unlimited is (most is not None)
    if most is None:
        row = {**RECORD, **cells, **sizes, "device": device, "mtp_depth": "3"}
        table = pd.DataFrame([{**row, "concurrency": users} for users in ("64", "128")])
        assert predict(table.rename(columns={"ep": "moe_ep_size"}))["mean_batch"].tolist() == pytest.approx([48, 48])


def test_what_a_row_says_comes_first() -> None:
    said = read(chunk_tokens="4096", kv_dtype="bf16")
    assert (said.chunk_tokens, said.options.kv_dtype) == (4096, "bf16")


def test_linears_beside_experts_in_blocks_are_in_blocks() -> None:
    """Qwen/Qwen3.5-397B-A17B-FP8 stores all of them so (weight_block_size); public records say fp8 of its linears."""
    cells = {"model": "Qwen/Qwen3.5-397B-A17B", "gemm_precision": "fp8", "moe_precision": "fp8_block"}
    assert read(**cells).options.quant == "linear=fp8_block,experts=fp8_block"
    assert read_run({**RECORD, **cells}).options.quant == "linear=fp8,experts=fp8_block"  # said by hand


def test_only_records_are_read_as_launched() -> None:
    plain = read_run(RECORD)
    assert plain.chunk_tokens is None and plain.options.kv_dtype is None and plain.mtp_acceptance == 0.8
    assert read(model="qwen3-30b-a3b").chunk_tokens is None  # no public script
    assert read(device="nonesuch").chunk_tokens is None  # refused where it is served


POOLS = {
    "model": "deepseek-ai/DeepSeek-R1", "device": "h200_sxm", "engine": "trtllm", "release": "0.8.1.post1",
    "mode": "disagg", "precision": "fp8", "isl": "1024", "osl": "1024",
    **{f"{role}_{size}": value for role in ("prefill", "decode")
       for size, value in (("tp", "8"), ("dp", "1"), ("ep", "8"), ("moe_tp", "1"))},
}  # fmt: skip


@pytest.mark.parametrize(
    ("users", "decode", "workers", "drafted"),
    [("576", "tp8-dp1-ep8", 9, 0), ("1536", "tp1-dp8-ep8", 6, 0), ("352", "tp8-dp1-ep8", 11, 3),
     ("11", "tp8-dp1-ep8", 9, 0), ("13", "tp8-dp1-ep8", 11, 3)],
)  # fmt: skip
def test_workers_that_a_record_does_not_state_are_those_of_its_launch(
    users: str, decode: str, workers: int, drafted: int
) -> None:
    """Records of the same runs that state them (9 and 6 workers of 576 and 1,536 users) measure the same time."""
    found = read_run({**POOLS, "concurrency": users}, NAMES)
    assert (str(found.decode), found.workers) == (decode, (1, workers))
    assert found.options.mtp_depth == drafted and "workers 1 prefill" not in "; ".join(found.assumed)
    stated = read_run({**POOLS, "concurrency": users, "prefill_workers": "2", "decode_workers": "3"}, NAMES)
    assert (stated.workers, str(stated.decode)) == ((2, 3), "tp8-dp1-ep8")  # what a row says comes first
    assert read_run({**POOLS, "concurrency": "5000"}, NAMES).workers == (32, 79)  # no launch of as many


def test_records_of_pools_may_state_how_prompts_cut_experts_alone() -> None:
    """The run of 256 users that another record states as one worker of tp8 and one of attention DP and ep 8; by its
    recipe (srt-slurm, recipes/h200/8k1k/bs128-1p1d-dep.yaml) 256 requests run there, 32 on a rank."""
    sizes = {f"{role}_{name}": "1" for role in ("prefill", "decode") for name in ("ep",)}
    record = {**POOLS, "engine": "sglang", "release": "0.5.8.post1", "isl": "8192", "concurrency": "256", **sizes,
              "prefill_moe_tp": "8", "decode_moe_tp": "8"}  # fmt: skip
    found = read_run(record, NAMES)
    assert (str(found.prefill), str(found.decode), found.workers) == ("tp8-dp1", "tp1-dp8-ep8", (1, 1))
    assert found.max_sequences == 32 and found.options.memory_fraction == 0.88 and found.options.mtp_depth == 0
    few = read_run({**record, "concurrency": "16"}, NAMES)
    assert (str(few.decode), few.workers, few.max_sequences) == ("tp8-dp1", (1, 3), 32)


def test_no_more_requests_run_than_a_launch_lets() -> None:
    """TensorRT-LLM's workers of one request each, eleven users on nine of them: two wait for a whole reply."""
    run = {**POOLS, "attention_dp_size": "1", "moe_ep_size": "8", "concurrency": "11"}
    stated, more = predict(pd.DataFrame([run, {**run, "max_num_seqs": ""}])), read_run(run, NAMES)
    assert more.max_sequences == 1 and more.workers == (1, 9)
    assert stated["mean_batch"][0] <= 1.0
    reply_s = 0.9 * 1024 * stated["tpot_s"][0]
    assert stated["ttft_s"][0] == pytest.approx(2 / 9 * reply_s, rel=0.2)


def test_records_of_pools_are_behind_dynamo_unless_they_say_so() -> None:
    """All launch scripts of SGLang and TensorRT-LLM pools on NVIDIA devices are (``framework``); AMD's are not."""
    record = {**POOLS, "concurrency": "576"}
    assert read_run(record, NAMES).frontend == "dynamo" and read_run(record).frontend == "own"
    assert read_run({**record, "frontend": "own"}, NAMES).frontend == "own" and read().frontend == "own"
    assert read_run({**record, "device": "mi355x", "engine": "sglang"}, NAMES).frontend == "own"
    with pytest.raises(InputError, match=r"frontend .*nginx.*dynamo"):
        read_run({**record, "frontend": "nginx"})


def test_dynamo_takes_its_time_to_the_first_token() -> None:
    row = {"model": "gpt-oss-120b", "device": "h200", "engine": "sglang", "mode": "disagg", "tp": "4",
           "concurrency": "8", "prefill_workers": "1", "decode_workers": "1"}  # fmt: skip
    own, dynamo = predict(pd.DataFrame([row, {**row, "frontend": "dynamo"}]))["ttft_s"]
    profile = load_engine("sglang")
    assert profile.in_pools("dynamo").hand_over_s > profile.hand_over_s > 0
    assert dynamo - own == pytest.approx(profile.in_pools("dynamo").hand_over_s - profile.hand_over_s, rel=0.02)


def test_how_experts_were_cut_is_the_launchs_where_results_name_no_release_yet() -> None:
    """Every script of it has --ep_size 8 (benchmarks/dsr1_fp8_h200_trt_slurm.sh): its runs with and without a release
    take the same time."""
    cells = {"model": "deepseek-ai/DeepSeek-V3", "device": "h200_sxm", "engine": "trtllm", "tp": "8", "ep": "1"}
    old = read(**cells, moe_tp="8", concurrency="16", release="")
    assert str(old.decode) == str(old.prefill) == "tp8-dp1-ep8" and "launched with ep 8" in old.assumed
    assert str(read(**cells, moe_tp="8", concurrency="16").decode) == "tp8-dp1"  # it names one
    assert str(read(**{**cells, "device": "h100_sxm"}, moe_tp="8", release="").decode) == "tp8-dp1"  # no script


def test_where_drafting_is_not_known_the_interval_holds_both() -> None:
    cells = {
        "model_path": "deepseek-ai/DeepSeek-R1", "system": "h200_sxm", "backend": "trtllm", "precision": "fp8",
        "isl": 1024, "osl": 1024, "concurrency": 16, "tp_size": 8, "attention_dp_size": 1, "moe_tp_size": 1,
        "moe_ep_size": 8, "backend_version": "1.1.0rc2.post2",
    }  # fmt: skip
    rows = [cells, {**cells, "mtp_depth": 3}, {**cells, "mtp_depth": 3, "mtp_acceptance": 0.0}]
    unsure, drafted, none_taken = predict(pd.DataFrame(rows)).to_dict("records")
    assert "may have drafted 3 tokens" in unsure["assumed"] and "may have" not in drafted["assumed"]
    assert drafted["tpot_s"] < unsure["tpot_s"] < none_taken["tpot_s"]
    assert unsure["tpot_low_s"] == pytest.approx(drafted["tpot_low_s"])
    assert unsure["tpot_high_s"] > drafted["tpot_high_s"]
    assert unsure["output_tokens_per_s_high"] == pytest.approx(drafted["output_tokens_per_s_high"])


def test_records_keep_no_beginnings_of_prompts_unless_they_say_so() -> None:
    """A state a sequence where the cache is off, five where it is on (SGLang, Qwen3.5): room for more sequences."""
    cells = {"model": "qwen3.5-397b-a17b", "device": "b200", "engine": "sglang", "tp": "8", "dp": "1",
             "precision": "fp8", "concurrency": "64"}  # fmt: skip
    assert read_run(cells).prefix_cache and not read_run(cells, NAMES).prefix_cache
    assert read_run({**cells, "prefix_cache": "on"}, NAMES).prefix_cache
    with pytest.raises(InputError, match="prefix_cache 'maybe': must be on or off"):
        read_run({**cells, "prefix_cache": "maybe"})
    engine, config = load_engine("sglang"), load_model("qwen3.5-397b-a17b").config
    rules = [one.cache_rules for one in (engine, engine.without_prefix_cache())]
    assert [one.kept(config, 0).state_slots for one in rules if one] == [5, 1]


def test_records_whose_launch_lets_drafts_overlap_are_priced_so() -> None:
    """SGLang 0.5.10.post1: scripts of GLM-5 set SGLANG_ENABLE_SPEC_V2=1, those of Qwen3.5 in bf16 on B300 do not."""
    sglang = {"engine": "sglang", "release": "0.5.10.post1", "tp": "4", "ep": "1", "dp": "1", "moe_tp": "4",
              "isl": "1024", "osl": "1024", "concurrency": "64"}  # fmt: skip
    glm = read_run({**sglang, "model": "zai-org/GLM-5", "device": "b200_sxm", "precision": "fp4"}, NAMES)
    qwen = read_run({**sglang, "model": "Qwen/Qwen3.5-397B-A17B", "device": "b300", "precision": "bf16"}, NAMES)
    for run, ahead in ((glm, True), (qwen, False)):
        assert 3 in (run.options.mtp_depth, *run.other_depths) and run.draft_overlap == ahead
        assert run.served_by == "sglang==0.5.10.post1"
        engine = engine_of(replace(run, options=replace(run.options, mtp_depth=3)), load_engine(run.served_by))
        assert (engine.serial_drafts is None) == ahead and engine.arrival_wait_steps == (2 if ahead else 1)
        assert engine.prefill_graphs is None
    plain = replace(glm, options=replace(glm.options, mtp_depth=0))
    assert engine_of(plain, load_engine(plain.served_by)).prefill_graphs is not None
    with pytest.raises(InputError, match="draft_overlap 'v2': must be on or off"):
        read_run({**sglang, "model": "deepseek-v3", "device": "b200", "draft_overlap": "v2"})


def test_drafts_that_overlap_are_served_sooner() -> None:
    row = {"model": "deepseek-v3", "device": "h200", "engine": "sglang==0.5.9", "tp": 8, "precision": "fp8_block",
           "concurrency": 40, "mtp_depth": 3}  # fmt: skip
    rows = [row, {**row, "draft_overlap": "on"}, {**row, "engine": "sglang==0.5.14"}]
    waits, ahead, newer = predict(pd.DataFrame(rows))["tpot_s"]
    # a step keeps 1 + 0.8 + 0.8^2 + 0.8^3 tokens of each of nearly 40 sequences
    assert waits - ahead == pytest.approx((1.3e-3 + 40 * 130e-6) / 2.952, rel=0.05)
    assert newer < waits


def test_half_of_sglangs_receive_interval_is_waited_for() -> None:
    assert wait_steps("h200", "aggregated", 4) == 0
    assert [wait_steps("b200", "aggregated", users) for users in (15, 16)] == [4.5, 14.5]
    cells = {"model": "llama-3.1-8b", "device": "h100", "engine": "sglang", "isl": "64", "osl": "64"}
    assert read_run({**cells, "receive_interval": "4"}).wait_steps == 1.5
    assert read_run({**cells, "engine": "vllm", "receive_interval": "4"}).wait_steps == 0
    assert read_run({**cells, "receive_interval": "4", "wait_steps": "1"}).wait_steps == 1
    sglang = {"engine": "sglang", "model": "Qwen/Qwen3.5-397B-A17B", "tp": "8", "ep": "1"}
    assert read(**sglang, moe_tp="8", release="0.5.9", concurrency="64").wait_steps == 14.5


def test_of_several_launches_those_of_its_release_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(release: str, users: str, chunk: str, depth: str = "", ep: str = "") -> dict[str, str]:
        options = dict.fromkeys(OPTIONS, "")
        options |= {"chunk_tokens": chunk, "mtp_depth": depth, "ep": ep, "max_num_seqs": users.split(";")[-1]}
        return {"release": release, "users": users, **options}

    rows = [row("1;2", "4;8", "100"), row("2", "8", "300"), row("3", "8;16", "300", "2"), row("3", "64", "", "2")]
    key = ("vllm", "m", "h100-sxm", "fp8", "1", "2", "agg", "1", "0", *[""] * 6)
    monkeypatch.setattr(launch_records, "_launches", lambda: {key: rows})

    def found(users: float, release: str, ep: int = 1) -> Any:
        of = launch_records.Recorded(
            model="m", device="h100", engine="vllm", precision="FP8", lengths=(1, 2), users=users, release=release
        )
        return launch_records.launched(of, key[6:], ep)

    assert found(4, "2").chunk_tokens == 100
    assert found(8, "3").chunk_tokens == 300 and found(8, "3").mtp_depths == (2,)
    assert found(8, "").chunk_tokens == 100 and found(8, "").mtp_depths == (0, 2)  # of those that draft least
    assert (found(8, "3").max_num_seqs, found(64, "3").max_num_seqs, found(32, "3").max_num_seqs) == (16, 64, None)
    assert found(64, "").chunk_tokens is None and found(64, "").mtp_depths == (2,)
    rows += [row("4", "8", "400", "3", "1"), row("4", "16", "500", "", "4")]
    assert found(8, "4").mtp_depths == (3,) and found(8, "4", ep=4).mtp_depths == (0,)  # its experts before its users
    assert found(8, "4", ep=2).mtp_depths == (3,)  # none cuts them so
    assert found(64, "1").chunk_tokens == 100 and found(64, "1").mtp_depths == (0,)  # its release before its users


def test_launches_that_are_alike_are_one_row() -> None:
    launch = {
        "engine": "vllm", "engine_release": "0.19.0",
        "serving_model": "deepseek-ai/DeepSeek-R1;deepseek-ai/DeepSeek-V3",
        "hf_model": "x", "device": "h200", "precision": "fp8", "mode": "agg", "role": "agg", "isl": 1024, "osl": 1024,
        "concurrency": 4, "tp": 8, "ep": 1, "dp_attn": 0, "max_num_tokens": 8192.0, "kv_cache_dtype": "fp8_e4m3",
        "spec_depth": None, "sched_recv_interval": None, "stream_interval": 20.0, "all2all_backend": None,
        "prefill_workers": None, "prefill_tp": None, "prefill_dp_attn": None,
        "decode_workers": None, "decode_tp": None, "decode_dp_attn": None, "other_options": None,
    }  # fmt: skip
    pools = launch | {
        "mode": "disagg", "prefill_workers": 1, "prefill_tp": 8, "prefill_dp_attn": 0,
        "decode_workers": 2, "decode_tp": 8, "decode_dp_attn": 1,
    }  # fmt: skip
    prefill = {"role": "prefill", "max_num_tokens": 16384, "kv_cache_dtype": None, "prefill_ep": 1, "max_num_seqs": 4}
    decode = {"role": "decode", "max_num_tokens": 64, "spec_depth": 3, "ep": 8, "prefill_ep": 1, "max_num_seqs": 32,
              "other_options": "numa-bind=true;mamba-ssm-dtype=bfloat16"}  # fmt: skip
    rows = [launch, launch | {"concurrency": 16}, launch | {"engine_release": "0.20.0"}]
    rows += [pools | prefill, pools | decode]
    unknown = [launch | {"serving_model": None, "hf_model": "none/such"}, launch | {"device": "none"}]
    out = launches(pd.DataFrame(rows + unknown))
    assert list(out.columns) == [*KEY, "users", *OPTIONS]
    agg, disagg = (out[out["mode"] == mode] for mode in ("agg", "disagg"))
    assert sorted(zip(agg["release"], agg["users"], strict=True)) == [("0.19.0", "16"), ("0.19.0;0.20.0", "4")]
    assert set(agg["model"]) == {"deepseek-r1;deepseek-v3"} and set(agg["kv_dtype"]) == {"fp8"}
    assert set(agg["state_dtype"]) == {""} and set(disagg["state_dtype"]) == {"bfloat16"}
    one = disagg.iloc[0]
    assert len(disagg) == 1 and (one["chunk_tokens"], one["mtp_depth"], one["gpus"]) == ("16384", "3", "")
    assert (one["decode_workers"], one["decode_dp_attn"], one["kv_dtype"]) == ("2", "1", "fp8")
    assert (one["ep"], one["prefill_ep"], one["max_num_seqs"]) == ("8", "1", "32") and set(agg["prefill_ep"]) == {""}


def test_users_of_one_worker_and_tokens_of_a_server_are_counted_over_all_and_per_rank() -> None:
    launch = {
        "engine": "sglang", "engine_release": "1", "serving_model": "deepseek-ai/DeepSeek-R1", "hf_model": "x",
        "device": "h200", "precision": "fp8", "mode": "agg", "role": "agg", "isl": 8, "osl": 8, "tp": 8, "ep": 8,
        "dp_attn": 1, "kv_cache_dtype": None, "spec_depth": None, "sched_recv_interval": None, "other_options": None,
        "all2all_backend": None, **dict.fromkeys(POOL_COLUMNS), "concurrency": 64,
        "recipe_name": "recipes/c64_ctx1_gen9_dep8_batch512.yaml",
        "max_num_tokens": 65536.0, "max_prefill_tokens": 65536.0, "max_num_seqs": 256,
    }  # fmt: skip
    more: list[dict[str, Any]] = [
        {}, {"concurrency": 1, "recipe_name": "r/c1_ctx1_gen7_tep8_batch1.yaml", "max_num_tokens": 262144.0},
        {"recipe_name": "r/ctx1_gen3_tp8_batch64.yaml", "dp_attn": 0, "max_prefill_tokens": None},
        {"engine": "trtllm", "recipe_name": None, "max_num_tokens": 512.0},
        {"concurrency": 8, "recipe_name": None, "all2all_backend": "deepep"},
    ]  # fmt: skip
    found = launches(pd.DataFrame([launch | one for one in more]))
    gathers = "allgather_reducescatter"
    assert {(row.engine, row.users, row.chunk_tokens, row.ep, row.all2all) for row in found.itertuples()} == {
        ("sglang", "576", "8192", "8", gathers), ("sglang", "9", "32768", "8", gathers),
        ("sglang", "64", "16384", "8", ""), ("sglang", "8", "8192", "8", ""), ("trtllm", "64", "512", "8", ""),
    }  # fmt: skip
    seqs = {(row.engine, row.dp_attn, row.max_num_seqs) for row in found.itertuples()}
    assert seqs == {("sglang", "1", "32"), ("sglang", "0", "256"), ("trtllm", "1", "256")}
    pooled = [launch | {"mode": "disagg", "role": role, "prefill_workers": 1} for role in ("prefill", "decode")]
    one = launches(pd.DataFrame(pooled)).iloc[0]  # where sizes of pools tell launches apart
    assert (one["chunk_tokens"], one["max_num_seqs"]) == ("8192", "32")


@pytest.mark.parametrize(
    ("switches", "depth", "found"),
    [("NCCL_NVLS_ENABLE=1;SGLANG_ENABLE_SPEC_V2=1", 3, "on"), ("SGLANG_ENABLE_SPEC_V2=True", 1, "on"),
     ("SGLANG_ENABLE_SPEC_V2=0", 3, ""), ("SGLANG_ENABLE_SPEC_V2=1", None, ""), (None, 3, "")],
)  # fmt: skip
def test_a_variable_of_a_launch_lets_drafts_overlap(switches: str | None, depth: int | None, found: str) -> None:
    launch = {
        "engine": "sglang", "engine_release": "0.5.9", "serving_model": "deepseek-ai/DeepSeek-R1", "hf_model": "x",
        "device": "h200", "precision": "fp8", "mode": "agg", "role": "agg", "isl": 8, "osl": 8, "tp": 8, "ep": 8,
        "dp_attn": 0, "concurrency": 64, "env_switches": switches, "spec_depth": depth, "max_num_tokens": None,
        "kv_cache_dtype": None, "sched_recv_interval": None, "other_options": None, "all2all_backend": None,
        **dict.fromkeys(POOL_COLUMNS),
    }  # fmt: skip
    assert launches(pd.DataFrame([launch]))["draft_overlap"].tolist() == [found]


def test_experts_kernels_that_a_variable_asks_for() -> None:
    """kimik2.5_int4_b200.sh from 2026-03-24 on. A record that says no more is taken for the later of two scripts."""
    kimi = {"model": "moonshotai/Kimi-K2.5", "precision": "int4", "tp": "8", "ep": "1", "moe_tp": "8",
            "concurrency": "64", "release": "0.15.1"}  # fmt: skip
    assert read(**kimi).options.experts_kernels == "trtllm"
    assert read(**kimi, device="h200_sxm").options.experts_kernels == "engine"


def test_the_shipped_table_names_profiles() -> None:
    from tensorcast.profiles import list_devices, list_engines, list_models

    text = (Path(__file__).parent.parent / "profiles" / "records" / "launches.csv").read_text()
    table = pd.read_csv(Path(__file__).parent.parent / "profiles" / "records" / "launches.csv", comment="#", dtype=str)
    assert text.startswith("# ") and len(table) > 1000 and not table.duplicated().any()
    assert {name for names in table["model"] for name in names.split(";")} <= set(list_models())
    assert set(table["device"]) <= set(list_devices()) and set(table["engine"]) <= set(list_engines())
