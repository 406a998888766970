"""A connection to the server: closed where it keeps its place and asks for nothing."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def make_protocol(header_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol whose connections are closed after `header_seconds` without a complete request header, be it
    the first one or one that follows a reply. uvicorn itself waits for ever for the first, and for a later one once a
    byte has come, and a thousand such connections take all places before any key is looked at."""

    class Connection(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            """Let the deadline run exactly while no request is under way; what is left of a body does not count."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._deadline is None and not self.transport.is_closing():
                self._deadline = self.loop.call_later(header_seconds, self.transport.close)

        def _stop(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection
