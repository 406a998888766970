"""A device's profile: measured, kept, sent as JSON, and refused where the JSON is not one."""

import json
import math
import time
from dataclasses import replace

import pytest

from localreason.cluster import device as device_module
from localreason.cluster import probe
from localreason.cluster.device import Device, measure, nearest, profile
from localreason.cluster.errors import ProtocolError
from localreason.runtime.devices import GpuMemory
from localreason.runtime.errors import InputError, OutputError

TINY = {"probe_bytes": 1 << 20, "n_embd": 256}
DEVICE = Device(
    name="küche",
    memory_bytes=8 << 30,
    weight_speeds={"Q4_K": 2e10, "F16": 3e10},
    prefill_speeds={"Q4_K": 5e10},
    memory_bandwidth=3e10,
    row_costs={"Q4_K": (1.5, 2.0, 8.0, 9.0), "F16": (1.0, 1.0, 1.5, 2.0)},
    disk_sequential=1e9,
    disk_random=4e8,
    gpu_name="",
    n_threads=4,
    system="Linux x86_64",
    measured_at=1.7e9,
    version="0.1.0",
    notes=("an upper bound",),
)


def test_json_gives_the_same_device_back():
    assert Device.from_json(DEVICE.to_json()) == DEVICE
    needed = ("name", "memory_bytes", "weight_speeds", "prefill_speeds", "memory_bandwidth")
    described = {name: json.loads(DEVICE.to_json())[name] for name in needed}
    assert Device.from_json(json.dumps(described)) == Device(**described)
    for name in needed:
        with pytest.raises(ProtocolError, match="missing"):
            Device.from_json(json.dumps({key: value for key, value in described.items() if key != name}))


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a\x1b[2J"},
        {"name": "a\nb"},
        {"name": "x" * 121},
        {"name": 5},
        {"memory_bytes": -1},
        {"memory_bytes": 1.5},
        {"memory_bytes": True},
        {"memory_bytes": 10**400},
        {"weight_speeds": {}},
        {"weight_speeds": [1]},
        {"weight_speeds": {"Q4_K": 0}},
        {"weight_speeds": {"Q4_K": 1e-300}},
        {"prefill_speeds": {"Q4_K": 1e-4}},
        {"disk_sequential": 1e-5},
        {"weight_speeds": {"Q4_K": "1"}},
        {"weight_speeds": {"nonsense": 1.0}},
        {"prefill_speeds": {"Q4_K": -1.0}},
        {"memory_bandwidth": 0},
        {"memory_bandwidth": None},
        {"memory_bandwidth": 1e300},
        {"disk_random": "fast"},
        {"n_threads": 0},
        {"row_costs": None},
        {"row_costs": {"nonsense": [1, 2, 3, 4]}},
        {"row_costs": {"Q4_K": 1.0}},
        {"row_costs": {"Q4_K": [1, 2, 3]}},
        {"row_costs": {"Q4_K": [1, 2, 3, "4"]}},
        {"row_costs": {"Q4_K": [0, 2, 3, 4]}},
        {"notes": "text"},
        {"notes": [1]},
        {"notes": ["x"] * 65},
        {"unknown": 1},
    ],
)
def test_hostile_values_are_refused(change):
    with pytest.raises(ProtocolError):
        Device.from_json(json.dumps(json.loads(DEVICE.to_json()) | change))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        "[" * 60000,
        " " * 70000,
        DEVICE.to_json().replace("30000000000.0", "NaN"),
        DEVICE.to_json().replace("30000000000.0", "-Infinity"),
        DEVICE.to_json().replace("8589934592", "9" * 5000),
        DEVICE.to_json()[:-2],
    ],
    ids=range(10),
)
def test_what_is_no_device_is_refused(text):
    with pytest.raises(ProtocolError):
        Device.from_json(text)


def test_a_type_that_was_not_measured_is_as_fast_as_the_nearest_one():
    speeds = {"Q4_K": 1.0, "Q8_0": 2.0, "F16": 3.0}
    assert [nearest(speeds, kind) for kind in ("Q4_K", "Q3_K", "Q5_K", "Q6_K", "BF16", "F32")] == [1, 1, 1, 2, 3, 3]
    assert nearest(speeds, "a type of the future") == 1.0


def test_a_step_of_samples_costs_what_was_measured():
    costs = [DEVICE.row_cost("Q4_K", n) for n in (1, 2, 3, 4, 6, 8, 16, 32)]
    assert costs == [1, 1.5, 1.75, 2, 5, 8, 9, 18]
    assert DEVICE.row_cost("BF16", 8) == 1.5, "as the type with the most bits alike"
    described = replace(DEVICE, row_costs={})
    assert [described.row_cost("Q4_K", n) for n in (1, 2, 4)] == pytest.approx([1, 1.8, 2.6])


