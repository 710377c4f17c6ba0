"""Options that public benchmarks launched engines with, as a table in the profiles: ``make launches TABLE=FILE``.

Records of served runs say sizes and lengths, and often nothing of the chunk of prompts, the cache's type or drafted
tokens, which their launch scripts do. ``FILE`` has a row per launch read from such scripts: ``engine, engine_release,
serving_model`` (or ``hf_model``), ``device, precision, mode, role, isl, osl, concurrency``, sizes, and options under
the engines' own names. Rows that say the same are one here; :mod:`tensorcast.predict.launch_records` reads it.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tensorcast.deploy.model_names import understand
from tensorcast.errors import InputError
from tensorcast.files import write_atomically
from tensorcast.predict.launch_records import POOLS, SIZES, WORDS
from tensorcast.profiles.store import load_device, load_engine

KEY = ("engine", "release", "model", "device", "precision", "mode", "isl", "osl", *SIZES)
"""What a launch is known by, beside its users."""

OPTIONS = {
    "ep": "ep",
    "prefill_ep": "prefill_ep",
    "chunk_tokens": "max_num_tokens",
    "kv_dtype": "kv_cache_dtype",
    "state_dtype": "other_options",
    "mtp_depth": "spec_depth",
    "draft_overlap": "env_switches",
    "receive_interval": "sched_recv_interval",
    "all2all": "all2all_backend",
    "memory_fraction": "mem_fraction",
    "max_num_seqs": "max_num_seqs",
    "cuda_graphs": "cuda_graphs",
    "allreduce_fusion": "joins_norms",
    "experts_kernels": "experts_kernels",
    "attention_kernels": "attention_kernels",
    "balance_steps": "adp_timeout_iters",
    "batching_steps": "adp_batching_wait_iters",
    "batch_wait_steps": "batch_wait_timeout_iters",
    "batch_wait_share": "batch_wait_max_tokens_ratio",
}
"""Options kept, by our names, and the table's; of pools, ``ep`` and all else is of the one that decodes, unless
:data:`ROLE` says otherwise."""

PER_WORKER = r"/c(\d+)_ctx\d+_gen(\d+)_"
"""Names of recipes whose users are those of one decode worker, with the number of these: their records state 576 users
for 64 on each of nine. Of one user per worker they state two more than workers: 9, 11 and 13 of 7, 9 and 11."""

OVERLAPS = r"SGLANG_ENABLE_SPEC_V2=(?:1|true)\b"
"""The variable among ``env_switches`` that lets SGLang's scheduler work ahead of drafts; without drafts it does
nothing."""

STATES = r"mamba-ssm-(?:cache-)?dtype=(\w+)"
"""The option among ``other_options`` that says what recurrent states are kept in (SGLang's, vLLM's)."""

ROLE = {"chunk_tokens": "prefill", "receive_interval": "prefill"}
"""Which pool's launch says an option; else that which decodes."""

READ = (
    "adp_enable_balance", "compilation_config", "disable_cuda_graph", "enforce_eager", "allreduce_fusion",
    "moe_backend", "env_switches", "attention_backend",
)
"""Columns that say part of an option; a table may lack them."""

BALANCE = {"adp_timeout_iters": 50, "adp_batching_wait_iters": 10}
"""TensorRT-LLM's waits for balance between attention DP's ranks where a script asks for it and says no more
(1.1.0 to 1.3.0, llmapi/llm_args.py: AttentionDpConfig)."""

MOST_PREFILL_TOKENS = 16384
"""SGLang's ``--max-prefill-tokens`` unless a script says it (server_args.py)."""

HEADER = """# How public benchmarks launched engines: what their records of served runs leave out.
# Made by `make launches TABLE=FILE` from the launch scripts of InferenceX (github.com/SemiAnalysisAI/InferenceX) and
# srt-slurm (github.com/NVIDIA/srt-slurm), both Apache-2.0, with their history to 2026-08; do not edit.
# An empty option is the engine's default. Users are the requests in flight of the launches that are alike.
"""


