"""Finding profile files by name, alias, Hugging Face id or path, and reading them into checked objects.

Folders searched, first match wins: the user's (``TENSORCAST_PROFILES``), then the shipped ones. Each holds ``models/``,
``devices/`` and ``engines/`` with one ``NAME.yaml`` per profile. Nothing heavy is imported before a file is read. Every
call returns an object that nobody changes; checked profiles are kept on disk, beside the traces."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tensorcast.errors import InputError, unknown_name
from tensorcast.profiles.beside_config import with_quantization
from tensorcast.profiles.kept import keep, kept_file, read_kept
from tensorcast.profiles.network.like import described_like
from tensorcast.profiles.network.unshipped import why_unshipped
from tensorcast.profiles.releases import at_release

if TYPE_CHECKING:
    from tensorcast.profiles.device import DeviceProfile
    from tensorcast.profiles.engine import EngineProfile
    from tensorcast.profiles.model import ModelProfile
    from tensorcast.profiles.sourced import Frozen

    ProfileT = TypeVar("ProfileT", bound=Frozen)

USER_DIRECTORY = "TENSORCAST_PROFILES"
"""Environment variable naming a folder of the user's own profiles."""

_SUFFIXES = (".yaml", ".yml", ".json")
_HEAD = re.compile(r"^(?:name|aliases|hf_id):.*(?:\n[ \t-].*)*", re.MULTILINE)
_PLAIN_ALIASES = re.compile(r"^aliases: \[([\w./ ,-]*)\]$", re.MULTILINE)


def load_model(name: str | os.PathLike[str]) -> ModelProfile:
    """Model profile by name, alias, Hugging Face id, YAML path, ``config.json`` path or directory that holds one.

    A known name wins over a directory of that name in the working directory; ``./NAME`` or ``ORG/NAME`` means the
    directory where there is one, as in transformers. Raises :class:`InputError`, one line, on any bad input.
    """
    from tensorcast.profiles.model import ModelProfile

    text = os.fspath(name)
    directory = Path(text).expanduser()
    if text and os.path.isdir(directory) and (_is_path(text) or _find("model", text) is None):
        return _model_from_config(directory / "config.json")
    path = _path_of("model", text)
    return _model_from_config(path) if path.suffix == ".json" else _read(path, ModelProfile)


def load_device(name: str | os.PathLike[str]) -> DeviceProfile:
    """Device profile by name, alias or YAML path. Raises :class:`InputError`, one line, on any bad input."""
    from tensorcast.profiles.device import DeviceProfile, timed_as

    found = _read(_path_of("device", os.fspath(name)), DeviceProfile)
    return timed_as(found, lambda lender: _read(_path_of("device", lender), DeviceProfile))


def device_path(name: str | os.PathLike[str]) -> Path:
    """The file that :func:`load_device` reads."""
    return _path_of("device", os.fspath(name))


def load_engine(name: str | os.PathLike[str]) -> EngineProfile:
    """Engine profile by name, alias or YAML path; of its newest release, or of another as ``NAME==RELEASE``.

    Raises :class:`InputError`, one line, on any bad input.
    """
    from tensorcast.profiles.engine import EngineProfile

    text, _, release = os.fspath(name).partition("==")
    return _read(_path_of("engine", text.strip()), EngineProfile, release.strip())


def list_models() -> tuple[str, ...]:
    """Names of all models, shipped and the user's, sorted. Reads no file."""
    return _names("model")


def list_devices() -> tuple[str, ...]:
    """Names of all devices, shipped and the user's, sorted. Reads no file."""
    return _names("device")


def list_engines() -> tuple[str, ...]:
    """Names of all engines, shipped and the user's, sorted. Reads no file."""
    return _names("engine")


PACKAGE = Path(__file__).resolve().parent.parent


def profile_roots() -> tuple[Path, ...]:
    """Folders that are searched, in order. Raises :class:`InputError` where the user's is missing."""
    roots = []
    if user := os.environ.get(USER_DIRECTORY):
        if not Path(user).expanduser().is_dir():
            raise InputError(f"{USER_DIRECTORY}={user}: no such directory")
        roots.append(Path(user).expanduser())
    for shipped in (PACKAGE / "_profiles", PACKAGE.parent / "profiles"):  # inside a wheel; in a checkout
        if (shipped / "models").is_dir():
            return (*roots, shipped)
    raise InputError(f"no profiles beside the package at {PACKAGE}: reinstall tensorcast")


# Finding
LONGEST_NAME, LONGEST_PATH = 255, 4000
"""Bytes of a file's name and characters of a path that systems take."""


def _is_path(text: str) -> bool:
    return text.lower().endswith(_SUFFIXES) or os.sep in text or text.startswith("~") or text in (".", "..")


