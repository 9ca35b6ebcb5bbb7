"""table_numbers: counts, shares and medians of small tables, by hand."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from pydantic import TypeAdapter

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.ingest.imported_tables import ImportedTable
from qaq_pipeline.publication.curated_dataset import Publication
from qaq_pipeline.reports import table_numbers
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline_tests.selection.test_strategies import pairs
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}


def test_values_are_counted_most_frequent_first_and_nulls_left_out() -> None:
    counts = table_numbers.count_by(pl.Series("reason", ["b", None, "a", "c", "b"]))
    assert list(counts.items()) == [("b", 2), ("a", 1), ("c", 1)]


def test_rows_of_a_delivery_by_status() -> None:
    assert table_numbers.of_raw_data(raw_rows({}, rejected(), {}), {"a.jsonl": "0"}, {"tests": 2}) == {
        "accepted": 2,
        "rejected": 1,
        "rejected_by_reason": {"empty_query": 1},
        "unread_fields": {"tests": 2},
        "files": {"a.jsonl": "0"},
    }


def test_rows_of_a_screening_by_status_and_reason() -> None:
    rows = raw_rows({"pair_id": pair_name(1)}, {"pair_id": pair_name(1)}, rejected())
    found = table_numbers.of_screened_data(screen_alone(rows, ScreeningSettings()), ["b0"], {"humaneval": "0"})
    assert found["rows_by_status"] == {"accepted": 1, "duplicate": 1, "rejected": 1}
    assert found["rows_by_reason"] == {"empty_query": 1, "exact_duplicate": 1}
    assert (found["compared_with_batches"], found["benchmarks"]) == (["b0"], {"humaneval": "0"})


def test_medians_of_scores_leave_out_what_no_pair_has() -> None:
    found = table_numbers.of_rmi_scores(rmi_rows({"rmi": 0.25}, {"rmi": 0.75}, UNSCORED))
    assert (found["scorable"], found["median_rmi"]) == (2, 0.5)
    assert found["null_reasons_rmi"] == {"query_too_long": 1}
    assert "median_rmi" not in table_numbers.of_rmi_scores(rmi_rows(UNSCORED))


def test_ranks_of_one_pair_have_no_correlation() -> None:
    frame, _ = disagreement_scores({role: rmi_rows({}) for role in ("strong", "weak")}, ONE_STRATUM, "batch:b1")
    assert table_numbers.of_disagreement_scores(frame, ["few"]) == {
        "ranked_by_both": 1,
        "num_strata": 1,
        "warnings": ["few"],
    }
    both = {role: rmi_rows({"rmi": 0.1}, {"rmi": 0.2}) for role in ("strong", "weak")}
    frame, _ = disagreement_scores(both, ONE_STRATUM, "batch:b1")
    assert table_numbers.of_disagreement_scores(frame, [])["spearman_of_ranks"] == pytest.approx(1)


def test_the_selected_share_of_no_row_is_left_out() -> None:
    assert table_numbers.of_selected_subset(1, 4, "mine")["share_of_rows_in"] == 0.25
    assert table_numbers.of_selected_subset(0, 0, "mine") == {"selection": "mine", "rows_in": 0}


def test_changes_of_a_version_are_counted_by_cause() -> None:
    changes = [("entered", "batch_entered", 2), ("left", "row_gone", 1)]
    entries = [{"batch": "b1", "rows_in": 5, "rows_selected": 2}, {"batch": "b2", "rows_in": 7, "rows_selected": 3}]
    published = Publication("v1", {"batches": entries}, "file://v1", True, "v0", changes)
    found = table_numbers.of_publication(published, {"b3": "gated"})
    assert (found["dagster/row_count"], found["rows_in"], found["batches"]) == (5, 12, ["b1", "b2"])
    assert (found["rows_entered"], found["rows_left"], found["excluded_batches"]) == (2, 1, {"b3": "gated"})
    assert found["changes"] == {"entered: batch_entered": 2, "left: row_gone": 1}
    first = table_numbers.of_publication(Publication("v0", {"batches": []}, "file://v0", True), {})
    assert "previous_version" not in first


def selection(**values: Any) -> Selection:
    return TypeAdapter(Selection).validate_python({"name": "mine"} | values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strategy": "diff_high", "budget": {"fraction": 0.5}}, None),
        ({"strategy": "diff_high", "budget": {"count": 9}}, "takes 5 of at most 9 pairs"),
        ({"strategy": "diff_high", "min_gap": 0.25, "budget": {"fraction": 1.0}}, "takes 2 of at most 5 pairs"),
        ({"strategy": "diff_high", "budget": {"answer_tokens": 45}}, None),
        ({"strategy": "length", "budget": {"answer_tokens": 1000}}, "takes 50 of at most 1,000 answer tokens"),
        ({"strategy": "rmi_band", "band": [0.9, 1.0]}, None),
    ],
)
def test_a_budget_that_is_not_reached_is_told(given: dict[str, Any], said: str | None) -> None:
    frame, chosen = pairs(gap=[0.1, 0.2, 0.3, 0.4, -0.1]), selection(**given)
    verdicts = select_all(frame, [chosen])
    assert table_numbers.not_reached([chosen], verdicts, frame) == ({} if said is None else {"mine": said})


def test_a_quota_that_a_group_cannot_fill_is_told() -> None:
    frame = pairs(gap=[0.1, 0.2, 0.3, 0.4]).with_columns(pl.Series("column:language", ["c", "go", "go", None] * 2))
    quotas = {"per": "language", "shares": {"c": 0.5, "go": 0.5}}
    chosen = selection(strategy="diff_high", budget={"count": 4}, quotas=quotas)
    found = table_numbers.not_reached([chosen], select_all(frame, [chosen]), frame)
    assert found == {"mine": "takes 3 of at most 4 pairs"}


def test_rows_of_imported_tables_that_belong_to_no_pair_are_counted() -> None:
    raw = raw_rows({}, {})
    screened = screen_alone(raw, ScreeningSettings())
    rows = pl.DataFrame({"key": [pair_name(2), pair_name(3)], "score": ["7", "8"]})
    found = table_numbers.of_imported_tables({"judge": ImportedTable("pair_id", "0", rows)}, raw, screened)
    assert found == {"imported_tables": {"judge": {"sha256": "0", "rows": 2, "rows_of_no_pair": 1}}}
    assert table_numbers.of_imported_tables({}, raw, screened) == {}
