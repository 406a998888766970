"""What the keys of the chat do."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widget import Widget

from . import export
from .menus import Menus
from .told import told
from .widgets.question import Question
from .widgets.reply import ReplyTurn
from .widgets.turn import Turn

THINK_LONGER_TOKENS = 512


class Chat(Menus):
    """The chat with its keys. Those with priority work while the user writes; none is one of the editor's own."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", key_display="esc", priority=True, tooltip="stop the reply"),
        Binding("escape", "keep", "Cancel", key_display="esc", priority=True, tooltip="end an edit"),
        Binding(
            "ctrl+c", "interrupt", "Copy or stop", show=False, priority=True, tooltip="copy a selection, else stop"
        ),
        Binding("ctrl+g", "answer_now", "Answer now", priority=True, tooltip="close the thinking and answer"),
        Binding("ctrl+t", "think_longer", "Think longer", priority=True, tooltip="512 tokens more of thinking"),
        Binding("ctrl+r", "again", "Again", priority=True, tooltip="another reply to the last question"),
        Binding("f2", "models", "Model", priority=True, tooltip="another model"),
        Binding("f3", "presets", "Control", priority=True, tooltip="preset and controls of the thinking"),
        Binding("f4", "conversations", "Chats", priority=True, tooltip="search, open, rename, delete, export"),
        Binding("ctrl+n", "new", "New", priority=True, tooltip="a new conversation"),
        Binding("f5", "copy_last", "Copy reply", show=False, priority=True, tooltip="copy the last reply"),
        Binding("f8,ctrl+pageup", "neighbour(-1)", "Newer", show=False, priority=True, tooltip="newer conversation"),
        Binding("f9,ctrl+pagedown", "neighbour(1)", "Older", show=False, priority=True, tooltip="older conversation"),
        Binding("ctrl+o", "attach", "Attach", show=False, priority=True, tooltip="put a file in as text"),
        Binding("ctrl+b", "browse", "Messages", show=False, priority=True, tooltip="to the messages, as shift+tab"),
        Binding("ctrl+s", "export", "Export", show=False, priority=True, tooltip="write the conversation to a file"),
    ]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """The footer shows what can be done now."""
        run = self.dialogue.run
        sample = run.reply.best if run is not None else None
        is_thinking = run is not None and not run.reply.is_over and (sample is None or sample.phase != "answer")
        if action == "stop":
            return run is not None
        if action == "keep":
            return run is None and self.edited is not None
        if action in ("answer_now", "think_longer"):
            return is_thinking
        if action == "again":  # on a reply there is a key for that very one
            return run is None and not isinstance(self.focused, ReplyTurn)
        if action == "models":
            return run is None
        if action in ("fold", "mark", "copy_block", "regenerate", "edit", "version"):
            return self._fits(action, self.focused)
        return True

    def _fits(self, action: str, focused: Widget | None) -> bool:
        """Whether a key of a message has something to do with this one."""
        if not isinstance(focused, Turn):
            return False
        is_idle = self.dialogue.run is None
        if action == "version":
            return focused.version[1] > 1 and is_idle
        if action == "edit":
            return isinstance(focused, Question) and is_idle
        if action == "copy_block":
            return "```" in focused.message.content
        if not isinstance(focused, ReplyTurn):
            return False
        if action == "regenerate":
            return is_idle
        return bool(focused.thinking.marks) if action == "mark" else focused.thinking.display

    # --- the running reply --------------------------------------------------------------------------------------

    def action_stop(self) -> None:
        if self.dialogue.run is not None:
            self.dialogue.run.reply.stop()
            self.instruments.show_state("stopping")

    def action_interrupt(self) -> None:
        """What Ctrl-C means: copy what is selected, else stop, else tell how to leave."""
        selected = self.get_selected_text() or self.composer.selected_text
        if selected:
            self.copy(selected)
        elif self.dialogue.run is not None:
            self.action_stop()
        else:
            self.notify("Ctrl+Q leaves the chat.")

    def action_answer_now(self) -> None:
        run = self.dialogue.run
        if run is not None:
            if run.reply.answer_now():
                self.instruments.show_state("closing")
            else:
                self.notify("Without a budget control the thinking cannot be closed; F3 adds one.", severity="warning")

    def action_think_longer(self) -> None:
        run = self.dialogue.run
        if run is None:
            return
        if run.reply.think_longer(THINK_LONGER_TOKENS):
            self.notify(f"{THINK_LONGER_TOKENS} tokens more to think.")
            if run.reply.best is not None:
                self.instruments.show_budget(run.reply.best.n_thinking, run.reply.best.n_budget)
        else:
            self.notify("Without a budget control the thinking cannot be prolonged; F3 adds one.", severity="warning")

    # --- messages -----------------------------------------------------------------------------------------------

    @property
    def _chosen(self) -> Turn | None:
        return self.focused if isinstance(self.focused, Turn) else None

    def action_again(self) -> None:
        self.call_later(self._reply_again, self.transcript.last_reply)

    def action_regenerate(self) -> None:
        self.call_later(self._reply_again, self._chosen)
        self.composer.focus()

    async def _reply_again(self, turn: Turn | None) -> None:
        """Another version of a reply, if the context holds its question."""
        # By now it may be another conversation.
        if not isinstance(turn, ReplyTurn) or turn not in self.transcript.turns or not self.is_ready():
            return
        if self.has_room(self.dialogue.turns_before(turn.message)):
            with told(self):
                await self.follow(self.dialogue.regenerate(turn.message))

    def action_edit(self) -> None:
        """Write a message anew; the old one and all that follows it stay as another branch."""
        turn = self._chosen
        if isinstance(turn, Question) and self.is_ready():
            self.begin_edit(turn.message)
            self.composer.focus()
            self.instruments.show_state("editing")
            self.refresh_bindings()

    def action_keep(self) -> None:
        """End an edit without another version."""
        self.end_edit()
        self.instruments.show_state("ready")
        self.refresh_bindings()

    def action_version(self, step: int) -> None:
        self.call_later(self._step_version, self._chosen, step)

    async def _step_version(self, turn: Turn | None, step: int) -> None:
        if turn in self.transcript.turns and self.dialogue.run is None:
            with told(self):
                at = self.transcript.turns.index(turn)
                if self.dialogue.step_version(turn.message, step):
                    await self.show_conversation()
                    self.transcript.turns[at].focus()

    def action_walk(self, step: int) -> None:
        turns, turn = self.transcript.turns, self._chosen
        at = turns.index(turn) + step if turn in turns else len(turns) - 1
        if at >= len(turns):
            self.composer.focus()
        elif at >= 0:
            turns[at].focus()

    def action_browse(self) -> None:
        turns = self.transcript.turns
        if turns:
            turns[-1].focus()

    def action_write(self) -> None:
        self.composer.focus()

    def action_scroll(self, step: int) -> None:
        if step > 0:
            self.transcript.scroll_page_down(animate=False)
        else:
            self.transcript.scroll_page_up(animate=False)

    def action_fold(self) -> None:
        if isinstance(self._chosen, ReplyTurn):
            self._chosen.toggle()

    def action_mark(self, step: int) -> None:
        if isinstance(self._chosen, ReplyTurn):
            self._chosen.explain_mark(step)

    def action_copy_message(self) -> None:
        if self._chosen is not None:
            self.copy(self.written(self._chosen) or self._chosen.message.thinking)

    def action_copy_last(self) -> None:
        turn = self.transcript.last_reply
        if turn is not None:
            self.copy(self.written(turn))

    def action_copy_block(self) -> None:
        """The first code block, with each press the next."""
        turn = self._chosen
        blocks = export.copy_blocks(self.written(turn)) if turn is not None else []
        if turn is not None and blocks:
            at = turn.next_block % len(blocks)
            turn.next_block = at + 1
            self.copy(blocks[at], f"code block {at + 1} of {len(blocks)}")

    def copy(self, text: str, what: str = "") -> None:
        """Put a text into the terminal's clipboard (OSC 52)."""
        if not text:
            self.notify("There is nothing to copy yet.")
            return
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied {what or f'{len(text)} characters'}.")
