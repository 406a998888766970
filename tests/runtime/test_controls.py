"""Each control against its specification: exact token sequences on a scripted engine, boundary values, pairs."""

import numpy as np
import pytest

from localreason.runtime.controls import CONTROLS, PRESETS, Setup, combine, describe, parse
from localreason.runtime.controls.control import Probe, Reading
from localreason.runtime.controls.suppress import resolve
from localreason.runtime.decode import Request, decode
from localreason.runtime.errors import ControlError
from localreason.runtime.events import Finished, Noted, Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Origin, Phase, Sequence
from tests.fakes import ByteTokenizer, ScriptedEngine, script

FORMAT = FORMATS["think"]
CLOSE, LEAD = FORMAT.close, FORMAT.lead


def run(
    replies,
    texts,
    prompt="Q<think>",
    invisible="\0",
    n_samples=1,
    tokenizer=None,
    n_words=(),
    limit=None,
    **engine_options,
):
    """One question under the controls `texts`; returns the sequences, the events and the tokenizer."""
    tokenizer = tokenizer or ByteTokenizer(list(n_words))
    engine = ScriptedEngine(script(tokenizer, replies, invisible), tokenizer.n_vocab, **engine_options)
    chosen = combine(None, texts, insist=True)
    setup = Setup(tokenizer, FORMAT, can_rewind=engine.can_rewind)
    shared = {p.control: CONTROLS[p.control](p, setup) for p in chosen if CONTROLS[p.control].is_shared}
    requests = []
    for sample in range(n_samples):
        controls = [shared.get(p.control) or CONTROLS[p.control](p, setup) for p in chosen]
        sequence = Sequence(tokenizer.encode(prompt, special=True), id="Q", sample=sample, limit=limit)
        requests.append(Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda row: int(row.argmax()), controls))
    events = list(decode(engine, tokenizer, requests))
    assert not any(engine.held)
    return [r.sequence for r in requests], events, engine


def reply(sequence):
    tokens = sequence.tokens[sequence.n_prompt :]
    return ByteTokenizer().text([t for t in tokens if t != ByteTokenizer.END])


def counters(events, name):
    return [e for e in events if isinstance(e, Finished)][-1].counters[name]


