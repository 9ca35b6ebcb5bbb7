"""held_out: the side of each row, drawn by its cluster; no side changes, and no similar rows are on both sides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import GateSettings, HeldOutSettings, ScreeningSettings
from qaq_pipeline.schema.draws import draws
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import row_place
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening import batch_order, duplicates, gates
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.screening.screen_batch import FoundBenchmarks, Neighbours, screen_batch
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.screening.test_clusters import (
    LONG,
    NO_BENCHMARK,
    WORDS,
    are_linked,
    clusters_of,
    row,
    screened_in_order,
    settings,
)
from qaq_pipeline_tests.support.frames import raw_rows

HALF = HeldOutSettings(share=0.5)
Rows = Sequence[dict[str, Any]]


class Home:
    """A storage to which batches are delivered, and in which they are screened."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def deliver(
        self, batch: str, rows: Rows, hold_out: HeldOutSettings = HALF, threshold: float = 0.9
    ) -> dict[int, str]:
        """Screen a delivery, or the stored one again; the status of each row."""
        raw = StoredTable(raw_rows(*rows, batch=batch), {"partition": [batch]})
        signed = StoredTable(duplicates.signatures(raw.frame), {"signature_version": duplicates.SIGNATURE_VERSION})
        others = Neighbours(
            batch_order.batches_before(self.storage, batch), batch_order.batches_after(self.storage, batch)
        )
        found = FoundBenchmarks(NO_BENCHMARK, {})
        how = settings(cluster_threshold=threshold)
        made = screen_batch(self.storage, raw, signed, others, found, how, GateSettings(), hold_out)
        stored = {"raw_data": raw, "signatures": signed, "screened_data": StoredTable(made.frame, dict(made.facts))}
        for name, table in stored.items():
            self.storage.tables.write(table, name, Partition(batch))
        if made.gate is None:
            batch_order.take_place(self.storage, batch)
        return dict(made.frame.select("source_row", "status").iter_rows())

    def screened(self, batch: str) -> pl.DataFrame:
        return self.storage.tables.read("screened_data", Partition(batch)).frame


@pytest.fixture
def home(storage: Storage) -> Home:
    return Home(storage)


def named(place: int, *, is_drawn: bool, batch: str = "b0", share: float = 0.5) -> Iterator[int]:
    """Seeds with which the cluster of a batch's row is drawn, or is not."""
    for seed in range(1000):
        if (draws(pl.Series([f"{batch}/a.jsonl:{place}.0"]), seed)[0] < share) == is_drawn:
            yield seed


def seed_for(drawn: Sequence[int], others: Sequence[int] = (), batch: str = "b0") -> HeldOutSettings:
    """Settings with which exactly these rows of a batch are held out, where each is a cluster of its own."""
    wanted = [set(named(place, is_drawn=True, batch=batch)) for place in drawn]
    wanted += [set(named(place, is_drawn=False, batch=batch)) for place in others]
    return HeldOutSettings(share=0.5, seed=min(set.intersection(*wanted)))


def distinct(number: int) -> list[dict[str, Any]]:
    return [row(f"query {place}", f"answer {place}") for place in range(number)]


# --- the share


def test_without_a_share_every_distinct_row_is_accepted() -> None:
    raw = raw_rows(*distinct(50), row("query 1", "answer  1"))
    found = screen_alone(raw, ScreeningSettings())
    assert set(found["status"]) == {"accepted", "duplicate"}
    assert found.filter(status="accepted").select("reason", "evidence").null_count().row(0) == (50, 50)


