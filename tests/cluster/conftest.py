"""A home for the tests of a ring: a model of seven layers, a head, nodes that may be harmed."""

import pytest

from tests.cluster.processes import Head, NodeProcess
from tests.gguf_models import write_model

N_LAYERS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(folder):
    return write_model(folder / "whole.gguf", "qwen2", 3, N_LAYERS)


@pytest.fixture(scope="module")
def head(folder):
    return Head(folder)


@pytest.fixture
def spare(folder, head):
    """Two nodes that may be harmed."""
    with NodeProcess(folder, "old", head) as old, NodeProcess(folder, "older", head) as older:
        yield [old, older]
