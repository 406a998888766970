"""What a ring measured of itself while it ran."""

import time
from dataclasses import dataclass, field

from ..runtime.engine import Batch


@dataclass(slots=True)
class Timing:
    """What was measured between two tokens: of batches without any part of a prompt that follow each other."""

    n_tokens: int = 0
    seconds: float = 0.0
    last: float | None = None
    """When the batch before came back, if it was such a one."""
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    """Names of lost nodes and the seconds until the ring went on."""

    def note(self, batch: Batch) -> None:
        """A batch came back."""
        now = time.perf_counter()
        is_decode = all(len(span.tokens) == 1 for span in batch)
        if is_decode and self.last is not None:
            self.n_tokens += len(batch)
            self.seconds += now - self.last
        self.last = now if is_decode else None

    def compare(self, expected_seconds: float) -> str:
        """A sentence of what was measured beside what was expected (0 for nothing). Needs a token."""
        milliseconds = 1000 * self.seconds / self.n_tokens
        beside = f", expected were {1000 * expected_seconds:.1f}" if expected_seconds else ""
        return f"{milliseconds:.1f} ms a token, measured over {self.n_tokens}{beside}"
