"""The pages of the row browser.

Belongs here: which address shows what. Does not belong here: which rows a question means (`question`), the rows
(`listing`), everything about one row (`lineage.dossier`), and the look (`pages/rows*.html`, `pages/rows.js`).

    /                                    the batches and the versions
    /batches/<batch>, /versions/<name>   the table of the rows; filters, order and place are in the address
        …/rows.json                      the rows of the table, some at a time
        …/sides                          selected rows and the others side by side, with their texts
    /row?place=<place>[&version=<name>]  everything about one row
    /assets/<file>                       scripts and styles; DataTables comes with the package itables

Content of rows is always plain text: the templates and the script escape every value.
"""

from __future__ import annotations

import importlib.resources
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import polars as pl
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from qaq_pipeline.lineage import dossier, row_history
from qaq_pipeline.lineage.dossier import Dossier, Grid
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import pages
from qaq_pipeline.reports.pages import Table
from qaq_pipeline.reports.summaries import visible
from qaq_pipeline.row_browser import listing, question
from qaq_pipeline.row_browser.listing import Listing
from qaq_pipeline.row_browser.question import Question
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY, RowPlace
from qaq_pipeline.schema.vocabularies import Decision
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage

HOSTS = ("127.0.0.1", "localhost")
"""Names of this machine. A request by another name is refused, so that no other site can read rows in a browser."""

_ASSETS = {
    "rows.js": ("qaq_pipeline", "pages/rows.js"),
    "dt_bundle.js": ("itables", "html/dt_bundle.js"),
    "dt_bundle.css": ("itables", "html/dt_bundle.css"),
}
_UNSHOWN = ("source_file", "source_row", "turn_index", "pair_id")
_PAGING = ("start", "length")
_LISTED = ("decisions", "raw_data", "screened_data", "validity")
_KEPT_LISTINGS = 2
_OF_A_SIDE = 10
"""Rows of a page on either side."""


@dataclass
class _Listings:
    """The listings that were asked for last. One is read again when a table that it shows has changed."""

    storage: Storage
    kept: dict[tuple[str | None, ...], Listing] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, kind: str, name: str) -> Listing:
        """The listing of a batch, or of a version by number, hash or `latest`. Raises StorageError."""
        with self.lock:  # Two requests for one batch read it once.
            if kind == "batches":
                key = (name, *self._state([name]))
                found = self.kept.pop(key, None) or listing.of_batch(self.storage, name)
            else:
                version = versions.find_version(self.storage, name)
                manifest = versions.read_manifest(self.storage, version.version)
                key = (version.version, *self._state([entry["batch"] for entry in manifest["batches"]]))
                found = self.kept.pop(key, None) or listing.of_version(self.storage, version)
            self.kept[key] = found
            while len(self.kept) > _KEPT_LISTINGS:
                del self.kept[next(iter(self.kept))]
            return found

    def _state(self, batches: list[str]) -> list[str | None]:
        """Data versions of the tables that a listing of batches shows."""
        return [self.storage.tables.version(name, Partition(batch)) for batch in batches for name in _LISTED]


@dataclass(frozen=True)
class _Site:
    """The endpoints. Starlette runs each in a thread."""

    storage: Storage
    listings: _Listings

    def index(self, _: Request) -> Response:
        """The batches and the versions."""
        tables, kept = self.storage.tables, set(versions.kept_versions(self.storage))
        rows = {
            batch: tables.footer("decisions", Partition(batch)).num_rows for batch in tables.batches_with("decisions")
        }
        published = [one for one in reversed(versions.publications(self.storage)) if one.version in kept]
        named = [(one.number, one.name) for one in published]
        return _page("rows_index.html", {"title": "Rows", "batches": rows, "versions": named})

    def table(self, request: Request) -> Response:
        """The table of a listing; its script fetches the rows."""
        found, asked = self._asked(request)
        return _page("rows.html", _of_listing(request, found, asked))

    def rows(self, request: Request) -> Response:
        """Some rows of a listing, for the script of the table."""
        found, asked = self._asked(request)
        wanted = self._wanted(found, asked)
        part = wanted[asked.start : asked.start + asked.length].iter_rows(named=True)
        rows = [_record(row, found) for row in part]
        return JSONResponse({"recordsTotal": found.rows.height, "recordsFiltered": wanted.height, "data": rows})

    def sides(self, request: Request) -> Response:
        """The rows of a listing with their texts: the selected ones, and beside them the others."""
        found, asked = self._asked(request)
        wanted = self._wanted(found, asked)
        is_selected = pl.col("decision") == Decision.SELECTED.value
        sides = [("Selected", wanted.filter(is_selected)), ("Not selected", wanted.filter(~is_selected))]
        cards = [(name, rows.height, self._cards(rows, found, asked.start)) for name, rows in sides]
        most = max(rows.height for _, rows in sides)
        pages_of = {"sides": cards, "step": _OF_A_SIDE, "has_more": asked.start + _OF_A_SIDE < most}
        return _page("rows_sides.html", _of_listing(request, found, asked) | pages_of)

    def row(self, request: Request) -> Response:
        """Everything about one row."""
        name = request.query_params.get("version")
        version = None if name is None else versions.find_version(self.storage, name)
        place = RowPlace.parse(request.query_params.get("place", ""))
        rows = row_history.find_row(self.storage, place.batch, place.in_batch, version).rows
        if not rows:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no row {place}.")
        of_row = dossier.gather(self.storage, rows[0], version, with_versions=True)
        line = None if version is None else self.listings.get("versions", name or "").line_of(place)
        return _page("row.html", _of_row(of_row, place) | {"line": line, "texts": _texts(of_row.text)})

    def asset(self, request: Request) -> Response:
        """A script or a style sheet."""
        name = request.path_params["name"]
        if name not in _ASSETS:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no {name}.")
        package, path = _ASSETS[name]
        return FileResponse(str(importlib.resources.files(package) / path), headers={"Cache-Control": "max-age=3600"})

    def _asked(self, request: Request) -> tuple[Listing, Question]:
        kind, name = request.path_params["kind"], request.path_params["name"]
        if kind not in ("batches", "versions"):
            raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no page {request.url.path}.")
        return self.listings.get(kind, name), question.parse(request.query_params.multi_items())

    def _wanted(self, found: Listing, asked: Question) -> pl.DataFrame:
        with_text = None
        if asked.text:
            with_text = pl.concat(self._with_text(asked.text, batch) for batch in found.batches)
        return question.answer(found, asked, with_text)

    def _with_text(self, text: str, batch: str) -> pl.DataFrame:
        """Keys of the rows of a batch that contain a text which may be shown."""
        withdrawn = row_history.withdrawn_rows(self.storage, batch)
        parts = row_history.with_text(self.storage, text, batch, withdrawn)
        return pl.concat(part.select(ROW_KEY) for part in parts)

    def _cards(self, rows: pl.DataFrame, found: Listing, start: int) -> list[dict[str, Any]]:
        part = rows[start : start + _OF_A_SIDE].iter_rows(named=True)
        return [_record(row, found) | {"texts": _texts(row_history.text_of(self.storage, row))} for row in part]


