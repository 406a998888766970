"""The loop: what joins the context, in what order, what the engine is asked to evaluate, and how things end."""

from itertools import pairwise
from types import MappingProxyType

import pytest

from localreason.runtime.controls.control import Control, Force, Note, Probe, Rewrite, Setup, Stop
from localreason.runtime.decode import Request, decode
from localreason.runtime.errors import PromptTooLong
from localreason.runtime.events import Finished, Noted, Prefilled, Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sampler import entropy
from localreason.runtime.sequence import Origin, Phase, Sequence
from tests.fakes import ByteTokenizer, ScriptedEngine, script

FORMAT = FORMATS["think"]


def request(tokenizer, prompt, controls=(), limit=None, sample=0, tail=""):
    sequence = Sequence(tokenizer.encode(prompt, special=True), id=prompt, sample=sample, limit=limit)
    return Request(sequence, PhaseTracker(FORMAT, tail), lambda row: int(row.argmax()), list(controls))


def setup(tokenizer):
    return Setup(tokenizer, FORMAT)


def make(replies, **options):
    tokenizer = ByteTokenizer()
    return tokenizer, ScriptedEngine(script(tokenizer, replies), tokenizer.n_vocab, **options)


def finish_of(events):
    return [(event.sequence.id, event.reason) for event in events if isinstance(event, Finished)]


def test_reply_is_split_into_thinking_and_answer_and_every_token_is_reported_once():
    tokenizer, engine = make({"Q": "<think>a b</think>42"})
    one = request(tokenizer, "Q")
    events = list(decode(engine, tokenizer, [one]))
    assert (one.sequence.thinking, one.sequence.answer) == ("a b", "42")
    tokens = [event.id for event in events if isinstance(event, Token) and not event.is_continued]
    assert tokens == [*tokenizer.encode("<think>a b</think>42", special=True), tokenizer.END]
    assert "".join(e.text for e in events if isinstance(e, Token) and e.phase is Phase.THINK) == "a b"
    assert finish_of(events) == [("Q", "end")]
    assert one.sequence.counts.thinking == 4  # a, space, b and the closing tag
    assert not any(engine.held), "the cache is freed"


def test_sequences_start_and_end_independently_and_requests_are_taken_as_there_is_room():
    tokenizer, engine = make({"A": "1", "B": "12345", "C": "123"})
    taken = []

    def requests():
        for name in "ABC":
            taken.append(name)
            yield request(tokenizer, name)

    generator = decode(engine, tokenizer, requests(), n_parallel=2)
    events = []
    for event in generator:
        if isinstance(event, Token) and len(taken) == 2:
            assert not finish_of(events), "the third request is taken only after one has ended"
        events.append(event)
    assert sorted(finish_of(events)) == [("A", "end"), ("B", "end"), ("C", "end")]
    assert finish_of(events)[0] == ("A", "end")


def test_requests_that_race_begin_in_one_step_once_there_is_room_for_all():
    tokenizer, engine = make({"A": "1", "B": "12345", "C": "123", "D": "12", "E": "1"}, n_sequences=3)
    requests = [request(tokenizer, name) for name in "ABCDE"]
    requests[2].n_together = 2
    first = {}
    for event in decode(engine, tokenizer, requests):
        if isinstance(event, Token):
            first.setdefault(event.sequence.id, len(engine.batches))
    assert len(first) == 5
    assert first["A"] == first["B"] < first["C"] == first["D"], "the third slot waits for the one that A leaves"


def test_a_race_that_is_given_up_while_it_waits_for_room_holds_nobody_up():
    tokenizer, engine = make({"A": "123456789", "B": "1", "C": "1", "D": "1", "E": "1"}, n_sequences=3)
    requests = [request(tokenizer, name) for name in "ABCDE"]
    requests[1].n_together = 3
    ended, n_tokens = [], 0
    for event in decode(engine, tokenizer, requests):
        if isinstance(event, Token):
            n_tokens += 1
            for given_up in requests[1:4] if n_tokens == 3 else ():
                given_up.sequence.cancel()
        elif isinstance(event, Finished):
            ended.append(event.sequence.id)
    assert ended == ["B", "C", "D", "E", "A"]


