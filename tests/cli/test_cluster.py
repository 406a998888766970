"""The cluster's commands as a user gives them, with real nodes on this machine."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import time
from dataclasses import replace
from subprocess import PIPE

import pytest

from localreason.cli.config import load
from localreason.cli.doctor import _machine, clock_row, look_at_nodes
from localreason.cli.planning import read_devices
from localreason.cli.ring import find_nodes, measure_machines, open_ring
from localreason.cluster.costs import Links
from localreason.cluster.device import Device
from localreason.cluster.formation import HEAD, Assignment, Placement
from localreason.cluster.home import Home, Seen
from localreason.cluster.identity import Identity, Peers
from localreason.cluster.member import Address
from localreason.cluster.ring import RingEngine, RingOptions
from localreason.cluster.store import Store
from localreason.cluster.wire.ring_pb2 import DescribeReply
from localreason.quant.gguf import ModelFile
from localreason.runtime.errors import InputError
from localreason.runtime.llama import EngineOptions
from tests.cluster.processes import RUN, Head, NodeProcess
from tests.gguf_models import write_model

GIB = 1 << 30


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command line in a process of its own, as the head of a home in a temporary folder."""
    monkeypatch.setenv("LOCALREASON_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("LOCALREASON_CLUSTER_FOLDER", str(tmp_path / "laptop"))
    monkeypatch.setenv("LOCALREASON_CLUSTER_CACHE", str(tmp_path / "laptop-cache"))
    monkeypatch.setenv("LOCALREASON_STORE", str(tmp_path / "store"))

    def run(*words, code=0):
        done = subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True, timeout=60)
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr

    return run


