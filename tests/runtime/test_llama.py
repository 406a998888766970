"""The engine over real, tiny GGUF files: exact logits, and a refusal where llama.cpp would end the process."""

import ctypes
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from localreason.runtime import native, room
from localreason.runtime.cache import Cache
from localreason.runtime.engine import Span
from localreason.runtime.errors import (
    ContextFull,
    DecodeFailed,
    EngineError,
    InputError,
    ModelUnsupported,
    OutOfMemory,
    StateError,
)
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, load, load_tokenizer
from localreason.runtime.prompt import encode
from localreason.runtime.template import Part
from tests.gguf_models import MARKS, TEMPLATE, write_model

OPTIONS = EngineOptions(n_context=256, n_sequences=4, n_threads=1)
PROMPT = [256, 72, 101, 108, 108, 111, 258, 9]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def engine(request, tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", request.param)
    with load(path, OPTIONS)[0] as engine:
        yield engine


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("models") / "mamba.gguf", "mamba")
    with load(path, OPTIONS)[0] as engine:
        yield engine


@pytest.fixture(autouse=True)
def _empty(request):
    """Every test begins with empty sequences."""
    for name in {"engine", "recurrent"} & set(request.fixturenames):
        clear(request.getfixturevalue(name))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with load_tokenizer(write_model(tmp_path_factory.mktemp("models") / "vocabulary.gguf")) as tokenizer:
        yield tokenizer


def clear(engine):
    for sequence in range(engine.n_sequences):
        engine.rewind(sequence, 0)


def one(engine, sequence, position, tokens, n_logits=1):
    return engine.decode([Span(sequence, position, tokens, n_logits)]).copy()


class TestExactness:
    def test_a_fork_gives_the_logits_of_a_prefill_of_its_own(self, engine):
        expected = one(engine, 0, 0, PROMPT), one(engine, 0, 8, [3]), one(engine, 0, 9, [4])
        clear(engine)
        first = one(engine, 0, 0, PROMPT)
        engine.fork(0, 1, len(PROMPT))
        engine.rewind(0, 0)
        found = first, one(engine, 1, 8, [3]), one(engine, 1, 9, [4])
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))

    def test_a_fork_of_a_part_leaves_both_to_go_their_own_ways(self, engine):
        one(engine, 0, 0, PROMPT[:5])
        expected = one(engine, 0, 5, [33])
        clear(engine)
        one(engine, 0, 0, PROMPT[:5])
        one(engine, 0, 5, PROMPT[5:])
        engine.fork(0, 2, 5)
        assert np.array_equal(one(engine, 2, 5, [33]), expected)
        one(engine, 0, 8, [1])

    def test_a_rewound_sequence_gives_the_same_logits_again(self, engine):
        one(engine, 0, 0, PROMPT)
        expected = one(engine, 0, 8, [3])
        one(engine, 0, 9, [4, 5, 6])
        engine.rewind(0, 8)
        assert np.array_equal(one(engine, 0, 8, [3]), expected)

    def test_several_rows_come_in_the_order_of_the_batch(self, engine):
        expected = {}
        for sequence, tokens in ((2, PROMPT), (0, PROMPT[::-1])):
            expected[sequence] = one(engine, sequence, 0, tokens, 3)
        clear(engine)
        rows = engine.decode([Span(2, 0, PROMPT, 3), Span(1, 0, [7], 0), Span(0, 0, PROMPT[::-1], 3)])
        assert rows.shape == (6, engine.n_vocab)
        assert np.allclose(rows[:3], expected[2], atol=1e-4)
        assert np.allclose(rows[3:], expected[0], atol=1e-4)

    def test_rows_are_a_view_and_none_are_an_empty_array(self, engine):
        assert not engine.decode([Span(0, 0, PROMPT)]).flags.owndata
        assert engine.decode([Span(0, 8, [1], 0)]).shape == (0, engine.n_vocab)

    def test_a_prompt_in_pieces_gives_the_same_tokens(self, engine):
        whole = one(engine, 0, 0, PROMPT)
        one(engine, 1, 0, PROMPT[:3], 0)
        assert np.allclose(one(engine, 1, 3, PROMPT[3:]), whole, atol=1e-4)

    def test_a_restored_sequence_gives_the_same_logits(self, engine, tmp_path):
        one(engine, 0, 0, PROMPT)
        engine.save(0, PROMPT, tmp_path / "state")
        expected = one(engine, 0, 8, [3])
        clear(engine)
        assert engine.restore(3, tmp_path / "state") == PROMPT
        assert np.array_equal(one(engine, 3, 8, [3]), expected)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]


