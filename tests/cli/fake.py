"""A model that follows a script, a Hub in memory, and the wiring that puts them into a command line."""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from types import TracebackType

from localreason.cli.build import Wiring
from localreason.cli.config import Config
from localreason.cli.hub import RemoteFile
from localreason.runtime.errors import ModelNotFound, PromptTooLong
from localreason.runtime.events import Event, Finished, Noted, Token
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Answered, Question, Recipe, Result
from localreason.runtime.sequence import Origin, Phase, Sequence

THINKING = ("Let me ", "think.\x1b[31m", "\n")
ANSWER = (
    "It is ",
    "[bold]7[/bold].\n",
)


class FakeModel:
    """Answers 7 to everything; what a question says makes it do more: see `_events`."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        self.options = options
        self.asked: list[str] = []
        self.is_hurried = False

    def __enter__(self) -> "FakeModel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def solve(
        self, questions: Iterable[Question], recipe: Recipe | None = None, n_parallel: int = 1
    ) -> Generator[Event | Answered, None, None]:
        recipe = recipe or Recipe()
        for question in questions:
            self.asked.append(question.id)
            if "too long" in question.text:
                error = PromptTooLong("the prompt has 9000 tokens and the context holds 4096; shorten the prompt")
                sequence = Sequence([])
                yield Answered(
                    Result(question.id, None, "", "", "error", sequence.counts, {}, 0.0, recipe.seed, 1, error)
                )
                continue
            yield from self._events(question, recipe)

    def _events(self, question: Question, recipe: Recipe) -> Generator[Event | Answered, None, None]:
        sequence = Sequence([1, 2, 3], id=question.id)
        sequence.phase = Phase.THINK
        if "a bug" in question.text:
            raise ZeroDivisionError("by zero")
        if "wait here" in question.text:  # a parent reads this line, then kills or stops us
            print("READY", flush=True)
            sys.stdin.readline()
        if "press once" in question.text or "press twice" in question.text:
            os.kill(os.getpid(), signal.SIGINT)
        for i, text in enumerate(THINKING):
            yield Token(sequence, 5, text, Phase.THINK, Origin.SAMPLED)
            sequence.counts.thinking += 1
            if "press twice" in question.text and i == 1:
                os.kill(os.getpid(), signal.SIGINT)
        yield Noted(sequence, "budget", "thinking cut after 3 tokens")
        self.is_hurried = sequence.is_hurried
        sequence.phase = Phase.ANSWER
        for text in ANSWER:
            yield Token(sequence, 6, text, Phase.ANSWER, Origin.SAMPLED)
            sequence.counts.answer += 1
        sequence.finish = "end"
        counters: dict[str, dict[str, int | float]] = {
            "budget": {"ignored": 2},
            "suppress": {"suppressed_steps": 5},
        }
        yield Finished(sequence, "end", counters)
        yield Answered(
            Result(
                question.id,
                "7",
                "".join(ANSWER),
                "".join(THINKING),
                "end",
                sequence.counts,
                counters,
                0.5,
                recipe.seed,
                1,
            )
        )


class FakeHub:
    """Repositories in memory."""

    def __init__(self, files: dict[str, dict[str, bytes]], digest: Callable[[bytes], str]) -> None:
        self._files = files
        self._digest = digest
        self.is_corrupting = False
        self.extra_bytes = 0
        self.downloads: list[str] = []

    def files(self, repository: str) -> list[RemoteFile]:
        if repository not in self._files:
            raise ModelNotFound(f"there is no repository {repository}")
        return [
            RemoteFile(name, len(data) + self.extra_bytes, self._digest(data))
            for name, data in self._files[repository].items()
        ]

    def download(self, repository: str, file: RemoteFile, folder: Path) -> Path:
        data = self._files[repository][file.name]
        self.downloads.append(file.name)
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(len(data)) if self.is_corrupting else data)
        return path


def wiring(models: list[FakeModel] | None = None, hub: FakeHub | None = None) -> Wiring:
    """A wiring whose models are kept in `models`, to look at afterwards."""

    def open_model(path: Path, options: EngineOptions, config: Config) -> FakeModel:
        model = FakeModel(path, options)
        if models is not None:
            models.append(model)
        return model

    def no_hub() -> FakeHub:
        raise AssertionError("this test reached for the Hub")

    return Wiring(open_model, (lambda: hub) if hub is not None else no_hub)


def commands() -> None:
    """The command line with the fake model, for a process of its own."""
    from localreason.cli.main import main

    sys.exit(main(sys.argv[1:], wiring()))


if __name__ == "__main__":
    commands()
