"""Between the commands and their servers: an S3 server that fails, and a database that goes away, when told to.

Belongs here: what happens to one request, or to a connection. Does not belong here: when (`ends`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

LOOPBACK = "127.0.0.1"
_BYTES_AT_ONCE = 1 << 16
_OF_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length"}
"""Headers that hold for one connection alone."""
_T = TypeVar("_T")

Fault = Literal["answer 500", "lose the answer", "cut the answer", "call"]
"""answer 500: the request is not carried out. lose the answer: it is, and the connection ends. cut the answer: so it
is, with half of its content. call: a function is called first, and the request is then not carried out."""


@dataclass(frozen=True)
class Plan:
    """What happens to some of the requests of an S3 server."""

    fault: Fault
    number: int
    """Of the first request to which it happens, from 1."""
    times: int = 1
    """How many in a row."""
    call: Callable[[], None] = lambda: None
    """The function of the fault `call`."""


class Proxies:
    """A proxy of an S3 server and one of a database, from the start to the end of the context.

    Args:
        store: URL of the S3 server.
        database_port: port of the database on loopback.
    """

    def __init__(self, store: str, database_port: int) -> None:
        self._store, self._database_port = store, database_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._connections: set[asyncio.StreamWriter] = set()
        self._plan: Plan | None = None
        self._cut_at: int | None = None
        self._is_away = False
        self.store_url, self.port_of_database = "", 0
        """Of the proxies."""
        self.num_requests = self.num_messages = 0
        """To the S3 server, and to the database, since `expect`."""

    def __enter__(self) -> Self:
        """Start both."""
        self._thread.start()
        self._wait_for(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        """End both."""
        self._wait_for(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def expect(self, plan: Plan | None = None, *, cut_at: int | None = None) -> None:
        """Count anew, and let this happen: a plan for the S3 server, or all connections of the database cut at the
        message of that number, from 1, and none made until `let_in`.
        """
        self.num_requests = self.num_messages = 0
        self._plan, self._cut_at, self._is_away = plan, cut_at, False

    def let_in(self) -> None:
        """Let connections to the database be made again."""
        self._is_away = False

    def _wait_for(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, 0)
        await site.start()
        self.store_url = f"http://{LOOPBACK}:{self._runner.addresses[0][1]}"
        self._server = await asyncio.start_server(self._connect, LOOPBACK, 0)
        self.port_of_database = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        self._cut()
        await self._runner.cleanup()
        await self._session.close()

    # --- the S3 server ------------------------------------------------------------------------------------------------

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.num_requests += 1
        plan = self._plan
        is_meant = plan is not None and plan.number <= self.num_requests < plan.number + plan.times
        fault = plan.fault if plan is not None and is_meant else None
        content = await request.read()
        if plan is not None and fault == "call":
            plan.call()
        if fault in ("answer 500", "call"):
            return web.Response(status=500)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _OF_CONNECTION}
        url = URL(self._store + request.raw_path, encoded=True)
        asked = self._session.request(request.method, url, headers=headers, data=content, allow_redirects=False)
        async with asked as answer:
            body = await answer.read()
            if fault == "lose the answer":
                return _drop(request)
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _OF_CONNECTION}
            if fault == "cut the answer" and body:
                given = web.StreamResponse(status=answer.status, headers=kept | {"Content-Length": str(len(body))})
                await given.prepare(request)
                await given.write(body[: len(body) // 2])
                return _drop(request, given)
            length = {"Content-Length": answer.headers.get("Content-Length", "0")} if request.method == "HEAD" else {}
            return web.Response(status=answer.status, headers=kept | length, body=body)

    # --- the database -------------------------------------------------------------------------------------------------

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_away:
            writer.close()
            return
        far_reader, far_writer = await asyncio.open_connection(LOOPBACK, self._database_port)
        self._connections |= {writer, far_writer}
        try:
            await asyncio.gather(self._carry(reader, far_writer, self._count), self._carry(far_reader, writer, _pass))
        finally:
            self._connections -= {writer, far_writer}

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, before: Callable[[], Awaitable[None]]
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_BYTES_AT_ONCE):
                await before()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _count(self) -> None:
        self.num_messages += 1
        if self._cut_at == self.num_messages:
            self._is_away = True
            self._cut()

    def _cut(self) -> None:
        for writer in self._connections:
            writer.transport.abort()


async def _pass() -> None:
    """Nothing."""


def _drop(request: web.Request, given: web.StreamResponse | None = None) -> web.StreamResponse:
    """End the connection of a request as it is."""
    if request.transport is not None:
        request.transport.abort()  # type: ignore[attr-defined]
    return given if given is not None else web.Response()


def port_of(url: str) -> int:
    """The port in a URL."""
    port = urlsplit(url).port
    assert port is not None
    return port
