"""``tensorcast explore``: a comparison as a page whose sliders ask anew."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from inspect import Parameter
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlencode

import typer

from tensorcast.cli.app import CHOICES, DEPLOYMENT, LOAD, OUTPUT, SEARCH, command
from tensorcast.cli.options import UNASKED, with_parameters
from tensorcast.cli.values import duration, layouts_of, split_names, whole_numbers
from tensorcast.errors import InputError
from tensorcast.explore import fields as page

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 on 32 H200; the browser opens[/dim]

tensorcast explore deepseek-v3 -d h200 -n 32

[dim]Another model and your limits; all can be changed in the page[/dim]

tensorcast explore qwen3-235b-a22b -d h100,h200 -n 8,16 -i 2000 -o 500 --ttft 1s --tpot 30ms

[dim]A question that compare or the page has kept, with another limit[/dim]

tensorcast explore --config reports/qwen3-235b/question.yaml --tpot 30ms

[dim]On a server, for a tunnel: ssh -L 8000:127.0.0.1:8000 SERVER[/dim]

tensorcast explore gpt-oss-120b -d b200 -n 8 --port 8000 --no-browser

[dim]Your own model: only files that are named here are read, whatever the page asks[/dim]

tensorcast explore ./my-model -d h200 -n 8"""


OWN = ("model", "device", "world_size", "engine", "input_len", "output_len", "ttft_ms", "tpot_ms")
"""Fields of the page whose options :func:`explore` declares itself."""

PANELS = {page.LOAD: LOAD, page.LIMITS: LOAD, page.SEARCH: SEARCH, page.NUMBERS: CHOICES}

FILES = ("routing", "placement", "draft_model")
"""Fields that take a file, where it is named at the start."""

Command = TypeVar("Command", bound=Callable[..., None])


def field_options(explore: Command) -> Command:
    """An option for every other field of the page, as text."""
    found = []
    for field in page.fields():
        if field.key in OWN:
            continue
        help_text = "Prompt tokens that are in the cache already." if field.key == "cached" else field.help
        unasked = field.unasked or field.default
        option = typer.Option(
            field.flag, metavar="VALUE", help=help_text + (UNASKED.format(unasked) if unasked else ""),
            show_default=False, rich_help_panel=PANELS[field.group],
        )
        annotation = Annotated[str | None, option]
        found.append(Parameter(field.key, Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return with_parameters(explore, {"tpot": found})


@command(epilog=EXAMPLES)
@field_options
def explore(
    model: Annotated[str, typer.Argument(
        help="What the page opens with: a name, or a profile file or model directory of yours.",
    )] = "deepseek-v3",
    *,
    device: Annotated[str, typer.Option(
        "--device", "-d", metavar="NAME,...", help="One or more.", rich_help_panel=DEPLOYMENT,
    )] = "h200-sxm",
    world_size: Annotated[str, typer.Option(
        "--world-size", "-n", metavar="N,...", help="GPUs in all; one or more sizes.", rich_help_panel=DEPLOYMENT,
    )] = "32",
    engine: Annotated[str, typer.Option(
        "--engine", "-e", metavar="NAME", help="vllm, sglang, trtllm or a profile file.", rich_help_panel=DEPLOYMENT,
    )] = "vllm",
    input_len: Annotated[int, typer.Option(
        "--input-len", "-i", min=1, help="Tokens of a prompt.", rich_help_panel=LOAD,
    )] = 4096,
    output_len: Annotated[int, typer.Option(
        "--output-len", "-o", min=1, help="Tokens of a reply.", rich_help_panel=LOAD,
    )] = 1024,
    ttft: Annotated[str | None, typer.Option(
        "--ttft", metavar="TIME", help="Longest mean time to first token.  [dim]\\[default: 2s; of --config its own]"
        "[/dim]", show_default=False, rich_help_panel=LOAD,
    )] = None,
    tpot: Annotated[str | None, typer.Option(
        "--tpot", metavar="TIME", help="Longest mean time per output token.  [dim]\\[default: 50ms; of --config its "
        "own][/dim]", show_default=False, rich_help_panel=LOAD,
    )] = None,
    config: Annotated[Path | None, typer.Option(
        "--config", metavar="FILE", show_default=False, rich_help_panel=OUTPUT,
        help="A saved question (question.yaml of compare --out, or the page's) to open with; options beside it stand.",
    )] = None,
    host: Annotated[str, typer.Option(
        "--host", metavar="ADDRESS", help="Where to listen; the default is for this machine alone.",
        rich_help_panel=OUTPUT,
    )] = "127.0.0.1",
    port: Annotated[int, typer.Option(
        "--port", "-p", min=0, max=65535, help="0 takes a free one.", rich_help_panel=OUTPUT,
    )] = 8321,
    browser: Annotated[bool, typer.Option(
        "--browser/--no-browser", help="Open the page here.", rich_help_panel=OUTPUT,
    )] = True,
    **options: str | None,
) -> None:
    """Explore deployments of MODEL in the browser: sliders for load, limits and price, and the answer as they move."""
    for needed in ("starlette", "uvicorn"):
        if importlib.util.find_spec(needed) is None:
            raise InputError("explore needs a web server: pip install 'tensorcast[explore]'")
    from tensorcast.explore.guard import is_loopback
    from tensorcast.explore.question import own_names, question
    from tensorcast.explore.server import serve

    names, named = own_names(model, device, engine)
    if config is None:
        ttft, tpot = ttft or "2s", tpot or "50ms"
    given = {key: value for key, value in options.items() if value is not None}
    if "layouts" in given:
        given["layouts"] = ",".join(layouts_of(given["layouts"]))
    if "cached" in given:
        given["cached"] = f"{100 * whole_numbers('--prefix-cached', given['cached'], 0)[0] / input_len!r}"
    if "price" in given and "=" in given["price"]:
        given["price"] = _prices_by_name(given["price"], names["device"])
    start: dict[str, str] = {
        **names, "world_size": world_size, "input_len": str(input_len), "output_len": str(output_len),
        "ttft_ms": _milliseconds("--ttft", ttft), "tpot_ms": _milliseconds("--tpot", tpot), **given,
    }  # fmt: skip
    named = (*named, *(given[key] for key in FILES if key in given))
    question(start, named).tasks()  # what cannot be is said here, not in the page

    def say(address: str) -> None:
        typer.echo(f"exploring at {address} until Ctrl-C")
        if not is_loopback(host):
            typer.echo("others on the network can ask questions there, too: it has no password")
        if browser:
            import webbrowser

            webbrowser.open(f"{address}?{urlencode(start)}")

    serve(start, host, port, named, say)


def _milliseconds(flag: str, text: str | None) -> str:
    seconds = duration(flag, text)
    return "" if seconds is None else f"{1e3 * seconds:g}"


def _prices_by_name(text: str, devices: str) -> str:
    """Prices by the devices' own names, as the page lists them; of the only one alone."""
    from tensorcast.api import device_profile

    parts = [part.partition("=") for part in split_names(text)]
    found = [(device_profile(name).name if value else name, equals, value) for name, equals, value in parts]
    alone = len(found) == 1 and found[0][0] == devices
    return found[0][2] if alone else ",".join(map("".join, found))
