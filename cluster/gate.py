"""Who may speak: mutual TLS with pinned certificates, or plain text where a person asked for it."""

from typing import Any

import grpc

from .discovery import write_peer
from .errors import ClusterError, ProtocolError
from .identity import Identity, Peers, channel_credentials, channel_options, fingerprint, server_credentials
from .node import OPTIONS

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class TlsGate:
    """Admits paired machines, and for the length of a session those that a paired head introduced."""

    def __init__(self, identity: Identity, peers: Peers) -> None:
        self._identity = identity
        self._peers = peers
        self._introduced: dict[str, bytes] = {}

    def caller(self, context: Any) -> str | None:
        """The fingerprint of the caller's certificate; None where it is neither paired nor introduced any more."""
        try:
            found = fingerprint((context.auth_context().get("x509_pem_cert") or [b""])[0])
            return found if found in self._introduced or self.is_paired(found) else None
        except ProtocolError:
            return None

    def is_paired(self, caller: str) -> bool:
        return caller in map(fingerprint, self._peers.certificates())

    def introduce(self, certificates: list[str]) -> frozenset[str]:
        """Trust these for Flow in place of those before. Raises ProtocolError for what is no certificate."""
        self._introduced = {fingerprint(text.encode()): text.encode() for text in certificates}
        return frozenset(self._introduced)

    def channel(self, host: str, port: int, certificate: str) -> grpc.aio.Channel:
        pem = certificate.encode()
        options = [*OPTIONS, *channel_options(pem)]
        return grpc.aio.secure_channel(target(host, port), channel_credentials(self._identity, pem), options=options)

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Listen; the port that was taken."""
        credentials = server_credentials(self._identity, self._trusted)
        return server.add_secure_port(target(host, port), credentials)

    def _trusted(self) -> list[bytes]:
        return [*self._peers.certificates(), *self._introduced.values()]


class PlainGate:
    """No encryption and no identity: for tests and benchmarks on one machine, and only by an explicit flag."""

    def caller(self, context: Any) -> str | None:
        return ""

    def is_paired(self, caller: str) -> bool:
        return True

    def introduce(self, certificates: list[str]) -> frozenset[str]:
        return frozenset()

    def channel(self, host: str, port: int, certificate: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(target(host, port), options=OPTIONS)

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Listen; the port that was taken."""
        if host not in LOOPBACK:
            raise ClusterError(f"plain text is possible on this machine only, not on {host}; leave --plaintext out")
        return server.add_insecure_port(target(host, port))


def target(host: str, port: int) -> str:
    """Host and port as gRPC reads them: as a URI, in which the % before a zone is escaped."""
    return write_peer(host.replace("%", "%25"), port)
