"""rank_reference as it is stored: the batches that it may be made from, and the one writing under its name.

Belongs here: which scores can be compared with which, and that a reference never changes. Does not belong here: ranks
and drift against its rows (`rank_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import GateSettings, RankingSettings, ReferenceSettings, ValiditySettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.scoring.stored_scores import Scores, differently_scored, identities, scored_by
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.origin import OriginError, batch_of, require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity.judgement import Sample, choose_cuts, judge_in_parts
from qaq_pipeline.validity.planted_sample import PlantedSample, pairs_of_batch

NAME = "rank_reference"
CUTS = "reference_cuts"
_JUDGED = ("pair_id", "invalid_by")


class RankReferenceError(OriginError):
    """A reference cannot be made from these batches, or these scores cannot be compared with it."""


def named(ranking: RankingSettings) -> ReferenceSettings:
    """The reference that the settings name. Raises ValueError where they name none."""
    if ranking.reference is None:
        raise ValueError("the settings name no reference (ranking.reference)")
    return ranking.reference


def frozen_with(ranking: RankingSettings) -> dict[str, Any]:
    """The settings that a reference is frozen with, as its provenance stores them."""
    return {"batches": list(named(ranking).batches), "ranking": ranking.without_pool()}


def require_comparable(frozen: StoredTable, scores: Scores) -> None:
    """Refuse scores that cannot be ranked against a reference. Raises RankReferenceError."""
    differing = differently_scored(frozen.provenance["scored_by"], scores)
    if differing:
        raise RankReferenceError(
            f"disagreement_scores: the models {differing} of batch {batch_of(scores['strong'])} are not those of the "
            f"reference {batch_of(frozen)}, or were asked differently; materialise logprobs and rmi_scores of the "
            "batch, or make a new reference of batches that were scored like this one"
        )


def read_pool(storage: Storage, ranking: RankingSettings) -> StoredTable | None:
    """The stored reference that batches are ranked against; None: each batch is its own pool.

    Raises:
        StorageError: it is not stored, or damaged.
        RankReferenceError: it is frozen with other settings.
    """
    if ranking.pool != "reference":
        return None
    name, wanted = named(ranking).name, frozen_with(ranking)
    table = storage.tables.read(NAME, Partition(name))
    if table.provenance["frozen_with"] != wanted:
        raise RankReferenceError(
            f"the reference {name} was built with {table.provenance['frozen_with']}, but the settings are {wanted}; "
            f"give ranking.reference a new name, and materialise {NAME}"
        )
    return table


def as_input(frozen: StoredTable | None) -> dict[str, StoredTable]:
    """The reference among the inputs of a table's provenance; empty where each batch is its own pool."""
    return {} if frozen is None else {NAME: frozen}


def pool_id(batch: str, ranking: RankingSettings, frozen: StoredTable | None) -> str:
    """The pool_id that the ranks of a batch should have."""
    return rank_reference.pool_of(batch, ranking, None if frozen is None else frozen.data_version)


def require_pool(disagreement_scores: StoredTable, ranking: RankingSettings, frozen: StoredTable | None) -> None:
    """Refuse ranks in another pool than the settings name, whose cuts decide. Raises OriginError."""
    batch, pool = batch_of(disagreement_scores), disagreement_scores.provenance["pool_id"]
    wanted = pool_id(batch, ranking, frozen)
    if pool != wanted:
        raise OriginError(
            f"disagreement_scores of batch {batch} are ranks in the pool {pool}, the settings "
            f"ask for {wanted}; materialise disagreement_scores of this batch first (or `qaq run` the batch again)"
        )


def read_scores(storage: Storage, batch: str, roles: Sequence[str], limits: GateSettings) -> dict[str, StoredTable]:
    """The rmi_scores of a batch that a reference may be made from.

    Raises:
        RankReferenceError: they are missing, or the batch is gated.
        OriginError: they are stale.
    """
    missing = [role for role in roles if not storage.tables.has("rmi_scores", Partition(batch, role))]
    if missing:
        raise RankReferenceError(
            f"{NAME}: batch {batch} has no rmi_scores of the models {missing}; materialise them first, or `qaq run` "
            "the batch with ranking.pool: batch"
        )
    scores = {role: storage.tables.read("rmi_scores", Partition(batch, role)) for role in sorted(roles)}
    screened = storage.tables.footer("screened_data", Partition(batch))
    for role, table in scores.items():
        name = str(Input("rmi_scores", role))
        require_inputs(name, table, {"screened_data": screened}, table.provenance["scored_from"])
    made_of = {role: table.provenance for role, table in scores.items()}
    gate = gates.of_batch(batch, screened.provenance, made_of, limits)
    if gate is not None:
        raise RankReferenceError(
            f"{NAME}: batch {batch} is gated: {gate.sentence}; or leave it out of ranking.reference.batches"
        )
    return scores


