"""``tensorcast explore``: a comparison as a page whose sliders ask anew."""

from __future__ import annotations

import importlib.util
from typing import Annotated
from urllib.parse import urlencode

import typer

from tensorcast.cli.app import DEPLOYMENT, LOAD, OUTPUT, command
from tensorcast.cli.values import duration
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]DeepSeek-V3 on 32 H200; the browser opens[/dim]

tensorcast explore deepseek-v3 -d h200 -n 32

[dim]Another model and your limits; all can be changed in the page[/dim]

tensorcast explore qwen3-235b-a22b -d h100,h200 -n 8,16 -i 2000 -o 500 --ttft 1s --tpot 30ms

[dim]On a server, for a tunnel: ssh -L 8000:127.0.0.1:8000 SERVER[/dim]

tensorcast explore gpt-oss-120b -d b200 -n 8 --port 8000 --no-browser

[dim]Your own model: only files that are named here are read, whatever the page asks[/dim]

tensorcast explore ./my-model -d h200 -n 8"""


@command(epilog=EXAMPLES)
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
    ttft: Annotated[str, typer.Option(
        "--ttft", metavar="TIME", help="Longest mean time to first token.", rich_help_panel=LOAD,
    )] = "2s",
    tpot: Annotated[str, typer.Option(
        "--tpot", metavar="TIME", help="Longest mean time per output token.", rich_help_panel=LOAD,
    )] = "50ms",
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
) -> None:
    """Explore deployments of MODEL in the browser: sliders for load, limits and price, and the answer as they move."""
    for needed in ("starlette", "uvicorn"):
        if importlib.util.find_spec(needed) is None:
            raise InputError("explore needs a web server: pip install 'tensorcast[explore]'")
    from tensorcast.explore.guard import is_loopback
    from tensorcast.explore.question import own_names, question
    from tensorcast.explore.server import serve

    names, named = own_names(model, device, engine)
    limits = {f"{name}_ms": f"{1e3 * (duration(f'--{name}', text) or 0):g}" for name, text in
              (("ttft", ttft), ("tpot", tpot))}
    start = {**names, "world_size": world_size, "input_len": str(input_len), "output_len": str(output_len), **limits}
    question(start, named).tasks()  # what cannot be is said here, not in the page

    def say(address: str) -> None:
        typer.echo(f"exploring at {address} until Ctrl-C")
        if not is_loopback(host):
            typer.echo("others on the network can ask questions there, too: it has no password")
        if browser:
            import webbrowser

            webbrowser.open(f"{address}?{urlencode(start)}")

    serve(start, host, port, named, say)
