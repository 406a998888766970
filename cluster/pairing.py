"""Pairing: two machines come to trust each other's certificates by a short code that a person carries over.

    head                                        node
    version, name                    ->
                                     <-         version, certificate, SPAKE2 message; the code is shown on the node
    certificate, SPAKE2 message, proof  ->      (the person types the code on the head)
                                     <-         proof

The certificates go in clear: a proof is an HMAC under the agreed key over both of them, so nobody can swap one. Who
does not know the code gets one guess at it, on either side, and learns nothing that could be tried out afterwards.
"""

import asyncio
import contextlib
import hmac
import math
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from spake2 import SPAKE2_A, SPAKE2_B

from .discovery import write_peer
from .errors import ClusterError, PairingFailed, ProtocolError
from .handshake import (
    IDS,
    LINE_SECONDS,
    MOST_LINE_BYTES,
    VERSION,
    Line,
    agree,
    listen,
    prove,
    read_certificate,
    read_hex,
    read_message,
)
from .identity import Identity, Peer, Peers, is_name, off_date, peer_name

_MOST_CONNECTIONS = 4
_CODE_SECONDS = 120.0
_MOST_WAIT_SECONDS = 3600.0
"""A node runs for months, and each failure is a guess at one of a million codes: 24 a day at most."""
_N_TRIES = 3
_MOST_SHOWN = 20
_REASONS = {
    "version": "the other side speaks pairing version {version}, this one {ours}: update localreason on the older one",
    "busy": "the other side is pairing with another machine; try again in a minute",
    "wait": "the last pairing there failed, and it waits before it shows a new code; try again in {seconds} s, or "
    "start the node there anew",
    "expired": "the code is not valid any more; run the command again for a new one",
    "code": "the code is wrong, or somebody sits between the two machines; run the command again for a new code",
    "clock": "this machine's certificate does not hold by the clock there; set the clock that is wrong, delete "
    "identity.pem here if it was made by such a clock, and run the command again",
    "stopped": "the other side stopped pairing; start the node there and run the command again",
    "broken": "the other side could not read what it was sent; update localreason on both",
    "storing": "the other side could not store this machine; free space there and run the command again",
}


class _Refused(Exception):
    """The node says no, by a word of _REASONS."""

    def __init__(self, word: str, **numbers: int) -> None:
        super().__init__(word)
        self.answer = {"version": VERSION, "error": word, **numbers}


