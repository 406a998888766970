"""The advisor's rules: which file comes first, which is refused, which cache goes with it."""

from dataclasses import replace

import pytest

from localreason.cli.quant_choose import describe_free
from localreason.quant.advice import explain
from localreason.quant.choose import (
    Candidate,
    Fit,
    Machine,
    Verdict,
    cache_types,
    describe,
    find_scheme,
    rank,
)
from localreason.quant.evidence import Measured
from localreason.runtime.fit import Free, Wish, fit
from localreason.runtime.header import Header, TensorEntry, read_table
from localreason.runtime.schemes import SCHEMES
from tests.gguf_models import write_model

GIB = 1 << 30
_BITS = {"F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_L": 4.2, "Q2_K": 3.3}


def header(n_bytes, n_cell_bytes, n_embd=4096, n_heads=32):
    """A model of one matrix of this size and a 16-bit cache of this many bytes a token."""
    sizes = {"block_count": 1, "embedding_length": n_embd, "feed_forward_length": 4 * n_embd}
    sizes |= {"attention.head_count": n_heads, "attention.head_count_kv": round(n_cell_bytes * n_heads / 4 / n_embd)}
    values = {"general.architecture": "llama"} | {f"llama.{name}": size for name, size in sizes.items()}
    return Header(values, {}, [TensorEntry("blk.0.ffn_up.weight", (256, n_bytes // 256), SCHEMES["I8"].kind, 0)])


def candidate(billions, scheme, architecture="llama", n_context_train=32768, **shape):
    """A model of this size with a cache of about 100 kB a token and billion."""
    n = int(billions * 1e9)
    n_bytes = int(n * _BITS[scheme] / 8)
    return Candidate(
        name=f"m{billions:g}-{scheme}",
        n_bytes=n_bytes,
        n_parameters=n,
        bits_per_weight=_BITS[scheme],
        n_bits=int(find_scheme(scheme)[1]),
        scheme=scheme,
        architecture=architecture,
        n_context_train=n_context_train,
        header=header(n_bytes, 100e3 * billions**0.5, **shape),
    )


def described(path):
    return describe(read_table(path), path.name)


def names(options):
    return [option.candidate.name for option in options]


def ranked(free_gib, *candidates, n_context=8192, **rest):
    return rank(candidates, Machine(Free(int(free_gib * GIB))), n_context, **rest)


def test_eight_bits_are_the_default_even_where_sixteen_fit():
    files = [candidate(1.7, scheme) for scheme in ("F16", "Q4_K_M", "Q8_0", "Q6_K", "Q5_K_M")]
    assert names(ranked(64, *files)) == ["m1.7-Q8_0", "m1.7-F16", "m1.7-Q6_K", "m1.7-Q5_K_M", "m1.7-Q4_K_M"]


def test_where_memory_is_short_a_larger_model_at_four_bits_comes_before_a_smaller_one_at_sixteen():
    files = [candidate(2, "F16"), candidate(8, "Q8_0"), candidate(8, "Q4_K_M")]
    found = ranked(7, *files)
    assert names(found) == ["m8-Q4_K_M", "m2-F16", "m8-Q8_0"]
    assert found[2].verdict is Verdict.LARGE
    lines = explain(found, "7 GiB free")
    assert len(lines) == 3
    assert "m8-Q4_K_M with 8192 tokens of context and a q8_0 cache" in lines[0]
    assert "about one point from 7B on" in lines[1]
    assert "a larger model comes before more bits, so before m2-F16" in lines[1]


def test_models_of_about_the_same_size_are_ordered_by_their_bits():
    assert names(ranked(64, candidate(2, "Q4_K_M"), candidate(1.7, "Q8_0"))) == ["m1.7-Q8_0", "m2-Q4_K_M"]


@pytest.mark.parametrize(
    ("billions", "warning"),
    [(1.5, "4 points on average"), (3, "4 points on average"), (4.02, "nothing is known"), (6.74, None)],
)
def test_four_bit_weights_are_warned_of_below_7b(billions, warning):
    [option] = ranked(64, candidate(billions, "Q4_K_M"))
    assert option.verdict is Verdict.FITS
    assert [warning is not None and warning in text for text in option.warnings] == ([True] if warning else [])


def test_below_four_bits_is_refused_unless_forced():
    files = [candidate(14, "Q3_K_L"), candidate(1, "Q8_0")]
    found = ranked(64, *files)
    assert names(found) == ["m1-Q8_0", "m14-Q3_K_L"]
    assert found[1].verdict is Verdict.REFUSED
    forced = ranked(64, *files, is_forced=True)
    assert names(forced) == ["m1-Q8_0", "m14-Q3_K_L"], "what the rules allow comes first all the same"
    assert forced[1].verdict is Verdict.FITS
    assert any("3-bit weights cost" in text for text in forced[1].warnings)
    assert "3-bit weights of m14-Q3_K_L come after all that the rules allow" in explain(forced, "64 GiB free")[1]
    short = ranked(1.9, candidate(1, "Q8_0"), candidate(1, "Q2_K"), n_context=32768, is_forced=True)
    assert [(one.candidate.n_bits, one.verdict) for one in short] == [(8, Verdict.SHORT), (2, Verdict.FITS)]
    assert names(ranked(64, files[0], is_forced=True)) == ["m14-Q3_K_L"]
    refused = explain(ranked(64, files[0]), "64 GiB free")
    assert refused[0].startswith("Take none")
    assert "--force" in refused[0]


@pytest.mark.parametrize(
    ("billions", "scheme", "architecture", "is_forced", "allowed"),
    [
        (1.7, "Q8_0", "qwen3", False, ["f16", "q8_0"]),
        (6.74, "Q8_0", "llama", False, ["q8_0"]),
        (13.96, "Q4_K_M", "phi3", False, ["q8_0", "q4_0"]),
        (8, "Q8_0", "qwen3", True, ["q8_0", "q4_0"]),
        (1.7, "Q4_K_M", "qwen3", True, ["f16", "q8_0"]),
        (1.7, "Q8_0", "qwen3", True, ["f16", "q8_0", "q4_0"]),
        (1.7, "Q4_K_M", "llama", True, ["f16", "q8_0", "q4_0"]),
    ],
)
def test_cache_types_go_by_size_and_four_bits_twice_are_never_for_small_qwen(
    billions, scheme, architecture, is_forced, allowed
):
    assert cache_types(candidate(billions, scheme, architecture), is_forced) == allowed


def test_a_smaller_cache_type_is_taken_where_the_preferred_does_not_hold_the_context():
    file = candidate(16, "Q4_K_M")
    needed = Machine(Free(GIB)).fit(file, "q4_0", 32768).needed_bytes
    [option] = rank([file], Machine(Free(needed + (512 << 20))), 32768)
    assert (option.verdict, option.cache_type, option.n_context) == (Verdict.FITS, "q4_0", 32768)
    assert any("4-bit cache" in text for text in option.warnings)


def test_less_context_than_asked_for_comes_after_what_fits_whole():
    large, small = candidate(3, "Q8_0"), candidate(1, "Q8_0")
    found = rank([large, small], Machine(Free(large.n_bytes + (512 << 20) + 400 * 10**6)), 8192)
    assert [(option.candidate, option.verdict) for option in found] == [(small, Verdict.FITS), (large, Verdict.SHORT)]
    assert 256 <= found[1].n_context < 8192
    assert any("of 8192 tokens" in text for text in found[1].warnings)


def test_the_context_ends_where_the_training_did():
    [option] = ranked(64, candidate(1, "Q8_0", n_context_train=2048))
    assert (option.verdict, option.n_context) == (Verdict.FITS, 2048)
    assert any("trained for 2048" in text for text in option.warnings)


def test_a_loss_that_was_measured_and_is_no_chance_puts_a_file_behind_its_equals():
    files = [candidate(8, "Q8_0"), candidate(8, "Q6_K")]
    lost = Measured("m8-F16", "q8_0", 0.1, 0.9, (-0.1, -0.15, -0.05), 200, 0.001)
    found = ranked(64, *files, measured={"m8-Q8_0": (lost,)})
    assert names(found) == ["m8-Q6_K", "m8-Q8_0"]
    other = Measured("m8-F16", "q4_0", 0.1, 0.9, (-0.1, -0.15, -0.05), 200, 0.001)
    assert names(ranked(64, *files, measured={"m8-Q8_0": (other,)})) == ["m8-Q8_0", "m8-Q6_K"], "of another cache"
    chance = Measured("m8-F16", "q8_0", 0.1, 0.9, (-0.1, -0.3, 0.1), 100, 0.5)
    found = ranked(64, *files, measured={"m8-Q8_0": (chance,)})
    assert names(found) == ["m8-Q8_0", "m8-Q6_K"]
    assert explain(found, "64 GiB free")[2] == (
        "Measured here: KL 0.1 nats, same top token 90.0%, accuracy -10.0 points (-30.0 to +10.0) on 100 problems, "
        "to m8-F16, with a q8_0 cache."
    )


def test_one_problem_that_was_lost_is_no_evidence():
    files = [candidate(8, "Q8_0"), candidate(8, "Q6_K")]
    lost = Measured("m8-F16", "q8_0", accuracy=(-1.0, -1.0, -1.0), n_problems=1, mcnemar_p=1.0)
    found = ranked(64, *files, measured={"m8-Q8_0": (lost,)})
    assert names(found) == ["m8-Q8_0", "m8-Q6_K"]
    assert found[0].warnings == ()
    assert "on 1 problem, too few to tell" in lost.sentence()


def test_files_of_one_name_are_ranked_each_for_itself():
    twins = [candidate(1, "Q8_0"), candidate(1, "Q8_0", "qwen3")]
    assert len(ranked(64, *twins)) == 2


def test_nothing_that_fits_is_said_with_what_the_smallest_needs():
    lines = explain(ranked(1, candidate(8, "Q8_0"), candidate(8, "Q4_K_M")), "1 GiB free")
    assert len(lines) == 3
    assert lines[0].startswith("Take none")
    assert "5." in lines[2]
    assert "no file" in explain([], "1 GiB free")[1]


def test_seconds_that_a_room_knows_are_said():
    class Fast:
        def fit(self, candidate, cache_type, n_context):
            return Fit(n_context, GIB, 0.0421)

    assert "42.1 ms a token" in explain(rank([candidate(1, "Q8_0")], Fast(), 4096), "a cluster")[0]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("Qwen3-1.7B-Q4_K_M.gguf", ("Q4_K_M", 4)),
        ("model.IQ4_XS.gguf", ("IQ4_XS", 4)),
        ("gemma-BF16", ("BF16", 16)),
        ("Qwen3-8B-UD-Q2_K_XL.gguf", ("Q2_K_XL", 2)),
        ("BF16/big-q8_0", ("Q8_0", 8)),
        ("gpt-oss-20b-mxfp4.gguf", ("MXFP4", 4)),
        ("Qwen2.5-7B-Instruct.gguf", None),
    ],
)
def test_schemes_are_read_from_names(name, scheme):
    assert find_scheme(name) == scheme


def test_a_file_is_described_by_its_tensors(tiny_model, tmp_path):
    found = described(tiny_model)
    assert (found.scheme, found.n_bits, found.bits_per_weight) == ("F32", 32, 32)
    assert found.n_bytes == 4 * found.n_parameters
    recurrent = described(write_model(tmp_path / "mamba.gguf", "mamba"))
    assert cache_types(recurrent) == ["f16"]
    assert Machine(Free(GIB)).fit(recurrent, "f16", 1000).n_context == 1000


@pytest.mark.parametrize("free_mib", range(40, 72, 4))
def test_a_context_that_is_recommended_can_be_loaded_by_the_same_arithmetic(tmp_path, free_mib):
    """The weights' copies, the vocabulary and llama.cpp's buffers count too: a file of 1 MiB needs far more."""
    sizes = {"llama.context_length": 1 << 20}
    file = described(write_model(tmp_path / "tiny.gguf", values=sizes, extra={"blk.0.spare.weight": (256, 256)}))
    assert file.header is not None
    free = Free((512 + free_mib) << 20)
    found = Machine(free).fit(file, "f16", 1 << 17)
    if found.n_context:
        assert found.needed_bytes <= free.host_bytes
        assert fit(file.header, Wish(found.n_context, 1 << 20, cache_type="f16"), free).n_context >= found.n_context
    loaded = fit(file.header, Wish(None, 1 << 20, 1 << 17, "f16"), free).n_context if found.n_context else 0
    assert found.n_context == loaded


def test_a_gpu_counts_and_is_named():
    file = candidate(8, "Q8_0")
    assert ranked(4, file)[0].verdict is Verdict.LARGE
    free = Free(12 * GIB, 24 * GIB)
    [option] = rank([file], Machine(free), 8192)
    assert option.verdict is Verdict.FITS
    assert option.needed_bytes > file.n_bytes
    assert describe_free(free, ["CUDA0", "CPU"]) == "12.00 GiB free and 24.00 GiB on the GPU CUDA0"
    assert describe_free(Free(GIB), ["CPU"]) == "1.00 GiB free"
    assert describe_free(Free(12 * GIB, 8 * GIB, 1, True), ["Metal", "CPU"]).endswith(
        "8.00 GiB of them for the GPU Metal"
    )


def test_cache_types_that_the_heads_do_not_fill_are_not_recommended():
    odd = candidate(8, "Q8_0", n_embd=2560, n_heads=32)
    assert cache_types(odd) == cache_types(odd, is_forced=True) == ["f16"]
    assert ranked(64, odd)[0].cache_type == "f16"


def test_of_files_alike_one_made_with_an_importance_matrix_comes_first():
    plain = candidate(8, "Q4_K_M")
    guided = replace(plain, name="guided", has_imatrix=True)
    found = ranked(64, plain, guided)
    assert names(found) == ["guided", "m8-Q4_K_M"]
    assert "made with an importance matrix, m8-Q4_K_M without" in explain(found, "64 GiB free")[1]
    large = candidate(8, "Q8_0")
    assert names(ranked(64, large, replace(large, name="guided", has_imatrix=True)))[0] == "m8-Q8_0"


def test_hard_tasks_get_one_class_more_bits():
    files = [candidate(8, scheme) for scheme in ("F16", "Q4_K_M", "Q8_0")]
    assert names(ranked(64, *files)) == ["m8-Q8_0", "m8-F16", "m8-Q4_K_M"]
    found = ranked(64, *files, is_hard=True)
    assert names(found) == ["m8-F16", "m8-Q8_0", "m8-Q4_K_M"]
    assert [option.cache_type for option in found] == ["f16", "f16", "f16"]
    assert "hard tasks" in found[2].warnings[0]
    assert ranked(64, candidate(8, "Q4_K_M"))[0].warnings == ()


def test_hard_tasks_get_no_four_bit_cache_and_are_told_of_eight_bits():
    large = candidate(32, "Q8_0")
    assert cache_types(large) == ["q8_0", "q4_0"]
    assert cache_types(large, has_more=True) == ["f16", "q8_0"]
    full, half = (Machine(Free(GIB)).fit(large, kind, 32768).needed_bytes for kind in ("f16", "q8_0"))
    needed = (full + half) / 2 / GIB + 0.5
    [option] = ranked(needed, large, n_context=32768, is_hard=True)
    assert (option.cache_type, option.verdict) == ("q8_0", Verdict.FITS)
    assert "hard tasks" in option.warnings[0]


def test_a_model_trained_by_reinforcement_is_known_by_its_name(tmp_path):
    file = read_table(write_model(tmp_path / "any.gguf"))
    assert describe(file, "x", "QwQ-32B-Q8_0.gguf").is_reinforced
    assert not describe(file, "aqwqa", "qwen3.gguf").is_reinforced
    files = [replace(candidate(32, scheme), is_reinforced=True) for scheme in ("Q8_0", "F16")]
    assert names(ranked(256, *files)) == ["m32-F16", "m32-Q8_0"]
