"""The cluster's commands as a user gives them, with real nodes on this machine."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
from dataclasses import replace
from subprocess import PIPE

import pytest

from localreason.cli.config import load
from localreason.cli.doctor import clock_row, look_at_nodes
from localreason.cli.main import ExitCode
from localreason.cli.ring import find_nodes, measure_machines, open_ring
from localreason.cluster.costs import Links
from localreason.cluster.device import Device
from localreason.cluster.formation import HEAD, Assignment, Placement
from localreason.cluster.home import Home
from localreason.cluster.identity import Identity, Peers
from localreason.cluster.member import Member
from localreason.cluster.placing import model_costs
from localreason.cluster.ring import RingEngine, RingOptions
from localreason.cluster.store import Store
from localreason.cluster.wire.ring_pb2 import DescribeReply
from localreason.quant.gguf import ModelFile
from localreason.runtime.engine import Span
from localreason.runtime.llama import EngineOptions
from tests.cluster.processes import RUN, Head, NodeProcess
from tests.gguf_models import write_model

GIB = 1 << 30


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
        [file] = json.loads(run("cluster", "cache", "--json")[0])["files"]
        (node.cache / "model.gguf").write_bytes(b"GGUF")  # not a window, and left alone
        assert "1 files" in run("cluster", "cache", "--cache", node.cache)[0]
        assert "bytes were freed" in run("cluster", "cache", "--cache", node.cache, "--clear")[0]
        assert [path.name for path in node.cache.glob("*.gguf")] == ["model.gguf"]
        cleared = json.loads(run("cluster", "cache", "--clear", "--json")[0])
        assert (cleared["freed_bytes"], cleared["files"]) == (file["bytes"], [])
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
        assert not Peers(tmp_path / "laptop").list()
        assert not Peers(node.folder).list()


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


def test_windows_that_do_not_add_up_are_refused(run, tmp_path):
    model = write_model(tmp_path / "tiny.gguf", n_layers=4)
    with NodeProcess(tmp_path, "attic", Head(tmp_path)) as node:
        for windows, expected in (
            ("attic", "is not NAME=LAYERS"),
            ("attic=3,head=²", "is not NAME=LAYERS"),
            ("attic=3/4,head=1", "no more on the GPU"),
            ("attic=1,head=1", "have 2 layers"),
            ("head=2,attic=2", "end with"),
            (
                "cellar=3,head=1",
                "no node is named cellar, which the windows 'cellar=3,head=1' name; there are attic, head",
            ),
        ):
            flags = ("--cluster", "--peer", f"127.0.0.1:{node.port}", "--windows", windows)
            assert expected in run("solve", "x", "--model", model, *flags, code=1)[1], windows


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


@pytest.mark.parametrize("is_disk_allowed", [True, False])
def test_a_model_that_this_machine_alone_has_to_read_from_disk_is_opened_so(tmp_path, monkeypatch, is_disk_allowed):
    path = write_model(tmp_path / "tiny.gguf", n_layers=4)
    file = ModelFile(path)
    costs = model_costs(file, 256, "f16", "f32")
    n_bytes = costs.needed_bytes + costs.scratch_bytes - sum(costs.layer_bytes) // 2
    device = Device("head", n_bytes, {"F32": 1e9}, {"F32": 1e9}, 1e9, disk_sequential=1e9)
    monkeypatch.setattr("localreason.cli.ring.find_nodes", lambda *_: [])
    monkeypatch.setattr("localreason.cli.ring.measure_machines", lambda *_: ([device], Links()))
    settings = {"disk": is_disk_allowed, "cluster_folder": str(tmp_path), "cluster_cache": str(tmp_path / "cache")}
    with contextlib.closing(open_ring(path, EngineOptions(256, 1, 1), load(settings)).engine) as engine:
        assert isinstance(engine, RingEngine) == is_disk_allowed
        if isinstance(engine, RingEngine):
            assert engine.placement.is_disk_used
        assert engine.decode([Span(0, 0, [1], 1)]).shape == (1, engine.n_vocab)


@pytest.mark.parametrize("types", [(), ("Q4_K",)])
def test_a_silent_machine_is_not_asked_once_for_each_pairing_nor_called_distrustful(tmp_path, monkeypatch, types):
    monkeypatch.setattr("localreason.cluster.member._CALL_SECONDS", 1.0)
    laptop = Head(tmp_path)
    for name in ("attic", "desk", "phone"):
        Peers(laptop.folder).add(Identity.load(tmp_path / name, name).certificate)
    describe, asked = Member.describe, []

    async def noted(member, *arguments):
        asked.append(member.name)
        return await describe(member, *arguments)

    monkeypatch.setattr(Member, "describe", noted)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        [seen] = asyncio.run(Home(laptop.folder).survey(0, [f"127.0.0.1:{silent.getsockname()[1]}"], types))
    assert seen.problem.startswith("did not answer in time")
    assert len(asked) == 2, "one call, and a look at whether it speaks without encryption"


def test_a_doctor_who_cannot_measure_still_looks_at_the_network(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOCALREASON_CLUSTER_CACHE", str(tmp_path / "file"))
    out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert [(row["what"], row["ok"]) for row in report["machine"]] == [("cache", False)]
    assert "LOCALREASON_CLUSTER_CACHE" in report["machine"][0]["found"]
    assert "addresses" in [row["what"] for row in report["network"]]


def test_a_code_that_is_none_does_not_count_as_an_attempt(run):
    _, told = run("cluster", "pair", "127.0.0.1:1", "--code", "abc", code=ExitCode.INPUT)
    assert "--code is 'abc'; give the six digits that the node shows" in told


def test_what_is_for_a_ring_only_is_refused_without_one(run):
    for flag in (
        ["--peer", "x"],
        ["--windows", "a=1,head=1"],
        ["--rounds", "2"],
        ["--objective", "prefill"],
        ["--disk"],
    ):
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


def test_a_node_without_encryption_is_told_from_one_that_is_not_paired(run, tmp_path):
    with NodeProcess(tmp_path, "attic", None, "--plaintext") as node:
        said = run("cluster", "list", "--peer", f"127.0.0.1:{node.port}")[0]
    assert "speaks without encryption: start it without --plaintext" in said
    assert "pair" not in said