def _path_of(kind: str, text: str) -> Path:
    """File of the profile called ``text``, which may itself be the path of a YAML or JSON file."""
    if max(map(len, text.encode().split(os.sep.encode()))) > LONGEST_NAME or len(text) > LONGEST_PATH:
        raise InputError(f"{kind} {text[:40]!r}...: the name is too long, {len(text)} characters")
    path = Path(text).expanduser()
    if text.lower().endswith(_SUFFIXES):
        if not path.is_file():
            raise InputError(f"{kind} file {text}: {'is a directory' if path.is_dir() else 'no such file'}")
        return path
    if found := _find(kind, text) or (_find(kind, re.sub("[ _]+", "-", text)) if kind != "model" else None):
        return found
    folder = " or a directory with a Hugging Face config.json" if kind == "model" else ""
    if path.is_file() or (path.exists() and _is_path(text)):
        what = "a directory" if path.is_dir() else "a file of another kind"
        raise InputError(f"{kind} {text}: is {what}; give a name, a profile (NAME.yaml){folder}")
    if text.startswith((".", "~", os.sep)):
        raise InputError(f"{kind} {text}: no such file or directory")
    if not text:
        raise InputError(f"{kind}: the name is empty; `tensorcast {kind}s` lists them")
    unshipped = kind == "model" and why_unshipped(text, profile_roots()[-1])
    unknown = unshipped or unknown_name(kind, text, _names(kind), _short(kind, tuple(_files(kind))))
    # one that cannot be read may have had the name among its aliases
    raise InputError("; ".join([str(unknown), *_unreadable(kind)]))


def _find(kind: str, text: str) -> Path | None:
    """File whose stem, alias or Hugging Face id is ``text``, whatever its case; None where there is none."""
    wanted = text.casefold()
    files = list(_files(kind))
    for path in files:
        if path.stem.casefold() == wanted:
            return path
    # Names failed: read the heads of all files, folder by folder, so that the user's aliases come first.
    for root in dict.fromkeys(path.parent for path in files):
        stamps = {path: os.path.getmtime(path) for path in files if path.parent == root and path.exists()}
        found = [path for path, stamp in stamps.items() if wanted in _aliases(path, wanted, stamp)]
        if len(found) > 1:
            owners = " and ".join(path.name for path in found)
            raise InputError(f"{kind} alias {text!r} is claimed by {owners} in {root}: it must name one")
        if found:
            return found[0]
    return None


def _files(kind: str) -> Iterator[Path]:
    seen: set[str] = set()
    for root in profile_roots():
        folder = root / f"{kind}s"
        for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
            if name.endswith((".yaml", ".yml")) and (stem := os.path.splitext(name)[0].casefold()) not in seen:
                seen.add(stem)
                yield folder / name


def _unreadable(kind: str) -> list[str]:
    """What is wrong with each of the user's files that is no YAML."""
    found = []
    for path in _files(kind):
        if path.parent.parent == profile_roots()[-1]:  # shipped
            continue
        try:
            _load_yaml(path)
        except InputError as error:
            found.append(str(error))
    return found


def _names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _files(kind)))


@functools.cache
def _short(kind: str, files: tuple[Path, ...]) -> set[str]:
    return {one for path in files if kind == "device" for one in _aliases(path, "")}

@functools.lru_cache(maxsize=4096)
def _aliases(path: Path, wanted: str, stamp: float = 0.0) -> set[str]:  # which changes with the file
    """Case-folded aliases and Hugging Face id of a profile, from its first lines alone. Empty if unreadable, or if
    ``wanted`` is nowhere among those lines; a plain list on one line that has ``wanted`` is read without YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return set()  # whoever asks for this profile by name is told what is wrong with it
    lines = "\n".join(_HEAD.findall(text)) if wanted in text.casefold() else ""
    if wanted not in lines.casefold():
        return set()
    listed: Any = {alias.strip() for plain in _PLAIN_ALIASES.findall(lines) for alias in plain.casefold().split(",")}
    if wanted in listed:
        return listed
    import yaml

    try:
        head = yaml.load(lines, Loader=_loader())
    except (ValueError, yaml.YAMLError):
        return set()
    head = head if isinstance(head, dict) else {}
    listed = aliases if isinstance(aliases := head.get("aliases"), list) else []
    return {str(alias).casefold() for alias in (*listed, head.get("hf_id")) if alias}


# Reading


def _read(path: Path, kind: type[ProfileT], release: str = "") -> ProfileT:
    kept = kept_file(path, release)
    profile = read_kept(kept, kind)
    if profile is None:
        content = _content(path)
        if "releases" in kind.model_fields:
            content = at_release(content, release)
        profile = _validated(path, kind, content)
        keep(kept, profile)
    name = getattr(profile, "name", path.stem)
    in_store = any(path.parent.parent == root for root in profile_roots())
    if in_store and name != path.stem:
        # Files are found by their stem, so a different name inside would be unreachable.
        raise InputError(f"{path}: name: {name!r} must equal the file's name, {path.stem!r}")
    return profile


def _content(path: Path) -> dict[str, Any]:
    content = _load_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: a profile is a mapping of fields, this is a {type(content).__name__}")
    if isinstance(named := content.get("model"), str) and ".py:" in named:  # a file beside the profile
        content["model"] = str(path.resolve().parent / Path(named).expanduser())
    return content


def _load_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        reason = error.problem or error.context or "not YAML"
        raise InputError(f"{path}{line}: broken YAML: {_one_line(reason)}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML: {_one_line(error)}") from None
    except RecursionError:
        raise InputError(f"{path}: cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, a date that is none
        raise InputError(f"{path}: cannot be read: {_one_line(getattr(error, 'strerror', None) or error)}") from None


@functools.cache
def _loader() -> Any:
    """The loader class to hand to ``yaml.load``; the C parser where PyYAML was built with it (10 times faster)."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class ProfileLoader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            # PyYAML keeps the last of two equal keys and says nothing: half of an edit would be lost.
            seen: set[str] = set()
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"key {key.value!r} is given twice", key.start_mark
                        )
                    seen.add(key.value)
            mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
            return mapping

    # YAML 1.1 takes an exponent without point or sign for a string.
    ProfileLoader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return ProfileLoader


