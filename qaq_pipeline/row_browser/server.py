"""The server of the row browser: on this machine only.

Belongs here: the address, the start and the end of the server. Does not belong here: what it answers (`site`).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from qaq_pipeline.row_browser.site import application
from qaq_pipeline.storage.storage import Storage

HOST = "127.0.0.1"
_CHECKED_EVERY_S = 1.0


class PortInUseError(OSError):
    """A port cannot be listened on. The text names the remedy."""


@contextmanager
def listen(port: int) -> Iterator[socket.socket]:
    """A socket that listens on a port of 127.0.0.1; port 0: a free one. Raises PortInUseError."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
            listening.listen()
        except OSError as error:
            said = (
                f"port {port} of {HOST} cannot be used ({error.strerror}); while `qaq ui` runs, it serves the rows at "
                f"http://{HOST}:{port}; else give another port with --port"
            )
            raise PortInUseError(said) from error
        yield listening


def serve(storage: Storage, listening: socket.socket, parent: int | None = None) -> None:
    """Serve the rows until an interrupt.

    Args:
        storage: whose rows are shown.
        listening: of `listen`.
        parent: process id of the parent, with which the server ends; None: only an interrupt ends it.
    """
    server = uvicorn.Server(uvicorn.Config(application(storage), log_level="warning"))
    with suppress(KeyboardInterrupt):
        asyncio.run(_until_end(server, listening, parent))


async def _until_end(server: uvicorn.Server, listening: socket.socket, parent: int | None) -> None:
    watch = None if parent is None else asyncio.create_task(_end_with(server, parent))
    await server.serve([listening])
    if watch is not None:
        watch.cancel()


async def _end_with(server: uvicorn.Server, parent: int) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(_CHECKED_EVERY_S)
    server.should_exit = True
