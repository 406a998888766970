"""This machine's place in the home: who it is, whom it trusts, what it keeps, and which nodes it can use now."""

import asyncio
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from ..runtime.errors import InputError
from .codec import PROTOCOL
from .discovery import Found, browse, parse_peer, usability, write_peer
from .errors import ClusterError
from .gate import LOOPBACK, PlainGate, TlsGate
from .identity import MOST_NAME, OFF_DATE, Identity, Peer, Peers, off_date, shown
from .link import LinkBook
from .member import OTHER_PROTOCOL, STRANGER, UNTRUSTED, Address, Member
from .store import Store
from .wire import ring_pb2 as wire

MOST_CLOCK_SECONDS = 86_400
"""Certificates are valid from a day before they were made."""
_LIMIT_SHARE = 0.5
_PLAIN_THERE = "speaks without encryption: start it without --plaintext, or set LOCALREASON_PLAINTEXT=1 here, for tests"
_BUSY = "is busy with"
_REFUSED = "refuses this machine, which"
_AGAIN_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Seen:
    """A node that was found or named; `problem` says why it cannot be used, and is empty where it can."""

    name: str
    id: str
    address: Address | None
    problem: str = ""
    reply: wire.DescribeReply | None = None
    clock_seconds: float = 0.0
    """How far its clock is ahead of this machine's, where there is a reply."""

    @property
    def is_busy(self) -> bool:
        """True for a node that another head has now and that could be used otherwise."""
        return self.problem.startswith(_BUSY)


