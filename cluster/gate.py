"""Who may speak: mutual TLS with pinned certificates, or plain text where a person asked for it."""

from typing import Any

import grpc

from .node import OPTIONS


class PlainGate:
    """No encryption and no identity: for tests and benchmarks on one machine, and only by an explicit flag."""

    def caller(self, context: Any) -> str | None:
        return ""

    def is_paired(self, fingerprint: str) -> bool:
        return True

    def introduce(self, certificates: list[str]) -> frozenset[str]:
        return frozenset()

    def channel(self, host: str, port: int, certificate: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(target(host, port), options=OPTIONS)

    def add_port(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """Listen; the port that was taken."""
        return server.add_insecure_port(target(host, port))


def target(host: str, port: int) -> str:
    """Host and port as gRPC writes them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
