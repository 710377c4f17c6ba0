"""What was read of released engines, beside our profiles and commands; and the readers on sources of a few lines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launch_spread import RELEASES, few

from tensorcast import InputError
from tensorcast.profiles.launch import load_launch_table
from tensorcast.validate.engines import vllm_facts
from tensorcast.validate.engines.arguments import Argument, deprecated_in, parser_of, refused
from tensorcast.validate.engines.check import Read, differences, read
from tensorcast.validate.engines.command import beside_pinned, release_of
from tensorcast.validate.engines.sglang_arguments import read_arguments as of_sglang
from tensorcast.validate.engines.source import Source, found, literal
from tensorcast.validate.engines.tuned_tiles import tuned_tiles
from tensorcast.validate.engines.vllm_arguments import read_arguments as of_vllm

PINNED = Path(__file__).parent / "data" / "engines"
READ = {(one.engine, one.release): one for one in map(Read.kept, sorted(PINNED.glob("*.json")))}
MANIFEST = READ.pop(("trtllm", "main at 0004396"))
"""Of TensorRT-LLM the keys of its file and their values alone, of the list its own tests keep: no wheel is read."""


@pytest.mark.parametrize("release", READ, ids="-".join)
def test_profiles_say_what_releases_declare(release: tuple[str, str]) -> None:
    """Constants, flags, values: read by `make engines-check` in the wheels of the newest release and the one before."""
    assert differences(READ[release]) == [] and beside_pinned(READ[release], PINNED) == []


def test_every_launched_release_is_pinned() -> None:
    assert set(READ) == {(engine, release) for engine, releases in RELEASES.items() for release in releases}


def test_what_differs_is_told_line_by_line() -> None:
    was = READ["vllm", "0.33.0"]
    facts = {**was.facts, "memory_fraction": 0.9, "step_tokens.from_mib": {"0": 4096, "71680": 8192, "163840": 16384}}
    facts["uncompiled.architectures"] = [*was.facts["uncompiled.architectures"], "NewForCausalLM"]
    facts["lacking.sparse_latents"] = [8, *was.facts["lacking.sparse_latents"]]
    arguments = {name: one for name, one in was.arguments.items() if name != "--enable-dbo"}
    arguments["--enable-eplb"] = Argument(takes="nothing", deprecated="use --eplb")
    kinds = was.arguments["--all2all-backend"].choices
    arguments["--all2all-backend"] = Argument(choices=tuple(one for one in kinds if one != "deepep_high_throughput"))
    assert differences(replace(was, facts=facts, arguments=arguments)) == [
        "lacking.sparse_latents: the release has [8, 9, 10, 12], the profile [9, 10, 12]",
        "memory_fraction: the release has 0.9, the profile 0.92",
        "step_tokens.from_mib.0: the release has 4096, the profile 2048",
        "uncompiled.architectures: the release has NewForCausalLM more, the profile nothing",
        "launch all2all: --all2all-backend has no deepep_high_throughput",
        "launch balance_experts: --enable-eplb is deprecated: use --eplb",
        "launch dual_batch_overlap: no --enable-dbo",
    ]
    said = beside_pinned(replace(was, release="0.34.0", arguments=arguments), PINNED)
    assert said == ["arguments gone since 0.33.0: --enable-dbo",
                    "arguments changed since 0.33.0: --all2all-backend --enable-eplb"]
    newer = differences(replace(was, release="0.34.0"))
    assert newer == ["no rules of 0.34.0: held to those of 0.33.0"]


def test_keys_of_a_file_are_held_to_the_list_an_engine_keeps() -> None:
    newer = "no rules of main at 0004396: held to those of 1.3.0rc20"
    assert differences(MANIFEST) == [newer]
    arguments = {name: one for name, one in MANIFEST.arguments.items() if name != "enable_attention_dp"}
    arguments["moe_config.backend"] = Argument(choices=("CUTLASS",))
    said = differences(replace(MANIFEST, arguments=arguments))
    assert said[0] == newer and "launch attention_dp: no enable_attention_dp" in said
    assert any("moe_config.backend has no TRTLLM" in line for line in said)


@pytest.mark.parametrize("release", READ, ids="-".join)
def test_the_parsers_take_what_is_printed(release: tuple[str, str]) -> None:
    """Every shipped model with some layouts: tp, dp, ep, pp, pools, EPLB, halved batches, drafts, nodes, quantised."""
    engine, _ = release
    declared, table = READ[release].arguments, load_launch_table(engine)
    parser = parser_of(declared, "model" if engine == "vllm" else "")
    commands = list(few(*release))
    assert len(commands) >= 100  # 400 and more of all four
    assert {one.command: why for one in commands if (why := refused(one.command, table.program, parser))} == {}
    assert not any(deprecated_in(one.command, declared) for one in commands)
    assert len({one.model for one in commands}) > 55


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("--tp-size 8", "--tp-size eight"), "argument --tp-size/--tensor-parallel-size: invalid int value: 'eight'"),
        (("--tp-size 8", "--tpsize 8"), "unrecognized arguments: --tpsize 8"),
        (("-backend deepep", "-backend pigeon"), "argument --moe-a2a-backend: invalid choice: 'pigeon'"),
        (("--attn-dp-size 8", "--attn-dp-size"), "argument --attn-dp-size/--attention-data-parallel-size: expected"),
        (("python3 -m sglang.launch_server", "sglang serve"), "the command begins with sglang serve --model-path"),
    ],
)
def test_what_a_parser_refuses(change: tuple[str, str], why: str) -> None:
    words = ("A=1 python3 -m sglang.launch_server --model-path x", "--tp-size 8", "--attn-dp-size 8")
    command = " \\\n  ".join((*words, "--moe-a2a-backend deepep"))
    program, parser = load_launch_table("sglang").program, parser_of(READ["sglang", "0.5.23"].arguments)
    assert refused(command, program, parser) == ""
    assert refused(command.replace(*change), program, parser).startswith(why)


def test_the_deprecated_spelling_is_named() -> None:
    command = "python3 -m sglang.launch_server --model-path x --tp-size 8 --dp-size 8 --enable-dp-attention"
    said = [deprecated_in(command, READ["sglang", release].arguments) for release in ("0.5.14", "0.5.23")]
    assert said == [{}, {"--enable-dp-attention": "use --attn-dp-size <dp-size>"}]
    older = parser_of(READ["sglang", "0.5.14"].arguments)
    program = load_launch_table("sglang").program
    assert "--attn-dp-size" in refused(command.replace("--dp-size", "--attn-dp-size"), program, older)


def written(folder: Path, **files: str) -> Source:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    return Source(folder)


def test_arguments_of_vllm(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        vllm__config__parallel=(
            "Kind = Literal['a', 'b']\nclass P:\n    kind: Kind | None = None\n    size: int = 1\n"
            "    fast: bool = False\n    names: list[str] | None = None\n    max_model_len: int | None = None\n"
            "    more: dict[str, Any] = None\n    what: Kind | str = 'a'\n    share: float = Field(default=0.9)\n"
        ),
        vllm__engine__arg_utils=(
            "class EngineArgs:\n    def add_cli_args(parser):\n        p = get_kwargs(P)\n"
            + "".join(
                f"        g.add_argument('--{name}', **p['{field}'])\n"
                for name, field in (("kind", "kind"), ("size", "size"), ("fast", "fast"), ("names", "names"),
                                    ("len", "max_model_len"), ("more", "more"), ("what", "what"), ("share", "share"))
            )
            + "        g.add_argument('--seqs', '-s', **{**p['size'], 'default': None})\n"
            + "        g.add_argument('--old', action='store_true', help='--old is deprecated')\n"
        ),
        vllm__entrypoints__common__cli_args="class FrontendArgs:\n    port: int = 8000\n    host_name: str = ''\n",
    )  # fmt: skip
    assert of_vllm(source) == {
        "--kind": Argument(choices=("a", "b")), "--size": Argument(kind="int"), "--share": Argument(kind="float"),
        "--fast": Argument(takes="nothing", also=("--no-fast",)), "--names": Argument(takes="+"),
        "--len": Argument(kind="number"), "--more": Argument(kind="json"), "--what": Argument(),
        "--seqs": Argument(kind="int", also=("-s",)),
        "--old": Argument(takes="nothing", deprecated="--old is deprecated"),
        "--port": Argument(kind="int"), "--host-name": Argument(),
    }  # fmt: skip


def test_arguments_of_sglang(tmp_path: Path) -> None:
    source = written(
        tmp_path,
        sglang__srt__arg_groups__choices="KINDS = ['a', 'b']\n",
        sglang__srt__arg_groups__fields__one=(
            "class One:\n    tp_size: A[int, Arg(help='h', aliases=['--tensor'])] = 1\n"
            "    on: A[bool, 'help'] = False\n"
            "    kind: A[Optional[str], Arg(choices=[*KINDS, 'c'])] = None\n    hidden: A[int, Arg(no_cli=True)] = 1\n"
            "    several: A[Optional[List[int]], 'help'] = None\n    plain: int = 3\n"
        ),
        sglang__srt__server_args=(
            "parser.add_argument('--gone', action=DeprecatedStoreTrueAction, new_flag='--here', help='Deprecated.')\n"
            "parser.add_argument('--late', type=str, choices=asked(), nargs=None)\n"
        ),
    )
    assert of_sglang(source) == {
        "--tp-size": Argument(kind="int", also=("--tensor",)), "--on": Argument(takes="nothing"),
        "--kind": Argument(choices=("a", "b", "c")), "--several": Argument(takes="+"),
        "--gone": Argument(takes="nothing", deprecated="use --here"), "--late": Argument(),
    }  # fmt: skip


def test_constants_of_a_source(tmp_path: Path) -> None:
    source = written(tmp_path, one=(
        "A = frozenset({'x', 'y'})\nB: int = Field(default=64 * 1024, gt=0)\nclass C:\n    def f(self):\n"
        "        self.ranks = [2, 4]\n        late = work()\n"
    ))  # fmt: skip
    tree = source.tree("one.py")
    assert [literal(found(tree, name)) for name in ("A", "B", "ranks")] == [{"x", "y"}, 65536, [2, 4]]
    for name, said in (("late", "is no constant any more"), ("D", "not found")):
        with pytest.raises(InputError, match=said):
            literal(found(tree, name))
    with pytest.raises(InputError, match=r"has no two\.py"):
        source.tree("two.py")


def test_tiles_by_their_files(tmp_path: Path) -> None:
    for name in ("E=8,N=7168,device_name=NVIDIA_H200", "E=8,N=2048,device_name=NVIDIA_H200,dtype=bf16",
                 "E=8,N=64,device_name=NVIDIA_H200,dtype=int8_w8a16", "E=8,N=96,device_name=NVIDIA_L4",
                 "E=16,N=128,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128]"):
        (tmp_path / "configs").mkdir(exist_ok=True)
        (tmp_path / "configs" / f"{name}.json").write_text("{}")
    tiles = tuned_tiles(Source(tmp_path), "configs")
    assert tiles == {"h200-sxm": {"bf16": {8: [2048, 7168]}, "fp8_block": {16: [128]}}}


def test_wheels_and_engines_by_name() -> None:
    wheel = Path("vllm-0.33.0-cp38-abi3-manylinux_2_28_x86_64.whl")
    assert release_of(wheel) == ("vllm", "0.33.0")
    with pytest.raises(InputError, match="no wheel's name"):
        release_of(Path("vllm.zip"))
    with pytest.raises(InputError, match="unknown engine to read 'trtllm'"):
        read("trtllm", "1.3.0", Path("x.whl"))


def test_capabilities_of_backends_are_read(tmp_path: Path) -> None:
    """Those for chosen latents alone; what Triton's attention asks before it takes a cache in FP8."""
    folder = tmp_path / "vllm" / "v1" / "attention" / "backends"
    (folder / "mla").mkdir(parents=True)
    for name, said in (("flash_sparse", "in [9, 10]"), ("other_sparse_sm120", "== 12"), ("dense", "== 8")):
        text = f"def supports_compute_capability(cls, capability):\n    return capability.major {said}\n"
        (folder / "mla" / f"{name}.py").write_text(text)
    check = 'if kv_cache_dtype.startswith("fp8") and not (\n    current_platform.has_device_capability(89)\n): raise'
    (folder / "triton_attn.py").write_text(check)
    assert vllm_facts._sparse(Source(tmp_path)) == [9, 10, 12] and vllm_facts._fp8_cache(Source(tmp_path)) == 89
