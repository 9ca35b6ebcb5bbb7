"""Runs the pipeline for a batch without the UI: registers it, runs the jobs in order, and sums up what came out.

Belongs here: what `qaq run` does, less the printing. Does not belong here: anything that the UI could not do as well.

Dagster's own CLI cannot register a dynamic partition, nor mix partitions definitions in one run: hence the driver. It
works on the instance in DAGSTER_HOME, so that every run, event and partition is visible in the UI afterwards.
"""

from __future__ import annotations

import importlib.resources
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings, check_batch_name, dagster_home, home_directory
from qaq_pipeline.freshness import staleness
from qaq_pipeline.freshness.staleness import BY_MODEL
from qaq_pipeline.ingest import landing, records
from qaq_pipeline.orchestration.assets.scoring.logprobs import accepted_pairs
from qaq_pipeline.orchestration.jobs import CALIBRATION_STAGES, PAGES, PUBLISHING, REPORTING_VERSION, STAGES, present
from qaq_pipeline.orchestration.resources import ModelRuntime, ScoringCost
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.runs.job_runs import (
    Events,
    InterruptedRunError,
    RunError,
    Runner,
    failed_checks,
    materialisation_metadata,
    running,
)
from qaq_pipeline.runs.refresh import make_page, make_pages, renew
from qaq_pipeline.schema import tables
from qaq_pipeline.screening import screen
from qaq_pipeline.storage.storage import Delivery, Storage, StorageError, open_storage


@dataclass(frozen=True)
class ModelSummary:
    """One model's part of a run."""

    role: str
    model: str
    dtype: str
    frame: str
    scored: int
    """Quantities scored in this run."""
    cached: int
    """Quantities that the cache had."""
    truncated: int
    """Answers whose tail was cut."""
    tokens: int
    seconds: float
    medians: dict[str, float]


@dataclass(frozen=True)
class BatchSummary:
    """What became of a batch. Rows by decision add up to the rows in."""

    batch: str
    rows_in: int
    rows_by_decision: dict[str, int]
    reasons_by_decision: dict[str, dict[str, int]]
    published: str
    pool_size: int
    selected_by_selection: dict[str, int]
    models: list[ModelSummary]
    warnings: list[str]
    dataset_url: str
    is_new_version: bool
    tables: dict[str, str]
    pages: dict[str, str]
    """Audit pages that were made, by what they are of."""

    @property
    def scored(self) -> int:
        """Quantities scored in this run, over all models."""
        return sum(model.scored for model in self.models)

    @property
    def cached(self) -> int:
        """Quantities that the cache had, over all models."""
        return sum(model.cached for model in self.models)


@dataclass(frozen=True)
class Registration:
    """A delivery, and what the batch was delivered as before."""

    delivery: Delivery
    previous: Delivery | None

    @property
    def replaces_other_content(self) -> bool:
        """Whether the batch was delivered before as something else."""
        return self.previous is not None and self.previous.content_hash != self.delivery.content_hash


@dataclass(frozen=True, slots=True)
class TableStatus:
    """What is stored of a table of a batch."""

    num_rows: int | None
    """None: nothing is stored, or it cannot be read."""
    num_stored: int
    """Partitions that are stored: of some tables one for each model."""
    num_wanted: int
    is_readable: bool = True

    @property
    def sentence(self) -> str:
        """The same in words."""
        if not self.is_readable:
            return "unreadable"
        if self.num_rows is None:
            return "-"
        return f"{self.num_rows:,} rows{'' if self.is_whole else f' ({self.of_models})'}"

    @property
    def is_whole(self) -> bool:
        """Whether every partition is stored, and can be read."""
        return self.is_readable and self.num_stored == self.num_wanted

    @property
    def of_models(self) -> str:
        """Of how many models it is stored."""
        return f"{self.num_stored} of {self.num_wanted} models"


@dataclass(frozen=True, slots=True)
class BatchStatus:
    """How a batch stands."""

    batch: str
    tables: Mapping[str, TableStatus]
    """In the order in which they are made."""
    left_out: str | None
    """Why a publication would leave it out now."""
    outdated: staleness.Outdated | None
    """The first of its tables that is out of date, and why."""

    @property
    def state(self) -> str:
        """In a few words, the first table that is not as it should be: those before it stand."""
        for name, table in self.tables.items():
            if not table.is_readable:
                return f"{name} unreadable"
            if not table.num_stored:
                return f"no {name} yet"
            if not table.is_whole:
                return f"{name}: {table.of_models}"
        if self.left_out is not None and self.left_out.startswith("gated"):
            return "gated"
        if self.outdated is not None:
            return f"{self.outdated.table} out of date"
        return "up to date" if self.left_out is None else "left out"


