"""An opened model: questions in, events and results out. What a Python user and the command line start from."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .answer import extract
from .controls import CONTROLS, Control, Setup
from .controls.budget import BudgetParameters
from .controls.search import FirstFinishSearch
from .decode import Request, decode
from .engine import Engine, Row
from .errors import ControlError, LocalReasonError, PromptError, PromptTooLong
from .events import Event, Finished
from .formats import ThinkingFormat
from .llama import EngineOptions, LlamaTokenizer, load
from .phase import PhaseTracker
from .prompt import Prompt, Prompter
from .recipe import Question, Recipe
from .sampler import choose
from .sequence import Counts, Sequence
from .template import Message


@dataclass(frozen=True, slots=True)
class Result:
    """What one question came to. `text` is the answer part of the reply, `answer` what was extracted from it.

    `counts` are those of the sample that won; the tokens of all samples stand in `counters["search"]`. `error` is set
    where the question could not be run; the others go on.
    """

    id: str
    answer: str | None
    text: str
    thinking: str
    stop: str
    counts: Counts
    counters: dict[str, dict[str, int | float]]
    seconds: float
    seed: int
    n_samples: int
    error: LocalReasonError | None = None
    is_unclosed: bool = False
    """True where the reply ended inside the thinking."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question is done; the last event of each."""

    result: Result


@dataclass(slots=True, eq=False)
class _Task:
    """A question in flight."""

    question: Question
    sequences: list[Sequence]
    search: FirstFinishSearch | None
    started: float
    counters: dict[int, dict[str, dict[str, int | float]]] = field(default_factory=dict)