class TestBudget:
    def test_thinking_is_cut_exactly_at_the_limit_with_newline_end_and_lead(self):
        [one], events, _ = run({"Q<think>": "abcdefgh", LEAD: " 7"}, ["budget:max=5,slack=0"])
        assert reply(one) == "abcde" + "\n" + CLOSE.lstrip("\n") + LEAD + " 7"
        assert one.counts.thinking == 5
        assert one.is_cut
        assert counters(events, "budget")["cuts"] == 1

    def test_a_natural_end_just_below_the_limit_is_left_alone(self):
        # four letters and the closing tag are five sampled thinking tokens
        [one], events, _ = run({"Q<think>": "abcd</think>7"}, ["budget:max=6,slack=0"])
        assert reply(one) == "abcd</think>7"
        assert counters(events, "budget")["cuts"] == 0

    def test_no_second_newline_after_a_line_end_and_no_lead_without_lead(self):
        [one], _, _ = run({"Q<think>": "abcd\nefgh", CLOSE.lstrip("\n"): "7"}, ["budget:max=5,lead=no,slack=0"])
        assert reply(one) == "abcd\n" + CLOSE.lstrip("\n") + "7"

    def test_budget_zero_closes_before_the_first_token_and_lets_no_newline_through(self):
        [one], _, engine = run({LEAD: "7"}, ["budget:max=0"])
        assert reply(one) == "\n" + CLOSE.lstrip("\n") + LEAD + "7"
        assert one.counts.thinking == 0
        assert len(engine.batches[0]) == 1
        assert len(engine.batches[0][0].tokens) == len(one.tokens) - 2, "prompt and close go in one batch"

    def test_the_cut_prefers_a_line_end_near_the_limit(self):
        [one], _, _ = run({"Q<think>": "a" * 34 + "\nbcdefgh", LEAD: "7"}, ["budget:max=40"])
        assert one.thinking.strip() == "a" * 34
        [two], _, _ = run({"Q<think>": "a" * 30 + "\n" + "b" * 20, LEAD: "7"}, ["budget:max=40"])
        assert two.counts.thinking == 40, "a line end outside the last eighth does not cut"

    def test_a_line_end_cuts_neither_far_from_a_small_total_nor_below_the_minimum(self):
        [one], _, _ = run({"Q<think>": "a\n" + "b" * 40, LEAD: "7"}, ["budget:total=24"])
        assert one.counts.thinking == 24
        [two], _, _ = run({"Q<think>": "a" * 37 + "\n" + "b" * 20, LEAD: "7"}, ["budget:max=40,min=40"])
        assert two.counts.thinking == 40
        [three], _, _ = run({"Q<think>": "a\n" + "b" * 40, LEAD: "7"}, ["budget:max=100"], limit=48)
        assert three.thinking.startswith("a\nb"), "the limit of the reply is as small"

    @pytest.mark.parametrize(("limit", "n_context", "finish"), [(60, 4096, "length"), (None, 62, "context")])
    def test_a_limit_of_the_whole_reply_leaves_room_for_the_answer(self, limit, n_context, finish):
        n_closing = len(ByteTokenizer().encode("\n" + CLOSE.lstrip("\n") + LEAD, special=True))
        [one], events, _ = run(
            {"Q<think>": "a" * 99, LEAD: "7" * 99}, ["budget:max=90,slack=0"], limit=limit, n_context=n_context
        )
        assert (one.counts.thinking, one.counts.answer) == (60 - 15 - n_closing, 15)
        assert (one.finish, counters(events, "budget")["cuts"]) == (finish, 1)

    def test_a_limit_that_no_cut_fits_into_is_thought_up_to(self):
        [one], events, _ = run({"Q<think>": "a" * 99}, ["budget"], limit=5)
        assert (one.thinking, one.finish, counters(events, "budget")["cuts"]) == ("aaaaa", "length", 0)

    def test_the_cut_waits_for_a_whole_character(self):
        text = "ab" + "é" + "cd"  # é is two tokens: the limit of 3 falls into it
        [one], _, _ = run({"Q<think>": text, LEAD: "7"}, ["budget:max=3,slack=0"])
        assert one.thinking.strip() == "abé"
        assert one.counts.thinking == 4

    @pytest.mark.parametrize("n", [0, 1, 2])
    def test_the_end_is_ignored_n_times_and_replaced_by_wait_on_a_line_of_its_own(self, n):
        replies = {"Q<think>": "ab</think>7"}
        for i in range(n):
            replies["Q<think>ab" + "\nWait cd" * i + "\nWait"] = " cd</think>7"
        [one], events, _ = run(replies, [f"budget:ignore={n}"])
        assert reply(one) == "ab" + "\nWait cd" * n + "</think>7"
        assert counters(events, "budget")["ignored"] == n
        assert one.thinking == "ab" + "\nWait cd" * n, "the reader sees no tag"
        assert one.answer == "7"

    def test_after_a_line_end_wait_follows_without_another_newline(self):
        [one], _, _ = run({"Q<think>": "ab\n</think>7", "Wait": " c</think>7"}, ["budget:ignore=1"])
        assert reply(one) == "ab\nWait c</think>7"

    def test_empty_wait_only_drops_the_end_which_is_banned_for_one_step(self):
        tokenizer = ByteTokenizer()
        close = tokenizer.encode("</think>", special=True)[0]
        prompt = tokenizer.encode("Q<think>", special=True)

        def model(tokens):
            written = tokens[len(prompt) :]
            if written == [ord("a")]:
                return {close: 9.0, ord("b"): 5.0}
            if not written:
                return ord("a")
            return {close: 9.0} if close not in written else tokenizer.END

        engine = ScriptedEngine(model, tokenizer.n_vocab)
        control = CONTROLS["budget"](parse("budget:ignore=1,wait="), Setup(tokenizer, FORMAT))
        sequence = Sequence(list(prompt))
        list(
            decode(
                engine,
                tokenizer,
                [Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), [control])],
            )
        )
        assert reply(sequence) == "ab</think>"

    def test_minimum_thinking_ignores_ends_until_it_is_reached(self):
        replies = {"Q<think>": "ab</think>7", "Wait": "cdef</think>7"}
        [one], events, _ = run(replies, ["budget:min=6"])
        assert one.thinking == "ab\nWaitcdef"
        assert counters(events, "budget")["ignored"] == 1

    @pytest.mark.parametrize(("control", "lead"), [("budget", LEAD), ("budget:lead=no", "")])
    def test_an_end_of_generation_inside_the_block_is_dropped_and_the_answer_led_to(self, control, lead):
        [one], events, _ = run({"Q<think>": "ab", lead or CLOSE: "7"}, [control])
        assert reply(one) == "ab" + "\n" + CLOSE.lstrip("\n") + lead + "7"
        assert one.finish == "end"
        assert counters(events, "budget")["closed_at_end"] == 1

    def test_an_end_of_generation_can_be_ignored_too(self):
        [one], _, _ = run({"Q<think>": "ab", "Wait": " c</think>7"}, ["budget:ignore=1"])
        assert reply(one) == "ab\nWait c</think>7"

    def test_total_holds_over_blocks_and_max_for_each(self):
        replies = {"Q<think>": "abcd</think><think>efgh</think>x", LEAD: "7"}
        [one], _, _ = run(replies, ["budget:max=6,total=8,slack=0"])
        assert one.thinking.replace("\n", "") == "abcdefg"[: 8 - 1]  # one of the eight is the first closing tag
        assert one.counts.thinking == 8

    def test_answer_now_closes_at_the_next_token(self):
        tokenizer = ByteTokenizer()
        engine = ScriptedEngine(script(tokenizer, {"Q<think>": "abcdefgh", LEAD: "7"}), tokenizer.n_vocab)
        control = CONTROLS["budget"](parse("budget"), Setup(tokenizer, FORMAT))
        sequence = Sequence(tokenizer.encode("Q<think>", special=True))
        request = Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), [control])
        for _ in decode(engine, tokenizer, [request]):
            if sequence.n_reply == 3:
                sequence.hurry()
        assert sequence.thinking.strip() == "abc"
        assert sequence.answer.strip() == (LEAD + "7").strip()

    @pytest.mark.parametrize(
        ("text", "n_before", "n_more", "n_thinking"),
        [("budget:max=6,slack=0", 3, 20, 23), ("budget:max=100,slack=0", 3, 20, 36), ("budget:max=40", 3, 0, 11)],
        ids=["the limit is raised", "an end is ignored", "nothing more is asked for"],
    )
    def test_a_running_sequence_can_be_made_to_think_longer(self, text, n_before, n_more, n_thinking):
        tokenizer = ByteTokenizer()
        replies = {"Q<think>": "0123456789</think>", "Wait": "abcdefghijklmnopqrstuvwx</think>", LEAD: "7"}
        replies[CLOSE.lstrip("\n")] = replies["</think>"] = "7"
        engine = ScriptedEngine(script(tokenizer, replies), tokenizer.n_vocab)
        control = CONTROLS["budget"](parse(text), Setup(tokenizer, FORMAT))
        sequence = Sequence(tokenizer.encode("Q<think>", special=True), limit=58)
        request = Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), [control])
        for _ in decode(engine, tokenizer, [request]):
            if sequence.n_reply == n_before and n_more:
                sequence.hurry()
                assert control.extend(sequence, n_more)
                n_more = 0
        assert sequence.counts.thinking == n_thinking
        assert sequence.answer.strip().endswith("7")
        assert not control.extend(sequence, 10), "it has ended"

    def test_longer_thinking_leaves_an_answer_its_room_in_the_context(self):
        tokenizer = ByteTokenizer()
        replies = {"Q<think>": "x" * 300, LEAD: "7"}
        engine = ScriptedEngine(script(tokenizer, replies), tokenizer.n_vocab, n_context=200)
        control = CONTROLS["budget"](parse("budget:max=400,repeat=0"), Setup(tokenizer, FORMAT))
        sequence = Sequence(tokenizer.encode("Q<think>", special=True))
        request = Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), [control])
        for _ in decode(engine, tokenizer, [request]):
            if sequence.n_reply == 50 and sequence.counts.thinking == 50:
                control.extend(sequence, 100)
        assert sequence.answer.strip().endswith("7")
        assert sequence.is_cut

    def test_a_closing_tag_repeated_after_a_cut_is_swallowed(self):
        [one], _, _ = run({"Q<think>": "abcdefgh", CLOSE.lstrip("\n"): "</think>7"}, ["budget:max=5,lead=no,slack=0"])
        assert one.answer.strip() == "7"

    def test_a_repeated_run_of_tokens_is_cut(self):
        [one], _, _ = run({"Q<think>": "abcd" * 10, LEAD: "7"}, ["budget:repeat=6"])
        assert one.counts.thinking == 10  # tokens 5..10 are those of 1..6

    def test_outside_thinking_it_does_nothing(self):
        tokenizer = ByteTokenizer()
        engine = ScriptedEngine(script(tokenizer, {"Q": "abcdefgh"}), tokenizer.n_vocab)
        control = CONTROLS["budget"](parse("budget:max=2,ignore=3"), Setup(tokenizer, FORMAT))
        sequence = Sequence(tokenizer.encode("Q"))
        list(
            decode(
                engine, tokenizer, [Request(sequence, PhaseTracker(FORMAT, ""), lambda r: int(r.argmax()), [control])]
            )
        )
        assert sequence.answer == "abcdefgh"


