"""The published dataset: which batches enter it, its files, its manifest, and where it lies. No Dagster.

Belongs here: what a version consists of. Does not belong here: the formats of the files, or when it is published.

    curated_dataset/<manifest hash>/manifest.json, README.md, dataset_info.json, scores.parquet,
                                    <selection>/<format's file or folder>
    curated_dataset/differences/<newer>_from_<older>.parquet   the rows that entered and left, and why
    curated_dataset/publications.json          every publication: the version's number, its hash, when, by which run
    curated_dataset/pair_index/<version>.parquet  from pair_ids to the rows of its scores.parquet
    curated_dataset/history.json               the versions whose files are kept, the one published last at the end
    curated_dataset/retired/<version>.json     manifests of versions whose files were not kept
    curated_dataset/latest.json                points to the newest version, and lists the batches left out

The hash is taken of the manifest: equal content is one version, however often it is published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import Settings, settings_hash
from qaq_pipeline.publication import dataset_card, exports
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.tables import Change, Decision, Status
from qaq_pipeline.screening import gates, withdrawals
from qaq_pipeline.screening.withdrawals import Withdrawals
from qaq_pipeline.selection import decisions, rank_reference
from qaq_pipeline.storage.storage import Footer, Storage, StorageError, StoredTable, empty, hash_json

FOLDER = "curated_dataset"
MANIFEST_FORMAT = 2
_LOG = (FOLDER, "publications.json")
_SHORTEST_HASH = 4


@dataclass(frozen=True)
class BatchTables:
    """What of a batch enters the dataset."""

    batch: str
    raw_data: StoredTable
    screened_data: StoredTable
    decisions: StoredTable
    selected_subset: StoredTable


@dataclass(frozen=True)
class Publication:
    """A version of the dataset, as published."""

    version: str
    manifest: dict[str, Any]
    url: str
    is_new: bool
    """Whether its files were written now."""
    previous: str | None = None
    """The version that was the newest before, where it is another."""
    difference: pl.DataFrame | None = None
    """What is in and out since then, as Difference; None where there is no version before, or its files are gone."""
    retired: tuple[str, ...] = ()
    """Versions whose files were removed now."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version by its number, as people call it; it keeps the number when it is published again."""

    number: int
    version: str
    published_at: str | None
    """None: before publications were logged."""
    run_id: str | None


@dataclass(frozen=True)
class _Footers:
    """What made the tables of a batch that enter the dataset."""

    raw_data: Footer
    screened_data: Footer
    decisions: Footer
    selected_subset: Footer

    @property
    def versions(self) -> dict[str, str]:
        """Data versions by table, as a manifest's entry has them."""
        return {name: getattr(self, name).data_version for name in _ENTERING}


_ENTERING = ("raw_data", "screened_data", "decisions", "selected_subset")


def sort_out(
    storage: Storage, registered: Sequence[str], settings: Settings
) -> tuple[dict[str, _Footers], dict[str, str]]:
    """The batches that are complete and consistent, and for every other registered one why it is left out.

    By the tables' footers alone: what a publication would do, without reading a row.
    """
    included, excluded = {}, {}
    order = storage.batches_in_order()
    standing = standing_batches(storage, order, set(registered))
    withdrawn = withdrawals.read(storage)
    named = settings.ranking.reference
    reference_version = None if named is None else storage.table_version("rank_reference", named.name)
    for batch in sorted(registered):
        try:
            footers = _read_footers(storage, batch)
            fault = (
                _inconsistency(footers, settings, rank_reference.pool_of(batch, settings.ranking, reference_version))
                or screened_otherwise(batch, footers.screened_data.provenance, order, standing)
                or not_withdrawn(storage, batch, footers.screened_data.provenance, withdrawn)
            )
        except ValueError as error:  # A name that the UI let pass, or a StorageError.
            excluded[batch] = str(error)
            continue
        if fault:
            excluded[batch] = fault
        else:
            included[batch] = footers
    return included, excluded


def _read_footers(storage: Storage, batch: str) -> _Footers:
    missing = [name for name in _ENTERING if not storage.has_table(name, batch)]
    if missing:
        raise StorageError(f"not materialised: {', '.join(missing)}")
    return _Footers(*(storage.read_footer(name, batch) for name in _ENTERING))


