"""What the page can ask: one field per part of a question, with its words, bounds and choices for the controls.

Options of a deployment tell all this of themselves (:data:`tensorcast.deploy.options.ABOUT`); lengths, limits and load
are told here, once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tensorcast.cost.recordings.named import PREFIX, shipped
from tensorcast.deploy.options import ABOUT, DRAFTING, OPTIONS, SERVED_ROUTING, SWITCHED, flag
from tensorcast.deploy.plan.plan import COMBINES
from tensorcast.modeling.quantization import KV_DTYPES, SCHEMES
from tensorcast.profiles.drafting import acceptances
from tensorcast.profiles.store import list_devices, list_engines, list_models
from tensorcast.search.axes import EXCHANGES
from tensorcast.search.search_task import MODES
from tensorcast.serving.objective import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class Field:
    """One control. ``kind``: ``whole``, ``number``, ``choice`` (one of ``choices``), ``several`` (any of them) or
    ``text`` (``choices`` are proposals). ``least`` and ``most`` bound a slider, ``log`` makes its steps even ratios;
    typed values may be larger. ``flag``: how the command line calls it. ``unasked``: what an empty field stands for.
    """

    key: str
    label: str
    group: str
    help: str
    kind: str = "text"
    unit: str = ""
    least: float | None = None
    most: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    """For people, of each choice; its own name where there is none."""
    flag: str = ""
    unasked: str = ""
    default: str = ""

    def described(self) -> dict[str, Any]:
        """For the page."""
        return asdict(self)


LOAD, LIMITS, SEARCH, NUMBERS = "Load", "Limits and price", "What is searched", "Numbers and experts"
DEPLOYMENT = "Deployment"

MODE_WORDS = ("one pool of servers", "two pools, prefill and decode")


def fields() -> tuple[Field, ...]:
    """All of them, in the order of the page."""
    return (*_deployment(), *_load(), *_limits(), *_searched(), *_numerics())


def _deployment() -> tuple[Field, ...]:
    return (
        Field(key="model", label="Model", group=DEPLOYMENT, kind="choice", choices=list_models(), flag="model",
              help="A model profile.", default="deepseek-v3"),
        Field(key="device", label="GPU", group=DEPLOYMENT, kind="several", choices=list_devices(), flag="--device",
              help="Device profiles; several are compared together.", default="h200-sxm"),
        Field(key="world_size", label="GPUs", group=DEPLOYMENT, kind="text", least=1, most=256, log=True,
              flag="--world-size", help="GPUs in all; several sizes as 8,16,32.", default="32"),
        Field(key="engine", label="Engine", group=DEPLOYMENT, kind="several", choices=list_engines(), flag="--engine",
              help="Serving engines whose fusions, limits and overheads hold; several are compared together.",
              default="vllm"),
    )  # fmt: skip


def _load() -> tuple[Field, ...]:
    return (
        Field(key="input_len", label="Prompt", unit="tokens", group=LOAD, kind="whole", least=64, most=131072, log=True,
              flag="--input-len", help="Tokens that a user sends.", default="4096"),
        Field(key="output_len", label="Reply", unit="tokens", group=LOAD, kind="whole", least=16, most=32768, log=True,
              flag="--output-len", help="Tokens that a user reads.", default="1024"),
        Field(key="cached", label="Cached share", unit="%", group=LOAD, kind="number", least=0, most=95,
              flag="--prefix-cached", help="Share of the prompt that is in the prefix cache already.", default="0"),
        Field(key="users", label="Users at once", group=LOAD, kind="whole", least=1, most=16384, log=True,
              flag="--users", help="Requests in flight that the GPUs must hold at least.", unasked="any number"),
        Field(key="request_rate", label="Requests per second", group=LOAD, kind="number", least=0.1, most=500, log=True,
              flag="--request-rate", help="Requests per second that must be served at least; for the fewest GPUs, how "
              "many to plan for.", unasked="any rate"),
    )  # fmt: skip


def _limits() -> tuple[Field, ...]:
    return (
        Field(key="ttft_ms", label="First token within", unit="ms", group=LIMITS, kind="number", least=50, most=30000,
              log=True, flag="--ttft", help="Longest mean time to first token (TTFT).", unasked="no limit",
              default="2000"),
        Field(key="tpot_ms", label="Each token within", unit="ms", group=LIMITS, kind="number", least=2, most=200,
              log=True, flag="--tpot", help="Longest mean time per output token (TPOT).", unasked="no limit",
              default="50"),
        Field(key="price", label="USD per GPU hour", group=LIMITS, kind="text", least=0.5, most=20, log=True,
              flag="--price", help="A price for all, or per device as h200-sxm=2.5,b200=4.", unasked="the list price"),
        Field(key="budget", label="USD per hour", group=LIMITS, kind="number", least=5, most=2000, log=True,
              flag="--budget", help="Most that the GPUs in use may cost per hour.", unasked="any amount"),
        Field(key="confidence", label="Chance to keep limits", group=LIMITS, kind="number", least=0.5, most=0.95,
              flag="--confidence", help="Chance with which each limit is to be kept; lower bounds then decide.",
              unasked="as expected"),
        Field(key="objective", label="Best is", group=LIMITS, kind="choice", choices=tuple(OBJECTIVES),
              words=tuple(f"{'least' if one.less else 'most'} {one.words}" for one in OBJECTIVES.values()),
              flag="--objective", help="What decides between layouts that keep the limits.", default="tokens_per_gpu"),
    )  # fmt: skip


def _searched() -> tuple[Field, ...]:
    return (
        Field(key="mode", label="Serving", group=SEARCH, kind="several", choices=MODES, words=MODE_WORDS, flag="--mode",
              help="One engine for prompts and replies, or a pool of servers for each.", default=",".join(MODES)),
        Field(key="decode_device", label="GPU of replies", group=SEARCH, choices=list_devices(), flag="--decode-device",
              help="Two pools alone: prompts on the GPUs above, replies on this one.", unasked="the same"),
        Field(key="decode_world_size", label="GPUs of replies", group=SEARCH, flag="--decode-world-size",
              help="So many of them; the number above is then of the prompts' GPUs alone.", unasked="of all GPUs"),
        Field(key="layouts", label="Only these layouts", group=SEARCH, flag="--layouts",
              help="Such as tp8-ep8, dp8-ep8; a size left out is 1.", unasked="all"),
        _option("mtp_depth", SEARCH, key="mtp_depth", label="Drafted tokens", choices=("0", "0,1,2", "1", "2"),
                flag="--mtp", unasked="0"),
        _option("speculative_method", SEARCH, label="Drafts by", kind="choice", default="mtp",
                choices=_named_in(ABOUT["speculative_method"].help, DRAFTING)),
        _option("draft_model", SEARCH, label="Draft model", choices=list_models()),
        Field(key="mtp_acceptance", label="Acceptance", group=SEARCH, least=0, most=1, flag="--mtp-acceptance",
              choices=tuple(dict.fromkeys(row.task for row in acceptances())), default="0.8",
              help="Chance that a drafted token is accepted, or a task whose published one is taken, as mt-bench."),
        _option("dcp", SEARCH, label="Cache shared by", choices=("1", "2", "4", "1,2,4"), unasked="1"),
        _option("pcp", SEARCH, label="Prompts read by", choices=("1", "1,2", "1,2,4", "1,2,4,8"), unasked="1"),
        _option("pp_partition", SEARCH, label="Layers by stage"),
        _option("experts_kernels", SEARCH, label="Experts' kernels", kind="choice", default="engine",
                choices=SWITCHED["experts_kernels"]),
        _option("attention_kernels", SEARCH, label="Attention's kernels", kind="choice", default="engine",
                choices=SWITCHED["attention_kernels"]),
        _option("all2all", SEARCH, label="Token exchange", choices=tuple(EXCHANGES), unasked="the first two"),
        _option("chunk_tokens", SEARCH, label="Prefill chunk", unasked="2048,8192,16384",
                help="Prompt tokens per step and rank."),
    )  # fmt: skip


def _numerics() -> tuple[Field, ...]:
    first = (SERVED_ROUTING, "typical")
    routing = (*first, *(one for one in ABOUT["routing"].always if one not in first), "zipf:0.5", "zipf:1")
    return (
        _option("quant", NUMBERS, label="Weights", choices=_named_in(ABOUT["quant"].help, SCHEMES)),
        _option("kv_dtype", NUMBERS, label="KV cache", choices=(*KV_DTYPES, ",".join(KV_DTYPES))),
        _option("state_dtype", NUMBERS, label="Recurrent states",
                choices=tuple(re.findall(r"b?float\d+", ABOUT["state_dtype"].help))),
        _option("routing", NUMBERS, label="Expert load", choices=(*routing, *(PREFIX + name for name in shipped())),
                unasked=SERVED_ROUTING),
        _option("placement", NUMBERS, label="Placement", choices=_named_in(ABOUT["placement"].help, PLACEMENTS),
                unasked=str(OPTIONS["placement"].default)),
        _option("dispatch", NUMBERS, label="Tokens sent in", choices=_named_in(ABOUT["dispatch"].help, SCHEMES)),
        _option("combine", NUMBERS, label="Results back in", choices=tuple(COMBINES)),
    )  # fmt: skip


PLACEMENTS = ("linear", "round_robin", "eplb", "eplb_global", "balanced", "trivial")
"""Policies that are a name alone; those of files are for the command line."""


def _option(name: str, group: str, *, label: str, **more: Any) -> Field:
    """A field of an option, in the words of its own metadata where ``more`` says no others."""
    about = ABOUT[name]
    told: dict[str, Any] = {"key": name, "flag": flag(name), "help": about.help, "unasked": about.unasked}
    return Field(group=group, label=label, **told | more)


def _named_in(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Names of ``known`` that a help text mentions, in its order."""
    names = set(known)
    return tuple(dict.fromkeys(word for word in re.findall(r"[a-z0-9_]+", text) if word in names))
