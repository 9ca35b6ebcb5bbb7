"""hub: a version is copied once and unchanged, withdrawn rows are not copied, and errors name the remedy."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from qaq_pipeline.cli.app import app
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.publication.hub import Copy, PublishError, publish
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import withdrawals
from qaq_pipeline.storage.files import Files, StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.frames import store_batch
from qaq_pipeline_tests.support.hub_server import READER, WRITER, Hub, point_to, running_hub
from qaq_pipeline_tests.support.sentences import Check

# huggingface_hub uploads large files by a deprecated argument of httpx2.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPOSITORY = Path(__file__).parents[2]
TO = "hf://datasets/org/name"
CARD = b"---\nlicense: unknown\n---\n"
FILES = {"README.md": CARD, "scores.parquet": b"PAR1", "mine/messages.jsonl": b"{}\n", "mine/hf/data.arrow": b"\0\xff"}
OTHER_FILES = {"README.md": CARD, "scores.parquet": b"PAR1 other", "mine/messages.jsonl": b"{}\n"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stub, which huggingface_hub takes for the hub, with a writer's token in the environment."""
    with running_hub() as stub:
        point_to(monkeypatch, stub.url)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield stub


def store_version(storage: Storage, files: Mapping[str, bytes] = FILES) -> str:
    """A version of these files and of no batch, as publication leaves it, the newest; its name."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = {"format": versions.MANIFEST_FORMAT, "batches": [], "files": hashes}
    with versions.unfinished(storage) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        version, _ = versions.store(storage, manifest, folder)
    versions.record(storage, version, {}, run_id=None)
    return version


def files_of(storage: Storage, version: str) -> dict[str, bytes]:
    folder = Path(storage.files.url(*versions.place(version)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arrived(hub: Hub, branch: str = "main") -> dict[str, bytes]:
    files = dict(hub.repositories["org/name"].branches[branch])
    assert files.pop(".gitattributes") == b"*\n"
    return files


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_version_arrives_byte_for_byte_in_one_commit_that_names_it(hub: Hub, storage: Storage) -> None:
    version = store_version(storage)
    copy = publish(storage, "latest", TO)
    assert arrived(hub) == files_of(storage, version)
    (commit,) = hub.repositories["org/name"].commits
    assert commit.message == f"Publish version {version}"
    assert commit.deleted == []
    assert (copy.version, copy.is_new, copy.url) == (version, True, f"{hub.url}/datasets/org/name")
    assert copy.sizes == {name: len(data) for name, data in arrived(hub).items()}
    assert set(hub.large_files.values()) == {FILES["scores.parquet"], FILES["mine/hf/data.arrow"]}


def test_the_same_version_twice_is_one_commit(hub: Hub, storage: Storage) -> None:
    version = store_version(storage)
    assert publish(storage, version, TO).is_new
    again = publish(storage, version, TO)
    assert (again.is_new, again.removed) == (False, ())
    assert len(hub.repositories["org/name"].commits) == 1


def test_what_an_earlier_version_left_there_is_removed_and_nothing_else(hub: Hub, storage: Storage) -> None:
    store_version(storage)
    publish(storage, "latest", TO)
    hub.repositories["org/name"].branches["main"]["LICENSE"] = b"theirs"
    version = store_version(storage, OTHER_FILES)
    copy = publish(storage, "latest", TO)
    assert copy.removed == ("mine/hf/data.arrow",)
    assert arrived(hub) == {**files_of(storage, version), "LICENSE": b"theirs"}
    assert hub.repositories["org/name"].commits[-1].deleted == ["mine/hf/data.arrow"]


@pytest.mark.parametrize("foreign", [b'{"files": {"LICENSE": 1}}', b"[1]", b"no JSON"])
def test_a_foreign_manifest_names_nothing_of_ours(hub: Hub, storage: Storage, foreign: bytes) -> None:
    version = store_version(storage)
    publish(storage, "latest", TO)
    hub.repositories["org/name"].branches["main"] |= {"LICENSE": b"theirs", "manifest.json": foreign}
    copy = publish(storage, "latest", TO)
    assert copy.removed == ()
    assert "manifest.json" in copy.replaced
    assert "LICENSE" not in copy.replaced
    assert arrived(hub) == {**files_of(storage, version), "LICENSE": b"theirs"}


def test_a_revision_is_a_branch_that_is_made_once(hub: Hub, storage: Storage) -> None:
    version = store_version(storage)
    assert publish(storage, "latest", f"{TO}@week-45").url == f"{hub.url}/datasets/org/name/tree/week-45"
    assert not publish(storage, "latest", f"{TO}@week-45").is_new
    assert arrived(hub, "week-45") == files_of(storage, version)
    assert arrived(hub) == {}


def test_private_means_private(hub: Hub, storage: Storage, check_sentence: Check) -> None:
    store_version(storage)
    publish(storage, "latest", TO, is_private=True)
    assert hub.repositories["org/name"].is_private
    publish(storage, "latest", TO, is_private=True)
    hub.repositories["org/name"].is_private = False
    with pytest.raises(PublishError) as error:
        publish(storage, "latest", TO, is_private=True)
    check_sentence(error.value)


def test_a_dry_run_asks_nobody_and_says_what_would_go(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = store_version(storage)
    monkeypatch.delenv("HF_TOKEN")
    copy = publish(storage, "latest", TO, is_dry_run=True)
    assert copy == Copy(
        version, TO, {name: len(data) for name, data in files_of(storage, version).items()}, is_new=True
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "said"),
    [("hf_nobody", "org/name: no valid token: set HF_TOKEN"), (READER, "org/name: the token may not write there")],
)
def test_a_token_that_does_not_do_is_named_with_the_remedy(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch, token: str, said: str
) -> None:
    store_version(storage)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PublishError, match=said):
        publish(storage, "latest", TO)
    assert hub.repositories == {}


def test_a_large_file_that_cannot_be_uploaded_commits_nothing(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_version(storage)
    answer = hub.answer

    def refusing(method: str, path: str, token: str | None, body: bytes) -> object:
        return (403, {}, {}) if path.startswith("/large/") else answer(method, path, token, body)

    monkeypatch.setattr(hub, "answer", refusing)
    # Files are uploaded at once: either may be the first that fails.
    with pytest.raises(PublishError, match=r"org/name: Error while uploading .*the token may not write there"):
        publish(storage, "latest", TO)
    assert arrived(hub) == {}


def test_a_hub_that_does_not_answer_is_named_with_the_remedy(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch, check_sentence: Check
) -> None:
    store_version(storage)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    point_to(monkeypatch, f"http://127.0.0.1:{free}")
    with pytest.raises(PublishError) as error:
        publish(storage, "latest", TO)
    check_sentence(error.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError) as error:
        publish(storage, "latest", TO)
    check_sentence(error.value)


@pytest.mark.parametrize("to", ["hf://org/name", "hf://datasets/name", "hf://datasets/org/name/folder", f"{TO}@"])
def test_another_hf_url_is_refused(storage: Storage, to: str) -> None:
    store_version(storage)
    with pytest.raises(PublishError, match="give hf://datasets/ORG/NAME"):
        publish(storage, "latest", to)


# --- what may leave ---------------------------------------------------------------------------------------------------


def test_a_version_that_holds_what_was_withdrawn_stays(storage: Storage, tmp_path: Path, check_sentence: Check) -> None:
    settings = parse_settings("models: {strong: {hub: tiny/strong}, weak: {hub: tiny/weak}}")

    def publish_version() -> str:
        return curated_dataset.publish(
            storage, settings, *curated_dataset.read_batches(storage, ["b1"], settings)
        ).version

    store_batch(storage, settings)
    old, to = publish_version(), str(tmp_path / "there")
    withdrawals.add(storage, "b1", {}, "a claim", is_withdrawn=True)
    with pytest.raises(PublishError) as error:
        publish(storage, "latest", to)
    check_sentence(error.value)
    newer = publish_version()
    assert newer != old
    with pytest.raises(PublishError) as error:
        publish(storage, old, to)
    check_sentence(error.value)
    assert not Path(to).exists()
    assert publish(storage, "latest", to).version == newer


def test_a_withdrawn_row_does_not_leave_though_its_batch_was_delivered_without_it(
    storage: Storage, tmp_path: Path, check_sentence: Check
) -> None:
    settings = parse_settings("models: {strong: {hub: tiny/strong}, weak: {hub: tiny/weak}}")
    store_batch(storage, settings)
    curated_dataset.publish(storage, settings, *curated_dataset.read_batches(storage, ["b1"], settings))
    assert publish(storage, "1", str(tmp_path / "before")).is_new
    (content,) = storage.tables.read("signatures", Partition("b1")).frame.filter(source_row=4)["content_hash"]
    withdrawals.add(storage, "b1", {content: "a.jsonl:4"}, "a secret", is_withdrawn=True)
    for queries in (("a", "b", "c", "d"), ("a", "b", "c")):
        store_batch(storage, settings, queries=queries)
        with pytest.raises(PublishError) as error:
            publish(storage, "1", str(tmp_path / "after"))
        check_sentence(error.value)
    assert not (tmp_path / "after").exists()


def test_a_version_that_is_none_is_named_with_those_that_are(storage: Storage, check_sentence: Check) -> None:
    with pytest.raises(StorageError) as error:
        publish(storage, "latest", TO)
    check_sentence(error.value)
    version = store_version(storage)
    for unknown in ("0" * 32, "../evil", ""):
        with pytest.raises(StorageError) as error:
            publish(storage, unknown, TO)
        check_sentence(error.value)
    storage.files.remove_folder(*versions.place(version))
    with pytest.raises(PublishError) as error:
        publish(storage, "1", TO)
    check_sentence(error.value)


def test_a_file_that_was_changed_does_not_leave(storage: Storage, tmp_path: Path, check_sentence: Check) -> None:
    version = store_version(storage)
    storage.files.write_bytes(b"changed", *versions.place(version, "README.md"))
    with pytest.raises(StorageError) as error:
        publish(storage, version, str(tmp_path / "there"))
    check_sentence(error.value)
    assert not (tmp_path / "there").exists()


# --- folders and URLs -------------------------------------------------------------------------------------------------


def test_a_folder_gets_the_version_once_and_loses_what_is_obsolete(storage: Storage, tmp_path: Path) -> None:
    to = tmp_path / "there"
    store_version(storage)
    assert publish(storage, "latest", str(to)).is_new
    assert not publish(storage, "latest", str(to)).is_new
    (to / "LICENSE").write_bytes(b"theirs")
    version = store_version(storage, OTHER_FILES)
    assert publish(storage, "latest", str(to)).removed == ("mine/hf/data.arrow",)
    found = {str(path.relative_to(to)): path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert found == {**files_of(storage, version), "LICENSE": b"theirs"}


def test_a_folder_that_was_left_half_written_is_not_called_done(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "there"
    first = store_version(storage)
    publish(storage, first, str(to))
    second = store_version(storage, OTHER_FILES)
    write, written = Files.write_bytes, list[tuple[str, ...]]()

    def fail_at_the_third(self: Files, data: bytes, *parts: str) -> None:
        written.append(parts)
        if len(written) > 2:
            raise OSError("no space left")
        write(self, data, *parts)

    monkeypatch.setattr(Files, "write_bytes", fail_at_the_third)
    with pytest.raises(OSError, match="no space"):
        publish(storage, second, str(to))
    monkeypatch.setattr(Files, "write_bytes", write)
    assert publish(storage, first, str(to)).is_new
    found = {str(path.relative_to(to)): path.read_bytes() for path in to.rglob("*") if path.is_file()}
    assert found == files_of(storage, first)


@pytest.mark.parametrize("name", ["README.md", "manifest.json"])
def test_files_that_somebody_else_wrote_are_not_overwritten(
    name: str, storage: Storage, tmp_path: Path, check_sentence: Check
) -> None:
    to = tmp_path / "theirs"
    to.mkdir()
    (to / "keep.txt").write_text("theirs")
    (to / name).write_text(json.dumps({"format": "npm", "files": {"keep.txt": ""}}))
    store_version(storage)
    with pytest.raises(PublishError) as error:
        publish(storage, "latest", str(to))
    check_sentence(error.value)
    assert sorted(path.name for path in to.iterdir()) == sorted(["keep.txt", name])


def test_a_manifest_in_a_folder_cannot_remove_files_elsewhere(storage: Storage, tmp_path: Path) -> None:
    to, outside = tmp_path / "there", tmp_path / "outside.txt"
    to.mkdir()
    outside.write_text("stays")
    names = {"../outside.txt": "", str(outside): ""}
    (to / "manifest.json").write_text(json.dumps({"format": 2, "files": names}))
    store_version(storage)
    assert publish(storage, "latest", str(to)).removed == ()
    assert outside.read_text() == "stays"


def test_no_version_is_written_into_the_storage(storage: Storage, check_sentence: Check) -> None:
    old, _ = store_version(storage), store_version(storage, OTHER_FILES)
    for folder in (versions.place(old), ("elsewhere",), ()):
        with pytest.raises(PublishError) as error:
            publish(storage, "latest", storage.files.url(*folder))
        check_sentence(error.value)
    assert files_of(storage, old).keys() == {*FILES, "manifest.json"}


def test_an_object_store_is_source_and_target_alike(tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    storage = Storage(f"{root}/storage", tmp_path / "locks")
    version = store_version(storage)
    publish(storage, version, f"{root}/there")
    memory = fsspec.filesystem("memory")
    source, target = (storage.files.url(*versions.place(version)), f"{root}/there")
    names = [path.removeprefix(memory._strip_protocol(source)) for path in memory.find(source)]
    assert len(names) == 5
    assert all(memory.cat_file(source + name) == memory.cat_file(target + name) for name in names)


def test_a_protocol_that_nobody_knows_is_refused(storage: Storage) -> None:
    store_version(storage)
    with pytest.raises(PublishError, match=r"nowhere://x: .*nowhere"):
        publish(storage, "latest", "nowhere://x")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The storage of a QAQ_HOME, to which the environment points."""
    monkeypatch.setenv("QAQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QAQ_CONFIG", "demo")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home" / "dagster"))
    return Storage(str(tmp_path / "home" / "storage"), tmp_path / "home" / "locks")


