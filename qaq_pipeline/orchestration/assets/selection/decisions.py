"""The asset decisions[batch]: the decision about every row of a batch."""

import dagster as dg
import polars as pl

from qaq_pipeline.config.conditions import tables_named
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import imported_tables
from qaq_pipeline.orchestration.materialisation import footer_before, provenance_of, table_result
from qaq_pipeline.orchestration.metadata import asset, gate_metadata, pictures
from qaq_pipeline.orchestration.run_log import report_gate
from qaq_pipeline.reports import plots
from qaq_pipeline.reports.table_numbers import not_reached, of_decisions, of_imported_tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection import stored_reference
from qaq_pipeline.selection.decisions import DecidedPairs, by_reason, decide
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY, ScoredBatch, read_judged
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty

VERSION = "5"


def build_decisions(settings: Settings) -> dg.AssetsDefinition:
    """decisions[batch]: every input row under every named selection, with its reason."""
    ranking, published = settings.ranking, settings.published
    cut_by = [ranking.reference] if ranking.pool == "reference" else []
    limits = settings.gates.model_dump(include={"min_scorable_share", "must_tell"})
    keyed_by = [table.model_dump(exclude={"path"}) for table in settings.tables_read]

    @asset(settings, VERSION, reads=[settings.selections, limits, *cut_by, *keyed_by])
    def decisions(
        context: dg.AssetExecutionContext,
        storage: dg.ResourceParam[Storage],
        raw_data: StoredTable,
        screened_data: StoredTable,
        rmi_scores: dict[str, StoredTable],
        disagreement_scores: StoredTable,
    ) -> dg.MaterializeResult:
        judged = read_judged(storage, context.partition_key) if settings.is_calibrated else None
        batch = ScoredBatch(raw_data, screened_data, rmi_scores, disagreement_scores, judged)
        frozen = stored_reference.read_pool(storage, ranking)
        stored_reference.require_pool(disagreement_scores, ranking, frozen)
        imported = imported_tables.read_tables(settings.tables_read, tables_named(settings.selections))
        pairs, gate = batch.pairs(settings.selections, imported), batch.gate(settings.gates)
        verdicts = batch.verdicts(pairs, settings.selections, frozen)
        inputs = batch.inputs | stored_reference.as_input(frozen)
        missed = not_reached(settings.selections, verdicts, pairs) if frozen is None and gate is None else {}
        facts = batch.facts(settings.selections, gate, imported) | ({UNREACHED_KEY: missed} if missed else {})
        made_of = provenance_of(context, inputs, **facts)
        made_by = storage.provenance.write(made_of, context.run.run_id)
        decided_pairs = DecidedPairs(pairs, verdicts, published)
        reads_texts = published.valid and batch.judged is not None and gate is None
        with storage.tables.begin("decisions", Partition.parse(context.partition_key)) as writer:
            counted = [empty(Decisions).select("decision", "reason")]
            for rows in batch.rows(*(("query", "answer") if reads_texts else ())):
                why_invalid = batch.why_invalid(rows, decided_pairs) if reads_texts else None
                part = decide(rows, decided_pairs, made_by, gate, why_invalid)
                writer.append(part)
                counted.append(part.select("decision", "reason"))
            reasons = pl.concat(counted)
            _report_gate(context, storage, settings, screened_data, gate)
            metadata = of_decisions(reasons, verdicts, published.name, is_gated=gate is not None) | gate_metadata(gate)
            if imported:
                metadata |= of_imported_tables(
                    imported, raw_data.select(*ROW_KEY, "pair_id"), screened_data.select(*ROW_KEY, "status")
                )
            metadata["rows"] = dg.MetadataValue.url(settings.reports.rows_of_batch(context.partition_key))
            if frozen is None and gate is None:
                metadata[UNREACHED_KEY] = missed
            metadata |= pictures(context, settings, lambda: [plots.by_reason(by_reason([reasons]))])
            return table_result(context, writer, inputs, metadata, **facts)

    return decisions


def _report_gate(
    context: dg.AssetExecutionContext, storage: Storage, settings: Settings, screened: StoredTable, gate: Gate | None
) -> None:
    """Report the verdict on the batch; the asset screened_data has already alerted of its own."""
    before = footer_before(context, storage)
    is_from_screening = gates.of_provenance(screened.provenance) is not None
    is_new = not is_from_screening and gates.is_new(gate, None if before is None else before.provenance)
    report_gate(context, settings.alerts, gate, is_new=is_new)