def launches(table: pd.DataFrame) -> pd.DataFrame:
    """The launches of ``table``, those alike as one: :data:`KEY`, ``users`` and the :data:`OPTIONS`."""
    table = table.reindex(columns=list(dict.fromkeys([*table.columns, *READ, *OPTIONS.values()])))
    in_pools = table["mode"] != "agg"
    known = table.assign(
        model=_each(table["serving_model"].fillna(table["hf_model"]), _profiles),
        device=_each(table["device"], lambda name: _name(load_device, name)),
        engine=_each(table["engine"], lambda name: _name(load_engine, name)),
        release=table["engine_release"].fillna("").astype(str),
        gpus=table["tp"].mask(in_pools),
        dp_attn=table["dp_attn"].mask(in_pools),
        all2all_backend=_exchange(table), cuda_graphs=_graphs(table), joins_norms=_joins(table),
        experts_kernels=_experts_kernels(table), attention_kernels=_attention_kernels(table),
    )
    balanced = known["adp_enable_balance"].astype(str).eq("True") & (known["dp_attn"] == 1)
    known = known.assign(**{name: known[name].fillna(own).where(balanced) for name, own in BALANCE.items()})
    known["concurrency"] = _in_flight(known)
    known["max_num_tokens"] = _step_tokens(table)
    known["max_num_seqs"] = _sequences(table)
    known = known[(known["model"] != "") & (known["device"] != "") & (known["engine"] != "")]
    served = _options(known[known["mode"] == "agg"])
    keys = [*KEY, "concurrency"]
    roles = {role: _options(known[known["role"] == role]) for role in ("prefill", "decode")}
    read = roles["prefill"].rename(columns={"experts_kernels": "read_by"})[[*keys, *ROLE, "read_by"]].drop_duplicates()
    pools = roles["decode"].merge(read, on=keys, suffixes=("_own", ""))
    # what both pools ask for; where they differ each is as its engine chooses for its layout
    pools["experts_kernels"] = pools["experts_kernels"].where(pools["experts_kernels"] == pools["read_by"], "")
    both = pd.concat([served.assign(**dict.fromkeys(POOLS, "")), pools])[[*keys, *OPTIONS]].drop_duplicates()
    alike = [name for name in (*KEY, *OPTIONS) if name != "release"]
    both = both.groupby([*alike, "concurrency"])["release"].agg(_together).reset_index()
    both = both.groupby([*alike, "release"])["concurrency"].agg(_together).reset_index()
    return both.rename(columns={"concurrency": "users"})[[*KEY, "users", *OPTIONS]].sort_values([*KEY, "users"])


def _in_flight(table: pd.DataFrame) -> pd.Series:
    """Requests in flight over all workers of a launch."""
    if "recipe_name" not in table:
        return table["concurrency"]
    each, workers = table["recipe_name"].astype(str).str.extract(PER_WORKER).astype(float).to_numpy().T
    whole = each * workers + 2 * (each == 1)
    return table["concurrency"].mask(table["concurrency"] == each, pd.Series(whole, index=table.index))


def _exchange(table: pd.DataFrame) -> pd.Series:
    """Our name of the exchange where it is not the profile's: SGLang's profile takes DeepEP, as its guides ask for it;
    where a script asks for none, tokens are gathered (0.5.14, server_args.py: moe_a2a_backend)."""
    gathers = (table["engine"] == "sglang") & (table["dp_attn"] == 1) & (table["ep"] > 1)
    gathers &= table["all2all_backend"].isna()
    return gathers.map({True: "allgather_reducescatter", False: ""})


GRAPHS = {"FULL": "full", "FULL_DECODE_ONLY": "full", "FULL_AND_PIECEWISE": "full", "PIECEWISE": "piecewise",
          "NONE": "off"}  # fmt: skip