def test_the_command_publishes_where_the_environment_says(hub: Hub, home: Storage) -> None:
    version = store_version(home)
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "qaq_pipeline.cli", "publish", "latest", "--to", TO],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    size = sum(map(len, files_of(home, version).values()))
    assert done.stdout == f"{version} published to {hub.url}/datasets/org/name: 5 files, {size:,} bytes\n"
    assert arrived(hub) == files_of(home, version)


def test_the_command_says_what_it_would_do_and_what_it_removed(home: Storage, tmp_path: Path) -> None:
    version, to = store_version(home), str(tmp_path / "there")
    would = CliRunner().invoke(app, ["publish", "latest", "--to", to, "--dry-run"])
    assert would.exit_code == 0
    assert f"{version} would be published to {to}: 5 files" in would.output
    assert "           4 scores.parquet\n" in would.output
    assert not Path(to).exists()
    assert f"{version} published to {to}" in CliRunner().invoke(app, ["publish", "latest", "--to", to]).output
    store_version(home, OTHER_FILES)
    newer = CliRunner().invoke(app, ["publish", "latest", "--to", to]).output
    assert "removed file of an earlier version: mine/hf/data.arrow" in newer
    assert "is already at" in CliRunner().invoke(app, ["publish", "latest", "--to", to]).output


def test_the_command_ends_with_1_and_the_reason(home: Storage) -> None:
    done = CliRunner().invoke(app, ["publish", "latest", "--to", TO])
    assert (done.exit_code, done.output) == (
        1,
        "error: nothing is published yet; `qaq run FILE --batch NAME` makes a version\n",
    )