def test_measuring_gives_finite_speeds_and_leaves_no_files(tmp_path):
    found = measure(1, ["Q4_K", "Q8_0", "F16"], tmp_path, "box", **TINY)
    assert set(found.weight_speeds) == set(found.prefill_speeds) == set(found.row_costs) == {"Q4_K", "Q8_0", "F16"}
    assert all(cost >= 1 for costs in found.row_costs.values() for cost in costs)
    values = [*found.weight_speeds.values(), *found.prefill_speeds.values(), found.memory_bandwidth]
    assert all(math.isfinite(v) and v > 0 for v in [*values, found.disk_sequential, found.disk_random])
    assert found.memory_bytes > 0
    assert Device.from_json(found.to_json()) == found
    assert not list(tmp_path.iterdir())


def test_only_types_of_weights_can_be_measured(tmp_path):
    for kind in ("I32", "nonsense"):
        with pytest.raises(InputError, match=kind):
            measure(1, [kind], tmp_path, **TINY)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="file"):
            profile(folder, 1, ["Q4_K"], **TINY)
        with pytest.raises(OutputError, match="file"):
            measure(1, ["Q4_K"], folder, **TINY)


def test_a_profile_is_kept_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "speeds", lambda *_, **__: probe.Speeds(1e9, 3e9, (1.0, 2.0, 3.0, 4.0)))
    folder = tmp_path / "new"

    def at(**changes):
        return profile(folder, **{"n_threads": 1, "types": ["Q4_K"], "name": "box", **TINY, **changes}).measured_at

    first = at()
    assert at() == first
    assert at(name="") == first
    second = at(is_fresh=True)
    assert second > first
    both = at(types=["Q8_0"])
    assert both > second
    assert at(types=["Q4_K", "Q8_0"]) == both, "known types are measured again with new ones"
    kept = Device.from_json((folder / "device.json").read_text("utf-8"))
    for change in (
        {"measured_at": time.time() - device_module.PROFILE_SECONDS - 60},
        {"measured_at": time.time() + 3600},
        {"version": "0.0.1"},
        {"n_threads": 2},
        {"gpu_name": "one that was taken out", "gpu_memory_bytes": 8 << 30, "gpu_speed": 1e11},
    ):
        old = replace(kept, name="box", **change)
        (folder / "device.json").write_text(old.to_json(), "utf-8")
        assert at() not in (first, old.measured_at), change
    for text in ("{", "\x00"):
        (folder / "device.json").write_text(text, "utf-8")
        assert time.time() - at() < 60
    assert [path.name for path in folder.iterdir()] == ["device.json"]


def test_one_machine_is_measured_once_whatever_a_command_calls_it(tmp_path):
    first = profile(tmp_path, 1, ["Q4_K"], "laptop", **TINY)
    head = profile(tmp_path, 1, ["Q4_K"], "head", **TINY)
    assert (head.name, head.measured_at) == ("head", first.measured_at)
    assert profile(tmp_path, 1, ["Q4_K"], **TINY).name == "laptop"


def test_memory_that_cpu_and_gpu_share_is_counted_once():
    all = device_module._free(None, False)["memory_bytes"]
    slack = 256 << 20  # what other programs take and leave meanwhile
    for n_bytes in (2 << 30, 1 << 50):
        shared = GpuMemory(n_bytes, 1, is_shared=True)
        found = device_module._free(shared, is_gpu_faster=True)
        assert sum(found.values()) == pytest.approx(all, abs=slack)
        assert found["gpu_memory_bytes"] > found["memory_bytes"] * (n_bytes > all)
        assert found["memory_bytes"] >= device_module.RESERVE_BYTES
        slow = device_module._free(shared, is_gpu_faster=False)
        assert slow["gpu_memory_bytes"] == 0
        assert slow["memory_bytes"] == pytest.approx(all, abs=slack)
    own = device_module._free(GpuMemory(8 << 30, 1, is_shared=False), is_gpu_faster=True)
    assert own["memory_bytes"] == pytest.approx(all, abs=slack)
    assert own["gpu_memory_bytes"] == (8 << 30) - device_module.RESERVE_BYTES


def test_a_kept_profile_has_the_free_memory_of_today(tmp_path):
    kept = profile(tmp_path, 1, ["Q4_K"], "laptop", **TINY)
    old = replace(kept, memory_bytes=5, gpu_memory_bytes=kept.gpu_memory_bytes + 5)
    (tmp_path / "device.json").write_text(old.to_json(), "utf-8")
    now = profile(tmp_path, 1, ["Q4_K"], "laptop", **TINY)
    assert now.measured_at == kept.measured_at
    assert now.memory_bytes > 5
    assert now.gpu_memory_bytes != old.gpu_memory_bytes
