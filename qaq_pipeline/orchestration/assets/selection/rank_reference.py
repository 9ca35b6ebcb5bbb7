"""The asset rank_reference: a frozen pool, which ranks and cuts of every batch can be taken against."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import ReferenceSettings, Settings
from qaq_pipeline.orchestration.metadata import code_version, definition, lineage_of_columns
from qaq_pipeline.orchestration.results import require_inputs
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import gates
from qaq_pipeline.selection.rank_reference import freeze
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

VERSION = "1"
NAME = "rank_reference"

Scores = dict[str, StoredTable]
"""rmi_scores of a batch, by model."""


def build_rank_reference(settings: Settings) -> dg.AssetsDefinition:
    """rank_reference: unpartitioned, of exactly the batches that the settings name; frozen when it is first made."""
    wanted = _wanted(settings)
    keys = [
        dg.MultiPartitionKey({"batch": batch, "model": role})
        for batch in wanted.batches
        for role in sorted(settings.models)
    ]

    @dg.asset(
        **definition(NAME),
        group_name="selection",
        kinds={"polars", "parquet"},
        # A batch that is not of these leaves it fresh.
        deps=[dg.AssetDep("rmi_scores", partition_mapping=dg.SpecificPartitionsPartitionMapping(keys))],
        code_version=code_version(VERSION, wanted.name, frozen_with(settings), settings.gates.min_scorable_share),
    )
    def rank_reference(context: dg.AssetExecutionContext, storage: dg.ResourceParam[Storage]) -> dg.MaterializeResult:
        batches = {batch: _read_batch(storage, batch, settings) for batch in wanted.batches}
        _require_one_scoring(batches)
        _require_one_eligibility(batches)
        try:
            frame, warnings = freeze(
                [{role: table.frame for role, table in scores.items()} for scores in batches.values()],
                settings.ranking,
            )
            checked = tables.enforce(tables.RankReference, frame)
        except ValueError as error:
            raise dg.Failure(f"{NAME} {wanted.name}: {error}; nothing was written", allow_retries=False) from error
        for warning in warnings:
            context.log.warning(warning)
        version = context.assets_def.code_versions_by_key[context.asset_key]
        made = StoredTable(checked, _provenance(settings, batches, version))
        with storage.locks.hold(NAME, wanted.name):
            table = _freeze(storage, wanted.name, made)
        return _result(storage, wanted, table, warnings)

    return rank_reference


def _wanted(settings: Settings) -> ReferenceSettings:
    if settings.ranking.reference is None:
        raise ValueError("the settings name no reference (ranking.reference)")
    return settings.ranking.reference


def frozen_with(settings: Settings) -> dict[str, Any]:
    """The settings that a reference is frozen with, as its provenance has them."""
    return {
        "batches": list(_wanted(settings).batches),
        "ranking": settings.ranking.without_pool(),
    }


def scored_by(scores: Scores) -> dict[str, Any]:
    """By model, what scores must have in common to be ranked together: who was asked, what, and in which window."""
    return {
        role: {key: table.provenance[key] for key in ("identity_hash", "scoring")} for role, table in scores.items()
    }


def read_reference(storage: Storage, settings: Settings) -> StoredTable:
    """The stored reference that the settings name.

    Raises:
        StorageError: it is not stored, or damaged.
        dg.Failure: it is frozen with other settings.
    """
    wanted = _wanted(settings)
    table = storage.tables.read(NAME, Partition(wanted.name))
    if table.provenance["frozen_with"] != frozen_with(settings):
        raise dg.Failure(
            f"the reference {wanted.name} is frozen with {table.provenance['frozen_with']}, the settings ask for "
            f"{frozen_with(settings)}; give ranking.reference a name that is new, and materialise {NAME}",
            allow_retries=False,
        )
    return table


def differently_scored(table: StoredTable, scores: Scores) -> list[str]:
    """The models of a batch whose scores cannot be compared with those of a reference."""
    ours, frozen = scored_by(scores), table.provenance["scored_by"]
    return [role for role, made_by in ours.items() if frozen.get(role) != made_by]


def _read_batch(storage: Storage, batch: str, settings: Settings) -> Scores:
    """The batch's rmi_scores, up to date and not gated."""
    missing = [role for role in settings.models if not storage.tables.has("rmi_scores", Partition(batch, role))]
    if missing:
        raise dg.Failure(
            f"{NAME}: batch {batch} has no rmi_scores of the models {missing}; materialise them first, or `qaq run` "
            "the batch with ranking.pool: batch",
            allow_retries=False,
        )
    scores = {role: storage.tables.read("rmi_scores", Partition(batch, role)) for role in sorted(settings.models)}
    screened = storage.tables.read("screened_data", Partition(batch))
    for role, table in scores.items():
        require_inputs(f"rmi_scores|{role}", table, {"screened_data": screened}, table.provenance["scored_from"])
    gate = gates.of_provenance(screened.provenance) or gates.after_scoring(
        {role: table.frame for role, table in scores.items()},
        {role: table.provenance for role, table in scores.items()},
        settings.gates,
    )
    if gate is not None:
        raise dg.Failure(
            f"{NAME}: batch {batch} is gated: {gate.sentence}; or leave it out of ranking.reference.batches",
            allow_retries=False,
        )
    return scores


