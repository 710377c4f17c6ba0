"""Launch commands: what is written for known deployments, and that every flag is a known one."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tensorcast.cli import app
from tensorcast.deploy.engine_limits import ENGINE_RULES
from tensorcast.deploy.layout import ALL2ALL, Layout, parse_layout
from tensorcast.deploy.options import Options
from tensorcast.launch.launch import Launch, launch, script
from tensorcast.profiles.launch import list_launch_tables, load_launch_table
from tensorcast.profiles.store import load_device, load_model

ENGINES = ("vllm", "sglang", "trtllm")
DEEPSEEK, QWEN, LLAMA = load_model("deepseek-v3"), load_model("qwen3-235b-a22b"), load_model("llama-3.1-70b")
H200 = load_device("h200")


def written(engine: str, layout: str, options: Options = Options(), model: Any = DEEPSEEK, **given: Any) -> Launch:
    sizes = {"batch": 128, "input_len": 4096, "output_len": 1024, "device": H200, **given}
    found = launch(engine, model, parse_layout(layout), options, **sizes)
    assert not found.problem, found.problem
    return found


def words(command: str) -> list[str]:
    """As a shell reads it, continuation lines joined."""
    return shlex.split(command.replace("\\\n", ""))


# Known deployments


def test_vllm_deepseek_on_four_nodes() -> None:
    """The two forms of vLLM's own multi-node data-parallel guide: a head that serves, others headless."""
    found = written("vllm", "tp1-dp32-ep32", Options(all2all="low_latency"))
    common = """--enable-expert-parallel --all2all-backend deepep_low_latency --kv-cache-dtype auto --max-model-len 5120
        --max-num-seqs 128 --max-num-batched-tokens 256 --gpu-memory-utilization 0.92"""
    start = "vllm serve deepseek-ai/DeepSeek-V3 --host 0.0.0.0 --port 8000 --tensor-parallel-size 1"
    head = "--data-parallel-size 32 --data-parallel-size-local 8"
    where = "--data-parallel-address HEAD_NODE_IP --data-parallel-rpc-port 13345"
    assert [words(command) for command in found.commands] == [
        f"{start} {head} {where} {common}".split(),
        *(f"{start} {head} --data-parallel-start-rank {8 * n} {where} --headless {common}".split() for n in (1, 2, 3)),
    ]
    assert "HEAD_NODE_IP" in found.notes[0]


def test_sglang_deepseek_on_four_nodes() -> None:
    """tp-size counts all ranks, and limits are given for all of them: 128 sequences and 256 tokens for each of 32.

    Of 143771 MiB it leaves 512 + 1.5 * 8192 + 128 * 32, for each of 128 captured sequences 2 + 3 * 32: 29440 MiB, and
    since 0.5.23 2048 for DeepEP's buffers in decode graphs: 31488. Halved steps have no prefill graphs.
    """
    found = written("sglang", "tp1-dp32-ep32", Options(redundant_experts=32, dual_batch_overlap=True))
    assert len(found.commands) == 4
    older = written("sglang==0.5.14", "tp1-dp32-ep32", Options(redundant_experts=32, dual_batch_overlap=True))
    assert "--dp-size 32 --enable-dp-attention --enable-dp-lm-head" in " ".join(words(older.commands[0]))
    assert older.commands[0].endswith("--mem-fraction-static 0.795") and older.version == "0.5.14"
    for node, command in enumerate(found.commands):
        assert words(command) == f"""python3 -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --host 0.0.0.0
            --port 30000 --tp-size 32 --attn-dp-size 32 --enable-dp-lm-head --moe-dense-tp-size 1
            --nnodes 4 --node-rank {node} --dist-init-addr HEAD_NODE_IP:20000 --ep-size 32 --moe-a2a-backend deepep
            --deepep-mode auto --enable-eplb --ep-num-redundant-experts 32 --enable-two-batch-overlap
            --kv-cache-dtype bf16 --context-length 5120 --max-running-requests 4096 --chunked-prefill-size 8192
            --cuda-graph-max-bs-decode 128 --mem-fraction-static 0.781""".split()