class TestRecurrent:
    def test_a_fork_of_all_and_a_state_are_exact(self, recurrent, tmp_path):
        assert not recurrent.can_rewind
        one(recurrent, 0, 0, PROMPT)
        recurrent.fork(0, 1, len(PROMPT))
        recurrent.save(0, PROMPT, tmp_path / "state")
        expected = one(recurrent, 0, 8, [3])
        assert np.array_equal(one(recurrent, 1, 8, [3]), expected)
        clear(recurrent)
        recurrent.restore(2, tmp_path / "state")
        assert np.array_equal(one(recurrent, 2, 8, [3]), expected)

    def test_rows_come_in_the_order_of_the_batch(self, recurrent):
        expected = one(recurrent, 0, 0, PROMPT, 2), one(recurrent, 1, 0, PROMPT[:3], 1)
        clear(recurrent)
        rows = recurrent.decode([Span(2, 0, PROMPT[:3], 1), Span(0, 0, PROMPT, 2)])
        assert np.allclose(rows[0], expected[1], atol=1e-4)
        assert np.allclose(rows[1:], expected[0], atol=1e-4)

    def test_a_part_can_neither_be_kept_nor_shared(self, recurrent):
        one(recurrent, 0, 0, PROMPT)
        with pytest.raises(DecodeFailed, match="cannot keep 3 of 8"):
            recurrent.rewind(0, 3)
        with pytest.raises(DecodeFailed, match="cannot share 3 of 8"):
            recurrent.fork(0, 1, 3)
        recurrent.rewind(0, 8)
        one(recurrent, 0, 8, [1])


class TestRoom:
    def test_a_full_cache_is_unchanged_and_dropping_frees_it(self, engine):
        for sequence in range(2):
            for position in range(0, 120, 60):
                one(engine, sequence, position, [5] * 60)
        with pytest.raises(ContextFull, match="no room for 17 more tokens in a cache of 256"):
            engine.decode([Span(0, 120, [6] * 17)])
        full = one(engine, 0, 120, [6] * 16)
        engine.rewind(0, 120)
        assert np.array_equal(one(engine, 0, 120, [6] * 16), full), "the failed call changed nothing"
        with pytest.raises(ContextFull):
            engine.decode([Span(1, 120, [6])])
        engine.rewind(0, 0)
        one(engine, 1, 120, [6])
        one(engine, 0, 0, [5] * 60)

    def test_a_shared_prefix_takes_its_cells_once(self, engine):
        for position in range(0, 240, 120):
            one(engine, 0, position, [5] * 120)
        for target in (1, 2, 3):
            engine.fork(0, target, 240)
        engine.decode([Span(sequence, 240, [sequence] * 4) for sequence in range(4)])
        with pytest.raises(ContextFull):
            one(engine, 0, 244, [1])

    def test_a_context_that_cannot_be_had_names_bytes_and_remedy(self, tiny_model):
        with pytest.raises(OutOfMemory, match=r"\d{10,} bytes and \d+ are free; give a smaller context"):
            load(write_model(tiny_model.with_name("deep.gguf"), n_layers=40), EngineOptions(n_context=1 << 24))

    def test_the_default_context_serves_each_sequence_at_full_length(self, tiny_model):
        with load(tiny_model, EngineOptions(n_sequences=2))[0] as engine:
            assert (engine.n_context, engine.n_context_sequence, engine.n_context_train) == (1024, 512, 512)
            assert engine.memory.cache_bytes == 1024 * 2 * 2 * 32 * 2

    def test_heads_of_each_layer_are_counted(self):
        header = {
            "general.architecture": "x",
            "x.block_count": 2,
            "x.embedding_length": 64,
            "x.attention.head_count": [4, 4],
            "x.attention.head_count_kv": [1, 3],
            "x.attention.key_length": 32,
        }
        assert room.cell_bytes(header, "f16") == (1 + 3) * (32 + 16) * 2
        assert room.cell_bytes(header, "q8_0") == (1 + 3) * (32 + 16) * 34 / 32

    @pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
    def test_quantised_caches_are_close(self, engine, cache_type):
        expected = one(engine, 0, 0, PROMPT)
        with load(engine.path, EngineOptions(n_context=256, n_threads=1, cache_type=cache_type))[0] as other:
            found = one(other, 0, 0, PROMPT)
        assert not np.array_equal(found, expected)
        assert np.allclose(found, expected, atol=1.0)

    def test_a_cache_type_that_the_heads_do_not_allow_is_refused(self, tmp_path):
        values = {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 4, "llama.rope.dimension_count": 8}
        path = write_model(tmp_path / "narrow.gguf", values=values)
        with pytest.raises(ModelUnsupported, match=r"q8_0 cache.*does not divide.*try f16"):
            load(path, EngineOptions(n_context=256, cache_type="q8_0"))


