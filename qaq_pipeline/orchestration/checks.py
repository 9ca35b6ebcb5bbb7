"""Asset checks: warnings for a person, beside each asset in the UI and in the summary of `qaq run`.

Belongs here: the list of checks, the tables that they read, and their definitions. Does not belong here: measurements
(`reports.check_metrics`), and what stops a batch: checks only report. A blocking check would stop the assets of its own
run and no other; the verdicts that gate a batch are stored with its tables (`screening.gates`).

The checks of an asset run as one step after it, for its partition. A check whose table is torn or missing does not
pass; it is then an error instead of a warning, and says why. A fault of the code fails the step, as in an asset.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.metadata import readable
from qaq_pipeline.orchestration.partitions import BATCHES, partitions_of
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import check_metrics, drift
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring import stored_scores
from qaq_pipeline.screening import gates
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

Measurements = Mapping[str, Callable[[], Finding]]
"""By the name of the check. Each raises StorageError where a file that only this check reads is torn or missing."""

_DESCRIPTIONS = {
    "raw_data": {"rows_can_be_read": "The share of rejected rows is at most gates.max_rejected_share."},
    "screened_data": {
        "passes_gate": "The batch is fit to be scored. Also shown: the shares of duplicates and benchmark tasks."
    },
    "logprobs": {
        "few_nulls": "The share of wanted quantities without a number is at most checks.max_null_logprob_share.",
        "few_truncated": "The share of answers cut to the window is at most checks.max_truncated_share.",
    },
    "rmi_scores": {
        "answers_explain_queries": "Mean RMI is above checks.min_mean_rmi. At about 0 the answers are unrelated to "
        "their queries, or the model, its prompt or a token boundary is broken."
    },
    "disagreement_scores": {
        "models_differ": "The Spearman correlation of the models' ranks is below checks.max_rank_correlation: "
        "otherwise the second model adds little.",
        "strata_are_filled": "There are ranking.num_strata strata of at least ranking.min_rows_per_stratum rows.",
        "is_near_reference": "PPL(Q) and RMI of each model are distributed as in ranking.reference: PSI is at most "
        "checks.max_psi, and the Kolmogorov-Smirnov statistic at most checks.max_ks.",
    },
    "calibration": {
        "models_can_tell": "Each model's RMI separates matched pairs from mismatched ones (the same query with another "
        "row's answer), with an AUROC of at least checks.min_auc, over at least 20 mismatched ones. Also shown: its "
        "AUROC for every defect.",
        "defects_are_kept_out": "The published selection keeps at most checks.max_kept_share of the planted rows of "
        "each defect, over at least 20 of each. Not judged: a wrong token of code, the negative control.",
    },
    "decisions": {
        "every_row_is_decided": "Every row of raw_data has one decision. Also shown: the selected share.",
        "passes_gates": "The batch is fit to be published.",
        "same_models_as_published": "The models and their settings are those of the newest published version.",
    },
    "curated_dataset": {
        "every_batch_is_in_it": "No registered batch is left out of the newest version.",
        "files_are_as_published": "The files of the newest version have the sha256 of its manifest.",
    },
}


def build_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """Fresh definitions of all checks for the settings; those of RMI and its ranks only where RMI is wanted."""
    return [_checks(asset, descriptions, settings) for asset, descriptions in _wanted(settings).items() if descriptions]


def evaluate(
    settings: Settings, storage: Storage, registered: Sequence[str], batch: str
) -> Iterator[dg.AssetCheckEvaluation]:
    """Evaluate every check of the tables of a batch and of the newest version, outside a run."""
    for asset, names in _wanted(settings).items():
        if not names:
            continue
        for partition in PIPELINE[asset].partitions(batch, list(settings.models)) if asset in _MEASURES else [None]:
            measure = functools.cache(
                functools.partial(_measure, asset, partition, settings, storage, lambda: registered)
            )
            for name in names:
                result = _result(name, measure, None if partition is None else partition.model)
                yield dg.AssetCheckEvaluation(
                    asset_key=dg.AssetKey(asset),
                    check_name=name,
                    passed=result.passed,
                    metadata=result.metadata,
                    severity=result.severity,
                    description=result.description,
                    partition=None if partition is None else partition.key,
                )


def _wanted(settings: Settings) -> dict[str, dict[str, str]]:
    """The description of each check that the settings ask for, by asset and name."""
    ranking, has_rmi = settings.ranking, "rmi" in settings.scoring.quantities
    is_wanted = {
        "answers_explain_queries": has_rmi,
        "models_differ": has_rmi,
        # A reference has its own strata, whatever the size of the batch.
        "strata_are_filled": has_rmi and ranking.pool == "batch",
        "is_near_reference": has_rmi and ranking.reference is not None,
        "models_can_tell": settings.is_calibrated,
        "defects_are_kept_out": settings.is_calibrated,
    }
    return {
        asset: {name: text for name, text in checks.items() if is_wanted.get(name, True)}
        for asset, checks in _DESCRIPTIONS.items()
    }


def _checks(asset: str, descriptions: Mapping[str, str], settings: Settings) -> dg.AssetChecksDefinition:
    @dg.multi_asset_check(name=f"{asset}_checks", specs=_specs(asset, descriptions, settings))
    def checks(
        context: dg.AssetCheckExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.AssetCheckResult]:
        step = context.op_execution_context
        partition = Partition.parse(step.partition_key) if step.has_partition_key else None

        @functools.cache
        def measure() -> Measurements:
            registered = functools.partial(context.instance.get_dynamic_partitions, str(BATCHES.name))
            return _measure(asset, partition, settings, storage, registered)

        for name in descriptions:
            yield _result(name, measure, None if partition is None else partition.model)

    return checks


def _measure(
    asset: str,
    partition: Partition | None,
    settings: Settings,
    storage: Storage,
    registered: Callable[[], Sequence[str]],
) -> Measurements:
    """The measurements of an asset; without a partition, those of the newest version and the registered batches."""
    if partition is None:
        return _curated_dataset(storage, registered())
    return _MEASURES[asset](storage.tables.read(asset, partition), settings, storage, partition)


def _specs(asset: str, descriptions: Mapping[str, str], settings: Settings) -> list[dg.AssetCheckSpec]:
    partitions_def = partitions_of(PIPELINE[asset], settings)
    with warnings.catch_warnings():
        # Partitioned checks are a preview API since 1.13: https://github.com/dagster-io/dagster/pull/32894
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(name, asset=asset, description=description, partitions_def=partitions_def)
            for name, description in descriptions.items()
        ]


def _result(name: str, measure: Callable[[], Measurements], model: str | None) -> dg.AssetCheckResult:
    """The result of a check. Numbers of a model end with its name, because the UI plots each name as one line."""
    try:
        finding = measure()[name]()
    except StorageError as error:
        return dg.AssetCheckResult(
            passed=False,
            check_name=name,
            severity=dg.AssetCheckSeverity.ERROR,
            description=f"The check cannot be made: {error}.",
        )
    ending = f"_{model}" if model else ""
    return dg.AssetCheckResult(
        passed=finding.passed,
        check_name=name,
        severity=dg.AssetCheckSeverity.WARN,
        description=finding.sentence,
        metadata={f"{number}{ending}": readable(value) for number, value in finding.numbers.items()},
    )


# --- the checks of each table --------------------------------------------------------------------------------------


def _raw_data(raw: StoredTable, settings: Settings, *_: object) -> Measurements:
    limit = settings.gates.max_rejected_share
    return {"rows_can_be_read": lambda: check_metrics.rejected_rows(raw.select("status", "reason"), limit)}


def _screened_data(screened: StoredTable, *_: object) -> Measurements:
    gate = gates.of_provenance(screened.provenance)
    said = gate.sentence if gate else None
    return {"passes_gate": lambda: check_metrics.screened_rows(screened.select("status"), said)}


def _logprobs(logprobs: StoredTable, settings: Settings, *_: object) -> Measurements:
    limits, reasons = settings.checks, [f"null_reason_{quantity}" for quantity in Quantity]
    return {
        "few_nulls": lambda: check_metrics.null_quantities(logprobs.parts(*reasons), limits.max_null_logprob_share),
        "few_truncated": lambda: check_metrics.truncated_answers(
            logprobs.select("is_truncated"), limits.max_truncated_share
        ),
    }


def _rmi_scores(scores: StoredTable, settings: Settings, *_: object) -> Measurements:
    return {
        "answers_explain_queries": lambda: check_metrics.mean_rmi(scores.select("rmi"), settings.checks.min_mean_rmi)
    }


def _disagreement_scores(
    scores: StoredTable, settings: Settings, storage: Storage, partition: Partition
) -> Measurements:
    limits, ranking = settings.checks, settings.ranking
    return {
        "models_differ": lambda: check_metrics.rank_correlation(scores.select("ranks"), limits.max_rank_correlation),
        "strata_are_filled": lambda: check_metrics.filled_strata(scores.select("ranks"), ranking),
        "is_near_reference": lambda: _drift(storage, partition.batch, settings),
    }


def _drift(storage: Storage, batch: str, settings: Settings) -> Finding:
    name = stored_reference.named(settings.ranking).name
    if not storage.tables.has(stored_reference.NAME, Partition(name)):
        return Finding(False, f"The reference {name} is not made yet: the drift from it is not known.")
    frozen = storage.tables.read(stored_reference.NAME, Partition(name))
    scores = {role: storage.tables.read("rmi_scores", Partition(batch, role)) for role in sorted(settings.models)}
    if differing := stored_scores.differently_scored(frozen.provenance["scored_by"], scores):
        return Finding(False, f"The models {differing} are not those of the reference {name}: nothing can be compared.")
    of_batch = {role: table.select(*drift.QUANTITIES) for role, table in scores.items()}
    found = drift.drift(of_batch, frozen.select("model", *drift.QUANTITIES))
    return check_metrics.drift(found.statistics, found.evidence, settings.checks)


def _calibration(calibration: StoredTable, settings: Settings, *_: object) -> Measurements:
    gate = gates.of_provenance(calibration.provenance)
    if gate is not None:
        text = f"The batch is gated, and not calibrated: {gate.sentence}."
        return dict.fromkeys(_DESCRIPTIONS["calibration"], lambda: Finding(True, text))
    frame, limits, published = calibration.frame, settings.checks, settings.published.name
    return {
        "models_can_tell": lambda: check_metrics.discrimination(frame, limits.min_auc),
        "defects_are_kept_out": lambda: check_metrics.kept_defects(frame, published, limits.max_kept_share),
    }


def _decisions(decisions: StoredTable, _: Settings, storage: Storage, partition: Partition) -> Measurements:
    gate = gates.of_provenance(decisions.provenance)
    num_rows = storage.tables.footer("raw_data", partition).num_rows
    return {
        "every_row_is_decided": lambda: check_metrics.decided_rows(num_rows, decisions.select(*ROW_KEY, "decision")),
        "passes_gates": lambda: check_metrics.ungated(gate.sentence if gate else None),
        "same_models_as_published": lambda: _same_models(storage, decisions.provenance["models"]),
    }


def _same_models(storage: Storage, models: Mapping[str, Mapping[str, Any]]) -> Finding:
    newest = versions.latest(storage)
    manifest = None if newest is None else versions.read_manifest(storage, newest.version)
    return check_metrics.same_models(models, manifest)


def _curated_dataset(storage: Storage, registered: Sequence[str]) -> Measurements:
    newest = versions.find_version(storage, "latest")
    manifest = versions.read_manifest(storage, newest.version)
    entered = {entry["batch"] for entry in manifest["batches"]}
    since = "registered or completed since; publish again"
    reasons = {batch: None if batch in entered else newest.excluded_batches.get(batch, since) for batch in registered}
    return {
        "every_batch_is_in_it": lambda: check_metrics.left_out(reasons),
        "files_are_as_published": lambda: _matching_files(storage, newest.version, manifest["files"]),
    }


def _matching_files(storage: Storage, version: str, published: Mapping[str, str]) -> Finding:
    hashes: dict[str, str | None] = {}
    num_bytes = 0
    for name in published:
        parts = versions.place(version, name)
        exists = storage.files.exists(*parts)
        hashes[name] = storage.files.sha256(*parts) if exists else None
        num_bytes += storage.files.size(*parts) if exists else 0
    return check_metrics.matching_files(published, hashes, num_bytes)


_MEASURES: Mapping[str, Callable[[StoredTable, Settings, Storage, Partition], Measurements]] = {
    "raw_data": _raw_data,
    "screened_data": _screened_data,
    "logprobs": _logprobs,
    "rmi_scores": _rmi_scores,
    "disagreement_scores": _disagreement_scores,
    "calibration": _calibration,
    "decisions": _decisions,
}