def test_a_shared_expert_apart_from_the_routed_ones_has_a_flag_of_sglang_alone() -> None:
    """Both others never fuse it: vLLM 0.24.0 on ROCm alone (envs.py, VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS)."""
    for engine in ("vllm", "sglang", "trtllm"):
        for fused in (True, False):
            text = " ".join(written(engine, "tp16", Options(shared_experts_fusion=fused)).commands)
            assert ("--disable-shared-experts-fusion" in text) == (engine == "sglang" and not fused)


@pytest.mark.parametrize(
    ("engine", "layout", "expected"),
    [
        ("vllm", "tp8", "vllm serve Qwen/Qwen3-235B-A22B --host 0.0.0.0 --port 8000 --tensor-parallel-size 8 "
         "--kv-cache-dtype auto --max-model-len 5120 --max-num-seqs 128 --max-num-batched-tokens 2048 "
         "--gpu-memory-utilization 0.92"),
        ("vllm", "tp8-ep8", "vllm serve Qwen/Qwen3-235B-A22B --host 0.0.0.0 --port 8000 --tensor-parallel-size 8 "
         "--enable-expert-parallel --kv-cache-dtype auto --max-model-len 5120 --max-num-seqs 128 "
         "--max-num-batched-tokens 2048 --gpu-memory-utilization 0.92"),
        ("sglang", "tp8", "python3 -m sglang.launch_server --model-path Qwen/Qwen3-235B-A22B --host 0.0.0.0 "
         "--port 30000 --tp-size 8 --kv-cache-dtype bf16 --context-length 5120 --max-running-requests 128 "
         "--chunked-prefill-size 2048 --cuda-graph-max-bs-decode 128 --mem-fraction-static 0.929"),
        ("sglang", "tp8-ep8", "python3 -m sglang.launch_server --model-path Qwen/Qwen3-235B-A22B --host 0.0.0.0 "
         "--port 30000 --tp-size 8 --ep-size 8 --kv-cache-dtype bf16 --context-length 5120 "
         "--max-running-requests 128 --chunked-prefill-size 2048 --cuda-graph-max-bs-decode 128 "
         "--mem-fraction-static 0.929"),  # 10 GiB are left at least, of 143771 MiB
    ],
)  # fmt: skip
def test_one_node(engine: str, layout: str, expected: str) -> None:
    (command,) = written(engine, layout, model=QWEN, chunk_tokens=2048).commands
    assert words(command) == expected.split()


def test_trtllm_attention_dp_and_expert_parallel() -> None:
    found = written("trtllm", "tp1-dp8-ep8", Options(kv_dtype="fp8", all2all="low_latency", redundant_experts=32))
    (command,) = found.commands
    expected = """TRTLLM_FORCE_COMM_METHOD=DEEPEPLOWLATENCY trtllm-serve deepseek-ai/DeepSeek-V3 --host 0.0.0.0
        --port 8000 --config trtllm-serve.yaml"""
    assert words(command) == expected.split()
    assert yaml.safe_load(found.config_files["trtllm-serve.yaml"]) == {
        "tensor_parallel_size": 8, "pipeline_parallel_size": 1, "gpus_per_node": 8, "enable_attention_dp": True,
        "moe_expert_parallel_size": 8, "moe_tensor_parallel_size": 1,
        "moe_config": {"load_balancer": {"num_slots": 288, "layer_updates_per_iter": 1}},
        "max_batch_size": 128, "max_num_tokens": 8192, "max_seq_len": 5120, "enable_chunked_prefill": True,
        "kv_cache_config": {"dtype": "fp8", "free_gpu_memory_fraction": 0.9},
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": 128},
    }  # fmt: skip