HINT = FORMAT.user_hint.replace("{hint}", "make answer concise!")


class TestHint:
    def test_hint_goes_behind_the_first_mark_of_the_chunk_and_is_hidden(self):
        text = "One thing, another. " + "x" * 120
        [one], events, _ = run({"Q<think>": text + "</think>7"}, ["hint"], invisible=HINT)
        assert reply(one) == "One thing," + HINT + " another. " + "x" * 120 + "</think>7"
        assert one.thinking == text
        assert one.answer == "7"
        assert one.counts.hint == len(ByteTokenizer().encode(HINT, special=True))
        assert one.counts.thinking == len(text) + 1
        assert counters(events, "hint")["hints"] == 1

    def test_the_interval_grows_with_the_thinking(self):
        text = "a, " * 200
        [one], events, _ = run({"Q<think>": text + "</think>7"}, ["hint"], invisible=HINT)
        # 128, then 128 + 0.2 * 128 = 153 -> 281, then 184 -> 465, then 221 -> 686: beyond the 600
        assert counters(events, "hint")["hints"] == 3
        assert one.thinking == text

    def test_the_longest_interval_bounds_the_first_one_too(self):
        _, events, _ = run({"Q<think>": "a, " * 20 + "</think>7"}, ["hint:interval=25,beta=0"], invisible=HINT)
        assert counters(events, "hint")["hints"] == 2

    def test_later_hints_stand_further_back_in_their_chunk(self):
        text = "a, " * 300
        [one], _, _ = run({"Q<think>": text + "</think>7"}, ["hint:alpha=640"], invisible=HINT)
        before = reply(one).index(HINT)
        assert before == 320 + 3  # (640 - 128) / 1024 of the chunk, then on to the next comma

    def test_no_mark_means_no_hint_in_this_round(self):
        [one], events, _ = run({"Q<think>": "x" * 300 + "</think>7"}, ["hint"])
        assert counters(events, "hint")["hints"] == 0
        assert counters(events, "hint")["missed"] == 2
        assert one.counts.hint == 0

    @pytest.mark.parametrize("opening", ["```py\n", "$x + ", "\\[ ", "\\boxed{"])
    def test_never_inside_code_or_a_formula(self, opening):
        _, events, _ = run({"Q<think>": opening + "a, b. " + "x" * 200 + "</think>7"}, ["hint"])
        assert counters(events, "hint")["hints"] == 0

    def test_only_while_thinking(self):
        [one], events, _ = run({"Q<think>": "a</think>" + "b, " * 100}, ["hint"])
        assert counters(events, "hint")["hints"] == 0
        assert one.answer == "b, " * 100

    @pytest.mark.parametrize("budget", ["max=190", "max=190,total=1000", "max=1000,total=190"])
    def test_not_in_the_last_tokens_before_a_hard_cut(self, budget):
        replies = {"Q<think>": "a, " * 100, LEAD: "7"}
        for text, n_hints in ((budget, 0), (budget.replace("190", "193"), 1)):
            [_], events, _ = run(replies, ["hint", f"budget:{text},slack=0"], invisible=HINT)
            assert counters(events, "hint")["hints"] == n_hints

    def test_no_hint_where_the_limit_has_no_room_for_it(self):
        n_hint = len(ByteTokenizer().encode(HINT, special=True))
        for n_more, n_hints in ((0, 0), (1, 1)):
            [one], events, _ = run({"Q<think>": "a, " * 100}, ["hint"], invisible=HINT, limit=128 + n_hint + n_more)
            assert counters(events, "hint")["hints"] == n_hints
            assert one.n_reply == one.limit

    def test_a_recurrent_model_gets_the_hint_behind_the_first_clause_after_the_chunk(self):
        chunk, code = "One thing, another. " + "x" * 120, " `f(a, b)` and"
        text = chunk + code + " so, it is."
        [one], _, engine = run({"Q<think>": text + "</think>7"}, ["hint"], invisible=HINT, can_rewind=False)
        assert reply(one).startswith(chunk + code + " so," + HINT + " it is.")
        assert not [call for call in engine.calls if call[0] == "rewind" and call[2]]

    def test_a_sequence_tells_a_half_written_tag(self):
        tokenizer = ByteTokenizer()
        engine = ScriptedEngine(script(tokenizer, {"Q<think>": "a <b</think>7"}), tokenizer.n_vocab)
        sequence = Sequence(tokenizer.encode("Q<think>", special=True))
        request = Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), [])
        seen = [sequence.is_in_tag for event in decode(engine, tokenizer, [request]) if isinstance(event, Token)]
        assert seen[:4] == [False, False, True, False]

    def test_no_hint_where_a_tag_is_half_written(self):
        control = CONTROLS["hint"](parse("hint:alpha=1"), Setup(ByteTokenizer(), FORMAT))
        sequence = Sequence([1])
        sequence.phase, sequence.n_blocks = Phase.THINK, 1
        for text in "a, b, <":
            sequence.tokens.append(ord(text))
            sequence.origins.append(Origin.SAMPLED)
            sequence.thinking += text
            sequence.counts.thinking += 1
            sequence.is_in_tag = True
            assert not list(control.observe(sequence, ord(text)))
        sequence.is_in_tag = False
        assert list(control.observe(sequence, ord("<")))

    def test_a_users_hint_text_cannot_become_a_control_token(self):
        setup = Setup(ByteTokenizer(), FORMAT)
        control = CONTROLS["hint"](parse("hint:text=</think>"), setup)
        assert setup.tokenizer.encode("</think>", special=True)[0] not in control._hint


