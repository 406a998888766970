"""`localreason serve`: an OpenAI-compatible server over one model, until stopped."""

import signal
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import ControlError, InputError
from . import build, config
from .main import ExitCode
from .say import tell

if TYPE_CHECKING:
    from ..runtime.llama import EngineOptions
    from ..runtime.model import Model, Recipe
    from .server_schema import Limits
    from .server_stop import Server

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_N_PROMPT = 4096
"""Tokens of a prompt that the cache has room for in each place, where no context is given."""
_N_ANSWER = 2048
_UNREAD_SECONDS = 90
"""After which the system drops a connection whose reader takes nothing; replies are given up before that."""
_N_SEQUENCES = 16
"""Choices times samples of one request, or --parallel if that is more."""

Host = Annotated[str, typer.Option("--host", help="Address to listen on; another than this machine's needs a key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
Queue = Annotated[int, typer.Option("--queue", min=0, max=10_000, help="Replies that may wait; more are refused.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="LOCALREASON_API_KEY",
        show_envvar=False,
        help="Key that clients have to send; better given as LOCALREASON_API_KEY, for other users see command lines.",
    ),
]
Origins = Annotated[
    list[str] | None, typer.Option("--origin", metavar="URL", help="A web page that may read replies; none by default.")
]
Body = Annotated[int, typer.Option("--max-body", min=1024, max=1 << 30, help="Most bytes of a request's body.")]
Grace = Annotated[
    float, typer.Option("--grace", min=0, max=3600, help="Seconds that running replies have when the server stops.")
]


@app.command()
def serve(
    context: typer.Context,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    model: Annotated[str | None, config.flag("model", "-m", "--model")] = None,
    preset: Annotated[str | None, config.flag("preset", "-p", "--preset")] = None,
    controls: Annotated[list[str] | None, config.flag("controls", "-c", "--control", show="NAME[:K=V,...]")] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, max=64, help="Replies decoded at once [default 4].")
    ] = None,
    queue: Queue = 64,
    api_key: Key = None,
    origin: Origins = None,
    max_body: Body = 1 << 20,
    grace: Grace = 10.0,
    max_tokens: Annotated[int | None, config.flag("max_tokens")] = None,
    context_tokens: Annotated[int | None, config.flag("context", "--context")] = None,
    temperature: Annotated[float | None, config.flag("temperature")] = None,
    top_p: Annotated[float | None, config.flag("top_p")] = None,
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
) -> None:
    """Serve an OpenAI-compatible API on this machine, until Ctrl-C.

    Clients use http://127.0.0.1:8080/v1 as base URL. The budget and the most tokens of a reply are the server's: a
    request may ask for less. Needs `pip install 'localreason[serve]'`.

    \b
    Examples:
      localreason serve --model qwen3-1.7b
      localreason serve --model qwen3-1.7b -c budget:max=8192 --parallel 8 --cluster
      LOCALREASON_API_KEY=secret localreason serve --host 0.0.0.0
    """
    try:
        from . import server_app, server_stop
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; install it with pip install 'localreason[serve]'") from error
    from ..runtime.model import Model
    from .server_runner import Runner

    key = (api_key or "").strip() or None
    local = server_app.is_loopback(host)
    if not local and key is None:
        raise InputError(f"{host} can be reached from other machines; give --api-key, or leave --host out")
    settings = config.load({**context.params, "context": context_tokens})
    recipe = build.make_recipe(settings)
    wiring = build.wiring(context)
    path = build.find_model(settings, wiring.hub)
    names = ("localhost", "127.0.0.1", "::1", host.lower())
    access = server_app.Access(key, names if local and key is None else (), tuple(origin or ()), max_body)
    with closing(_listen(host, port)) as listener:
        options = make_options(settings, recipe)
        with wiring.open_model(path, options, settings) as opened:
            assert isinstance(opened, Model)
            limits = make_limits(settings, recipe, opened)
            run(server_stop.Server(Runner(opened, settings.settings.parallel, queue), limits, access, grace), listener)
    raise typer.Exit(int(ExitCode.OK))


def make_options(settings: config.Config, recipe: "Recipe") -> "EngineOptions":
    """How the file is opened: a place and a probe beside it for each reply, and a kept prompt."""
    from ..runtime.llama import EngineOptions

    chosen = settings.settings
    return EngineOptions(
        n_context=chosen.context,
        n_sequences=2 * chosen.parallel + 1,
        n_threads=chosen.threads,
        n_gpu_layers=chosen.gpu_layers,
        cache_type=chosen.cache_type,
        n_needed=chosen.parallel * (_N_PROMPT + _most_tokens(recipe)) + _N_PROMPT,
        n_busy=chosen.parallel,
    )


def make_limits(settings: config.Config, recipe: "Recipe", model: "Model") -> "Limits":
    """What requests are granted at most, by the server's own settings. Raises ControlError."""
    from ..runtime.controls.budget import closing
    from ..runtime.formats import find_format
    from .server_schema import Limits

    chosen = settings.settings
    if recipe.n_samples > max(_N_SEQUENCES, chosen.parallel):
        raise ControlError(
            f"search: n is {recipe.n_samples} and the server runs {max(_N_SEQUENCES, chosen.parallel)} sequences of "
            f"one request at most; lower n"
        )
    format = find_format(recipe.format) if recipe.format else model.format
    return Limits(
        recipe=recipe,
        max_tokens=_most_tokens(recipe),
        max_thinking=_most_thinking(recipe),
        preset=None if chosen.preset == "none" else chosen.preset,
        controls=chosen.controls,
        n_sequences=max(_N_SEQUENCES, chosen.parallel),
        n_vocab=model.engine.n_vocab,
        n_closing=len(closing(format, model.tokenizer, format.lead)),
    )


def _most_thinking(recipe: "Recipe") -> int:
    """The hard cap, which applies where the settings name no budget too."""
    from ..runtime.controls.budget import BudgetParameters

    return BudgetParameters().max if recipe.max_thinking is None else recipe.max_thinking


def _most_tokens(recipe: "Recipe") -> int:
    return recipe.limit or _most_thinking(recipe) + _N_ANSWER


def run(server: "Server", listener: socket.socket) -> None:
    """Serve on a listening socket until SIGINT or SIGTERM."""
    runner = server.runner
    engine = runner.model.engine
    tell(f"{runner.model.name}: {runner.n_parallel} replies at once, {engine.n_context} tokens of cache")
    host, port = listener.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    # uvicorn raises what it caught again once it is done; a server that was told to stop has not failed.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        runner.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    tell("stopped")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"port {port} of {host} cannot be taken: {reason}; give another --port or --host") from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_SECONDS * 1000)
    return listener
