"""Copies of a published version for others: on the Hugging Face hub, in a folder, or at any fsspec URL. No Dagster.

Belongs here: which version may be copied, and the commit or copy of it. Does not belong here: what a version contains.

The files are copied unchanged from the storage, except the card: the verdicts of a training trial, which comes after
the publication, are added at its end. The manifest is copied too, so that a repetition is recognised. Files of an
earlier version that this one does not have are removed; nothing else is touched.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qaq_pipeline.publication import versions
from qaq_pipeline.publication.versions import CARD, MANIFEST, MANIFEST_FORMAT, TRIAL_HEADING
from qaq_pipeline.publication.withdrawn import withdrawn_batches
from qaq_pipeline.storage.files import Files, hash_json
from qaq_pipeline.storage.storage import Storage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@\s]+))?")
_REMEDIES = {
    401: "no valid token: set HF_TOKEN, or `hf auth login`",
    403: "the token may not write there: take one with the right to, or another repository",
    404: "there is no such repository, or the token may not see it: set HF_TOKEN, or `hf auth login`",
}
"""Remedies by HTTP status."""


class PublishError(ValueError):
    """A version cannot be published there. The text names the version or the target, and the remedy."""


@dataclass(frozen=True)
class Copy:
    """A version at a target, or as a dry run would write it."""

    version: str
    url: str
    sizes: Mapping[str, int]
    """Bytes of each file, by its path."""
    is_new: bool
    """False: it was there before. A dry run does not look."""
    removed: tuple[str, ...] = ()
    """Files of an earlier version."""
    replaced: tuple[str, ...] = ()
    """Files that others had put there, such as a card; a repository keeps them in its history."""


def publish(storage: Storage, version: str, to: str, *, is_private: bool = False, is_dry_run: bool = False) -> Copy:
    """Copy a version to a target, unless it is there already.

    Args:
        storage: where the version is stored.
        version: its number, the first digits of its hash, or `latest`.
        to: `hf://datasets/ORG/NAME`, optionally with `@REVISION`; or a folder, or any fsspec URL.
        is_private: create a missing repository as private; an existing one must be private.
        is_dry_run: write nothing.

    Raises:
        PublishError: there is no such version, it contains withdrawn rows, or the target cannot be written.
        StorageError: a file of it is missing or damaged.
    """
    version = _existing_version(storage, version)
    files = _read_files(storage, version)
    note = _trial_note(storage, version)
    files[CARD] += note
    sizes = {name: len(data) for name, data in files.items()}
    hub = _parse(to)
    if is_dry_run:
        return Copy(version, to, sizes, is_new=True)
    target = _Folder(to) if hub is None else _Repository(*hub, is_private=is_private)
    if f"{target.url}/".startswith(f"{storage.files.url().rstrip('/')}/"):
        raise PublishError(f"{to}: lies in the storage, where versions are never changed; take another folder")
    there = target.manifest()
    if there is not None and hash_json(there) == version:
        return Copy(version, target.url, sizes, is_new=_add_note(target, note, files[MANIFEST]))
    obsolete = target.existing([name for name in _files_of(there) if name not in files])
    foreign = [] if _is_ours(there) else target.existing([*files])
    if foreign and not target.has_history:
        raise PublishError(
            f"{target.url}: {', '.join(foreign)} is there, and was not written by `qaq publish`; take another folder"
        )
    target.replace(files, obsolete, f"Publish version {version}")
    return Copy(version, target.url, sizes, is_new=True, removed=tuple(obsolete), replaced=tuple(foreign))


def _existing_version(storage: Storage, name: str) -> str:
    """The version with that name, whose files are kept and hold nothing that was withdrawn."""
    published = versions.find_version(storage, name)
    version, kept = published.version, versions.kept_versions(storage)
    if version not in kept:
        raise PublishError(f"the files of version {name!r} were not kept; kept versions: {', '.join(kept) or 'none'}")
    if batches := withdrawn_batches(storage, published):
        newer = "`qaq refresh` makes one" if version == kept[-1] else "`latest` is newer"
        raise PublishError(
            f"version {version} holds rows of {', '.join(batches)} that were withdrawn since; publish a version "
            f"without them: {newer}"
        )
    return version


def _read_files(storage: Storage, version: str) -> dict[str, bytes]:
    """The files of a version by path, unchanged since they were published; the manifest comes last."""
    remedy = "restore it, or remove the version's folder and run `qaq refresh`"
    files = {
        name: storage.files.read_unchanged(sha256, remedy, *versions.place(version, name))
        for name, sha256 in versions.read_manifest(storage, version)["files"].items()
    }
    return files | {MANIFEST: storage.files.read_bytes(*versions.place(version, MANIFEST))}


def _trial_note(storage: Storage, version: str) -> bytes:
    """The section of the version's training trial, for its card; empty if there was none."""
    place = versions.trial_note_place(version)
    return b"\n" + storage.files.read_bytes(*place) if storage.files.exists(*place) else b""


def _add_note(target: _Folder | _Repository, note: bytes, manifest: bytes) -> bool:
    """Add the section of a trial to the card at a target, or replace it; return whether it was not there.

    Nothing else of the card changes: others may have edited it.
    """
    card = (target.read(CARD) or b"") if note else b""
    if note in card:
        return False
    own, _, _ = card.partition(b"\n" + TRIAL_HEADING.encode())
    target.replace({CARD: own + note, MANIFEST: manifest}, [], "Add the training trial")
    return True


