"""status: the state of a batch in a few words."""

from __future__ import annotations

from qaq_pipeline.freshness.staleness import Stale
from qaq_pipeline.runs.status import BatchStatus, TableStatus
from qaq_pipeline_tests.support.sentences import Check
from qaq_pipeline_tests.support.uncalibrated import TABLES


def status_of(changed: dict[str, TableStatus], left_out: str | None = None, stale: Stale | None = None) -> str:
    tables = dict.fromkeys(TABLES, TableStatus(5, 1, 1)) | changed
    return BatchStatus("b1", tables, left_out, stale).state


def test_the_state_of_a_batch_names_the_first_table_that_is_not_as_it_should_be(check_sentence: Check) -> None:
    nothing, torn = TableStatus(None, 0, 1), TableStatus(None, 0, 1, is_readable=False)
    assert status_of({}) == "up to date"
    assert status_of({"decisions": nothing, "selected_subset": nothing}) == "no decisions yet"
    assert status_of({"rmi_scores": torn, "decisions": nothing}) == "rmi_scores unreadable"
    check_sentence(status_of({"logprobs": TableStatus(5, 1, 2)}))
    delivered = Stale("ingest_batch", "b1", None, "raw_data", "it was delivered again")
    check_sentence(status_of({}, "decisions are older than raw_data", delivered))
    check_sentence(status_of({}, "gated (empty_batch): it has no row", delivered))
    assert status_of({}, "selected by another") == "left out"
