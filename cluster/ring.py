"""`RingEngine`: a model on several machines as an `Engine`.

The head embeds tokens, sends activations around and has the last window, so neither token ids nor logits leave it.
`submit` sends a batch off and `collect` waits for the oldest one: with several on their way every node has work, and
behind a lone answer's last token go guesses (`guess.py`). A node that is lost is noticed by its silence, by its stream
or by the wait; the windows are placed again without it (`assembly.py`), the tokens so far are evaluated in the new
caches (`journal.py`), and what was on its way is sent again. Whoever decodes sees a pause and nothing else, and of
guesses nothing at all.
"""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator

from ..quant.gguf import ModelFile
from ..runtime.engine import Batch, Logits, piece_size
from ..runtime.errors import ContextFull, DecodeFailed
from ..runtime.room import padded
from .assembly import Assembly, Placer, RingOptions
from .background import Background
from .codec import ROW_TYPES, pack_rows, pack_spans, unpack_rows
from .costs import N_UNDER_WAY
from .errors import ClusterError, NodeLost, ProtocolError
from .flight import Flight, Purpose
from .formation import HEAD, Formation, Lost, Placement, Returned
from .guess import Guesses
from .journal import Entry, Journal, Memory
from .link import LinkBook
from .member import Address, Dialer
from .roster import Roster
from .session import apply
from .store import Store
from .timing import Timing
from .wire import ring_pb2 as wire

_STEP_SECONDS = 120.0
"""A step that takes longer has met a node that hangs."""
_MOST_ASLEEP = 3
"""Rings in a row, without a step through one, that this machine may have slept through; then who says so is lost."""