class Certain:
    """A model that thinks in paragraphs, prefers `Wait` at each, and answers probes with a given certainty."""

    def __init__(self, tokenizer, answer="42}", spread=0.0):
        self.tokenizer, self.answer, self.spread = tokenizer, answer, spread
        self.wait, self.but = tokenizer.encode("Wait")[0], tokenizer.encode("So")[0]

    def __call__(self, tokens):
        text = self.tokenizer.text(tokens)
        lead = "\\boxed{"
        if lead in text:
            written = text[text.rfind(lead) + len(lead) :]
            best = ord(self.answer[len(written)])
            return {best: 0.0, **{i: -self.spread for i in range(256) if i != best}} if self.spread else best
        if text.endswith("\n\n"):
            return {self.wait: 9.0, self.but: 8.0}
        n = text.count("\n\n")
        if n == 4:
            return self.tokenizer.END
        return ord("\n") if text.endswith("\n") else ord("\n") if len(text.rpartition("\n\n")[2]) > 10 else ord("x")


class TestSuppress:
    def think(self, texts, **options):
        tokenizer = ByteTokenizer(["Wait", " Wait", "So"])
        engine = ScriptedEngine(Certain(tokenizer, **options), tokenizer.n_vocab)
        chosen = combine(None, texts, insist=True)
        setup = Setup(tokenizer, FORMAT, seed=1)
        controls = [CONTROLS[p.control](p, setup) for p in chosen]
        sequence = Sequence(tokenizer.encode("Q<think>", special=True))
        request = Request(sequence, PhaseTracker(FORMAT, "<think>"), lambda r: int(r.argmax()), controls)
        return sequence, list(decode(engine, tokenizer, [request])), engine

    def test_a_certain_tentative_answer_suppresses_the_trigger_at_the_next_paragraph(self):
        sequence, events, _ = self.think(["suppress:gap=0"])
        found = counters(events, "suppress")
        assert found["probes"] == 4
        assert found["certainty"] == 1.0
        # the probe of the first paragraph ends only after its first word is written: the old probability held
        assert sequence.thinking.count("Wait") == 1
        assert sequence.thinking.count("So") == 3
        n_lead = len("**Final Answer: \\boxed{")
        assert sequence.counts.probe == 4 * n_lead + 3 * len("42}") + 2, "the last one ends with the reply"
        assert any("suppressed 'Wait', the model wrote 'So'" in e.text for e in events if isinstance(e, Noted))

    def test_an_uncertain_one_does_not(self):
        sequence, events, _ = self.think(["suppress:gap=0"], spread=0.1)
        assert counters(events, "suppress")["suppressed_steps"] == 0
        assert sequence.thinking.count("Wait") == 4

    def test_certainty_and_probability_follow_the_formula(self):
        tokenizer = ByteTokenizer(["Wait"])
        control = CONTROLS["suppress"](parse("suppress"), Setup(tokenizer, FORMAT))
        nats = 0.05 * float(np.log(tokenizer.n_vocab))
        control.read(Sequence([1]), Reading(("4", "2", "}"), (nats, nats, 99.0), True))
        assert control._probability == pytest.approx(0.5)
        control.read(Sequence([1]), Reading(("4", "2"), (0.0, 0.0), False))
        assert control._probability == pytest.approx(0.5), "an answer without its brace leaves it as it was"
        control.read(Sequence([1]), Reading(("4}",), (2 * nats,), True))
        assert control._probability == 0.0

    def test_a_closing_tag_that_is_ignored_as_the_first_token_is_not_shown_to_it(self):
        replies = {"Q<think>": "</think>7", "Wait": " b</think>7"}
        [one], _, _ = run(replies, ["budget:ignore=1", "suppress:gap=0", "hint:alpha=1"])
        assert one.thinking.startswith("Wait b")
        assert one.answer == "7"

    def test_a_probe_that_began_before_a_forced_wait_does_not_pull_against_it(self):
        control = CONTROLS["suppress"](parse("suppress:gap=0"), Setup(ByteTokenizer(), FORMAT))
        sequence = Sequence([1])
        sequence.phase, sequence.thinking = Phase.THINK, "a.\n\n"
        sequence.origins.append(Origin.SAMPLED)
        control.observe(sequence, ord("\n"))
        assert any(isinstance(action, Probe) for action in control.observe(sequence, ord("\n")))
        sequence.origins.append(Origin.FORCED)
        control.observe(sequence, ord("W"))
        control.read(sequence, Reading(("4", "}"), (0.0, 0.0), True))
        assert control._probability == 0.0
        assert control.counters["unread"] == 1
        control.read(sequence, Reading(("4", "}"), (0.0, 0.0), True))
        assert control._probability == 1.0

    def test_a_probe_that_the_context_does_not_hold_is_not_begun(self):
        n_context = len("Q") + 1 + len("a.\n\nb.\n\nc") + 5
        [one], events, _ = run({"Q<think>": "a.\n\nb.\n\nc</think>7"}, ["suppress:gap=0"], n_context=n_context)
        assert one.counts.probe == 0
        assert counters(events, "suppress")["unread"] == counters(events, "suppress")["probes"] == 2

    def test_probes_keep_their_gap(self):
        _, events, _ = self.think(["suppress:gap=1000"])
        assert counters(events, "suppress")["probes"] == 1

    def test_no_probe_where_a_tentative_answer_means_nothing(self):
        _, events, engine = self.think(["suppress:gap=0,task=none"])
        assert counters(events, "suppress")["probes"] == 0
        assert not [call for call in engine.calls if call[0] == "fork"]

    def test_triggers_are_resolved_for_a_vocabulary_with_and_without_whole_words(self):
        whole = ByteTokenizer(["Wait", " Wait", "Waiting", "\nWait", "wait"])
        found = resolve(whole, ("Wait",))
        assert [whole.piece(int(i)) for i in found.single] == [b"Wait", b" Wait", b"\nWait"]
        assert found.several == ()
        pieces = ByteTokenizer(["Wa"])
        found = resolve(pieces, ("Wait",))
        wa, i, t = pieces.encode("Wait")
        assert len(found.single) == 0
        assert ((wa, i), t) in found.several
        assert ((ord(" "), wa, i), t) in found.several

    def test_a_spelling_of_several_tokens_is_banned_at_its_last_piece_only(self):
        tokenizer = ByteTokenizer(["Wa"])
        control = CONTROLS["suppress"](parse("suppress"), Setup(tokenizer, FORMAT))
        control._probability = 1.0
        sequence = Sequence(tokenizer.encode("Q<think>", special=True))
        sequence.phase = Phase.THINK
        row = np.zeros(tokenizer.n_vocab, dtype=np.float32)
        assert ord("t") not in control.adjust(sequence, row).ids
        sequence.tokens += tokenizer.encode("Wai")
        assert ord("t") in control.adjust(sequence, row).ids

    def test_a_forced_wait_resets_the_probability(self):
        tokenizer = ByteTokenizer(["Wait"])
        control = CONTROLS["suppress"](parse("suppress"), Setup(tokenizer, FORMAT))
        control._probability = 1.0
        sequence = Sequence([1])
        sequence.phase = Phase.THINK
        sequence.tokens.append(300)
        sequence.origins.append(Origin.FORCED)
        list(control.observe(sequence, tokenizer.encode("Wait")[0]))
        assert control._probability == 0.0