def read_sample(storage: Storage, batch: str, roles: Sequence[str], limits: GateSettings) -> PlantedSample:
    """The pairs and planted rows of a batch from which a reference's cuts may be chosen.

    Raises:
        RankReferenceError: something is missing, or the batch is gated.
        OriginError: something is stale.
    """
    scores = read_scores(storage, batch, roles, limits)
    needed = [("planted_rows", Partition(batch)), *(("planted_scores", Partition(batch, role)) for role in roles)]
    if missing := [f"{table}[{partition}]" for table, partition in needed if not storage.tables.has(table, partition)]:
        raise RankReferenceError(
            f"{CUTS}: batch {batch} lacks {', '.join(missing)}; materialise them first, or `qaq run` the batch with "
            "ranking.pool: batch and calibration.enabled: true"
        )
    raw, screened, planted = (
        storage.tables.read(name, Partition(batch)) for name in ("raw_data", "screened_data", "planted_rows")
    )
    of_planted = {role: storage.tables.read("planted_scores", Partition(batch, role)) for role in sorted(roles)}
    return PlantedSample(raw, screened, scores, planted, of_planted)


def judge(
    storage: Storage, batches: Mapping[str, Scores], cuts: StoredTable, settings: ValiditySettings
) -> dict[str, pl.DataFrame]:
    """pair_id and invalid_by of the pairs of each batch of a reference, by the reference's cuts."""
    found = {}
    for batch, scores in batches.items():
        raw, screened = (storage.tables.read(name, Partition(batch)) for name in ("raw_data", "screened_data"))
        parts = judge_in_parts(pairs_of_batch(raw, screened, scores), cuts.frame, settings)
        nothing = empty(tables.Validity).select(_JUDGED)
        found[batch] = pl.concat([nothing, *(part.select(_JUDGED) for part in parts)])
    return found


def freeze(
    batches: Mapping[str, Scores],
    ranking: RankingSettings,
    code_version: str | None,
    validity: Mapping[str, pl.DataFrame] | None = None,
    cuts: StoredTable | None = None,
) -> tuple[StoredTable, list[str]]:
    """The reference of some batches, and warnings as sentences.

    Args:
        batches: the scores of each batch.
        ranking: names the reference, and how strata are made.
        code_version: of the asset.
        validity: pair_id and invalid_by of each batch by the cuts; None: pairs are not judged.
        cuts: reference_cuts, where pairs are judged.

    Raises:
        RankReferenceError: the batches were scored differently, or a model can rank no pair.
    """
    _require_one_scoring(batches)
    _require_one_eligibility(batches)
    frames = [{role: table.frame for role, table in scores.items()} for scores in batches.values()]
    try:
        judged = None if validity is None else pl.concat(validity.values()).unique("pair_id", keep="first")
        frame, warnings = rank_reference.freeze(frames, ranking, judged)
        checked = tables.enforce(tables.RankReference, frame)
    except ValueError as error:
        raise RankReferenceError(f"{NAME} {named(ranking).name}: {error}; nothing was written") from error
    provenance = _provenance(NAME, batches, ranking, code_version)
    if cuts is not None:
        provenance["inputs"][CUTS] = cuts.data_version
    return StoredTable(checked, provenance), warnings


def _require_one_scoring(batches: Mapping[str, Scores]) -> None:
    first, *others = batches
    for other in others:
        if differing := differently_scored(scored_by(batches[first]), batches[other]):
            raise RankReferenceError(
                f"{NAME}: the batches {first} and {other} were scored by different models, or asked differently, as "
                f"{differing}; materialise logprobs and rmi_scores of both, or leave one out"
            )


