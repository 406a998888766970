"""The plans that a user is told of, and the files that describe machines."""

import json
import re
from dataclasses import replace

import pytest

from localreason.cli.config import load
from localreason.cli.doctor import _machine
from localreason.cli.planning import read_devices
from localreason.cli.ring import named_windows, open_ring
from localreason.cluster.costs import Links
from localreason.cluster.device import Device
from localreason.cluster.formation import HEAD, Assignment
from localreason.cluster.home import Home, Seen
from localreason.cluster.member import Address
from localreason.cluster.wire.ring_pb2 import DescribeReply
from localreason.quant.gguf import ModelFile
from localreason.runtime.errors import InputError
from localreason.runtime.llama import EngineOptions
from tests.gguf_models import write_model

GIB = 1 << 30


def described(tmp_path, *gibibytes, speed=10e9):
    devices = [
        json.loads(
            Device(
                name=f"machine{i}",
                memory_bytes=int(size * GIB),
                weight_speeds={"F32": speed},
                prefill_speeds={"F32": 40 * speed},
                memory_bandwidth=20e9,
            ).to_json()
        )
        for i, size in enumerate(gibibytes)
    ]
    path = tmp_path / "home.json"
    path.write_text(json.dumps({"devices": devices}))
    return path


def test_a_plan_for_described_machines(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    home = described(tmp_path, 8, 8)
    text, _ = run("cluster", "plan", model, "--devices", home, "--explain", "--in-flight", "2")
    assert "without machine1" in text
    assert "one more like machine1" in text
    assert "whole copies on" in text
    found = json.loads(run("cluster", "plan", model, "--devices", home, "--json", "--explain")[0])
    assert [window["end"] for window in found["windows"]][-1] == 6
    assert "with tiny.gguf" in run("cluster", "plan", model, "--devices", home, "--compare", model)[0]
    assert found["token_seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ([], "in ms a token,"),
        (["--in-flight", "256"], "in ms a token of all samples,"),
        (["--objective", "prefill"], "in ms a prompt of 512 tokens,"),
    ],
)
def test_what_would_change_is_told_of_what_was_asked_for(run, tmp_path, flags, what):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    command = ["cluster", "plan", model, "--devices", described(tmp_path, 8, 8, speed=1e6), "--explain", *flags]
    assert what in run(*command)[0]
    found = json.loads(run(*command, "--json")[0])
    changes = {row["change"]: row for row in found["variations"]}
    alone = changes["without machine1"]
    # Two machines alike with a quick link: one answer gains only by guesses, many samples and prompts by half.
    assert (alone["seconds"] > 1.3 * found["seconds"]) == bool(flags)
    assert alone["token_seconds"] <= found["token_seconds"] * 1.01
    halved, doubled = changes["half the context"], changes["double the context"]
    assert halved["memory_bytes"] < doubled["memory_bytes"]