class Home:
    """Identity, peers and caches in two folders of the user's."""

    def __init__(
        self,
        folder: Path | None = None,
        cache: Path | None = None,
        is_plain: bool = False,
        limit_bytes: int | None = None,
        name: str | None = None,
    ) -> None:
        """`is_plain` does without encryption, on loopback only. Raises ClusterError."""
        self.identity = Identity.load(folder, name)
        self.peers = Peers(folder)
        self.is_plain = is_plain
        self.gate: TlsGate | PlainGate = PlainGate() if is_plain else TlsGate(self.identity, self.peers)
        self.cache = cache or platformdirs.user_cache_path("localreason", appauthor=False) / "windows"
        self._limit_bytes = limit_bytes

    def store(self, models: Sequence[Path] = ()) -> Store:
        """The window files of this machine; half of what is free without them at most where no limit is set."""
        near = next(path for path in (self.cache, *self.cache.parents) if path.exists())
        held = sum(size for _, size, _ in Store(self.cache, 0).entries())
        limit = self._limit_bytes or int(_LIMIT_SHARE * (shutil.disk_usage(near).free + held))
        return Store(self.cache, limit, models)

    def links(self) -> LinkBook:
        """What nodes found of the links between them."""
        return LinkBook(self.cache / "links.json")

    async def survey(
        self,
        seconds: float,
        named: Sequence[str] = (),
        types: Sequence[str] = (),
        tell: Callable[[str], None] = lambda text: None,
        is_brief: bool = False,
    ) -> list[Seen]:
        """Nodes that announce themselves within `seconds` and those that are named as host:port, each asked who it is.

        `types` of weights ask for a profile too, which takes seconds the first time. `tell` is given why nobody was
        looked for, where nobody is named. A brief survey looks no longer than until all paired machines were met.
        Raises InputError for a name that is no address.
        """
        paired = {peer.id for peer in self.peers.list()}
        targets = [parse_peer(text) for text in named]
        asking = [asyncio.create_task(self._ask_named(host, port, list(types))) for host, port in targets]
        looking = asyncio.create_task(self._look(seconds, paired if is_brief else (), None if named else tell))
        try:
            met = {one.id for one in await asyncio.gather(*asking) if not one.problem} if is_brief else set()
            found = [] if paired and paired <= met else await looking
            seen = await asyncio.gather(*(self._ask_found(other, list(types)) for other in found), *asking)
        finally:
            for task in (looking, *asking):
                task.cancel()
            await asyncio.gather(looking, *asking, return_exceptions=True)
        first: dict[str, Seen] = {}
        for one in seen:  # one that was both found and named, the usable of the two
            if one.id not in first or first[one.id].problem:
                first[one.id] = one
        # A stranger that gives itself the name of a paired machine takes none away.
        ours = _told_apart([one for one in first.values() if one.id in paired])
        others = _told_apart([one for one in first.values() if one.id not in paired], {one.name for one in ours})
        return sorted([*ours, *others], key=lambda one: one.name)

    async def _look(self, seconds: float, wanted: Collection[str], tell: Callable[[str], None] | None) -> list[Found]:
        """What announces itself; where nothing can be heard, those that are named may be reached all the same."""
        try:
            found = [] if self.is_plain or not seconds else await browse(seconds, wanted=wanted)
        except ClusterError as error:
            if tell is not None:
                tell(str(error))
            return []
        return [other for other in found if other.id != self.identity.id]

    async def await_free(self, seen: Sequence[Seen], seconds: float, types: Sequence[str] = ()) -> list[Seen]:
        """The nodes of a survey, those that are busy asked again until they are free, for `seconds` at most."""
        return list(await asyncio.gather(*(self._await_free(one, seconds, list(types)) for one in seen)))

    async def _await_free(self, one: Seen, seconds: float, types: list[str]) -> Seen:
        end = time.monotonic() + seconds
        name, address = one.name, one.address
        while one.is_busy and address is not None and time.monotonic() < end:
            await asyncio.sleep(_AGAIN_SECONDS)
            one = await self._ask(address, one.id, [])  # a node that computes for another head is not measured
            if types and not one.problem:
                one = await self._ask(address, one.id, types)
        return replace(one, name=name)

    async def _ask_found(self, found: Found, types: list[str]) -> Seen:
        problem = usability(found, PROTOCOL, self.peers.list(), self.identity.id)
        if problem is not None:
            return Seen(found.name, found.id, None, problem)
        peer = next(peer for peer in self.peers.list() if peer.id == found.id)
        problem = "announces no address that can be reached"
        hosts = found.addresses
        addresses = [
            # The zone of a link-local address is this machine's.
            Address(peer.name, host, found.port, peer.certificate.decode(), tuple(h for h in hosts if "%" not in h))
            for host in hosts
        ]
        # Anybody can announce addresses that swallow what is sent: all are asked at once, without the slow profile.
        asking = [asyncio.create_task(self._ask(address, found.id, [])) for address in addresses]
        try:
            for answered in asyncio.as_completed(asking):
                seen = await answered
                if seen.reply is not None and seen.address is not None:
                    return await self._ask(seen.address, found.id, types) if types else seen
                problem = problem if UNTRUSTED in problem else seen.problem
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return Seen(found.name, found.id, None, problem)

    async def _ask_named(self, host: str, port: int, types: list[str]) -> Seen:
        label = write_peer(host, port)
        if self.is_plain:
            seen = await self._ask(Address(label, host, port), label, types)
            if seen.reply is None:
                return seen
            name = shown(seen.reply.name, MOST_NAME)
            return Seen(name, label, Address(name, host, port), seen.problem, seen.reply, seen.clock_seconds)
        problem = f"is not paired: run `localreason cluster pair {shlex.quote(label)}`"
        for peer in sorted(self.peers.list(), key=lambda peer: _host(peer) != host):
            seen = await self._ask(Address(peer.name, host, port, peer.certificate.decode()), peer.id, types)
            known = (UNTRUSTED, OTHER_PROTOCOL, _REFUSED)
            if seen.reply is not None or any(words in seen.problem for words in known):
                return seen
            if seen.problem.startswith(OFF_DATE):
                problem = f"may be {peer.name}, which {seen.problem}"
            elif STRANGER not in seen.problem:
                problem = seen.problem.removeprefix(f"at {label} ")
                break  # whoever it is, it does not answer the next one either
        if host in LOOPBACK and await self._is_plain_there(Address(label, host, port)):
            problem = _PLAIN_THERE
        return Seen(label, label, None, problem)

    @staticmethod
    async def _is_plain_there(address: Address) -> bool:
        """Whether a node for tests listens, which cannot be paired."""
        async with Member(address, PlainGate()) as member:
            try:
                await member.describe()
            except ClusterError:
                return False
            return True

    async def _ask(self, address: Address, id: str, types: list[str]) -> Seen:
        try:
            async with Member(address, self.gate) as member:
                reply = await member.describe()
                if types:  # which has a long deadline, so who does not answer is found out before
                    reply = await member.describe(types)
        except ClusterError as error:
            problem = str(error).removeprefix(address.name).strip()
            # TLS says no more of a date than of a certificate that is another's.
            if STRANGER in problem:
                problem = off_date(address.certificate.encode()) or problem
            elif UNTRUSTED in problem and (off := off_date(self.identity.certificate)):
                problem = f"{_REFUSED} {off}"
            return Seen(address.name, id, address, problem)
        problem = ""
        off = reply.unix_seconds - time.time()
        if abs(off) > MOST_CLOCK_SECONDS:
            problem = f"has a clock that is off by {off / 3600:.0f} hours; set it"
        elif reply.held_by:
            problem = f"{_BUSY} {shown(reply.held_by, MOST_NAME)}"
        return Seen(address.name, id, address, problem, reply, off)


def _told_apart(seen: Sequence[Seen], taken: Collection[str] = ()) -> list[Seen]:
    """Nodes by names of their own, for a ring tells them apart by these, and "head" is this machine: a name that is
    taken, or that several have, is followed by so much of the id as it needs."""
    names = [one.name for one in seen]
    used = {"head", *taken}

    def own(one: Seen) -> str:
        if one.name not in used and names.count(one.name) == 1:
            return one.name
        others = [other.id for other in seen if other.name == one.name and other.id != one.id]
        for n in range(4, len(one.id)):
            name = f"{one.name}-{one.id[:n]}"
            if not any(id.startswith(one.id[:n]) for id in others) and name not in used and name not in names:
                return name
        return f"{one.name}-{one.id}"

    return [replace(one, name=own(one)) for one in seen]


def _host(peer: Peer) -> str:
    """Where a machine was met, "" where that is not known."""
    try:
        return parse_peer(peer.address)[0]
    except InputError:
        return ""