def test_more_that_race_than_there_is_room_for_begin_one_after_the_other():
    tokenizer, engine = make({"A": "1", "B": "12"}, n_sequences=1)
    requests = [request(tokenizer, name) for name in "AB"]
    requests[0].n_together = 2
    assert finish_of(decode(engine, tokenizer, requests)) == [("A", "end"), ("B", "end")]


def test_a_prompt_of_many_samples_is_evaluated_once_and_forked():
    prompt = "a prompt that many samples share"
    tokenizer, engine = make({prompt: "xyz"})
    requests = [request(tokenizer, prompt, sample=i) for i in range(4)]
    list(decode(engine, tokenizer, requests))
    n_evaluated = sum(len(span.tokens) for batch in engine.batches for span in batch)
    n_prompt = len(prompt)
    assert n_evaluated == (n_prompt - 1) + 4 * (1 + 3)
    assert [call[3] for call in engine.calls if call[0] == "fork"] == [n_prompt - 1] * 3
    assert all(r.sequence.answer == "xyz" for r in requests)


def test_the_next_question_shares_the_prefix_of_the_one_before():
    tokenizer, engine = make({"the same long examples: A": "1", "the same long examples: B": "2"})
    requests = [request(tokenizer, f"the same long examples: {name}") for name in "AB"]
    list(decode(engine, tokenizer, requests, n_parallel=1))
    assert ("fork", 0, 1, len("the same long examples: ")) in [(c[0], 0, 1, c[-1]) for c in engine.calls]
    assert [r.sequence.answer for r in requests] == ["1", "2"]
    assert not any(engine.held)


def evaluated_in_turn(prompts, **options):
    """Tokens that the engine evaluates for each of the prompts, one after the other, with replies of one token."""
    tokenizer, engine = make(dict.fromkeys(prompts, "!"), **options)
    counts = []

    def requests():
        for prompt in [*prompts, None]:
            counts.append(sum(len(span.tokens) for batch in engine.batches for span in batch))
            if prompt is not None:
                yield request(tokenizer, prompt)

    ends = finish_of(decode(engine, tokenizer, requests(), n_parallel=1))
    assert ends == [(prompt, "end") for prompt in prompts]
    assert not any(engine.held)
    return [after - before for before, after in pairwise(counts)]


@pytest.mark.parametrize("n_sequences", [3, 8])
def test_prefixes_that_take_turns_are_evaluated_once(n_sequences):
    prompts = [name * 40 + str(turn) for turn in range(4) for name in "AB"]
    assert evaluated_in_turn(prompts, n_sequences=n_sequences) == [42, 42] + 6 * [2]


def test_of_the_kept_prompts_the_one_used_longest_ago_is_given_up_first():
    in_turn = [name * 40 + str(turn) for turn, name in enumerate("ABACBA")]
    assert evaluated_in_turn(in_turn, n_sequences=3) == [42, 42, 2, 42, 42, 2], "no slot is left for B"
    assert evaluated_in_turn(in_turn, n_context=120) == [42, 42, 2, 42, 42, 2], "no cell is left for B"


def test_samples_of_one_prompt_are_kept_once():
    prompts = ["A" * 40 + "0", *["B" * 40] * 8, "A" * 40 + "1"]
    assert evaluated_in_turn(prompts)[-1] == 2


@pytest.mark.parametrize(
    ("reply", "is_continued", "n_shared"),
    [("its reply", True, 9), ("its reply", False, 0), ("<think>a thought</think>r", True, 0)],
    ids=["kept", "not wanted", "thinking"],
)
def test_a_reply_that_is_continued_is_kept_with_its_prompt_unless_it_has_thinking(reply, is_continued, n_shared):
    tokenizer, engine = make({"the first turn:": reply, "A second": "2"})
    first = request(tokenizer, "the first turn:")
    first.is_continued = is_continued
    second = request(tokenizer, "the first turn:its reply. A second")
    list(decode(engine, tokenizer, [first, second], n_parallel=1))
    assert [call[-1] for call in engine.calls if call[0] == "fork"] == [len("the first turn:") + n_shared]
    assert second.sequence.answer == "2"
    assert not any(engine.held)


