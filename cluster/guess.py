"""What an answer's next token may be, so that machines that would wait for it begin with it.

With one answer in a ring all machines but one wait. They evaluate what may come next instead: where it does come, it is
that far already; otherwise it is forgotten. A guessed token has a batch of its own, as every token has, so the logits
are those of a ring that guesses nothing, bit for bit. Of a model with a sliding window nothing is guessed: a second
token ahead could take cells that are in sight again when it is forgotten.

A guess is what stood behind the same last tokens before, in the prompt, the answer or an earlier one: prompt lookup
(Saxena, 2023), with the back-off from more tokens to fewer of STAND's table (2025), of which we take the last token met
in place of a drawn one, for a chain has one branch.
"""

import time
from collections import deque
from statistics import median

from ..runtime.engine import Batch, Span
from .flight import Flight, Purpose
from .journal import Memory

_LONGEST = 4
"""Tokens that have to stand before a guess as they stood before; fewer where so many did not."""
_MOST_ENTRIES = 1 << 15
"""Of each half of the table, 8,000 tokens in some 6 MB: the older half is given up when the newer one is full."""
_N_TIMES = 16
"""Of which the median counts: a machine in a home is busy with something else now and then."""
_FEWEST_TIMES = 3
_MOST_AHEAD = 4
"""Each one further is less likely to be right, and nodes compute for it and let few steps wait."""
_RETRY = 16
"""Of so many guesses that are not worth it one is sent all the same, which measures the slowest node anew."""


class Lookup:
    """The token that followed, by the few before it, and how often that was right for so many of them."""

    def __init__(self) -> None:
        self._new: dict[tuple[int, ...], int] = {}
        self._old: dict[tuple[int, ...], int] = {}
        self._n_made = [2] * (_LONGEST + 1)
        self._n_right = [1] * (_LONGEST + 1)

    def learn(self, tokens: list[int], start: int) -> None:
        """Note those of `tokens` from `start` on."""
        for i in range(max(1, start), len(tokens)):
            for n in range(1, min(_LONGEST, i) + 1):
                self._new[tuple(tokens[i - n : i])] = tokens[i]
            if len(self._new) > _MOST_ENTRIES:
                self._old, self._new = self._new, {}

    def find(self, tokens: list[int]) -> tuple[int, int]:
        """What may follow, and how many of the last tokens it is known by; 0 where nothing is known."""
        for n in range(min(_LONGEST, len(tokens)), 0, -1):
            key = tuple(tokens[-n:])
            token = self._new.get(key, self._old.get(key))
            if token is not None:
                return token, n
        return 0, 0

    def note(self, n: int, is_right: bool) -> None:
        """A guess that was known by `n` tokens was right, or not."""
        self._n_made[n] += 1
        self._n_right[n] += is_right

    def odds(self, n: int) -> float:
        """The share of right ones so far."""
        return self._n_right[n] / self._n_made[n]


class Pace:
    """Seconds of a lone answer's steps, as the head sees them: what a right guess gains and a wrong one costs."""

    def __init__(self) -> None:
        self.round: deque[float] = deque(maxlen=_N_TIMES)
        """From one token to the next where nothing was guessed."""
        self.widest: deque[float] = deque(maxlen=_N_TIMES)
        """From a step's return to that of a guess sent right behind it: the slowest node's part of a round."""
        self.own: deque[float] = deque(maxlen=_N_TIMES)
        """The head's part of a round."""
        self._n_declined = 0

    def is_worth(self, odds: float, n_ahead: int) -> bool:
        """Whether one more guess behind `n_ahead` is expected to save time.

        With n steps under way a token takes an n-th of a round, but never less than the slowest machine does. Wrong
        guesses keep that one from the right token where it needs longer for them than the others for the round's rest.
        """
        if min(len(self.round), len(self.own)) < _FEWEST_TIMES or n_ahead == _MOST_AHEAD:
            return False
        if len(self.widest) < _FEWEST_TIMES:
            return n_ahead == 0
        whole, widest, own, n = median(self.round), median(self.widest), median(self.own), n_ahead + 1
        gain = whole / n - max(whole / (n + 1), widest, own)
        loss = max(0.0, (n + 1) * widest - whole) - max(0.0, n * widest - whole)
        if odds * gain > (1 - odds) * loss:
            return True
        if n_ahead:
            return False
        self._n_declined = (self._n_declined + 1) % _RETRY
        return not self._n_declined