def read_batches(
    storage: Storage, registered: Sequence[str], settings: Settings
) -> tuple[list[BatchTables], dict[str, str]]:
    """The batches that enter the dataset, and for every other registered one why it is left out."""
    included, excluded = sort_out(storage, registered, settings)
    batches = []
    for batch in included:
        try:
            batches.append(BatchTables(batch, *(storage.read_table(name, batch) for name in _ENTERING)))
        except StorageError as error:  # Changed since it was written.
            excluded[batch] = str(error)
    return batches, excluded


def _inconsistency(tables: _Footers, settings: Settings, pool: str) -> str | None:
    decided, selected = tables.decisions.provenance, tables.selected_subset.provenance
    gate = gates.of_provenance(decided)
    if gate is not None:
        return f"gated ({gate.reason.value}): {gate.sentence}"
    if selected["inputs"]["decisions"] != tables.decisions.data_version:
        return "selected_subset is older than decisions; materialise it"
    for name, table in (("raw_data", tables.raw_data), ("screened_data", tables.screened_data)):
        if decided["inputs"][name] != table.data_version:
            return f"decisions are older than {name}; materialise the batch"
    return _decided_otherwise(decided, selected["selection"], settings, pool)


def _decided_otherwise(decided: Mapping[str, Any], selection: str, settings: Settings, pool: str) -> str | None:
    """Whether a batch was selected from or ranked under other settings, or in another pool, than are in force now."""
    if selection != settings.published.name:
        return f"selected by {selection}, not by {settings.published.name}; `qaq recurate` selects again"
    if decided["published_hash"] != settings_hash(settings.published):
        return f"decided under other settings of {settings.published.name}; `qaq recurate` decides again"
    if settings.export.selections != "published" and decided["settings_hash"] != settings_hash(settings.selections):
        return "decided under other settings of the exported selections; `qaq recurate` decides again"
    if decided.get("pool_id") != pool:
        return f"ranked in the pool {decided.get('pool_id')}, not in {pool}; `qaq recurate` ranks it again"
    if decided.get("ranking_hash") != settings_hash(settings.ranking.without_pool()):
        return "ranked under other settings of ranking; `qaq recurate` ranks it again"
    return None


def standing_batches(storage: Storage, batches: Sequence[str], registered: Set[str]) -> dict[str, str]:
    """Of these batches those whose rows may stand for others, with the data version of their screened_data.

    They are registered, their tables up to the screening go together, and neither screening nor scoring gated them.
    """
    found = {}
    for batch in batches:
        if batch not in registered:
            continue
        try:
            signed, screened = (storage.read_footer(name, batch) for name in ("signatures", "screened_data"))
            decisions = storage.read_footer("decisions", batch) if storage.has_table("decisions", batch) else None
        except StorageError:
            continue
        is_current = screened.provenance["inputs"] == {
            "raw_data": storage.table_version("raw_data", batch),
            "signatures": signed.data_version,
        }
        gated = [gates.of_provenance(screened.provenance)]
        if decisions is not None and decisions.provenance["inputs"]["screened_data"] == screened.data_version:
            gated.append(gates.of_provenance(decisions.provenance))
        if is_current and not any(gated):
            found[batch] = screened.data_version
    return found


def screened_otherwise(
    batch: str, made_of: Mapping[str, Any], order: Sequence[str], standing: Mapping[str, str]
) -> str | None:
    """Whether a batch's duplicates were looked for in other older batches than those that stand now.

    Otherwise rows could be published twice, or nowhere: the row that stood for them is gone.
    """
    if "compared_with" not in made_of:
        return "screened by an older version; `qaq recurate` screens it again"
    if not made_of["across_batches"] or batch not in order:
        return None
    before = order[: order.index(batch)]
    now = {batch: standing[batch] for batch in before if batch in standing}
    differing = sorted(set(now.items()) ^ set(made_of["compared_with"].items()))
    if not differing:
        return None
    names = ", ".join(sorted({batch for batch, _ in differing}))
    return f"screened against another state of batch {names}; `qaq recurate` screens it again"


def not_withdrawn(storage: Storage, batch: str, made_of: Mapping[str, Any], withdrawn: Withdrawals) -> str | None:
    """Whether something of a batch was withdrawn, or is so no longer, since it was screened."""
    if withdrawn.of_batch(batch, _signatures(storage, batch, withdrawn)) == made_of.get("withdrawn", {}):
        return None
    return "withdrawals changed since it was screened; `qaq recurate` screens it again"


