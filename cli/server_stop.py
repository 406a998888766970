"""uvicorn, which starts the decode thread in its event loop and stops in order: no new requests, then a deadline."""

import asyncio
import socket

import uvicorn

from .server_app import Access, make_app
from .server_connection import make_protocol
from .server_runner import Runner
from .server_schema import Limits

_N_CONNECTIONS = 1024
_FLUSH_SECONDS = 5
"""After the deadline, for the ends of replies to be written."""


class Server(uvicorn.Server):
    """One runner's server. What runs when it is told to stop has `grace_seconds` to end and is then cancelled; its
    readers get what there is, with an ordinary end."""

    def __init__(self, runner: Runner, limits: Limits, access: Access, grace_seconds: float = 10.0) -> None:
        super().__init__(
            uvicorn.Config(
                make_app(runner, limits, access),
                http=make_protocol(access.header_seconds),
                lifespan="off",
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=_N_CONNECTIONS,
                timeout_graceful_shutdown=round(grace_seconds) + _FLUSH_SECONDS,
            )
        )
        self.runner = runner
        self._grace_seconds = grace_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.runner.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.runner.close()
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(self._grace_seconds, self.runner.cancel_all, "shutdown")
        await super().shutdown(sockets)
        deadline.cancel()
        await asyncio.to_thread(self.runner.stop)
