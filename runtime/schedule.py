"""Who is in the engine: slots, prompts shared between sequences, and what goes into the next batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .controls.control import Control, Probe
from .engine import Batch, Engine, Row, Span
from .phase import PhaseTracker
from .sequence import Sequence
from .tokenizer import StreamDecoder

_SHORTEST_SHARED = 8
"""Prefixes shorter than this are evaluated again rather than forked."""


@dataclass(slots=True, eq=False)
class Request:
    """A sequence with all that acts on it. `sample` takes the row of logits to a token id."""

    sequence: Sequence
    tracker: PhaseTracker
    sample: Callable[[Row], int]
    controls: list[Control] = field(default_factory=list)
    is_continued: bool = False
    """True where the next prompt is likely to go on behind this reply, as a conversation's next turn does."""


@dataclass(slots=True, eq=False)
class Resident:
    """One sequence in the engine: a request's own, or a probe beside it."""

    sequence: Sequence
    request: Request
    probe: Probe | None = None
    reader: Control | None = None
    texts: list[str] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    decoder: StreamDecoder = field(default_factory=StreamDecoder)
    leader: "Resident | None" = None
    """A row whose evaluated prompt this one will share as soon as it reaches `n_shared`."""
    n_shared: int = 0
    flight: "Flight | None" = None
    """The batch that brings this row's next logits."""
    adjusters: list[Control] = field(default_factory=list)
    observers: list[Control] = field(default_factory=list)

    @property
    def n_pending(self) -> int:
        return len(self.sequence.tokens) - self.sequence.n_evaluated


@dataclass(slots=True, eq=False)
class Flight:
    """A batch that was submitted, and whose spans are in it."""

    spans: Batch
    rows: list[Resident]


class Schedule:
    """The rows in the engine and the slots that they hold."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[Resident] = []
        self.is_tight = False
        """True since a sequence had to be evicted, until one ends."""
        self._free = list(reversed(range(engine.n_sequences)))
        self._donor: tuple[int, list[int]] | None = None
        """Slot and tokens of the latest ended prompt, perhaps with its reply: the next one often begins alike."""

    @property
    def has_room(self) -> bool:
        """True where a slot is free or can be freed."""
        return bool(self._free or self._donor)

    @property
    def has_donor(self) -> bool:
        return self._donor is not None

    def take_slot(self) -> int | None:
        """A free slot, at the kept prompt's cost if need be."""
        if not self._free and self._donor:
            self.drop_donor()
        return self._free.pop() if self._free else None

    def drop_donor(self) -> None:
        """Give up the kept prompt."""
        if self._donor:
            self.engine.rewind(self._donor[0], 0)
            self._free.append(self._donor[0])
            self._donor = None

    def share(self, row: Resident) -> None:
        """Fork the longest prefix that the donor or a running row has in common with this one, or wait for it."""
        sequence = row.sequence
        most = len(sequence.tokens) - 1
        if self._donor:
            slot, tokens = self._donor
            n_shared = min(_common(tokens, sequence.tokens), most)
            if n_shared >= _SHORTEST_SHARED and self.engine.can_rewind:
                self.engine.fork(slot, sequence.slot, n_shared)
                sequence.n_evaluated = n_shared
        for other in self.rows:
            if other.probe is None:
                n_shared = min(_common(other.sequence.tokens, sequence.tokens), other.sequence.n_prompt - 1, most)
                is_reachable = self.engine.can_rewind or other.sequence.n_evaluated <= n_shared
                if n_shared >= _SHORTEST_SHARED + max(sequence.n_evaluated, row.n_shared) and is_reachable:
                    row.leader, row.n_shared = other, n_shared

    def _join_leader(self, row: Resident) -> bool:
        """True once the row has nothing to wait for."""
        leader = row.leader
        if leader is None:
            return True
        if leader in self.rows and leader.sequence.n_evaluated < row.n_shared:
            return False
        row.leader = None
        if leader in self.rows and (self.engine.can_rewind or leader.sequence.n_evaluated == row.n_shared):
            self.engine.rewind(row.sequence.slot, 0)
            self.engine.fork(leader.sequence.slot, row.sequence.slot, row.n_shared)
            row.sequence.n_evaluated = row.n_shared
        return True

    def leave(self, row: Resident) -> None:
        """Free the row's cache, or keep its prompt, and where it is continued its reply, for the next request."""
        sequence, slot = row.sequence, row.sequence.slot
        if row in self.rows:
            self.rows.remove(row)
        if slot < 0:
            return
        sequence.slot = -1
        is_donor = row.probe is None and self.engine.can_rewind and sequence.n_evaluated >= sequence.n_prompt
        if is_donor and not self.is_tight:
            self.drop_donor()
            # Thinking is not sent back, so behind it nothing of the reply will be met again at its place.
            has_reply = row.request.is_continued and not sequence.n_blocks
            n_kept = sequence.n_evaluated if has_reply else sequence.n_prompt
            self.engine.rewind(slot, n_kept)
            self._donor = (slot, sequence.tokens[:n_kept])
        else:
            self.engine.rewind(slot, 0)
            self._free.append(slot)
        sequence.n_evaluated = 0

    def release(self) -> None:
        """Free everything."""
        self.is_tight = True
        for row in list(self.rows):
            self.leave(row)
        self.drop_donor()

    def next_flight(self) -> Flight | None:
        """What fits into a batch of what is pending: decoding rows first, then prompts, in order of admission.

        Rows that wait for logits have nothing pending. Where several batches are under way at once, the decoding rows
        are spread over them.
        """
        room = self.engine.n_batch
        n_decoding = sum(row.n_pending <= 1 for row in self.rows)
        n_share = -(-n_decoding // self.engine.n_in_flight)
        flight = Flight([], [])
        for row in sorted(self.rows, key=lambda row: row.n_pending > 1) if len(self.rows) > 1 else self.rows:
            if room == 0 or not row.n_pending or not self._join_leader(row):
                continue
            sequence = row.sequence
            start = sequence.n_evaluated
            if row.n_pending == 1:
                if not n_share:
                    continue
                n_share -= 1
            end = min(len(sequence.tokens), start + room)
            for other in self.rows:  # stop where a follower wants to fork
                if other.leader is row and start < other.n_shared < end:
                    end = other.n_shared
            is_complete = end == len(sequence.tokens)
            flight.spans.append(Span(sequence.slot, start, sequence.tokens[start:end], int(is_complete)))
            flight.rows.append(row)
            room -= end - start
        return flight if flight.rows else None


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i in range(n) if one[i] != other[i])
