"""The wheel: it carries the profiles, and an installed copy works outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(command: Sequence[str | Path], **options: str | Path | dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in place with the hatchling that is installed here: no network, nothing written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT])
    (built,) = folder.glob("tensorcast-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment outside the checkout that holds the wheel; its ``bin``.

    Downloading torch and the rest again would take minutes, so the dependencies are lent: a ``.pth`` file puts this
    environment's site-packages *behind* the new one's. A folder that is added this way has its own ``.pth`` files
    ignored, so an editable install of the checkout is not seen, and the tests below ask which copy was loaded.
    """
    home = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", home])
    scripts = home / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    libraries = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    own = run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    (Path(own) / "lent.pth").write_text("\n".join(libraries) + "\n", encoding="utf-8")
    return scripts


@pytest.fixture
def surroundings(tmp_path: Path) -> dict[str, str]:
    """An environment that says nothing about the checkout, with a trace cache of its own."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "TENSORCAST_PROFILES")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "TENSORCAST_CACHE": str(tmp_path / "cache")}


def test_wheel_carries_profiles_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("models", "devices", "engines", "launch"):
        shipped = {f"tensorcast/_profiles/{kind}/{path.name}" for path in (ROOT / "profiles" / kind).glob("*.yaml")}
        assert shipped and shipped <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tensorcast").rglob("*.py")}
    assert modules <= names
    models = {f"tensorcast/_profiles/calibration/{p.name}" for p in (ROOT / "profiles" / "calibration").glob("*.npz")}
    assert models and models <= names
    kept = ROOT / "profiles" / "traces"
    traces = {f"tensorcast/_profiles/traces/{p.relative_to(kept).as_posix()}" for p in kept.rglob("*.json.xz")}
    assert traces and traces <= names
    templates = {"report.html.j2", "style.css", "table.js"}
    assert {f"tensorcast/report/compare/templates/{name}" for name in templates} <= names
    static = ROOT / "tensorcast" / "explore" / "static"
    page = {path.relative_to(ROOT).as_posix() for path in static.rglob("*") if path.is_file()}
    assert "tensorcast/explore/static/vendor/plot.LICENSE" in page and {*page, "tensorcast/_glossary.md"} <= names
    assert "tensorcast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"tensorcast", wheel.name.split("-py3")[0] + ".dist-info"}


def test_installed_copy_simulates(installed: Path, surroundings: dict[str, str], tmp_path: Path) -> None:
    """The console script, from a folder that is not the checkout."""
    out = run(
        [
            installed / "tensorcast", "simulate", "qwen3-30b-a3b", "--device", "h200", "--world-size", "8", "--tp", "8",
            "--ep", "8", "--phase", "decode", "--batch", "8", "--json",
        ],
        cwd=tmp_path, env=surroundings,
    )
    found = json.loads(out)
    totals = found.get("totals", found)
    assert totals["model"] == "qwen3-30b-a3b" and totals["device"] == "h200-sxm" and totals["world_size"] == 8
    assert 0 < totals["step_s"] < 1 and totals["fits"]
    assert not list((tmp_path / "cache").rglob("qwen3-30b-a3b-decode-tp8-*.json"))  # the wheel's own trace will do


def test_installed_copy_is_the_one_that_runs(installed: Path, surroundings: dict[str, str], tmp_path: Path) -> None:
    code = "import tensorcast, tensorcast.profiles as p; print(tensorcast.__file__); print(p.profile_roots()[0])"
    module, profiles = run([installed / "python", "-c", code], cwd=tmp_path, env=surroundings).splitlines()
    home = installed.parent.resolve()
    assert Path(module).resolve().is_relative_to(home) and Path(profiles).resolve().is_relative_to(home)
    assert Path(profiles).name == "_profiles"
