"""The decode loop, the only one in the project: from sequences to events.

A step of the loop is: take waiting requests in, submit what each sequence has not yet evaluated (one batch on one
machine, several on a ring, where each machine works on another), collect the oldest batch, and for each sequence whose
logits came back take the next token. A token passes its sequence's controls; what they ask for
(`Force`, `Rewrite`, `Probe`, `Stop`, `Note`) is carried out here and nowhere else. Continuous thinking would add one
more action, `Blend`, that puts a mixture of token embeddings in the place of the next token's.

The order within a step: raw logits, biases of the controls, sampling, tracking of the phase, observation, control after
control. What one asks for is carried out before the next one sees the token, which it does not if it was taken back. A
forced token waits for no logits: when all have observed, those that wait join the context at once and are evaluated
together. An urgent one, of a hard cut, takes the place of what others wanted to force.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator

import numpy as np

from .controls.control import Action, Control, Force, Note, Probe, Reading, Rewrite
from .engine import Engine, Row
from .errors import ContextFull, PromptTooLong
from .events import Event, Finished, Noted, Prefilled, Token
from .phase import PhaseTracker
from .sampler import entropy
from .schedule import Flight, Request, Resident, Schedule
from .sequence import Origin, Phase, Sequence
from .tokenizer import Tokenizer

__all__ = ["Request", "decode"]


def decode(
    engine: Engine, tokenizer: Tokenizer, requests: Iterable[Request], n_parallel: int | None = None
) -> Generator[Event, None, None]:
    """Decode all requests, at most `n_parallel` at a time, and yield what happens as it happens.

    Requests are taken from the iterable as there is room, so it may be endless. Closing the generator ends everything
    and frees the engine; a sequence is ended from outside by `Sequence.cancel`. Prompts are evaluated in pieces of
    `engine.n_batch` tokens with an event between two pieces. Raises PromptTooLong and whatever the engine raises.
    """
    loop = _Loop(engine, tokenizer, iter(requests), min(n_parallel or engine.n_sequences, engine.n_sequences))
    try:
        while True:
            yield from loop.admit()
            if not loop.schedule.rows:
                return
            yield from loop.step()
    finally:
        engine.discard()
        loop.schedule.release()


class _Loop:
    def __init__(self, engine: Engine, tokenizer: Tokenizer, requests: Iterator[Request], n_parallel: int) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.requests: Iterator[Request] = requests
        self.n_parallel = n_parallel
        self.schedule = Schedule(engine)
        self._next: Request | None = None
        self._flights: deque[Flight] = deque()
        self._evicted: deque[Resident] = deque()
        self._ended: list[tuple[Resident, str]] = []

    # --- in and out of the engine -------------------------------------------------------------------------------

    def admit(self) -> Iterator[Event]:
        """Take evicted rows back and new requests in while there is room."""
        while n_room := min(self.n_parallel - self._n_running, self.schedule.n_room):
            if self._evicted:
                if self.schedule.is_tight and self.schedule.rows:
                    return
                row = self._evicted.popleft()
                yield from self._start(row, is_new=False)
            elif (request := self._take(n_room)) is not None:
                yield from self._start(_enter(request), is_new=True)
            else:
                return

    @property
    def _n_running(self) -> int:
        return sum(row.probe is None for row in self.schedule.rows)

    def _take(self, n_room: int) -> Request | None:
        """The next request, once there is room for all that begin with it, or as much as there can be."""
        self._next = self._next or next(self.requests, None)
        if self._next is None:
            return None
        if self._n_running and n_room < self._next.n_together and not self._next.sequence.cancelled:
            return None
        request, self._next = self._next, None
        return request

    def _start(self, row: Resident, is_new: bool) -> Iterator[Event]:
        sequence = row.sequence
        if is_new:
            if sequence.cancelled:
                yield from self._finish(row, sequence.cancelled)
                return
            limit = self.engine.n_context_sequence
            if sequence.n_prompt >= limit:
                raise PromptTooLong(
                    f"the prompt has {sequence.n_prompt} tokens and the context holds {limit} with the reply; "
                    f"shorten the prompt or give a larger context"
                )
            room = sequence.room = limit - sequence.n_prompt
            sequence.limit = room if sequence.limit is None else min(sequence.limit, room)
            _follow_phase(sequence, row.request.tracker, [], Origin.FORCED)  # where the prompt leads
            for control in row.request.controls:
                yield from self._act(row, control, control.begin(sequence))
            yield from self._drain(row)
            self.engine.begin_request()
        self.schedule.enter(row)
        yield from self._settle()

    # --- one step -----------------------------------------------------------------------------------------------

    def step(self) -> Iterator[Event]:
        """Keep the engine supplied with batches, and take the tokens of the one that is done."""
        while len(self._flights) < self.engine.n_in_flight and (flight := self.schedule.next_flight()):
            try:
                self.engine.submit(flight.spans)
            except ContextFull:
                if self._flights:  # what they hold may be given up only once they are back
                    break
                yield from self._make_room()
                yield from self._settle()
                return
            self._flights.append(flight)
            for span, row in zip(flight.spans, flight.rows, strict=True):
                row.sequence.n_evaluated += len(span.tokens)
                self.schedule.checkpoint(row)
                row.flight = flight if span.n_logits else None
        if self._flights:
            yield from self._land(self._flights.popleft())

    def _land(self, flight: Flight) -> Iterator[Event]:
        logits = self.engine.collect()
        i_logits = 0
        chosen: list[tuple[Resident, int]] = []
        for span, row in zip(flight.spans, flight.rows, strict=True):
            if span.n_logits:
                if row.flight is flight and row in self.schedule.rows:  # neither rewritten nor gone meanwhile
                    chosen.append((row, self._sample(row, logits[i_logits])))
                i_logits += 1
            elif row.probe is None and row in self.schedule.rows:
                yield Prefilled(row.sequence, span.position + len(span.tokens), len(row.sequence.tokens))
        # The rows are read before anything is yielded: a consumer that decodes elsewhere cannot spoil them.
        for row, token in chosen:
            if row.flight is not flight:  # what a probe gave has changed the sequence
                continue
            row.flight = None
            if row.probe is not None:
                yield from self._accept_probe(row, token)
            elif not row.sequence.cancelled:
                yield from self._accept(row, token, Origin.SAMPLED)
                yield from self._drain(row)
        yield from self._settle()

    def _sample(self, row: Resident, logits: Row) -> int:
        if row.probe is not None:
            row.entropies.append(entropy(logits))
            return int(logits.argmax())
        biases = [bias for control in row.adjusters if (bias := control.adjust(row.sequence, logits)) is not None]
        for bias in biases:
            kept = logits[bias.ids]
            logits[bias.ids] += bias.value
            if not np.isfinite(logits.max()):
                logits[bias.ids] = kept
        return row.request.sample(logits)

    def _accept(self, row: Resident, token: int, origin: Origin) -> Iterator[Event]:
        """Let a token join the sequence, and the controls see it."""
        sequence, tracker = row.sequence, row.request.tracker
        index = len(sequence.tokens)
        sequence.tokens.append(token)
        sequence.origins.append(origin)
        if origin is Origin.HINT:
            sequence.counts.hint += 1
            yield Token(sequence, token, "", sequence.phase, origin)
            return
        sequence.is_ending = origin is Origin.SAMPLED and self.tokenizer.is_end(token)
        parts = [] if sequence.is_ending else tracker.feed(self.tokenizer.piece(token), index)
        _count(sequence, origin)
        _follow_phase(sequence, tracker, parts, origin)
        text, phase = parts[0] if parts else ("", sequence.phase)
        yield Token(sequence, token, text, phase, origin)
        for text, phase in parts[1:]:
            yield Token(sequence, token, text, phase, origin, is_continued=True)
        for control in row.observers:
            yield from self._act(row, control, control.observe(sequence, token))
            if len(sequence.tokens) <= index or sequence.tokens[-1] != token:
                break  # it was taken back: there is nothing for the others to see
        is_over = sequence.is_ending and len(sequence.tokens) > index
        sequence.is_ending = sequence.is_closing = False
        if is_over:
            self._ended.append((row, "end"))

    def _drain(self, row: Resident) -> Iterator[Event]:
        """Let the forced tokens join for which there is room, then see whether there is room for more."""
        sequence = row.sequence
        room = self.engine.n_context_sequence
        if any(ended is row for ended, _ in self._ended):
            return
        while sequence.forced and len(sequence.tokens) < room and not sequence.is_full:
            token, origin = sequence.forced.popleft()
            yield from self._accept(row, token, origin)
        # Where a rewrite left nothing to evaluate, the last token's logits are still needed.
        self._forget(sequence, len(sequence.tokens) - 1)
        if len(sequence.tokens) >= room:
            self._ended.append((row, "context"))
        elif sequence.is_full:
            self._ended.append((row, "length"))

    # --- what controls ask for ----------------------------------------------------------------------------------

    def _act(self, row: Resident, control: Control, actions: Iterable[Action]) -> Iterator[Event]:
        sequence = row.sequence
        for action in actions:
            if isinstance(action, Note):
                yield Noted(sequence, control.name, action.text)
            elif isinstance(action, Force):
                if action.is_urgent:
                    sequence.forced.clear()
                sequence.forced.extend((token, action.origin) for token in action.tokens)
            elif isinstance(action, Rewrite):
                yield from self._rewrite(row, action)
            elif isinstance(action, Probe):
                yield from self._fork_probe(row, control, action)
            else:
                (action.sequence or sequence).cancel(action.reason)

    def _forget(self, sequence: Sequence, n_kept: int) -> None:
        """Have the engine forget all after `n_kept` tokens, or everything where it cannot keep them."""
        if n_kept < sequence.n_evaluated:
            sequence.n_evaluated = n_kept if self.engine.can_rewind else 0
            if sequence.slot >= 0:
                sequence.n_evaluated = self.engine.rewind(sequence.slot, sequence.n_evaluated)

    def _rewrite(self, row: Resident, action: Rewrite) -> Iterator[Event]:
        sequence, start = row.sequence, action.position
        row.flight = None
        self._forget(sequence, start)
        removed = sequence.origins[start - sequence.n_prompt :]
        del sequence.tokens[start:], sequence.origins[start - sequence.n_prompt :]
        if sequence.closed_at is not None and start <= sequence.closed_at:
            row.request.tracker.reopen()
            _follow_phase(sequence, row.request.tracker, [], Origin.FORCED)
        n_hints = removed.count(Origin.HINT)
        for token, origin in action.tokens:
            sequence.tokens.append(token)
            sequence.origins.append(origin)
            if origin is Origin.HINT:
                if n_hints > 0:  # a hint of an earlier round that stands in the tail
                    n_hints -= 1
                    continue
                sequence.counts.hint += 1
                yield Token(sequence, token, "", sequence.phase, origin)

    def _fork_probe(self, row: Resident, control: Control, action: Probe) -> Iterator[Event]:
        """Start a side sequence that joins the next batch; without a free slot, or at the end of the context, its
        control reads nothing."""
        parent = row.sequence
        n_tokens = len(parent.tokens) + len(action.tokens)
        slot = self.schedule.take_slot() if n_tokens < self.engine.n_context_sequence else None
        if slot is None:
            yield from self._act(row, control, control.read(parent, Reading((), (), False)))
            return
        side = Sequence([*parent.tokens, *action.tokens], id=parent.id, sample=parent.sample)
        side.slot = slot
        side.n_evaluated = self.engine.fork(parent.slot, slot, parent.n_evaluated)
        parent.counts.probe += len(action.tokens)
        self.schedule.rows.append(Resident(side, row.request, action, control))

    def _accept_probe(self, row: Resident, token: int) -> Iterator[Event]:
        assert row.probe is not None
        parent = row.request.sequence
        row.sequence.tokens.append(token)
        parent.counts.probe += 1
        is_end = self.tokenizer.is_end(token)
        row.texts.append("" if is_end else row.decoder.feed(self.tokenizer.piece(token)))
        yield Token(parent, token, "", Phase.THINK, Origin.PROBE)
        text = "".join(row.texts)
        is_done = row.probe.is_done(text)
        is_full = len(row.sequence.tokens) >= self.engine.n_context_sequence
        if is_done or is_end or is_full or "\n" in text or len(row.texts) >= row.probe.n_max:
            yield from self._end_probe(row, Reading(tuple(row.texts), tuple(row.entropies), is_done))

    def _end_probe(self, row: Resident, reading: Reading) -> Iterator[Event]:
        """Let the control that asked read what its probe gave, and do what it wants of the sequence."""
        assert row.reader is not None
        self.schedule.leave(row)
        owner = next(other for other in self.schedule.rows if other.request is row.request and other.probe is None)
        sequence = owner.sequence
        yield from self._act(owner, row.reader, row.reader.read(sequence, reading))
        if sequence.forced:
            owner.flight = None  # the token that it waits for is not wanted any more
        if owner.flight is None:
            yield from self._drain(owner)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _settle(self) -> Iterator[Event]:
        """End what is due to end. Of sequences that end in one step the one with the shortest thinking is first."""
        self._ended.sort(key=lambda item: (item[0].sequence.counts.thinking, item[0].sequence.sample))
        while self._ended:
            row, reason = self._ended.pop(0)
            yield from self._finish(row, row.sequence.cancelled or reason)
        for row in [
            row for row in (*self.schedule.rows, *self._evicted) if row.probe is None and row.sequence.cancelled
        ]:
            yield from self._finish(row, row.sequence.cancelled or "cancelled")

    def _finish(self, row: Resident, reason: str) -> Iterator[Event]:
        sequence = row.sequence
        if sequence.finish is not None:
            return
        parts = row.request.tracker.flush()
        _follow_phase(sequence, row.request.tracker, parts, Origin.SAMPLED)
        for text, phase in parts:
            yield Token(sequence, sequence.tokens[-1], text, phase, Origin.SAMPLED, is_continued=True)
        sequence.finish = reason
        for side in [other for other in self.schedule.rows if other.probe is not None and other.request is row.request]:
            self.schedule.leave(side)
        if row in self._evicted:
            self._evicted.remove(row)
        self.schedule.leave(row)
        self.schedule.is_tight = False
        for control in row.request.controls:
            yield from self._act(row, control, control.end(sequence))
        yield Finished(sequence, reason, {control.name: dict(control.counters) for control in row.request.controls})

    def _make_room(self) -> Iterator[Event]:
        """The cache is full: give up the kept prompts, then probes, then the youngest sequence, which waits with its
        tokens and is evaluated again later; the last one left has reached the end of the context."""
        probes = [row for row in self.schedule.rows if row.probe is not None]
        if self.schedule.has_kept:
            self.schedule.drop_kept()
        elif probes:
            yield from self._end_probe(probes[-1], Reading((), (), False))
        elif len(self.schedule.rows) > 1:
            self.schedule.is_tight = True
            row = self.schedule.rows[-1]
            self.schedule.leave(row)
            row.leader, row.n_shared = None, 0
            self._evicted.appendleft(row)
        else:
            yield from self._finish(self.schedule.rows[0], "context")


def _count(sequence: Sequence, origin: Origin) -> None:
    """Count a token in the phase that it was written in."""
    counts = sequence.counts
    if origin is Origin.FORCED:
        counts.forced += 1
    elif sequence.is_ending:
        return
    elif sequence.phase is Phase.THINK:
        counts.thinking += 1
        sequence.n_block_thinking += 1
    else:
        counts.answer += 1


def _follow_phase(sequence: Sequence, tracker: PhaseTracker, parts: list[tuple[str, Phase]], origin: Origin) -> None:
    """Carry over to the sequence what the tracker has read."""
    for text, phase in parts:
        if phase is Phase.THINK:
            sequence.thinking += text
        else:
            sequence.answer += text
    if tracker.n_blocks != sequence.n_blocks:
        sequence.n_blocks = tracker.n_blocks
        sequence.n_block_thinking = 0
    sequence.is_closing = sequence.phase is Phase.THINK and tracker.phase is Phase.ANSWER
    if sequence.is_closing:
        sequence.is_cut = origin is Origin.FORCED
    sequence.phase = tracker.phase
    sequence.closed_at, sequence.closed_kept = tracker.closed_at, tracker.closed_kept
    sequence.is_whole_text, sequence.is_in_tag = tracker.is_whole_text, tracker.is_in_tag


def _enter(request: Request) -> Resident:
    """A resident that calls only the methods which its controls have."""

    def overrides(method: str) -> list[Control]:
        return [c for c in request.controls if getattr(type(c), method) is not getattr(Control, method)]

    return Resident(request.sequence, request, adjusters=overrides("adjust"), observers=overrides("observe"))