def _parse(to: str) -> tuple[str, str] | None:
    """Repository and revision of an hf:// URL; None: it is another URL or a folder."""
    if not to.startswith("hf://"):
        return None
    found = _HUB.fullmatch(to)
    if found is None:
        raise PublishError(f"{to}: give hf://datasets/ORG/NAME or hf://datasets/ORG/NAME@REVISION")
    return found["repo"], found["revision"] or "main"


def _files_of(manifest: Any) -> list[str]:
    """The files in a manifest of this pipeline; none in any other JSON value."""
    files = manifest.get("files") if _is_ours(manifest) else None
    names = files if isinstance(files, dict) else {}
    return [name for name in names if not (PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts)]


def _is_ours(manifest: Any) -> bool:
    """True if this pipeline wrote the manifest: it has a format number."""
    return isinstance(manifest, dict) and isinstance(manifest.get("format"), int)


class _Folder:
    """A folder, or any fsspec URL."""

    has_history = False
    """True if replaced files can be restored there."""

    def __init__(self, url: str) -> None:
        try:
            self._files = Files(url)
        except (ImportError, ValueError) as error:  # A protocol that is unknown, or whose package is not installed.
            raise PublishError(f"{url}: {error}") from error

    @property
    def url(self) -> str:
        """Address for readers."""
        return self._files.url().rstrip("/")

    def manifest(self) -> Any:
        """JSON value of the manifest at the target; None: there is none."""
        return self._files.read_json(MANIFEST) if self._files.exists(MANIFEST) else None

    def read(self, name: str) -> bytes | None:
        """The bytes of a file at the target; None: there is none."""
        return self._files.read_bytes(name) if self._files.exists(name) else None

    def existing(self, names: Sequence[str]) -> list[str]:
        """The files of these names that exist at the target."""
        return [name for name in names if self._files.exists(*name.split("/"))]

    def replace(self, files: Mapping[str, bytes], obsolete: Sequence[str], message: str) -> None:  # noqa: ARG002
        """Write files and remove others.

        A provisional manifest is written first. It lists the files until the final one, written last, replaces it.
        """
        begun = {"format": MANIFEST_FORMAT, "files": dict.fromkeys([*files, *obsolete])}
        self._files.write_json(begun, MANIFEST)
        for name in obsolete:
            self._files.remove(*name.split("/"))
        for name, data in files.items():
            self._files.write_bytes(data, *name.split("/"))


class _Repository:
    """A branch of a dataset repository on the hub; both are created if missing."""

    has_history = True

    def __init__(self, repo: str, revision: str, *, is_private: bool) -> None:
        from huggingface_hub import HfApi

        self._api: HfApi = HfApi()  # Its token is HF_TOKEN, or that of `hf auth login`.
        self._repo, self._revision = repo, revision
        self._at: dict[str, Any] = {"repo_id": repo, "repo_type": "dataset", "revision": revision}
        with _naming(repo):
            self._make(is_private=is_private)

    def _make(self, *, is_private: bool) -> None:
        self._api.create_repo(self._repo, repo_type="dataset", private=is_private or None, exist_ok=True)
        if is_private and not self._api.repo_info(self._repo, repo_type="dataset").private:
            raise PublishError(f"{self._repo}: is public already; make it private on the hub, or leave out --private")
        if self._revision != "main" and not self._revision.startswith("refs/"):
            self._api.create_branch(self._repo, repo_type="dataset", branch=self._revision, exist_ok=True)

    @property
    def url(self) -> str:
        branch = "" if self._revision == "main" else f"/tree/{self._revision}"
        return f"{self._api.endpoint}/datasets/{self._repo}{branch}"

    def manifest(self) -> Any:
        try:
            return json.loads(self.read(MANIFEST) or b"null")
        except ValueError:  # It is no JSON and so none of ours.
            return None

    def read(self, name: str) -> bytes | None:
        from huggingface_hub.errors import RemoteEntryNotFoundError

        with _naming(self._repo), tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self._api.hf_hub_download(filename=name, local_dir=folder, **self._at)).read_bytes()
            except RemoteEntryNotFoundError:
                return None

    def existing(self, names: Sequence[str]) -> list[str]:
        with _naming(self._repo):
            there = set(self._api.list_repo_files(**self._at)) if names else ()
        return [name for name in names if name in there]

    def replace(self, files: Mapping[str, bytes], obsolete: Sequence[str], message: str) -> None:
        """Write and remove the files in one commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
        deletions = [CommitOperationDelete(path_in_repo=name) for name in obsolete]
        with _naming(self._repo):
            self._api.create_commit(operations=[*additions, *deletions], commit_message=message, **self._at)


@contextlib.contextmanager
def _naming(repo: str) -> Iterator[None]:
    """Raise errors of the hub as `PublishError`, with the repository and the remedy."""
    try:
        yield
    except PublishError:
        raise
    except Exception as error:  # huggingface_hub raises those of HTTP, the network, values, and of its threads alike.
        raise PublishError(f"{repo}: {_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # Of one of its threads.
        return f"{error} {_remedy(error.__cause__)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, HfHubHTTPError):
        return _REMEDIES.get(error.response.status_code, str(error).strip())
    if isinstance(error, HTTPError | ConnectionError):
        return f"the hub cannot be reached ({error}); look to the network, or to HF_ENDPOINT"
    return str(error).strip()
