"""Runs that make the audit pages which are missing or stale."""

from __future__ import annotations

from collections.abc import Iterable

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.reports import page_store
from qaq_pipeline.runs.job_runs import InterruptedRunError, RunError, Runner
from qaq_pipeline.storage.storage import open_storage


def make_pages(settings: Settings, run: Runner, batches: Iterable[str]) -> list[str]:
    """Make the pages of these batches that are missing or out of date; a sentence for each that could not be made."""
    storage = open_storage(settings)
    version = present(settings, storage).code_versions.get("batch_report")
    due = [batch for batch in batches if settings.reports.pages and page_store.is_outdated(storage, batch, version)]
    return [fault for batch in due if (fault := make_page(settings, run, PIPELINE["batch_report"].job, batch))]


def make_page(settings: Settings, run: Runner, job_name: str, partition: str | None) -> str | None:
    """Run the job of a page. Nothing waits for a page, so its failure is a sentence; None: made, or not wanted.

    Raises:
        InterruptedRunError: a signal ended the driver.
    """
    if not settings.reports.pages:
        return None
    try:
        run(job_name, partition)
    except InterruptedRunError:
        raise
    except RunError as error:
        of = "the version" if partition is None else f"batch {partition}"
        return f"the audit page of {of} was not made: {error}"
    return None
