"""The entry point: the table of command groups, the exit codes, and the one place where errors become sentences."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Sequence
from enum import IntEnum
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ..runtime.errors import ControlError, InputError, LocalReasonError, ModelError, OutputError, PromptError

if TYPE_CHECKING:
    from .build import Wiring


class ExitCode(IntEnum):
    """What the shell is told."""

    OK = 0
    """Done, every problem included."""
    FAILED = 1
    """A failure of no other kind, such as too little memory, or a bug."""
    USAGE = 2
    """An unknown flag or value on the command line, or controls that contradict each other."""
    MODEL = 3
    """A model is missing, broken or unsupported."""
    INPUT = 4
    """Problems or configuration cannot be read, or a prompt does not fit."""
    OUTPUT = 5
    """Results cannot be written."""
    SOME_FAILED = 6
    """The run went through, but some problems could not be read or solved."""
    INTERRUPTED = 130
    """Stopped by Ctrl-C; what was done is saved."""


_UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS})
"""What a full or a broken disk behind standard output says."""
_CODES: tuple[tuple[type[LocalReasonError], ExitCode], ...] = (
    (ControlError, ExitCode.USAGE),
    (ModelError, ExitCode.MODEL),
    (InputError, ExitCode.INPUT),
    (PromptError, ExitCode.INPUT),
    (OutputError, ExitCode.OUTPUT),
)

GROUPS: dict[str, tuple[str, str]] = {
    "solve": ("solve", "Solve a question, or all problems of a file."),
    "serve": ("serve", "Serve an OpenAI-compatible API on this machine."),
    "eval": ("eval", "Compare configurations on a task: accuracy for tokens and time."),
    "trace": ("trace", "Show one solved problem step by step."),
    "bench": ("bench", "Measure speed, memory and the controls' overhead."),
    "chat": ("chat", "Talk to a model in the terminal."),
    "models": ("models", "List, fetch, inspect and remove models."),
    "quant": ("quant", "Inspect, convert and measure model files."),
    "controls": ("controls", "List the controls of the thinking and the presets."),
    "node": ("node", "Lend this machine to the models of paired machines."),
    "cluster": ("cluster", "Pair, list and plan the home's machines."),
    "doctor": ("doctor", "Measure this machine and look at its network."),
    "config": ("config", "Show the settings and where each comes from."),
}
"""Command to module of this package and summary; a module holds a Typer `app` and is imported when it is called."""

# Click's own, or the copy of it inside newer Typers, which has no public name.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Groups(TyperGroup):
    """Commands from `GROUPS`: help and completion need the table only, a call imports the module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(GROUPS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in GROUPS:
            return None
        return TyperCommand(cmd_name, help=GROUPS[cmd_name][1], rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        return name, typer.main.get_command(import_module(f".{GROUPS[name][0]}", __package__).app), rest


# Plain help: the rich one costs 0.1 s and more at each start.
app = typer.Typer(cls=Groups, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version

        typer.echo(f"localreason {version('localreason')}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 other failure, 2 usage, 3 model, 4 input, 5 output, 6 some problems failed, "
    "130 interrupted."
)
def localreason(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Reasoning with language models on hardware that you own.

    \b
    Examples:
      localreason solve "What is 17 * 23?"
      localreason solve problems.jsonl -o results.jsonl --preset fast
      localreason models pull qwen3-1.7b
    """


def main(args: Sequence[str] | None = None, wiring: "Wiring | None" = None) -> int:
    """Run one command line and return its exit code; `wiring` replaces what a test cannot have."""
    try:
        command = typer.main.get_command(app)
        code = command.main(
            args=None if args is None else list(args), prog_name="localreason", standalone_mode=False, obj=wiring
        )
        sys.stdout.flush()
        return int(code or ExitCode.OK)
    except _UsageError as error:
        error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader has gone: nobody is left to tell.
        _forget_output()
        return ExitCode.FAILED
    except LocalReasonError as error:
        _tell(f"localreason: {error}")
        return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)
    except OSError as error:
        if error.filename is None and error.errno not in _UNWRITABLE:
            return _tell_bug(error)
        if error.filename is None:  # what is ours is written with a name
            _forget_output()
        place = "standard output" if error.filename is None else os.fsdecode(error.filename)
        _tell(
            f"localreason: {place} cannot be used: {error.strerror}; see its rights and the free space, or use another"
        )
        return ExitCode.OUTPUT
    except Exception as error:
        return _tell_bug(error)


def _forget_output() -> None:
    """The flush at exit must not complain of standard output again."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file, in somebody's program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_bug(error: Exception) -> int:
    _tell(f"localreason: this is a bug: {type(error).__name__}: {error}; set LOCALREASON_DEBUG=1 for the traceback")
    return ExitCode.FAILED


def _tell(sentence: str) -> None:
    if os.environ.get("LOCALREASON_DEBUG"):
        traceback.print_exc()
    from .say import safe

    print(safe(sentence), file=sys.stderr)


def run() -> NoReturn:
    """The `localreason` command."""
    # What is written to a closed stream is lost, as anywhere; Python has none in its place.
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not an error; a file or a pipe gets UTF-8.
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    sys.exit(main())