def test_trtllm_over_nodes_is_one_slurm_command() -> None:
    (command,) = written("trtllm", "tp16-ep16").commands
    assert words(command) == """srun --nodes 2 --ntasks 16 --ntasks-per-node 8 --mpi pmix trtllm-llmapi-launch
        trtllm-serve deepseek-ai/DeepSeek-V3 --host 0.0.0.0 --port 8000 --config trtllm-serve.yaml""".split()


def test_drafted_tokens() -> None:
    options = Options(mtp_depth=2)
    vllm = words(written("vllm", "tp8-ep8", options, batch=256).commands[0])
    assert json.loads(vllm[vllm.index("--speculative-config") + 1]) == {"method": "mtp", "num_speculative_tokens": 2}
    # 256 sequences of 3 tokens: more than the 512 that vLLM captures unasked; a sequence may end in two drafts
    assert vllm[vllm.index("--max-cudagraph-capture-size") + 1] == "768"
    assert vllm[vllm.index("--max-model-len") + 1] == "5122"
    sglang = written("sglang", "tp8-ep8", options).commands[0]
    assert re.sub(r"\s*\\\n\s*", " ", sglang).endswith(
        "--speculative-algorithm EAGLE --speculative-num-steps 2 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 3"
    )
    config = yaml.safe_load(written("trtllm", "tp8-ep8", options).config_files["trtllm-serve.yaml"])
    assert config["speculative_config"] == {"decoding_type": "MTP", "max_draft_len": 2}


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_disaggregated_roles(role: str) -> None:
    layout = "dp16-ep16"
    vllm = words(written("vllm", layout, role=role).commands[0])
    assert vllm[0] == "VLLM_NIXL_SIDE_CHANNEL_HOST=THIS_NODE_IP"
    kv_role = {"prefill": "kv_producer", "decode": "kv_consumer"}[role]
    transfer = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])
    assert transfer == {"kv_connector": "NixlConnector", "kv_role": kv_role}
    # a decode server never sees a prompt: its step is its sequences
    assert vllm[vllm.index("--max-num-batched-tokens") + 1] == {"prefill": "8192", "decode": "128"}[role]
    sglang = words(written("sglang", layout, role=role).commands[0])
    assert sglang[-4:] == ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "mooncake"]
    assert sglang[sglang.index("--deepep-mode") + 1] == {"prefill": "normal", "decode": "low_latency"}[role]
    assert ("--chunked-prefill-size" in sglang) == (role == "prefill")
    config = yaml.safe_load(written("trtllm", layout, role=role).config_files[f"trtllm-{role}.yaml"])
    assert config["cache_transceiver_config"] == {"backend": "NIXL", "max_tokens_in_buffer": 4096}
    assert config.get("disable_overlap_scheduler", False) == (role == "prefill")


def test_the_exchange_that_was_priced_is_launched() -> None:
    """SGLang's DeepEP has a mode for each phase; asked for low latency in both, prompts go through its buffers, too."""
    low, high = Options(all2all="low_latency"), Options(all2all="high_throughput")
    for prefill, mode in (({}, "low_latency"), ({"prefill": low}, "low_latency"), ({"prefill": high}, "auto")):
        command = words(written("sglang", "dp8-ep8", low, **prefill).commands[0])
        assert command[command.index("--deepep-mode") + 1] == mode
        # 8192 tokens of a prompt over 8 ranks, or the 128 sequences that its buffers hold unasked
        assert command[0].endswith("=1024") == (mode == "low_latency")
    auto = words(written("sglang", "dp8-ep8").commands[0])
    assert auto[auto.index("--deepep-mode") + 1] == "auto"
    for chunk, expected in ((None, "256"), (512, "512")):  # of vLLM, which has one exchange
        vllm = words(written("vllm", "dp8-ep8", low, chunk_tokens=chunk).commands[0])
        assert vllm[vllm.index("--max-num-batched-tokens") + 1] == expected