class TestRefusals:
    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            ([], "batch of 0 tokens"),
            ([Span(0, 0, [])], "empty"),
            ([Span(0, 0, [1] * 129)], "batch of 129 tokens .* holds 1 to 128"),
            ([Span(0, 0, [1] * 100), Span(1, 0, [1] * 100)], "batch of 200"),
            ([Span(4, 0, [1])], "no sequence 4; the cache has 0 to 3"),
            ([Span(-1, 0, [1])], "no sequence -1"),
            ([Span(0, 1, [1])], "position 1 does not continue"),
            ([Span(0, -1, [1])], "position -1"),
            ([Span(0, 0, [265])], "not within the vocabulary of 265"),
            ([Span(0, 0, [-1])], "token ids -1 to -1"),
            ([Span(0, 0, [1 << 40])], "token ids"),
            ([Span(0, 0, [1], 2)], "2 rows of logits"),
            ([Span(0, 0, [1], -1)], "-1 rows"),
            ([Span(0, 0, [1]), Span(0, 0, [2])], "two spans"),
        ],
    )
    def test_a_batch_that_llama_cpp_would_not_survive(self, engine, batch, message):
        with pytest.raises(DecodeFailed, match=message):
            engine.decode(batch)
        one(engine, 0, 0, PROMPT)

    @pytest.mark.parametrize("call", [(0, 0, 3), (0, 1, 9), (0, 1, -1), (0, 2, 3), (0, 4, 3), (9, 1, 0)])
    def test_a_fork_that_makes_no_sense(self, engine, call):
        one(engine, 0, 0, PROMPT)
        one(engine, 2, 0, [1])
        with pytest.raises(DecodeFailed):
            engine.fork(*call)

    @pytest.mark.parametrize("call", [(0, 9), (0, -1), (4, 0), (-1, 0)])
    def test_a_rewind_that_makes_no_sense(self, engine, call):
        one(engine, 0, 0, PROMPT)
        with pytest.raises(DecodeFailed):
            engine.rewind(*call)

    @pytest.mark.parametrize(
        "values",
        [
            {"n_context": 1},
            {"n_sequences": 257},
            {"n_threads": 0},
            {"cache_type": "f8"},
            {"n_batch": 0},
            {"n_gpu_layers": -1},
        ],
    )
    def test_options_out_of_range(self, values):
        with pytest.raises(InputError, match="; give"):
            EngineOptions(**values)

    def test_a_small_context_still_takes_whole_batches(self, tiny_model):
        with load(tiny_model, EngineOptions(n_context=16, n_threads=1))[0] as engine:
            assert (engine.n_context, engine.n_batch) == (256, 128)
            one(engine, 0, 0, [1] * 128)

    def test_closing_twice_is_quiet_and_use_after_it_an_error(self, tiny_model):
        engine, tokenizer = load(tiny_model, OPTIONS)
        engine.close()
        engine.close()
        tokenizer.close()
        for call in (
            lambda: engine.decode([Span(0, 0, [1])]),
            lambda: engine.rewind(0, 0),
            lambda: engine.context,
            lambda: tokenizer.encode("a"),
            lambda: tokenizer.piece(7),
        ):
            with pytest.raises(EngineError, match="closed"):
                call()


