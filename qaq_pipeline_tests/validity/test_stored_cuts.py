"""stored_cuts: whose cuts a batch takes over, and for which signals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import ValidityCuts, dtypes, enforce
from qaq_pipeline.schema.vocabularies import Defect, NoCutReason, Signal
from qaq_pipeline.scoring.stored_scores import scored_by
from qaq_pipeline.screening import batch_order
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import stored_cuts
from qaq_pipeline.validity.judgement import choose_cuts
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline_tests.support.frames import rmi_rows
from qaq_pipeline_tests.support.validity import CLEAN_PAIR, DROP_ALL, pairs_like, planted, sample, together

CODE = "1"
FEW = 8
"""Pairs of a small batch, each with one planted row of each defect."""


def cuts_of(size: int, batch: str, settings: ValiditySettings = DROP_ALL) -> pl.DataFrame:
    """The cuts that a batch of clean pairs and some defective ones gets from its own rows."""
    pairs = together(pairs_like(CLEAN_PAIR, size), pairs_like(Defect.OTHER_ANSWER, max(size // 4, 1), 5000))
    return choose_cuts(sample(pairs, planted(size), batch), settings)


def scores(**changes: Any) -> dict[str, StoredTable]:
    """rmi_scores as the models of every batch here made them, but for these changes of provenance."""
    made_by = {"identity_hash": "0", "scoring": {"prior": "null_answer"}} | changes
    return {role: StoredTable(rmi_rows({}), made_by) for role in ("strong", "weak")}


def store(storage: Storage, batch: str, cuts: pl.DataFrame, **changes: Any) -> None:
    made_of = {"partition": [batch], "inputs": {}, "code_version": CODE, "scored_by": scored_by(scores())} | changes
    storage.tables.write(StoredTable(enforce(ValidityCuts, cuts), made_of), stored_cuts.NAME, Partition(batch))


@pytest.fixture
def ordered(storage: Storage) -> Storage:
    """A storage that knows the batches b1, b2, b3, b4, in this order."""
    for batch in ("b1", "b2", "b3", "b4"):
        batch_order.take_place(storage, batch)
    return storage


def taken(storage: Storage, batch: str = "b3", by: Mapping[str, StoredTable] | None = None) -> str | None:
    """The batch whose cuts another one takes over."""
    older = stored_cuts.newest_older(storage, batch, scores() if by is None else by, CODE)
    return None if older is None else older.provenance["partition"][0]


# --- which batch ----------------------------------------------------------------------------------------------------


def test_the_newest_older_batch_is_taken(ordered: Storage) -> None:
    for batch in ("b1", "b2", "b4"):
        store(ordered, batch, cuts_of(60, batch))
    assert taken(ordered) == "b2"
    older = stored_cuts.newest_older(ordered, "b3", scores(), CODE)
    assert older is not None
    assert_frame_equal(older.frame, cuts_of(60, "b2"), check_exact=True)


def test_a_newer_batch_is_never_taken(ordered: Storage) -> None:
    store(ordered, "b4", cuts_of(60, "b4"))
    assert taken(ordered) is None
    assert taken(ordered, "b1") is None


def test_a_batch_without_a_place_takes_the_newest_of_all(ordered: Storage) -> None:
    for batch in ("b1", "b4"):
        store(ordered, batch, cuts_of(60, batch))
    assert taken(ordered, "b5") == "b4"


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"scored_by": scored_by(scores(identity_hash="1"))}, id="other models"),
        pytest.param({"scored_by": scored_by(scores(scoring={"prior": "user"}))}, id="asked differently"),
        pytest.param({"code_version": "2"}, id="other code or settings"),
    ],
)
def test_cuts_that_were_made_otherwise_are_passed_over(ordered: Storage, changes: dict[str, Any]) -> None:
    store(ordered, "b1", cuts_of(60, "b1"))
    store(ordered, "b2", cuts_of(60, "b2"), **changes)
    assert taken(ordered) == "b1"


def test_scores_of_other_models_take_nothing_over(ordered: Storage) -> None:
    store(ordered, "b2", cuts_of(60, "b2"))
    assert taken(ordered, by=scores(identity_hash="1")) is None


def test_a_batch_that_itself_lacks_rows_is_passed_over(ordered: Storage) -> None:
    store(ordered, "b1", cuts_of(60, "b1"))
    store(ordered, "b2", cuts_of(FEW, "b2"))
    assert taken(ordered) == "b1"


def test_cuts_that_cannot_be_read_are_passed_over(ordered: Storage) -> None:
    for batch in ("b1", "b2"):
        store(ordered, batch, cuts_of(60, batch))
    Path(ordered.tables.url(stored_cuts.NAME, Partition("b2"))).write_bytes(b"PAR1")
    assert taken(ordered) == "b1"


def test_a_file_with_a_good_footer_and_a_damaged_body_is_passed_over(ordered: Storage) -> None:
    for batch in ("b1", "b2"):
        store(ordered, batch, cuts_of(60, batch))
    path = Path(ordered.tables.url(stored_cuts.NAME, Partition("b2")))
    stored = bytearray(path.read_bytes())
    stored[4:200] = bytes(196)
    path.write_bytes(stored)
    assert ordered.tables.readable_footer(stored_cuts.NAME, Partition("b2")) is not None
    assert taken(ordered) == "b1"


def test_cuts_that_were_taken_over_are_not_handed_on(ordered: Storage) -> None:
    store(ordered, "b1", cuts_of(60, "b1"))
    store(ordered, "b2", stored_cuts.filled(cuts_of(FEW, "b2"), cuts_of(60, "b0")))
    assert taken(ordered) == "b1"


# --- what is taken over ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "lacks"),
    [
        (None, False),
        (NoCutReason.TURNED_OFF, False),
        (NoCutReason.NOT_PLANTED, False),
        (NoCutReason.CANNOT_TELL, False),
        (NoCutReason.NOT_SCORED, True),
        (NoCutReason.TOO_FEW_PLANTED, True),
    ],
)
def test_a_signal_lacks_rows_where_more_of_them_could_give_it_a_cut(reason: NoCutReason | None, lacks: bool) -> None:
    null = None if reason is None else reason.value
    cuts = cuts_of(60, "b1").with_columns(
        null_reason=pl.when(pl.col("signal") == "echo").then(pl.lit(null, pl.String)).otherwise("null_reason")
    )
    assert stored_cuts.lacks_rows(cuts) is lacks


def test_a_small_batch_takes_every_cut_over_in_the_order_of_the_signals() -> None:
    own, older = cuts_of(FEW, "b2"), cuts_of(60, "b1")
    assert set(own["null_reason"]) == {NoCutReason.TOO_FEW_PLANTED.value}
    filled = enforce(ValidityCuts, stored_cuts.filled(own, older.reverse()))
    assert_frame_equal(filled, older, check_exact=True)
    assert filled["signal"].to_list() == [one.signal.value for one in SIGNALS]
    assert filled["chosen_from"].to_list() == [["b1"]] * len(SIGNALS)


def test_only_the_signals_that_lack_rows_are_filled() -> None:
    older = cuts_of(60, "b1")
    pairs = pairs_like(CLEAN_PAIR, 60, 9000)
    rows = together(
        *(planted(FEW if defect is Defect.ECHO else 60, defect) for defect in (Defect.ECHO, Defect.OTHER_ANSWER))
    )
    settings = ValiditySettings.model_validate(DROP_ALL.model_dump() | {"unclosed": "off"})
    own = choose_cuts(sample(pairs, rows, "b2"), settings)
    filled = stored_cuts.filled(own, older)
    from_older = dict(filled.select("signal", "chosen_from").iter_rows())
    assert from_older == {signal.value: ["b1" if signal is Signal.ECHO else "b2"] for signal in Signal}
    assert_frame_equal(filled.filter(signal="echo"), older.filter(signal="echo"), check_exact=True)
    others = pl.col("signal") != "echo"
    assert_frame_equal(filled.filter(others), own.filter(others), check_exact=True)


def test_a_batch_that_lacks_nothing_stays_as_it_is() -> None:
    own = cuts_of(60, "b2")
    assert not stored_cuts.lacks_rows(own)
    assert_frame_equal(stored_cuts.filled(own, cuts_of(60, "b1")), own, check_exact=True)


def test_a_batch_of_nothing_takes_every_cut_over() -> None:
    nothing = choose_cuts(sample(pairs_like(CLEAN_PAIR, 1).clear(), planted(), "b2"), DROP_ALL)
    assert stored_cuts.lacks_rows(nothing)
    older = cuts_of(60, "b1")
    assert_frame_equal(stored_cuts.filled(nothing, older), older, check_exact=True)
    assert not stored_cuts.lacks_rows(pl.DataFrame(schema=dtypes(ValidityCuts)))
