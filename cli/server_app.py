"""The server's routes: who may ask, how large a body may be, and how a reply is written and given up."""

import asyncio
import contextlib
import hmac
import ipaddress
import json
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..runtime.errors import ControlError, LocalReasonError, PromptError
from .server_field import Refused, parse_json
from .server_job import Job
from .server_metrics import render_metrics
from .server_reply import DONE, PAUSE, Reply, encode_event, error_body
from .server_runner import Runner
from .server_schema import Limits, Wanted, parse_chat, parse_completion

_N_DROPPED_BYTES = 1 << 20
"""Read beyond the limit and dropped: a client that is still writing when its connection is closed sees no reason."""
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Json(JSONResponse):
    """Escaped to ASCII: half a surrogate pair in a name that a client chose has no UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask, and how much."""

    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    """Names that the Host header may have; empty for any. Keeps web pages out that rebind their own name."""
    origins: tuple[str, ...] = ()
    """Web pages that browsers let read replies; none by default."""
    n_body_bytes: int = 1 << 20
    header_seconds: float = 10.0
    """In which a connection has to send a whole request header, the first one and after each reply."""
    body_seconds: float = 30.0
    """In which a body has to arrive."""
    write_seconds: float = 60.0
    """How long a reader may take no data before its reply is given up."""
    pause_seconds: float = 15.0
    """After which a stream without news says so, lest somebody between takes it for dead."""


def make_app(runner: Runner, limits: Limits, access: Access) -> Starlette:
    """The application over a runner that has been, or will be, started in the same event loop."""
    server = _Server(runner, limits, access)
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.model),
        Route("/v1/requests", server.requests),
        Route("/v1/requests/{id}/answer_now", server.answer_now, methods=["POST"]),
        Route("/v1/requests/{id}/cancel", server.cancel, methods=["POST"]),
        Route("/health", server.health),
        Route("/metrics", server.metrics),
    ]
    middleware = [Middleware(_Guard, access=access)]
    if access.origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(access.origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {LocalReasonError: _told, HTTPException: _http_error, Exception: _bug}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class _Server:
    def __init__(self, runner: Runner, limits: Limits, access: Access) -> None:
        self._runner = runner
        self._limits = limits
        self._access = access

    async def chat(self, request: Request) -> Response:
        return await self._reply(parse_chat(await self._body(request), self._limits))

    async def complete(self, request: Request) -> Response:
        return await self._reply(parse_completion(await self._body(request), self._limits))

    async def _reply(self, wanted: Wanted) -> Response:
        job = await self._runner.submit(wanted)
        model = self._runner.model
        return _Answer(job, Reply(job, model.name, model.tokenizer), self._runner, self._access)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The body's object. Raises Refused for another type, too many bytes, and bodies that do not arrive."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # any other a web page may send without asking
            raise Refused(f"the content type is {kind[:64]!r}; send application/json", status=415)
        data, most = bytearray(), self._access.n_body_bytes
        too_large = Refused(f"the body has more than {most} bytes; send less", status=413, code="body_too_large")
        too_large.headers["Connection"] = "close"
        announced = request.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:32]) > most + _N_DROPPED_BYTES:
            raise too_large
        try:
            async with asyncio.timeout(self._access.body_seconds):
                async for part in request.stream():
                    data += part
                    if len(data) > most + _N_DROPPED_BYTES:
                        raise too_large
        except TimeoutError as error:
            raise Refused(f"the body took longer than {self._access.body_seconds:.0f} s", status=408) from error
        except ClientDisconnect as error:
            raise Refused("the client went away within the body") from error
        if len(data) > most:
            raise too_large
        return parse_json(bytes(data))

    async def models(self, request: Request) -> Response:
        return Json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._runner.model.name:
            raise Refused(f"there is no model {name[:128]!r} here", status=404, code="model_not_found")
        return Json(self._model())

    def _model(self) -> dict[str, Any]:
        model = self._runner.model
        created = int(model.path.stat().st_mtime) if model.path.exists() else 0
        row = {"id": model.name, "object": "model", "created": created, "owned_by": "localreason"}
        return {**row, "context_length": model.engine.n_context_sequence, "thinking_format": model.format.name}

    async def requests(self, request: Request) -> Response:
        rows = [
            {
                "id": job.id,
                "created": job.created,
                "state": "waiting" if job.begun is None else "running",
                "tokens": sum(sequence.n_reply for sequence in job.sequences),
                "thinking": any(sequence.is_thinking for sequence in job.sequences),
            }
            for job in list(self._runner.jobs.values())
        ]
        return Json({"object": "list", "data": rows})

    async def answer_now(self, request: Request) -> Response:
        job = self._job(request)
        self._runner.hurry(job)
        return Json({"id": job.id, "asked": "answer_now"})

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self._runner.cancel(job)
        return Json({"id": job.id, "asked": "cancel"})

    def _job(self, request: Request) -> Job:
        id = request.path_params["id"]
        job = self._runner.jobs.get(id)
        if job is None:
            raise Refused(f"no request {id[:128]!r} is running or waiting", status=404, code="request_not_found")
        return job

    async def health(self, request: Request) -> Response:
        problem = self._runner.problem
        return Json({"status": "ok" if problem is None else "failing", "problem": problem})

    async def metrics(self, request: Request) -> Response:
        return PlainTextResponse(render_metrics(self._runner), media_type="text/plain; version=0.0.4")


