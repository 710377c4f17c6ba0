"""The command line's frame: the app, how errors end it, and what every command shares."""

from __future__ import annotations

import ast
import contextlib
import errno
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from tensorcast.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

PATIENCE_S = 1.0
"""Seconds after which a terminal is told that work is going on."""

EXAMPLES = """[bold]Examples[/bold]

tensorcast models

tensorcast simulate mixtral-8x7b --device h100 --world-size 2 --batch 32

tensorcast simulate deepseek-v3 -d h200 -n 32 --dp 32 --ep 32 --batch 128

tensorcast simulate --help"""


MODULES: dict[str, str] = {}
"""Modules of the commands, by name in the order of ``--help``; :mod:`tensorcast.cli` fills it."""

_alone: dict[str, typer.Typer] = {}
Function = TypeVar("Function", bound=Callable[..., None])


def command(epilog: str | None = None) -> Callable[[Function], Function]:
    """Make a function a command of its name; its docstring and ``epilog`` are in its ``--help``."""

    def made(function: Function) -> Function:
        own = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
        own.command(epilog=epilog, cls=_Command)(function)
        _alone[function.__name__] = own
        return function

    return made


class _Command(TyperCommand):
    """A command whose options are given once and hold something."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(word.partition("=")[0] == "--config" for word in args):
            args = self._with_config(args)
        single = {
            name: param for param in self.params for name in (*param.opts, *param.secondary_opts)
            if name.startswith("-") and not getattr(param, "multiple", False)
        }  # fmt: skip
        seen: set[str | None] = set()
        for i, word in enumerate(args if "--" not in args else args[: args.index("--")]):
            name, equals, value = word.partition("=")
            if (param := single.get(name)) is None:
                continue
            if param.name in seen:
                raise InputError(f"{name}: is given twice; several values go into one, with commas, where it takes any")
            seen.add(param.name)
            if not getattr(param, "is_flag", False) and (value if equals else args[i + 1 : i + 2]) in ("", [""]):
                raise InputError(f"{name} '': is empty")
        return super().parse_args(ctx, args)


    def _with_config(self, args: list[str]) -> list[str]:
        """``args`` with the options of the file that ``--config`` names; what is typed beside it stands."""
        from tensorcast.cli.values import config_words

        at = next(i for i, word in enumerate(args) if word.partition("=")[0] == "--config")
        equals, path = args[at].partition("=")[1:]
        rest = args[:at] + args[at + (1 if equals else 2) :]
        path = path if equals else next(iter(args[at + 1 : at + 2]), "")
        if not path:
            raise InputError("--config '': is empty")
        named = {name: param.opts for param in self.params for name in (*param.opts, *param.secondary_opts)}
        known = {name for name in named if name.startswith("--")} - {"--config", "--out", "--json", "--help"}
        given = {one for word in rest for one in named.get(word.partition("=")[0], ())}
        if rest and not rest[0].startswith("-"):
            given.add("model")
        return [*config_words(path, known, given), *rest, "--config", path]


class _Commands(TyperGroup):
    """Bad input: one line on stderr, exit code 2. Ctrl-C: one line, 130. Anything else is a bug: a traceback.

    A command's module is imported, and its parameters are read, when the command is asked for; ``--help`` of them all
    reads no more than their docstrings.
    """

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if self.listing:
            return TyperCommand(cmd_name, help=_docstring(cmd_name))
        if cmd_name not in MODULES:
            for name in MODULES:  # among these typer looks for one of a similar name
                self.get_command(ctx, name)
        elif cmd_name not in self.commands:
            importlib.import_module(MODULES[cmd_name])
            self.commands[cmd_name] = typer.main.get_command(_alone[cmd_name])
        return self.commands.get(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # shows --help
            return super().parse_args(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            _refuse(_usage(error), error.exit_code)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            _refuse(error.typed or str(error), error.exit_code)
        except typer.TyperException as error:
            _refuse(_usage(error), error.exit_code)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            name = str(error.filename)
            _refuse(f"{name[:40]!r}...: the name is too long, {len(name)} characters", 2)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


def _docstring(command: str) -> str | None:
    """What a command's function says of itself, read from its file: importing it would take half a second for all."""
    spec = importlib.util.find_spec(MODULES[command])
    source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == command)
    return next((ast.get_docstring(function) for function in functions), None)