def test_one_answer_is_planned_for_with_guesses_unless_they_are_off(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    command = ["cluster", "plan", model, "--devices", described(tmp_path, 8, 8, speed=1e6)]
    guessed, plain = (json.loads(run(*command, "--json", *flags)[0]) for flags in ([], ["--no-guess"]))
    assert [len(found["per_device"]) for found in (guessed, plain)] == [2, 1]
    assert 0.84 < guessed["seconds"] / plain["seconds"] < 1
    assert plain["seconds"] == plain["lone_seconds"] == plain["token_seconds"]
    text = run(*command)[0]
    assert f"expected {1000 * guessed['seconds']:.1f} ms a token" in text
    assert f"with 30% of the tokens guessed by nodes that would wait; {1000 * guessed['token_seconds']:.1f} ms" in text
    assert "guessed" not in run(*command, "--no-guess")[0]
    samples = json.loads(run(*command, "--json", "--in-flight", "2", "--objective", "latency")[0])
    assert samples["lone_seconds"] == samples["token_seconds"], "nobody waits"
    command[2] = write_model(tmp_path / "sliding.gguf", "gemma3", n_layers=14)
    assert len(json.loads(run(*command, "--json")[0])["per_device"]) == 1, "a ring of such a model guesses nothing"


def test_what_layers_are_shared_out_for_can_be_set(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALREASON_OBJECTIVE", "prefill")
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    command = ["cluster", "plan", model, "--devices", described(tmp_path, 8, 8, speed=1e6), "--json"]
    prompts, tokens = (json.loads(run(*command, *flags)[0]) for flags in ([], ["--objective", "latency"]))
    assert (prompts["objective"], prompts["n_rounds"]) == ("prefill", 2)
    assert (tokens["objective"], tokens["n_rounds"]) == ("latency", 1)
    assert prompts["prefill_seconds"] < tokens["prefill_seconds"]
    _, said = run(*command, "--objective", "speed", code=2)
    assert "--objective: is 'speed'; choose one of latency, throughput, prefill" in said


def test_a_plan_says_the_cache_that_fits_and_takes_the_context_of_the_settings(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALREASON_CONTEXT", "200000")
    model = write_model(tmp_path / "tiny.gguf", n_layers=6, values={"llama.context_length": 1 << 18})
    command = ["cluster", "plan", model, "--devices", described(tmp_path, 0.14)]
    assert "the cache is of q8_0" in run(*command)[0]
    assert json.loads(run(*command, "--json")[0])["cache_type"] == "q8_0"
    assert "the cache is" not in run(*command, "--context", "4096")[0]


def test_what_samples_get_is_told_of_as_many_as_were_asked_for(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    command = ["cluster", "plan", model, "--devices", described(tmp_path, 8, 8, speed=1e6), "--in-flight", "2"]
    seconds = json.loads(run(*command, "--json")[0])["seconds"]
    assert f"with 2 samples, 2 to a step: {1 / seconds:.1f} tokens a second together" in run(*command)[0]


def test_layers_for_the_heads_gpu_are_counted_in_a_ring_too(tmp_path, monkeypatch):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    [head, attic] = read_devices(described(tmp_path, 8, 8, speed=1e6))[0]
    head = replace(head, gpu_name="card", gpu_memory_bytes=8 * GIB, gpu_speed=2e6)
    attic = replace(attic, name="attic", weight_speeds={"F32": 9e6})
    seen = Seen("attic", "0" * 16, Address("attic", "127.0.0.1", 1), reply=DescribeReply())
    placed = []

    class Formed(Exception):
        pass

    def form(file, addresses, gate, store, place, options, *others):
        placed.append({window.member: window.n_gpu_layers for window in place(["attic"]).windows})
        raise Formed

    monkeypatch.setattr("localreason.cli.ring.find_nodes", lambda *_: [seen])
    monkeypatch.setattr("localreason.cli.ring.measure_machines", lambda *_: ([head, attic], Links()))
    monkeypatch.setattr("localreason.cli.ring.RingEngine", form)
    for n in (None, 0):
        with pytest.raises(Formed):
            open_ring(model, EngineOptions(n_gpu_layers=n), load({"cluster": True}))
    assert placed[0][HEAD] > 0
    assert placed[1][HEAD] == 0


def test_windows_as_a_person_writes_them_say_what_goes_to_a_gpu(tmp_path):
    file = ModelFile(write_model(tmp_path / "tiny.gguf", n_layers=6))
    place = named_windows("attic=2/1, cellar = 1 / 1,attic=1,head=2", file, ["attic", "cellar"])

    # llama.cpp counts the output, of which each window has at least a stub, as a layer.
    assert place(["attic", "cellar"]).windows == (
        Assignment("attic", 0, 2, 2),
        Assignment("cellar", 2, 3, 2),
        Assignment("attic", 3, 4, 0),
        Assignment(HEAD, 4, 6, 0),
    )
    assert place(["attic"]).windows == (Assignment("attic", 0, 4, 2), Assignment(HEAD, 4, 6, 0))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "does not describe machines"),
        ("[]", "the file is [], not an object of devices"),
        ('{"devices": []}', "names the machines none"),
        ('{"devices": {}}', "'devices' is {}, not a list"),
        ('{"devices": [{"name": "x"}]}', "missing or unknown fields"),
        ('{"name": "x"}', "missing or unknown fields"),
        pytest.param('{"devices":' + "[" * 100_000, "nested too deeply", id="deep"),
        ('{"devices": [], "typo": 1}', "unknown key 'typo'; known are devices, links"),
    ],
)
def test_a_file_that_describes_no_machines_is_one_sentence(tmp_path, text, match):
    (tmp_path / "home.json").write_text(text)
    with pytest.raises(InputError, match=re.escape(match)):
        read_devices(tmp_path / "home.json")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"to": "nobody"}, "names the machine 'nobody'; the machines are machine0, machine1"),
        ({"to": []}, "names the machine []"),
        ({"to": "machine0"}, "goes from 'head' to itself"),
        ({"seconds": True}, "seconds of a link is True"),
        ({"seconds": float("nan")}, "seconds of a link is nan"),
        ({"bytes_per_second": "1e7"}, "bytes_per_second of a link is '1e7'"),
        ({"bytes_per_second": 0}, "bytes_per_second of a link is 0"),
        ({"second": 1}, "a link has an unknown key 'second'"),
    ],
)
def test_a_link_that_is_none_is_one_sentence(tmp_path, changed, match):
    home = described(tmp_path, 8, 8)
    link = {"from": "machine0", "to": "machine1", "seconds": 0.003, "bytes_per_second": 1e7}
    found = json.loads(home.read_text())
    home.write_text(json.dumps({**found, "links": [link]}))
    assert read_devices(home)[1].of("head", "machine1") == (0.003, 1e7)
    home.write_text(json.dumps({**found, "links": [{**link, **changed}]}))
    with pytest.raises(InputError, match=re.escape(match)):
        read_devices(home)


