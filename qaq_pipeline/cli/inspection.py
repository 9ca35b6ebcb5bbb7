"""Commands that show stored results: status, report, table, calibration."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from qaq_pipeline.cli import render
from qaq_pipeline.cli.terminal import ConfigOption, fail, open_deployment, read_settings, say, warn
from qaq_pipeline.freshness import staleness
from qaq_pipeline.ingest import landing
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import gates
from qaq_pipeline.storage.storage import open_storage


def status(
    tables: Annotated[bool, typer.Option("--tables", help="Show the number of rows of every table.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Show the state of every batch, why one is left out of the published dataset, and whether the daemon runs."""
    from qaq_pipeline.automation import unattended
    from qaq_pipeline.orchestration.liveness import run_locks
    from qaq_pipeline.runs.status import batch_status, running

    with open_deployment(config_file, makes_home=False) as deployment:
        batches = batch_status(deployment)
        at_work = running(deployment.instance, run_locks(deployment.settings))
        for sentence in unattended.unattended(deployment.instance, datetime.now(UTC)):
            say(sentence)
    for entry, reason in landing.read_refused(deployment.storage).items():
        warn(f"{entry} is refused: {reason}")
    render.warn_of_withdrawn(deployment.storage)
    if not batches:
        say("No batch yet: register one with `qaq run FILE --batch NAME`.")
    elif tables:
        render.print_tables(batches)
    else:
        render.print_states(batches)
    for sentence in at_work:
        say(f"At work: {sentence}")
    for one in batches:
        if one.left_out is not None:
            warn(f"{one.batch} is left out: {one.left_out}")
        elif one.stale is not None:
            warn(f"{one.batch}, {one.stale.table}: {one.stale.reason}; `qaq refresh` rebuilds it")


def report(
    batch: Annotated[str | None, typer.Argument(help="Name of the batch.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="A published version, or `latest`, instead of a batch.")
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Print the path of the audit page of a batch or a version; make the page if it is missing or stale."""
    from qaq_pipeline.runs import audit_pages

    if (batch is None) == (version is None):
        fail("name either a batch, or a version with --version", code=2)
    with open_deployment(config_file, makes_home=False) as deployment:
        if batch is not None:
            url = audit_pages.find_batch_page(deployment, batch)
        else:
            url = audit_pages.find_version_page(deployment, version or "latest")
    print(url)
    if opens:
        typer.launch(url)


def table(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PIPELINE.tables_of_batch())}.")],
    to: Annotated[Path, typer.Option("--to", help="File to write: .parquet, .csv or .jsonl.")],
    batch: Annotated[str | None, typer.Option("--batch", help="Only this batch. Default: all.")] = None,
    config_file: ConfigOption = None,
) -> None:
    """Write a stored table to a file. A per-model table gets a column `model`."""
    from qaq_pipeline.runs.tables import collect_table, write_frame

    if name not in PIPELINE.tables_of_batch():
        fail(f"{name!r} is no table; known: {', '.join(PIPELINE.tables_of_batch())}", code=2)
    with open_deployment(config_file, makes_home=False) as deployment:
        frame = collect_table(deployment, name, batch)
        write_frame(frame, to)
    say(f"{frame.height:,} rows of {name} written to {to}")


def calibration(
    batch: Annotated[str, typer.Argument(help="Name of the batch.")],
    config_file: ConfigOption = None,
) -> None:
    """Show what the selections keep of a batch's planted bad rows, and how well scores and signals detect them."""
    from qaq_pipeline.reports import calibration_page, check_metrics, page_store

    settings = read_settings(config_file)
    storage = open_storage(settings)
    try:
        stored = storage.tables.read("calibration", Partition(batch))
    except ValueError as error:
        fail(f"{error}. Calibration follows the publication of a batch if `calibration.enabled` is true")
    gate = gates.of_provenance(stored.provenance)
    if gate is not None:
        fail(f"batch {batch} is gated and therefore not calibrated: {gate.sentence}")
    if changed := staleness.changed_inputs(storage, "calibration", batch):
        warn(f"It used older scores: {', '.join(changed)} changed since; `qaq refresh` calibrates again.")
    for finding in check_metrics.of_calibration(stored.frame, settings.published.name, settings.checks):
        say(finding.sentence, style=None if finding.passed else "yellow")
    render.print_page_tables(calibration_page.tables(stored.frame))
    say("Planted rows whose defect sets the cut of a signal are no independent test of that signal.")
    for sentence in calibration_page.missing(stored.frame):
        say(sentence)
    page = page_store.calibration_page(batch)
    if storage.files.exists(*page):
        say(f"With plots and examples: {storage.files.url(*page)}")
