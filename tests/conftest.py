"""Fixtures of all tests."""

import pytest

from tests.gguf_models import write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A llama model of two layers with random weights, as a GGUF file."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