class TestCheckpoints:
    """An engine that cannot go back keeps a fork of a prompt that is to be continued."""

    FIRST = "x" * 60 + "one:"
    SECOND = "x" * 60 + " and two:"
    REPLIES = MappingProxyType({"one:": "<think>a thought</think>r", "and two:": "2"})

    def reused(self, engine, tokenizer, *prompts):
        turns = [request(tokenizer, prompt) for prompt in prompts]
        for turn in turns:
            turn.is_continued = True
        ends = finish_of(decode(engine, tokenizer, turns, n_parallel=1))
        assert not any(engine.held)
        return [turn.sequence.n_reused for turn in turns], [reason for _, reason in ends]

    @pytest.mark.parametrize("can_rewind", [False, True], ids=["recurrent", "sliding window"])
    def test_the_next_turn_goes_on_shortly_before_the_end_of_the_last_prompt(self, can_rewind):
        tokenizer, engine = make(self.REPLIES, can_rewind=can_rewind, is_forgetful=True)
        assert self.reused(engine, tokenizer, self.FIRST, self.SECOND, self.FIRST) == ([0, 32, 37], ["end"] * 3)

    @pytest.mark.parametrize("can_rewind", [False, True], ids=["recurrent", "sliding window"])
    def test_a_reply_without_thinking_is_there_as_a_whole_and_so_is_its_prompt_alone(self, can_rewind):
        tokenizer, engine = make({"one:": "its reply", "two:": "2"}, can_rewind=can_rewind, is_forgetful=True)
        prompts = (self.FIRST, self.FIRST + "its reply. And two:", self.FIRST + "its reple. And two:")
        longest = len(self.FIRST) + len("its reply")
        assert self.reused(engine, tokenizer, *prompts)[0] == [0, longest, 32]

    def test_an_engine_that_can_go_back_needs_none(self):
        tokenizer, engine = make(self.REPLIES)
        assert self.reused(engine, tokenizer, self.FIRST, self.SECOND)[0] == [0, 60]
        assert [len(batch[0].tokens) for batch in engine.batches[:2]] == [64, 1]

    def test_a_cache_that_is_full_gives_it_up(self):
        tokenizer, engine = make(self.REPLIES, can_rewind=False, n_context=70)
        assert self.reused(engine, tokenizer, self.FIRST) == ([0], ["context"])

    def test_without_a_slot_to_spare_all_is_evaluated_again(self):
        tokenizer, engine = make(self.REPLIES, can_rewind=False, n_sequences=1)
        assert self.reused(engine, tokenizer, self.FIRST, self.SECOND) == ([0, 0], ["end"] * 2)


def test_prompts_take_a_part_of_the_batches_that_replies_wait_for():
    tokenizer, engine = make({"A": "1" * 20, "x" * 400: "2", "y" * 200: "3"}, n_batch=128)
    requests = [request(tokenizer, prompt) for prompt in ("A", "x" * 400, "y" * 200)]
    list(decode(engine, tokenizer, requests))
    sizes = [sorted(len(span.tokens) for span in batch) for batch in engine.batches]
    beside = [size for size in sizes if size[0] == 1]
    assert all(sum(n for n in size if n > 1) <= 32 for size in beside)
    assert sum(sum(size) for size in beside) > 600, "prompts are evaluated beside the reply"


def test_closing_the_generator_in_a_long_prefill_frees_the_engine_at_once():
    tokenizer, engine = make({"x" * 1000: "y"}, n_batch=16)
    generator = decode(engine, tokenizer, [request(tokenizer, "x" * 1000)])
    first = next(generator)
    assert isinstance(first, Prefilled)
    assert (first.n_done, first.n_total) == (16, 1000)
    generator.close()
    assert len(engine.batches) == 1
    assert not any(engine.held)


def test_a_cancelled_sequence_ends_before_the_next_step_and_the_others_go_on():
    tokenizer, engine = make({"A": "123456", "B": "12"})
    one, other = request(tokenizer, "A"), request(tokenizer, "B")
    events = []
    for event in decode(engine, tokenizer, [one, other]):
        events.append(event)
        if isinstance(event, Token) and event.sequence is one.sequence and one.sequence.n_reply == 2:
            one.sequence.cancel()
    assert finish_of(events) == [("A", "cancelled"), ("B", "end")]
    assert one.sequence.answer == "12"


