"""Make the audit pages that are missing or stale, and find the page of a batch or a version."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.jobs import present
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.runs.job_runs import Events, InterruptedRunError, RunError, Runner, running
from qaq_pipeline.schema.partition import check_batch_name
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import open_storage


def make_pages(settings: Settings, run: Runner, batches: Iterable[str]) -> list[str]:
    """Make the missing and stale pages of these batches; return a sentence for each that could not be made."""
    storage = open_storage(settings)
    version = present(settings, storage).code_versions.get("batch_report")
    due = [batch for batch in batches if settings.reports.pages and page_store.is_stale(storage, batch, version)]
    return [fault for batch in due if (fault := make_page(settings, run, PIPELINE["batch_report"].job, batch))]


def make_page(settings: Settings, run: Runner, job_name: str, partition: str | None) -> str | None:
    """Run the job of a page, unless pages are switched off; return a sentence if it failed.

    A failure is no error, because nothing depends on a page.

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


def find_batch_page(settings: Settings, instance: dg.DagsterInstance, batch: str, events: Events | None = None) -> str:
    """The URL of the audit page of a batch, which is made if it is missing or stale.

    Raises:
        RunError: there is no such batch, or its page cannot be made.
        ValueError: the name of the batch cannot be used.
    """
    if check_batch_name(batch) not in instance.get_dynamic_partitions("batch"):
        raise RunError(f"there is no batch {batch!r}; `qaq status` lists the batches")
    with running(settings, instance, events or Events()) as run:
        if faults := make_pages(settings, run, [batch]):
            raise RunError("; ".join(faults))
    missing = f"batch {batch!r} has no page yet: it has no decisions; `qaq run` it to the end"
    return _url(settings, page_store.batch_page(batch), missing)


def find_version_page(settings: Settings, version: str) -> str:
    """The URL of the audit page of a published version, which is made if it is missing.

    Raises:
        RunError: there is no such version, or its page cannot be made.
    """
    storage = open_storage(settings)
    try:
        found = versions.find_version(storage, version).version
    except StorageError as error:
        raise RunError(str(error)) from error
    page = versions.page_place(found)
    if not storage.files.exists(*page):
        made = Made(datetime.now(UTC).isoformat(timespec="seconds"), "qaq report", "")
        page_store.write_version_page(storage, found, settings.ranking.reference, made)
    return _url(settings, page, f"version {found!r} has no page")


def _url(settings: Settings, page: tuple[str, ...], missing: str) -> str:
    storage = open_storage(settings)
    if not storage.files.exists(*page):
        raise RunError(missing if settings.reports.pages else f"{missing} (reports.pages is false)")
    return storage.files.url(*page)
