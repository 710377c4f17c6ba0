"""Arguments and options that several commands take, declared once; ``=`` in a signature gives the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, SEARCH, WORK
from tensorcast.deploy.options import ABOUT, OPTIONS, Options, flag

Model = Annotated[str, typer.Argument(
    help="Name (see [bold]tensorcast models[/bold]), profile file, directory with a Hugging Face config.json, or a "
    "shipped one's checkpoint, as nvidia/DeepSeek-R1-0528-NVFP4.",
    show_default=False,
)]
Device = Annotated[str, typer.Option(
    "--device", "-d", help="Name (see [bold]tensorcast devices[/bold]) or profile file; cpu is this machine.",
    show_default=False, rich_help_panel=DEPLOYMENT,
)]
Phase = Annotated[str, typer.Option(
    "--phase", metavar="prefill|decode", help="Read prompts, or make one token per sequence.", rich_help_panel=WORK,
)]
Context = Annotated[int | None, typer.Option(
    "--context", "-c", min=0, show_default=False, rich_help_panel=WORK,
    help="Cached tokens per sequence.  [dim]\\[default: 4096 in decode, 0 in prefill][/dim]",
)]
NewTokens = Annotated[int | None, typer.Option(
    "--input-len", "-i", min=1, show_default=False, rich_help_panel=WORK,
    help="New tokens per sequence, in prefill.  [dim]\\[default: 4096][/dim]",
)]
Engine = Annotated[str, typer.Option(
    "--engine", "-e", metavar="NAME", help="vllm, sglang, trtllm or a profile file; an older release as vllm==0.24.0.",
    rich_help_panel=CHOICES,
)]
TIME_LIMITS = {
    "--ttft": "Longest time to first token, as 2s.", "--tpot": "Longest time per output token, as 50ms.",
    "--e2e": "Longest time of a whole request.",
}  # fmt: skip
"""Limits of a request, and what ``--help`` says of them."""

LAYOUT = "tpN-dpN-epN-ppN"
"""How layouts are written, for ``--help``."""


def time_limit(name: str, panel: str) -> Any:
    """One of :data:`TIME_LIMITS`, shown in a command's ``panel``."""
    return typer.Option(name, metavar="TIME", show_default=False, help=TIME_LIMITS[name], rich_help_panel=panel)


Command = TypeVar("Command", bound=Callable[..., None])


def deployment_options(
    *names: str, defaults: Mapping[str, Any] | None = None, searched: Mapping[str, tuple[str, str]] | None = None,
    **said: str,
) -> Callable[[Command], Command]:
    """Give a command the options called ``names`` of :class:`tensorcast.deploy.options.Options`, after ``--engine``.

    The command takes them as ``**options``. Types, defaults, flags and help are those of the fields: typer reads them
    from ``__signature__``, which this writes. ``said``: other words for a field's help; ``defaults``: other defaults.
    ``searched``: options that take several values, after ``--mode``, as text such as ``bf16,fp8`` or None; by option
    how values are written and what is tried unasked.
    """

    def given(command: Command) -> Command:
        types, one, several = get_type_hints(Options), [], []
        for name in names:
            option, default = ABOUT[name], (defaults or {}).get(name, OPTIONS[name].default)
            switch, words = f"--{name.replace('_', '-')}", said.get(name, option.help)
            shown = Annotated[types[name], typer.Option(  # type: ignore[valid-type]
                f"{switch}/{flag(name)}" if default is True else switch, metavar=option.metavar, min=option.least,
                help=words + (UNASKED.format(option.unasked) if option.unasked else ""),
                show_default=default is not None, rich_help_panel=CHOICES,
            )]
            one.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=shown))
        for name, (metavar, unasked) in (searched or {}).items():
            listed = Annotated[str | None, typer.Option(
                SEARCHED_FLAGS.get(name, flag(name)), metavar=metavar, show_default=False, rich_help_panel=SEARCH,
                help=said.get(name, ABOUT[name].help) + UNASKED.format(unasked),
            )]
            several.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=listed))
        return with_parameters(command, {"engine": one, "mode": several})

    return given


UNASKED = "  [dim]\\[default: {}][/dim]"
"""What ``--help`` says of an option that is not given."""

SEARCHED_FLAGS = {"mtp_depth": "--mtp"}
"""Flags that are shorter where several values are given."""


def with_parameters(command: Command, added: Mapping[str, list[Parameter]]) -> Command:
    """``command`` with a signature in which those ``added`` come after a parameter each, instead of ``**options``."""
    found: list[Parameter] = []
    for one in signature(command, eval_str=True).parameters.values():
        if one.kind is not Parameter.VAR_KEYWORD:
            found += (each.replace(kind=Parameter.KEYWORD_ONLY) for each in (one, *added.get(one.name, ())))
    command.__signature__ = Signature(found)  # type: ignore[attr-defined]
    return command