def _refuse(message: str, exit_code: int) -> NoReturn:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(exit_code) from None


def _usage(error: typer.TyperException) -> str:
    """What typer found wrong with the arguments, in our words: the option, its value, and what would be right."""
    context = getattr(error, "ctx", None)
    hint = f"; see {context.command_path} --help" if context is not None else ""
    found = getattr(error.__cause__, "errors", None)  # pydantic's, where a value is of the wrong kind or size
    names = getattr(getattr(error, "param", None), "opts", None)
    typed = getattr(error, "option_name", None)
    if context is not None and typed:
        from tensorcast.cli.values import ours

        meant = ours(typed, {name for param in context.command.params for name in param.opts})
        if meant is not None:
            return f"No such option: {typed}; here it is {meant}{hint}"
    if found is None or not names:
        return f"{error.format_message().rstrip('.')}{hint}"
    first = found()[0]
    return f"{names[0]} {first['input']!r}: {first['msg'].partition(',')[0].replace('Input should', 'must')}{hint}"


app = typer.Typer(
    cls=_Commands, add_completion=True, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES,
)


def main() -> None:
    """Entry point of the console script."""
    # A terminal that cannot show a character gets a ? instead of a traceback.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdout is None:
        _unheard(OSError(errno.EBADF, os.strerror(errno.EBADF)))
    signal.signal(signal.SIGTERM, _terminated)
    # pydantic looks through every installed package for plugins; no command has a use for one
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app(prog_name="tensorcast")
    except BrokenPipeError:
        _reader_left()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EBADF, errno.EIO):
            raise
        _unheard(error)
    except SystemExit as leaving:
        gc.freeze()  # the process ends: the collector need not go through all that was made to look for cycles
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _reader_left()
        except OSError as error:
            _unheard(error)
        raise leaving from None


def _unheard(error: OSError) -> NoReturn:
    """Where our output goes there is no room, or nothing: one line, and nothing more while Python shuts down."""
    with contextlib.suppress(OSError):
        print(f"error: standard output: cannot be written: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(2) from None


def _terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM leaves as an error does: what is half written is removed, workers end."""
    raise SystemExit(128 + number)


def _reader_left() -> None:
    """Whoever read our output (``| head``) has seen enough: leave without a word, also while Python shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(1) from None


def _version(asked: bool) -> None:
    if asked:
        from tensorcast.version import __version__

        typer.echo(f"tensorcast {__version__}")
        raise typer.Exit


DEPLOYMENT, WORK, CHOICES, OUTPUT = "Deployment", "One step", "Engine and numerics", "Output"
LOAD, SEARCH = "Load and limits", "What is searched"
"""Panels of `--help`."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone, units in the names.")]


@app.callback()
def _tensorcast(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What a Mixture-of-Experts model will cost on a cluster, before you rent it."""


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False)


@dataclass
class Part:
    """How much of some work is done: ``done`` ``of`` so many."""

    of: int = 0
    done: int = 0


@contextlib.contextmanager
def patience(model: str, verb: str = "simulating", part: Part | None = None) -> Iterator[None]:
    """On a terminal, say what takes so long once it has taken :data:`PATIENCE_S`; elsewhere be silent.

    ``verb`` is what is done to ``model`` while nothing more special is under way; ``part``: how much of it is done, for
    a bar and an estimate.
    """
    if not sys.stderr.isatty():
        yield
        return
    import threading

    done = threading.Event()

    def report() -> None:
        if done.wait(PATIENCE_S):
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
        if part is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, TimeElapsedColumn(), console=console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=None)
            while not done.wait(0.1):
                whole = {"total": part.of, "completed": part.done} if part is not None and part.of else {}
                progress.update(task, description=_doing(model, verb), **whole)  # type: ignore[arg-type]

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _doing(model: str, verb: str) -> str:
    """What is under way, by the modules whose functions the main thread is in."""
    import threading

    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    running = set()
    while frame is not None:
        running.add(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    if "tensorcast.trace.tracer" in running:
        return f"tracing {model}, once: later runs read it from the cache"
    if "tensorcast.calibrate.constants.this_machine" in running:
        return "measuring this machine, once"
    if any(name.startswith("tensorcast.report.") for name in running):
        return "writing the report"
    return f"{verb} {model}"