def search(replies, text, is_thinking=True):
    """Samples that reply differently: sample i follows replies[i]."""
    tokenizer = ByteTokenizer()
    setup = Setup(tokenizer, FORMAT, is_thinking=is_thinking)
    opening = "<think>" if is_thinking else "<think>\n\n</think>\n\n"
    control = CONTROLS["search"](parse(text), setup)
    replies = [tokenizer.encode(reply, special=True) for reply in replies]
    requests = []
    for i, ids in enumerate(replies):
        sequence = Sequence(tokenizer.encode("Q" + opening, special=True), sample=i)
        control.join(sequence)

        def sample(row, sequence=sequence, ids=ids):
            return ids[sequence.n_reply] if sequence.n_reply < len(ids) else tokenizer.END

        requests.append(Request(sequence, PhaseTracker(FORMAT, opening), sample, [control]))
    engine = ScriptedEngine(lambda tokens: 0, tokenizer.n_vocab)
    events = list(decode(engine, tokenizer, requests))
    assert not any(engine.held), "the losers' cache is freed"
    return control, [r.sequence for r in requests], events


class TestSearch:
    def test_the_first_to_finish_wins_and_the_others_stop_in_the_same_step(self):
        control, sequences, _ = search(
            ["aaaaaaaa</think>\\boxed{1}", "aa</think>\\boxed{2}", "aaaa</think>\\boxed{3}"], "search:n=3"
        )
        assert control.winner() is sequences[1]
        assert [s.finish for s in sequences] == ["lost", "end", "lost"]
        assert len(sequences[0].tokens) == len(sequences[1].tokens), "nothing was evaluated after the winner's end"
        assert control.counters["lost"] == 2

    def test_of_two_that_end_in_one_step_the_shorter_thinking_wins_then_the_lower_number(self):
        control, sequences, _ = search(["aaa</think>\\boxed{1}", "a</think>\\boxed{1}  "], "search:n=2")
        assert control.winner() is sequences[1]
        control, sequences, _ = search(["a</think>\\boxed{1}", "a</think>\\boxed{2}"], "search:n=2")
        assert control.winner() is sequences[0]

    @pytest.mark.parametrize("bad", ["a", "a</think>", "a</think>no answer here"])
    def test_the_guard_lets_no_unclosed_empty_or_answerless_sample_win(self, bad):
        good = "aaaaaaaaaaaaaaaaaaaaaaaaaaaa</think>\\boxed{2}"
        control, sequences, _ = search([bad, good], "search:n=2")
        assert control.winner() is sequences[1]
        assert control.counters["guarded"] == 1
        control, sequences, _ = search([bad, good], "search:n=2,guard=no")
        assert control.winner() is sequences[0]

    def test_a_guarded_sample_counts_if_nothing_else_finishes(self):
        control, sequences, _ = search(["a</think>no", "aa</think>no"], "search:n=2")
        assert control.winner() is sequences[0]

    def test_short_m_stops_the_rest_when_m_have_finished_thinking_and_lets_those_answer(self):
        replies = [
            "a</think>a long way to say \\boxed{5}",
            "aa</think>\\boxed{5}",
            "aaa</think>\\boxed{6}",
            "a" * 60 + "</think>\\boxed{6}",
        ]
        control, sequences, _ = search(replies, "search:n=4,rule=short,m=3")
        assert [s.finish for s in sequences] == ["end", "end", "end", "lost"]
        assert len(sequences[3].tokens) < 12
        assert control.winner() is sequences[0]

    def test_majority_stops_once_the_outcome_is_decided_and_not_before(self):
        late = "a" * 60 + "</think>\\boxed{9}"
        control, sequences, _ = search(
            ["a</think>\\boxed{5}", "aa</think>\\boxed{5.0}", late], "search:n=3,rule=majority"
        )
        assert [s.finish for s in sequences] == ["end", "end", "lost"]
        assert control.winner() is sequences[0]
        control, sequences, _ = search(
            ["a</think>\\boxed{5}", "aa</think>\\boxed{6}", late], "search:n=3,rule=majority"
        )
        assert [s.finish for s in sequences] == ["end", "end", "end"]
        assert control.winner() is sequences[0], "a tie goes to the shortest thinking"

    @pytest.mark.parametrize(
        ("rule", "finishes"),
        [
            ("first", ["end", "lost", "lost", "lost"]),
            ("short,m=2", ["end", "end", "lost", "lost"]),
            ("majority", ["end", "end", "end", "lost"]),
        ],
    )
    def test_without_thinking_a_sample_is_done_once_it_has_answered(self, rule, finishes):
        replies = [f"{'a' * n} \\boxed{{5}}" for n in (1, 4, 9, 60)]
        control, sequences, _ = search(replies, f"search:n=4,rule={rule}", is_thinking=False)
        assert [s.finish for s in sequences] == finishes
        assert control.winner() is sequences[0]
        assert control.counters["guarded"] == 0


