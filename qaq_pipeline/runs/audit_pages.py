"""Make the audit pages that are missing or stale, and find the page of a batch or a version."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import SILENT, Driver, FailedJobError, RunError, driving
from qaq_pipeline.schema.partition import Partition


def make_pages(driver: Driver, batches: Iterable[str]) -> list[str]:
    """Make the missing and stale pages of these batches; return a sentence for each that could not be made."""
    settings, storage = driver.deployment.settings, driver.deployment.storage
    page = PIPELINE["batch_report"]
    code_version = present(settings, storage).code_versions.get(page.name)
    return [
        fault
        for batch in batches
        if page_store.is_stale(storage, batch, code_version)
        for fault in make_page(driver, page.job, Partition(batch))
    ]


def make_page(driver: Driver, job_name: str, partition: Partition | None = None) -> list[str]:
    """Run the job of a page, unless pages are switched off; return a sentence if it failed.

    A failure is no error, because nothing depends on a page.

    Raises:
        InterruptedRunError: a signal ended the driver.
    """
    if driver.deployment.settings.reports.pages:
        try:
            driver.run(job_name, partition)
        except FailedJobError as error:
            of = "the version" if partition is None else f"batch {partition}"
            return [f"the audit page of {of} was not made: {error}"]
    return []


def find_batch_page(deployment: Deployment, batch: str) -> str:
    """The URL of the audit page of a batch, which is made if it is missing or stale.

    Raises:
        RunError: its page cannot be made.
        ValueError: there is no such batch, or its name cannot be used.
    """
    deployment.require_batch(batch)
    with driving(deployment, SILENT) as driver:
        if faults := make_pages(driver, [batch]):
            raise RunError("; ".join(faults))
    files, page = deployment.storage.files, page_store.batch_page(batch)
    if not files.exists(*page):
        off = "" if deployment.settings.reports.pages else " (reports.pages is false)"
        raise RunError(f"batch {batch!r} has no page yet: it has no decisions; `qaq run` it to the end{off}")
    return files.url(*page)


def find_version_page(deployment: Deployment, version: str) -> str:
    """The URL of the audit page of a published version, which is made if it is missing. Raises `StorageError`."""
    storage = deployment.storage
    found = versions.find_version(storage, version).version
    page = versions.page_place(found)
    if not storage.files.exists(*page):
        made = Made(datetime.now(UTC).isoformat(timespec="seconds"), "qaq report", "")
        page_store.write_version_page(storage, found, deployment.settings, made)
    return storage.files.url(*page)
