"""A chat without weights: real conversations, replies and controls, whose tokens the test itself writes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from textual import events
from textual.keys import _character_to_key
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

from localreason.runtime.controls import CONTROLS, PRESETS, Setup
from localreason.runtime.errors import ModelNotFound
from localreason.runtime.formats import FORMATS
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.recipe import Recipe
from localreason.runtime.schedule import Request
from localreason.runtime.sequence import Phase, Sequence
from localreason.tui.app import ChatApp
from localreason.tui.backend import Opened
from localreason.tui.conversation import Mark
from localreason.tui.delta import Delta, Ended, Failed, SampleEnded, Started
from localreason.tui.history import History
from localreason.tui.reply import Context, Reply, measure
from localreason.tui.starter import Offer, Suggestion
from localreason.tui.widgets.nodes import NodeState
from tests.fakes import ByteTokenizer

SAFE = Recipe(PRESETS["safe"].controls)
PARALLEL = Recipe(PRESETS["parallel"].controls)


class Streamer:
    """Stands for the decode thread; `think`, `answer` and `end` write the running reply."""

    def __init__(self, post, n_context: int) -> None:
        self.post = post
        self.is_watching_entropy = False
        self.started: list[tuple[list, Recipe, str]] = []
        self.reply: Reply | None = None
        self.engine = SimpleNamespace(n_context=n_context, n_context_sequence=n_context)
        self.n_prompt = 300

    def start(self, turns, recipe: Recipe, preset: str = "") -> Reply:
        self.started.append((turns, recipe, preset))
        reply = self.reply = Reply(len(self.started), recipe, preset)
        tokenizer, format = ByteTokenizer(), FORMATS["think"]
        requests = []
        for index in range(recipe.n_samples):
            sequence = Sequence([0] * self.n_prompt, sample=index)
            setup = Setup(tokenizer, format, recipe.seed + index, True, {})
            controls = [CONTROLS[p.control](p, setup) for p in recipe.controls if p.control == "budget"]
            requests.append(Request(sequence, PhaseTracker(format, ""), lambda row: 0, controls))
        reply.begin(self.engine, requests)
        self.post(Started(reply, self.measure(turns, recipe)))
        return reply

    def measure(self, turns, recipe: Recipe) -> Context:
        n_long = sum(len(turn.content) // 4 for turn in turns if len(turn.content) > 2000)
        return measure(self.engine, recipe, self.n_prompt + n_long)

    def close(self, seconds: float = 10.0) -> bool:
        return True

    def _write(self, phase: Phase, text: str, sample: int, n_tokens: int, marks=(), entropies=()) -> None:
        reply = self.reply
        assert reply is not None
        one = reply.samples[sample]
        sequence, counts = one.sequence, one.sequence.counts
        sequence.phase = phase
        sequence.tokens += [0] * n_tokens
        one.first, one.last = reply.asked, reply.asked + 2.0  # the clock of a script
        if phase is Phase.THINK:
            sequence.thinking += text
            counts.thinking += n_tokens
            one.last_thinking = reply.asked + 1.0
        else:
            sequence.answer += text
            counts.answer += n_tokens
        one.marks += marks
        one.entropies += entropies
        self.post(Delta(reply, sample, phase.value, text, n_tokens, tuple(entropies), tuple(marks)))

    def think(self, text: str, sample: int = 0, marks: tuple[Mark, ...] = (), entropies=(), n_tokens: int = 8) -> None:
        self._write(Phase.THINK, text, sample, n_tokens, marks, entropies)

    def answer(self, text: str, sample: int = 0, n_tokens: int = 4) -> None:
        self._write(Phase.ANSWER, text, sample, n_tokens)

    def end(self, reason: str = "end", winner: int = 0) -> None:
        reply = self.reply
        assert reply is not None
        for one in reply.samples:
            one.sequence.finish = reason if one.index == winner else "lost"
            self.post(SampleEnded(reply, one.index, one.sequence.finish))
        stats = reply.end("scripted")
        won = reply.winner = reply.samples[winner]
        counts = {"n_thinking": won.n_thinking, "n_answer": won.n_answer}
        stats = replace(stats, total_seconds=2.5, tokens_per_second=40.0, stop=reason, **counts)
        self.post(Ended(reply, stats))

    def fail(self, message: str) -> None:
        assert self.reply is not None
        self.reply.end("scripted", message)
        self.post(Failed(self.reply, message))


class Backend:
    """Opens scripted models."""

    def __init__(self, n_context: int = 4096) -> None:
        self.opened: list[str] = []
        self.machines: tuple[NodeState, ...] = ()
        self.is_placed_anew = False
        self.streamer: Streamer | None = None
        self.n_context = n_context

    def suggestions(self) -> list[Suggestion]:
        offers = (
            Offer("qwen3-0.6b", 640_000_000, summary="smallest that really thinks"),
            Offer("qwen3-1.7b", 1_830_000_000, summary="for laptops with 4 GB free"),
            Offer("demo", 96_000_000, summary="only demonstrates", is_here=True),
        )
        return [Suggestion(one, "fits", 8192, "f16", one.n_bytes, "It fits with 8192 tokens.") for one in offers]

    def open(self, name: str, on_event, on_progress) -> Opened:
        if name == "missing":
            raise ModelNotFound("there is no model 'missing'; choose another")
        on_progress(f"fetching {name}", 1_000_000_000, 4_000_000_000)
        self.opened.append(name)
        self.streamer = Streamer(on_event, self.n_context)
        return Opened(name, self.streamer)

    def nodes(self) -> tuple[NodeState, ...]:
        return self.machines

    def is_placing(self) -> bool:
        return self.is_placed_anew

    def close(self) -> None:
        pass


class Stage:
    """An app under a pilot, with what a test looks at."""

    def __init__(self, app: ChatApp, backend: Backend, pilot) -> None:
        self.app, self.backend, self.pilot = app, backend, pilot
        self.chat, self.dialogue, self.history = app.chat, app.dialogue, app.dialogue.history

    @property
    def script(self) -> Streamer:
        assert self.backend.streamer is not None
        return self.backend.streamer

    @property
    def notices(self) -> str:
        return "\n".join(notice.message for notice in self.app._notifications)

    @property
    def text(self) -> str:
        """The screen as a reader sees it."""
        screen = self.app.screen
        strips = screen._compositor.render_strips(screen.size)
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)

    async def press(self, *keys: str) -> None:
        """Keys by name, each taken before the next. A pilot's own press waits for an idle process, for a second and
        more where others compute too."""
        driver = self.app._driver
        assert driver is not None
        for key in keys:
            is_character = len(key) == 1
            name = _character_to_key(key) if is_character and not key.isalnum() else key
            event = events.Key(name, key if is_character else None)
            event.set_sender(self.app)
            driver.send_message(event)
            await self.settle()

    async def settle(self) -> None:
        """Wait until every widget has taken what was sent to it, and what came of that."""
        for _ in range(3):
            await self.app.workers.wait_for_complete()
            while any(thread.name == "opening" for thread in threading.enumerate()):
                await asyncio.sleep(0.001)
            await self.pilot._wait_for_screen()
            await self.chat.show_now()
            self.app.screen._on_timer_update()
        for _ in range(50):  # an app that ends, or one without focus, lays nothing out any more
            if not self._is_footer_late():
                break
            await asyncio.sleep(0.01)
            await self.pilot._wait_for_screen()
            self.app.screen._on_timer_update()

    def _is_footer_late(self) -> bool:
        """True until the footer has been laid out for the keys that are live: it is after the screen's next refresh."""
        screen = self.app.screen
        live = {(b.action, enabled) for _, b, enabled, _ in screen.active_bindings.values() if b.show}
        return any(
            footer.is_attached and {(key.action, not key._disabled) for key in footer.query(FooterKey)} != live
            for footer in screen.query(Footer)
        )

    async def until(self, is_reached: Callable[[], object]) -> None:
        """Wait for what threads and timers of the app bring about."""
        async with asyncio.timeout(20):
            while not is_reached():
                await asyncio.sleep(0.01)
                await self.settle()

    async def told(self, text: str) -> None:
        """Wait for a notice with this text."""
        await self.until(lambda: text in self.notices)

    async def type(self, text: str) -> None:
        """Paste a text where the cursor is."""
        self.app.post_message(events.Paste(text))
        await self.settle()

    async def ask(self, text: str = "What is 17 * 23?") -> None:
        self.chat.composer.insert(text)
        await self.press("enter")

    async def reply(self, answer: str = "It is **391**.", thinking: str = "17 * 23 is 391.") -> None:
        """Let the model say this to what was asked."""
        if thinking:
            self.script.think(thinking)
        self.script.answer(answer)
        self.script.end()
        await self.settle()

    async def talk(self, text: str = "What is 17 * 23?", answer: str = "It is **391**.") -> None:
        await self.ask(text)
        await self.reply(answer)


Scene = Callable[[Stage], Awaitable[None]]


def play(
    tmp_path: Path,
    scene: Scene,
    size: tuple[int, int] = (80, 24),
    recipe: Recipe = SAFE,
    preset: str = "safe",
    model: str | None = "scripted",
    backend: Backend | None = None,
) -> None:
    """Play a scene in a chat over the history in a folder."""

    async def perform() -> None:
        with History(tmp_path / "chats.sqlite3") as history:
            wired = backend or Backend()
            app = ChatApp(wired, history, recipe, preset, model)
            app.animation_level = "none"
            async with app.run_test(size=size, notifications=True) as pilot:
                stage = Stage(app, wired, pilot)
                await stage.settle()
                await scene(stage)

    asyncio.run(perform())