def _signatures(storage: Storage, batch: str, withdrawn: Withdrawals) -> pl.DataFrame:
    """Of the batch, where a row of any batch was withdrawn; else there is nothing to look for."""
    return storage.read_table("signatures", batch).frame if withdrawn.contents else empty(tables.Signatures)


def publish(
    storage: Storage,
    settings: Settings,
    batches: Sequence[BatchTables],
    excluded: dict[str, str],
    run_id: str | None = None,
) -> Publication:
    """Write a version and point to it; a version that exists is left as it is. Call it under the folder's lock."""
    files = dataset_files(settings, batches)
    manifest = {
        "format": MANIFEST_FORMAT,
        "selection": settings.published.model_dump(mode="json"),
        "export": settings.export.model_dump(mode="json"),
        "batches": [_entry(tables) for tables in batches],
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }
    version = hash_json(manifest)
    is_new = not storage.exists(FOLDER, version, "manifest.json")
    if is_new:
        for name, data in files.items():
            storage.write_bytes(data, FOLDER, version, *name.split("/"))
        storage.write_json(manifest, FOLDER, version, "manifest.json")
    _index(storage, version, manifest, _decisions(batches))
    _log(storage, version, run_id)
    previous = latest(storage)
    difference = None
    if previous is not None and storage.exists(FOLDER, previous, "manifest.json"):
        difference = _store_difference(storage, previous, version)
    storage.write_json({"version": version, "excluded_batches": excluded}, FOLDER, "latest.json")
    retired = _retire(storage, version, settings.publication.keep_versions)
    return Publication(version, manifest, storage.url(FOLDER, version), is_new, previous, difference, retired)


def is_current(storage: Storage, registered: Sequence[str], settings: Settings) -> bool:
    """Whether the newest version is what would be published now, by footers and settings alone."""
    included, _ = sort_out(storage, registered, settings)
    published = _manifest(storage)
    if published is None:
        return not included
    return (
        {entry["batch"]: {name: entry["data_versions"][name] for name in _ENTERING} for entry in published["batches"]}
        == {batch: footers.versions for batch, footers in included.items()}
        and published["format"] == MANIFEST_FORMAT
        and published["selection"] == settings.published.model_dump(mode="json")
        and published["export"] == settings.export.model_dump(mode="json")
    )


def _manifest(storage: Storage, version: str | None = None) -> dict[str, Any] | None:
    """Of a version, by default the newest; None where there is none, or its files are gone."""
    found = version or latest(storage)
    if found is None or not storage.exists(FOLDER, found, "manifest.json"):
        return None
    return storage.read_json(FOLDER, found, "manifest.json")


def _withdrawn_since(storage: Storage, version: str | None) -> withdrawals.Withdrawals:
    """What was withdrawn after a version was published; where that time is not recorded, all."""
    version = version or latest(storage)
    times = [one.published_at for one in publications(storage) if one.version == version]
    return withdrawals.read(storage, times[0] if times else None)


def published_withdrawn(storage: Storage, version: str | None = None) -> list[str]:
    """Batches of a version, by default the newest, of which something was withdrawn since they entered it.

    Of a batch that was delivered or screened anew since, the rows of then are not known any more: it counts as soon as
    any text was withdrawn after the version was published.
    """
    published, withdrawn = _manifest(storage, version), withdrawals.read(storage)
    found = []
    for entry in [] if published is None else published["batches"]:
        batch = entry["batch"]
        concerned = withdrawn.of_batch(batch, _signatures(storage, batch, withdrawn))
        screened = storage.read_footer("screened_data", batch)
        entered = screened.data_version == entry["data_versions"]["screened_data"]
        if entered and screened.provenance.get("withdrawn", {}) == concerned:
            continue
        if concerned or (not entered and _withdrawn_since(storage, version).contents):
            found.append(batch)
    return found


def latest(storage: Storage) -> str | None:
    """The version published last; None: nothing was."""
    return storage.read_json(FOLDER, "latest.json")["version"] if storage.exists(FOLDER, "latest.json") else None


def kept_versions(storage: Storage) -> list[str]:
    """The versions whose files are kept, the one published last at the end."""
    return storage.read_json(FOLDER, "history.json") if storage.exists(FOLDER, "history.json") else []


def publications(storage: Storage) -> list[Published]:
    """Every version that was ever published, once, in the order of the numbers."""
    return sorted({entry.version: entry for entry in reversed(_logged(storage))}.values(), key=lambda one: one.number)


