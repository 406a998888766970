"""`localreason chat`: talk to a model in the terminal."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import InputError
from . import build, config
from .store import DEMO, list_stored

if TYPE_CHECKING:
    from ..tui.history import History

app = typer.Typer(rich_markup_mode=None, add_completion=False)

HistoryFile = Annotated[
    Path | None,
    typer.Option("--history", help="File of the conversations; unset: chats.sqlite3 in the user's data folder."),
]
Insist = Annotated[bool, typer.Option("--insist", help="Run controls that contradict each other.")]
Light = Annotated[bool, typer.Option("--light/--dark", help="Colours for a light terminal; Ctrl+L changes them.")]
_ESCAPE_MILLISECONDS = "25"
"""How long Esc waits for what would make it the beginning of another key. Textual waits for 100."""


@app.command()
def chat(
    context: typer.Context,
    model: Annotated[str | None, config.flag("model", "-m", "--model")] = None,
    preset: Annotated[str | None, config.flag("preset", "-p", "--preset")] = None,
    controls: Annotated[list[str] | None, config.flag("controls", "-c", "--control", show="NAME[:K=V,...]")] = None,
    insist: Insist = False,
    seed: Annotated[int | None, config.flag("seed")] = None,
    temperature: Annotated[float | None, config.flag("temperature")] = None,
    top_p: Annotated[float | None, config.flag("top_p")] = None,
    top_k: Annotated[int | None, config.flag("top_k")] = None,
    min_p: Annotated[float | None, config.flag("min_p")] = None,
    max_tokens: Annotated[int | None, config.flag("max_tokens")] = None,
    context_tokens: Annotated[int | None, config.flag("context", "--context")] = None,
    threads: Annotated[int | None, config.flag("threads")] = None,
    gpu_layers: Annotated[int | None, config.flag("gpu_layers")] = None,
    cache_type: Annotated[str | None, config.flag("cache_type")] = None,
    format: Annotated[str | None, config.flag("format")] = None,
    think: Annotated[bool | None, config.flag("think", "--think/--no-think")] = None,
    store: Annotated[str | None, config.flag("store")] = None,
    cluster: Annotated[bool | None, config.flag("cluster", "--cluster/--no-cluster")] = None,
    peers: Annotated[list[str] | None, config.flag("peers", "--peer", show="HOST:PORT")] = None,
    windows: Annotated[str | None, config.flag("windows")] = None,
    objective: Annotated[str | None, config.flag("objective")] = None,
    rounds: Annotated[int | None, config.flag("rounds")] = None,
    row_type: Annotated[str | None, config.flag("row_type")] = None,
    disk: Annotated[bool | None, config.flag("disk", "--disk/--no-disk")] = None,
    guess: Annotated[bool | None, config.flag("guess", "--guess/--no-guess")] = None,
    history: HistoryFile = None,
    light: Light = False,
) -> int:
    """Talk to a model in the terminal: its thinking in sight, folded once it answers, and under your keys.

    Esc stops, Ctrl+G asks for the answer now, Ctrl+T for longer thinking, F1 shows all keys. Conversations are kept
    and found again with F4. Without a model the last one is opened, or one is chosen from a list.

    \b
    Examples:
      localreason chat --model demo
      localreason chat --model qwen3-1.7b --preset careful
      localreason chat --model Qwen/Qwen3-8B-GGUF:Q4_K_M --cluster
    """
    settings = config.load({**context.params, "context": context_tokens})
    recipe = build.make_recipe(settings, insist)
    streams = sys.stdin, sys.stdout, sys.stderr  # Textual draws on the last
    if not all(stream is not None and stream.isatty() for stream in streams):
        raise InputError(
            "the chat needs a terminal, and its input or output is a file or a pipe; "
            "`localreason solve` answers a question without one"
        )
    os.environ.setdefault("ESCDELAY", _ESCAPE_MILLISECONDS)  # read when Textual is imported
    from ..tui.app import ChatApp
    from ..tui.history import History
    from .chat_models import ChatBackend

    path = history or _default_history()
    backend, is_opening = ChatBackend(settings, recipe, build.wiring(context)), False
    try:
        with History(path) as kept:
            first = settings.settings.model or _last_model(kept, settings.store)
            app = ChatApp(backend, kept, recipe, settings.settings.preset, first, light)
            app.dialogue.controls = settings.settings.controls
            app.run()
            is_opening, code = app.chat.is_opening, app.return_code
            app.dialogue.store()  # what the chat could not store at its end
    finally:
        if not is_opening:
            backend.close()
    if is_opening:
        # A download or llama.cpp goes on in a thread, and Python would wait for what they end with.
        sys.stdout.flush()
        os._exit(code or 0)
    return code or 0


def _default_history() -> Path:
    from platformdirs import user_data_path

    return user_data_path("localreason", appauthor=False) / "chats.sqlite3"


def _last_model(kept: "History", folder: Path) -> str | None:
    """The model of the latest conversation, if it is on this machine by its name."""
    for one in kept.summaries(limit=1):
        if one.model == DEMO:
            return one.model
        if folder.is_dir() and any(one.model in (it.name, it.path.stem) for it in list_stored(folder)):
            return one.model
    return None