class Guesses:
    """Those that are on their way behind the last token of a lone answer."""

    def __init__(self) -> None:
        self.n_made = 0
        self.n_right = 0
        self._lookup = Lookup()
        self._pace = Pace()
        self._flights: deque[Flight] = deque()
        self._last: Flight | None = None
        """The step of a lone answer that was asked for last."""

    def tell(self) -> str:
        """How many were right, to stand behind the seconds of a token; nothing where none was made."""
        return f"; {self.n_right} tokens guessed right, {self.n_made} guesses sent" if self.n_made else ""

    def forget(self) -> None:
        """The ring is another one: nothing is on its way, and its pace is not known."""
        self._pace, self._last = Pace(), None
        self._flights.clear()

    def begin_request(self) -> None:
        """Measure anew, for a machine may have become busy or idle."""
        self._pace = Pace()

    def learn(self, batch: Batch, held: list[list[int]]) -> None:
        """Note the tokens of a batch that is asked for; `held` are those of all sequences, these among them."""
        for span in batch:
            self._lookup.learn(held[span.sequence_id], span.position)

    def claim(self, batch: Batch) -> bool:
        """True where the batch was guessed: it is on its way, and asked for from now on."""
        if not self._flights:
            return False
        flight = self._flights[0]
        guess, asked = flight.batch[0], batch[0]
        if len(batch) > 1 or (guess.sequence_id, guess.position) != (asked.sequence_id, asked.position):
            return False
        is_right = flight.batch == batch
        self._lookup.note(flight.n_known_by, is_right)
        if is_right:
            self.n_right += 1
            self._flights.popleft().purpose = Purpose.ASKED
        return is_right

    def take_back(self) -> Memory | None:
        """Give all up; the operation that has them forgotten, if there are any."""
        if not self._flights:
            return None
        for flight in self._flights:
            flight.purpose = Purpose.VOID
        span = self._flights[0].batch[0]
        self._flights.clear()
        return Memory(span.sequence_id, span.position)

    def follow(self, flight: Flight | None) -> None:
        """A step was asked for; None where its answer has not the ring to itself."""
        last, self._last = self._last, flight
        if last is None or flight is None or not last.taken or not _continues(flight.batch[0], last.batch[0]):
            return
        now = time.perf_counter()
        self._pace.own.append(now - last.taken)
        if last.is_alone:
            self._pace.round.append(now - last.sent)

    def next(self, flight: Flight, held: list[int], n_room: int) -> tuple[Span, int] | None:
        """What is worth a guess behind a lone answer's last step and the guesses on their way, and by how many tokens
        it is known. `held` is the answer so far, of which there is room for `n_room` tokens more."""
        ahead = [other.batch[0].tokens[0] for other in self._flights]
        token, n = self._lookup.find(held[-_LONGEST:] + ahead)
        if not n or n_room <= len(ahead):
            return None
        odds = self._lookup.odds(n)
        for other in self._flights:
            odds *= self._lookup.odds(other.n_known_by)
        if not self._pace.is_worth(odds, len(ahead)):
            return None
        return Span(flight.batch[0].sequence_id, len(held) + len(ahead), [token]), n

    def add(self, guess: Flight, flight: Flight, n_known_by: int) -> None:
        """A guess was sent behind a lone answer's last step."""
        self.n_made += 1
        guess.n_known_by = n_known_by
        if flight.is_alone and len(flight.batch[0].tokens) == 1:
            guess.before = flight
        flight.is_alone = False
        self._flights.append(guess)

    def note(self, flight: Flight) -> None:
        """A step was taken up by the head's last window."""
        if flight.before is not None and flight.before.came:
            self._pace.widest.append(flight.came - flight.before.came)


def _continues(span: Span, before: Span) -> bool:
    """True for the token behind a single one."""
    return (
        span.sequence_id == before.sequence_id
        and span.position == before.position + 1
        and len(span.tokens) == len(before.tokens) == 1
    )