def run_record(run_id: str) -> tuple[str, ...]:
    """Where it lies by which run, when, and without which batches a version was published."""
    return FOLDER, "runs", f"{run_id}.json"


def left_out(storage: Storage, published: Published) -> dict[str, str] | None:
    """The registered batches that a version was published without, and why; None: that is not recorded."""
    if published.run_id is None or not storage.exists(*run_record(published.run_id)):
        return None
    return storage.read_json(*run_record(published.run_id))["excluded_batches"]


def find_version(storage: Storage, name: str) -> Published:
    """The version that a person means: by its number, the first digits of its hash, or `latest`.

    Raises:
        StorageError: there is none, or more than one.
    """
    known = publications(storage)
    if not known:
        raise StorageError("nothing was published yet; `qaq run FILE --batch NAME` makes a version")
    digits = latest(storage) if name == "latest" else name
    if digits is None:
        raise StorageError("the first publication was cut off before it ended; `qaq recurate` ends it")
    by_number = [one for one in known if digits == str(one.number)]
    found = by_number or [one for one in known if len(digits) >= _SHORTEST_HASH and one.version.startswith(digits)]
    if len(found) != 1:
        numbers = ", ".join(f"{one.number} ({one.version[:8]})" for one in known)
        raise StorageError(f"no one version {name!r} was published; published were: {numbers}")
    return found[0]


def pair_index(version: str) -> tuple[str, ...]:
    """Where the index of a version's scores.parquet lies: outside, for the version's files are its content."""
    return FOLDER, "pair_index", f"{version}.parquet"


def _logged(storage: Storage) -> list[Published]:
    """The log, oldest first; of a storage of before there was one, what its history knows."""
    if storage.exists(*_LOG):
        return [Published(**entry) for entry in storage.read_json(*_LOG)]
    return [Published(number, version, None, None) for number, version in enumerate(kept_versions(storage), start=1)]


def _log(storage: Storage, version: str, run_id: str | None) -> None:
    """Add a publication, unless it is the same version as the last one."""
    logged = _logged(storage)
    if logged and logged[-1].version == version and storage.exists(*_LOG):
        return
    numbers = {entry.version: entry.number for entry in logged}
    number = numbers.get(version, max(numbers.values(), default=0) + 1)
    entry = Published(number, version, datetime.now(UTC).isoformat(timespec="seconds"), run_id)
    storage.write_json([asdict(one) for one in [*logged, entry]], *_LOG)


def _index(storage: Storage, version: str, manifest: Mapping[str, Any], decisions: pl.DataFrame) -> None:
    if not storage.exists(*pair_index(version)):
        storage.write_pair_index(decisions, manifest["files"]["scores.parquet"], *pair_index(version))


def _decisions(batches: Sequence[BatchTables]) -> pl.DataFrame:
    return _concat([tables.decisions.frame for tables in batches], "decisions")


def _store_difference(storage: Storage, older: str, newer: str) -> pl.DataFrame:
    before, after = (_read_scores(storage, version) for version in (older, newer))
    found = difference(before, after)
    if older != newer:
        storage.write_bytes(exports.parquet(found), FOLDER, "differences", f"{newer}_from_{older}.parquet")
    return found


def _read_scores(storage: Storage, version: str) -> pl.DataFrame:
    return storage.read_frame(FOLDER, version, "scores.parquet")


