"""A model that follows a script behind a gate, and a listener for what a streamer tells of it."""

import queue
import threading
from pathlib import Path
from typing import Any

from localreason.runtime.model import Model
from localreason.tui.stream import Delta, Ended, Failed
from tests.fakes import ByteTokenizer, ScriptedEngine, script

DEADLINE_SECONDS = 20
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>{% endif %}"
)
PLAIN = TEMPLATE.replace("<think>", "")


class Tokenizer(ByteTokenizer):
    """The byte tokenizer with what a model file says besides."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self.prefix: list[int] = []
        self.control_texts = frozenset({"<|end|>"})
        self.metadata: dict[str, str] = {}
        self.chat_template = template
        self.template_tokens = {}

    def close(self) -> None:
        pass


class Gate:
    """Lets an engine pass a number of steps; open from the start."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self.is_open = True
        self.arrived = threading.Semaphore(0)
        """Released whenever a step waits."""

    def shut(self) -> None:
        self.is_open = False

    def pass_one(self) -> None:
        if not self.is_open:
            self.arrived.release()
            assert self._steps.acquire(timeout=DEADLINE_SECONDS)

    def wait(self) -> None:
        """Until a step waits at the gate."""
        assert self.arrived.acquire(timeout=DEADLINE_SECONDS)

    def let(self, n: int = 1) -> None:
        """Let `n` steps pass and wait for the one behind them."""
        for _ in range(n):
            self._steps.release()
            self.wait()

    def open(self) -> None:
        self.is_open = True
        self._steps.release()


class GatedEngine(ScriptedEngine):
    def __init__(self, *arguments: Any, gate: Gate, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.gate = gate
        self.failure: Exception | None = None
        self.rewind_failure: Exception | None = None

    def submit(self, batch: Any) -> None:
        self.gate.pass_one()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        super().submit(batch)

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        failure, self.rewind_failure = self.rewind_failure, None
        if failure is not None:
            raise failure
        return super().rewind(sequence_id, n_tokens)

    @property
    def n_evaluated(self) -> int:
        """Tokens that were evaluated in prompts: spans of more than one."""
        return sum(len(span.tokens) for batch in self.batches for span in batch if len(span.tokens) > 1)


def scripted_model(
    replies: dict[str, str], gate: Gate | None = None, template: str = TEMPLATE, next_token: Any = None, **options: Any
) -> Model:
    """A model that answers as `replies` say, by the text that stands last in the context."""
    tokenizer = Tokenizer(template)
    engine = GatedEngine(
        next_token or script(tokenizer, replies), tokenizer.n_vocab, gate=gate or Gate(), **({"n_batch": 64} | options)
    )
    return Model(Path("scripted.gguf"), engine, tokenizer)  # pyright: ignore[reportArgumentType]


class Listener:
    """Takes the events of a streamer; `until` waits for one of a kind."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._queue: queue.Queue[Any] = queue.Queue()

    def __call__(self, event: Any) -> None:
        self._queue.put(event)

    def until(self, *kinds: type) -> Any:
        while True:
            event = self._queue.get(timeout=DEADLINE_SECONDS)
            self.events.append(event)
            if isinstance(event, kinds):
                return event

    def end(self) -> Any:
        """The last event of a reply."""
        return self.until(Ended, Failed)

    def text(self, reply: Any, phase: str, sample: int = 0) -> str:
        deltas = [e for e in self.events if isinstance(e, Delta) and e.reply is reply and e.sample == sample]
        return "".join(delta.text for delta in deltas if delta.phase == phase)
