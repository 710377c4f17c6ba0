"""Reading profiles: the user's own folder, local models, and one clear line for each way a file can be wrong."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tensorcast.profiles as profiles
from tensorcast.cli import app
from tensorcast.errors import InputError
from tensorcast.profiles import kept as kept_profiles

DEVICE = """
name: {name}
aliases: [{alias}]
vendor: Test
architecture: Test
description: a device for tests
sources: {{sheet: "https://example.org"}}
processors: 10
peak_flops:
  bf16: {{value: 4.8e12, source: sheet}}
memory_bytes: {{value: 80e9, source: sheet}}
memory_bandwidth_bytes_per_s: {{value: 1e12, source: sheet}}
interconnect:
  - name: link
    size: 8
    bandwidth_bytes_per_s: {{value: 1e11, source: sheet}}
    latency_s: {{value: 2.0e-6, source: sheet}}
"""

MODEL = """
name: {name}
aliases: [{alias}]
hf_id: {hf_id}
description: a model for tests
sources: {{config: "https://example.org/config.json"}}
config: {{model_type: llama, rms_norm_eps: 1e-05}}
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's profile directory, empty and in use."""
    for folder in ("models", "devices", "engines"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv(profiles.USER_DIRECTORY, str(tmp_path))
    return tmp_path


def device(user: Path, name: str = "mine", alias: str = "my-alias") -> Path:
    path = user / "devices" / f"{name}.yaml"
    path.write_text(DEVICE.format(name=name, alias=alias))
    return path


def complaint(load: Callable[[Any], Any], name: object) -> str:
    with pytest.raises(InputError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_user_profiles_come_first_and_are_listed(user: Path) -> None:
    device(user, "mine")
    device(user, "h200-sxm", alias="other")
    assert {"mine", "h100-sxm"} <= set(profiles.list_devices())
    assert profiles.load_device("MY-ALIAS").name == "mine"
    assert profiles.load_device("h200-sxm").vendor == "Test"
    assert float(profiles.load_device("mine").peak_flops["bf16"]) == 4.8e12
    # The shipped file is hidden with its aliases.
    assert profiles.list_devices().count("h200-sxm") == 1
    assert "unknown device 'h200'" in complaint(profiles.load_device, "h200")


def test_user_alias_wins_over_a_shipped_alias(user: Path) -> None:
    device(user, "mine", alias="h200")
    assert profiles.load_device("h200").name == "mine"


def test_files_may_be_named_by_path(user: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.yml"
    elsewhere.write_text(DEVICE.format(name="mine", alias="x"))
    assert profiles.load_device(elsewhere).name == "mine"
    assert "no such file" in complaint(profiles.load_device, tmp_path / "absent.yaml")


def test_missing_user_directory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(profiles.USER_DIRECTORY, str(tmp_path / "absent"))
    assert "TENSORCAST_PROFILES" in complaint(profiles.load_device, "h200")


@pytest.mark.parametrize(
    ("load", "name", "near"),
    [
        (profiles.load_model, "deepsek-v3", "deepseek-v3"),
        (profiles.load_model, "qwen3-235b-a22", "qwen3-235b-a22b"),
        (profiles.load_device, "h20o-sxm", "h200-sxm"),
        (profiles.load_engine, "vlm", "vllm"),
    ],
)
def test_unknown_names_come_with_the_nearest(load: Callable[[Any], Any], name: str, near: str) -> None:
    message = complaint(load, name)
    assert repr(name) in message and near in message


def test_unknown_name_far_from_all_lists_all() -> None:
    assert "known: eager, sglang, trtllm, vllm" in complaint(profiles.load_engine, "zzzzzz")


def test_an_alias_claimed_twice_is_refused(user: Path) -> None:
    device(user, "first", alias="both")
    device(user, "second", alias="both")
    message = complaint(profiles.load_device, "both")
    assert "first.yaml" in message and "second.yaml" in message
    assert profiles.load_device("first").name == "first"


def test_a_name_other_than_the_file_name_is_refused(user: Path) -> None:
    edit(device(user), "name: mine", "name: yours")
    assert "'yours' must equal the file's name, 'mine'" in complaint(profiles.load_device, "mine")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("vendor: Test", "vendor: [Test", "line"),  # never closed
        ("processors: 10", "processors: 10\n   odd: 1", "line 9"),
        ("processors: 10", "processors: 10\nprocessors: 11", "line 9: broken YAML: key 'processors' is given twice"),
        ("processors: 10", "processors: \x07", "broken YAML"),
    ],
)
def test_broken_yaml_names_file_and_line(user: Path, old: str, new: str, expected: str) -> None:
    path = device(user)
    edit(path, old, new)
    message = complaint(profiles.load_device, "mine")
    assert str(path) in message and "broken YAML" in message and expected in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("processors: 10", "processors: 0", "processors: 0: input should be greater than or equal to 1"),
        ("processors: 10", "processors: many", "processors: 'many': input should be a valid integer"),
        ("processors: 10", "processor: 10", "processor: no such field: did you mean processors? (+1 more)"),
        ("vendor: Test\n", "", "vendor: this field is missing"),
        ("vendor: Test\narchitecture: Test\n", "", "vendor: this field is missing, as is architecture"),
        ("value: 80e9", "value: -1", "memory_bytes.value: -1: input should be greater than 0"),
        ("value: 80e9", "value: lots", "memory_bytes.value: 'lots': must be a number, such as 4.8e12"),
        ("value: 80e9", "value: true", "memory_bytes.value: True: must be a number, such as 4.8e12"),
        ("value: 80e9", "value: .inf", "memory_bytes.value"),
        ("{value: 80e9, source: sheet}", "{value: 80e9}", "memory_bytes.source: this field is missing"),
        ("{value: 80e9, source: sheet}", "80e9", "memory_bytes: "),
        ("  bf16:", "  bf17:", "peak_flops.bf17: 'bf17': input should be 'fp32'"),
        ("  bf16:", "  fp32:", "peak_flops needs bf16 or fp16"),
        ("latency_s", "latency", "interconnect.0.latency: no such field: did you mean latency_s?"),
        ("processors: 10", "processors: 10\ncolour: red", "colour: no such field: known: aliases"),
    ],
)
def test_wrong_fields_are_named(user: Path, old: str, new: str, expected: str) -> None:
    path = device(user)
    edit(path, old, new)
    message = complaint(profiles.load_device, "mine")
    assert message.startswith(f"{path}: ") and expected in message


