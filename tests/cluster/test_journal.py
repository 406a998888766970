"""What the head knows of the caches rebuilds them: same tokens, same shared cells."""

from hypothesis import given, settings
from hypothesis import strategies as st

from localreason.cluster.journal import Holdings, Journal, Memory
from localreason.runtime.engine import Span

N = 4


@st.composite
def histories(draw):
    """A valid run of batches and memory operations."""
    lengths, entries = [0] * N, []
    for _ in range(draw(st.integers(0, 25))):
        kind = draw(st.sampled_from(["batch", "batch", "fork", "rewind"]))
        sequence = draw(st.integers(0, N - 1))
        if kind == "batch":
            tokens = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
            entries.append([Span(sequence, lengths[sequence], tokens)])
            lengths[sequence] += len(tokens)
        elif kind == "rewind":
            kept = draw(st.integers(0, lengths[sequence]))
            entries.append(Memory(sequence, kept))
            lengths[sequence] = kept
        else:
            target = draw(st.integers(0, N - 1))
            if target != sequence and not lengths[target] and lengths[sequence]:
                n = draw(st.integers(1, lengths[sequence]))
                entries.append(Memory(sequence, n, target))
                lengths[target] = n
    return entries


def replay(entries):
    holdings = Holdings(N)
    for entry in entries:
        holdings.apply(entry)
    return holdings


@settings(max_examples=300, deadline=None)
@given(histories(), st.integers(1, 7))
def test_a_rebuilt_cache_holds_the_same_tokens_in_as_many_cells(entries, n_batch):
    before = replay(entries)
    rebuilding = list(before.rebuild(n_batch))
    after = replay(rebuilding)
    assert after.tokens == before.tokens
    assert after.n_used == before.n_used
    assert all(len(span.tokens) <= n_batch for entry in rebuilding if not isinstance(entry, Memory) for span in entry)


@settings(max_examples=200, deadline=None)
@given(histories(), st.integers(0, 25))
def test_base_and_pending_together_are_the_front(entries, n_settled):
    journal = Journal(N)
    for entry in entries:
        journal.add(entry)
    for _ in range(n_settled):
        journal.settle()
    again = replay([*journal.base.rebuild(3), *journal.pending])
    assert again.tokens == journal.front.tokens
    assert again.n_used == journal.front.n_used


def test_a_shared_prefix_takes_its_cells_once():
    holdings = replay([[Span(0, 0, [1] * 10)], Memory(0, 8, 1), Memory(0, 10, 2), [Span(1, 8, [2])]])
    assert holdings.n_used == 11
    holdings.apply(Memory(0, 0))
    assert holdings.n_used == 11, "the others still hold them"
    holdings.apply(Memory(2, 0))
    assert holdings.n_used == 9
