"""Certainty-guided reflection suppression: the surer the model is of its tentative answer, the rarer its `Wait`.

Source: CGRS, arXiv 2508.05337 (no public code; formulas from a digest, see the README). Where we deviate: the probe
text ends in an opening brace, so that the certain brace does not count as answer, and begins on a new line inside code
or an open formula; a minimum gap between probes; the probe runs in the same batch as the main sequence, which keeps its
old probability until the probe has ended; a token that another control forces sets the probability to 0 until the next
probe; lower-case triggers only on request, since ` but` is an ordinary conjunction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..engine import Row
from ..errors import ControlError
from ..markup import in_code_or_formula
from ..sequence import Origin, Sequence
from ..tokenizer import Tokenizer
from .control import Action, Bias, Control, Note, Parameters, Probe, Reading, Setup, parameter

_LEADS = {
    "math": "**Final Answer: \\boxed{",
    "choice": "**Final Answer: the letter of the right option is \\boxed{",
}


@dataclass(frozen=True, slots=True)
class SuppressParameters(Parameters):
    control: ClassVar[str] = "suppress"
    delta: float = parameter(0.9, "certainty above which suppression begins", 0.0, 0.999)
    gap: int = parameter(64, "fewest thinking tokens between two probes", 0)
    answer: int = parameter(20, "most tokens of a tentative answer", 1, 200)
    task: str = parameter(
        "math", "what a tentative answer is; none where it has no meaning", choices=("math", "choice", "none")
    )
    words: str = parameter("Wait|But|Alternatively|Alternative|Hmm", "trigger words, separated by |")
    lower: bool = parameter(False, "suppress the lower-case spellings as well")

    def __post_init__(self) -> None:
        Parameters.__post_init__(self)
        if not self.words.replace("|", "").strip():
            raise ControlError(f"suppress: words is {self.words!r}; give at least one word")


@dataclass(frozen=True, slots=True)
class Triggers:
    """Ids that are a trigger word by themselves, and spellings of several ids whose last one is banned."""

    single: np.ndarray
    several: tuple[tuple[tuple[int, ...], int], ...]


def resolve(tokenizer: Tokenizer, words: tuple[str, ...]) -> Triggers:
    """The triggers of a vocabulary: every id whose text is a word with or without white space before it, and for
    each spelling that has no id of its own the ids before its last one, and the last."""
    wanted = {word.encode() for word in words}
    single = {token for token in range(tokenizer.n_vocab) if tokenizer.piece(token).lstrip(b" \t\r\n") in wanted}
    several = set()
    for word in words:
        for spelling in (word, " " + word):
            ids = tokenizer.encode(spelling)
            # A spelling whose last piece is a word of its own is banned by that piece already.
            if len(ids) > 1 and ids[-1] not in single:
                several.add((tuple(ids[:-1]), ids[-1]))
    return Triggers(np.array(sorted(single), dtype=np.intp), tuple(sorted(several)))


class ReflectionSuppression(Control):
    name = "suppress"
    summary = "words that begin a reflection become rarer as the model becomes sure of its answer"
    source = "CGRS, arXiv 2508.05337"
    Parameters = SuppressParameters
    parameters: SuppressParameters

    def __init__(self, parameters: SuppressParameters, setup: Setup) -> None:
        super().__init__(parameters, setup)
        self.counters = {"probes": 0, "unread": 0, "suppressed_steps": 0, "suppressed_top": 0, "certainty": 0.0}
        self._probability = 0.0
        self._random = np.random.default_rng((setup.seed, 1))
        self._carry = b""
        self._probed_at: int | None = None
        self._is_probing = self._is_stale = False
        self._kept_from: int | None = None
        words = tuple(filter(str.strip, parameters.words.split("|")))
        if parameters.lower:
            words += tuple(word.lower() for word in words)
        key = ("suppress", words)
        if key not in setup.memo:
            setup.memo[key] = resolve(setup.tokenizer, words)
        self._triggers: Triggers = setup.memo[key]

    def adjust(self, sequence: Sequence, logits: Row) -> Bias | None:
        self._kept_from = None
        if not self._probability or not sequence.is_thinking or self._random.random() >= self._probability:
            return None
        ids = self._triggers.single
        tokens = sequence.tokens
        lasts = [last for before, last in self._triggers.several if tuple(tokens[-len(before) :]) == before]
        if lasts:
            ids = np.append(ids, lasts)
        self.counters["suppressed_steps"] += 1
        best = int(logits.argmax())
        if best in ids:
            self.counters["suppressed_top"] += 1
            self._kept_from = best
        return Bias(ids)

    def observe(self, sequence: Sequence, token: int) -> Iterable[Action]:
        notes = self._reworded(token)
        if not sequence.is_thinking or sequence.is_ending:
            self._carry = b""
            return notes
        if sequence.origins[-1] is Origin.FORCED:
            self._probability = 0.0  # a forced Wait asks for more thought: do not pull against it
            self._is_stale = self._is_probing  # what a probe gives that began before it was asked too early
        text = self._carry + self.setup.tokenizer.piece(token)
        self._carry = text[-1:]
        if b"\n\n" not in text or self._is_probing or sequence.forced or self.parameters.task == "none":
            return notes
        n_thinking = sequence.counts.thinking
        if self._probed_at is not None and n_thinking - self._probed_at < self.parameters.gap:
            return notes
        self._probed_at = n_thinking
        self._is_probing = True
        self.counters["probes"] += 1
        lead = _LEADS[self.parameters.task]
        if in_code_or_formula(sequence.thinking):
            lead = "\n\n" + lead
        return (*notes, Probe(tuple(self.setup.tokenizer.encode(lead)), self.parameters.answer, _is_balanced))

    def read(self, sequence: Sequence, reading: Reading) -> Iterable[Action]:
        self._is_probing = False
        is_stale, self._is_stale = self._is_stale, False
        entropies = reading.entropies
        if reading.is_done and reading.texts and reading.texts[-1].lstrip().startswith("}"):
            entropies = entropies[:-1]  # the brace that closes the answer is not part of it
        if not reading.is_done or not entropies or is_stale:
            self.counters["unread"] += 1
            return ()
        certainty = 1 - float(np.mean(entropies)) / float(np.log(self.setup.tokenizer.n_vocab))
        delta = self.parameters.delta
        self._probability = max(0.0, (certainty - delta) / (1 - delta))
        self.counters["certainty"] = round(certainty, 4)
        answer = "".join(reading.texts).rstrip("}")
        return (Note(f"tentative answer {answer!r}: certainty {certainty:.3f}, suppression {self._probability:.2f}"),)

    def _reworded(self, token: int) -> tuple[Note, ...]:
        if self._kept_from is None:
            return ()
        piece = self.setup.tokenizer.piece
        instead, word = (piece(id).decode("utf-8", "replace") for id in (token, self._kept_from))
        self._kept_from = None
        return (Note(f"suppressed {word!r}, the model wrote {instead!r}"),)


def _is_balanced(text: str) -> bool:
    """True once the brace that the probe text opened is closed."""
    depth = 1
    for character in text:
        depth += (character == "{") - (character == "}")
        if not depth:
            return True
    return False