class Model:
    """A model file opened for questions; a context manager. Made by `Model.open`, or of any engine for the file, such
    as a ring; both are closed with it.

    with Model.open("model.gguf") as model:
        for event in model.ask("What is 7 * 6?"):
            ...
    """

    def __init__(self, path: Path, engine: Engine, tokenizer: LlamaTokenizer) -> None:
        self.path = path
        self.name = path.stem
        self.engine = engine
        self.tokenizer = tokenizer
        self._prompter = Prompter(tokenizer, tokenizer)
        self._memo: dict[object, Any] = {}

    @classmethod
    def open(cls, path: Path | str, options: EngineOptions | None = None) -> "Model":
        """Load a GGUF file. Raises ModelError or OutOfMemory."""
        engine, tokenizer = load(Path(path), options or EngineOptions())
        return cls(Path(path), engine, tokenizer)

    @property
    def format(self) -> ThinkingFormat:
        """The model's thinking format as detected."""
        return self._prompter.format(None, True)

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each thing that was reduced to fit into the memory."""
        return self.engine.notes

    def close(self) -> None:
        self.engine.close()
        self.tokenizer.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, text: str, recipe: Recipe | None = None) -> Generator[Event | Answered, None, None]:
        """Answer one question; the last event is `Answered`. Raises the question's error."""
        for event in self.solve([Question("", text)], recipe):
            if isinstance(event, Answered) and event.result.error is not None:
                raise event.result.error
            yield event

    def solve(
        self, questions: Iterable[Question], recipe: Recipe | None = None, n_parallel: int = 1
    ) -> Generator[Event | Answered, None, None]:
        """Answer questions, `n_parallel` at a time; events of several are interleaved, each ends with `Answered`.

        A question that cannot be run gives a result with its error, the others go on. Raises ControlError where the
        recipe needs more sequences or cells than the engine holds.
        """
        recipe = recipe or Recipe(controls=(BudgetParameters(),))
        self.check_room(recipe)
        tasks: dict[Sequence, _Task] = {}
        failed: list[Answered] = []

        def requests() -> Iterator[Request]:
            for question in questions:
                try:
                    yield from self._requests(question, recipe, tasks)
                except PromptError as error:
                    failed.append(Answered(_failure(question, recipe, error)))

        n_rows = min(n_parallel * recipe.n_samples, self.engine.n_sequences)
        events = decode(self.engine, self.tokenizer, requests(), n_rows)
        with contextlib.closing(events):
            for event in events:
                yield event
                if isinstance(event, Finished):
                    done = _done(tasks, event, recipe)
                    if done is not None:
                        yield done
                while failed:
                    yield failed.pop(0)
        yield from failed

    def check_room(self, recipe: Recipe) -> None:
        """Raises ControlError where the recipe needs more sequences or cells than the engine holds."""
        engine, n = self.engine, recipe.n_samples
        if n > engine.n_sequences:
            raise ControlError(
                f"search: n is {n} samples and the cache holds {engine.n_sequences} sequences; "
                f"lower n or open the model with more sequences"
            )
        limit = recipe.limit
        if limit is not None and n > 1 and n * min(limit, 256) > engine.n_context:
            raise ControlError(
                f"search: n is {n} samples and the cache holds {engine.n_context} tokens for all of them; "
                f"lower n or give a larger context"
            )

    def _requests(self, question: Question, recipe: Recipe, tasks: dict[Sequence, _Task]) -> Iterator[Request]:
        requests = self.samples(self.chat_prompt([Message("user", question.text)], recipe), recipe, question.id)
        shared = [c for c in requests[0].controls if isinstance(c, FirstFinishSearch)]
        sequences = [request.sequence for request in requests]
        task = _Task(question, sequences, shared[0] if shared else None, time.perf_counter())
        tasks.update(dict.fromkeys(sequences, task))
        yield from requests

    def chat_prompt(self, turns: list[Message], recipe: Recipe, is_problem: bool = True) -> Prompt:
        """The prompt for the next reply to a conversation; a boxed answer is asked for only where the last turn is a
        problem. Raises TemplateError."""
        format = self._prompter.format(recipe.format, recipe.is_thinking)
        if turns[-1].role == "user":
            instructions = [CONTROLS[p.control].instruct(p) for p in recipe.controls]
            text = "\n".join((turns[-1].content, *filter(None, instructions)))
            turns = [*turns[:-1], Message("user", text)]
        return self._prompter.continue_chat(turns, format, recipe.is_thinking, is_problem)

    def text_prompt(self, text: str) -> Prompt:
        """The prompt of a text as it is, special text included and without a template; for a recipe of the format
        "none"."""
        return Prompt([*self.tokenizer.prefix, *self.tokenizer.encode(text, special=True, is_first=True)], "")

    def samples(self, prompt: Prompt, recipe: Recipe, id: str = "") -> list[Request]:
        """The sequences of one reply, ready for `decode`. Raises PromptError, PromptTooLong."""
        format = self._prompter.format(recipe.format, recipe.is_thinking)
        engine = self.engine
        if not prompt.tokens:
            raise PromptError("the prompt is empty and the model wants no token before it; give some text")
        if len(prompt.tokens) >= engine.n_context_sequence:
            raise PromptTooLong(
                f"the prompt has {len(prompt.tokens)} tokens and the context holds {engine.n_context_sequence} with "
                f"the reply; shorten the prompt or give a larger context"
            )
        setups = [
            Setup(self.tokenizer, format, recipe.seed + sample, engine.can_rewind, recipe.is_thinking, self._memo)
            for sample in range(recipe.n_samples)
        ]
        shared: dict[str, Control] = {
            p.control: CONTROLS[p.control](p, setups[0]) for p in recipe.controls if CONTROLS[p.control].is_shared
        }
        search = shared.get("search")
        requests = []
        for sample, setup in enumerate(setups):
            sequence = Sequence(list(prompt.tokens), id=id, sample=sample, limit=recipe.limit)
            controls = [shared.get(p.control) or CONTROLS[p.control](p, setup) for p in recipe.controls]
            if isinstance(search, FirstFinishSearch):
                search.join(sequence)
            requests.append(Request(sequence, PhaseTracker(format, prompt.tail), _sampler(recipe, sample), controls))
        if isinstance(search, FirstFinishSearch) and search.parameters.is_race:
            requests[0].n_together = len(requests)
        return requests


def _sampler(recipe: Recipe, sample: int) -> Callable[[Row], int]:
    """Draws with a random stream of the sample's own: the same seed gives the same tokens again."""
    random = np.random.default_rng((recipe.seed, sample))

    def draw(row: Row) -> int:
        return choose(row, recipe.sampling, random.random())

    return draw


def _done(tasks: dict[Sequence, _Task], event: Finished, recipe: Recipe) -> Answered | None:
    """The question's result once its last sample has ended."""
    task = tasks.pop(event.sequence)
    task.counters[event.sequence.sample] = {name: dict(values) for name, values in event.counters.items()}
    if any(sequence.finish is None for sequence in task.sequences):
        return None
    chosen = (task.search.winner() if task.search else None) or task.sequences[0]
    counters = task.counters[chosen.sample]
    if task.search:
        counters["search"] = task.search.tally()
    return Answered(
        Result(
            id=task.question.id,
            answer=extract(chosen.answer),
            text=chosen.answer.strip(),
            thinking=chosen.thinking.strip(),
            stop=chosen.finish or "",
            counts=chosen.counts,
            counters=counters,
            seconds=time.perf_counter() - task.started,
            seed=recipe.seed,
            n_samples=recipe.n_samples,
            is_unclosed=chosen.is_thinking,
        )
    )


def _failure(question: Question, recipe: Recipe, error: LocalReasonError) -> Result:
    return Result(question.id, None, "", "", "error", Counts(), {}, 0.0, recipe.seed, recipe.n_samples, error)
