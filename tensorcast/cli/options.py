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
    "--device", "-d", help="Name (see [bold]tensorcast devices[/bold]) or profile file.", show_default=False,
    rich_help_panel=DEPLOYMENT,
)]
Phase = Annotated[str, typer.Option(
    "--phase", metavar="prefill|decode", help="Read prompts, or make one token per sequence.", rich_help_panel=WORK,
)]
Engine = Annotated[str, typer.Option(
    "--engine", "-e", metavar="NAME", help="vllm, sglang, trtllm or a profile file.", rich_help_panel=CHOICES,
)]
LAYOUT = "tpN-dpN-epN-ppN"
"""How layouts are written, for ``--help``."""

Command = TypeVar("Command", bound=Callable[..., None])


def deployment_options(
    *names: str, defaults: Mapping[str, Any] | None = None, **said: str
) -> Callable[[Command], Command]:
    """Give a command the options called ``names`` of :class:`tensorcast.deploy.options.Options`, after ``--engine``.

    The command takes them as ``**options``. Types, defaults, flags and help are those of the fields: typer reads them
    from ``__signature__``, which this writes. ``said``: other words for a field's help; ``defaults``: other defaults.
    """

    def given(command: Command) -> Command:
        types = get_type_hints(Options)
        added = []
        for name in names:
            default = (defaults or {}).get(name, OPTIONS[name].default)
            shown = Annotated[types[name], _option(name, said.get(name), default)]  # type: ignore[valid-type]
            added.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=shown))
        return _with_parameters(command, added, after="engine")

    return given


def searched_options(words: Mapping[str, str], **said: tuple[str, str]) -> Callable[[Command], Command]:
    """Give a command options that take several values, after ``--mode``: text such as ``bf16,fp8``, or None.

    ``said``: by option how values are written and what is tried unasked; ``words``: other words for a field's help.
    """

    def given(command: Command) -> Command:
        added = []
        for name, (metavar, unasked) in said.items():
            shown = Annotated[str | None, typer.Option(
                SEARCHED_FLAGS.get(name, flag(name)), metavar=metavar, show_default=False, rich_help_panel=SEARCH,
                help=words.get(name, ABOUT[name].help) + _default(unasked),
            )]
            added.append(Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=shown))
        return _with_parameters(command, added, after="mode")

    return given


SEARCHED_FLAGS = {"mtp_depth": "--mtp"}
"""Flags that are shorter where several values are given."""


def _option(name: str, text: str | None, default: Any) -> Any:
    option, switch = ABOUT[name], f"--{name.replace('_', '-')}"
    words = (text or option.help) + (_default(option.unasked) if option.unasked else "")
    return typer.Option(
        f"{switch}/{flag(name)}" if default is True else switch, metavar=option.metavar, help=words, min=option.least,
        show_default=default is not None, rich_help_panel=CHOICES,
    )


def _default(words: str) -> str:
    return f"  [dim]\\[default: {words}][/dim]"


def _with_parameters(command: Command, added: list[Parameter], after: str) -> Command:
    """``command`` with a signature in which ``added`` come after a parameter, instead of its ``**options``."""
    every = signature(command, eval_str=True).parameters.values()
    own = [one for one in every if one.kind is not Parameter.VAR_KEYWORD]
    place = 1 + [one.name for one in own].index(after)
    found = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in (*own[:place], *added, *own[place:])]
    command.__signature__ = Signature(found)  # type: ignore[attr-defined]
    return command