class TestTable:
    def test_all_controls_together_keep_the_text(self):
        text = "One, two. three\n\n" * 12
        texts = ["budget", "hint", "suppress:gap=0", "search:n=2"]
        sequences, _, _ = run({"Q<think>": text + "</think>\\boxed{7}", "\\boxed{": "7}"}, texts[:3], invisible=HINT)
        assert sequences[0].thinking == text
        assert sequences[0].answer == "\\boxed{7}"

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["nope"], "no control 'nope'"),
            (["budget:foo=1"], "no parameter 'foo'"),
            (["budget:max=-1"], "max is -1"),
            (["budget:max=many"], "give a whole number"),
            (["budget:max"], "parameter=value"),
            (["budget:min=10,max=5"], "min is 10"),
            (["suppress:delta=1.5"], "delta is 1.5"),
            (["hint:beta=nan"], "beta is nan"),
            (["suppress:task=poetry"], "choose one of"),
            (["budget", "budget:max=3"], "named twice"),
            (["budget:ignore=1", "suppress"], "insist"),
            (["budget:min=1", "hint"], "insist"),
            (["search:n=2,m=3,rule=short"], "m is 3"),
            (["suppress:words=|"], "at least one word"),
            (["budget:max=5,max=6"], "max is given twice"),
            (["budget:lead=perhaps"], "yes or no"),
        ],
    )
    def test_mistakes_are_named(self, texts, message):
        with pytest.raises(ControlError, match=message):
            combine(None, texts)

    def test_a_text_may_hold_commas(self):
        [budget] = combine(None, ["budget:max=9,wait=Wait, let me check, please,ignore=1"])
        assert (budget.max, budget.wait, budget.ignore) == (9, "Wait, let me check, please", 1)
        with pytest.raises(ControlError, match="no parameter 'ingore'"):
            combine(None, ["budget:wait=Wait, ingore=1"])

    def test_contradictions_pass_when_insisted_upon(self):
        assert [p.control for p in combine(None, ["suppress", "budget:ignore=1"], insist=True)] == [
            "budget",
            "suppress",
        ]

    def test_every_preset_has_a_hard_cap_and_is_free_of_contradiction(self):
        for name in PRESETS:
            chosen = combine(name, [])
            assert chosen[0].control == "budget"
            assert chosen[0].max > 0

    def test_a_named_control_changes_only_the_named_parameters_of_a_preset(self):
        [budget] = combine("careful", ["budget:max=100"])
        assert (budget.max, budget.ignore) == (100, 1)
        assert describe(budget)["control"] == "budget"
