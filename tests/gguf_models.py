"""Tiny GGUF models with random weights, the same for the same seed: real files for exactness and failure tests."""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from localreason.runtime.header import read_table
from localreason.runtime.schemes import FTYPES, SCHEMES

MARKS = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "i n"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CONTEXT = 64, 2, 1, 96, 512


def byte_characters() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0..255."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i) if i in plain else chr(next(others)) for i in range(256)]


def write_model(
    path: Path,
    architecture: str = "llama",
    seed: int = 0,
    n_layers: int = 2,
    values: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: dict[str, tuple[int, ...]] | None = None,
    n_part_tensors: int = 0,
    types: dict[str, Any] | None = None,
) -> Path:
    """Write a model of "llama", "qwen2", "qwen3", "qwen3moe", "gemma3" or "mamba". `values` replaces or adds metadata
    (None takes a key out), by full key; `without` names tensors to leave out, `extra` shapes of those to add, `types`
    numpy types of tensors in place of float32;
    with `n_part_tensors` it is written in parts, and the path is that of the first."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=n_part_tensors)
    _add_vocabulary(writer)
    _add_shape(writer, architecture, n_layers)
    kept = writer.kv_data[0]
    for key, value in (values or {}).items():
        kept.pop(key, None)
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            if kind is gguf.GGUFValueType.INT32:
                kind = gguf.GGUFValueType.UINT32
            writer.add_key_value(key, value, kind)
    random = np.random.default_rng(seed)
    shapes = _tensors(architecture, n_layers, 256 + len(MARKS) + len(MERGES)) | (extra or {})
    for name, shape in shapes.items():
        if name not in without:
            writer.add_tensor(name, _weights(random, name, shape).astype((types or {}).get(name, np.float32)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if n_part_tensors else path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [*byte_characters(), *MARKS, *(merge.replace(" ", "") for merge in MERGES)]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.USER_DEFINED] * 2
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [gguf.TokenType.NORMAL] * len(MERGES))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _add_shape(writer: gguf.GGUFWriter, architecture: str, n_layers: int) -> None:
    writer.add_context_length(N_CONTEXT)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layers)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * N_EMBD)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(4)
    else:
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(N_HEAD)
        writer.add_head_count_kv(N_HEAD_KV)
        writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    if architecture == "gemma3":
        writer.add_sliding_window(24)
        writer.add_rope_freq_base(1e6)
    if architecture in ("gemma3", "qwen3", "qwen3moe"):
        writer.add_key_length(N_EMBD // N_HEAD)
        writer.add_value_length(N_EMBD // N_HEAD)
    if architecture == "qwen3moe":
        writer.add_expert_count(4)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(N_FF)


def _tensors(architecture: str, n_layers: int, n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, rows first."""
    n_kv = N_EMBD // N_HEAD * N_HEAD_KV
    inner = 2 * N_EMBD
    if architecture == "mamba":
        layer = {
            "ssm_in.weight": (2 * inner, N_EMBD),
            "ssm_conv1d.weight": (inner, 4),
            "ssm_conv1d.bias": (inner,),
            "ssm_x.weight": (4 + 2 * 16, inner),
            "ssm_dt.weight": (inner, 4),
            "ssm_dt.bias": (inner,),
            "ssm_a": (inner, 16),
            "ssm_d": (inner,),
            "ssm_out.weight": (N_EMBD, inner),
        }
    else:
        layer = {
            "attn_q.weight": (N_EMBD, N_EMBD),
            "attn_k.weight": (n_kv, N_EMBD),
            "attn_v.weight": (n_kv, N_EMBD),
            "attn_output.weight": (N_EMBD, N_EMBD),
            "ffn_norm.weight": (N_EMBD,),
            "ffn_gate.weight": (N_FF, N_EMBD),
            "ffn_up.weight": (N_FF, N_EMBD),
            "ffn_down.weight": (N_EMBD, N_FF),
        }
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (N_EMBD,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
    if architecture in ("gemma3", "qwen3", "qwen3moe"):
        layer |= {"attn_q_norm.weight": (N_EMBD // N_HEAD,), "attn_k_norm.weight": (N_EMBD // N_HEAD,)}
    if architecture == "gemma3":
        layer |= {"post_attention_norm.weight": (N_EMBD,), "post_ffw_norm.weight": (N_EMBD,)}
    if architecture == "qwen3moe":
        dense = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
        layer = {name: shape for name, shape in layer.items() if name not in dense}
        layer |= {"ffn_gate_inp.weight": (4, N_EMBD), "ffn_down_exps.weight": (4, N_EMBD, N_FF)}
        layer |= {"ffn_gate_exps.weight": (4, N_FF, N_EMBD), "ffn_up_exps.weight": (4, N_FF, N_EMBD)}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, N_EMBD), "output_norm.weight": (N_EMBD,)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {"attn_norm.weight": (N_EMBD,), **layer}.items()}
    return shapes


def _weights(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("norm.weight"):
        # Not ones: a norm that is forgotten or taken for another must show.
        return 1 + np.random.default_rng(len(name)).standard_normal(shape, np.float32) * np.float32(0.1)
    if name.startswith("rope_"):
        return np.linspace(1, 4, shape[0], dtype=np.float32)
    if name.endswith("ssm_a"):
        return -np.exp(random.standard_normal(shape, np.float32) * 0.1)
    return random.standard_normal(shape, np.float32) * np.float32(1.5 / np.sqrt(shape[-1]))


def write_large(
    path: Path, scheme: str, n_layers: int = 4, n_embd: int = 4096, n_tokens: int = 0, **values: Any
) -> Path:
    """A llama of one type of matrices whose weights are a hole in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32768)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layers)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(values.pop("file_type", FTYPES.get(scheme, 0)))
    if n_tokens:
        writer.add_token_list([f"a token of the vocabulary, number {i}" for i in range(n_tokens)])
    for key, value in values.items():
        writer.add_string(key.replace("__", "."), value)
    kind = gguf.GGMLQuantizationType[scheme]
    row_bytes = n_embd // SCHEMES[scheme].n_values * SCHEMES[scheme].n_bytes
    rows = {"token_embd": 32000, "output": 32000, **{f"blk.{i}.ffn_up": 4 * n_embd for i in range(n_layers)}}
    for name, n_rows in rows.items():
        shape, n_bytes = (n_rows, row_bytes), n_rows * row_bytes
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = read_table(path)
    last = header.tensors[-1]
    os.truncate(path, header.data_offset + last.offset + last.shape[1] * row_bytes)
    return path


def write_split(folder: Path, n_tensors: int = 8) -> list[Path]:
    """A tiny llama in several files, as gguf's own writer splits it."""
    write_model(folder / "tiny.gguf", n_part_tensors=n_tensors)
    return sorted(folder.glob("tiny-*.gguf"))
