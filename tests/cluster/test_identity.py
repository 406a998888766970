import asyncio
import contextlib
import gc
import json
import multiprocessing
import os
import ssl
import stat
import sys
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from localreason.cluster.errors import ClusterError, ProtocolError
from localreason.cluster.identity import (
    Identity,
    Peers,
    channel_credentials,
    channel_options,
    check_certificate,
    fingerprint,
    peer_id,
    peer_name,
    server_credentials,
)


@pytest.fixture
def machines(tmp_path):
    """Two machines of the same name, which is allowed."""
    return [Identity.load(tmp_path / name, "laptop") for name in ("one", "two")]


def test_an_identity_stays_the_same(tmp_path):
    made = Identity.load(tmp_path / "a" / "b", "büro")
    assert Identity.load(tmp_path / "a" / "b", "another") == made
    assert (made.name, peer_name(made.certificate)) == ("büro", "büro")
    assert made.id == peer_id(made.certificate)
    assert len(made.id) == 16
    assert len(fingerprint(made.certificate)) == 64
    assert "PRIVATE" not in repr(made)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other rights")
def test_the_key_is_readable_for_its_owner_only(tmp_path):
    Identity.load(tmp_path)
    assert stat.S_IMODE((tmp_path / "identity.pem").stat().st_mode) == 0o600


def test_two_processes_make_one_identity(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(Identity.load, [tmp_path, tmp_path], chunksize=1)
    assert one == two


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "ü" * 33, "a\nb", "a\x1b[31m"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(ClusterError, match="give another"):
        Identity.load(tmp_path, name)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:300], lambda data: data[300:]])
def test_a_damaged_identity_names_the_remedy(tmp_path, damage):
    Identity.load(tmp_path)
    file = tmp_path / "identity.pem"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ClusterError, match="delete it and pair again"):
        Identity.load(tmp_path)


def test_a_key_of_another_certificate_is_refused(tmp_path, machines):
    (tmp_path / "identity.pem").write_bytes(machines[0].key + machines[1].certificate)
    with pytest.raises(ClusterError, match="do not belong together"):
        Identity.load(tmp_path)


def forged(name="laptop", host=None, key=None, signer=None, names=None):
    """A certificate that localreason would not make."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name, _validate=False)])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=1))
    if host:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    if names:
        unread = x509.UnrecognizedExtension(x509.OID_SUBJECT_ALTERNATIVE_NAME, names)
        builder = builder.add_extension(unread, critical=False)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def named_by_bits():
    """A certificate whose name is a BIT STRING in place of a text."""
    der = ssl.PEM_cert_to_DER_cert(forged(name="\0bits").decode())
    return ssl.DER_cert_to_PEM_cert(der.replace(b"\x0c\x05\0bits", b"\x03\x05\0bits")).encode()


@pytest.mark.filterwarnings("ignore:Attribute's length")
def test_certificates_from_the_network_are_checked(machines):
    one, two = (machine.certificate for machine in machines)
    assert check_certificate(b"text before is dropped\n" + one) == one
    other_host = f"{machines[0].id}.localreason.internal"
    for bad in (
        b"",
        b"\xff\x00garbage",
        one[:200],
        one + two,
        one + b" " * 4096,
        machines[0].key,
        one.replace(b"M", b"N"),
        forged(),
        forged(host="example.org"),
        forged(host=other_host),
        forged(name="a\x1b[31m"),
        forged(name="x" * 65),
        forged(names=bytes.fromhex("3006a5040c026162")),  # an ediPartyName, which cryptography does not read
        named_by_bits(),
        forged(key=ec.generate_private_key(ec.SECP384R1())),
        forged(signer=ec.generate_private_key(ec.SECP256R1())),
    ):
        with pytest.raises(ProtocolError):
            check_certificate(bad)


@pytest.mark.filterwarnings("ignore")  # of cryptography, about what it reads
def test_random_bytes_never_raise_anything_else(machines):
    pem = machines[0].certificate
    for i in range(len(pem)):
        with contextlib.suppress(ProtocolError):
            check_certificate(pem[:i] + b"A" + pem[i + 1 :])


def test_peers_are_kept_and_removed(tmp_path, machines):
    one, two = machines
    peers = Peers(tmp_path)
    assert peers.list() == ()
    assert peers.certificates() == []
    peers.add(one.certificate, "10.0.0.2:7411")
    peers.add(two.certificate)
    again = Peers(tmp_path)
    assert [peer.id for peer in again.list()] == sorted([one.id, two.id])
    assert again.find(one.id).address == "10.0.0.2:7411"
    with pytest.raises(ClusterError, match=f"2 paired machines are named 'laptop'; give one of the ids.*{one.id}"):
        peers.remove("laptop")
    with pytest.raises(ClusterError, match="no paired machine has the name or id 'tower'; paired are: laptop, laptop"):
        peers.remove("tower")
    assert peers.remove(one.id).id == one.id
    assert peers.remove("laptop").id == two.id
    assert again.list() == ()
    assert stat.S_IMODE((tmp_path / "peers.json").stat().st_mode) & 0o077 == 0 or os.name == "nt"


def test_pairing_again_replaces(tmp_path, machines):
    peers = Peers(tmp_path)
    peers.add(machines[0].certificate, "a:1")
    peers.add(machines[0].certificate, "b:1")
    assert [peer.address for peer in peers.list()] == ["b:1"]


def test_only_sound_certificates_become_peers(tmp_path):
    with pytest.raises(ProtocolError):
        Peers(tmp_path).add(b"garbage")
    assert not (tmp_path / "peers.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"a": 1}', b'{"a": {"certificate": 1}}', b'{"a": {"certificate": ""}}']
)
def test_a_damaged_list_of_peers_names_the_remedy(tmp_path, content):
    (tmp_path / "peers.json").write_bytes(content)
    with pytest.raises(ClusterError, match="delete it and pair again"):
        Peers(tmp_path).list()


def test_a_peer_with_an_edited_certificate_is_not_trusted(tmp_path, machines):
    Peers(tmp_path).add(machines[0].certificate)
    file = tmp_path / "peers.json"
    rows = json.loads(file.read_text("utf-8"))
    rows[machines[0].id]["certificate"] = forged().decode()
    file.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(ClusterError):
        check_certificate(Peers(tmp_path).certificates()[0])


class Echo(grpc.GenericRpcHandler):
    """Answers any call with the id of the caller's certificate."""

    def service(self, call_details):
        return grpc.unary_unary_rpc_method_handler(self.answer)

    async def answer(self, request, context):
        return peer_id(context.auth_context()["x509_pem_cert"][0]).encode()