def application(storage: Storage) -> Starlette:
    """The row browser of a storage."""
    site = _Site(storage, _Listings(storage))
    return Starlette(
        routes=[
            Route("/", site.index),
            Route("/row", site.row),
            Route("/assets/{name}", site.asset),
            Route("/{kind}/{name}", site.table),
            Route("/{kind}/{name}/rows.json", site.rows),
            Route("/{kind}/{name}/sides", site.sides),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS), Middleware(GZipMiddleware)],
        exception_handlers={HTTPException: _failed, StorageError: _failed, ValueError: _failed},
    )


def _failed(_: Request, error: Exception) -> Response:
    """The page of an error that the reader can fix: its sentence."""
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.BAD_REQUEST
    status = HTTPStatus.NOT_FOUND if isinstance(error, StorageError) else status
    said = error.detail if isinstance(error, HTTPException) else str(error)
    return _page("rows_error.html", {"title": HTTPStatus(status).phrase, "said": said}, status)


def _page(template: str, values: Mapping[str, Any], status: int = HTTPStatus.OK) -> Response:
    return HTMLResponse(pages.render(template, values), status)


def _of_listing(request: Request, found: Listing, asked: Question) -> dict[str, Any]:
    """What the pages of a listing share."""
    kind, name = request.path_params["kind"], request.path_params["name"]
    filters = [one for one in request.query_params.multi_items() if one[0] not in _PAGING]
    return {
        "title": f"Rows of {'batch ' + name if found.version is None else found.version.name}",
        "path": f"/{kind}/{name}",
        "filters_of_page": urlencode(filters),
        "asked": asked,
        "choices": question.choices(found),
        "numbers": found.numbers,
        "columns": ["place", *_columns(found.rows)],
    }


def _columns(rows: pl.DataFrame) -> list[str]:
    """The columns of the table that have any value."""
    return [
        name for name in rows.columns if name not in (*ROW_KEY, "pair_id") and rows[name].null_count() < rows.height
    ]


def _record(row: Mapping[str, Any], found: Listing) -> dict[str, Any]:
    """A row as the table shows it: texts with invisible characters by code point, and the address of its page."""
    place = RowPlace.of(row)
    version = {} if found.version is None else {"version": found.version.number}
    shown = {name: visible(value) if isinstance(value, str) else value for name, value in row.items()}
    link = f"/row?{urlencode({'place': str(place)} | version)}"
    return shown | {"place": visible(place.in_batch if found.version is None else str(place)), "link": link}


def _texts(text: Mapping[str, str | None]) -> dict[str, str]:
    """The texts that a row has."""
    return {name: part for name, part in text.items() if part is not None}


def _of_row(of_row: Dossier, place: RowPlace) -> dict[str, Any]:
    """What the page of a row shows, except its texts."""
    row = of_row.row
    grids = {
        "Scores and ranks": dossier.scores(row),
        "Signals of validity": dossier.signals(of_row.signals or ()),
        "Selections": dossier.verdicts(row),
    }
    return {
        "title": str(place),
        "row": row,
        "found_in": None if of_row.found_in is None else of_row.found_in.name,
        "representative": None if row["duplicate_of"] is None else dossier.said_of(of_row.representative),
        "kept": None if row["duplicate_of"] is None else urlencode({"place": row["duplicate_of"]}),
        "history": list(dossier.history(of_row)),
        "grids": [_table(caption, grid) for caption, grid in grids.items() if grid.rows],
        "judged_again": dossier.JUDGED_AGAIN if of_row.signals is None else None,
        "origin": list(dossier.origin(of_row, with_template=False)),
    }


def _table(caption: str, grid: Grid) -> Table:
    return Table(caption, grid.head, grid.rows)