def _model_from_config(path: Path) -> ModelProfile:
    """Profile of a bare Hugging Face ``config.json``, named after its directory."""
    import json

    from tensorcast.profiles.model import ModelProfile
    from tensorcast.profiles.vision.processors import said_beside

    if not path.is_file():
        raise InputError(f"model {path.parent}: no config.json there (a Hugging Face model directory has one)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}: cannot be read: nested too deeply") from None
    except (OSError, ValueError) as error:  # ValueError: bytes that are no text, a number of thousands of digits
        raise InputError(f"{path}: cannot be read: {_one_line(error)}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: a config.json is an object, this is a {type(config).__name__}")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{path}: model_type is missing; every Hugging Face config.json names one, such as qwen3_moe")
    name = (folder := path.resolve().parent).name or "model"
    content = {
        "name": name, "hf_id": str(config.get("_name_or_path") or name), "description": _describe(config),
        "sources": {"config": str(path)}, "config": with_quantization(config, folder),
        **described_like(config["model_type"], _files("model"), profile_roots()[-1]), **said_beside(config, folder),
    }  # fmt: skip
    return _validated(path, ModelProfile, content)


def _special_float(pairs: dict[str, Any]) -> Any:
    """``{"__float__": "Infinity"}``, as transformers writes what JSON has no number for, as that number."""
    return float(pairs["__float__"]) if set(pairs) == {"__float__"} else pairs


def _describe(config: dict[str, Any]) -> str:
    from tensorcast.profiles.model import EXPERTS, EXPERTS_PER_TOKEN, stated

    parts = [f"{config['model_type']} from a local config.json"]
    if layers := stated(config, ("num_hidden_layers",)):
        parts.append(f"{layers} layers")
    if experts := stated(config, EXPERTS):
        parts.append(f"{experts} experts, top-{stated(config, EXPERTS_PER_TOKEN) or '?'}")
    return "; ".join(parts)


# Saying what is wrong


def _validated(path: Path, kind: type[ProfileT], content: dict[str, Any]) -> ProfileT:
    from pydantic import ValidationError

    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first_problem(error, kind)}") from None


def _first_problem(error: Any, kind: type[Frozen]) -> str:
    """First of pydantic's findings as ``field: value: what would be right``, and how many more there are."""
    import difflib

    problems = error.errors(include_url=False)
    # A misspelt field is reported twice, as missing and as unknown: say the one that shows the typing error.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    location = first["loc"]
    field = ".".join(str(part) for part in location if part != "[key]") or "profile"
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        reason = f"no such field: {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
    elif first["type"] == "missing":
        lacking = [".".join(map(str, problem["loc"])) for problem in problems if problem["type"] == "missing"]
        others = f", as {'is' if len(lacking) == 2 else 'are'} {', '.join(lacking[1:])}" if len(lacking) > 1 else ""
        return f"{field}: this field is missing{others}"
    else:
        message = _one_line(first["msg"].removeprefix("Value error, "))
        value = first["input"]
        shown = "" if isinstance(value, dict | list) else f"{_shortened(repr(value))}: "
        reason = f"{shown}{message[:1].lower()}{message[1:]}"
    more = f" (+{len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{field}: {reason}{more}"


def _fields_at(kind: Any, location: tuple[str | int, ...]) -> list[str]:
    """Names of the fields that the model at ``location`` has; keys of mappings and list positions are passed over."""
    from typing import get_args

    from pydantic import BaseModel

    def model_in(annotation: Any) -> Any:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for part in get_args(annotation) if (found := model_in(part))), None)

    for part in location:
        if part in kind.model_fields:
            kind = model_in(kind.model_fields[part].annotation) or kind
    return sorted(kind.model_fields)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
