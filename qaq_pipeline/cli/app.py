"""The console script `qaq`: the commands a person types, and how their results are shown.

Belongs here: arguments, progress bars, tables in the terminal, exit codes. Does not belong here: the work itself.
Exit codes: 0 all went well, 1 the work failed, 2 the command or the settings cannot be used.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import dagster_home, home_directory, load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.schema.partition import Partition, check_batch_name

if TYPE_CHECKING:
    import polars as pl
    from rich.tree import Tree

    from qaq_pipeline.lineage import row_history
    from qaq_pipeline.publication.versions import Published
    from qaq_pipeline.runs import run_batch, summary
    from qaq_pipeline.runs.status import (
        BatchStatus,
        TableStatus,
    )
    from qaq_pipeline.scoring.logprobs import Progress as ScoringProgress
    from qaq_pipeline.storage.storage import Storage

_SHORTEST_KEY = 6
_LONGEST_LINE = 10_000

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Select synthetic code-instruction data worth training on (QAQ).",
)
console = Console()
errors = Console(stderr=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file or packaged profile (demo, paper). Default: QAQ_CONFIG, else demo."),
]
BatchOption = Annotated[str, typer.Option("--batch", help="Name of the batch: letters, digits, '_', '-', '.'.")]


def main() -> None:
    """Entry point of the console script: faults that a user can mend are one line, never a traceback."""
    try:
        app()
    except SettingsError as error:
        _fail(str(error), code=2)
    except OSError as error:  # A disk that is full, a folder that cannot be made: it names the path.
        _fail(str(error))
    except Exception as error:
        from qaq_pipeline.storage.files import StorageError

        if not isinstance(error, StorageError):
            raise
        _fail(str(error))


@app.command()
def run(
    files: Annotated[list[Path], typer.Argument(help="Delivered files: JSON, JSONL, Parquet; .gz and .zst too.")],
    batch: BatchOption,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only the first N rows of the delivery.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Register files as a batch, run every stage, publish, and print a summary that adds up."""
    from qaq_pipeline.runs import registration, run_batch
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.storage.locks import PartitionBusyError

    settings = _settings(config_file)
    _quiet_logs()
    with open_instance() as instance:
        try:
            with registration.batch_lock(settings, batch), _progress_display() as events:
                if registration.register(settings, instance, batch, files, limit).replaces_other_content:
                    events.on_notice(f"batch {batch} was delivered before as something else, which this replaces")
                summary = run_batch.run_batch(settings, instance, batch, events)
        except (run_batch.RunError, PartitionBusyError, ValueError) as error:
            _fail(str(error), code=_exit_code(error))
    _print_summary(summary)


