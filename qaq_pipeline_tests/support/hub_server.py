"""The part of the Hugging Face hub's HTTP API that publishing a data set needs, on loopback, in memory."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"
"""Tokens: of one who may write, and of one who may not."""
HEAD = "1" * 40
"""The commit of every branch."""
LARGE = (".parquet", ".arrow")
"""Endings of the files that the hub wants as large files."""


@dataclass
class Commit:
    """What one commit of a branch added and removed."""

    branch: str
    message: str
    added: list[str]
    deleted: list[str]


@dataclass
class Repository:
    """A dataset repository: the files of each branch, and the commits in their order."""

    is_private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*\n"}})
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> dict[str, bytes]:
        """The files of a branch, or of the commit that `main` is at."""
        return self.branches["main" if revision == HEAD else revision]


class Hub:
    """The state of the hub, and its answers: `(status, JSON value or bytes, headers)` to a request.

    A request without a body has its query as one.
    """

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []

    def answer(self, method: str, path: str, token: str | None, body: bytes) -> tuple[int, Any, dict[str, str]]:
        self.requests.append(f"{method} {path}")
        for pattern, verb, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and verb == method:
                if token not in (WRITER, READER):
                    return 401, {"error": "Invalid username or password."}, {}
                if token == READER and method != "GET" and "validate" not in path:
                    return 403, {"error": "Forbidden: you need a write token."}, {}
                return function(self, body, **{name: unquote(value) for name, value in found.groupdict().items()})
        return 404, {"error": f"the stub does not know {method} {path}"}, {}

    def _create(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        wanted = json.loads(body)
        assert wanted["type"] == "dataset"
        repo = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.url}/datasets/{repo}"}
        if repo in self.repositories:
            return 409, url, {}
        is_private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.repositories[repo] = Repository(is_private)
        return 200, url, {}

    def _info(self, _: bytes, repo: str) -> tuple[int, Any, dict[str, str]]:
        if repo not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        return 200, {"id": repo, "private": self.repositories[repo].is_private, "sha": HEAD}, {}

    def _branch(self, _: bytes, repo: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        branches = self.repositories[repo].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}, {}
        branches[branch] = dict(branches["main"])
        return 200, {}, {}

    def _validate(self, body: bytes) -> tuple[int, Any, dict[str, str]]:
        assert json.loads(body)["content"].startswith("---\n")
        return 200, {"errors": [], "warnings": []}, {}

    def _preupload(self, body: bytes, repo: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        assert branch in self.repositories[repo].branches
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return 200, {"files": files}, {}

    def _batch(self, body: bytes, repo: str) -> tuple[int, Any, dict[str, str]]:
        assert repo in self.repositories
        objects = [
            one | {"actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _upload(self, body: bytes, oid: str) -> tuple[int, Any, dict[str, str]]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.large_files[oid] = body
        return 200, {}, {}

    def _commit(self, body: bytes, repo: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        header, *operations = map(json.loads, body.splitlines())
        repository = self.repositories[repo]
        files, commit = dict(repository.branches[branch]), Commit(branch, header["value"]["summary"], [], [])
        for operation in operations:
            path = operation["value"]["path"]
            match operation["key"]:
                case "file":
                    files[path] = base64.b64decode(operation["value"]["content"])
                    commit.added.append(path)
                case "lfsFile":
                    files[path] = self.large_files[operation["value"]["oid"]]
                    commit.added.append(path)
                case "deletedFile":
                    del files[path]
                    commit.deleted.append(path)
        repository.branches[branch] = files
        repository.commits.append(commit)
        return 200, {"commitUrl": f"{self.url}/datasets/{repo}/commit/{HEAD}", "commitOid": HEAD}, {}

    def _tree(self, query: bytes, repo: str, branch: str, folder: str = "") -> tuple[int, Any, dict[str, str]]:
        start = f"{folder}/" if folder else ""
        inside = {name: data for name, data in self.repositories[repo].at(branch).items() if name.startswith(start)}
        if not inside:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        is_deep = b"recursive=true" in query.lower()
        files = [name for name in inside if is_deep or "/" not in name.removeprefix(start)]
        folders = {start + name.removeprefix(start).partition("/")[0] for name in inside.keys() - set(files)}
        return (
            200,
            [
                *({"type": "directory", "path": name, "oid": "3" * 40} for name in sorted(folders)),
                *({"type": "file", "path": name, "size": len(inside[name]), "oid": "2" * 40} for name in files),
            ],
            {},
        )

    def _paths_info(self, body: bytes, repo: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        wanted = json.loads(body)["paths"]
        _, files, _ = self._tree(b"recursive=true", repo, branch)
        return 200, [file for file in files if file["path"] in wanted], {}

    def _resolve(self, _: bytes, repo: str, branch: str, path: str) -> tuple[int, Any, dict[str, str]]:
        files = self.repositories[repo].at(branch)
        if path not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        etag = hashlib.sha256(files[path]).hexdigest()
        return 200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": HEAD}


_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_AT = rf"/api/datasets/{_REPO}"
_ROUTES = [
    ("/api/repos/create", "POST", Hub._create),
    ("/api/validate-yaml", "POST", Hub._validate),
    (_AT, "GET", Hub._info),
    (rf"{_AT}/revision/[^/]+", "GET", Hub._info),
    (rf"{_AT}/paths-info/(?P<branch>[^/]+)", "POST", Hub._paths_info),
    (rf"{_AT}/branch/(?P<branch>[^/]+)", "POST", Hub._branch),
    (rf"{_AT}/preupload/(?P<branch>[^/]+)", "POST", Hub._preupload),
    (rf"{_AT}/commit/(?P<branch>[^/]+)", "POST", Hub._commit),
    (rf"{_AT}/tree/(?P<branch>[^/]+)", "GET", Hub._tree),
    (rf"{_AT}/tree/(?P<branch>[^/]+)/(?P<folder>.+)", "GET", Hub._tree),
    (rf"/datasets/{_REPO}\.git/info/lfs/objects/batch", "POST", Hub._batch),
    ("/large/(?P<oid>[0-9a-f]{64})", "PUT", Hub._upload),
    (rf"/datasets/{_REPO}/resolve/(?P<branch>[^/]+)/(?P<path>.+)", "GET", Hub._resolve),
]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """The hub on a free port, until the end."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
            address = urlsplit(self.path)
            body, path = body or address.query.encode(), address.path
            token = WRITER if path.startswith("/large/") else bearer  # Its URL is signed.
            is_head = self.command == "HEAD"
            status, value, headers = hub.answer("GET" if is_head else self.command, path, token, body)
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, text)
            self.end_headers()
            if not is_head:
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 BaseHTTPRequestHandler calls them so.

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 Its own name.
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What huggingface_hub makes of HF_ENDPOINT, and of its switches, once, when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