def test_off_again_the_stored_batches_are_as_without_it(home: Home, storage: Storage) -> None:
    rows, off = distinct(40), HeldOutSettings()
    assert "held_out" in home.deliver("b0", rows).values()
    home.deliver("b0", rows, off)
    home.deliver("b1", [*rows[:10], row("query 0", "other")], off)
    plain = screened_in_order(
        [raw_rows(*rows, batch="b0"), raw_rows(*rows[:10], row("query 0", "other"), batch="b1")], settings()
    )
    assert_frame_equal(home.screened("b0"), plain[0])
    assert_frame_equal(home.screened("b1"), plain[1])


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_of_the_clusters_is_held_out_by_the_keyed_hash(home: Home, share: float) -> None:
    home.deliver("b0", distinct(2000), HeldOutSettings(share=share, seed=3))
    frame = home.screened("b0")
    held_out = frame["status"] == Status.HELD_OUT.value
    num_held_out = frame.filter(held_out).height
    # Four standard deviations of a binomial share.
    assert abs(num_held_out / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5
    assert held_out.equals(draws(frame.select(row_place()).to_series(), 3) < share)


def test_a_cluster_is_held_out_as_a_whole_and_its_duplicates_are_duplicates(home: Home) -> None:
    rows = [row("same", str(number)) for number in range(8)] + [row("same", "3")]
    assert home.deliver("b0", rows, seed_for([1])) == dict.fromkeys(range(1, 9), "held_out") | {9: "duplicate"}
    assert home.deliver("b1", [row("same", "3"), row("same", "new")], seed_for([1])) == {1: "duplicate", 2: "held_out"}
    duplicate = home.screened("b1").row(0, named=True)
    assert duplicate["duplicate_of"] == "b0/a.jsonl:4.0"


# --- no side changes


def test_what_was_accepted_stays_accepted_if_the_share_is_raised(home: Home) -> None:
    home.deliver("b0", distinct(40), HeldOutSettings(share=0.05))
    before = home.screened("b0")
    home.deliver("b0", [*distinct(40), *(row(f"new {number}", "x") for number in range(40))], HALF)
    after = home.screened("b0")
    assert after.head(40)["status"].equals(before["status"])
    assert after.tail(40)["status"].unique().sort().to_list() == ["accepted", "held_out"]


def test_rows_of_a_home_that_was_kept_without_a_share_stay_accepted(home: Home) -> None:
    home.deliver("b0", distinct(40), HeldOutSettings())
    assert set(home.deliver("b0", distinct(40), HALF).values()) == {"accepted"}


def test_a_gated_batch_was_never_trained_on(home: Home) -> None:
    unreadable = {"status": "rejected", "pair_id": None, "query": None, "answer": None, "reason": "bad_json"}
    broken = [unreadable | {"detail": "column 1"}] * 40
    home.deliver("b0", [*distinct(40), *broken], HeldOutSettings())
    assert gates.of_provenance(home.storage.tables.footer("screened_data", Partition("b0")).provenance) is not None
    assert "held_out" in home.deliver("b0", distinct(40), HALF).values()


def test_a_duplicate_that_stands_for_an_accepted_row_that_is_gone_stays_accepted(home: Home) -> None:
    trained = seed_for([2], [1])
    rows = [row("query", "answer"), row("query ", "answer")]
    assert home.deliver("b0", rows, trained) == {1: "accepted", 2: "duplicate"}
    gone = {"status": "rejected", "pair_id": None, "query": None, "answer": None, "reason": "bad_json", "detail": "x"}
    readable = distinct(8)
    assert home.deliver("b0", [rows[0] | gone, rows[1], *readable], trained)[2] == "accepted"
    assert Home(home.storage).screened("b0")["cluster"][1] == "b0/a.jsonl:2.0"


def test_a_twin_of_a_held_out_row_is_held_out_and_a_twin_of_an_accepted_one_accepted(home: Home) -> None:
    home.deliver("b0", distinct(2), seed_for([1], [2]))
    rows = [row("query 0", "another"), row("query 1", "another")]
    opposite = seed_for([2], [1], batch="b1")
    assert home.deliver("b1", rows, opposite) == {1: "held_out", 2: "accepted"}
    frame = home.screened("b1")
    assert frame["cluster"].to_list() == ["b0/a.jsonl:1.0", "b0/a.jsonl:2.0"]
    assert frame.select("reason", "evidence").row(0) == (
        "similar_to_held_out",
        "its cluster contains the held-out row b0/a.jsonl:1.0",
    )


def test_a_row_that_bridges_both_sides_is_in_neither_and_so_are_rows_that_are_similar_to_it_alone(home: Home) -> None:
    home.deliver("b0", [row("one", LONG[0]), row("two", LONG[1])], seed_for([1], [2]), threshold=0.7)
    bridge = [row("one", LONG[1]), row("one", "new"), row("three", LONG[1] + " more"), row("four", "free")]
    alone = seed_for([], [4], batch="b1")
    sides = home.deliver("b1", bridge, alone, threshold=0.7)
    assert sides == dict.fromkeys([1, 2, 3], "between") | {4: "accepted"}
    frame = home.screened("b1")
    evidence = "its cluster contains the row b0/a.jsonl:2.0, which is trained on, and the held-out row b0/a.jsonl:1.0"
    assert frame.head(3).select("reason", "evidence").unique().rows() == [("similar_to_both", evidence)]
    assert home.deliver("b2", [row("three", "x"), row("one", "y"), row("two", "z")], alone, threshold=0.7) == {
        1: "between",
        2: "between",
        3: "accepted",
    }


def test_screened_again_nothing_changes(home: Home) -> None:
    home.deliver("b0", [row("one", LONG[0]), row("two", LONG[1])], seed_for([1], [2]), threshold=0.7)
    rows = [row("one", LONG[1]), row("two", "new"), *distinct(20)]
    home.deliver("b1", rows, seed_for([1], [2]), threshold=0.7)
    before = [home.screened(batch) for batch in ("b0", "b1")]
    home.deliver("b0", [row("one", LONG[0]), row("two", LONG[1])], seed_for([1], [2]), threshold=0.7)
    home.deliver("b1", rows, seed_for([1], [2]), threshold=0.7)
    for old, new in zip(before, [home.screened(batch) for batch in ("b0", "b1")], strict=True):
        assert_frame_equal(old, new)


def test_a_lower_or_other_draw_releases_nothing(home: Home) -> None:
    before = home.deliver("b0", distinct(40), HALF)
    assert home.deliver("b0", distinct(40), HeldOutSettings(share=0.01, seed=9)) == before
    assert "it was held out before" in home.screened("b0")["evidence"].to_list()


def test_pairs_that_a_lower_threshold_links_keep_their_sides_and_a_new_row_between_them_has_none(home: Home) -> None:
    rows = [row("one", LONG[0]), row("one more", f"{LONG[0]} and some words more at the end")]
    sides = {1: "held_out", 2: "accepted"}
    assert home.deliver("b0", rows, seed_for([1], [2])) == sides
    again = [*rows, row("one", "new")]
    assert home.deliver("b0", again, seed_for([1], [2]), threshold=0.5) == sides | {3: "between"}
    assert home.screened("b0")["cluster"].unique().to_list() == ["b0/a.jsonl:1.0"]


def test_a_new_row_of_an_older_batch_follows_its_twin_in_a_newer_one(home: Home) -> None:
    home.deliver("b0", distinct(1), seed_for([], [1]))
    later = [row("later", "x"), row("equal", "same")]
    home.deliver("b1", later, seed_for([], [1, 2], batch="b1"))
    drawn = seed_for([2, 3], [])
    again = [*distinct(1), row("later", "y"), row("equal", "same ")]
    assert home.deliver("b0", again, drawn) == dict.fromkeys([1, 2, 3], "accepted")
    assert home.deliver("b1", later, drawn) == {1: "accepted", 2: "duplicate"}


# --- no similar rows on both sides

_TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)
_ROWS = st.lists(st.tuples(st.sampled_from(["same", "so", "q"]), _TEXTS, st.booleans()), min_size=1, max_size=8)