def _require_one_scoring(batches: Mapping[str, Scores]) -> None:
    first, *others = batches
    for other in others:
        expected, found = scored_by(batches[first]), scored_by(batches[other])
        differing = [role for role in expected if expected[role] != found[role]]
        if differing:
            raise dg.Failure(
                f"{NAME}: the batches {first} and {other} were scored by different models, or asked differently, as "
                f"{differing}; materialise logprobs and rmi_scores of both, or leave one out",
                allow_retries=False,
            )


def _require_one_eligibility(batches: Mapping[str, Scores]) -> None:
    """A pair that one batch leaves unscored for its short Q would else be in the pool or not, by the batches' order."""
    found = {
        f"{batch}|{role}": table.provenance.get("eligibility")
        for batch, scores in batches.items()
        for role, table in scores.items()
    }
    expected = next(iter(found.values()))
    if any(eligibility != expected for eligibility in found.values()):
        said = ", ".join(f"{partition}: {eligibility}" for partition, eligibility in found.items())
        raise dg.Failure(
            f"{NAME}: the rmi_scores were made under different `eligibility` ({said}); materialise rmi_scores of these "
            "batches, or leave some out",
            allow_retries=False,
        )


def _provenance(settings: Settings, batches: Mapping[str, Scores], version: str | None) -> dict[str, Any]:
    name = _wanted(settings).name
    scores = next(iter(batches.values()))
    return {
        "table": NAME,
        "partition": [name],
        "code_version": version,
        "inputs": {
            f"rmi_scores|{batch}|{role}": table.data_version
            for batch, scores in batches.items()
            for role, table in scores.items()
        },
        "frozen_with": frozen_with(settings),
        "scored_by": scored_by(scores),
        "models": {role: table.provenance["identity"] for role, table in scores.items()},
    }


def _freeze(storage: Storage, name: str, made: StoredTable) -> StoredTable:
    """The reference that stands under the name from now on: it never becomes another one.

    Raises:
        dg.Failure: another one stands there.
    """
    if not storage.tables.has(NAME, Partition(name)):
        storage.tables.write(made, NAME, Partition(name))
        return made
    try:
        frozen = storage.tables.read(NAME, Partition(name))
    except StorageError as error:
        if storage.tables.version(NAME, Partition(name)) != made.data_version:
            raise dg.Failure(
                f"the reference {name} is damaged, and cannot be made again as it was ({error}); restore the file, or "
                "give ranking.reference a name that is new",
                allow_retries=False,
            ) from error
        storage.tables.write(made, NAME, Partition(name))
        return made
    if not frozen.frame.equals(made.frame) or any(
        frozen.provenance[key] != made.provenance[key] for key in ("frozen_with", "scored_by")
    ):
        raise dg.Failure(
            f"the reference {name} is frozen, and its batches or the settings of its ranks are others now; give "
            "ranking.reference a name that is new, or name what it was made of",
            allow_retries=False,
        )
    return frozen


def _result(
    storage: Storage, wanted: ReferenceSettings, table: StoredTable, warnings: list[str]
) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        data_version=dg.DataVersion(table.data_version),
        metadata={
            "dagster/row_count": table.frame.height,
            "name": wanted.name,
            "batches": list(wanted.batches),
            "pairs": table.frame["pair_id"].n_unique(),
            "num_strata": dict(table.frame.select("model", "num_strata").unique().sort("model").iter_rows()),
            "path": dg.MetadataValue.path(storage.tables.url(NAME, Partition(wanted.name))),
            "warnings": warnings,
            **lineage_of_columns(NAME, table.provenance["inputs"]),
            "provenance": dg.JsonMetadataValue(table.provenance),
        },
    )
