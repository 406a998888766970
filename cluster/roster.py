"""Which nodes of a ring are there: a lost one is looked after until it answers again."""

import asyncio
import contextlib
from collections.abc import Callable

from .background import Background
from .errors import ClusterError
from .member import Address, Dialer, Member

_RETRY_SECONDS = 5.0


class Roster:
    """Names and addresses. Methods are called by the head's thread; lost nodes are looked after on the loop."""

    def __init__(
        self, addresses: list[Address], dialer: Dialer, background: Background, tell: Callable[[str], None]
    ) -> None:
        self.addresses = {address.name: address for address in addresses}
        self._dialer, self._background, self._tell = dialer, background, tell
        self._absent: set[str] = set()
        self._returned: set[str] = set()
        self._watch: asyncio.Task[None] | None = None

    @property
    def present(self) -> list[str]:
        """Names of the nodes that a ring may be formed of."""
        return [name for name in self.addresses if name not in self._absent]

    @property
    def has_returned(self) -> bool:
        """True where a lost node answers again."""
        return bool(self._returned)

    def lose(self, name: str, why: str) -> None:
        """Do without a node from now on."""
        self._tell(f"{name} is lost: {why}")
        self._absent.add(name)
        self._background.call(self._look)

    def readmit(self) -> None:
        """Count those that answer again among those that are there."""
        self._tell(f"back again: {', '.join(sorted(self._returned))}")
        self._absent -= self._returned
        self._returned.clear()

    def _look(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._await_return())

    async def _await_return(self) -> None:
        while self._absent - self._returned:
            await asyncio.sleep(_RETRY_SECONDS)
            for name in self._absent - self._returned:
                member = Member(self.addresses[name], self._dialer)
                with contextlib.suppress(ClusterError):
                    if not (await member.describe()).held_by:
                        self._returned.add(name)
                        self._tell(f"{name} answers again and is used for the next request")
                await member.release()