@pytest.mark.parametrize(
    ("engine", "said"),
    [("vllm", "VLLM_PP_LAYER_PARTITION=48,46"), ("sglang", "SGLANG_PP_LAYER_PARTITION=48,46"),
     ("trtllm", "pp_partition:\n- 48\n- 46\n")],
)  # fmt: skip
def test_stages_as_stated_reach_the_engine(engine: str, said: str) -> None:
    found = written(engine, "tp4-pp2", Options(pp_partition="48,46"), QWEN)
    assert said in found.commands[0] + "".join(found.config_files.values())


def test_int4_experts_run_in_generated_kernels_by_a_variable() -> None:
    asked = Options(experts_kernels="trtllm")
    for model, told in ((load_model("kimi-k2.5"), True), (DEEPSEEK, False)):
        assert ("VLLM_USE_FLASHINFER_MOE_INT4=1" in written("vllm", "tp8", asked, model).commands[0]) is told


def test_a_rank_over_several_nodes() -> None:
    """vLLM starts plain workers on the nodes that a tensor-parallel group reaches into."""
    commands = [words(command) for command in written("vllm", "tp16-dp2-ep32").commands]
    for node, command in enumerate(commands):
        assert command[command.index("--node-rank") + 1] == str(node)
        assert command[command.index("--nnodes") + 1] == "4"
        assert command[command.index("--data-parallel-size") + 1] == "2"
        assert ("--headless" in command) == (node > 0) and "--data-parallel-size-local" not in command


def test_large_low_latency_batches_need_larger_buffers() -> None:
    small, large = (written("sglang", "dp8-ep8", batch=n).commands[0] for n in (128, 160))
    assert "DISPATCH_TOKENS" not in small
    assert large.startswith("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=160 \\\npython3")


def test_a_model_without_hugging_face_id_gets_a_placeholder() -> None:
    local = QWEN.model_copy(update={"hf_id": "mine", "name": "mine"})
    found = written("sglang", "tp8", model=local)
    assert "--model-path /path/to/mine" in found.commands[0] and "/path/to/" in found.notes[0]


def test_commands_are_one_flag_a_line_and_safe_in_a_shell() -> None:
    odd = QWEN.model_copy(update={"hf_id": "someone/it's $HOME; rm"})
    command = written("vllm", "tp8", model=odd).commands[0]
    assert words(command)[2] == "someone/it's $HOME; rm"
    script = f"set -- {command}\nprintf '%s\\n' \"$@\""
    typed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert typed.splitlines() == words(command)
    lines = command.split("\n")
    assert all(line.endswith(" \\") for line in lines[:-1]) and all(line.startswith("  --") for line in lines[1:])


# Every flag is in the table


