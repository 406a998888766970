"""The lines and proofs of pairing; in what order they go is the matter of pairing.py."""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import json
import socket
from collections.abc import Sequence
from typing import Any

from spake2 import SPAKE2_A, SPAKE2_B, SPAKEError
from spake2.ed25519_basic import NotOnCurve

from .errors import ProtocolError
from .identity import check_certificate, fingerprint

VERSION = 1
MOST_LINE_BYTES = 8192
LINE_SECONDS = 10.0
_NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
"""How a machine without IPv6, or without IPv4, refuses an address of it."""
IDS = {"idA": b"localreason head", "idB": b"localreason node"}


class Line:
    """A connection of one JSON object a line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def receive(self) -> dict[str, Any]:
        """The next object. Raises ProtocolError for anything else, and where the other side hangs up."""
        try:
            value = json.loads(await self._reader.readuntil(b"\n"))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ProtocolError("the other side hung up; run the command again") from error
        except (asyncio.LimitOverrunError, ValueError, RecursionError) as error:
            raise ProtocolError(f"the other side sent no JSON line of at most {MOST_LINE_BYTES} bytes") from error
        if not isinstance(value, dict):
            raise ProtocolError("the other side sent JSON that is not an object; update localreason on both")
        return value

    async def send(self, value: dict[str, Any]) -> None:
        """Raises ProtocolError, TimeoutError."""
        try:
            async with asyncio.timeout(LINE_SECONDS):
                self._writer.write(json.dumps(value).encode() + b"\n")
                await self._writer.drain()
        except ConnectionError as error:
            raise ProtocolError("the other side hung up; run the command again") from error

    async def close(self) -> None:
        """Say no more; what was sent is still delivered."""
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1):
                await self._writer.wait_closed()


def listen(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """Sockets at one port, 0 for any that is free, for those addresses that this machine can have: one for :: takes no
    IPv4. Raises OSError, OverflowError where none can be had or the port is taken."""
    missing: OSError | None = None
    with contextlib.ExitStack() as stack:
        found: list[socket.socket] = []
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                found.append(stack.enter_context(socket.create_server((host, port), family=family)))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
                continue
            port = port or found[0].getsockname()[1]
        if not found and missing is not None:
            raise missing
        stack.pop_all()
    return found


def agree(side: SPAKE2_A | SPAKE2_B, message: bytes) -> bytes:
    """The key that follows from both messages. Raises ProtocolError."""
    try:
        return side.finish(message)
    except (SPAKEError, NotOnCurve, ValueError) as error:
        raise ProtocolError("the other side's SPAKE2 message is not sound; update localreason on both") from error


def read_message(value: dict[str, Any]) -> bytes:
    """The SPAKE2 message. Raises ProtocolError."""
    return read_hex(value, "message", 33)


def read_hex(value: dict[str, Any], key: str, n_bytes: int) -> bytes:
    """So many bytes. Raises ProtocolError."""
    try:
        data = bytes.fromhex(value[key])
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the other side sent no {key} in hex; update localreason on both") from error
    if len(data) != n_bytes:
        raise ProtocolError(f"the other side's {key} has {len(data)} bytes, not {n_bytes}; update localreason on both")
    return data


def read_certificate(value: dict[str, Any]) -> bytes:
    """The certificate, checked but not proven. Raises ProtocolError."""
    pem = value.get("certificate")
    if not isinstance(pem, str):
        raise ProtocolError("the other side sent no certificate; update localreason on both")
    return check_certificate(pem.encode("ascii", "replace"))


def prove(key: bytes, role: str, messages: tuple[bytes, bytes], certificates: tuple[bytes, bytes]) -> bytes:
    """What only a holder of the key can say of this exchange. Every part has a fixed length but the first."""
    parts = [f"localreason pairing {VERSION} {role}\0".encode(), *messages]
    parts += [bytes.fromhex(fingerprint(pem)) for pem in certificates]
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()
