"""What is asked of a model, and everything that shapes its answer."""

from dataclasses import asdict, dataclass

from .controls import CONTROLS, Control, Parameters
from .controls import describe as describe_control
from .controls.budget import BudgetParameters
from .controls.search import SearchParameters
from .sampler import Sampling

_N_ANSWER = 2048
"""Tokens that are left for the answer and what controls write, where no limit is given."""
_N_PROMPT = 2048
"""Tokens that a context leaves for a prompt whose length is not known yet."""


@dataclass(frozen=True, slots=True)
class Question:
    """One problem and the name that its results carry."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that shapes an answer besides the model. `max_tokens` counts each sample's tokens after the prompt;
    None leaves 2048 for the answer behind the thinking cap."""

    controls: tuple[Parameters, ...] = ()
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    seed: int = 0
    max_tokens: int | None = None
    is_thinking: bool = True
    format: str | None = None

    def get(self, control: str) -> Parameters | None:
        """The parameters of a control, if the recipe has it."""
        return next((parameters for parameters in self.controls if parameters.control == control), None)

    @property
    def n_samples(self) -> int:
        search = self.get("search")
        return search.n if isinstance(search, SearchParameters) else 1

    @property
    def max_thinking(self) -> int | None:
        budget = self.get("budget")
        return budget.total or budget.max if isinstance(budget, BudgetParameters) else None

    @property
    def limit(self) -> int | None:
        """Most tokens of one sample after the prompt; None without any cap."""
        if self.max_tokens is not None or self.max_thinking is None:
            return self.max_tokens
        return self.max_thinking + _N_ANSWER

    def n_sequences(self, n_parallel: int = 1) -> int:
        """Engine sequences for this many questions at once: samples, a probe beside each, and one kept prompt."""
        has_probes = any(CONTROLS[one.control].read is not Control.read for one in self.controls)
        n_each = 2 if has_probes else 1
        return n_parallel * self.n_samples * n_each + 1

    def n_cells(self, n_parallel: int = 1, n_prompt: int = _N_PROMPT) -> int | None:
        """Cache cells that this many questions need at most; None where no cap bounds them."""
        if self.limit is None:
            return None
        return n_parallel * (n_prompt + self.n_samples * (self.limit + 128)) + n_prompt

    def describe(self) -> dict[str, object]:
        """The recipe as results store it and a resumed run compares it."""
        return {
            "controls": [describe_control(parameters) for parameters in self.controls],
            "sampling": asdict(self.sampling),
            "seed": self.seed,
            "max_tokens": self.limit,
            "is_thinking": self.is_thinking,
            "format": self.format,
        }