class RingEngine:
    """An `Engine` over windows; a context manager. `tell` gets a sentence whenever the ring changes."""

    def __init__(
        self,
        file: ModelFile,
        addresses: list[Address],
        dialer: Dialer,
        store: Store,
        place: Placer,
        options: RingOptions,
        tell: Callable[[str], None] = lambda text: None,
        links: LinkBook | None = None,
    ) -> None:
        """Forms the ring; `links` is told what nodes find of theirs.

        Raises PlanImpossible, NodeBusy, ClusterError, ModelError, OutOfMemory.
        """
        file.check_cut()
        self._file = file
        self._options, self._tell = options, tell
        self.n_vocab = file.n_vocab
        self.n_context = padded(options.n_context)
        self.n_context_sequence = min(self.n_context, file.n_context_train)
        self.n_sequences = options.n_sequences
        self.n_batch = options.n_batch
        self.notes = ()
        # What a sliding window has left behind may be gone from the caches (`Cache.holds`), and steps that are under
        # way decide which, so nobody can be asked.
        self.can_rewind = not file.has_sliding_window
        self.is_forgetful = not self.can_rewind
        self._is_guessing = options.is_guessing and self.can_rewind
        self.timing = Timing()
        self._journal = Journal(options.n_sequences)
        self._guesses = Guesses()
        self._flights: dict[int, Flight] = {}
        self._due: list[wire.Operation] = []
        self._number = 0
        self._awaited: dict[int, int] = {}
        """The step that each window of the head's has to see next."""
        self._formation: Formation | None = None
        """None where a ring broke and could not be formed anew, and after `close`."""
        self._n_asleep = 0
        """Rings in a row that ended because this machine was said to be asleep."""
        self._is_closed = False
        self._background = Background()
        self._roster = Roster(addresses, dialer, self._background, tell)
        self._assembly = Assembly(file, self._roster, self._background, dialer, store, place, options, tell, links)
        try:
            self._form(is_first=True)
        except BaseException:
            self.close()
            raise

    # --- the ring -----------------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        return self._ring.placement

    @property
    def _ring(self) -> Formation:
        if self._formation is None:
            raise ClusterError("the ring is closed or broken; ask again, or open the model again")
        return self._formation

    @property
    def n_in_flight(self) -> int:
        """Batches under way that keep every node busy."""
        if self._formation is None:
            return 1
        placement = self._formation.placement
        return max(N_UNDER_WAY * len({window.member for window in placement.windows}), placement.n_spread)

    @property
    def n_spread(self) -> int:
        """Batches of decoding sequences, as the ring was planned for."""
        planned = self._formation.placement.n_spread if self._formation else 0
        return planned or self.n_in_flight

    @property
    def busy_seconds(self) -> dict[str, float]:
        """What each node has computed since the ring was formed, as it said last; for any thread."""
        formation = self._formation
        return {name: member.busy_seconds for name, member in formation.members.items()} if formation else {}

    @property
    def n_sent_bytes(self) -> int:
        """Bytes of weights that this formation's nodes had to be sent."""
        return self._ring.n_sent_bytes

    def _form(self, is_first: bool = False, is_woken: bool = False) -> None:
        self._formation = self._assembly.form(is_first, is_woken)
        self.timing.reset()

    def _end_formation(self) -> None:
        formation, self._formation = self._formation, None
        if formation is not None:
            self._assembly.end(formation)

    def _recover(self, lost: Lost) -> None:
        """Go on without a node, or with the same ones where this machine was asleep."""
        started = time.perf_counter()
        self._end_formation()
        self._n_asleep = self._n_asleep + 1 if lost.member == HEAD else 0
        if self._n_asleep > _MOST_ASLEEP and lost.witness:
            lost = Lost(lost.witness, f"ends every ring: {lost.reason}")
        if lost.member != HEAD:
            self._roster.lose(lost.member, lost.reason)
        n_held = self._restore(is_woken=lost.member == HEAD)
        self.timing.recoveries.append((lost.member, time.perf_counter() - started))
        how = f"without {lost.member}" if lost.member != HEAD else f"in a new ring, since {lost.reason}"
        self._tell(f"going on {how}; {n_held} tokens are evaluated again")

    def _restore(self, is_woken: bool = False) -> int:
        """Form a ring, evaluate what was held, send again what was under way; the tokens that were held. Raises as
        `Assembly.form` does; the journal keeps everything, for the next attempt."""
        self._flights, self._due, self._number, self._awaited = {}, [], 0, {}
        self._guesses.forget()
        if self._journal.is_unwanted:
            self._journal.absorb()
        self._form(is_woken=is_woken)
        ring = self._ring
        n_held = self._journal.base.n_used
        for entry in self._journal.base.rebuild(piece_size(n_held, self.n_batch, self.n_in_flight)):
            self._repeat(entry, Purpose.REPLAY)
            # A node takes a bounded number of steps at once, and a long answer has more than that.
            while len(self._flights) >= self.n_in_flight:
                self._advance()
                if self._ring is not ring:  # another node was lost, and that was mended in there
                    return n_held
        for entry in list(self._journal.pending):
            self._repeat(entry, Purpose.ASKED)
        return n_held

    def _repeat(self, entry: Entry, purpose: Purpose) -> None:
        if isinstance(entry, Memory):
            self._operate(entry)
        else:
            self._issue(entry, purpose)

    # --- the engine ---------------------------------------------------------------------------------------------

    def begin_request(self) -> None:
        """Form the ring anew where a node has come back; other answers that are under way wait for what they hold to be
        evaluated again. Raises as `submit` does."""
        self._guesses.begin_request()
        if self._roster.has_returned and not self._is_closed:
            self._roster.readmit()
            self._end_formation()
            with self._whole():
                self._restore()

    def submit(self, batch: Batch) -> None:
        """Send a batch off. Raises ContextFull, DecodeFailed; then nothing was changed. Raises PlanImpossible,
        NodeBusy, ClusterError where the ring had broken and cannot be formed; the next batch tries again."""
        n = self._journal.front.check_batch(batch, self.n_batch, self.n_vocab)
        if self._journal.front.n_used + n > self.n_context:
            raise ContextFull(
                f"no room for {n} more tokens in a cache of {self.n_context}; drop a sequence or give a larger context"
            )
        with self._whole():
            if self._formation is None and not self._is_closed:
                if self._roster.has_returned:
                    self._roster.readmit()
                self._restore()
            if not self._asked:
                self.timing.begin()
            self._journal.add(batch)
            if self._is_guessing:
                self._guesses.learn(batch, self._journal.front.tokens)
            if not self._guesses.claim(batch):
                self._take_back()
                self._issue(batch)
            self._guess()

    @property
    def _asked(self) -> list[Flight]:
        """What is on its way and waited for."""
        return [flight for flight in self._flights.values() if flight.purpose in (Purpose.ASKED, Purpose.REPLAY)]

    @property
    def _lone(self) -> Flight | None:
        """What is waited for where that is the next token of one answer, while nodes have nothing to do."""
        asked, placement = self._asked, self._ring.placement
        is_idle = 1 < len(placement.windows) == len(self._ring.members) + 1 and not placement.is_disk_used
        is_one = len(asked) == 1 and len(asked[0].batch) == asked[0].batch[0].n_logits == 1
        return asked[0] if self._is_guessing and is_idle and is_one else None

    def _guess(self) -> None:
        """Send what may come behind the last token of a lone answer."""
        flight, front = self._lone, self._journal.front
        self._guesses.follow(flight)
        if flight is None:
            return
        held = front.tokens[flight.batch[0].sequence_id]
        n_room = min(self.n_context - front.n_used, self.n_context_sequence - len(held))
        while (guess := self._guesses.next(flight, held, n_room)) is not None:
            span, n_known_by = guess
            self._guesses.add(self._issue([span], Purpose.GUESS), flight, n_known_by)

    def _take_back(self) -> None:
        """Have what was guessed forgotten, before anything else happens to the caches."""
        if forgetting := self._guesses.take_back():
            self._operate(forgetting)

    def collect(self) -> Logits:
        """The wanted rows of the oldest batch, shape (n_rows, n_vocab), valid until the next call."""
        while (rows := self._advance()) is None:
            pass
        if not self._asked:
            self._journal.absorb()
        return rows

    def discard(self) -> None:
        """Forget the rows that are under way; they still pass through, for the caches' sake."""
        with self._whole():
            self._take_back()
        self._journal.discard()

    def decode(self, batch: Batch) -> Logits:
        """Submit and collect at once."""
        self.submit(batch)
        return self.collect()

    def _advance(self) -> Logits | None:
        """Take what is due: a step that came back, or the loss of a node. The logits if a wanted batch is done."""
        ring = self._ring
        try:
            item = ring.inbox.get(timeout=_STEP_SECONDS)
        except queue.Empty:
            slowest = min(ring.members.values(), key=lambda member: member.busy_seconds, default=None)
            if slowest is None:
                raise DecodeFailed("nothing is under way; submit a batch first") from None
            item = Lost(slowest.name, f"let a step wait for {_STEP_SECONDS:.0f} s")
        with self._whole():
            try:
                return self._compute(item) if isinstance(item, Returned) else self._recover(item)
            except ProtocolError as error:
                last = next((w.member for w in reversed(ring.placement.windows) if w.member != HEAD), HEAD)
                return self._recover(Lost(last, str(error)))
            except NodeLost as error:
                raise ClusterError(f"{error}; the answer cannot go on") from error

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """A ring that an exception leaves in the middle of a step is ended: the next batch forms it anew, by the
        journal."""
        try:
            yield
        except BaseException:
            self._end_formation()
            raise

    def _compute(self, item: Returned) -> Logits | None:
        """Run a window of the head's."""
        ring, flight = self._ring, self._flights.get(item.number)
        window = ring.windows.get(item.hop)
        if flight is None or window is None:
            raise ProtocolError(f"step {item.number} came back at window {item.hop}, where none was awaited")
        if item.number != (awaited := self._awaited.get(item.hop, 0)):
            raise ProtocolError(f"step {item.number} came back at window {item.hop}, which awaits {awaited}")
        self._awaited[item.hop] = awaited + 1
        n_tokens = sum(len(span.tokens) for span in flight.batch)
        rows = unpack_rows(item.rows, n_tokens, self._file.n_embd)
        apply(window, flight.operations)
        if window.is_last:
            flight.came, flight.taken = item.came, time.perf_counter()
            self._guesses.note(flight)
        # What is to be forgotten at once need not be evaluated here.
        out = rows if flight.purpose is Purpose.VOID else window.run(flight.batch, rows)
        if ring.placement.is_disk_used:
            later = [hop for hop in ring.windows if hop > item.hop] or sorted(ring.windows)
            ring.windows[later[0]].prefetch()
        if not window.is_last:
            self._pass_on(item.number, item.hop + 1, pack_rows(out, ROW_TYPES[self._options.row_type]))
            return None
        del self._flights[item.number]
        if flight.purpose is not Purpose.ASKED:
            return None
        self.timing.note(flight.batch)
        self._n_asleep = 0
        return out if self._journal.settle() else None

    def _issue(self, batch: Batch, purpose: Purpose = Purpose.ASKED) -> Flight:
        number, self._number = self._number, self._number + 1
        flight = self._flights[number] = Flight(batch, self._due, purpose, is_alone=not self._flights)
        self._due = []
        rows = self._file.embed([token for span in batch for token in span.tokens])
        self._pass_on(number, 0, pack_rows(rows, ROW_TYPES[self._options.row_type]))
        return flight

    def _operate(self, entry: Memory) -> None:
        """Have every window do this before the next batch."""
        self._due.append(wire.Operation(source=entry.source, n_tokens=entry.n_tokens, target=entry.target))

    def _pass_on(self, number: int, hop: int, rows: wire.Rows) -> None:
        ring, flight = self._ring, self._flights[number]
        if ring.owner(hop) == HEAD:
            ring.inbox.put(Returned(number, hop, rows))
            return
        spans = pack_spans(flight.batch)
        step = wire.Step(number=number, hop=hop, operations=flight.operations, spans=spans, rows=rows)
        self._background.call(ring.send, step)

    def fork(self, source: int, target: int, n_tokens: int) -> int:
        """Let an empty sequence share the first tokens of another, in every window before the next batch."""
        self._journal.front.check_fork(source, target, n_tokens)
        if n_tokens:
            self._remember(Memory(source, n_tokens, target))
        return n_tokens

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        """Forget all but the first tokens of a sequence, in every window before the next batch."""
        if n_tokens < self._journal.front.check_rewind(sequence_id, n_tokens):
            self._remember(Memory(sequence_id, n_tokens))
        return n_tokens

    def _remember(self, operation: Memory) -> None:
        with self._whole():
            self._take_back()
            self._journal.add(operation)
            self._operate(operation)
        if not self._asked:  # nothing has to come back first
            self._journal.absorb()

    def close(self) -> None:
        """Leave the nodes idle and free everything; closing twice does nothing."""
        if self._formation is not None and self.timing.n_tokens:
            self._tell(self.timing.compare(self.placement.token_seconds) + self._guesses.tell())
        self._is_closed = True
        self._end_formation()
        self._background.close()

    def __enter__(self) -> "RingEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