def test_tiers_must_grow(user: Path) -> None:
    path = device(user)
    tier = path.read_text()[path.read_text().index("  - name") :]
    path.write_text(path.read_text() + tier)
    message = complaint(profiles.load_device, "mine")
    assert "interconnect: tier sizes must grow" in message


def test_an_empty_file_is_no_profile(user: Path) -> None:
    (user / "devices" / "empty.yaml").write_text("")
    assert "mapping" in complaint(profiles.load_device, "empty")


def test_a_binary_file_is_no_profile(user: Path) -> None:
    (user / "devices" / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read" in complaint(profiles.load_device, "binary")
    # It must not keep the others from being found by alias.
    assert profiles.load_device("h200").name == "h200-sxm"


@pytest.mark.parametrize("content", [b"vendor: [", b"on: 2020-13-45", b"\xff\xfe", b"- a", b"name: a\x00b"])
@pytest.mark.parametrize(
    ("kind", "shipped", "load"),
    [
        ("device", "h200-sxm", profiles.load_device),
        ("model", "deepseek-ai/DeepSeek-V3", profiles.load_model),
        ("engine", "vllm", profiles.load_engine),
    ],
)
def test_a_broken_file_breaks_itself_alone(
    user: Path, kind: str, shipped: str, load: Callable[[Any], Any], content: bytes
) -> None:
    """Listed, with one line where it is asked for; every other profile can be read."""
    (user / f"{kind}s" / "aaa.yaml").write_bytes(content)
    assert "aaa" in getattr(profiles, f"list_{kind}s")()
    assert "aaa.yaml" in complaint(load, "aaa")
    assert load(shipped)
    result = CliRunner().invoke(app, [f"{kind}s", "--json"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "aaa.yaml" in result.stderr
    names = {row["name"] for row in json.loads(result.stdout)}
    assert names == set(getattr(profiles, f"list_{kind}s")()) - {"aaa"}


def test_an_alias_that_a_broken_file_may_have_had(user: Path) -> None:
    (user / "devices" / "h200-sxm.yaml").write_text("aliases: [h200\nvendor: [")
    message = complaint(profiles.load_device, "h200")
    assert "unknown device 'h200'" in message and "h200-sxm.yaml, line 2: broken YAML" in message


def test_a_broken_profile_does_not_hide_its_alias(user: Path) -> None:
    edit(device(user), "processors: 10", "processors: [")
    assert "mine.yaml" in complaint(profiles.load_device, "my-alias")


def test_models_by_hugging_face_id(user: Path) -> None:
    (user / "models" / "tiny.yaml").write_text(MODEL.format(name="tiny", alias="t", hf_id="Org/Tiny-1B"))
    model = profiles.load_model("org/tiny-1b")
    assert model.name == "tiny"
    assert model.config["rms_norm_eps"] == 1e-05
    assert profiles.load_model("deepseek-ai/DeepSeek-V3").name == "deepseek-v3"


def local_model(tmp_path: Path, content: str) -> Path:
    directory = tmp_path / "My-Model"
    directory.mkdir()
    (directory / "config.json").write_text(content)
    return directory


def test_a_local_model_directory_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    directory = local_model(tmp_path, json.dumps(config))
    monkeypatch.chdir(tmp_path)
    for name in (directory, directory / "config.json", str(directory), "./My-Model", "My-Model"):
        model = profiles.load_model(name)
        assert model.name == "My-Model"
        assert model.config == config
        assert "2 layers" in model.description and "4 experts, top-2" in model.description
        assert "My-Model" in model.sources["config"]


def test_a_known_name_wins_over_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepseek-v3").mkdir()
    (tmp_path / "deepseek-v3" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.chdir(tmp_path)
    assert profiles.load_model("deepseek-v3").config["model_type"] == "deepseek_v3"
    assert profiles.load_model("./deepseek-v3").config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "is an object"),
        ('{"hidden_size": 1}', "model_type is missing"),
        ('{"model_type": 3}', "model_type is missing"),
    ],
)
def test_bad_config_json(tmp_path: Path, content: str, expected: str) -> None:
    message = complaint(profiles.load_model, local_model(tmp_path, content))
    assert "config.json" in message and expected in message


def test_a_directory_without_config_json(tmp_path: Path) -> None:
    assert "no config.json there" in complaint(profiles.load_model, tmp_path)
    assert "no such file or directory" in complaint(profiles.load_model, "./not-there")


def test_loading_by_name_reads_one_file(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    for name in ("read_text", "read_bytes"):
        original = getattr(Path, name)

        def spy(path: Path, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            read.add(path.name)
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, spy)
    profiles.load_model("Mixtral-8x7B")
    assert {name for name in read if name.endswith(".yaml")} == {"mixtral-8x7b.yaml"}


def test_every_shipped_profile_is_the_same_when_read_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, engines = profiles.list_devices(), profiles.list_engines()
    names = [("model", name) for name in profiles.list_models()[:8]]
    names += [("device", name) for name in devices] + [("engine", name) for name in engines]
    load = {"model": profiles.load_model, "device": profiles.load_device, "engine": profiles.load_engine}
    monkeypatch.setenv("TENSORCAST_CACHE", "off")
    fresh = [load[kind](name) for kind, name in names]
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    first, again = ([load[kind](name) for kind, name in names] for _ in range(2))
    assert fresh == first == again and len(list((tmp_path / "profiles").iterdir())) == len(names)
    for kept in (tmp_path / "profiles").iterdir():  # damaged
        kept.write_text("{")
    assert [load[kind](name) for kind, name in names] == fresh


class _Foreign:
    """Something that another program would like to have run where a profile is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_kept_makes_profiles_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path))
    fresh = profiles.load_device("h200")
    (kept,) = (tmp_path / "profiles").iterdir()
    for other in (_Foreign(tmp_path / "touched"), profiles.load_engine("vllm"), {"name": "h200"}):
        kept.write_bytes(pickle.dumps(other))
        assert profiles.load_device("h200") == fresh
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["Path", "Path.touch", "hashlib.sha256", "keep"])
def test_what_a_module_of_profiles_imports_is_no_part_of_a_profile(name: str) -> None:
    reader = kept_profiles._Profiles(io.BytesIO(pickle.dumps(0, protocol=5)))
    reader.load()  # from protocol 4 on, a name may have dots
    with pytest.raises(pickle.UnpicklingError, match="no part of a profile"):
        reader.find_class("tensorcast.profiles.kept", name)


def test_a_changed_file_is_read_anew(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORCAST_CACHE", str(tmp_path / "cache"))
    text, file = DEVICE.format(name="mine", alias="my"), tmp_path / "mine.yaml"
    for description in ("first", "second"):
        file.write_text(text.replace("a device for tests", description), encoding="utf-8")
        assert [profiles.load_device(file).description for _ in range(2)] == [description] * 2
    file.write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(InputError, match="this field is missing"):
        profiles.load_device(file)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, tensorcast.profiles; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "pydantic", "yaml"} & set(loaded)