def prepare_home() -> Path:
    """DAGSTER_HOME, with the packaged instance settings in it if it has none of its own."""
    home = dagster_home()
    home.mkdir(parents=True, exist_ok=True)
    (home_directory() / "landing").mkdir(parents=True, exist_ok=True)
    target = home / "dagster.yaml"
    if not target.exists():
        template = importlib.resources.files("qaq_pipeline") / "dagster.yaml"
        target.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return home


def open_instance() -> dg.DagsterInstance:
    """The Dagster instance in DAGSTER_HOME."""
    return dg.DagsterInstance.from_config(str(prepare_home()))


def register(
    settings: Settings, instance: dg.DagsterInstance, batch: str, files: Sequence[Path], limit: int | None
) -> Registration:
    """Keep a copy of the files as the batch's delivery, and add its partition.

    Raises:
        RunError: a file is missing, cannot be read at all, or two files have one name.
        ValueError: the name of the batch cannot be used.
    """
    check_batch_name(batch)
    contents = _read_files(files)
    for name, data in contents.items():
        try:
            records.read_file(data, name, batch, settings.records)
        except records.UnreadableFileError as error:
            raise RunError(str(error)) from error
    storage = open_storage(settings)
    previous = storage.current_delivery(batch) if storage.has_delivery(batch) else None
    delivery = storage.store_delivery(batch, contents, limit)
    landing.settle(storage, batch)
    instance.add_dynamic_partitions("batch", [batch])
    return Registration(delivery, previous)