@contextlib.asynccontextmanager
async def serving(identity, trusted):
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(identity, trusted))
    gc.collect()  # gRPC must hold the credentials and their callback itself
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def call(port, credentials, options):
    """The server's answer, None where the connection is refused."""
    options = [*options, ("grpc.use_local_subchannel_pool", 1)]  # every call a handshake
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options) as channel:
        try:
            return await channel.unary_unary("/x/y")(b"", timeout=5)
        except grpc.aio.AioRpcError as error:
            return None if error.code() is grpc.StatusCode.UNAVAILABLE else error.code()


def knock(port, identity, server):
    return call(port, channel_credentials(identity, server.certificate), channel_options(server.certificate))


def test_paired_machines_talk_in_both_directions(machines):
    async def talk():
        for server, client in (machines, machines[::-1]):
            async with serving(server, lambda client=client: [client.certificate]) as port:
                assert await knock(port, client, server) == client.id.encode()

    asyncio.run(talk())


def test_strangers_are_refused(tmp_path, machines):
    node, head = machines
    stranger = Identity.load(tmp_path / "stranger", "laptop")

    async def talk():
        async with serving(node, lambda: [head.certificate]) as port:
            assert await knock(port, stranger, node) is None
            bare = grpc.ssl_channel_credentials(node.certificate)
            assert await call(port, bare, channel_options(node.certificate)) is None
            assert await knock(port, head, stranger) is None, "the client must refuse another server"
            name = channel_options(stranger.certificate)
            assert await call(port, channel_credentials(head, node.certificate), name) is None
            assert await knock(port, head, node) == head.id.encode()

    asyncio.run(talk())


def test_a_peer_cannot_vouch_for_others(tmp_path, machines):
    node, head = machines
    stranger = Identity.load(tmp_path / "stranger", "laptop")
    signer = serialization.load_pem_private_key(head.key, None)
    key = serialization.load_pem_private_key(stranger.key, None)
    issued = forged(key=key, signer=signer, host=f"{stranger.id}.localreason.internal")
    credentials = grpc.ssl_channel_credentials(node.certificate, stranger.key, issued + head.certificate)

    async def talk():
        async with serving(node, lambda: [head.certificate]) as port:
            assert await call(port, credentials, channel_options(node.certificate)) is None

    asyncio.run(talk())


def test_a_running_server_follows_pairing_and_unpairing(tmp_path, machines):
    node, head = machines
    peers = Peers(tmp_path)

    async def talk():
        async with serving(node, peers.certificates) as port:
            assert await knock(port, head, node) is None, "nobody is trusted yet"
            assert await knock(port, node, node) is None, "not even itself"
            Peers(tmp_path).add(head.certificate)
            assert await knock(port, head, node) == head.id.encode()
            Peers(tmp_path).remove(head.id)
            assert await knock(port, head, node) is None

    asyncio.run(talk())


def test_an_unreadable_list_of_peers_admits_nobody(tmp_path, machines):
    node, head = machines
    peers = Peers(tmp_path)
    peers.add(head.certificate)

    async def talk():
        async with serving(node, peers.certificates) as port:
            assert await knock(port, head, node) == head.id.encode()
            (tmp_path / "peers.json").write_bytes(b"?")
            assert await knock(port, head, node) is None

    asyncio.run(talk())


def test_many_peers_of_one_name_are_told_apart(tmp_path, machines):
    node = machines[0]
    heads = [Identity.load(tmp_path / str(i), "laptop") for i in range(5)]

    async def talk():
        async with serving(node, lambda: [head.certificate for head in heads]) as port:
            for head in heads:
                assert await knock(port, head, node) == head.id.encode()

    asyncio.run(talk())
