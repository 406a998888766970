"""The chat as a program: themes, commands by name, help, and what happens when it ends. Builds no engine."""

import asyncio
import contextlib
import signal
from collections.abc import Iterable
from typing import ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import CommandPalette
from textual.events import Print
from textual.screen import Screen
from textual.theme import Theme

from ..runtime.errors import LocalReasonError
from ..runtime.recipe import Recipe
from .actions import Chat
from .backend import Backend
from .dialogue import Dialogue
from .history import History
from .widgets.keys import Keys
from .widgets.turn import Turn

_TOLD = "localreason: "
"""How a sentence to a person begins."""
_TOLD_SECONDS = 15
DARK = Theme(
    name="localreason-dark",
    primary="#7fb4ca",
    secondary="#7fb4ca",
    accent="#7fb4ca",
    foreground="#d5d8dc",
    background="#16181c",
    surface="#1c1f24",
    panel="#23272e",
    success="#8fb573",
    warning="#d9a860",
    error="#d2737a",
    variables={"footer-key-foreground": "#7fb4ca"},
)
LIGHT = Theme(
    name="localreason-light",
    primary="#2b6b86",
    secondary="#2b6b86",
    accent="#2b6b86",
    foreground="#2a2e33",
    background="#fbfaf7",
    surface="#f3f1ec",
    panel="#e9e6df",
    success="#4c7a2d",
    warning="#96640c",
    error="#a8323c",
    dark=False,
    variables={"footer-key-foreground": "#2b6b86"},
)


class ChatApp(App[None]):
    """`localreason chat`. `model` is opened at once; without one the user chooses first."""

    CSS_PATH = "chat.tcss"
    TITLE = "localreason"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "keys", "Keys", priority=True, tooltip="this help"),
        Binding("ctrl+p", "command_palette", "Commands", show=False, priority=True, tooltip="every command by name"),
        Binding("ctrl+l", "light", "Light or dark", show=False, priority=True, tooltip="light or dark"),
        Binding("ctrl+q", "quit", "Quit", show=False, priority=True, tooltip="leave; a running reply is stored"),
    ]
    ENABLE_COMMAND_PALETTE = True

    def __init__(
        self, backend: Backend, history: History, recipe: Recipe, preset: str, model: str | None, is_light: bool = False
    ) -> None:
        super().__init__()
        self.backend = backend
        self.dialogue = Dialogue(history, recipe, preset)
        self.chat = Chat(self.dialogue, backend)
        self._model = model
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = LIGHT.name if is_light else DARK.name

    def on_mount(self) -> None:
        self.push_screen(self.chat)
        self.begin_capture_print(self, stdout=False)
        self.call_after_refresh(self._start)
        with contextlib.suppress(NotImplementedError):  # Windows has none
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.exit)

    def on_print(self, event: Print) -> None:
        """What the rest of the program tells a person, from any thread, becomes a notice."""
        if event.text.startswith(_TOLD):
            self.notify(event.text.removeprefix(_TOLD), timeout=_TOLD_SECONDS, markup=False)

    def _start(self) -> None:
        if self._model is not None:
            self.chat.open_model(self._model)
        else:
            self.chat.action_models(is_first=True)

    def on_unmount(self) -> None:
        """Store what a running reply has, whatever ended the program."""
        if self.dialogue.run is not None:
            self.dialogue.run.reply.stop()
            self.dialogue.finish(None)
        with contextlib.suppress(LocalReasonError):  # who started the chat tries again, and tells
            self.dialogue.store()

    def action_light(self) -> None:
        self.theme = LIGHT.name if self.theme == DARK.name else DARK.name

    def action_command_palette(self) -> None:
        # Textual looks at the screen on top only, and the help may lie over a palette.
        if not any(isinstance(screen, CommandPalette) for screen in self.screen_stack):
            super().action_command_palette()

    def action_keys(self) -> None:
        if not isinstance(self.screen, Keys):
            self.push_screen(
                Keys(
                    (
                        ("Everywhere", _of(Chat) + _of(ChatApp)),
                        ("On a message (Shift+Tab goes there)", _of(Turn)),
                    )
                )
            )

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Every key as a command, and what has no key of its own."""
        if screen is self.chat:
            for binding in (*_of(Chat), *_of(ChatApp)):
                name = binding.action.partition("(")[0]
                owner = self.chat if binding in Chat.BINDINGS else self
                if self.chat.check_action(name, ()) and name != "command_palette":
                    prefix = "screen." if owner is self.chat else "app."
                    action = f"{prefix}{binding.action}"
                    help = f"{binding.tooltip or binding.description} ({binding.key.replace(',', ', ')})"
                    yield SystemCommand(binding.description, help, lambda action=action: self.run_action(action))


def _of(owner: type[Chat] | type[Turn] | type[ChatApp]) -> list[Binding]:
    return [binding for binding in owner.BINDINGS if isinstance(binding, Binding) and binding.description]