class _Answer(Response):
    """Writes a reply as it comes about, and ends the request when the client has gone, during its prompt too."""

    def __init__(self, job: Job, reply: Reply, runner: Runner, access: Access) -> None:
        self._job, self._reply_, self._runner, self._access = job, reply, runner, access
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        write = self._stream if self._job.wanted.is_stream else self._whole
        tasks = {asyncio.create_task(write(scope, receive, send)), asyncio.create_task(_gone(receive))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            with contextlib.suppress(OSError, TimeoutError):  # the client has gone, or reads no more
                for task in done:
                    task.result()
        finally:
            self._runner.cancel(self._job, "disconnected")
            for task in tasks:
                task.cancel()
            # Cancelled in here it is by a second Ctrl-C, when nobody waits for what it would say.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = self._reply_
        while not reply.is_done:
            reply.add(await self._job.updates())
        if reply.problem is not None:
            response = Json(error_body(reply.problem, "server_error"), 500)
        else:
            response = Json(reply.body())
        async with asyncio.timeout(self._access.write_seconds):
            await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, is_last: bool = False) -> None:
            async with asyncio.timeout(self._access.write_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": not is_last})

        reply = self._reply_
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await write(b"".join(map(encode_event, reply.begin())))
        while not reply.is_done:
            try:
                async with asyncio.timeout(self._access.pause_seconds):
                    updates = await self._job.updates()
            except TimeoutError:
                await write(PAUSE)
                continue
            await write(b"".join(map(encode_event, reply.chunks(updates))))
        if reply.problem is not None:
            await write(encode_event(error_body(reply.problem, "server_error")))
        await write(DONE, is_last=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Guard:
    """Refuses what has the wrong key or host before anything else is looked at."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope["path"], dict(scope["headers"]))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        access = self._access
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if access.hosts and host_name(host) not in access.hosts:
            return _error(403, f"this server is not known as {host[:128]!r}; ask for it by {access.hosts[0]}")
        if access.api_key is None or path == "/health":
            return None
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        is_right = hmac.compare_digest(key.strip(), access.api_key.encode())
        if scheme.lower() == b"bearer" and is_right:
            return None
        return _error(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key")


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and (port.isdigit() or not port) and not name.endswith(":") else host).strip("[]")


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine reaches."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _error(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: Any = None
) -> Response:
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return Json(error_body(message, kind, param, code), status, headers)


async def _told(request: Request, error: LocalReasonError) -> Response:
    if isinstance(error, Refused):
        return _error(error.status, str(error), error.code, error.param, error.headers)
    is_mistake = isinstance(error, PromptError | ControlError)
    return _error(400 if is_mistake else 500, str(error))


async def _http_error(request: Request, error: HTTPException) -> Response:
    where = request.url.path[:128]
    hint = "see /v1/models, /v1/chat/completions, /v1/completions"
    return _error(error.status_code, f"{request.method} {where!r}: {error.detail}; {hint}", headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return _error(500, f"this is a bug: {type(error).__name__}; see the server's messages")