@effort(max_examples=3, deadline=None)
@given(batches=st.lists(_ROWS, min_size=2, max_size=4), seed=st.integers(0, 99))
def test_no_similar_rows_are_on_both_sides_whatever_is_delivered_again(
    batches: list[list[tuple[str, str, bool]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("home")
    home, random_ = Home(Storage(str(folder / "storage"), folder / "locks")), random.Random(seed)
    pool = [text for rows in batches for _, text, _ in rows]
    made: dict[str, list[dict[str, Any]]] = {}
    once: dict[str, str] = {}
    order = [f"b{number}" for number in range(len(batches))]
    for step, batch in enumerate([*order, *order, *order]):
        if batch in made and step < 2 * len(order):  # Some rows more, whatever they are similar to.
            made[batch] += [row(f"q {random_.random()}", random_.choice(pool)) for _ in range(2)]
            made[batch].append(row(random_.choice(["same", "so", "new"]), random_.choice(pool)))
        elif batch not in made:
            rows = batches[order.index(batch)]
            made[batch] = [row(kind if is_same else f"{kind} {text}", text) for kind, text, is_same in rows]
        home.deliver(batch, made[batch], HeldOutSettings(share=0.4, seed=seed))
        for pair, side in sides_of(home, made).items():
            assert side == once.setdefault(pair, side)
    sides = sides_of(home, made)
    texts = {one["pair_id"]: one for rows in made.values() for one in rows}
    for first, one in sides.items():
        for second, other in sides.items():
            assert one == other or not are_linked(texts[first], texts[second], 0.9)


def sides_of(home: Home, made: dict[str, list[dict[str, Any]]]) -> dict[str, str]:
    """Accepted or held_out of each pair that is on a side in any batch."""
    on_a_side = [home.screened(batch).filter(pl.col("status").is_in(["accepted", "held_out"])) for batch in made]
    return dict(pl.concat(on_a_side).select("pair_id", "status").iter_rows())


def test_the_batches_after_one_are_those_screened_later(storage: Storage) -> None:
    for earlier, later in pairwise(["b0", "b1", "b2"]):
        batch_order.take_place(storage, earlier)
        batch_order.take_place(storage, later)
    assert batch_order.batches_after(storage, "b0") == ["b1", "b2"]
    assert batch_order.batches_after(storage, "b3") == []


def test_clusters_are_the_same_whatever_is_held_out(home: Home) -> None:
    rows = [row("one", "x"), row("one", "y"), row("two", "z")]
    home.deliver("b0", rows, seed_for([1], [3]))
    stored = home.screened("b0")
    assert dict(stored.select(row_place(), "cluster").iter_rows()) == clusters_of(raw_rows(*rows, batch="b0"))
