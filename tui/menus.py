"""What is chosen from lists: conversations, models, presets and controls, files."""

import contextlib
import threading
from pathlib import Path

from textual import on
from textual.message import Message

from ..runtime.controls import combine
from ..runtime.errors import InputError, LocalReasonError, OutputError
from ..runtime.paths import expanded
from . import export
from .messages import ModelOpened, OpenFailed, OpenProgress, Streamed
from .screen import ChatScreen
from .told import told
from .widgets.ask import Ask
from .widgets.conversations import Conversations
from .widgets.models import Models
from .widgets.opening import Opening
from .widgets.presets import CONTROL, PRESET, Presets, explain

_ATTACHED_BYTES = 1 << 20


class Menus(ChatScreen):
    """The screens that lie over the chat, and what comes of them."""

    # --- conversations ------------------------------------------------------------------------------------------

    async def _open_conversation(self, id: int) -> None:
        with told(self):
            self.dialogue.open(id)
            self.end_edit(self.composer.expanded())
        await self.show_conversation()
        self.composer.focus()

    # What lays the conversation out anew runs in the screen's own task, as what comes from the decode does: half of it
    # in the task of a key would meet turns that are there no more.
    def action_new(self) -> None:
        self.call_later(self._begin)

    def action_neighbour(self, step: int) -> None:
        self.call_later(self._go_to_neighbour, step)

    async def _begin(self) -> None:
        self.dialogue.begin()
        self.end_edit(self.composer.expanded())
        await self.show_conversation()
        self.composer.focus()

    async def _go_to_neighbour(self, step: int) -> None:
        with told(self):
            found = self.dialogue.neighbour(step)
            if found is not None:
                await self._open_conversation(found.id)
            else:
                self.notify("There is no older conversation." if step > 0 else "There is no newer conversation.")

    def action_conversations(self) -> None:
        current = self.dialogue.conversation.id if self.dialogue.conversation is not None else None
        with told(self):
            listed = Conversations(self.dialogue.history, current, self.export, self._protected)

            def take(chosen: str | None) -> None:
                self.call_later(self._take_conversation, chosen, listed)

            self.app.push_screen(listed, take)

    def _protected(self) -> int | None:
        """The conversation that a reply is being written for."""
        return self.dialogue.run.conversation.id if self.dialogue.run is not None else None

    async def _take_conversation(self, chosen: str | None, listed: Conversations) -> None:
        current = self.dialogue.conversation
        if chosen is not None:
            await self._open_conversation(int(chosen))
        elif current is not None and current.id in listed.deleted:
            await self._begin()
        elif current is not None and self.dialogue.run is None:
            with told(self):  # it may have another title; a message that is being edited stays so
                self.dialogue.open(current.id)
            await self.show_conversation()

    def action_export(self) -> None:
        if self.dialogue.conversation is not None:
            self.export(self.dialogue.conversation.id, "md")
        else:
            self.notify("There is nothing to export yet.")

    def export(self, id: int, kind: str) -> None:
        """Ask for a file and write a conversation to it, as Markdown ("md") or JSON ("json")."""

        def write(name: str | None) -> None:
            if name and name.strip():
                with told(self):
                    path = expanded(name.strip())
                    conversation = self.dialogue.history.load(id)
                    text = export.to_json(conversation) if kind == "json" else export.to_markdown(conversation)
                    _write_new(path, text)
                    self.notify(f"Written to {path}.", markup=False)

        self.app.push_screen(Ask("Export to", f"conversation-{id}.{kind}"), write)

    # --- models -------------------------------------------------------------------------------------------------

    def action_models(self, is_first: bool = False) -> None:
        """The list of models; looking for them takes a moment and is done in a thread."""
        self.run_worker(lambda: self._list_models(is_first), thread=True, exclusive=True, group="models")

    def _list_models(self, is_first: bool) -> None:
        try:
            found = self.backend.suggestions()
        except LocalReasonError as error:
            self.app.call_from_thread(self.notify, str(error), severity="error", markup=False)
            return
        models = Models(found, self.dialogue.model, is_first)
        self.app.call_from_thread(self.app.push_screen, models, self._take_model)

    def _take_model(self, name: str | None) -> None:
        if name is not None:
            self.open_model(name)

    def open_model(self, name: str) -> None:
        """Open a model in place of the one that is open."""
        if self.is_opening:
            self.notify("A model is being opened already.", severity="warning")
            return
        self.is_opening = True
        if self.dialogue.run is not None:
            self.dialogue.run.reply.stop()
        self.dialogue.streamer = None
        self.query_one(Opening).show(f"opening {name}", 0, 0)
        # Not a worker: leaving the chat would wait for it, be it a download of an hour.
        threading.Thread(target=self._open, args=[name], name="opening", daemon=True).start()

    def _open(self, name: str) -> None:
        def post(message: Message) -> None:
            with contextlib.suppress(RuntimeError):  # the chat is over
                self.post_message(message)

        def progress(text: str, n_done: int, n_total: int) -> None:
            post(OpenProgress(text, n_done, n_total))

        try:
            opened = self.backend.open(name, lambda event: post(Streamed(event)), progress)
        except LocalReasonError as error:
            post(OpenFailed(str(error)))
        except Exception as error:
            post(OpenFailed(f"this is a bug: {type(error).__name__}: {error}"))
        else:
            post(ModelOpened(opened))

    @on(OpenProgress)
    def show_progress(self, event: OpenProgress) -> None:
        self.query_one(Opening).show(event.text, event.n_done, event.n_total)

    @on(ModelOpened)
    def take_model(self, event: ModelOpened) -> None:
        self.is_opening = False
        self.query_one(Opening).hide()
        with told(self):
            self.dialogue.take(event.opened.name, event.opened.streamer)
        if event.opened.note:
            self.notify(event.opened.note, markup=False)
        self.show_heading()
        self.show_context()
        self.refresh_bindings()

    @on(OpenFailed)
    def tell_failure(self, event: OpenFailed) -> None:
        self.is_opening = False
        self.query_one(Opening).hide()
        self.dialogue.model = ""
        self.notify(event.text, severity="error", timeout=15, markup=False)
        self.show_heading()
        self.refresh_bindings()

    # --- controls -----------------------------------------------------------------------------------------------

    def action_presets(self) -> None:
        presets = Presets(self.dialogue.preset, self.dialogue.recipe)
        self.app.push_screen(presets, self._take_preset)

    def _take_preset(self, chosen: str | None) -> None:
        if chosen is None:
            return
        if chosen.startswith(PRESET):
            self._combine(chosen.removeprefix(PRESET), ())
            return
        name = chosen.removeprefix(CONTROL)

        def add(text: str | None) -> None:
            if text and text.strip():
                kept = tuple(other for other in self.dialogue.controls if other.partition(":")[0] != name)
                self._combine(self.dialogue.preset, (*kept, text.strip()))

        now = next((text for text in self.dialogue.controls if text.partition(":")[0] == name), name)
        help = f"{explain(name)}\n\nParameters as {name}:KEY=VALUE,KEY=VALUE; a preset of F3 takes them off again."
        self.app.push_screen(Ask(f"Set the control {name}", now, help), add)

    def _combine(self, preset: str, texts: tuple[str, ...]) -> None:
        with told(self):
            self.dialogue.control(preset, texts, combine(None if preset == "none" else preset, texts))
            self.show_heading()
            self.show_context()

    # --- files --------------------------------------------------------------------------------------------------

    def action_attach(self) -> None:
        def attach(name: str | None) -> None:
            if name and name.strip():
                with told(self):
                    path = expanded(name.strip())
                    text = _read(path)
                    self.composer.fold("file", path.name, f"\n{path.name}:\n```\n{text.rstrip()}\n```\n")
            self.composer.focus()

        self.app.push_screen(Ask("Attach a file as text"), attach)


def _read(path: Path) -> str:
    """The text of a file that is small enough for a message."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, in the screen's own task
            raise InputError(f"{path} is no regular file; give the path of a text file")
        with path.open("rb") as file:
            data = file.read(_ATTACHED_BYTES + 1)
    except (OSError, ValueError) as error:  # a name may hold a NUL
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {why}; give the path of a text file") from error
    if len(data) > _ATTACHED_BYTES:
        raise InputError(f"{path} has more than {_ATTACHED_BYTES >> 20} MiB; attach a part of it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; convert it first") from error


def _write_new(path: Path, text: str) -> None:
    """Write a file that is not there yet."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputError(f"{path} is there already; give another name") from error
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another path") from error