def _require_one_eligibility(batches: Mapping[str, Scores]) -> None:
    """A pair with a short Q that one batch leaves unscored would be in the pool or not by the order of the batches."""
    found = {
        Partition(batch, role): table.provenance.get("eligibility")
        for batch, scores in batches.items()
        for role, table in scores.items()
    }
    expected = next(iter(found.values()))
    if any(eligibility != expected for eligibility in found.values()):
        said = ", ".join(f"{partition}: {eligibility}" for partition, eligibility in found.items())
        raise RankReferenceError(
            f"{NAME}: the rmi_scores were made under different `eligibility` ({said}); materialise rmi_scores of these "
            "batches, or leave some out"
        )


def freeze_cuts(
    samples: Mapping[str, PlantedSample], ranking: RankingSettings, settings: ValiditySettings, code_version: str | None
) -> StoredTable:
    """The cuts of a reference, chosen from the pairs and planted rows of all its batches.

    Raises:
        RankReferenceError: the batches were scored differently.
    """
    scores = {batch: sample.rmi_scores for batch, sample in samples.items()}
    _require_one_scoring(scores)
    joined = Sample.joined([sample.sample for sample in samples.values()])
    checked = tables.enforce(tables.ValidityCuts, choose_cuts(joined, settings))
    provenance = _provenance(CUTS, scores, ranking, code_version)
    provenance["frozen_with"] = provenance["frozen_with"] | {"validity": settings.model_dump(mode="json")}
    provenance["inputs"] |= {
        str(Input("planted_scores", role, batch)): table.data_version
        for batch, sample in samples.items()
        for role, table in sample.planted_scores.items()
    }
    return StoredTable(checked, provenance)


def read_cuts(storage: Storage, ranking: RankingSettings, settings: ValiditySettings) -> StoredTable:
    """The stored cuts of the reference that batches are ranked against.

    Raises:
        StorageError: they are not stored, or damaged.
        RankReferenceError: they are frozen with other settings.
    """
    name = named(ranking).name
    table = storage.tables.read(CUTS, Partition(name))
    wanted = frozen_with(ranking) | {"validity": settings.model_dump(mode="json")}
    if table.provenance["frozen_with"] != wanted:
        raise RankReferenceError(
            f"the cuts of the reference {name} were chosen with {table.provenance['frozen_with']}, but the settings "
            f"are {wanted}; give ranking.reference a new name, and materialise {CUTS} and {NAME}"
        )
    return table


def _provenance(
    table: str, batches: Mapping[str, Scores], ranking: RankingSettings, code_version: str | None
) -> dict[str, Any]:
    scores = next(iter(batches.values()))
    return {
        "table": table,
        "partition": [named(ranking).name],
        "code_version": code_version,
        "inputs": {
            str(Input("rmi_scores", role, batch)): table.data_version
            for batch, scores in batches.items()
            for role, table in scores.items()
        },
        "frozen_with": frozen_with(ranking),
        "scored_by": scored_by(scores),
        "models": identities(scores),
    }


def store(storage: Storage, name: str, made: StoredTable) -> StoredTable:
    """Store a reference, or its cuts, once under its name, and return the stored one.

    Raises:
        RankReferenceError: another reference is stored under the name, or the stored one is damaged.
    """
    table, partition = made.provenance["table"], Partition(name)
    with storage.locks.hold(table, name):
        frozen = _read_frozen(storage, partition, made) if storage.tables.has(table, partition) else None
        if frozen is None:
            storage.tables.write(made, table, partition)
            return made
    if not frozen.frame.equals(made.frame) or any(
        frozen.provenance[key] != made.provenance[key] for key in ("frozen_with", "scored_by")
    ):
        raise RankReferenceError(
            f"the reference {name} is frozen, and its batches or the settings of its ranks or signals have changed; "
            "give ranking.reference a new name, or restore what it was made from"
        )
    return frozen


def _read_frozen(storage: Storage, partition: Partition, made: StoredTable) -> StoredTable | None:
    """The stored reference; None: it is damaged, and was the same as the one that is made now."""
    try:
        return storage.tables.read(made.provenance["table"], partition)
    except StorageError as error:
        if storage.tables.version(made.provenance["table"], partition) == made.data_version:
            return None
        url = storage.tables.url(made.provenance["table"], partition)
        raise RankReferenceError(
            f"the reference {partition.batch} is damaged, and cannot be made again as it was: restore {url} from a "
            "backup, or give ranking.reference a new name"
        ) from error
