"""Importance matrices: sums as numpy makes them, both file forms, traces and texts, and what is refused."""

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from localreason.cli.main import ExitCode, main
from localreason.quant.collect import CHUNK_TOKENS, collect
from localreason.quant.gguf import ModelFile
from localreason.quant.imatrix import Entry, Importance, read_importance, write_importance
from localreason.quant.traces import Trace, read_documents, trace_encoder
from localreason.runtime.errors import DecodeFailed, InputError
from localreason.runtime.llama import EngineOptions, load_tokenizer
from localreason.runtime.model import Model, Recipe
from localreason.runtime.template import Message
from tests.gguf_models import N_EMBD, write_model

TEXT = "In the beginning there was the word, and then there were 17 * 23 = 391 of them. " * 9


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def normed(rows: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return rows / np.sqrt(np.square(rows).mean(-1, keepdims=True) + 1e-5) * weight


def some(n_columns: int = 4, n_matrices: int = 1) -> Entry:
    sums = np.arange(n_matrices * n_columns, dtype=np.float32).reshape(n_matrices, n_columns)
    return Entry(sums, np.full(n_matrices, 2, np.float32))


def test_the_sums_are_those_of_the_squared_inputs_of_a_layer(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    with tokenizer:
        tokens = tokenizer.encode(TEXT)
    weights = weights_of(tiny_model)
    rows = normed(weights["token_embd.weight"][tokens].astype(np.float64), weights["blk.0.attn_norm.weight"])

    found = collect(tiny_model, [TEXT], "text")

    assert len(tokens) > CHUNK_TOKENS, "more than one chunk"
    assert found.n_tokens == len(tokens)
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = found.entries[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(entry.sums, np.square(rows).sum(0)[None], rtol=1e-4)
        assert entry.counts.tolist() == [len(tokens)]
    matrices = {
        f"blk.{i}.{name}.weight"
        for i in range(2)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }
    assert found.entries.keys() == matrices, "no norms, and not the embedding"
    assert found.entries["blk.1.ffn_down.weight"].counts.tolist() == [len(tokens)], "the last layer sees all rows"


def test_an_output_matrix_of_its_own_is_collected_for_all_rows(tmp_path):
    model = write_model(tmp_path / "m.gguf", extra={"output.weight": (265, N_EMBD)})

    found = collect(model, [TEXT], "text")

    assert found.entries["output.weight"].counts.tolist() == [found.n_tokens]


def test_experts_count_the_tokens_that_reached_them(tmp_path):
    model = write_model(tmp_path / "moe.gguf", "qwen3moe")

    found = collect(model, [TEXT], "text").entries

    router = found["blk.0.ffn_gate_inp.weight"]
    for name in ("ffn_gate_exps", "ffn_up_exps"):
        entry = found[f"blk.0.{name}.weight"]
        assert entry.sums.shape == (4, N_EMBD)
        assert entry.counts.sum() == 2 * router.counts[0], "two experts a token"
        np.testing.assert_allclose(entry.sums.sum(0), 2 * router.sums[0], rtol=1e-4)
    assert found["blk.0.ffn_down_exps.weight"].sums.shape == (4, 96)


def test_an_expert_that_all_tokens_reach_sees_what_the_router_sees(tmp_path):
    model = write_model(tmp_path / "moe.gguf", "qwen3moe", values={"qwen3moe.expert_used_count": 4})

    found = collect(model, [TEXT], "text").entries

    for sums in found["blk.1.ffn_up_exps.weight"].sums:
        np.testing.assert_allclose(sums, found["blk.1.ffn_gate_inp.weight"].sums[0], rtol=1e-4)


def test_down_projections_of_experts_see_their_own_rows(tmp_path):
    """Both experts' rows are computed here from the first layer's input of a token that attends to itself only."""
    model = write_model(tmp_path / "moe.gguf", "qwen3moe", n_layers=1, values={"qwen3moe.expert_used_count": 4})
    weights = {name: value.astype(np.float64) for name, value in weights_of(model).items()}
    row = weights["token_embd.weight"][65]
    values = weights["blk.0.attn_v.weight"] @ normed(row, weights["blk.0.attn_norm.weight"])
    row = row + weights["blk.0.attn_output.weight"] @ np.tile(values, 2)
    row = normed(row, weights["blk.0.ffn_norm.weight"])
    gate, up = (weights[f"blk.0.ffn_{name}_exps.weight"] @ row for name in ("gate", "up"))
    wanted = np.square(gate / (1 + np.exp(-gate)) * up)

    with load_tokenizer(model) as tokenizer:
        text = tokenizer.piece(65).decode()
    found = collect(model, [text], "text").entries["blk.0.ffn_down_exps.weight"]

    assert found.counts.tolist() == [1, 1, 1, 1]
    np.testing.assert_allclose(found.sums, wanted, rtol=2e-2, atol=2e-3)  # the cache is f16


def test_tokens_are_limited_exactly_and_told(tiny_model):
    told = []

    found = collect(tiny_model, [TEXT, TEXT], "text", 600, report=told.append)

    assert found.n_tokens == 600
    assert found.n_chunks == 2
    assert told[-1] == 600
    assert told == sorted(told)


def test_a_trace_is_read_with_its_prompt_and_the_marks_of_its_thinking(tiny_model):
    def n_tokens(*documents: Trace) -> int:
        return collect(tiny_model, documents, "rows").n_tokens or 0

    with load_tokenizer(tiny_model) as tokenizer:
        plain = tokenizer.encode("<think>\nI add.\n</think>\n\nIt is 4.", special=True)
    alone = n_tokens(Trace("", "I add.", "It is 4."))
    assert alone == len(plain)
    assert n_tokens(Trace("What is 2 + 2?", "I add.", "It is 4.")) > alone + 20, "the chat template and the question"
    assert n_tokens(Trace("", "", "It is 4.")) == len("It is 4.")


@pytest.mark.parametrize(("is_thinking", "format"), [(True, None), (False, None), (True, "deepseek")])
def test_a_trace_is_what_the_model_saw_with_its_recipe(tiny_model, is_thinking, format):
    recipe = Recipe(is_thinking=is_thinking, format=format)
    with Model.open(tiny_model, EngineOptions(n_context=512)) as model:
        encode_trace = trace_encoder(model.tokenizer)
        trace = Trace("What is 2 + 2?", "I add." * is_thinking, "It is 4.", is_thinking, format)
        prompt = model.chat_prompt([Message("user", trace.problem)], recipe).tokens
        reply = model.tokenizer.encode("I add.\n</think>\n\n" * is_thinking + "It is 4.", special=True)
        encoded = encode_trace(trace)
        # The open tag is in the prompt where a model is led to think; a format of its own leaves it to the model.
        start = [] if format is None else model.tokenizer.encode("<think>\n", special=True)
    assert encoded == prompt[len(model.tokenizer.prefix) :] + start + reply


def test_the_examples_that_lead_a_model_to_think_are_there_once(tiny_model):
    with load_tokenizer(tiny_model) as tokenizer:
        encode_trace = trace_encoder(tokenizer)
        first, second = (encode_trace(Trace(problem, "I add.", "It is 4.")) for problem in ("2 + 2?", "3 + 1?"))
        expected = "<|im_start|>user\n3 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\nI add.\n</think>\n\nIt is 4."
        assert second == tokenizer.encode(expected, special=True)
        assert len(first) > len(second) + 300


def test_ctrl_c_leaves_the_matrix_of_what_was_read(tiny_model):
    def interrupt(n_tokens: int) -> None:
        if n_tokens >= 200:
            raise KeyboardInterrupt

    found = collect(tiny_model, [TEXT], "text", report=interrupt)
    whole = collect(tiny_model, [TEXT], "text", found.n_tokens)
    assert (found.n_tokens, found.is_whole, whole.is_whole) == (256, False, True)
    for name, entry in whole.entries.items():
        assert found.entries[name].sums.tolist() == entry.sums.tolist()
        assert found.entries[name].counts.tolist() == entry.counts.tolist()


def test_ctrl_c_before_anything_was_read_leaves_nothing(tiny_model):
    def interrupted():
        raise KeyboardInterrupt
        yield ""

    with pytest.raises(KeyboardInterrupt):
        collect(tiny_model, interrupted(), "text")


def test_activations_that_are_not_finite_are_an_error(tmp_path):
    model = write_model(tmp_path / "m.gguf")
    norm = ModelFile(model).tensors["blk.1.ffn_norm.weight"]
    with model.open("r+b") as file:
        file.seek(norm.offset)
        file.write(struct.pack("<f", float("inf")))

    with pytest.raises(DecodeFailed, match="not finite"):
        collect(model, [TEXT], "text")


def test_the_file_reads_back_as_it_was_written(tmp_path):
    entries = {"blk.0.a.weight": some(), "blk.1.b_exps.weight": some(6, 3)}

    write_importance(Importance(entries, 7, 512, "rows.jsonl"), tmp_path / "m.gguf")
    found = read_importance(tmp_path / "m.gguf")

    assert (found.n_chunks, found.chunk_tokens) == (7, 512)
    assert found.entries.keys() == entries.keys()
    for name, entry in entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums)
        assert np.array_equal(found.entries[name].counts, entry.counts)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["rows.jsonl"]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.b_exps.weight.in_sum2"] == [6, 3]
    assert shapes["blk.1.b_exps.weight.counts"] == [1, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_weights_are_means_and_one_where_no_token_came():
    entry = Entry(np.asarray([[2, 4], [0, 0]], np.float32), np.asarray([2, 0], np.float32))
    importance = Importance({"a": entry}, 1, 512)

    assert importance.weights()["a"].tolist() == [1, 2, 1, 1]
    assert importance.reached_share == 0.5


def legacy(*entries: tuple[bytes, int, list[float]], tail: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, n_calls, values in entries:
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + tail


def test_the_older_form_is_read(tmp_path):
    tail = struct.pack("<ii", 12, 8) + b"wiki.txt"
    (tmp_path / "m.dat").write_bytes(legacy((b"blk.0.a.weight", 4, [4, 8, 0]), (b"b", 0, [3, 5]), tail=tail))

    found = read_importance(tmp_path / "m.dat")

    assert found.weights()["blk.0.a.weight"].tolist() == [1, 2, 0]
    assert found.weights()["b"].tolist() == [3, 5]
    assert (found.n_chunks, found.dataset) == (12, "wiki.txt")


def test_files_that_are_no_importance_matrix_are_refused(tmp_path, tiny_model):
    write_importance(Importance({"a": some(64)}, 1, 512), tmp_path / "good.gguf")
    good = (tmp_path / "good.gguf").read_bytes()
    old = legacy((b"a", 1, [1, 2]), (b"b", 1, [1, 2]))
    files = {
        "model": tiny_model.read_bytes(),
        "half.gguf": good[: len(good) // 2],
        "cut.gguf": good[:-200],
        "names.gguf": good.replace(b"a.counts", b"b.counts"),
        "nan.gguf": good.replace(struct.pack("<f", 7), struct.pack("<f", float("nan"))),
        "empty": b"",
        "text": b"What is 17 * 23? It is 391.",
        "none.dat": legacy(),
        "cut.dat": old[:-3],
        "minus.dat": legacy((b"a", 1, [-1])),
        "inf.dat": legacy((b"a", 1, [float("inf")])),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            read_importance(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="missing"):
        read_importance(tmp_path / "missing")


def test_documents_are_rows_or_text(tmp_path):
    rows = [{"thinking": "hm", "text": "4", "error": None}, {"thinking": "", "text": "", "error": "lost"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("x" * 100_000)

    assert read_documents(tmp_path / "rows.jsonl") == [Trace("", "hm", "4")]
    assert "".join(map(str, read_documents(tmp_path / "text.txt"))) == "x" * 100_000
    for name, data in (("bad.jsonl", b"{]"), ("empty.txt", b" "), ("latin.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            read_documents(tmp_path / name)


def test_the_command_makes_a_matrix_that_convert_takes(tiny_model, tmp_path, capsys):
    rows = [{"thinking": "I add two and two.", "text": f"It is {i}."} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    matrix, made = tmp_path / "m.gguf", tmp_path / "new.gguf"
    line = ["quant", "imatrix", str(tiny_model), "-o", str(matrix), "--from", str(tmp_path / "rows.jsonl")]

    assert main([*line, "--json"]) == ExitCode.OK
    printed = capsys.readouterr()
    row = json.loads(printed.out)
    assert f"localreason: {row['chunks']} chunk" in printed.err
    assert "few for an importance matrix" in printed.err
    assert row["entries"] == 14
    assert row["tokens"] > 100
    assert main(line) == ExitCode.OUTPUT
    assert main([*line, "--force", "--tokens", "50"]) == ExitCode.OK
    assert main(["quant", "convert", str(tiny_model), str(made), "--scheme", "iq4_nl", "--imatrix", str(matrix)]) == 0
    assert ModelFile(made).header.values["quantize.imatrix.entries_count"] == 14


def test_the_command_refuses_to_write_over_what_it_reads(tiny_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    assert main(["quant", "imatrix", str(tiny_model), "-o", str(text), "--from", str(text), "--force"]) == 5
    assert "is what is read" in capsys.readouterr().err
    assert text.read_text() == TEXT
