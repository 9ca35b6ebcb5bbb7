"""status: the state of a batch in a few words."""

from __future__ import annotations

import time
from pathlib import Path

import dagster as dg
from dagster._core.events.log import EventLogEntry

from qaq_pipeline.freshness.staleness import Stale
from qaq_pipeline.orchestration import liveness
from qaq_pipeline.runs.status import BatchStatus, TableStatus, running
from qaq_pipeline.storage.locks import FileLocks
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


def test_a_run_at_work_is_named_with_the_newest_line_of_its_log(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    def add(job: str, status: dg.DagsterRunStatus, partition: str, *lines: str, is_dead: bool = False) -> str:
        assets = frozenset({dg.AssetKey("logprobs")})
        run = dg.DagsterRun(job_name=job, status=status, tags={"dagster/partition": partition}, asset_selection=assets)
        instance.add_run(run)
        if is_dead:
            instance.add_run_tags(run.run_id, {liveness.TAG: f"{run.run_id} somewhere"})
        for line in lines:
            instance.handle_new_event(EventLogEntry(None, 20, line, run.run_id, time.time(), job_name=job))
        return run.run_id[:8]

    add("score_batch", dg.DagsterRunStatus.SUCCESS, "b0|strong", "done")
    add("score_batch", dg.DagsterRunStatus.STARTED, "b0|weak", "weak: 1 of 9 sequences", is_dead=True)
    scoring = add("score_batch", dg.DagsterRunStatus.STARTED, "b1|strong", "to score: 10", "strong: 3 of 9 sequences")
    starting = add("__ASSET_JOB", dg.DagsterRunStatus.STARTING, "b1|weak")
    assert running(instance, FileLocks(tmp_path)) == [
        f"score_batch of b1|strong (started, run {scoring}): strong: 3 of 9 sequences",
        f"logprobs of b1|weak (starting, run {starting})",
    ]
