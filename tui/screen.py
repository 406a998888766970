"""The screen of the chat: shows the conversation and follows the decode. Its keys are in `actions.py`."""

from collections.abc import Iterator

from textual import on
from textual.app import ComposeResult
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from ..runtime import template
from .backend import Backend
from .conversation import Message
from .delta import Delta, Ended, Failed, Progress, SampleEnded, Started
from .dialogue import Dialogue, Run
from .messages import Streamed
from .reply import Reply
from .told import told
from .visible import visible
from .widgets.composer import Composer
from .widgets.instruments import Instruments
from .widgets.nodes import NodeStrip
from .widgets.opening import Opening
from .widgets.race import Race
from .widgets.reply import ReplyTurn
from .widgets.transcript import Transcript
from .widgets.turn import Turn

SAVE_SECONDS = 0.5
NODES_SECONDS = 1.0
SHOW_SECONDS = 1 / 15


class ChatScreen(Screen[None]):
    """Everything but the keys."""

    def __init__(self, dialogue: Dialogue, backend: Backend) -> None:
        super().__init__()
        self.dialogue = dialogue
        self.backend = backend
        self.is_opening = False
        self.edited: Message | None = None
        """The message of which another version is written."""
        self._parked = ""
        """The draft that this put aside."""
        self._turn: ReplyTurn | None = None
        """The turn of the running reply, while it is in sight."""
        self._n_entropies = 0
        self._is_placing = False
        """The ring is placed anew; no token came since."""
        self._due: Timer | None = None
        self._folded: tuple[str, ...] = ()
        """What was folded in the draft when it was last measured."""

    def compose(self) -> ComposeResult:
        yield Static("", id="heading", markup=False)
        yield Transcript(id="transcript")
        yield Opening(id="opening")
        yield NodeStrip(id="nodes")
        yield Instruments(id="instruments")
        yield Static("", id="refusal", markup=False)
        yield Composer(id="composer")
        yield Footer(compact=True, show_command_palette=False)

    async def on_mount(self) -> None:
        self.set_interval(SAVE_SECONDS, self.save)
        self.set_interval(NODES_SECONDS, self.show_nodes)
        self.composer.focus()
        await self.show_conversation()

    # --- parts --------------------------------------------------------------------------------------------------

    @property
    def composer(self) -> Composer:
        return self.query_one(Composer)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def instruments(self) -> Instruments:
        return self.query_one(Instruments)

    # --- the conversation ---------------------------------------------------------------------------------------

    async def show_conversation(self) -> None:
        """Lay the open conversation out anew."""
        dialogue = self.dialogue
        run = dialogue.run if dialogue.is_run_in_sight else None
        conversation = dialogue.conversation
        n_samples = run.reply.recipe.n_samples if run is not None else 1
        self._turn = None
        await self.transcript.show(conversation, run.message.id if run is not None else None, n_samples)
        if run is not None:
            self._turn = next((t for t in self.transcript.query(ReplyTurn) if t.message.id == run.message.id), None)
            await self._sync(run)
        if conversation is not None:
            self.composer.remember([m.content for m in conversation.path() if m.role == "user"])
        self.show_heading()
        self.show_context()
        self.refresh_bindings()

    def show_heading(self) -> None:
        """Title, model, preset, in one line."""
        conversation = self.dialogue.conversation
        title = conversation.title if conversation is not None and conversation.title else "New conversation"
        model = self.dialogue.model or "no model"
        right = f"{model} · {self.dialogue.preset}"
        room = max(8, self.size.width - len(right) - 6)
        title = " ".join(visible(title).split())
        title = title if len(title) <= room else f"{title[: room - 1]}…"
        self.query_one("#heading", Static).update(f"{title}   {visible(right)}")

    def show_context(self) -> None:
        """The context as it stands while nothing runs, with what was pasted or attached and is not sent yet."""
        if self.dialogue.run is not None or self.dialogue.streamer is None:
            return
        self._refuse("")
        draft = self.composer.expanded() if self.composer.folded else ""
        if draft:
            self.has_room(self.dialogue.turns(draft, self.edited))
        elif turns := self.dialogue.turns():
            with told(self):
                context = self.dialogue.streamer.measure(turns, self.dialogue.recipe)
                self.instruments.show_context(context.n_used, context.n_limit)
                self._warn(context.warning)
        else:
            self.instruments.show_context(0, 0)

    def has_room(self, turns: list[template.Message]) -> bool:
        """Whether the context holds what is to be asked; if not, the reason stands above the composer."""
        assert self.dialogue.streamer is not None
        with told(self):
            context = self.dialogue.streamer.measure(turns, self.dialogue.recipe)
            self.instruments.show_context(context.n_used, context.n_limit)
            self._refuse(context.refusal)
            return not context.refusal
        return False

    def _refuse(self, reason: str) -> None:
        refusal = self.query_one("#refusal", Static)
        refusal.update(reason)
        refusal.display = bool(reason)

    @on(Composer.Changed, "#composer")
    def weigh(self) -> None:
        """Measure the draft when a long text came or went; what is typed is too little to look at with every key."""
        folded = self.composer.folded
        if folded != self._folded or (not folded and self.query_one("#refusal").display):
            self._folded = folded
            self.show_context()

    def _warn(self, warning: str) -> None:
        if warning:
            self.notify(warning, severity="warning", markup=False)

    def show_nodes(self) -> None:
        """The machines of the ring; where a reply waits for their layers to be placed anew, that is said until its next
        token."""
        nodes = self.backend.nodes()
        if self.dialogue.run is not None and self.backend.is_placing():
            self._is_placing = True
            self._show_pace(self.dialogue.run.reply)
        self.query_one(NodeStrip).show(nodes, self._is_placing)

    def save(self) -> None:
        """Store what is shown of the running reply, so that a crash loses nothing of it."""
        with told(self):
            self.dialogue.save()

    @on(Composer.Sent)
    async def send(self, event: Composer.Sent) -> None:
        run = None
        if self.is_ready() and self.has_room(self.dialogue.turns(event.text, self.edited)):
            with told(self):
                run = self.dialogue.edit(self.edited, event.text) if self.edited else self.dialogue.send(event.text)
        if run is None:
            self.composer.put_back(event)
            return
        self.composer.note_sent(event)
        self.end_edit(self.composer.expanded())
        await self.follow(run)

    def begin_edit(self, message: Message) -> None:
        """Write a message anew; the draft is put aside."""
        self.composer.leave_inputs()
        if self.edited is None:
            self._parked = self.composer.expanded()
        self.edited = message
        self.composer.restore(message.content)

    def end_edit(self, text: str = "") -> None:
        """Go on with the draft, behind a text that is to stay."""
        if self.edited is not None:
            self.edited = None
            self.composer.restore("\n".join(filter(None, [text, self._parked])))

    def is_ready(self) -> bool:
        """Whether a reply can be started; if not, the user is told."""
        if self.dialogue.run is not None:
            self.notify("The model is still answering; Esc stops it.", severity="warning")
        elif self.dialogue.streamer is None:
            self.notify("The model is being opened." if self.is_opening else "There is no model; F2 chooses one.")
        return self.dialogue.run is None and self.dialogue.streamer is not None

    async def follow(self, run: Run) -> None:
        """Show a reply that was just started."""
        self._n_entropies = 0
        self.instruments.begin()
        self.instruments.show_state("reading")
        self.instruments.show_budget(0, run.reply.recipe.max_thinking)
        await self.show_conversation()

    # --- the decode ---------------------------------------------------------------------------------------------

    @on(Streamed)
    async def take(self, message: Streamed) -> None:
        """One event of the decode; several that wait come one after the other."""
        event, run = message.event, self.dialogue.run
        if run is None or event.reply is not run.reply:
            return
        if isinstance(event, Ended | Failed | Delta):
            self._is_placing = False
        if isinstance(event, Ended | Failed):
            await self._finish(event)
        elif isinstance(event, Started):
            self.instruments.show_context(event.context.n_used, event.context.n_limit)
            self._warn(event.context.warning)
        elif isinstance(event, Progress):
            self.instruments.show_state(f"reading {100 * event.n_done // max(1, event.n_total)}%")
        elif isinstance(event, SampleEnded):
            self._end_lane(event)
        else:
            self._fill_lane(event)
            self._follow()

    def _follow(self) -> None:
        """Show what is new soon, with all that comes until then: a long conversation takes time to lay out."""
        if self._due is None:
            self._due = self.set_timer(SHOW_SECONDS, self.show_now)

    async def show_now(self) -> None:
        """Show what is new."""
        due, self._due = self._due, None
        if due is not None:
            due.stop()
            if self.dialogue.run is not None:
                await self._sync(self.dialogue.run)

    async def _sync(self, run: Run) -> None:
        """Bring turn and instruments to where the reply is."""
        reply, sample = run.reply, run.reply.best
        if sample is None:
            return
        instruments = self.instruments
        was = instruments.state
        self._show_pace(reply)
        instruments.show_budget(sample.n_thinking, sample.n_budget)
        if reply.context is not None:
            instruments.show_context(reply.context.n_used, reply.context.n_limit)
        fresh = tuple(sample.entropies[self._n_entropies :])
        self._n_entropies += len(fresh)
        instruments.add_entropies(fresh)
        if self._turn is not None and reply.recipe.n_samples == 1:
            await self._turn.sync(sample)
        if instruments.state != was:
            self.refresh_bindings()

    def written(self, turn: Turn) -> str:
        """The text of a message, so far for the running reply."""
        run = self.dialogue.run
        if run is None or turn is not self._turn or run.reply.best is None:
            return turn.message.content
        return run.reply.best.answer

    def _show_pace(self, reply: Reply) -> None:
        """What goes on, and how fast."""
        phase = reply.best.phase if reply.best is not None else "prompt"
        state = {"prompt": "reading", "think": "thinking", "answer": "answering"}[phase]
        self.instruments.show_state("placing" if self._is_placing else state)
        self.instruments.show_speed(0 if self._is_placing else reply.tokens_per_second)

    def _fill_lane(self, event: Delta) -> None:
        for race in self._races():
            lane = race.lane(event.sample)
            lane.add(visible(event.text), event.n_tokens)
            lane.become("thinking" if event.phase == "think" else "answering")

    def _end_lane(self, event: SampleEnded) -> None:
        states = {"end": "done", "lost": "lost"}
        for race in self._races():
            race.lane(event.sample).become(states.get(event.reason, "stopped"))

    def _races(self) -> Iterator[Race]:
        if self._turn is not None and self._turn.n_samples > 1:
            yield from self._turn.query(Race)

    async def _finish(self, event: Ended | Failed) -> None:
        await self.show_now()
        message = self.dialogue.finish(event)
        winner = event.reply.winner.index if event.reply.winner is not None else None
        if message is not None and self._turn is not None:
            await self._turn.end(message, winner)
        with told(self):
            self.dialogue.store()
        self._turn = None
        self.instruments.show_state("ready")
        self.instruments.show_speed(event.reply.tokens_per_second)
        if isinstance(event, Failed):
            self.notify(event.message, severity="error", markup=False)
        self.show_heading()
        self.show_context()
        self.refresh_bindings()