def test_a_link_is_described_once_each_way(tmp_path):
    home = described(tmp_path, 8, 8)
    link = {"from": "machine0", "to": "machine1", "seconds": 0.003, "bytes_per_second": 1e7}
    back = {**link, "from": "machine1", "to": "head", "seconds": 0.004}
    found = json.loads(home.read_text())
    home.write_text(json.dumps({**found, "links": [link, back]}))
    assert read_devices(home)[1].of("machine1", "head")[0] == 0.004
    home.write_text(json.dumps({**found, "links": [link, back, {**link, "seconds": 0.5}]}))
    with pytest.raises(InputError, match="the link from 'head' to 'machine1' is there twice"):
        read_devices(home)


def test_described_machines_are_not_looked_for(run, tmp_path):
    words = ["cluster", "plan", "x.gguf", "--devices", described(tmp_path, 8), "--peer", "127.0.0.1:1"]
    assert "leave out --devices" in run(*words, code=2)[1]


def test_a_profile_describes_one_machine_and_a_later_one_is_not_named_head(tmp_path):
    home = described(tmp_path, 8, 8)
    one, other = json.loads(home.read_text())["devices"]
    home.write_text(json.dumps(one))
    assert [device.name for device in read_devices(home)[0]] == ["head"]
    home.write_text(json.dumps({"devices": [one, {**other, "name": "head"}]}))
    with pytest.raises(InputError, match="give the later one another name"):
        read_devices(home)


def test_a_model_that_fits_nowhere_says_what_is_missing(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=6)
    _, said = run("cluster", "plan", model, "--devices", described(tmp_path, 0.00001), code=1)
    assert "the model needs" in said
    assert "add a machine" in said


def test_the_doctor_counts_the_gpu_and_both_memories(tmp_path):
    [device] = read_devices(described(tmp_path, 12))[0]
    device = replace(device, weight_speeds={"Q4_K": 20e9})

    def rates(**gpu):
        rows = _machine(replace(device, **gpu), Home(tmp_path / "laptop", tmp_path))
        return {row["found"]: row["means"] for row in rows if row["found"].endswith(("Q8_0", "Q4_K"))}

    assert rates()["8B Q4_K"].startswith("about 4.4 tokens a second")
    assert "do not fit" in rates()["32B Q4_K"]
    card = {"gpu_name": "card", "gpu_speed": 8e11}
    assert rates(gpu_memory_bytes=23 * GIB, **card)["8B Q4_K"].startswith("about 175.4 tokens")
    half = rates(gpu_memory_bytes=8 * GIB, **card)["32B Q4_K"]
    assert half.startswith("about 2.0 tokens a second"), "17 of 32 layers on the CPU"