def test_limits_end_a_reply_exactly():
    tokenizer, engine = make({"A": "123456"}, n_context=100)
    one = request(tokenizer, "A", limit=4)
    assert finish_of(decode(engine, tokenizer, [one])) == [("A", "length")]
    assert one.sequence.answer == "1234"
    engine.n_context = engine.n_context_sequence = 4
    two = request(tokenizer, "A")
    assert finish_of(decode(engine, tokenizer, [two])) == [("A", "context")]
    assert two.sequence.answer == "123"


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    tokenizer, engine = make({"A": "1"}, n_context=5)
    with pytest.raises(PromptTooLong, match=r"6 tokens.* holds 5"):
        list(decode(engine, tokenizer, [request(tokenizer, "AAAAAA")]))


def test_a_full_cache_evicts_the_youngest_which_ends_with_the_same_reply_later():
    replies = {"A": "1" * 30, "B": "2" * 30}
    tokenizer, engine = make(replies, n_context=45)
    requests = [request(tokenizer, name) for name in "AB"]
    events = list(decode(engine, tokenizer, requests))
    assert finish_of(events) == [("A", "end"), ("B", "end")]
    assert [r.sequence.answer for r in requests] == ["1" * 30, "2" * 30]
    assert engine.n_requests == 2, "a row that is taken back is no new request"
    assert not any(engine.held)


class Once(Control):
    """Returns its actions after the n-th token, and those of `afterwards` when its probe has ended."""

    name = "once"

    def __init__(self, n, actions, tokenizer, afterwards=()):
        super().__init__(None, setup(tokenizer))
        self.n, self.actions, self.afterwards, self.readings = n, actions, afterwards, []

    def observe(self, sequence, token):
        if sequence.n_reply == self.n and sequence.origins[-1] is Origin.SAMPLED:
            actions, self.actions = self.actions, ()
            return actions
        return ()

    def read(self, sequence, reading):
        self.readings.append(reading)
        return self.afterwards


def test_forced_tokens_are_taken_without_logits_and_evaluated_in_one_batch():
    tokenizer, engine = make({"A": "12", "XYZ": "9"})
    control = Once(2, (Force(tuple(b"XYZ")),), tokenizer)
    one = request(tokenizer, "A", [control])
    events = list(decode(engine, tokenizer, [one]))
    assert one.sequence.answer == "12XYZ9"
    assert [e.origin for e in events if isinstance(e, Token)][2:5] == [Origin.FORCED] * 3
    assert [span.tokens for span in engine.batches[2]] == [list(b"2XYZ")]
    assert one.sequence.counts.forced == 3


def test_forced_tokens_keep_to_the_limit():
    tokenizer, engine = make({"A": "12"})
    one = request(tokenizer, "A", [Once(2, (Force(tuple(b"XYZ")),), tokenizer)], limit=4)
    assert finish_of(decode(engine, tokenizer, [one])) == [("A", "length")]
    assert one.sequence.answer == "12XY"


def test_a_rewrite_puts_a_hint_before_text_that_is_kept_and_not_sent_again():
    tokenizer = ByteTokenizer()
    engine = ScriptedEngine(script(tokenizer, {"A": "1234"}, invisible="hint"), tokenizer.n_vocab)
    tail = ((ord("2"), Origin.SAMPLED), (ord("3"), Origin.SAMPLED))
    control = Once(3, (Rewrite(2, (*((b, Origin.HINT) for b in b"hint"), *tail)),), tokenizer)
    one = request(tokenizer, "A", [control])
    events = list(decode(engine, tokenizer, [one]))
    assert tokenizer.text(one.sequence.tokens[:-1]) == "A1hint234"
    assert "".join(e.text for e in events if isinstance(e, Token)) == "1234"
    assert one.sequence.counts.hint == 4
    assert ("rewind", 0, 2) in engine.calls
    assert [span.tokens for span in engine.batches[3]] == [list(b"hint23")]


def test_a_rewrite_on_an_engine_that_cannot_rewind_evaluates_all_again():
    tokenizer = ByteTokenizer()
    engine = ScriptedEngine(script(tokenizer, {"A": "1234"}, invisible="h"), tokenizer.n_vocab, can_rewind=False)
    control = Once(3, (Rewrite(3, ((ord("h"), Origin.HINT), (ord("3"), Origin.SAMPLED))),), tokenizer)
    one = request(tokenizer, "A", [control])
    list(decode(engine, tokenizer, [one]))
    assert tokenizer.text(one.sequence.tokens[:-1]) == "A12h34"


