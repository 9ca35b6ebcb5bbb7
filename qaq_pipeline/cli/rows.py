"""The command that shows rows in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from qaq_pipeline.cli.terminal import ConfigOption, expected, fail, open_stored, say
from qaq_pipeline.config.settings import ROWS_PORT
from qaq_pipeline.publication.versions import find_version
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage


def rows(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="BATCH|VERSION", help="A batch; or a version by number, first digits of its hash, or `latest`."
        ),
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = ROWS_PORT,
    opens: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    parent: Annotated[int | None, typer.Option("--parent", hidden=True, help="End with this parent process.")] = None,
    config_file: ConfigOption = None,
) -> None:
    """Browse rows in a web browser: search, filter, sort, and see selected rows beside the others."""
    from qaq_pipeline.row_browser import server

    storage = open_stored(config_file)
    path = "/" if what is None else _path(storage, what)
    with expected(server.PortInUseError), server.listen(port) as listening:
        address = f"http://{server.HOST}:{port}{path}"
        say(f"Rows: {address}; Ctrl-C ends it")
        if opens:
            typer.launch(address)
        server.serve(storage, listening, parent)


def _path(storage: Storage, what: str) -> str:
    """The page of a batch or a version."""
    batches = storage.tables.batches_with("decisions")
    if what in batches:
        return f"/batches/{what}"
    try:
        return f"/versions/{find_version(storage, what).number}?decision=selected&order=line"
    except StorageError as error:
        fail(f"no batch is called {what!r} (decided batches: {', '.join(batches) or 'none'}), and {error}")