class TestStates:
    @pytest.fixture
    def state(self, engine, tmp_path):
        one(engine, 0, 0, PROMPT)
        engine.save(0, PROMPT, tmp_path / "state")
        return tmp_path / "state"

    def test_every_truncation_and_every_changed_part_is_refused(self, engine, state):
        data = state.read_bytes()
        for n in [*range(0, 120, 7), len(data) // 2, len(data) - 1]:
            state.write_bytes(data[:n])
            with pytest.raises(StateError):
                engine.restore(1, state)
        for i in [*range(0, 120, 5), len(data) // 2, len(data) - 1]:
            state.write_bytes(data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :])
            with pytest.raises(StateError):
                engine.restore(1, state)
        state.write_bytes(data)
        assert engine.restore(1, state) == PROMPT

    def test_the_state_of_another_model_is_refused(self, engine, state, tmp_path):
        path = write_model(tmp_path / "other.gguf", engine.architecture, seed=1)
        with load(path, OPTIONS)[0] as other, pytest.raises(StateError, match="another model"):
            other.restore(0, state)

    def test_a_state_of_another_cache_type_is_refused(self, engine, state):
        with load(engine.path, EngineOptions(n_context=256, n_threads=1, cache_type="q8_0"))[0] as other:
            with pytest.raises(StateError, match="does not fit this cache of 256 q8_0"):
                other.restore(0, state)
            one(other, 0, 0, PROMPT)

    def test_a_state_that_finds_no_room_leaves_the_sequence_empty(self, engine, state):
        for position in range(8, 248, 120):
            one(engine, 0, position, [5] * 120)
        one(engine, 1, 0, [5] * 4)
        with pytest.raises(StateError, match="drop other sequences"):
            engine.restore(2, state)
        one(engine, 2, 0, [5])

    def test_wrong_targets_and_places_are_refused(self, engine, state, tmp_path):
        with pytest.raises(StateError, match="drop it first"):
            engine.restore(0, state)
        with pytest.raises(StateError, match="cannot be read"):
            engine.restore(1, tmp_path / "none")
        with pytest.raises(StateError, match="cannot be read"):
            engine.restore(1, tmp_path)
        with pytest.raises(StateError, match="cannot be written"):
            engine.save(0, PROMPT, tmp_path / "no" / "state")
        with pytest.raises(StateError, match="8; give what it holds"):
            engine.save(0, PROMPT[1:], tmp_path / "state")


class TestTokenizer:
    def test_text_comes_back_from_its_pieces(self, tokenizer):
        text = "the thing in a naïve 漢字 \x00 <think>"
        for special in (False, True):
            assert b"".join(map(tokenizer.piece, tokenizer.encode(text, special))).decode() == text

    def test_threads_that_ask_at_once_get_the_pieces_that_one_gets(self, tmp_path):
        model = write_model(tmp_path / "vocabulary.gguf")
        with load_tokenizer(model) as alone:
            pieces = [alone.piece(token) for token in range(alone.n_vocab)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(20):
                with load_tokenizer(model) as shared, ThreadPoolExecutor(2) as pool:
                    forwards = pool.submit(lambda: [shared.piece(t) for t in range(shared.n_vocab)])
                    backwards = pool.submit(lambda: [shared.piece(t) for t in reversed(range(shared.n_vocab))])
                    assert forwards.result() == backwards.result()[::-1] == pieces
        finally:
            sys.setswitchinterval(before)

    def test_control_text_is_a_token_only_where_asked_for(self, tokenizer):
        assert tokenizer.encode("<|im_start|>", special=True) == [256]
        assert len(tokenizer.encode("<|im_start|>")) == 12

    def test_halves_of_surrogate_pairs_do_not_crash(self, tokenizer):
        assert tokenizer.encode("a\ud800b\udfff") == tokenizer.encode("a?b?")
        assert tokenizer.encode("") == []

    def test_marks_ends_and_prefix(self, tokenizer, tmp_path):
        assert tokenizer.control_texts == frozenset(MARKS)
        assert [token for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)] == [257]
        assert tokenizer.prefix == []
        with load_tokenizer(write_model(tmp_path / "bos.gguf", values={"tokenizer.ggml.add_bos_token": True})) as other:
            assert other.prefix == [256]
            assert other.template_tokens == {"bos_token": MARKS[0], "eos_token": MARKS[1]}

    def test_a_token_outside_the_vocabulary_is_refused(self, tokenizer):
        with pytest.raises((EngineError, IndexError)):
            tokenizer.piece(tokenizer.n_vocab)

    def test_the_template_and_the_metadata_are_read(self, tokenizer):
        assert tokenizer.chat_template == TEMPLATE
        assert tokenizer.metadata["general.name"] == "tiny"
        assert tokenizer.metadata["tokenizer.chat_template"] == TEMPLATE


def test_a_text_behind_another_has_no_space_before_it_on_a_vocabulary_of_sentencepiece(tmp_path):
    words = ["\u2581", "a", "\u2581a", "b", "c"]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokens = [*words, "<unk>", *byte_tokens, "<s>", "</s>", "<pad>"]
    kinds = [gguf.TokenType.NORMAL] * 5 + [gguf.TokenType.UNKNOWN] + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.CONTROL] * 3
    path = write_model(
        tmp_path / "m.gguf",
        values={
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
            "tokenizer.ggml.scores": [-1.0, -2.0, -3.0, -4.0, -5.0] + [0.0] * 260,
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.unknown_token_id": 5,
            "tokenizer.ggml.bos_token_id": 262,
            "tokenizer.ggml.eos_token_id": 263,
            "tokenizer.ggml.add_space_prefix": True,
        },
    )
    with load_tokenizer(path) as tokenizer:

        def pieces(text, **options):
            return [tokenizer.piece(token) for token in tokenizer.encode(text, **options)]

        assert pieces("a", is_first=True) == [b" a"]
        assert pieces("a") == [b"a"]
        assert pieces(" a") == [b" a"]
        assert b"".join(pieces("\n\na.")) == b"\n\na."
        assert pieces("") == []

        def prompt(*parts, behind=None):
            ids = encode([Part(text, is_trusted) for text, is_trusted in parts], tokenizer, FORMATS["none"], behind)
            return b"".join(tokenizer.piece(token) for token in ids)

        # A message with special text in it is tokenised by itself, and has the same space in front.
        assert prompt(("<pad>", True), ("a", False), ("<pad>b", True)) == b"<pad> a<pad> b"
        assert prompt(("<pad>", True), ("a<pad>", False), ("<pad>b", True)) == b"<pad> a<pad><pad> b"
        assert prompt(("a", False), behind="Q:") == b"a"
        assert prompt(("a", False), behind="Q:<pad>") == b" a"