def test_a_probe_runs_in_the_same_batches_and_leaves_the_main_sequence_as_it_is():
    tokenizer, engine = make({"A": "12345", "P:": "77}8"})
    control = Once(1, (Probe(tuple(b"P:"), 20, lambda text: text.endswith("}")),), tokenizer)
    one = request(tokenizer, "A", [control])
    events = list(decode(engine, tokenizer, [one]))
    assert one.sequence.answer == "12345"
    [reading] = control.readings
    assert reading.texts == ("7", "7", "}")
    assert reading.is_done
    row = engine._row(list(b"A1P:"))
    assert reading.entropies == pytest.approx([entropy(row)] * 3)
    assert [len(batch) for batch in engine.batches[1:4]] == [2, 2, 2]
    assert one.sequence.counts.probe == 2 + 3
    assert all(not e.text for e in events if isinstance(e, Token) and e.origin is Origin.PROBE)


PROBE = Probe(tuple(b"P:"), 20, lambda text: text.endswith("}"))


@pytest.mark.parametrize("n_in_flight", [1, 2, 3])
def test_what_a_probe_gave_forces_tokens_before_another_is_sampled(n_in_flight):
    replies = {"A": "<think>123</think>4", "X": "9</think>8", "P:": "7}"}
    tokenizer, engine = make(replies, n_in_flight=n_in_flight)
    control = Once(2, (PROBE,), tokenizer, afterwards=(Force(tuple(b"X")),))
    one = request(tokenizer, "A", [control])
    list(decode(engine, tokenizer, [one]))
    assert one.sequence.thinking in ("12X9", "123X9"), "it was not too late for the thinking"
    assert one.sequence.answer == "8"
    assert not any(engine.held)


@pytest.mark.parametrize("n_in_flight", [1, 2, 3])
def test_what_a_probe_gave_takes_tokens_back_and_the_reply_goes_on_from_there(n_in_flight):
    tokenizer, engine = make({"A": "1234567", "P:": "7}"}, n_in_flight=n_in_flight)
    control = Once(1, (PROBE,), tokenizer, afterwards=(Rewrite(2),))
    one = request(tokenizer, "A", [control])
    list(decode(engine, tokenizer, [one]))
    assert tokenizer.text(one.sequence.tokens[:-1]) == "A1234567"
    assert any(call[0] == "rewind" and call[2] == 1 for call in engine.calls), "all behind A1 was taken back"


def test_a_probe_that_is_given_up_for_room_is_read_as_nothing_for_its_own_sequence():
    tokenizer, engine = make({"A": "12345", "X": "67", "P:": "abcdefghijkl"}, n_context=9)
    long = Probe(tuple(b"P:"), 20, lambda text: False)
    control = Once(1, (long,), tokenizer, afterwards=(Note("gone"), Force(tuple(b"X"))))
    one = request(tokenizer, "A", [control])
    events = list(decode(engine, tokenizer, [one]))
    assert [event.sequence for event in events if isinstance(event, Noted)] == [one.sequence]
    assert one.sequence.answer.endswith("X67")


def test_a_probe_without_a_free_slot_reads_nothing_and_the_reply_goes_on():
    tokenizer, engine = make({"A": "123"}, n_sequences=1)
    control = Once(1, (Probe(tuple(b"P:"), 20, lambda text: False),), tokenizer)
    one = request(tokenizer, "A", [control])
    list(decode(engine, tokenizer, [one]))
    assert one.sequence.answer == "123"
    assert [r.is_done for r in control.readings] == [False]


def test_a_control_can_stop_its_own_and_another_sequence():
    tokenizer, engine = make({"A": "12345", "B": "12345"})
    other = request(tokenizer, "B")
    one = request(tokenizer, "A", [Once(2, (Stop("enough"), Stop("lost", other.sequence)), tokenizer)])
    events = list(decode(engine, tokenizer, [one, other]))
    assert sorted(finish_of(events)) == [("A", "enough"), ("B", "lost")]
    assert one.sequence.answer == "12"