"""vLLM's words for what decode steps are replayed from (config/compilation.py: CUDAGraphMode), and ours."""

JOINS = r'"(?:fuse_allreduce_rms|enable_fi_allreduce_fusion)": ?(true|false)'
"""vLLM's names, of 0.12.0 and after and of before, for joining all-reduces with norms (config/compilation.py)."""


def _graphs(table: pd.DataFrame) -> pd.Series:
    """What a script asks decode steps to be replayed from; empty where it leaves that to the engine."""
    said = table["compilation_config"].astype(str).str.extract(r'"cudagraph_mode": ?"(\w+)"', expand=False)
    off = table["disable_cuda_graph"].astype(str).eq("True") | table["enforce_eager"].astype(str).eq("True")
    return said.map(GRAPHS).fillna("").mask(off, "off")


def _joins(table: pd.DataFrame) -> pd.Series:
    """Whether a script joins all-reduces with norms (``on``), takes them apart, or leaves that to the engine (empty):
    vLLM's compilation config, SGLang's ``--enable-flashinfer-allreduce-fusion``."""
    said = table["compilation_config"].astype(str).str.extract(JOINS, expand=False)
    asked = (table["engine"] == "sglang") & table["allreduce_fusion"].astype(str).eq("True")
    return said.map({"true": "on", "false": "off"}).fillna("").mask(asked, "on")


EXPERTS_KERNELS = {
    "triton": "triton", "triton_kernel": "triton", "cutlass": "cutlass", "flashinfer_cutlass": "cutlass",
    "deepgemm": "deepgemm", "deep_gemm": "deepgemm", "trtllm": "trtllm", "flashinfer_trtllm": "trtllm",
    "flashinfer_trtllm_routed": "trtllm", "flashinfer_mxfp4": "trtllm", "marlin": "marlin",
}
"""Engines' words for whose kernels run experts (``--moe-backend``, ``--moe-runner-backend``, ``moe_config.backend``),
lower case, and ours; CuTe DSL's and fused ones have no tables."""

REFUSED = {"trtllm": r"VLLM_USE_FLASHINFER_MOE_FP8=(?:0|false)\b", "deepgemm": r"VLLM_MOE_USE_DEEP_GEMM=(?:0|false)\b"}
"""Variables of vLLM that take a library away (0.17.0, fused_moe/oracle/fp8.py); without both Triton's is next."""

ASKED = {
    ("fp4", "marlin"): r"VLLM_MXFP4_USE_MARLIN=(?:1|true)\b",
    ("int4", "trtllm"): r"VLLM_USE_FLASHINFER_MOE_INT4=(?:1|true)\b",
}
"""Variables of vLLM that ask for a library, by precision (0.18.0, quantization/mxfp4.py: for Hopper, as SM100's come
before; quantization/utils/flashinfer_mxint4_moe.py: SM100 alone)."""


def _experts_kernels(table: pd.DataFrame) -> pd.Series:
    """Whose experts' kernels a script asks for; empty where it leaves that to the engine."""
    said = table["moe_backend"].astype(str).str.lower().map(EXPERTS_KERNELS).fillna("")
    given = table["env_switches"].astype(str)
    vllm = (table["engine"] == "vllm") & (said == "")
    refused = vllm & (table["precision"] == "fp8")
    for pattern in REFUSED.values():
        refused &= given.str.contains(pattern, case=False)
    said = said.mask(refused, "triton")
    for (precision, library), pattern in ASKED.items():
        said = said.mask(vllm & (table["precision"] == precision) & given.str.contains(pattern, case=False), library)
    return said


ATTENTION_KERNELS = {
    "triton": "triton", "triton_attn": "triton", "trtllm_mha": "trtllm", "flashinfer": "flashinfer",
    "fa3": "flash_attention", "fa4": "flash_attention", "flash_attn": "flash_attention",
}
"""Engines' words for whose kernels run attention (``--attention-backend``), lower case, and ours, latents' left out;
vLLM's ``flashinfer`` is what it takes for TensorRT-LLM's on Blackwell."""