def test_a_context_that_cannot_be_warmed_is_freed(tmp_path, monkeypatch):
    closed, close = [], Cache.close

    def fail(cache, slot):
        raise OutOfMemory("the first graph does not fit")

    monkeypatch.setattr(Cache, "warm", fail)
    monkeypatch.setattr(Cache, "close", lambda cache: (closed.append(cache), close(cache)))
    with pytest.raises(OutOfMemory):
        load(write_model(tmp_path / "m.gguf"), EngineOptions(256, 1, 1))
    assert closed


def test_a_program_that_ignores_ctrl_c_goes_on_loading(tmp_path, monkeypatch):
    path, lib = write_model(tmp_path / "m.gguf"), native.library()
    load_model, before = lib.llama_model_load_from_file, signal.signal(signal.SIGINT, signal.SIG_IGN)

    def loading(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return load_model(*arguments)

    monkeypatch.setattr(lib, "llama_model_load_from_file", loading)
    try:
        load(path, EngineOptions(256, 1, 1))[0].close()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_llama_cpp_calls_back_ends_the_loading(tmp_path, monkeypatch):
    path, lib = write_model(tmp_path / "m.gguf"), native.library()
    load_model = lib.llama_model_load_from_file
    press = ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGINT))  # what is raised in there is lost

    def loading(*arguments):
        press()
        return load_model(*arguments)

    monkeypatch.setattr(lib, "llama_model_load_from_file", loading)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            load(path, EngineOptions(256, 1, 1))
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    with load(path, EngineOptions(256, 1, 1))[0] as engine:
        assert engine.decode([Span(0, 0, [1], 1)]).shape == (1, engine.n_vocab)


def test_what_a_sliding_window_has_left_behind_is_not_taken_to_be_there_still(tmp_path):
    text = [40 + 7 * i % 31 for i in range(230)]
    for name, is_whole in (("gemma3", False), ("qwen2", True)):
        path = write_model(tmp_path / f"{name}.gguf", name, 3, 13)
        with load(path, EngineOptions(256, 3, 1, n_batch=64))[0] as engine:

            def write(sequence, first, end, engine=engine):
                for start in range(first, end, 20):
                    part = text[start : min(start + 20, end)]
                    row = np.array(engine.decode([Span(sequence, start, part)]))
                return row

            write(0, 0, 60)
            write(1, 0, 100)
            engine.rewind(0, 0)
            write(1, 100, 210)  # fills what became free, then goes on over cells of its own
            n_shared = engine.fork(1, 2, 60)
            assert n_shared == (60 if is_whole else 0)
            assert engine.rewind(1, 100) == 100, "the window behind it is all there"
            n_kept = engine.rewind(1, 60)
            assert n_kept == (60 if is_whole else 0)
            again = write(1, n_kept, 130)
            engine.rewind(2, 0)
            engine.rewind(1, 0)
            # Kept cells lie elsewhere, which moves last bits; what is evaluated anew has to be the same.
            assert is_whole or np.array_equal(again, write(1, 0, 130))
