"""Rules of an engine's releases: which one holds, and what is said of a release that was not read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tensorcast import InputError
from tensorcast.predict.launch_records import rules_of
from tensorcast.profiles.launch import load_launch_table
from tensorcast.profiles.releases import at_release, nearest_release, release_order
from tensorcast.profiles.store import load_engine
from tensorcast.validate.engines import served

ORDERED = ["0.5.9", "0.5.10", "0.5.14", "0.24.0", "1.0.0rc3", "1.0.0", "1.0.0.post1", "1.3.0rc2", "1.3.0rc20", "1.3.0"]


def test_releases_in_their_order() -> None:
    """As PEP 440 has them: numbers by size, candidates before and repairs after their release."""
    assert sorted(reversed(ORDERED), key=lambda one: release_order(one) or ()) == ORDERED
    assert release_order("v0.24.0") == release_order("0.24.0")
    for text in ("nightly-5b8c30d62b754b57", "gpt-oss-dev", "", "main of 03c36d6"):
        assert release_order(text) is None


@pytest.mark.parametrize(
    ("asked", "nearest"), [("0.24.0", "0.24.0"), ("0.29.1", "0.24.0"), ("0.40.0", "0.33.0"), ("0.3.0", "0.19.0")]
)
def test_the_nearest_release_is_no_newer_one_if_there_is_one(asked: str, nearest: str) -> None:
    assert nearest_release(asked, ["0.33.0", "0.24.0", "0.19.0"]) == nearest
    assert nearest_release("nightly", ["0.33.0"]) is None
    repaired = ["0.5.12", "0.5.10.post1", "0.5.9"]
    assert [nearest_release(one, repaired) for one in ("0.5.10", "0.5.10.post2", "0.5.9.post1", "0.5.11")] == [
        "0.5.10.post1", "0.5.10.post1", "0.5.9", "0.5.10.post1",
    ]


CONTENT = {
    "name": "one", "version": "3.0.0", "releases": ["3.0.0", "2.0.0", "1.0.0"],
    "tokens": {"since": {"3.0.0": 16, "1.0.0": 8}},
    "limit": {"since": {"2.0.0": {"of": {"since": {"3.0.0": 5, "2.0.0": 4}}}}},
    "gone": {"since": {"3.0.0": None, "1.0.0": "there"}},
    "nothing": None,
    "classes": ["A", {"since": {"3.0.0": ["C", "D"], "2.0.0": "B"}}, {"rule": {"since": {"2.0.0": 1}}}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("", {"version": "3.0.0", "tokens": 16, "limit": {"of": 5}, "classes": ["A", "C", "D", {"rule": 1}]}),
        ("2.0.0", {"version": "2.0.0", "tokens": 8, "limit": {"of": 4}, "gone": "there",
                   "classes": ["A", "B", {"rule": 1}]}),
        ("1.0.0", {"version": "1.0.0", "tokens": 8, "gone": "there", "classes": ["A", {}]}),
    ],
)  # fmt: skip
def test_a_rule_holds_from_its_release_on(release: str, expected: dict[str, object]) -> None:
    fixed = {"name": "one", "releases": CONTENT["releases"], "nothing": None}
    assert at_release(CONTENT, release) == {**fixed, **expected}


def test_releases_are_a_list() -> None:
    with pytest.raises(InputError, match=r"^one: releases True: must be a list, such as \[3.0.0\]$"):
        at_release({**CONTENT, "releases": True}, "")


def test_every_rule_that_changed_names_releases_that_were_read() -> None:
    """A release among rules that is no listed one would never be asked for."""
    import yaml

    def named(content: object) -> set[str]:
        if isinstance(content, dict):
            own = {str(one) for one in content["since"]} if set(content) == {"since"} else set()
            return own.union(*map(named, content.values())) if content else own
        return set().union(*map(named, content)) if isinstance(content, list) else set()

    for folder in ("engines", "launch"):
        for path in sorted(Path("profiles", folder).glob("*.yaml")):
            content = yaml.safe_load(path.read_text())
            releases = content.get("releases", [content["version"]])
            assert named(content) <= set(releases) and releases[0] == content["version"], path
            assert releases == sorted(releases, key=lambda one: release_order(one) or (), reverse=True), path


def test_engines_by_release() -> None:
    newest, older = load_engine("vllm"), load_engine("vllm==0.24.0")
    assert (newest.version, older.version) == ("0.33.0", "0.24.0")
    assert load_engine("vllm == 0.33.0") == newest and load_engine("sgl==0.5.14").version == "0.5.14"
    assert newest.remark == older.remark == ""  # the newest, and the one that kernels were measured with
    assert load_launch_table("sglang", "0.5.14").flags["attention_dp"].takes == "nothing"
    for name, said in (("vllm==0.29.1", "nearest: 0.24.0"), ("vllm==dev", "nearest: 0.33.0"), ("eager==4", "5.23.0")):
        with pytest.raises(InputError, match=said) as error:
            load_engine(name)
        assert "\n" not in str(error.value)


def test_rules_of_a_row() -> None:
    """Its release's, or the nearest ones read; of a public record without a release those of the runs fitted to."""
    assert rules_of("vllm", "", False) == ("vllm", "", [])
    assert rules_of("vllm==0.24.0", "", False) == ("vllm", "0.24.0", [])
    assert rules_of("vllm", "0.24.0", True) == ("vllm", "0.24.0", [])
    assert rules_of("vllm", "0.29.1", False) == ("vllm", "0.24.0", ["rules of vllm 0.24.0"])
    fitted = load_engine("vllm").calibrated
    assert fitted is not None
    assumed = [f"rules of vllm {fitted.steps}"]
    assert rules_of("vllm", "nightly-5b8c30d62b754b57", True) == ("vllm", fitted.steps, assumed)
    assert rules_of("vllm", "", True) == ("vllm", fitted.steps, [])
    assert rules_of("nobody", "1.0", False) == ("nobody", "1.0", [])


def test_rules_of_a_build_that_names_a_day() -> None:
    """The nearest of the releases' wheels, before or after: 0.5.9 is of 23 February 2026, 0.5.10.post1 of 8 April."""
    for built, rules in (("20260216-d3bae71e", "0.5.9"), ("20260402-d7256eb6", "0.5.10.post1"), ("20260231", "0.5.9"),
                         ("20240101", "0.5.6.post2")):  # fmt: skip
        assert rules_of("sglang", f"nightly-dev-{built}", True)[1] == rules, built
    engine = load_engine("sglang")
    assert {*engine.days} == {*engine.releases}
    assert rules_of("sglang", "0.5.12", True)[1] == "0.5.12"


def test_the_page_of_served_runs_says_how_often_own_rules_are_nearer() -> None:
    rows = [("a", "1", 0.1, 0.3), ("a", "1", 0.2, 0.2), ("a", "2", 0.4, 0.1)]  # one run is priced the same by both
    frame = pd.DataFrame([
        {"engine": engine, "release": release, "rules": release, "own_tpot_s": own, "newest_tpot_s": newest}
        for engine, release, own, newest in rows
    ])  # fmt: skip
    text = served.page(frame, "three runs")
    assert "| a | 1 | 1 | 2 | 15.0 % | 25.0 % |" in text
    assert "of 2 runs that the rules price otherwise own ones are nearer in 1, and in the median in 1 of their" in text
