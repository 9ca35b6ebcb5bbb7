"""Asset checks: warnings for a person, beside each asset in the UI and in the summary of `qaq run`.

Belongs here: the list of checks, the tables that they read, and their definitions. Does not belong here: measurements
(`reports.check_metrics`), and what stops a batch: checks only report. A blocking check would stop the assets of its own
run and no other; the verdicts that gate a batch are stored with its tables (`screening.gates`).

The checks of an asset run as one step after it, for its partition. A check whose table is torn or missing does not
pass; it is then an error instead of a warning, and says why. A fault of the code fails the step, as in an asset.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.partitions import BATCHES, batch_by_model
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import check_metrics, drift
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import gates
from qaq_pipeline.selection.stored_reference import NAME, differently_scored
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage

Findings = dict[str, Finding | StorageError]
"""Results by the name of the check; an error where the file that only this check reads is torn or missing."""


def build_checks(settings: Settings) -> list[dg.AssetChecksDefinition]:
    """Fresh definitions of all checks for the settings; those of RMI and its ranks only where RMI is wanted."""
    of_rmi = [_rmi_scores(settings), _disagreement_scores(settings)] if "rmi" in settings.scoring.quantities else []
    return [
        _raw_data(settings),
        _screened_data(),
        _logprobs(settings),
        *of_rmi,
        *([_calibration(settings)] if settings.is_calibrated else []),
        _decisions(),
        _curated_dataset(),
    ]


def _raw_data(settings: Settings) -> dg.AssetChecksDefinition:
    def find(storage: Storage, batch: str) -> Findings:
        raw = storage.tables.read("raw_data", Partition(batch)).frame
        return {"rows_can_be_read": check_metrics.rejected_rows(raw, settings.gates.max_rejected_share)}

    descriptions = {"rows_can_be_read": "The share of rejected rows is at most gates.max_rejected_share."}
    return _of_table("raw_data", BATCHES, descriptions, find)


def _screened_data() -> dg.AssetChecksDefinition:
    def find(storage: Storage, batch: str) -> Findings:
        screened = storage.tables.read("screened_data", Partition(batch))
        gate = gates.of_provenance(screened.provenance)
        return {"passes_gate": check_metrics.screened_rows(screened.frame, gate.sentence if gate else None)}

    descriptions = {
        "passes_gate": "The batch is fit to be scored. Also shown: the shares of duplicates and benchmark tasks."
    }
    return _of_table("screened_data", BATCHES, descriptions, find)


def _logprobs(settings: Settings) -> dg.AssetChecksDefinition:
    limits = settings.checks

    def find(storage: Storage, batch: str, model: str) -> Findings:
        logprobs = storage.tables.read("logprobs", Partition(batch, model)).frame
        return {
            "few_nulls": check_metrics.null_quantities(logprobs, limits.max_null_logprob_share),
            "few_truncated": check_metrics.truncated_answers(logprobs, limits.max_truncated_share),
        }

    descriptions = {
        "few_nulls": "The share of wanted quantities without a number is at most checks.max_null_logprob_share.",
        "few_truncated": "The share of answers cut to the window is at most checks.max_truncated_share.",
    }
    return _of_table("logprobs", batch_by_model(settings), descriptions, find)


def _rmi_scores(settings: Settings) -> dg.AssetChecksDefinition:
    def find(storage: Storage, batch: str, model: str) -> Findings:
        scores = storage.tables.read("rmi_scores", Partition(batch, model)).frame
        return {"answers_explain_queries": check_metrics.mean_rmi(scores, settings.checks.min_mean_rmi)}

    descriptions = {
        "answers_explain_queries": "Mean RMI is above checks.min_mean_rmi. At about 0 the answers are unrelated to "
        "their queries, or the model, its prompt or a token boundary is broken."
    }
    return _of_table("rmi_scores", batch_by_model(settings), descriptions, find)


def _disagreement_scores(settings: Settings) -> dg.AssetChecksDefinition:
    descriptions = {
        "models_differ": "The Spearman correlation of the models' ranks is below checks.max_rank_correlation: "
        "otherwise the second model adds little."
    }
    if settings.ranking.pool == "batch":  # A reference has its own strata, whatever the size of the batch.
        descriptions["strata_are_filled"] = (
            "There are ranking.num_strata strata of at least ranking.min_rows_per_stratum rows."
        )

    if settings.ranking.reference is not None:
        descriptions["is_near_reference"] = (
            "PPL(Q) and RMI of each model are distributed as in ranking.reference: PSI is at most checks.max_psi, and "
            "the Kolmogorov-Smirnov statistic at most checks.max_ks."
        )

    def find(storage: Storage, batch: str) -> Findings:
        frame = storage.tables.read("disagreement_scores", Partition(batch)).frame
        found: Findings = {"models_differ": check_metrics.rank_correlation(frame, settings.checks.max_rank_correlation)}
        if settings.ranking.pool == "batch":
            found["strata_are_filled"] = check_metrics.filled_strata(frame, settings.ranking)
        if settings.ranking.reference is not None:
            found["is_near_reference"] = _drift(storage, batch, settings.ranking.reference.name, settings)
        return found

    return _of_table("disagreement_scores", BATCHES, descriptions, find)


def _drift(storage: Storage, batch: str, name: str, settings: Settings) -> Finding:
    if not storage.tables.has(NAME, Partition(name)):
        return Finding(False, f"The reference {name} is not made yet: the drift from it is not known.")
    frozen = storage.tables.read(NAME, Partition(name))
    scores = {role: storage.tables.read("rmi_scores", Partition(batch, role)) for role in sorted(settings.models)}
    if differing := differently_scored(frozen.provenance["scored_by"], scores):
        return Finding(False, f"The models {differing} are not those of the reference {name}: nothing can be compared.")
    found = drift.drift({role: table.frame for role, table in scores.items()}, frozen.frame)
    return check_metrics.drift(found.statistics, found.evidence, settings.checks)


def _calibration(settings: Settings) -> dg.AssetChecksDefinition:
    def find(storage: Storage, batch: str) -> Findings:
        calibration = storage.tables.read("calibration", Partition(batch))
        gate = gates.of_provenance(storage.tables.footer("planted_rows", Partition(batch)).provenance)
        if gate is not None:
            return {"models_can_tell": Finding(True, f"The batch is gated, and not calibrated: {gate.sentence}.")}
        found = check_metrics.discrimination(calibration.frame, settings.checks.min_auc)
        return {"models_can_tell": found}

    descriptions = {
        "models_can_tell": "Each model's RMI separates pairs from the same queries with another answer, with an AUROC "
        "of at least checks.min_auc. Also shown: its AUROC for every defect."
    }
    return _of_table("calibration", BATCHES, descriptions, find)


def _decisions() -> dg.AssetChecksDefinition:
    def find(storage: Storage, batch: str) -> Findings:
        decisions = storage.tables.read("decisions", Partition(batch))
        gate = gates.of_provenance(decisions.provenance)
        return {
            "every_row_is_decided": check_metrics.decided_rows(
                storage.tables.footer("raw_data", Partition(batch)).num_rows, decisions.frame
            ),
            "passes_gates": check_metrics.ungated(gate.sentence if gate else None),
            "same_models_as_published": _same_models(storage, decisions.provenance["models"]),
        }

    descriptions = {
        "every_row_is_decided": "Every row of raw_data has one decision. Also shown: the selected share.",
        "passes_gates": "The batch is fit to be published.",
        "same_models_as_published": "The models and their settings are those of the newest published version.",
    }
    return _of_table("decisions", BATCHES, descriptions, find)


def _same_models(storage: Storage, models: Mapping[str, Mapping[str, Any]]) -> Finding | StorageError:
    try:
        newest = versions.latest(storage)
        manifest = None if newest is None else versions.read_manifest(storage, newest.version)
    except StorageError as error:
        return error
    return check_metrics.same_models(models, manifest)


def _curated_dataset() -> dg.AssetChecksDefinition:
    descriptions = {
        "every_batch_is_in_it": "No registered batch is left out of the newest version.",
        "files_are_as_published": "The files of the newest version have the sha256 of its manifest.",
    }

    @dg.multi_asset_check(name="curated_dataset_checks", specs=_specs("curated_dataset", None, descriptions))
    def curated_dataset_checks(
        context: dg.AssetCheckExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.AssetCheckResult]:
        registered = context.instance.get_dynamic_partitions(str(BATCHES.name))
        yield from _results(descriptions, lambda: _of_dataset(storage, registered))

    return curated_dataset_checks


def _of_dataset(storage: Storage, registered: Sequence[str]) -> Findings:
    newest = versions.find_version(storage, "latest")
    manifest = versions.read_manifest(storage, newest.version)
    entered = {entry["batch"] for entry in manifest["batches"]}
    since = "registered or completed since; publish again"
    reasons = {batch: None if batch in entered else newest.excluded_batches.get(batch, since) for batch in registered}
    hashes: dict[str, str | None] = {}
    num_bytes = 0
    for name in manifest["files"]:
        parts = versions.place(newest.version, name)
        data = storage.files.read_bytes(*parts) if storage.files.exists(*parts) else None
        hashes[name] = None if data is None else hashlib.sha256(data).hexdigest()
        num_bytes += len(data or b"")
    return {
        "every_batch_is_in_it": check_metrics.left_out(reasons),
        "files_are_as_published": check_metrics.matching_files(manifest["files"], hashes, num_bytes),
    }


def _of_table(
    asset: str,
    partitions_def: dg.PartitionsDefinition,
    descriptions: Mapping[str, str],
    find: Callable[..., Findings],
) -> dg.AssetChecksDefinition:
    """The checks of a table; `find` takes the storage, the batch, and the model where the table has one."""

    @dg.multi_asset_check(name=f"{asset}_checks", specs=_specs(asset, partitions_def, descriptions))
    def checks(
        context: dg.AssetCheckExecutionContext, storage: dg.ResourceParam[Storage]
    ) -> Iterator[dg.AssetCheckResult]:
        partition = Partition.parse(context.op_execution_context.partition_key).parts
        yield from _results(descriptions, lambda: find(storage, *partition), *partition[1:])

    return checks


def _specs(
    asset: str, partitions_def: dg.PartitionsDefinition | None, descriptions: Mapping[str, str]
) -> list[dg.AssetCheckSpec]:
    with warnings.catch_warnings():
        # Partitioned checks are a preview API since 1.13: https://github.com/dagster-io/dagster/pull/32894
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(name, asset=asset, description=description, partitions_def=partitions_def)
            for name, description in descriptions.items()
        ]


def _results(names: Iterable[str], find: Callable[[], Findings], *model: str) -> Iterator[dg.AssetCheckResult]:
    """The results of checks. Numbers of a model end with its name, because the UI plots each name as one line."""
    try:
        findings = find()
    except StorageError as error:
        findings = dict.fromkeys(names, error)
    for name, finding in findings.items():
        yield _result(name, finding, model)


def _result(name: str, finding: Finding | StorageError, model: Sequence[str]) -> dg.AssetCheckResult:
    if isinstance(finding, StorageError):
        return dg.AssetCheckResult(
            passed=False,
            check_name=name,
            severity=dg.AssetCheckSeverity.ERROR,
            description=f"The check cannot be made: {finding}.",
        )
    return dg.AssetCheckResult(
        passed=finding.passed,
        check_name=name,
        severity=dg.AssetCheckSeverity.WARN,
        description=finding.sentence,
        metadata={"_".join((number, *model)): _readable(value) for number, value in finding.numbers.items()},
    )


def _readable(number: Any) -> Any:
    """A fraction with four significant digits; other values unchanged."""
    return float(f"{number:.4g}") if isinstance(number, float) else number
