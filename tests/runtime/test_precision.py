"""What is said of weights and caches that are stored in few bits."""

import pytest

from localreason.runtime.precision import Precision, advice, is_reinforced


def said(scheme: str, n_parameters: float, cache_type: str = "f16", architecture: str = "llama") -> list[str]:
    return advice(Precision(scheme, 4.8), int(n_parameters), cache_type, architecture)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("F16", 16), ("BF16", 16), ("Q8_0", 8), ("Q4_K_M", 4), ("IQ3_XXS", 3), ("MXFP4_MOE", 4), ("TQ1_0", 1), ("odd", 4)],
)
def test_the_bits_of_a_weight_are_those_of_its_scheme(scheme: str, bits: int):
    assert Precision(scheme, 4.8).weight_bits == bits


@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q4_0", "IQ4_XS", "MXFP4_MOE"])
def test_4_bit_weights_are_warned_of_below_4b_only_as_names_count(scheme: str):
    (warning,) = said(scheme, 1.5e9)
    assert scheme in warning
    assert "1.5B" in warning
    assert said(scheme, 3.88e9) == said(scheme, 32e9) == []


@pytest.mark.parametrize("scheme", ["Q5_K_M", "Q6_K", "Q8_0", "F16"])
def test_more_bits_are_not_warned_of(scheme: str):
    assert said(scheme, 135e6) == []


@pytest.mark.parametrize("n_parameters", [1.5e9, 32e9, 671e9])
def test_below_4_bits_every_size_is_warned_of_once(n_parameters: float):
    (warning,) = said("Q3_K_M", n_parameters)
    assert "3 bits" in warning


def test_what_was_made_of_fewer_bits_has_no_more_than_those():
    made = Precision("Q8_0", 8.5, "Q4_1")
    assert (made.weight_bits, made.is_inflated) == (4, True)
    (warning,) = advice(made, int(1.5e9), "f16", "llama")
    assert warning.startswith("Q4_1, of which these Q8_0 weights were made, stores weights in 4 bits")
    known = Precision("Q4_0", 4.5, "F16")
    assert (known.weight_bits, known.is_inflated) == (4, False)


def test_a_4_bit_cache_is_for_14b_and_more():
    assert "q8_0" in said("Q8_0", 8e9, "q4_0")[0].rsplit("take", 1)[1]
    assert "f16" in said("Q8_0", 3e9, "q4_0")[0].rsplit("take", 1)[1]
    assert said("Q8_0", 14.8e9, "q4_0") == []
    assert said("Q8_0", 1e9, "q8_0") == said("Q8_0", 1e9, "f16") == []


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "qwen3moe"])
def test_a_4_bit_cache_on_a_small_qwen_is_told_of_its_keys(architecture: str):
    (warning,) = said("Q8_0", 1.7e9, "q4_0", architecture)
    assert "biases" in warning
    assert "weights" not in warning
    on_weights, on_cache = said("Q4_K_M", 1.7e9, "q4_0", architecture)
    assert "Q8_0" in on_weights
    assert "weights of 4 bits" in on_cache
    assert "14B" in said("Q8_0", 8e9, "q4_0", architecture)[0]


def test_every_warning_is_one_sentence_with_a_remedy():
    for scheme in ("Q2_K", "Q4_0"):
        for warning in said(scheme, 1e9, "q4_0", "qwen2"):
            assert "take " in warning
            assert "\n" not in warning
            assert not warning.endswith(".")


def test_a_model_trained_by_reinforcement_gets_one_class_more_bits():
    (warning,) = advice(Precision("Q4_K_M", 4.8), int(32e9), "f16", "qwen2", has_more=True)
    assert "reinforcement" in warning
    assert "take Q8_0" in warning
    (warning,) = advice(Precision("Q8_0", 8.5), int(32e9), "q4_0", "qwen2", has_more=True)
    assert "reinforcement" in warning
    assert advice(Precision("Q8_0", 8.5), int(32e9), "q8_0", "qwen2", has_more=True) == []


@pytest.mark.parametrize(
    ("name", "is_known"),
    [
        ("QwQ-32B-Q8_0.gguf", True),
        ("MiMo-7B-RL.Q4_K_M.gguf", True),
        ("agentica_DeepScaleR-1.5B", True),
        ("Magistral-Small-2506", True),
        ("Qwen2.5-Math-GRPO", True),
        ("aqwqa", False),
        ("DeepSeek-R1-Distill-Qwen-1.5B", False),
        ("world-7b", False),
    ],
)
def test_reinforcement_is_known_by_names(name: str, is_known: bool):
    assert is_reinforced(None, name, 3) == is_known