def test_pair_list_solve_and_unpair(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=4, values={"llama.context_length": 4096})
    with NodeProcess(tmp_path, "attic") as node:
        here = f"127.0.0.1:{node.port}"
        assert "is not paired: run `localreason cluster pair" in run("cluster", "list", "--peer", here)[0]
        pairing = subprocess.Popen(
            [*RUN, "cluster", "pair", here],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        code = node.wait_for("asked for by").removeprefix("code ")[:7]
        said, _ = pairing.communicate(code + "\n", timeout=30)
        assert pairing.returncode == 0
        assert "paired with attic" in said
        assert "Code shown on attic: paired" in said  # the person's line is not echoed here
        assert "ready" in run("cluster", "list", "--peer", here)[0]
        rows = json.loads(run("cluster", "status", "--peer", here, "--json")[0])
        assert rows[0]["round_trip_ms"] > 0
        question = ["solve", "What is 2 + 3?", "--model", model, "--max-tokens", "12", "-q", "--temperature", "0"]
        alone, _ = run(*question)
        shared, notes = run(*question, "--cluster", "--peer", here, "--windows", "attic=3,head=1")
        assert shared == alone
        assert "attic 0-2, laptop" in notes.replace(Identity.load(tmp_path / "laptop").name, "laptop")
        planned, notes = run(*question, "--cluster", "--peer", here)
        assert planned == alone
        assert "this machine alone is expected to be the fastest" in notes
        assert "1 files" in run("cluster", "cache")[0]
        [file] = json.loads(run("cluster", "cache", "--json")[0])["files"]
        (node.cache / "model.gguf").write_bytes(b"GGUF")  # not a window, and left alone
        assert "1 files" in run("cluster", "cache", "--cache", node.cache)[0]
        assert "bytes were freed" in run("cluster", "cache", "--cache", node.cache, "--clear")[0]
        assert [path.name for path in node.cache.glob("*.gguf")] == ["model.gguf"]
        cleared = json.loads(run("cluster", "cache", "--clear", "--json")[0])
        assert (cleared["freed_bytes"], cleared["files"]) == (file["bytes"], [])
        assert "0 bytes were freed" in run("cluster", "cache", "--clear")[0]
        run("cluster", "unpair", "attic")
        assert "is not paired" in run(*question, "--cluster", "--peer", here)[1]


def test_a_node_of_the_home_is_paired_over_both_kinds_of_addresses(run, tmp_path):
    with NodeProcess(tmp_path, "attic", is_loopback=False) as node:
        for host in ["127.0.0.1", *["[::1]"] * has_ipv6()]:
            here = f"{host}:{node.port}"
            node.lines.clear()
            pairing = subprocess.Popen([*RUN, "cluster", "pair", here], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            code = node.wait_for("asked for by").removeprefix("code ")[:7]
            said, _ = pairing.communicate(f"{code}\n".encode(), timeout=30)
            assert pairing.returncode == 0
            assert b"paired with attic" in said
            assert "ready" in run("cluster", "list", "--peer", here)[0]


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_there_is_no_pairing_port_above_the_last(run):
    assert "pairing takes the port above the node's" in run("cluster", "pair", "127.0.0.1:65535", code=4)[1]


def test_a_node_of_an_old_identity_keeps_its_name(tmp_path):
    node = NodeProcess(tmp_path, "attic")
    node.name = "new"
    with node:
        assert "this machine stays attic" in node.wait_for("and not new")
        assert node.wait_for("is ready").startswith("attic (")


def test_a_wrong_code_pairs_nobody(run, tmp_path):
    with NodeProcess(tmp_path, "attic") as node:
        _, said = run("cluster", "pair", f"127.0.0.1:{node.port}", "--code", "000 000", code=1)
        assert "the code is wrong" in said
        assert "not paired" in run("cluster", "list", "--peer", f"127.0.0.1:{node.port}")[0]


def test_no_code_on_standard_input_is_one_sentence(run, tmp_path):
    with NodeProcess(tmp_path, "attic") as node:
        pairing = [*RUN, "cluster", "pair", f"127.0.0.1:{node.port}"]
        done = subprocess.run(pairing, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1
        assert "no code was given; run the command again" in done.stderr


def test_a_pipe_that_stays_open_does_not_kill_the_command_at_its_end(run, tmp_path):
    with NodeProcess(tmp_path, "attic") as node:
        pairing = [*RUN, "cluster", "pair", f"127.0.0.1:{node.port}"]
        process = subprocess.Popen(pairing, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)
        node.wait_for("asked for by")
    assert process.wait(30) == 1, "with standard input still open"
    assert "was not paired" in process.communicate()[1]


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
        (["--in-flight", "128"], "in ms a token of all samples,"),
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
    # Two machines alike with a quick link: one answer gains nothing by the second, many samples and prompts do.
    assert (alone["seconds"] > 1.3 * found["seconds"]) == bool(flags)
    assert alone["token_seconds"] <= found["token_seconds"] * 1.01
    halved, doubled = changes["half the context"], changes["double the context"]
    assert halved["memory_bytes"] < doubled["memory_bytes"]


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
    assert f"with 2 samples: {1 / seconds:.1f} tokens a second together" in run(*command)[0]


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


@pytest.mark.parametrize(
    ("windows", "match"),
    [
        ("attic", "is not NAME=LAYERS"),
        ("attic=3,head=²", "is not NAME=LAYERS"),
        ("attic=1,head=1", "have 2 layers"),
        ("head=2,attic=2", "ends with attic|end with"),
        ("cellar=3,head=1", "no node is named cellar, which the windows 'cellar=3,head=1' name; there are attic, head"),
    ],
)
def test_windows_that_do_not_add_up_are_refused(run, tmp_path, windows, match):
    model = write_model(tmp_path / "tiny.gguf", n_layers=4)
    with NodeProcess(tmp_path, "attic", Head(tmp_path)) as node:
        here = f"127.0.0.1:{node.port}"
        _, said = run("solve", "x", "--model", model, "--cluster", "--peer", here, "--windows", windows, code=1)
    assert any(part in said for part in match.split("|"))


def test_a_node_that_trusts_this_machine_no_more_says_so(run, tmp_path):
    laptop = Head(tmp_path)
    with NodeProcess(tmp_path, "attic", laptop) as node, NodeProcess(tmp_path, "cellar", laptop) as other:
        here, there = f"127.0.0.1:{node.port}", f"127.0.0.1:{other.port}"
        assert "ready" in run("cluster", "list", "--peer", here)[0]
        Peers(node.folder).remove(laptop.identity.id)
        said = run("cluster", "list", "--peer", here, "--peer", there)[0].splitlines()
        assert "does not trust this machine any more; pair again" in next(line for line in said if "attic" in line)
        assert "ready" in next(line for line in said if "cellar" in line)
    assert "cannot be reached" in run("cluster", "list", "--peer", here)[0]


@contextlib.contextmanager
def held(tmp_path, node, model):
    """The node in a ring of another head; what it is that ends the ring."""
    ring = RingEngine(
        ModelFile(model),
        [node.address],
        Head(tmp_path, "desk").gate,
        Store(tmp_path / "desk-cache", GIB, [model]),
        lambda names: Placement((Assignment("attic", 0, 3), Assignment(HEAD, 3, 4))),
        RingOptions(512, name="desk"),
    )
    with ring:
        yield ring.close


def test_a_node_that_another_head_has_is_asked_again_until_it_is_free(tmp_path, run):
    model = write_model(tmp_path / "tiny.gguf", n_layers=4, values={"llama.context_length": 4096})
    desk, laptop = Head(tmp_path, "desk"), Head(tmp_path)
    with NodeProcess(tmp_path, "attic", desk) as node:
        Peers(node.folder).add(laptop.certificate)
        Peers(laptop.folder).add(node.identity.certificate)
        here = f"127.0.0.1:{node.port}"
        question = ["solve", "x", "--model", model, "--max-tokens", "2", "--cluster", "--peer", here]
        with held(tmp_path, node, model) as end:
            assert "is busy with desk" in run("cluster", "list", "--peer", here)[0]
            asking = subprocess.Popen(
                [*RUN, *map(str, question), "--windows", "attic=3,head=1"], stderr=PIPE, text=True
            )
            assert asking.stderr is not None
            said = next(line for line in asking.stderr if "attic" in line)
            assert "attic is busy with desk; asking again for 12 s" in said
            end()
            assert "layers: attic 0-2" in asking.communicate(timeout=30)[1]
            assert asking.returncode == 0


def test_a_node_that_stays_busy_is_told_and_left_out(tmp_path, capsys):
    model = write_model(tmp_path / "tiny.gguf", n_layers=4)
    with NodeProcess(tmp_path, "attic", Head(tmp_path, "desk")) as node, held(tmp_path, node, model):
        config = load({"peers": [f"127.0.0.1:{node.port}"]})
        seen = find_nodes(Home(tmp_path / "desk"), config, [], free_seconds=0.1)
    assert [one.is_busy for one in seen] == [True]
    assert "attic is busy with desk; going on without it" in capsys.readouterr().err


def test_nodes_that_cannot_be_measured_are_named_and_left_out(tmp_path, capsys):
    laptop = Head(tmp_path)
    model = write_model(tmp_path / "tiny.gguf", n_layers=4)
    home = Home(laptop.folder, tmp_path / "laptop-cache")
    with NodeProcess(tmp_path, "attic", laptop) as attic, NodeProcess(tmp_path, "gone", laptop) as gone:
        named = [f"127.0.0.1:{node.port}" for node in (attic, gone)]
        seen = asyncio.run(home.survey(0, named, ["F32"]))
        gone.kill()
        strange = replace(seen[0], name="strange", reply=DescribeReply(device='{"name": "x"}'))
        devices, links = measure_machines(ModelFile(model), home, [*seen, strange], load({"threads": 1}))
    assert [device.name for device in devices] == ["head", "attic"]
    assert ("head", "gone") not in links.pairs
    said = capsys.readouterr().err
    assert re.search(r"gone \S.*; going on without it", said)
    assert "strange: a device came with missing or unknown fields" in said


def test_a_silent_machine_is_not_asked_once_for_each_pairing_nor_called_distrustful(tmp_path):
    laptop = Head(tmp_path)
    for name in ("attic", "desk", "phone"):
        Peers(laptop.folder).add(Identity.load(tmp_path / name, name).certificate)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        [seen] = asyncio.run(Home(laptop.folder).survey(0, [f"127.0.0.1:{silent.getsockname()[1]}"]))
    assert "did not answer in time" in seen.problem
    assert time.monotonic() - started < 12


@pytest.mark.parametrize("flag", [["--peer", "x"], ["--windows", "a=1,head=1"], ["--rounds", "2"], ["--disk"]])
def test_what_is_for_a_ring_only_is_refused_without_one(run, flag):
    _, said = run("solve", "x", *flag, code=2)
    assert f"{flag[0]}: is only for sharing the model with other machines; give --cluster too" in said
    run("cluster", "list", "--peer", "127.0.0.1:1")


def test_a_model_that_cannot_be_cut_is_refused(run, tmp_path):
    model = write_model(tmp_path / "m.gguf", "mamba")
    _, said = run("solve", "x", "--model", model, "--cluster", code=3)
    assert "'mamba' is not known to give the same answers" in said


def test_plain_text_needs_loopback_and_a_wrong_peer_is_one_sentence(run, tmp_path):
    assert "give --loopback with it" in run("node", "--plaintext", code=4)[1]
    assert "--cache-limit" in run("node", "--cache-limit", "inf", code=2)[1]
    assert "port" in run("cluster", "list", "--peer", "x:99999", code=4)[1]
    with NodeProcess(tmp_path, "attic") as node:
        _, said = run("node", "--loopback", "--port", node.port, "--folder", tmp_path / "b", code=1)
        assert "the port cannot be used" in said


def test_the_doctor_tells_how_far_a_clock_is_off(tmp_path):
    laptop = Head(tmp_path)
    with NodeProcess(tmp_path, "attic", laptop) as node:
        rows = asyncio.run(look_at_nodes(Home(laptop.folder), [f"127.0.0.1:{node.port}"]))
    found = {row["what"]: row for row in rows}
    assert found["node attic"]["ok"]
    assert re.match(r"\d\.\d s (ahead of|behind) this machine's", found["clock attic"]["found"])
    assert clock_row("attic", 86_000)["ok"]
    late = clock_row("attic", -25 * 3600)
    assert not late["ok"]
    assert late["found"].startswith("25.0 hours behind this machine's; up to 24 hours")
    assert late["means"].endswith("set the clock")


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


def test_a_node_without_encryption_is_told_from_one_that_is_not_paired(run, tmp_path):
    with NodeProcess(tmp_path, "attic", None, "--plaintext") as node:
        said = run("cluster", "list", "--peer", f"127.0.0.1:{node.port}")[0]
    assert "speaks without encryption: start it without --plaintext" in said
    assert "pair" not in said