@app.command()
def status(
    tables: Annotated[bool, typer.Option("--tables", help="The rows of every table of every batch, in full.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Show how every batch stands, why one is left out of the published dataset, and whether the daemon runs."""
    from datetime import UTC, datetime

    from qaq_pipeline.automation import unattended
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.runs.status import batch_status, refused_deliveries

    settings = _settings(config_file)
    with open_instance() as instance:
        batches = batch_status(settings, instance)
        for sentence in unattended.unattended(instance, datetime.now(UTC)):
            console.print(sentence, markup=False, highlight=False)
    for entry, reason in refused_deliveries(settings).items():
        _warn(f"{entry} is refused: {reason}")
    _warn_of_published(settings)
    if not batches:
        console.print("No batch yet: register one with `qaq run FILE --batch NAME`.")
        return
    if tables:
        _print_tables(batches)
    else:
        _print_states(batches)
    for one in batches:
        if one.left_out is not None:
            _warn(f"{one.batch} is left out: {one.left_out}")
        elif one.outdated is not None:
            _warn(f"{one.batch}, {one.outdated.table}: {one.outdated.reason}; `qaq recurate` makes it anew")


@app.command()
def recurate(config_file: ConfigOption = None) -> None:
    """Make anew what is out of date, in every batch, and publish if something changed: what the nightly job does."""
    from qaq_pipeline.runs import refresh, run_batch
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.storage.locks import PartitionBusyError

    settings = _settings(config_file)
    _quiet_logs()
    with open_instance() as instance:
        try:
            with _progress_display() as events:
                done = refresh.recurate(settings, instance, events)
        except (run_batch.RunError, PartitionBusyError, ValueError) as error:
            _fail(str(error), code=_exit_code(error))
    console.print(f"{done.sentence}.", highlight=False)


@app.command()
def withdraw(
    what: Annotated[str, typer.Argument(help="A batch, or a row of it: BATCH/FILE:ROW, BATCH/FILE:ROW.TURN.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept for good, and said of every row.")],
    restore: Annotated[bool, typer.Option("--restore", help="Take the withdrawal back.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Publish without a batch, or without the text of a row, wherever it stands. Older versions stay."""
    from qaq_pipeline.runs import refresh, run_batch
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.runs.status import dataset_folder, kept_versions
    from qaq_pipeline.storage.locks import PartitionBusyError

    settings = _settings(config_file)
    _quiet_logs()
    batch, slash, row = what.partition("/")
    if slash and not row:
        _fail(f"{what!r} names no row after the '/'; the whole batch is {batch!r}", code=2)
    meant = refresh.Withdrawal(batch, row or None, reason, is_withdrawn=not restore)
    with open_instance() as instance:
        try:
            near = refresh.near_rows(settings, instance, batch, row) if row and not restore else []
            with _progress_display() as events:
                done = refresh.withdraw(settings, instance, meant, events)
        except (run_batch.RunError, PartitionBusyError, ValueError) as error:
            _warn_of_published(settings)
            _fail(str(error), code=_exit_code(error))
    console.print(f"{done.sentence}.", highlight=False)
    if near:
        _warn(f"Near to that row, and no longer its duplicates: {', '.join(near)}. Withdraw them too, if need be.")
    _warn_of_published(settings)
    older = kept_versions(settings)[:-1]
    if older and not restore:
        _warn(
            f"Versions published before may still hold it: {', '.join(older)}, in "
            f"{dataset_folder(settings)}. "
            "Remove their folders there if they must not be kept; the delivery itself lies in deliveries/."
        )


@app.command()
def publish(
    version: Annotated[str, typer.Argument(help="A published version: number, first digits of its hash, or `latest`.")],
    to: Annotated[str, typer.Option("--to", help="hf://datasets/ORG/NAME[@REVISION], a folder, or any fsspec URL.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, where it is made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Copy a version to the Hugging Face hub, in one commit, or to a folder. The same version twice is copied once."""
    from qaq_pipeline.publication import hub
    from qaq_pipeline.storage.files import StorageError
    from qaq_pipeline.storage.storage import open_storage

    storage = open_storage(_settings(config_file))
    _quiet_logs()
    try:
        copy = hub.publish(storage, version, to, is_private=private, is_dry_run=dry_run)
    except (hub.PublishError, StorageError) as error:
        _fail(str(error))
    if dry_run:
        for name, size in copy.sizes.items():
            console.print(f"{size:>12,} {name}", markup=False, highlight=False, soft_wrap=True)
    done = "would be published to" if dry_run else "published to" if copy.is_new else "is already at"
    files = f"{len(copy.sizes):,} files, {sum(copy.sizes.values()):,} bytes"
    console.print(f"{copy.version} {done} {copy.url}: {files}", markup=False, highlight=False, soft_wrap=True)
    for name in copy.removed:
        console.print(f"removed, of an earlier version: {name}", markup=False, highlight=False, soft_wrap=True)
    for name in copy.replaced:
        _warn(f"replaced, which `qaq publish` had not written: {name}; the repository's history has it")


@app.command()
def explain(
    what: Annotated[
        str | None, typer.Argument(metavar="BATCH", help="The batch; or alone: a pair_id, or BATCH/FILE:ROW.")
    ] = None,
    row: Annotated[
        str | None,
        typer.Argument(metavar="ROW", help="Row number, file:row, file:row.turn, or a pair_id (or its first digits)."),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="Look for rows that hold this text.")] = None,
    batch: Annotated[str | None, typer.Option("--batch", help="With --text: only in this batch.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="A published version, by number or hash. Default: the ledger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known, for machines.")] = False,
    provenance: Annotated[bool, typer.Option("--provenance", help="With the text of the templates.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Say what happened to a row, in sentences, with its numbers, in every version, and what made it so."""
    if (what is None) == (text is None) or (what is not None and row is None and not _names_a_row(what)):
        raise typer.BadParameter("give BATCH ROW, a pair_id, BATCH/FILE:ROW, or --text")
    from qaq_pipeline.cli import explain as dossier
    from qaq_pipeline.lineage import row_history
    from qaq_pipeline.publication.versions import find_version
    from qaq_pipeline.storage.files import StorageError
    from qaq_pipeline.storage.storage import open_storage

    storage = open_storage(_settings(config_file))
    try:
        published = None if version is None else find_version(storage, version)
        if text is not None:
            found, number = _rows_with_text(storage, text, batch)
            if number > 1:
                dossier.matches(console, found, number)
                return
            what, row = dossier.key_of(found[0])
            if published is not None and found[0]["pair_id"] is not None:  # Another text may have stood there then.
                row = found[0]["pair_id"]
        assert what is not None
        answer, found_in = _find(storage, what, row, published)
        gathered = [dossier.gather(storage, one, found_in, with_versions=published is None) for one in answer.rows]
    except (StorageError, ValueError) as error:
        _fail(f"{error}. Known batches: `qaq status`")
    if as_json:
        print(json.dumps([one.as_json() for one in gathered], ensure_ascii=False))
        return
    for unindexed in answer.unindexed:
        _warn(f"{unindexed}: no index of the table as it is, so all of it was read; `qaq recurate` makes it anew")
    if len(gathered) == row_history.MOST_ROWS:
        _warn(f"There may be more: the first {row_history.MOST_ROWS} rows follow.")
    for one in gathered:
        dossier.show(console, one, with_template=provenance)


@app.command()
def lineage(
    version: Annotated[
        str, typer.Argument(help="A published version: number, first digits of its hash, or `latest`.")
    ] = "latest",
    file: Annotated[str | None, typer.Option("--file", help="Only this file of it, as diff_high/alpaca.json.")] = None,
    row: Annotated[str | None, typer.Option("--row", help="The way of one row: BATCH/FILE:ROW[.TURN].")] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="What a column comes from: TABLE or TABLE.COLUMN; of any version.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its hash; 1 if one differs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Walk from a published version back to what was delivered, with the hash of every file."""
    from qaq_pipeline.cli import lineage_tree
    from qaq_pipeline.lineage import lineage as walks
    from qaq_pipeline.lineage import trace
    from qaq_pipeline.lineage import verify as verification
    from qaq_pipeline.publication.versions import find_version
    from qaq_pipeline.storage.files import StorageError
    from qaq_pipeline.storage.storage import open_storage

    if columns is not None:
        _print_columns_lineage(columns, as_json=as_json)
        return
    storage = open_storage(_settings(config_file))
    try:
        found = walks.walk(storage, find_version(storage, version).version)
        found = found if file is None else walks.only(found, file)
        findings = list(verification.verify(storage, found)) if verify else []
        paths = [] if row is None or findings else trace.trace(storage, found, row)
    except (walks.LineageError, StorageError) as error:
        _fail(str(error))
    if as_json:
        shown = {"paths": paths} if row is not None else {"lineage": found}
        print(_json_of(shown | ({"findings": findings} if verify else {})))
    else:
        for tree in map(lineage_tree.of_row, paths) if row is not None else [lineage_tree.of_version(found)]:
            _print_tree(tree)
        for finding in findings:
            errors.print(finding.sentence, style="red", markup=False, highlight=False, soft_wrap=True)
        if verify and not findings:
            whole = "every file" if found.is_kept else "what is left (its own files were not kept)"
            console.print(f"Verified: {whole} of {found.version} is what it was.", highlight=False)
    if findings:
        raise typer.Exit(1)


@app.command()
def report(
    batch: Annotated[str | None, typer.Argument(help="Name of the batch.")] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="A published version, or `latest`, instead of a batch.")
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Print where the audit page of a batch or a version lies, and make it anew where it is missing or out of date."""
    from qaq_pipeline.runs import run_batch
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.storage.locks import PartitionBusyError

    if (batch is None) == (version is None):
        _fail("name a batch, or a version by --version: one of them", code=2)
    settings = _settings(config_file)
    _quiet_logs()
    with open_instance() as instance:
        try:
            url = run_batch.find_page(settings, instance, batch, version, run_batch.Events())
        except (run_batch.RunError, PartitionBusyError, ValueError) as error:
            _fail(str(error), code=_exit_code(error))
    print(url)
    if opens:
        typer.launch(url)


@app.command()
def table(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(PIPELINE.tables_of_batch())}.")],
    to: Annotated[Path, typer.Option("--to", help="File to write: .parquet, .csv or .jsonl.")],
    batch: Annotated[str | None, typer.Option("--batch", help="Only this batch. Default: all.")] = None,
    config_file: ConfigOption = None,
) -> None:
    """Write a stored table to a file. Per-model tables get a column `model`, all others stay as they are."""
    from qaq_pipeline.runs.home import open_instance
    from qaq_pipeline.runs.status import collect_table
    from qaq_pipeline.storage.files import StorageError

    settings = _settings(config_file)
    if name not in PIPELINE.tables_of_batch():
        _fail(f"{name!r} is no table; known: {', '.join(PIPELINE.tables_of_batch())}", code=2)
    try:
        with open_instance() as instance:
            frame = collect_table(settings, instance, name, batch)
        _write_frame(frame, to)
    except (StorageError, ValueError, OSError) as error:
        _fail(str(error), code=_exit_code(error))
    console.print(f"{frame.height:,} rows of {name} written to {to}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def calibration(
    batch: Annotated[str, typer.Argument(help="Name of the batch.")],
    config_file: ConfigOption = None,
) -> None:
    """Show whether the scores tell good from bad on a batch, and the cuts of RMI that follow, to be pasted."""
    from qaq_pipeline.calibration import calibration as judging
    from qaq_pipeline.calibration import planting
    from qaq_pipeline.freshness import staleness
    from qaq_pipeline.reports import calibration_page, check_metrics, page_store
    from qaq_pipeline.screening import gates
    from qaq_pipeline.storage.files import StorageError
    from qaq_pipeline.storage.storage import open_storage

    settings = _settings(config_file)
    storage = open_storage(settings)
    try:
        stored = storage.tables.read("calibration", Partition(check_batch_name(batch)))
    except (StorageError, ValueError) as error:
        _fail(f"{error}. Calibration follows the publication of a batch, where `calibration.enabled` is true")
    if (gate := gates.of_provenance(stored.provenance)) is not None:
        _fail(f"batch {batch} is gated, and not calibrated: {gate.sentence}")
    if changed := staleness.changed_inputs(storage, "calibration", batch):
        _warn(f"This is of older scores: since then {', '.join(changed)} changed; `qaq recurate` calibrates anew.")
    finding = check_metrics.discrimination(stored.frame, settings.calibration.min_auc, planting.ENOUGH)
    console.print(finding.sentence, style=None if finding.passed else "yellow", markup=False, highlight=False)
    for table in calibration_page.tables(stored.frame):
        shown = Table(*table.head, title=table.caption)
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for sentence in calibration_page.missing(stored.frame):
        console.print(sentence, markup=False, highlight=False)
    offered = judging.offered_yaml(stored.frame, settings.published)
    if offered is not None and not finding.passed:
        _warn(calibration_page.BLIND)
    instead = "Offered, as one of `selections`, in place of the one of its name:"
    console.print("No cut is offered." if offered is None else instead, highlight=False)
    if offered is not None:
        console.print(offered, markup=False, highlight=False, soft_wrap=True)
    page = page_store.calibration_page(batch)
    if storage.files.exists(*page):
        console.print(
            f"With plots and examples: {storage.files.url(*page)}", markup=False, highlight=False, soft_wrap=True
        )


@app.command()
def estimate(
    files: Annotated[list[Path], typer.Argument(help="Files as `qaq run` takes them.")],
    config_file: ConfigOption = None,
) -> None:
    """Say what scoring files would take: tokens, operations and time on this machine, and what the cache spares."""
    from qaq_pipeline.runs import registration, run_batch

    settings = _settings(config_file)
    _quiet_logs()
    try:
        costs = registration.estimate(settings, files)
    except (run_batch.RunError, ValueError) as error:
        _fail(str(error), code=_exit_code(error))
    rows = {
        "model": [cost.model for cost in costs],
        "distinct pairs": [f"{cost.num_pairs:,}" for cost in costs],
        "likelihoods in the cache": [f"{cost.num_cached:,}" for cost in costs],
        "sequences": [f"{cost.num_sequences:,}" for cost in costs],
        "tokens": [f"{cost.num_tokens:,}" for cost in costs],
        "of them shared": [f"{cost.num_shared_tokens:,}" for cost in costs],
        "teraFLOP": [f"{cost.flops / 1e12:,.2f}" for cost in costs],
        "matmul peak": [f"{cost.peak_flops_per_second / 1e12:,.2f} TFLOP/s, {cost.device}" for cost in costs],
        "time": [_duration(cost.seconds) for cost in costs],
    }
    _print_columns("To score", [cost.role for cost in costs], rows)
    console.print(
        f"In all about {_duration(sum(cost.seconds for cost in costs))}, loading not counted.", highlight=False
    )


@app.command()
def cache(
    prune: Annotated[
        str | None,
        typer.Option("--prune", help="Remove the scores of this model: its name, or the key's first digits."),
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Show what the score cache holds, by model, and how often it was used."""
    from qaq_pipeline.storage.locks import PartitionBusyError
    from qaq_pipeline.storage.storage import open_storage

    storage = open_storage(_settings(config_file))
    if prune is not None:
        found = [one for one in storage.scores.models() if one.identity["model"] == prune or _is_key(one.digest, prune)]
        if not found:
            _fail(f"the cache holds nothing of {prune!r}; `qaq cache` lists what it holds")
        for one in found:
            try:
                storage.scores.prune(one.digest)
            except PartitionBusyError as error:
                _fail(str(error))
            console.print(
                f"removed {one.num_scores:,} scores of {one.identity['model']}", markup=False, highlight=False
            )
        return
    models = storage.scores.models()
    if not models:
        console.print("The score cache is empty.")
        return
    rows = {
        "model": [one.identity["model"] for one in models],
        "dtype, prior": [f"{one.identity['dtype']}, {one.identity['prior']}" for one in models],
        "template": [one.identity["template_hash"] for one in models],
        "engine": [f"{one.identity['engine']} {one.identity['engine_version']}" for one in models],
        "scores": [f"{one.num_scores:,}" for one in models],
        "shards": [f"{one.num_shards:,}" for one in models],
        "set aside": [f"{one.num_set_aside:,}" for one in models],
        "size": [f"{one.num_bytes / 1e6:,.2f} MB" for one in models],
        "hits": [f"{one.num_hits:,}" for one in models],
    }
    _print_columns("Score cache, by key", [one.digest[:8] for one in models], rows)


@app.command()
def doctor(config_file: ConfigOption = None) -> None:
    """Check models, devices, storage, Dagster home and versions; exit 1 where something is missing."""
    from qaq_pipeline.cli import doctor as examination

    findings = examination.examine(_settings(config_file))
    result = Table("", "check", "finding", title="qaq doctor")
    for finding in findings:
        result.add_row("[green]ok[/]" if finding.is_ok else "[red]no[/]", finding.check, escape(finding.text))
    console.print(result)
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 3000,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", help="Dagster workspace file. Default: the packaged one.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Open the Dagster UI and its daemon on 127.0.0.1, over the same home as `qaq run`."""
    from qaq_pipeline.runs.home import prepare_home

    _settings(config_file)
    workspace = workspace or Path(str(resources.files("qaq_pipeline") / "workspace.yaml"))
    if not workspace.exists():
        _fail(f"{workspace}: no such file; without --workspace the packaged one is used", code=2)
    home = prepare_home()
    dagster = [sys.executable, "-m", "dagster"]
    command = [*dagster, "dev", "-w", str(workspace), "-h", "127.0.0.1", "-p", str(port)]
    console.print(f"Dagster UI: http://127.0.0.1:{port} (Dagster home {home}); Ctrl-C ends it", highlight=False)
    # A shell that starts this in the background makes it ignore Ctrl-C's signal, and with it dagster's own shutdown.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = {**os.environ, "DAGSTER_HOME": str(home), "QAQ_HOME": str(home_directory())}
    os.execve(command[0], command, environment)  # noqa: S606


# --- parts of the commands -----------------------------------------------------------------------------------------


def _settings(config_file: Path | None) -> Settings:
    """The settings; a file named on the command line is handed on to processes that steps start."""
    if config_file is not None:
        os.environ["QAQ_CONFIG"] = str(config_file)
    settings = load_settings()
    os.environ.setdefault("DAGSTER_HOME", str(dagster_home()))
    return settings


def _warn(message: str) -> None:
    console.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _warn_of_published(settings: Settings) -> None:
    """Loud where the newest version holds what was withdrawn."""
    from qaq_pipeline.runs.status import published_withdrawn

    if batches := published_withdrawn(settings):
        errors.print(
            f"The newest version holds what was withdrawn of {', '.join(batches)}: `qaq recurate` until it is gone",
            style="bold red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _fail(message: str, code: int = 1) -> NoReturn:
    errors.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(code)


def _exit_code(error: Exception) -> int:
    return 2 if isinstance(error, SettingsError) else 1


def _quiet_logs() -> None:
    """Keep third parties' bars and debug lines out of the display; Dagster keeps them in its event log."""
    import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("dagster").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="dagster.*")


@contextmanager
def _progress_display() -> Iterator[run_batch.Events]:
    from qaq_pipeline.runs import run_batch

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as bars:
        display = _Display(bars)
        yield run_batch.Events(on_stage=display.stage, on_progress=display.scoring, on_notice=display.notice)
        display.finish()


class _Display:
    """One bar a stage; the scoring's shows sequences, tokens a second, and the time left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._current: TaskID | None = None

    def stage(self, job: str, partition: str) -> None:
        self.finish()
        self._current = self._bars.add_task(f"{job} {partition}", total=None, detail="")
        if not console.is_terminal:
            console.print(f"{job} {partition}", highlight=False)

    def scoring(self, progress: ScoringProgress) -> None:
        assert self._current is not None
        detail = (
            f"{progress.done_sequences:,}/{progress.total_sequences:,} sequences, "
            f"{progress.tokens_per_second:,.0f} tokens/s, {progress.seconds_left:,.0f} s left"
        )
        self._bars.update(self._current, total=progress.total_tokens, completed=progress.done_tokens, detail=detail)

    def notice(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    def finish(self) -> None:
        if self._current is not None:
            self._bars.update(self._current, total=1, completed=1)


def _print_summary(summary: summary.BatchSummary) -> None:
    rows = Table("rows", "", "why", title=f"Batch {summary.batch}")
    rows.add_row("in", f"{summary.rows_in:,}", "", style="bold")
    for decision, count in summary.rows_by_decision.items():
        reasons = summary.reasons_by_decision.get(decision, {})
        rows.add_row(decision, f"{count:,}", ", ".join(f"{reason} {n:,}" for reason, n in reasons.items()))
    rows.add_row("sum", f"{sum(summary.rows_by_decision.values()):,}", "", style="bold")
    console.print(rows)
    _print_models(summary)
    sizes = ", ".join(f"{name} {count:,}" for name, count in summary.selected_by_selection.items())
    selected = summary.rows_by_decision["selected"]
    console.print(
        f"Published selection {summary.published}: {selected:,} of {summary.pool_size:,} pairs in its pool, "
        f"{selected / max(summary.rows_in, 1):.1%} of all rows",
        highlight=False,
    )
    console.print(f"Pairs by selection: {sizes}", highlight=False)
    for warning in summary.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    if summary.scored == 0:
        found = "every score was in the cache" if summary.cached else "no pair was left to score"
        console.print(f"Nothing was scored: {found}.")
    unchanged = "" if summary.is_new_version else " (unchanged)"
    for name, url in {f"Dataset{unchanged}": summary.dataset_url, **summary.tables, **summary.pages}.items():
        console.print(f"{name}: {url}", markup=False, highlight=False, soft_wrap=True)


def _print_models(summary: summary.BatchSummary) -> None:
    rows = {
        "model": [model.model for model in summary.models],
        "frame, dtype": [f"{model.frame}, {model.dtype}" for model in summary.models],
        "likelihoods scored": [f"{model.scored:,}" for model in summary.models],
        "from the cache": [f"{model.cached:,}" for model in summary.models],
        "answers cut": [f"{model.truncated:,}" for model in summary.models],
        "tokens": [f"{model.tokens:,}" for model in summary.models],
        "tokens/s": [f"{model.tokens / model.seconds:,.0f}" if model.seconds else "-" for model in summary.models],
    }
    for name in dict.fromkeys(name for model in summary.models for name in model.medians):
        medians = (model.medians.get(name) for model in summary.models)
        rows[f"median {name}"] = ["-" if median is None else f"{median:.3f}" for median in medians]
    _print_columns("Scoring", [model.role for model in summary.models], rows)


def _print_columns_lineage(named: str, *, as_json: bool) -> None:
    from qaq_pipeline.cli import lineage_tree
    from qaq_pipeline.schema import column_lineage

    table, _, column = named.partition(".")
    derived = PIPELINE.column_sources
    try:
        rows = column_lineage.ancestry(derived, table, column) if column else column_lineage.of_table(derived, table)
    except ValueError as error:
        _fail(str(error), code=2)
    if as_json:
        print(_json_of(rows))
    else:
        _print_tree(lineage_tree.of_columns(rows) if column else lineage_tree.of_table(table, rows))


def _print_tree(tree: Tree) -> None:
    """Lines as long as they are, for hashes and paths are copied: the terminal wraps them."""
    Console(width=_LONGEST_LINE).print(tree, soft_wrap=True)


def _json_of(value: object) -> str:
    """JSON of dataclasses, and of containers of them."""
    from pydantic_core import to_json

    return to_json(value, indent=2).decode()


def _print_columns(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """One column a model, one row a label: readable in 80 characters."""
    shown = Table("", *heads, title=title)
    for label, cells in rows.items():
        shown.add_row(label, *map(escape, cells))
    console.print(shown)


def _print_states(batches: Sequence[BatchStatus]) -> None:
    """One line a batch: of a name that is too long for it, the middle is left out."""
    from qaq_pipeline.reports import summaries

    rows = [(*(_count(one.tables[name]) for name in ("raw_data", "selected_subset")), one.state) for one in batches]
    heads = ("rows", "selected", "state")
    taken = sum(max(map(len, column)) + 2 for column in zip(heads, *rows, strict=True))
    shown = Table("batch", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        shown.add_column(head, justify="left" if head == "state" else "right", no_wrap=True)
    for one, row in zip(batches, rows, strict=True):
        shown.add_row(escape(summaries.shortened(one.batch, console.width - taken - 2)), *row)
    console.print(shown)


def _print_tables(batches: Sequence[BatchStatus]) -> None:
    for one in batches:
        console.print(f"{one.batch}: {one.state}", style="bold", markup=False, highlight=False, soft_wrap=True)
        width = max(map(len, one.tables))
        for name, table in one.tables.items():
            console.print(f"  {name:<{width}}  {table.sentence}", markup=False, highlight=False)


def _count(table: TableStatus) -> str:
    return "-" if table.num_rows is None else f"{table.num_rows:,}"


def _names_a_row(what: str) -> bool:
    """Whether that alone names a row: BATCH/FILE:ROW, or a pair_id."""
    from qaq_pipeline.storage import row_lookup

    return "/" in what or row_lookup.is_pair(what)


def _find(
    storage: Storage, what: str, row: str | None, version: Published | None
) -> tuple[row_history.Answer, Published | None]:
    """The rows that are meant, in the version; by default in the ledger, else in the newest version that has them."""
    from qaq_pipeline.lineage import row_history

    batch, slash, place = (what, "/", row) if row is not None else what.partition("/")
    if slash:
        check_batch_name(batch)

    def find(version: Published | None) -> row_history.Answer:
        if not slash:
            return row_history.find_pair(storage, what, version)
        return row_history.find_row(storage, batch, place, version)

    found = (find(version), version) if version is not None else row_history.find_anywhere(storage, find)
    if not found[0].rows:
        where = " in the ledger of any batch, nor in a version" if version is None else f" in version {version.number}"
        _fail(_no_such_row(storage, batch, place) if slash and version is None else f"no row {row or what!r}{where}")
    return found


def _no_such_row(storage: Storage, batch: str, row: str) -> str:
    footer = storage.tables.footer("raw_data", Partition(batch))
    if not footer.num_rows:
        return f"batch {batch!r} has no rows"
    first = next(iter(storage.tables.scan("raw_data", Partition(batch), columns=["source_file"])))["source_file"][0]
    return f"batch {batch!r} has no row {row!r}; it has {footer.num_rows} rows, the first of file {first!r}"


def _rows_with_text(storage: Storage, text: str, batch: str | None) -> tuple[list[dict[str, Any]], int]:
    """The first rows that hold the text, and how many do, with progress while they are looked for."""
    from qaq_pipeline.lineage import row_history

    batches = storage.tables.batches_with("raw_data") if batch is None else [check_batch_name(batch)]
    found: list[dict[str, Any]] = []
    number = 0
    with Progress(console=errors, transient=True) as bars:
        task = bars.add_task("reading raw_data", total=len(batches))
        for matches in row_history.find_text(storage, text, batches):
            found += matches.rows[: row_history.MOST_ROWS - len(found)]
            number += matches.number
            bars.update(task, advance=1, description=f"read {matches.batch}: {number:,} found")
    if not found:
        _fail(f"no row of {batch or 'any batch'}, as delivered now, holds {text!r}")
    return found, number


def _is_key(digest: str, start: str) -> bool:
    return len(start) >= _SHORTEST_KEY and digest.startswith(start)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _write_frame(frame: pl.DataFrame, to: Path) -> None:
    import polars as pl

    writers = {".parquet": frame.write_parquet, ".jsonl": frame.write_ndjson}
    if to.suffix in writers:
        writers[to.suffix](to)
    elif to.suffix == ".csv":
        nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
        as_json = [
            pl.Series(name, [json.dumps(value, default=list) for value in frame[name].to_list()], dtype=pl.String)
            for name in nested
        ]
        frame.with_columns(as_json).write_csv(to)
    else:
        raise ValueError(f"{to}: the ending says the format: .parquet, .csv or .jsonl")
