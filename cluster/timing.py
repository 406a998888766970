"""What a ring measured of itself while it ran."""

import time
from dataclasses import dataclass, field

from ..runtime.engine import Batch


@dataclass(slots=True)
class Timing:
    """What was measured of the ring as it is: of batches without any part of a prompt, each from when the one before it
    came back, or from when it was sent where nothing else was under way."""

    n_tokens: int = 0
    seconds: float = 0.0
    since: float | None = None
    """From when the next batch counts, if it does."""
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    """Names of lost nodes and the seconds until the ring went on."""

    def reset(self) -> None:
        """The ring is another one."""
        self.n_tokens, self.seconds, self.since = 0, 0.0, None

    def begin(self) -> None:
        """A batch is sent while nothing is under way: the wait for it was not the ring's."""
        self.since = time.perf_counter()

    def note(self, batch: Batch) -> None:
        """A batch came back."""
        now = time.perf_counter()
        is_decode = all(len(span.tokens) == 1 for span in batch)
        if is_decode and self.since is not None:
            self.n_tokens += len(batch)
            self.seconds += now - self.since
        self.since = now if is_decode else None

    def compare(self, expected_seconds: float) -> str:
        """A sentence of what was measured beside what was expected (0 for nothing). Needs a token."""
        milliseconds = 1000 * self.seconds / self.n_tokens
        beside = f", expected were {1000 * expected_seconds:.1f}" if expected_seconds else ""
        return f"{milliseconds:.1f} ms a token, measured over {self.n_tokens}{beside}"