@given(
    engine=st.sampled_from(ENGINES), tp=st.sampled_from([1, 2, 4, 8, 16]), dp=st.sampled_from([1, 2, 4, 8, 32]),
    pp=st.sampled_from([1, 2]), etp=st.sampled_from([1, 2, 8]), role=st.sampled_from([None, "prefill", "decode"]),
    options=st.builds(
        Options, all2all=st.sampled_from(ALL2ALL),
        kv_dtype=st.sampled_from([None, "bf16", "fp8"]), redundant_experts=st.sampled_from([0, 32]),
        placement=st.sampled_from(["linear", "eplb", "round_robin"]), mtp_depth=st.integers(0, 3),
        dual_batch_overlap=st.booleans(), external_shared_experts=st.sampled_from([0, 0, 0, 4]),
        chunk_tokens=st.sampled_from([0, 1024]),
    ),
    batch=st.integers(1, 600), dense=st.booleans(),
)  # fmt: skip
@settings(max_examples=250, deadline=None)
def test_whatever_is_launched_adds_up(
    engine: str, tp: int, dp: int, pp: int, etp: int, *, role: str | None, options: Options, batch: int, dense: bool
) -> None:
    ep = 1 if dense or tp * dp % etp else tp * dp // etp
    layout, model = Layout(tp * dp * pp, tp, dp, ep, pp), LLAMA if dense else DEEPSEEK
    found = launch(engine, model, layout, options, batch=batch, input_len=1000, output_len=100, role=role)
    assert (found.problem == "") == bool(found.commands) == bool(found.flags)
    if found.problem:
        return
    table = load_launch_table(engine)
    known = {entry.flag: entry for entry in table.flags.values()}
    for setting in found.flags:
        assert setting.flag in known and setting.version[0].isalnum() and setting.source.startswith("https://")
        assert (setting.value == "") == (known[setting.flag].takes == "nothing")
    nodes = max(1, layout.world_size // 8)
    assert len(found.commands) == (1 if engine == "trtllm" else nodes)
    for command in found.commands:
        typed = {word for word in words(command) if word.startswith("--")}
        assert typed <= {setting.flag for setting in found.flags}
    value = {setting.flag: setting.value for setting in found.flags}
    if engine == "vllm":
        sizes = [int(value.get(f"--{name}-parallel-size", 1)) for name in ("tensor", "data", "pipeline")]
        assert sizes[0] * sizes[1] * sizes[2] == layout.world_size
        assert int(value.get("--data-parallel-size-local", dp)) * (nodes if tp * pp <= 8 else 1) in (dp, dp * nodes)
        assert int(value["--max-num-batched-tokens"]) >= int(value["--max-num-seqs"])
    elif engine == "sglang":
        ranks, replicas = int(value["--tp-size"]), 1 if "--attn-dp-size" in value else dp
        assert ranks * int(value.get("--pp-size", 1)) * replicas == layout.world_size
        assert ranks * int(value.get("--pp-size", 1)) % nodes == 0 or dense
        assert int(value["--max-running-requests"]) == batch * dp
        assert int(value.get("--ep-size", 1)) == ep
    else:
        config = yaml.safe_load(next(iter(found.config_files.values())))
        assert config["tensor_parallel_size"] * config["pipeline_parallel_size"] == layout.world_size
        if not dense:
            moe = config["moe_expert_parallel_size"] * config["moe_tensor_parallel_size"]
            assert moe == config["tensor_parallel_size"]


def test_tables_say_where_everything_was_read() -> None:
    assert set(ENGINES) == set(list_launch_tables())
    for engine in ENGINES:
        table = load_launch_table(engine)
        assert {source for source in table.sources.values() if not source.startswith("https://")} == set()
        used = [entry.source for entry in table.flags.values()] + [entry.source for entry in table.rules.values()]
        assert set(used) == set(table.sources)
        assert len({entry.flag for entry in table.flags.values()}) == len(table.flags)
        assert set(table.rules) == set(ENGINE_RULES[engine]), "each limit has its source, and each source its limit"


# The command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["launch", *arguments], env={"COLUMNS": "100", "NO_COLOR": "1"})


DEEPSEEK_32 = ("deepseek-v3", "--device", "h200", "--world-size", "32", "--batch", "128")


def test_cli_prints_a_command_per_node() -> None:
    result = invoke(*DEEPSEEK_32, "--layout", "tp1-dp32-ep32", "--engine", "sglang")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.startswith("#!/usr/bin/env bash\n# sglang 0.5.23\n# to be filled in: HEAD_NODE_IP: ")
    expected = written("sglang", "tp1-dp32-ep32").commands
    for node, command in enumerate(expected):
        assert f"\nnode{node})\n{command}\n;;\n" in result.stdout


def test_unasked_a_server_takes_what_memory_holds_or_the_engines_own_most() -> None:
    def most(*more: str) -> tuple[int, list[str]]:
        found = json.loads(invoke("qwen3-235b-a22b", "-d", "h100", "--layout", "tp8", "--json", *more).stdout)
        value = next(flag["value"] for flag in found["flags"] if flag["flag"] == "--max-num-seqs")
        return int(value), [note for note in found["notes"] if note.startswith("memory holds")]

    fits, notes = most()
    assert 1 < fits < 1024 and not notes
    assert most("--batch", str(fits)) == (fits, [])
    asked, notes = most("--batch", str(fits + 1))
    assert asked == fits + 1 and len(notes) == 1 and f"{fits} of {fits + 1} sequences" in notes[0]
    # vLLM's own on 70 GiB and more: EngineArgs._set_default_max_num_seqs_and_batched_tokens_args
    assert most("--input-len", "16", "--output-len", "16")[0] == 1024


def test_cli_json_has_every_source() -> None:
    result = invoke(*DEEPSEEK_32, "--layout", "dp32-ep32", "--engine", "trtllm", "--json")
    found = json.loads(result.stdout)
    assert found["version"] == "1.3.0rc20" and list(found["config_files"]) == ["trtllm-serve.yaml"]
    assert all(set(flag) == {"flag", "value", "version", "source"} for flag in found["flags"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layout", "tp8-dp4-ep16"), "error: vllm 0.33.0 cannot run tp8-dp4-ep16: whole experts or all cut: "),
        (("--layout", "tp8-dp2"), "error: layout tp8-dp2 breaks rule 'world size': "),
        (("--layout", "tp3x"), "error: layout 'tp3x': "),
        (("--layout", "dp32-ep32", "--all2all", "deepep"), "error: --all2all 'deepep': choose one of auto, "),
    ],
)
def test_cli_refuses_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*DEEPSEEK_32, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1


def test_an_engines_file_of_where_experts_lie_is_handed_on() -> None:
    """SGLang 0.5.14 and 0.5.23: a location that is not trivial sends copies their tokens (static dispatch) unasked."""
    options = Options(placement="sglang.json", redundant_experts=32)
    command = written("sglang", "tp1-dp32-ep32", options).commands[0]
    assert "--init-expert-location sglang.json" in command and "--ep-num-redundant-experts 32" in command
    assert "--enable-eplb" not in command
    found = written("trtllm", "tp1-dp8-ep8", Options(placement="trtllm.yaml"))
    config = next(iter(found.config_files.values()))
    assert yaml.safe_load(config)["moe_config"]["load_balancer"] == "trtllm.yaml"
    found = written("vllm", "tp1-dp8-ep8", Options(placement="sglang.json"))
    assert "--enable-eplb" in found.commands[0] and "vLLM reads no placement" in "; ".join(found.notes)


def test_balancers_by_name() -> None:
    command = written("sglang", "tp1-dp32-ep32", Options(placement="eplb_global")).commands[0]
    assert "--enable-eplb" in command and "--eplb-algorithm deepseek" in command
    assert "--eplb-algorithm" not in written("sglang", "tp1-dp32-ep32", Options(placement="eplb")).commands[0]


def test_a_script_runs_the_command_that_it_is_asked_for(tmp_path: Path) -> None:
    """Two nodes of a prefill pool and one decode server in one file: no command waits for another to end."""
    pools = [written("vllm", "tp1-dp16-ep16", role="prefill"), written("vllm", "tp8-ep8", role="decode")]
    file = tmp_path / "launch.sh"
    file.write_text(script(*pools, roles=("prefill", "decode"), said=("1 x prefill worker",)))
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "vllm").chmod(0o755)

    def ran(*words: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return subprocess.run(["bash", str(file), *words], env=path, capture_output=True, text=True, check=False)

    second = ran("prefill-node1").stdout
    assert second.count("serve") == 1 and "--data-parallel-start-rank 8" in second
    assert "--data-parallel-start-rank" not in ran("prefill-node0").stdout
    assert "kv_consumer" in ran("decode").stdout and ran("decode").stdout.count("\n") == 1
    nothing = ran()
    assert nothing.returncode == 2 and "prefill-node0|prefill-node1|decode" in nothing.stderr and not nothing.stdout
    single = script(written("vllm", "tp8-ep8"))
    assert "case" not in single and single.splitlines()[-1].startswith("  --")
