"""Which nodes of a ring are there: a lost one is looked after until it answers again."""

import asyncio
import math
import threading
import time
from collections.abc import Callable

from .background import Background
from .errors import ClusterError
from .member import Address, Dialer, Member

_RETRY_SECONDS, _LONGEST_SECONDS = 5.0, 600.0
_SOON_SECONDS = 60.0
"""A node that is lost again so soon after its return has a lasting fault and is left out for longer each time."""


class Roster:
    """Names and addresses. Methods are called by the head's thread; lost nodes are looked after on the loop."""

    def __init__(
        self, addresses: list[Address], dialer: Dialer, background: Background, tell: Callable[[str], None]
    ) -> None:
        self.addresses = {address.name: address for address in addresses}
        self._dialer, self._background, self._tell = dialer, background, tell
        self._absent: set[str] = set()
        self._returned: set[str] = set()
        self._change = threading.Condition()
        """Of who has returned, which the loop notes."""
        self._is_vain = False
        """True where a return was waited for in vain, until another loss."""
        self._back: dict[str, float] = {}
        """When a node came back."""
        self._pauses: dict[str, float] = {}
        self._due: dict[str, float] = {}
        """How long and until when a node is left out."""
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
        is_again = time.monotonic() - self._back.get(name, -math.inf) < _SOON_SECONDS
        pause = min(_LONGEST_SECONDS, 2 * self._pauses[name]) if is_again else _RETRY_SECONDS
        self._pauses[name], self._due[name] = pause, time.monotonic() + pause - _RETRY_SECONDS
        self._absent.add(name)
        self._is_vain = False
        self._background.call(self._look)

    def await_return(self, seconds: float) -> bool:
        """Whether a lost node answers again in time; then it counts among those that are there. After a wait in vain
        the next questions are not kept waiting too."""
        if not self._absent or self._is_vain:
            return False
        self._tell(f"the model does not fit without {', '.join(sorted(self._absent))}; waiting for {seconds:.0f} s")
        with self._change:
            self._is_vain = not self._change.wait_for(lambda: self.has_returned, seconds)
        if not self._is_vain:
            self.readmit()
        return not self._is_vain

    def readmit(self) -> None:
        """Count those that answer again among those that are there."""
        with self._change:
            returned, self._returned = self._returned, set()
        self._tell(f"back again: {', '.join(sorted(returned))}")
        self._absent -= returned
        self._back |= dict.fromkeys(returned, time.monotonic())

    def _look(self) -> None:
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._await_return())

    async def _await_return(self) -> None:
        while self._absent:
            await asyncio.sleep(_RETRY_SECONDS)
            for name in list(self._absent):
                if time.monotonic() < self._due[name]:
                    continue
                is_free = await self._is_free(name)
                with self._change:
                    is_new = is_free and name in self._absent and name not in self._returned
                    if is_new:
                        self._returned.add(name)
                        self._change.notify_all()
                    elif not is_free or name not in self._absent:  # another head may have it by now, or it went again
                        self._returned.discard(name)
                if is_new:
                    self._tell(f"{name} answers again and is used for the next request")

    async def _is_free(self, name: str) -> bool:
        try:
            async with Member(self.addresses[name], self._dialer) as member:
                return not (await member.describe()).held_by
        except ClusterError:
            return False
