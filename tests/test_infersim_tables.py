"""H20 and H800 as InferSim's files hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tensorcast.calibrate import infersim_tables
from tensorcast.calibrate.infersim_tables import read_system, rows_of


def write(folder: Path, name: str, *lines: str) -> None:
    path = folder / "bench_data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def test_every_table_in_our_words(tmp_path: Path) -> None:
    """Attention by heads in the file's name, also where a table lacks its first line; both products of experts added;
    decode attention that takes as long as its launch counted out."""
    write(tmp_path, "gemm/h20/data.csv", "m,k,n,latency_us,mfu", "16,2048,6144,10.63,0.1")
    write(tmp_path, "gemm/h800/data.csv", "m,k,n,latency_us,mfu", "16,2048,6144,99,0.1")
    write(tmp_path, "mha/decode/h20/64-2-128.csv", "bf16,bf16,1,1024,25.5,0.01", "bf16,bf16,16,4096,83.2,0.3")
    write(tmp_path, "mla/decode/h20/128-512-64.csv", "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu",
          "bf16,fp8,32,4096,413.9,0.6")
    write(tmp_path, "mha/prefill/h20/16-1-256.csv", "dtype,seq_len,latency_us,mfu", "bf16,1024,90.1,0.6")
    head = "num_experts,num_gpus,num_local_experts,topk,hidden_size,intermediate_size,batch_size_per_gpu,"
    write(tmp_path, "grouped_gemm/decode/h20/data.csv", head + "tokens_per_expert,up_proj_us,up_mfu,down_proj_us,down",
          "96,4,24,8,2048,1560,32,10,350,0.03,188,0.03")
    assert infersim_tables.holds(tmp_path)
    read = read_system(tmp_path, infersim_tables.SYSTEMS["h20"])
    assert {key: (1e6 * rows.seconds).round(4).tolist() for key, rows in read.kernels.items()} == {
        ("gemm", "fp8_block", "any", ""): [10.63], ("attention_decode", "bf16", "any", ""): [83.2],
        ("mla_decode", "fp8", "any", ""): [413.9], ("attention_prefill", "bf16", "any", ""): [90.1],
        ("grouped_gemm", "fp8_block", "any", "masked"): [538.0], ("grouped_gemm", "fp8_block", "any", ""): [538.0],
    }
    decode = read.kernels["attention_decode", "bf16", "any", ""].columns
    assert [float(decode[name][0]) for name in ("batch", "past", "q_heads", "kv_heads", "head_dim")] == [
        16, 4095, 64, 2, 128,
    ]
    experts = read.kernels["grouped_gemm", "fp8_block", "any", ""].columns
    assert experts["moe_ep"][0] == 4 and 9.4 < experts["tokens"][0] * 8 / 96 < 9.6
    assert sum(read.dropped.values()) == 1


def test_rows_of_an_expert_by_drawing_them() -> None:
    """0.7 to 1.3 times the stated number, rounded down, as its benchmark draws them: of one row half have none."""
    stated = np.array([1.0, 2.0, 5.0, 64.0])
    drawn = np.floor(stated * np.random.default_rng(0).uniform(0.7, 1.3, (200_000, 1))).mean(axis=0)
    assert np.allclose(rows_of(stated), drawn, rtol=0.01)
