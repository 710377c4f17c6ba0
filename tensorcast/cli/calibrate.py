"""`tensorcast calibrate`: fold measured kernels into device profiles, from a validate run or from published tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensorcast.cli.app import OUTPUT, AsJson, command
from tensorcast.errors import InputError

EXAMPLES = """[bold]Examples[/bold]

[dim]This machine, from a validate run; the result is a profile like any other[/dim]

tensorcast calibrate -d cpu --from out/cpu/measurements.parquet --write cpu.yaml

tensorcast simulate qwen3-30b-a3b -d cpu.yaml --engine eager --allow-oversize

[dim]From the tables of the public package aiconfigurator-core, where it is installed[/dim]

tensorcast calibrate -d h200 --from silicon --write my-profiles"""


@command(epilog=EXAMPLES)
def calibrate(
    origin: Annotated[str, typer.Option(
        "--from", metavar="FILE|DIR|silicon", show_default=False,
        help="measurements.parquet (or .csv) of tensorcast validate, a folder of measured tables, or silicon: the "
        "tables of an installed aiconfigurator-core.",
    )],
    device: Annotated[str | None, typer.Option(
        "--device", "-d", show_default=False,
        help="Profile to calibrate: name or file; cpu is this machine.  [dim]\\[default, from tables: all][/dim]",
    )] = None,
    engine: Annotated[str | None, typer.Option(
        "--engine", "-e", metavar="NAME", show_default=False,
        help="Whose kernels a validate run measured.  [dim]\\[default: eager][/dim]",
    )] = None,
    write: Annotated[Path | None, typer.Option(
        "--write", "-w", metavar="PATH", show_default=False, rich_help_panel=OUTPUT,
        help="From a validate run: the profile to write; what is written by hand in one that is there stays. From "
        "tables: the folder of profiles to update.",
    )] = None,
    as_json: AsJson = False,
) -> None:
    """Fit kernel times to measured ones; a fit that is worse than what stands is refused."""
    if origin == "silicon" or Path(origin).is_dir():
        if engine is not None or as_json:
            flag = "--engine" if engine is not None else "--json"
            raise InputError(f"{flag}: for a validate run only; tables name their engines, and the fit is written")
        if write is None:
            raise InputError("--write is missing: the folder of profiles to change (devices/ and calibration/ in it)")
        _from_tables(None if origin == "silicon" else Path(origin), device, write)
        return
    from tensorcast.api import device_profile
    from tensorcast.calibrate.constants import from_validation as fold
    from tensorcast.calibrate.constants.errors import median_error
    from tensorcast.files import check_file, writing
    from tensorcast.measure.store import read_table
    from tensorcast.profiles.store import device_path, load_engine
    from tensorcast.report import units
    from tensorcast.report.plain import to_json

    if device is None:
        raise InputError("--device is missing: name the device that was measured")
    if write is not None:
        check_file("--write", write)
    engine = load_engine(engine or "eager").name
    frame, profile = read_table(Path(origin)), device_profile(device)
    found, fits = fold.calibrate(profile, frame, engine)
    if write is not None:
        with writing("--write", write):
            fold.write_profile(write, found, None if device.lower() == "cpu" else device_path(device))
    before, after = (median_error(fold.left_out_errors(frame, d, engine).error) for d in (profile, found))
    if as_json:
        told = {"written": str(write) if write else None, "error_before": before, "error_after": after}
        typer.echo(to_json({**told, "fits": fold.fits_frame(fits).to_dict("records")}, indent=2))
        return
    for fit in fits:
        verdict = fit.verdict or f"{units.percent(fit.before)} -> {units.percent(fit.after)}"
        typer.echo(f"{fit.family} {fit.dtype}: {verdict} ({fit.points} shapes fitted, {fit.held_out} left out)")
    typer.echo(f"median error on shapes left out of every fit: {units.percent(before)} -> {units.percent(after)}")
    if write is not None:
        typer.echo(f"wrote {write}")


def _from_tables(folder: Path | None, device: str | None, profiles: Path) -> None:
    """Constants and kernel models from measured tables, None: the installed ones, into a folder of profiles."""
    from tensorcast.calibrate.devices import calibrate as from_tables
    from tensorcast.calibrate.measured_tables import installed_tables
    from tensorcast.profiles.store import load_device

    if not (profiles / "devices").is_dir():
        raise InputError(f"--write {profiles}: no folder devices/ of profiles in it")
    folder = folder or installed_tables()
    if device and not (profiles / "devices" / f"{device}.yaml").is_file():
        device = load_device(device).name
    from_tables(folder, profiles, (device,) if device else ())
