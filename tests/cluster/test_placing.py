"""From a model file to what the planner is told, and what a user's wishes make of it."""

from dataclasses import replace

import pytest

from localreason.cluster.costs import Links
from localreason.cluster.errors import PlanImpossible
from localreason.cluster.placing import N_READ, Wish, model_costs, placement_of, with_cache_type, with_gpu_layers
from localreason.cluster.plan import plan
from localreason.quant.gguf import ModelFile
from tests.cluster.plans import costs, device
from tests.gguf_models import write_model


def test_a_token_reads_the_experts_that_it_uses_and_memory_holds_all(tmp_path):
    def of(n_used):
        values = {"qwen3moe.expert_used_count": n_used}
        file = ModelFile(write_model(tmp_path / f"{n_used}.gguf", "qwen3moe", n_layers=2, values=values))
        return model_costs(file, 512, "f16")

    one, two, all = of(1), of(2), of(4)
    assert one.layer_bytes == two.layer_bytes == all.layer_bytes
    assert list(all.read_bytes(1)) == list(all.layer_bytes)
    expert = 3 * 64 * 96 * 4  # up, gate and down in float32
    assert list(one.read_bytes(1)) == pytest.approx([n - 3 * expert for n in one.layer_bytes])
    assert list(one.read_bytes(2)) == list(two.read_bytes(1)), "two samples use other experts"
    assert list(one.read_bytes(9)) == list(one.layer_bytes)
    assert two.scratch_bytes - one.scratch_bytes == 4 * 64 * 3 * 96, "each expert in use has an inner row"
    assert plan(one, [device(memory=10**9)]).token_seconds < plan(all, [device(memory=10**9)]).token_seconds


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5])
def test_the_head_puts_no_more_layers_on_its_gpu_than_the_user_wants(n):
    model = costs((10, 11, 10, 12), output=5, scratch_bytes=2)
    head = device(gpu=1000, gpu_speed=900.0)
    [share] = plan(model, [with_gpu_layers(head, n, model)], Links()).per_device
    assert share.n_gpu_layers + share.is_output_on_gpu <= n
    assert bool(share.n_gpu_layers) == (n > 1)
    assert with_gpu_layers(head, None, model) == head
    [share] = plan(model, [with_gpu_layers(head, 99, model)], Links()).per_device
    assert (share.n_gpu_layers, share.is_output_on_gpu) == (4, True)


def test_a_token_reads_a_typical_part_of_a_long_context(tmp_path):
    file = ModelFile(write_model(tmp_path / "tiny.gguf", n_layers=2))
    short, long = (model_costs(file, n, "f16") for n in (512, 100_000))
    assert short.read_cache_bytes == 512 * short.cache_bytes
    assert long.read_cache_bytes == N_READ * long.cache_bytes
    assert long.held_cache_bytes == 100_000 * long.cache_bytes


def test_samples_share_steps_as_the_kernels_like_it():
    """Measured with Q4_K_M and AVX2: a step of four rows takes 2.7 times one of one row, one of eight 8.1 times."""
    timed = {"Q4_K": (1.7, 2.7, 8.1, 8.9), "Q6_K": (1.7, 2.7, 8.1, 8.9)}
    devices = [replace(device(name), row_costs=timed) for name in ("head", "other")]
    model, links = costs((10,) * 8), Links(default=(0.001, 1e9))
    for n, n_rows in ((2, 1), (4, 2), (8, 4), (16, 4), (32, 16)):
        wish = Wish.of(n)
        found = wish.plan(model, devices, links)
        assert (len(found.per_device), found.n_rows) == (2, n_rows), n
        assert placement_of(found, wish).n_spread == n // n_rows
    far = Links(default=(4.0, 1e9))
    assert Wish.of(4).plan(model, devices, far).n_rows == 1, "what travels is to be fetched up by what is computed"
    one = Wish.of(1)
    assert placement_of(one.plan(model, devices, links), one).n_spread == 0


def test_a_cache_of_f16_that_does_not_fit_is_one_of_q8_0_unless_another_was_wanted(tmp_path):
    file = ModelFile(write_model(tmp_path / "tiny.gguf", n_layers=4))

    def find(cache_type):
        model = model_costs(file, 100_000, cache_type)
        return Wish().plan(model, [device(memory=memory)], Links())

    memory = 0
    for kind in ("f16", "q8_0"):
        model = model_costs(file, 100_000, kind)
        memory = model.needed_bytes + model.scratch_bytes
        assert with_cache_type(file, None, find)[0] == kind
    with pytest.raises(PlanImpossible):
        with_cache_type(file, "f16", find)
    memory //= 2
    with pytest.raises(PlanImpossible):
        with_cache_type(file, None, find)