def _attention_kernels(table: pd.DataFrame) -> pd.Series:
    """Whose attention kernels a script asks for; empty where it leaves that to the engine."""
    return table["attention_backend"].astype(str).str.lower().map(ATTENTION_KERNELS).fillna("")


def _step_tokens(table: pd.DataFrame) -> pd.Series:
    """Prompt tokens of a data-parallel rank's step. SGLang divides ``--chunked-prefill-size`` by the ranks (0.5.14,
    server_args.py, _handle_data_parallelism) and fills a step up to ``--max-prefill-tokens`` (schedule_policy.py)."""
    said = table["max_num_tokens"]
    if "max_prefill_tokens" not in table:
        return said
    ranks = table["tp"].where(table["dp_attn"] == 1, 1)
    cut = (said // ranks).clip(upper=table["max_prefill_tokens"].fillna(MOST_PREFILL_TOKENS))
    return said.mask((table["engine"] == "sglang") & (said > 0), cut).where(said > 0)


def _sequences(table: pd.DataFrame) -> pd.Series:
    """Sequences of a data-parallel rank's step. SGLang divides ``--max-running-requests`` by the ranks (0.5.14,
    model_executor/model_runner_kv_cache_mixin.py, _resolve_max_num_reqs)."""
    ranks = table["tp"].where((table["engine"] == "sglang") & (table["dp_attn"] == 1), 1)
    return (table["max_num_seqs"] // ranks).clip(lower=1)


def _together(values: pd.Series) -> str:
    return ";".join(map(str, sorted(set(values))))


def _options(table: pd.DataFrame) -> pd.DataFrame:
    out = table[[*KEY, "concurrency"]].assign(**{ours: table[theirs] for ours, theirs in OPTIONS.items()})
    out["kv_dtype"] = out["kv_dtype"].map(lambda said: "fp8" if str(said).startswith("fp8") else "")
    out["state_dtype"] = out["state_dtype"].astype(str).str.extract(STATES, expand=False).fillna("")
    drafts = pd.to_numeric(table["spec_depth"]) > 0
    ahead = drafts & table["env_switches"].astype(str).str.contains(OVERLAPS, case=False)
    out["draft_overlap"] = ahead.map({True: "on", False: ""})
    numbers = [name for name in OPTIONS if name not in ("kv_dtype", "state_dtype", *WORDS)]
    for name in (*POOLS, "gpus", "dp_attn", "isl", "osl", "concurrency", *numbers):
        out[name] = out[name].map(lambda value: "" if pd.isna(value) else f"{float(value):.7g}")
    out["concurrency"] = out["concurrency"].astype(int)
    return out


def _each(names: pd.Series, ours: Callable[[str], str]) -> pd.Series:
    return names.map({name: ours(name) for name in names.dropna().unique()}).fillna("")


def _profiles(names: str) -> str:
    """Our profiles of a list of names; empty where one of them is not known."""
    try:
        return ";".join(sorted({understand(name).profile.name for name in names.split(";")}))
    except InputError:
        return ""


def _name(load: Any, name: str) -> str:
    try:
        return str(load(name).name)
    except InputError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="launch options of public benchmarks, as a table in the profiles")
    parser.add_argument("--table", type=Path, required=True, help="CSV, a row per launch")
    parser.add_argument("--profiles", type=Path, required=True, help="folder of profiles")
    asked = parser.parse_args()
    text = io.StringIO()
    launches(pd.read_csv(asked.table, low_memory=False)).to_csv(text, index=False, lineterminator="\n")
    target = asked.profiles / "records" / "launches.csv"
    target.parent.mkdir(exist_ok=True)
    write_atomically(target, HEADER + text.getvalue())


if __name__ == "__main__":
    main()