class PairingServer:
    """Lets heads pair with this node. `show` is given what the person at the node must read."""

    def __init__(
        self,
        identity: Identity,
        peers: Peers,
        show: Callable[[str], None],
        code_seconds: float = _CODE_SECONDS,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity, self._peers, self._show = identity, peers, show
        self._code_seconds, self._line_seconds, self._clock = code_seconds, line_seconds, clock
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_pairing = False
        self._n_failed = 0
        self._next_code_at = float("-inf")

    async def start(self, hosts: list[str], port: int) -> int:
        """Listen on all hosts at one port, 0 for any that is free; the port. Addresses of a kind that this machine does
        not have are passed over. Raises PairingFailed."""
        try:
            for listening in listen(hosts, port):
                self._servers.append(await asyncio.start_server(self._accept, sock=listening, limit=MOST_LINE_BYTES))
        except (OSError, OverflowError) as error:
            await self.stop()
            reason = getattr(error, "strerror", None) or str(error)
            raise PairingFailed(
                f"pairing cannot listen at port {port}, one above the node's: {reason}; give the node another --port"
            ) from error
        return self._servers[0].sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Hang up and listen no more; stopping twice does nothing."""
        for server in self._servers:
            server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()
        self._servers.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(Line(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, line: Line) -> None:
        try:
            if len(self._tasks) > _MOST_CONNECTIONS:
                raise _Refused("busy")
            await self._meet(line)
        except _Refused as refusal:
            with contextlib.suppress(ProtocolError, TimeoutError):
                await line.send(refusal.answer)
        except (ProtocolError, TimeoutError):
            with contextlib.suppress(ProtocolError, TimeoutError):
                await line.send(_Refused("broken").answer)
        except asyncio.CancelledError:
            with contextlib.suppress(ProtocolError, TimeoutError):
                await line.send(_Refused("stopped").answer)
            raise
        finally:
            await line.close()

    async def _meet(self, line: Line) -> None:
        async with asyncio.timeout(self._line_seconds):
            knock = await line.receive()
        if knock.get("version") != VERSION:
            raise _Refused("version")
        name = knock.get("name")
        if not isinstance(name, str) or not is_name(name):
            raise _Refused("broken")
        wait = self._next_code_at - self._clock()
        if wait > 0:
            raise _Refused("wait", seconds=math.ceil(wait))
        if self._is_pairing:
            raise _Refused("busy")
        self._is_pairing = True
        try:
            peer = await self._try_code(line, name)
        except Exception:
            # A code that was shown in vain counts, whatever the reason: else codes could be had without end.
            self._next_code_at = self._clock() + min(_MOST_WAIT_SECONDS, 2.0 ** min(self._n_failed, 16))
            self._n_failed += 1
            self._show(f"pairing with {_quoted(name)} failed")
            raise
        finally:
            self._is_pairing = False
        self._n_failed = 0
        self._show(f"paired with {peer.name}")

    async def _try_code(self, line: Line, name: str) -> Peer:
        """One code, one attempt."""
        code = f"{secrets.randbelow(10**6):06}"
        side = SPAKE2_B(code.encode(), **IDS)
        ours = side.start()
        pem = self._identity.certificate
        answer = {"version": VERSION, "certificate": pem.decode(), "message": ours.hex()}
        await line.send(answer)
        # The code first: nobody has proven the name, and it may read like another code.
        shown = f"code {code[:3]} {code[3:]} (valid {self._code_seconds:g} s)"
        self._show(f"{shown}, asked for by a machine that calls itself {_quoted(name)}")
        try:
            async with asyncio.timeout(self._code_seconds):
                reply = await line.receive()
        except TimeoutError:
            raise _Refused("expired") from None
        theirs, certificate, proof = read_message(reply), read_certificate(reply), read_hex(reply, "proof", 32)
        key = agree(side, theirs)
        messages, certificates = (theirs, ours), (certificate, pem)
        if not hmac.compare_digest(proof, prove(key, "head", messages, certificates)):
            raise _Refused("code")
        if off := off_date(certificate):
            self._show(f"{_quoted(name)} {off}")
            raise _Refused("clock")
        try:
            peer = self._peers.add(certificate)
        except ClusterError as error:
            self._show(str(error))
            raise _Refused("storing") from error
        with contextlib.suppress(ProtocolError, TimeoutError):  # that side knew the code; if it is gone, it comes again
            await line.send({"version": VERSION, "proof": prove(key, "node", messages, certificates).hex()})
        return peer


def _quoted(name: str) -> str:
    """A name that nobody has proven, so that it cannot be taken for more than a name."""
    return repr(name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}…")


async def pair(
    host: str, port: int, identity: Identity, peers: Peers, ask_code: Callable[[str], str], timeout: float = 150.0
) -> Peer:
    """Pair with the node at this address; `ask_code` may block, for it runs in a thread. Raises PairingFailed."""
    where = write_peer(host, port)
    try:
        async with asyncio.timeout(min(LINE_SECONDS, timeout)):
            line = Line(*await asyncio.open_connection(host, port, limit=MOST_LINE_BYTES))
    except (OSError, TimeoutError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise PairingFailed(
            f"{where} cannot be reached: {reason}; start the node there, and check its firewall"
        ) from error
    try:
        async with asyncio.timeout(timeout):
            certificate = await _introduce(line, identity, ask_code)
        return peers.add(certificate, where)
    except TimeoutError as error:
        raise PairingFailed(f"{where} was not paired within {timeout:g} s; run the command again") from error
    except ProtocolError as error:
        raise PairingFailed(f"{where} was not paired: {error}") from error
    finally:
        await line.close()


async def _introduce(line: Line, identity: Identity, ask_code: Callable[[str], str]) -> bytes:
    """The node's certificate, proven."""
    await line.send({"version": VERSION, "name": identity.name})
    try:
        async with asyncio.timeout(LINE_SECONDS):
            hello = await _answer(line)
    except TimeoutError as error:
        raise ProtocolError(f"there was no answer in {LINE_SECONDS:g} s; check the port") from error
    theirs, certificate = read_message(hello), read_certificate(hello)
    if off := off_date(certificate):
        raise ProtocolError(f"{_quoted(peer_name(certificate))} {off}")
    asked = asyncio.ensure_future(_ask(ask_code, f"Code shown on {peer_name(certificate)}: "))
    answered = asyncio.ensure_future(_answer(line))  # at once: the node may give up while the person types
    try:
        await asyncio.wait({asked, answered}, return_when=asyncio.FIRST_COMPLETED)
        if not asked.done():
            await answered
            raise ProtocolError("the other side did not wait for the code; update localreason on both")
        side = SPAKE2_A((await asked).encode(), **IDS)
        ours = side.start()
        key = agree(side, theirs)
        messages, certificates = (ours, theirs), (identity.certificate, certificate)
        proof = prove(key, "head", messages, certificates).hex()
        with contextlib.suppress(ProtocolError):  # its last line tells why it hung up
            await line.send({"message": ours.hex(), "certificate": identity.certificate.decode(), "proof": proof})
        proof = read_hex(await answered, "proof", 32)
    finally:
        asked.cancel()
        answered.cancel()
        await asyncio.gather(asked, answered, return_exceptions=True)
    if not hmac.compare_digest(proof, prove(key, "node", messages, certificates)):
        raise ProtocolError(_REASONS["code"])
    return certificate


async def _answer(line: Line) -> dict[str, Any]:
    """What the node says, if it is not a refusal; of that only known words are shown."""
    value = await line.receive()
    version, word, seconds = value.get("version"), value.get("error"), value.get("seconds")
    if version != VERSION:
        word, version = "version", version if isinstance(version, int) and abs(version) < 10**6 else "unknown"
    if word is not None:
        seconds = min(seconds, int(_MOST_WAIT_SECONDS)) if isinstance(seconds, int) else "a few"
        reason = _REASONS.get(str(word), "the other side refused; update localreason on both")
        raise ProtocolError(reason.format(version=version, ours=VERSION, seconds=seconds))
    return value


def is_code(text: str) -> bool:
    """True for six digits, as a person may group them."""
    return len(code := _digits(text)) == 6 and code.isascii() and code.isdigit()


def _digits(text: str) -> str:
    return "".join(text.replace("-", " ").split())


async def _ask(ask_code: Callable[[str], str], prompt: str) -> str:
    """Six digits from the person. A slip in typing is asked again: only a code that is sent counts as an attempt."""
    for _ in range(_N_TRIES):
        text = await _in_thread(ask_code, prompt)
        if is_code(text):
            return _digits(text)
        prompt = "The code has six digits, e.g. 492 817: "
    raise ProtocolError(f"no code of six digits was given in {_N_TRIES} tries; run the command again")


async def _in_thread(ask_code: Callable[[str], str], prompt: str) -> str:
    """Like asyncio.to_thread, but a thread that waits for the keyboard does not hold up the end of the program."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()

    def settle(text: str, error: BaseException | None) -> None:
        if future.done():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(text)

    def run() -> None:
        text, error = "", None
        try:
            text = ask_code(prompt)
        except EOFError:
            error = ProtocolError("no code was given; run the command again")
        except BaseException as caught:  # handed on to the caller, whatever it is
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, text, error)

    threading.Thread(target=run, name="localreason code", daemon=True).start()
    return await future
