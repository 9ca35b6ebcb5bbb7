"""rank_reference as it is stored: the batches that it may be made from, and the one writing under its name.

Belongs here: which scores can be compared with which, and that a reference never changes. Does not belong here: ranks
and drift against its rows (`rank_reference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qaq_pipeline.config.settings import GateSettings, RankingSettings, ReferenceSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Input, Partition
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.origin import OriginError, batch_of, require_inputs
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.tables import StoredTable

NAME = "rank_reference"

Scores = Mapping[str, StoredTable]
"""rmi_scores of a batch, by model."""


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


def scored_by(scores: Scores) -> dict[str, Any]:
    """What scores must have in common to be ranked together, by role: the model, its prompts and its window."""
    return {
        role: {key: table.provenance[key] for key in ("identity_hash", "scoring")} for role, table in scores.items()
    }


def identities(scores: Scores) -> dict[str, Any]:
    """ScoreIdentities by role."""
    return {role: table.provenance["identity"] for role, table in scores.items()}


def differently_scored(expected: Mapping[str, Any], scores: Scores) -> list[str]:
    """The models whose scores cannot be compared with those that were `scored_by` the expected ones."""
    return [role for role, found in scored_by(scores).items() if expected.get(role) != found]


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


def freeze(
    batches: Mapping[str, Scores], ranking: RankingSettings, code_version: str | None
) -> tuple[StoredTable, list[str]]:
    """The reference of some batches, and warnings as sentences.

    Raises:
        RankReferenceError: the batches were scored differently, or a model can rank no pair.
    """
    _require_one_scoring(batches)
    _require_one_eligibility(batches)
    frames = [{role: table.frame for role, table in scores.items()} for scores in batches.values()]
    try:
        frame, warnings = rank_reference.freeze(frames, ranking)
        checked = tables.enforce(tables.RankReference, frame)
    except ValueError as error:
        raise RankReferenceError(f"{NAME} {named(ranking).name}: {error}; nothing was written") from error
    return StoredTable(checked, _provenance(batches, ranking, code_version)), warnings


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


def _provenance(batches: Mapping[str, Scores], ranking: RankingSettings, code_version: str | None) -> dict[str, Any]:
    scores = next(iter(batches.values()))
    return {
        "table": NAME,
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
    """Store a reference once under its name, and return the stored one.

    Raises:
        RankReferenceError: another reference is stored under the name, or the stored one is damaged.
    """
    partition = Partition(name)
    with storage.locks.hold(NAME, name):
        frozen = _read_frozen(storage, partition, made) if storage.tables.has(NAME, partition) else None
        if frozen is None:
            storage.tables.write(made, NAME, partition)
            return made
    if not frozen.frame.equals(made.frame) or any(
        frozen.provenance[key] != made.provenance[key] for key in ("frozen_with", "scored_by")
    ):
        raise RankReferenceError(
            f"the reference {name} is frozen, and its batches or the settings of its ranks have changed; give "
            "ranking.reference a new name, or restore what it was made from"
        )
    return frozen


def _read_frozen(storage: Storage, partition: Partition, made: StoredTable) -> StoredTable | None:
    """The stored reference; None: it is damaged, and was the same as the one that is made now."""
    try:
        return storage.tables.read(NAME, partition)
    except StorageError as error:
        if storage.tables.version(NAME, partition) == made.data_version:
            return None
        raise RankReferenceError(
            f"the reference {partition.batch} is damaged, and cannot be made again as it was ({error}); restore the "
            "file, or give ranking.reference a new name"
        ) from error
