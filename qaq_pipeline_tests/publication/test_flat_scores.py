"""flat_scores: every score and verdict of every row as a column, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.publication.flat_scores import flat_scores, head, nested_row, write
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions, dtypes, enforce
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.publication.test_exports import selected
from qaq_pipeline_tests.support.frames import RMI_SCORE, pair_name

SCORE = RMI_SCORE | {"stratum": 1, "num_strata": 1, "rank": 0.75, "null_reason": None, "null_reason_end": None}
VERDICT = {"reason": "within_budget", "score": 0.25, "position": 1, "cut": 0.25, "pool_size": 2}


def decisions(*rows: dict[str, Any]) -> pl.DataFrame:
    """Decisions of rows 1, 2, 3, …: two models, two selections, unless a row says otherwise."""
    common = {
        "batch": "b1",
        "source_file": "a.jsonl",
        "turn_index": 0,
        "decision": "selected",
        "reason": "within_budget",
        "explanation": "Because.",
        "gap": 0.25,
        "rank_sum": 1.25,
        "provenance_id": pair_name(0),
        "scores": [SCORE | {"model": "strong"}, SCORE | {"model": "weak", "rmi": -0.5, "rank": 0.5}],
        "verdicts": [
            VERDICT | {"selection": "diff_high", "is_selected": True},
            VERDICT | {"selection": "control_random", "is_selected": False, "position": 2},
        ],
    }
    numbered = [{"source_row": n, "pair_id": pair_name(n)} | row for n, row in enumerate(rows, start=1)]
    return enforce(Decisions, pl.DataFrame([common | row for row in numbered], schema=dtypes(Decisions)))


REJECTED = {
    "pair_id": None,
    "decision": "rejected",
    "reason": "empty_query",
    "gap": None,
    "rank_sum": None,
    "scores": [],
    "verdicts": [],
}
DUPLICATE = {
    "pair_id": pair_name(1),
    "decision": "duplicate",
    "reason": "exact_duplicate",
    "duplicate_of": "b1/a.jsonl:1.0",
    "verdicts": [],
}


def test_flat_scores_have_a_column_for_each_score_and_model_and_each_selection() -> None:
    flat = flat_scores(decisions({}, REJECTED, DUPLICATE))
    kept = ["pair_id", "decision", "reason", "explanation", "duplicate_of", "similarity", "evidence"]
    kept += ["gap", "rank_sum", "provenance_id"]
    by_model = [f"{field}_{role}" for role in ("strong", "weak") for field in SCORE]
    by_selection = [
        f"{field}:{name}"
        for name in ("diff_high", "control_random")
        for field in ("is_selected", "reason", "score", "position")
    ]
    assert flat.columns == [*ROW_KEY, *kept, *by_model, *by_selection]
    assert not any(dtype.is_nested() for dtype in flat.dtypes)


def test_flat_scores_keep_every_row_in_order_with_its_own_numbers() -> None:
    flat = flat_scores(decisions({}, REJECTED, DUPLICATE))
    assert flat["source_row"].to_list() == [1, 2, 3]
    assert flat["rmi_strong"].to_list() == [0.5, None, 0.5]
    assert flat["rmi_weak"].to_list() == [-0.5, None, -0.5]
    assert flat["rank_weak"].to_list() == [0.5, None, 0.5]
    assert flat["is_selected:diff_high"].to_list() == [True, None, None]
    assert flat["position:control_random"].to_list() == [2, None, None]


def written(folder: Path, *batches: pl.DataFrame) -> pl.DataFrame:
    """The scores files of batches."""
    columns = head(StoredTable(batch) for batch in batches)
    for number, batch in enumerate(batches):
        write(StoredTable(batch), columns, folder / f"{number}.parquet")
    return pl.concat(pl.read_parquet(folder / f"{number}.parquet") for number in range(len(batches)))


def test_the_scores_file_joins_the_training_rows_on_either_key(tmp_path: Path) -> None:
    scores = written(tmp_path, decisions({}, {}, DUPLICATE))
    rows = selected((None, "q", "a"), (None, "r", "b"))
    by_row = rows.join(scores, on=ROW_KEY, how="left", validate="1:1")
    assert by_row["rmi_strong"].to_list() == [0.5, 0.5]
    by_pair = rows.join(scores, on="pair_id", how="left", validate="1:m")
    assert by_pair["decision"].to_list() == ["selected", "duplicate", "selected"]


def test_scores_of_a_batch_without_pairs_are_its_rows() -> None:
    flat = flat_scores(decisions(REJECTED))
    assert flat["decision"].to_list() == ["rejected"]
    assert flat_scores(decisions()).is_empty()


def test_batches_of_other_models_and_selections_lie_side_by_side(tmp_path: Path) -> None:
    other = {
        "batch": "b2",
        "scores": [SCORE | {"model": "tiny"}],
        "verdicts": [VERDICT | {"selection": "rmi_band", "is_selected": True}],
    }
    one, two, three = decisions(REJECTED, {}), decisions(other, REJECTED | {"batch": "b2"}), decisions()
    flat = flat_scores(pl.concat([one, two]))
    assert written(tmp_path, one, three, two).equals(flat)
    flat = flat.filter(pl.col("pair_id").is_not_null())
    assert flat["rmi_tiny"].to_list() == [None, 0.5]
    assert flat["rmi_strong"].to_list() == [0.5, None]
    assert flat["is_selected:rmi_band"].to_list() == [None, True]


def test_a_scores_file_that_is_written_in_parts_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_file, "ROWS_PER_GROUP", 1)
    gated = {"verdicts": [], "decision": "batch_gated", "reason": "too_many_rejected"}
    for rows in ([REJECTED, DUPLICATE, {}, REJECTED, {}], [REJECTED, gated], [REJECTED], []):
        assert written(tmp_path, decisions(*rows)).equals(flat_scores(decisions(*rows)))


def test_a_flat_row_is_nested_again_with_all_that_it_holds() -> None:
    frame = decisions({}, REJECTED, DUPLICATE)
    shown = ("selection", "is_selected", "reason", "score", "position")
    for row, flat in zip(frame.iter_rows(named=True), flat_scores(frame).iter_rows(named=True), strict=True):
        nested = nested_row(flat)
        assert nested["scores"] == row["scores"]
        assert nested["verdicts"] == [{name: verdict[name] for name in shown} for verdict in row["verdicts"]]
        assert {name: nested[name] for name in row if name not in ("scores", "verdicts")} == {
            name: value for name, value in row.items() if name not in ("scores", "verdicts")
        }