def difference(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """The Difference of two versions, from their scores.parquet.

    A row is the same where its place and its text are: of a row that was delivered anew with another text, the old one
    left and the new one entered.
    """
    key = [*tables.ROW_KEY, "pair_id"]
    old, new = (frame.select(*key, "decision", "reason").drop_nulls("pair_id") for frame in (before, after))
    both = old.join(new, on=key, how="full", suffix="_after", coalesce=True)
    was, is_now = (pl.col(name).eq_missing(Decision.SELECTED.value) for name in ("decision", "decision_after"))
    batch_of = {"before": set(before["batch"]), "after": set(after["batch"])}
    changed = both.filter(was != is_now)
    change = (
        pl.when(~pl.col("batch").is_in(batch_of["before"]))
        .then(pl.lit(Change.BATCH_ENTERED.value))
        .when(~pl.col("batch").is_in(batch_of["after"]))
        .then(pl.lit(Change.BATCH_LEFT.value))
        .when(pl.col("decision").is_null())
        .then(pl.lit(Change.ROW_DELIVERED.value))
        .when(pl.col("decision_after").is_null())
        .then(pl.lit(Change.ROW_GONE.value))
        .otherwise(pl.lit(Change.DECIDED_OTHERWISE.value))
    )
    return tables.enforce(
        tables.Difference,
        changed.select(
            *key,
            is_added=is_now,
            change=change,
            decision_before="decision",
            reason_before="reason",
            decision_after="decision_after",
            reason_after="reason_after",
        ).sort(key),
    )


def _retire(storage: Storage, version: str, keep: int | None) -> tuple[str, ...]:
    """Remove the files of the oldest versions, but for the newest `keep`; their manifests stay."""
    ordered = [*(known for known in kept_versions(storage) if known != version), version]
    surplus = ordered[:-keep] if keep else []
    for retired in surplus:
        if storage.exists(FOLDER, retired, "manifest.json"):
            manifest = storage.read_json(FOLDER, retired, "manifest.json")
            storage.write_json(manifest, FOLDER, "retired", f"{retired}.json")
            for name in manifest["files"]:  # The manifest goes last: until then the next publication goes on here.
                if storage.exists(FOLDER, retired, *name.split("/")):
                    storage.remove(FOLDER, retired, *name.split("/"))
            storage.remove_folder(FOLDER, retired)
            if storage.exists(*pair_index(retired)):
                storage.remove(*pair_index(retired))
    storage.write_json(ordered[len(surplus) :], FOLDER, "history.json")
    return tuple(surplus)


def dataset_files(settings: Settings, batches: Sequence[BatchTables]) -> dict[str, bytes]:
    """The files of a version by their path in it: the exported selections in each format, scores, what readers need."""
    decisions = _decisions(batches)
    files, exported = {"scores.parquet": exports.scores_parquet(decisions)}, {}
    for selection in settings.exported:
        rows = _rows(selection, batches, settings)
        for export_format in settings.export.formats:
            written = exports.export(export_format, rows)
            files |= {f"{selection}/{name}": data for name, data in written.items()}
        exported[selection] = rows.height
    files["dataset_info.json"] = exports.llama_factory_info(exported, settings.export.formats)
    files["README.md"] = dataset_card.dataset_card(
        settings.published,
        exported,
        settings.export,
        [_entry(tables) for tables in batches],
        _concat([tables.screened_data.frame for tables in batches], "screened_data"),
        decisions,
        {tables.batch: tables.screened_data.provenance["benchmarks"] for tables in batches},
    )
    return files


def _rows(selection: str, batches: Sequence[BatchTables], settings: Settings) -> pl.DataFrame:
    """The rows of all batches under a selection, batch by batch, best first."""
    rows = _concat([_rows_of_batch(selection, tables, settings) for tables in batches], "selected_subset")
    if not settings.export.meta:
        return rows
    screened = _concat([tables.screened_data.frame for tables in batches], "screened_data")
    barred = screened.filter(pl.col("status").is_in([Status.WITHDRAWN.value, Status.CONTAMINATED.value]))
    return exports.with_meta(rows, _concat([tables.raw_data.frame for tables in batches], "raw_data"), barred)


def _rows_of_batch(selection: str, tables: BatchTables, settings: Settings) -> pl.DataFrame:
    if selection == settings.published.name:
        return tables.selected_subset.frame
    return decisions.selected_rows(selection, tables.raw_data.frame, tables.decisions.frame)


def _concat(frames: Sequence[pl.DataFrame], table: str) -> pl.DataFrame:
    return pl.concat([empty(tables.TABLES[table]), *frames])


def _entry(tables: BatchTables) -> dict[str, Any]:
    decisions = tables.decisions
    return {
        "batch": tables.batch,
        "rows_in": tables.raw_data.frame.height,
        "rows_selected": tables.selected_subset.frame.height,
        "files": tables.raw_data.provenance["files"],
        "data_versions": {
            "raw_data": tables.raw_data.data_version,
            "decisions": decisions.data_version,
            "selected_subset": tables.selected_subset.data_version,
            **decisions.provenance["inputs"],
        },
        "models": decisions.provenance["models"],
        "pool": decisions.provenance["pool_id"],
        "settings_hash": decisions.provenance["settings_hash"],
        "provenance_id": decisions.provenance_id,
    }
