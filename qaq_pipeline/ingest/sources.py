"""The files that a person names for a delivery: files, folders and patterns, here or at any URL of fsspec.

Belongs here: their bytes, by name, and which of them hold no rows. Does not belong here: the landing zone (`landing`),
and what is in a file (`storage.row_files`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, urlsplit

import fsspec
from fsspec import AbstractFileSystem

from qaq_pipeline.config.base import without_credentials

_HUB = "hf://datasets/"
_SIGNS = "*?["
"""Characters of a pattern."""
FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv")
"""Endings of the names of files with rows."""
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json")
_DOCUMENTS = (".md", ".rst", ".html", ".pdf", ".ipynb", ".py", ".png", ".jpg", ".jpeg", ".gif", ".svg")
"""Endings of documents, which can show rows, or be pointers of Git LFS."""


class SourceError(ValueError):
    """A source cannot be read. The text names it, without credentials, the fault and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(without_credentials(text))


def split_off(sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The names of a delivery's files that may hold rows, and of the others, as in a clone of a hub's repository.

    Documents, code, hidden files and empty parts are left aside, unless nothing else was delivered. Only the content
    of other files, such as licences, tells that they hold no rows.

    Args:
        sizes: bytes of each file, by its name.
    """
    data = sorted(name for name, size in sizes.items() if _may_have_rows(name) and size)
    return (data, sorted(sizes.keys() - {*data})) if data else (sorted(sizes), [])


def _may_have_rows(name: str) -> bool:
    path = PurePosixPath(name.lower())
    is_hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not (is_hidden or path.name in _NO_ROWS or path.name.endswith(_DOCUMENTS))


def is_named_as_rows(name: str) -> bool:
    """Whether a file has the name of one with rows, such as `a.jsonl.gz` or `a.csv-00001`."""
    return re.search(rf"({'|'.join(map(re.escape, FORMATS))})\b", PurePosixPath(name.lower()).name) is not None


def read(sources: Sequence[str | Path]) -> dict[str, bytes]:
    """The bytes of all files of the sources, by name: that of a file, or the path of a file inside a folder.

    Args:
        sources: local paths or URLs, such as `s3://bucket/rows.jsonl` or `hf://datasets/ORG/NAME/data/*.parquet`, each
            of a file or a folder, or a pattern; or `hf://datasets/ORG/NAME?split=train&config=CONFIG`, whose files the
            card of the dataset names.

    Raises:
        SourceError: a source is missing or cannot be read, or two files have one name.
    """
    contents: dict[str, bytes] = {}
    for source in sources:
        for name, content in _read(str(source)).items():
            if name in contents:
                raise SourceError(f"{source}: two files of the delivery are named {name!r}; rename one")
            contents[name] = content
    return contents


def _read(source: str) -> dict[str, bytes]:
    if source == "-":
        raise SourceError("-: standard input cannot be read again after a fault; write the rows to a file, and name it")
    try:
        if source.startswith(_HUB) and "?" in source:
            return _read_split(source)
        fs, path = fsspec.core.url_to_fs(source)
        files = _files(fs, path, source)
        contents = {name: fs.cat_file(place) for name, place in files.items()}
    except SourceError:
        raise
    except FileNotFoundError as error:
        raise SourceError(f"{source}: no such file or folder; check the path") from error
    except OSError as error:
        raise SourceError(f"{source}: cannot be read ({error.strerror or error}); check the path") from error
    except Exception as error:  # Stores raise errors of any kind.
        raise SourceError(
            f"{source}: cannot be read ({type(error).__name__}: {error}); check the URL, the credentials, and that the "
            "package for its protocol is installed"
        ) from error
    if not contents:
        raise SourceError(f"{source}: no file is there; check the path")
    return contents


def _read_split(source: str) -> dict[str, bytes]:
    """The files of a split of a dataset of the hub, by their paths in its repository. No code of it is run."""
    if find_spec("datasets") is None:
        raise SourceError(
            f"{source}: splits need the package datasets; install qaq-pipeline[datasets], or name the files"
        )
    from datasets import load_dataset_builder

    address = urlsplit(source)
    asked = dict(parse_qsl(address.query, keep_blank_values=True))
    if unknown := asked.keys() - {"config", "split"}:
        raise SourceError(f"{source}: unknown {', '.join(sorted(unknown))}; known after `?`: config, split")
    name, _, revision = f"{address.netloc}{address.path}".removeprefix("datasets/").partition("@")
    try:
        builder = load_dataset_builder(name, name=asked.get("config"), revision=revision or None)
    except ValueError as error:  # Of a configuration that does not exist, or is one of several: it lists them.
        raise SourceError(f"{source}: {' '.join(str(error).split())}") from error
    splits: Mapping[str, list[str]] = builder.config.data_files or {}
    if "split" in asked and asked["split"] not in splits:
        raise SourceError(f"{source}: it has no split {asked['split']!r}; it has {', '.join(map(str, splits))}")
    urls = [url for split, files in splits.items() if asked.get("split", split) == split for url in files]
    fs = fsspec.filesystem("hf")
    return {url.split("@", 1)[1].split("/", 1)[1]: fs.cat_file(url) for url in urls}


def _files(fs: AbstractFileSystem, path: str, source: str) -> dict[str, str]:
    """The places of the files of a source, by name."""
    if any(sign in source for sign in _SIGNS) and not fs.exists(path):
        fixed = itertools.takewhile(lambda part: not any(sign in part for sign in _SIGNS), path.split("/"))
        root = "".join(f"{part}/" for part in fixed)
        return {place.removeprefix(root): place for place in sorted(fs.glob(path)) if fs.isfile(place)}
    if fs.isdir(path):
        root = path.rstrip("/") + "/"
        found = {str(place).removeprefix(root): str(place) for place in sorted(fs.find(path))}
        return {name: place for name, place in found.items() if not (name.endswith("/") or name.startswith(".git/"))}
    # The parameters of an address may give access: they are no part of the name.
    return {PurePosixPath(urlsplit(path).path if "://" in path else path).name: path}
