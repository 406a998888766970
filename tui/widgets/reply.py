"""A reply: its race, its thinking, its answer, and how it came about."""

from textual.app import ComposeResult
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from ..conversation import Mark, Message, Stats
from ..formula import FormulaReader, shown
from ..reply import Sample
from ..visible import parser, visible
from .race import Race
from .thinking import Thinking
from .turn import Turn

_ENDS = {
    "length": "cut at its limit of tokens",
    "context": "the context is full",
    "stopped": "stopped",
    "error": "ended by an error",
    "interrupted": "interrupted",
}


class ReplyTurn(Turn):
    """Made of a stored message, or empty for a running one and then fed by `sync`. `sync` may be called with the same
    sample again and again: it shows what is new in it."""

    def __init__(self, message: Message, version: tuple[int, int], n_samples: int = 1, is_live: bool = False) -> None:
        super().__init__(message, version)
        self.is_live = is_live
        self.n_samples = n_samples
        self._n_shown = 0
        self._reader = FormulaReader()
        self._stream: MarkdownStream | None = None
        self.is_fold_chosen = False
        """The reader folded or unfolded the thinking; it is not folded again by itself."""

    def compose(self) -> ComposeResult:
        message = self.message
        yield Static(f"reply{self.version_text}", classes="who", markup=False)
        if self.n_samples > 1:
            yield Race(self.n_samples)
        thinking = Thinking(is_open=not self.is_live and not message.content.strip())
        thinking.text, thinking.marks = message.thinking, list(message.marks)
        thinking.entitle(_thought(message.stats))
        thinking.display = bool(message.thinking)
        yield thinking
        # A live one is shown by `sync`, from its start.
        answer = "" if self.is_live else shown(visible(message.content))
        yield Markdown(answer, classes="answer", open_links=False, parser_factory=parser)
        yield Static(_account(message) if not self.is_live else "", classes="account", markup=False)

    def on_mount(self) -> None:
        account = self.query_one(".account", Static)
        account.display = not self.is_live and bool(_account(self.message))
        if self.is_live:
            self._stream = Markdown.get_stream(self.query_one(".answer", Markdown))

    async def on_unmount(self) -> None:
        if self._stream is not None:
            await self._stream.stop()

    @property
    def thinking(self) -> Thinking:
        return self.query_one(Thinking)

    async def sync(self, sample: Sample) -> None:
        """Show what is new in a sample."""
        await self._show(sample.thinking, sample.answer, list(sample.marks))
        self.thinking.entitle(f"Thinking  {sample.thinking_seconds:.0f} s · {sample.n_thinking} tokens")

    async def _show(self, thinking_text: str, answer: str, marks: list[Mark]) -> None:
        thinking = self.thinking
        if thinking_text.strip() and not thinking.display:
            thinking.display = True
            if not self.is_fold_chosen:
                thinking.fold(True)
        thinking.sync(thinking_text, marks)
        if len(answer) > self._n_shown:
            if not self._n_shown and not self.is_fold_chosen:
                thinking.fold(False)
            text = self._reader.feed(visible(answer[self._n_shown :]))
            self._n_shown = len(answer)
            if self._stream is not None:
                await self._stream.write(text)

    async def end(self, message: Message, winner: int | None) -> None:
        """The reply is complete; what the winner wrote and was not shown yet is shown."""
        self.message = message
        await self._show(message.thinking, message.content, list(message.marks))
        self.is_live = False
        if self._stream is not None:
            await self._stream.write(self._reader.flush())
            await self._stream.stop()
            self._stream = None
        self.thinking.entitle(_thought(message.stats))
        if not self.is_fold_chosen and message.content:
            self.thinking.fold(False)
        for race in self.query(Race):
            race.finish(winner)
        account = self.query_one(".account", Static)
        account.update(_account(message))
        account.display = bool(_account(message))

    def toggle(self) -> None:
        """Fold or unfold the thinking."""
        self.is_fold_chosen = True
        self.thinking.fold(not self.thinking.is_open)

    def explain_mark(self, step: int) -> None:
        """Go to the next or previous place where a control acted, and explain it."""
        self.is_fold_chosen = True
        self.thinking.step(step)


def _thought(stats: Stats | None) -> str:
    if stats is None:
        return "Thinking"
    return f"Thought for {stats.thinking_seconds:.0f} s · {stats.n_thinking} tokens"


def _account(message: Message) -> str:
    """One line under a reply."""
    stats = message.stats
    if stats is None:
        return "" if message.state == "done" else _ENDS["interrupted"]
    parts = [f"{stats.n_answer} tokens"] if stats.n_answer else []
    if stats.n_sampled > stats.n_thinking + stats.n_answer:
        parts.append(f"{stats.n_sampled} in all samples")
    parts.append(f"{stats.total_seconds:.1f} s")
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:.1f} tok/s")
    if stats.preset:
        parts.append(stats.preset)
    if stats.stop in _ENDS:
        parts.append(_ENDS[stats.stop])
    return " · ".join(parts) + (f"\n{visible(stats.problem)}" if stats.problem else "")
