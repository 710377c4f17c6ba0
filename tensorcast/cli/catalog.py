"""``tensorcast models``, ``devices`` and ``engines``: what profiles there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from tensorcast.cli.app import AsJson, command, console
from tensorcast.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


@command()
def models(as_json: AsJson = False) -> None:
    """Models that are there, with sizes and source."""
    from tensorcast.profiles.store import list_models, load_model
    from tensorcast.report import catalog

    _catalog(list_models(), lambda name: catalog.model_record(load_model(name)), catalog.print_models, as_json)


@command()
def devices(as_json: AsJson = False) -> None:
    """Devices that are there: memory, peaks, interconnect, and how well each is known."""
    from tensorcast.profiles.store import list_devices, load_device
    from tensorcast.report import catalog

    _catalog(list_devices(), lambda name: catalog.device_record(load_device(name)), catalog.print_devices, as_json)


@command()
def engines(as_json: AsJson = False) -> None:
    """Serving engines that are there: what they fuse, capture and cost."""
    from tensorcast.profiles.store import list_engines, load_engine
    from tensorcast.report import catalog

    _catalog(list_engines(), lambda name: catalog.engine_record(load_engine(name)), catalog.print_engines, as_json)


def _catalog(
    names: tuple[str, ...], read: Callable[[str], dict[str, Any]],
    show: Callable[[list[dict[str, Any]], Console], None], as_json: bool,
) -> None:
    """List every profile that can be read; one that cannot does not hide the others."""
    found, broken = [], []
    for name in names:
        try:
            found.append(read(name))
        except InputError as error:
            broken.append(str(error))
    if as_json:
        from tensorcast.report.plain import to_json

        typer.echo(to_json(found, indent=2))
    else:
        show(found, console())
    if broken:
        raise InputError("; ".join(broken))
