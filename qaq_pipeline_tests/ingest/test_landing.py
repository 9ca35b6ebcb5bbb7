"""landing: recognition of deliveries, completeness, refused names, and the copy."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qaq_pipeline.config.settings import LandingSettings
from qaq_pipeline.ingest import landing
from qaq_pipeline.ingest.landing import Landed, LandingError, Look, Seen
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline_tests.support.delivered import delivered
from qaq_pipeline_tests.support.sentences import Check

ROW = b'{"query": "q", "response": "a"}\n'
ANY = LandingSettings()
MARKED = LandingSettings(require_marker=True)

Zone = Callable[..., Path]


@pytest.fixture
def zone(tmp_path: Path) -> Path:
    """An empty landing zone."""
    folder = tmp_path / "landing"
    folder.mkdir()
    return folder


def land(zone: Path, *names: str, content: bytes = ROW) -> None:
    for name in names:
        path = zone / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def entries(found: Look) -> dict[str, str]:
    return {landed.entry: landed.batch for landed in found.deliveries}


def looks(zone: Path, settings: LandingSettings, *, times: int = 2, seen: Seen | None = None) -> tuple[list[str], Seen]:
    """Poll several times without changes; return what the last poll takes."""
    taken: list[Landed] = []
    seen = seen or Seen()
    for _ in range(times):
        taken, seen = landing.complete(landing.look(str(zone), settings), seen, settings)
        seen = Seen.parse(seen.dump())
    return [landed.entry for landed in taken], seen


# --- what is a delivery --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("week-47.jsonl", "week-47"),
        ("week-47.jsonl.gz", "week-47"),
        ("week-47.parquet.ZST", "week-47"),
        ("v1.2.json", "v1.2"),
        ("week-47", "week-47"),
        ("week-47.csv", "week-47"),
        ("week-47.txt", "week-47.txt"),
    ],
)
def test_a_file_is_a_batch_named_as_it_is_less_the_endings_of_its_format(zone: Path, name: str, batch: str) -> None:
    land(zone, name)
    assert entries(landing.look(str(zone), ANY)) == {name: batch}


def test_a_folder_is_one_delivery_with_all_files_below_it(zone: Path) -> None:
    land(zone, "w.1/a.jsonl", "w.1/deep/er/b.jsonl", "w.1/.hidden", "w.1/done", "w.1/_tmp/c.jsonl")
    [landed] = landing.look(str(zone), LandingSettings(marker="done")).deliveries
    assert (landed.batch, sorted(landed.files)) == ("w.1", ["a.jsonl", "deep/er/b.jsonl"])
    assert landed.is_marked
    assert landed.num_bytes == 2 * len(ROW)


@pytest.mark.parametrize("name", [".a.jsonl", "_b.jsonl", "c.jsonl.tmp", "d.part", "e.jsonl._SUCCESS"])
def test_hidden_and_unfinished_names_are_no_deliveries(zone: Path, name: str) -> None:
    land(zone, name)
    assert landing.look(str(zone), ANY) == Look([], {})


@pytest.mark.parametrize("url", ["{}/gone", "nonsense://zone"])
def test_a_zone_that_cannot_be_looked_into_is_named_with_the_remedy_and_is_not_empty(
    tmp_path: Path, url: str, check_sentence: Check
) -> None:
    with pytest.raises(LandingError) as error:
        landing.look(url.format(tmp_path), ANY)
    check_sentence(error.value)


_LOOK_AS_NOBODY = """
import os, sys
from qaq_pipeline.ingest import landing
from qaq_pipeline.config.settings import LandingSettings
os.geteuid() or os.setuid(65534)  # Root may read everything.
found = landing.look(sys.argv[1], LandingSettings())
print([one.entry for one in found.deliveries], sorted(found.refused))
"""


def test_what_may_not_be_read_refuses_its_delivery_and_not_the_others() -> None:
    with tempfile.TemporaryDirectory() as folder:
        zone = Path(folder)
        zone.chmod(0o755)
        land(zone, "good.jsonl", "closed/a.jsonl", "half/a.jsonl", "half/part-1/b.jsonl")
        for closed in (zone / "closed", zone / "half" / "part-1"):
            closed.chmod(0)
        command = [sys.executable, "-c", _LOOK_AS_NOBODY, folder]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
        for closed in (zone / "closed", zone / "half" / "part-1"):
            closed.chmod(0o755)
    assert run.stdout == "['good.jsonl'] ['closed', 'half']\n"


def test_a_look_reads_no_data(zone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    land(zone, "a.jsonl", "b/c.jsonl")
    for path in (zone / "a.jsonl", zone / "b" / "c.jsonl"):
        path.chmod(0)  # Root can read it anyway; the patched `open` fails.
    monkeypatch.setattr("builtins.open", lambda *_, **__: pytest.fail("a file was opened"))
    assert entries(landing.look(str(zone), ANY)) == {"a.jsonl": "a", "b": "b"}


def test_any_fsspec_url_serves(storage: Storage) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/zone/week/a.jsonl", ROW)
    found = landing.look("memory://zone", ANY)
    assert entries(found) == {"week": "week"}
    landing.announce(storage, "memory://zone", found.deliveries[0])
    assert delivered(storage, landing.receive(storage, "week")) == {"a.jsonl": ROW}


def test_an_object_stores_sign_of_a_folder_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    sign, file = ({"name": name, "size": size, "type": "file"} for name, size in (("/zone/w/", 0), ("/zone/w/a", 9)))
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: {"/zone/w/": sign, "/zone/w/a": file})
    [landed] = landing.look("memory://zone", ANY).deliveries
    assert landed.files == {"a": (9, "")}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["-rf.jsonl", "a b.jsonl", "x|y.jsonl", "[x].jsonl", "a..b.jsonl", "ü.jsonl", "a\nb.jsonl", "x" * 101]
)
def test_a_name_that_can_be_no_batch_is_refused_with_the_remedy(zone: Path, name: str) -> None:
    land(zone, name, "good.jsonl")
    found = landing.look(str(zone), ANY)
    assert entries(found) == {"good.jsonl": "good"}
    [(entry, why)] = found.refused.items()
    assert entry == (name if name.isprintable() else "a\\nb.jsonl")
    assert "cannot be used" in why
    assert why.endswith("; rename it")


def test_a_name_that_is_no_utf8_is_refused_and_can_be_stored(zone: Path, storage: Storage) -> None:
    land(zone, "good.jsonl")
    Path(os.fsdecode(os.fsencode(zone) + b"/bad\xff.jsonl")).write_bytes(ROW)
    found = landing.look(str(zone), ANY)
    landing.record_refused(storage, found.refused)
    assert list(landing.read_refused(storage)) == ["bad\\udcff.jsonl"]


def test_two_deliveries_of_one_batch_are_both_refused(zone: Path, check_sentence: Check) -> None:
    land(zone, "w.json", "w.jsonl.gz", "other.jsonl")
    found = landing.look(str(zone), ANY)
    assert entries(found) == {"other.jsonl": "other"}
    check_sentence(found.refused["w.json"])
    assert set(found.refused) == {"w.json", "w.jsonl.gz"}


@pytest.mark.parametrize("inside", [False, True])
def test_a_link_is_refused(zone: Path, tmp_path: Path, inside: bool, check_sentence: Check) -> None:
    secret = tmp_path / "secret.jsonl"
    secret.write_bytes(ROW)
    link = zone / ("week/rows.jsonl" if inside else "week.jsonl")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    found = landing.look(str(zone), ANY)
    assert found.deliveries == []
    check_sentence(next(iter(found.refused.values())))


def test_a_link_to_a_folder_above_it_is_no_endless_loop(zone: Path) -> None:
    land(zone, "week/rows.jsonl")
    (zone / "week" / "again").symlink_to(zone)
    assert list(landing.look(str(zone), ANY).refused) == ["week"]


@pytest.mark.parametrize("name", ["back\\slash.jsonl", "bell\a.jsonl", "n" * 201])
def test_a_file_of_an_odd_name_refuses_its_delivery(zone: Path, name: str, check_sentence: Check) -> None:
    land(zone, f"week/{name}")
    found = landing.look(str(zone), ANY)
    assert found.deliveries == []
    check_sentence(found.refused["week"])


def test_what_is_refused_is_recorded_once_and_forgotten_when_it_is_gone(zone: Path, storage: Storage) -> None:
    land(zone, "a b.jsonl")
    landing.record_refused(storage, landing.look(str(zone), ANY).refused)
    assert list(landing.read_refused(storage)) == ["a b.jsonl"]
    (zone / "a b.jsonl").unlink()
    landing.record_refused(storage, landing.look(str(zone), ANY).refused)
    assert landing.read_refused(storage) == {}


@pytest.mark.parametrize("names", [("w", "w/a.jsonl"), ("w/a", "w/a/b.jsonl")])
def test_what_is_a_file_and_a_folder_is_refused(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], check_sentence: Check
) -> None:
    infos = {f"/zone/{name}": {"name": f"/zone/{name}", "size": 9, "type": "file"} for name in names}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *_, **__: infos)  # As an object store lists them.
    found = landing.look("memory://zone", ANY)
    assert found.deliveries == []
    check_sentence(found.refused["w"])


# --- when it is complete -------------------------------------------------------------------------------------------


def test_without_a_marker_a_delivery_is_taken_when_it_stays_the_same_for_two_looks(zone: Path) -> None:
    land(zone, "a.jsonl")
    assert looks(zone, ANY, times=1)[0] == []
    taken, seen = looks(zone, ANY)
    assert taken == ["a.jsonl"]
    assert looks(zone, ANY, times=3, seen=seen)[0] == []


def test_a_delivery_that_grows_waits(zone: Path) -> None:
    land(zone, "week/a.jsonl")
    _, seen = looks(zone, ANY, times=1)
    land(zone, "week/b.jsonl")
    taken, seen = looks(zone, ANY, times=1, seen=seen)
    assert taken == []
    assert looks(zone, ANY, times=1, seen=seen)[0] == ["week"]


def test_an_unfinished_file_in_a_folder_keeps_it_waiting(zone: Path) -> None:
    land(zone, "week/a.jsonl", "week/b.jsonl.part")
    taken, seen = looks(zone, ANY, times=4)
    assert taken == []
    (zone / "week" / "b.jsonl.part").rename(zone / "week" / "b.jsonl")
    assert looks(zone, ANY, seen=seen)[0] == ["week"]


@pytest.mark.parametrize("settings", [ANY, MARKED])
def test_a_marker_says_at_once_that_a_delivery_is_complete(zone: Path, settings: LandingSettings) -> None:
    land(zone, "week/a.jsonl", "b.jsonl")
    land(zone, "week/_SUCCESS", "b.jsonl._SUCCESS", content=b"")
    assert looks(zone, settings, times=1)[0] == ["b.jsonl", "week"]


def test_the_marker_of_before_does_not_make_a_correction_complete(zone: Path) -> None:
    land(zone, "week/a.jsonl", "week/b.jsonl")
    land(zone, "week/_SUCCESS", content=b"")
    _, seen = looks(zone, ANY, times=1)
    (zone / "week" / "a.jsonl").unlink()
    taken, seen = looks(zone, ANY, times=1, seen=seen)
    assert taken == []
    land(zone, "week/a.jsonl.part")
    assert looks(zone, ANY, times=3, seen=seen)[0] == []
    (zone / "week" / "a.jsonl.part").rename(zone / "week" / "a.jsonl")
    assert looks(zone, ANY, times=2, seen=seen)[0] == ["week"]


def test_new_deliveries_are_taken_before_corrections(zone: Path) -> None:
    land(zone, "a.jsonl")
    _, seen = looks(zone, ANY)
    land(zone, "a.jsonl", content=ROW * 2)
    new = [f"z{number:02}.jsonl" for number in range(25)]
    land(zone, *new)
    taken, seen = looks(zone, ANY, seen=seen)
    assert taken == new
    assert looks(zone, ANY, times=1, seen=seen)[0] == ["a.jsonl"]


def test_where_the_marker_is_required_nothing_else_will_do(zone: Path) -> None:
    land(zone, "week/a.jsonl", "b.jsonl")
    assert looks(zone, MARKED, times=5)[0] == []


def test_a_marked_folder_without_a_file_is_an_empty_delivery_and_an_unmarked_one_is_none(zone: Path) -> None:
    land(zone, "marked/_SUCCESS", content=b"")
    (zone / "unmarked").mkdir()
    assert looks(zone, ANY)[0] == []
    assert looks(zone, ANY, times=1)[0] == ["marked"]


def test_a_corrected_delivery_is_taken_again_and_a_touched_one_too(zone: Path) -> None:
    land(zone, "a.jsonl")
    _, seen = looks(zone, ANY)
    os.utime(zone / "a.jsonl", (1, 1))
    taken, seen = looks(zone, ANY, seen=seen)
    assert taken == ["a.jsonl"]
    land(zone, "a.jsonl", content=ROW * 2)
    assert looks(zone, ANY, seen=seen)[0] == ["a.jsonl"]


def test_at_most_so_many_are_taken_at_one_look_and_the_rest_at_the_next(zone: Path) -> None:
    land(zone, *(f"{number:03}.jsonl" for number in range(60)))
    seen, counts, all_taken = Seen(), [], []
    for _ in range(5):
        taken, seen = looks(zone, ANY, times=1, seen=seen)
        counts.append(len(taken))
        all_taken += taken
    assert counts == [0, 25, 25, 10, 0]
    assert all_taken == [f"{number:03}.jsonl" for number in range(60)]


def test_what_is_gone_from_the_zone_is_forgotten(zone: Path) -> None:
    land(zone, "a.jsonl")
    _, seen = looks(zone, ANY)
    (zone / "a.jsonl").unlink()
    assert looks(zone, ANY, seen=seen)[1] == Seen()


@pytest.mark.parametrize("cursor", [None, "", "not json", "[]", '{"taken": 3}'])
def test_a_cursor_that_cannot_be_read_counts_as_nothing_seen(cursor: str | None) -> None:
    assert Seen.parse(cursor) == Seen()


# --- the copy ------------------------------------------------------------------------------------------------------


def announce(zone: Path, storage: Storage) -> str | None:
    """Announce the delivery in the zone; return its run key."""
    [landed] = landing.look(str(zone), ANY).deliveries
    return landing.announce(storage, str(zone), landed)


def test_an_announced_delivery_is_copied_when_it_is_received_and_kept(zone: Path, storage: Storage) -> None:
    packed = gzip.compress(ROW)
    land(zone, "week/a.jsonl")
    land(zone, "week/deep/b.jsonl.gz", content=packed)
    announce(zone, storage)
    assert not storage.deliveries.has("week")
    delivery = landing.receive(storage, "week")
    (zone / "week" / "a.jsonl").unlink()
    assert landing.receive(storage, "week") == delivery == storage.deliveries.current("week")
    assert delivered(storage, delivery) == {"a.jsonl": ROW, "deep/b.jsonl.gz": packed}
    assert not landing.is_announced(storage, "week")


def test_a_delivery_that_changed_since_it_was_complete_is_not_copied(
    zone: Path, storage: Storage, check_sentence: Check
) -> None:
    land(zone, "week.jsonl")
    announce(zone, storage)
    land(zone, "week.jsonl", content=ROW * 2)
    with pytest.raises(LandingError) as error:
        landing.receive(storage, "week")
    check_sentence(error.value)
    assert not storage.deliveries.has("week")


def test_a_delivery_that_is_gone_is_named(zone: Path, storage: Storage, check_sentence: Check) -> None:
    land(zone, "week.jsonl")
    announce(zone, storage)
    (zone / "week.jsonl").unlink()
    with pytest.raises(LandingError) as error:
        landing.receive(storage, "week")
    check_sentence(error.value)


def test_a_delivery_by_hand_takes_the_place_of_an_announced_one(zone: Path, storage: Storage) -> None:
    land(zone, "week.jsonl")
    announce(zone, storage)
    by_hand = storage.deliveries.store("week", {"other.jsonl": ROW})
    landing.settle(storage, "week")
    assert landing.receive(storage, "week") == by_hand
    assert announce(zone, storage) is None, "a lost cursor brings no old delivery back"
    assert landing.receive(storage, "week") == by_hand


def test_a_run_key_holds_path_size_times_and_how_many_there_were(zone: Path, storage: Storage) -> None:
    keys = []
    for content in (ROW, ROW * 2, ROW):  # The third restores the first, with its time.
        land(zone, "week.jsonl", content=content)
        os.utime(zone / "week.jsonl", (1, 1))
        keys.append(announce(zone, storage) or "")
        assert announce(zone, storage) == keys[-1]
        landing.receive(storage, "week")
    assert len(set(keys)) == 3
    assert keys[0].startswith(f"{zone}/week.jsonl|{len(ROW)} bytes|")
    assert delivered(storage, storage.deliveries.current("week")) == {"week.jsonl": ROW}


def test_a_batch_that_was_never_delivered_cannot_be_received(storage: Storage) -> None:
    with pytest.raises(StorageError, match="was never delivered"):
        landing.receive(storage, "week")