def _read_files(files: Sequence[Path]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    for path in files:
        if path.name in contents:
            raise RunError(f"{path}: two files of the delivery are named {path.name!r}; rename one")
        try:
            contents[path.name] = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return contents


def estimate(settings: Settings, files: Sequence[Path]) -> list[ScoringCost]:
    """What scoring the files would take, model by model; nothing is registered.

    At most: rows that older batches or benchmarks hold as well are counted.

    Raises:
        RunError: a file is missing or cannot be read at all.
        ValueError: a model cannot be had or scored.
    """
    try:
        frames = [records.read_file(data, name, "b", settings.records) for name, data in _read_files(files).items()]
    except records.UnreadableFileError as error:
        raise RunError(str(error)) from error
    raw = pl.concat(frames)
    pairs = accepted_pairs(raw, screen.screen_alone(raw, settings.screening))
    storage, runtime = open_storage(settings), ModelRuntime(settings)
    return [runtime.estimate(role, pairs, storage) for role in settings.models]


def batch_lock(settings: Settings, batch: str) -> AbstractContextManager[None]:
    """Hold a batch from its registration to its publication, so that two drivers cannot mix their deliveries.

    Raises:
        PartitionBusyError: another driver holds it; ValueError: the name cannot be used.
    """
    return open_storage(settings).lock("batch", check_batch_name(batch))


def run_batch(
    settings: Settings, instance: dg.DagsterInstance, batch: str, events: Events | None = None
) -> BatchSummary:
    """Run every stage for a registered batch, screen newer batches again where this one is another now, publish.

    Raises:
        RunError: a stage failed; what the stages before it made stays.
    """
    results: dict[str, Mapping[str, Any]] = {}
    unpassed: list[str] = []
    events = events or Events()
    with running(settings, instance, events) as run:
        for job_name, assets in STAGES.items():
            if job_name in PAGES:
                partition = None if job_name == REPORTING_VERSION else batch
                unpassed += filter(None, [make_page(settings, run, job_name, partition)])
                continue
            if job_name == PUBLISHING:
                renewed = renew(settings, instance, run, only_screening=True)
                for other, reason in renewed.failed.items():
                    events.on_notice(f"batch {other} was not screened again: {reason}")
                unpassed += make_pages(settings, run, renewed.batches)
            for partition in _partitions(settings, job_name, batch):
                run_id = run(job_name, partition)
                unpassed += failed_checks(instance, run_id)
                for asset in assets:
                    results[f"{asset}|{partition or ''}"] = materialisation_metadata(instance, run_id, asset)
        if settings.is_calibrated:
            unpassed += _calibrate(settings, instance, run, batch)
    return summarise(settings, batch, results, unpassed)


def _calibrate(settings: Settings, instance: dg.DagsterInstance, run: Runner, batch: str) -> list[str]:
    """Run the calibration of a published batch: the checks that did not pass, or why there is none."""
    unpassed: list[str] = []
    try:
        for job_name in CALIBRATION_STAGES:
            for partition in _partitions(settings, job_name, batch):
                unpassed += failed_checks(instance, run(job_name, partition))
    except InterruptedRunError:
        raise
    except RunError as error:
        unpassed.append(f"batch {batch} was published, and not calibrated: {error}")
    return unpassed


def _partitions(settings: Settings, job_name: str, batch: str) -> list[str | None]:
    if job_name == PUBLISHING:
        return [None]
    if job_name in ("score_batch", "score_planted"):
        return [f"{batch}|{role}" for role in sorted(settings.models)]
    return [batch]


def summarise(
    settings: Settings, batch: str, results: Mapping[str, Mapping[str, Any]], unpassed: Sequence[str]
) -> BatchSummary:
    """The summary of a batch, from its stored tables, the metadata of its runs and the checks that did not pass.

    Raises:
        RunError: rows by decision do not add up to the rows in.
    """
    storage = open_storage(settings)
    decisions = storage.read_table("decisions", batch)
    raw = storage.read_table("raw_data", batch)
    by_decision = Counter(decisions.frame["decision"].to_list())
    if by_decision.total() != raw.frame.height:
        raise RunError(
            f"batch {batch}: {by_decision.total()} decisions for {raw.frame.height} rows in: report this fault"
        )
    published, decided = results["curated_dataset|"], results[f"decisions|{batch}"]
    return BatchSummary(
        batch=batch,
        rows_in=raw.frame.height,
        rows_by_decision={decision.value: by_decision[decision.value] for decision in tables.Decision},
        reasons_by_decision=_reasons(decisions.frame),
        published=settings.published.name,
        pool_size=decided["pool_size"],
        selected_by_selection=dict(decided["selected_by_selection"]),
        models=[_model_summary(settings, batch, role, results) for role in sorted(settings.models)],
        warnings=[*results[f"disagreement_scores|{batch}"]["warnings"], *unpassed, *_exclusions(batch, published)],
        dataset_url=storage.url(versions.FOLDER, published["version"]),
        is_new_version=published["is_new_version"],
        tables={name: storage.table_url(name, batch) for name in ("decisions", "selected_subset")},
        pages={
            name: storage.url(*parts)
            for name, parts in {
                "Report of the batch": page_store.batch_page(batch),
                "Report of the version": page_store.version_page(published["version"]),
            }.items()
            if storage.exists(*parts)
        },
    )


def find_page(
    settings: Settings, instance: dg.DagsterInstance, batch: str | None, version: str | None, events: Events
) -> str:
    """Where the audit page of a batch or of a version lies; it is made where it is missing or out of date.

    Raises:
        RunError: there is no such batch or version, or its page cannot be made.
        ValueError: the name of the batch cannot be used.
    """
    storage = open_storage(settings)
    if batch is not None:
        if check_batch_name(batch) not in instance.get_dynamic_partitions("batch"):
            raise RunError(f"there is no batch {batch!r}; `qaq status` lists the batches")
        place = page_store.batch_page(batch)
        with running(settings, instance, events) as run:
            faults = make_pages(settings, run, [batch])
        missing = f"batch {batch!r} has no page yet: it is not selected from; `qaq run` it to the end"
    else:
        try:
            version = versions.find_version(storage, version or "latest").version
        except StorageError as error:
            raise RunError(str(error)) from error
        place, faults, missing = page_store.version_page(version), [], f"version {version!r} has no page"
        if not storage.exists(*place):
            made = Made(datetime.now(UTC).isoformat(timespec="seconds"), "qaq report", "")
            page_store.write_version_page(storage, settings, version, made)
    if faults or not storage.exists(*place):
        off = "" if settings.reports.pages else " (reports.pages is false)"
        raise RunError("; ".join(faults) or f"{missing}{off}")
    return storage.url(*place)


def _exclusions(batch: str, published: Mapping[str, Any]) -> list[str]:
    excluded = published["excluded_batches"]
    if batch in excluded:
        raise RunError(f"batch {batch} was left out of the published dataset: {excluded[batch]}")
    return [f"batch {name} is not in the published dataset: {reason}" for name, reason in excluded.items()]


def _reasons(decisions: pl.DataFrame) -> dict[str, dict[str, int]]:
    counts = (
        decisions.group_by("decision", "reason")
        .len()
        .sort("decision", "len", "reason", descending=[False, True, False])
    )
    reasons: dict[str, dict[str, int]] = {}
    for decision, reason, count in counts.iter_rows():
        reasons.setdefault(decision, {})[reason] = count
    return reasons


def _model_summary(settings: Settings, batch: str, role: str, results: Mapping[str, Mapping[str, Any]]) -> ModelSummary:
    scoring, scores = results[f"logprobs|{batch}|{role}"], results[f"rmi_scores|{batch}|{role}"]
    return ModelSummary(
        role=role,
        model=scoring["model"],
        dtype=scoring["dtype"],
        frame=settings.models[role].frame,
        scored=scoring["quantities_scored"],
        cached=scoring["quantities_from_cache"],
        truncated=scoring["truncated_answers"],
        tokens=scoring["tokens"],
        seconds=scoring["seconds"],
        medians={name.removeprefix("median_"): value for name, value in scores.items() if name.startswith("median_")},
    )


def collect_table(settings: Settings, instance: dg.DagsterInstance, name: str, batch: str | None) -> pl.DataFrame:
    """A stored table of one batch, or of all, with the columns that say which: `batch`, and `model` where it has one.

    Raises:
        StorageError: the batch, or every one, lacks the table.
    """
    batches = [check_batch_name(batch)] if batch else sorted(instance.get_dynamic_partitions("batch"))
    storage = open_storage(settings)
    partitions = [parts for name_of in batches for parts in _table_partitions(settings, name, name_of)]
    frames = [
        storage.read_table(name, *parts).frame.select(*_labels(parts), pl.all().exclude("batch"))
        for parts in partitions
        if batch or storage.has_table(name, *parts)
    ]
    if not frames:
        raise StorageError(f"no batch has {name} yet; run one with `qaq run FILE --batch NAME`")
    return pl.concat(frames)


def _labels(partition: tuple[str, ...]) -> list[pl.Expr]:
    return [pl.lit(value).alias(label) for label, value in zip(("batch", "model"), partition, strict=False)]


def _table_partitions(settings: Settings, name: str, batch: str) -> list[tuple[str, ...]]:
    return [(batch, role) for role in sorted(settings.models)] if name in BY_MODEL else [(batch,)]


def batch_status(settings: Settings, instance: dg.DagsterInstance) -> list[BatchStatus]:
    """Every registered batch with its tables, and how it stands."""
    storage = open_storage(settings)
    registered = instance.get_dynamic_partitions("batch")
    review = staleness.Review(storage, registered, present(settings, storage))
    outdated = {one.batch: one for batch in review.batches() for one in review.outdated(batch)[:1]}
    left_out = versions.sort_out(storage, registered, settings)[1]
    names = [*tables.TABLES, *(["calibration"] if settings.is_calibrated else [])]
    return [
        BatchStatus(
            batch,
            {name: _table_status(settings, storage, name, batch) for name in names},
            left_out.get(batch),
            outdated.get(batch),
        )
        for batch in sorted(registered)
    ]


def batches_left_out(settings: Settings, instance: dg.DagsterInstance) -> dict[str, str]:
    """The registered batches that a publication would leave out now, and why."""
    registered = instance.get_dynamic_partitions("batch")
    return versions.sort_out(open_storage(settings), registered, settings)[1]


def refused_deliveries(settings: Settings) -> dict[str, str]:
    """What lies in the landing zone and was refused at the last look, and why."""
    return landing.read_refused(open_storage(settings))


def published_withdrawn(settings: Settings) -> list[str]:
    """Batches of the newest version of which something was withdrawn since they entered it."""
    return versions.published_withdrawn(open_storage(settings))


def kept_versions(settings: Settings) -> list[str]:
    """The versions of the dataset whose files are kept, the newest last."""
    return versions.kept_versions(open_storage(settings))


def dataset_folder(settings: Settings) -> str:
    """Where the versions of the dataset lie."""
    return open_storage(settings).url(versions.FOLDER)


def _table_status(settings: Settings, storage: Storage, name: str, batch: str) -> TableStatus:
    partitions = _table_partitions(settings, name, batch)
    try:
        rows = [storage.read_table(name, *p).frame.height for p in partitions if storage.has_table(name, *p)]
    except ValueError:  # A StorageError, or a name that the UI let pass.
        return TableStatus(None, 0, len(partitions), is_readable=False)
    return TableStatus(rows[0] if rows else None, len(rows), len(partitions))
