"""Numbers of each stored table, as shown in the UI with its materialisation. Polars only.

Belongs here: counts, shares and medians of one table. Does not belong here: numbers with a limit (`check_metrics`), and
the summaries of pages and plots (`summaries`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.config.selections import Budget, RmiBandSelection, Selection
from qaq_pipeline.ingest.imported_tables import ImportedTable
from qaq_pipeline.publication.curated_dataset import Publication
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.vocabularies import Quantity, SelectionReason, Status
from qaq_pipeline.scoring.logprobs import ScoringReport
from qaq_pipeline.scoring.runtime import ScoredPairs
from qaq_pipeline.selection.grammar.pair_columns import count_unmatched
from qaq_pipeline.selection.verdicts import limit_of, pool_size
from qaq_pipeline.validity.judgement import count_invalid
from qaq_pipeline.validity.words import of_cuts
from qaq_pipeline.validity.words import warnings as warnings_of_cuts

Numbers = dict[str, Any]


def count_by(values: pl.Series) -> dict[str, int]:
    """Count each value, most frequent first, without nulls."""
    counts = values.drop_nulls().value_counts(name="n").sort("n", values.name, descending=[True, False])
    return dict(counts.iter_rows())


def of_raw_data(raw: pl.DataFrame, files: Mapping[str, str], unread: Mapping[str, int]) -> Numbers:
    """Count the accepted and rejected rows and the unread fields of a delivery, and list the hash of each file.

    Args:
        raw: status and reason of its rows.
        files: sha256 of each file, by name.
        unread: records with each field that nobody reads.
    """
    return {
        "accepted": raw.filter(status=Status.ACCEPTED.value).height,
        "rejected": raw.filter(status=Status.REJECTED.value).height,
        "rejected_by_reason": count_by(raw["reason"]),
        "unread_fields": dict(sorted(unread.items())),
        "files": dict(files),
    }


def of_screened_data(screened: pl.DataFrame, compared_with: Sequence[str], benchmarks: Mapping[str, str]) -> Numbers:
    """Count the rows by status and reason, and list the older batches and the hash of each benchmark."""
    return {
        "rows_by_status": count_by(screened["status"]),
        "rows_by_reason": count_by(screened["reason"]),
        "compared_with_batches": list(compared_with),
        "benchmarks": dict(benchmarks),
    }


def of_scoring(scored: ScoredPairs) -> Numbers:
    """Report the model, work and speed of a scoring."""
    report, identity = scored.report, scored.provenance["identity"]
    num_truncated, reasons = 0, {quantity.value: Counter[str]() for quantity in Quantity}
    for part in scored.rows.parts():
        num_truncated += int(part["is_truncated"].sum())
        for quantity, counts in reasons.items():
            counts.update(count_by(part[f"null_reason_{quantity}"]))
    return {
        **{key: identity[key] for key in ("model", "revision", "dtype", "template_hash")},
        "identity_hash": scored.provenance["identity_hash"],
        "pairs": report.num_pairs,
        "pairs_scored": report.num_scored_pairs,
        "truncated_answers": num_truncated,
        "quantities_scored": report.num_scored_quantities,
        "quantities_from_cache": report.num_cached_quantities,
        "sequences": report.num_sequences,
        "tokens": report.num_tokens,
        "computed_tokens": report.num_computed_tokens,
        "batches_halved": report.num_splits,
        "seconds": round(report.seconds, 2),
        **_speed(report),
        "null_reasons": {
            quantity: dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))
            for quantity, counts in reasons.items()
            if counts
        },
    }


def _speed(report: ScoringReport) -> Numbers:
    speed: Numbers = {}
    if report.tokens_per_second is not None:
        speed = {
            "runner": report.runner,
            "pool": report.pool,
            "processes": len(report.devices),
            "devices": sorted(set(report.devices)),
            "processes_lost": report.num_lost_workers,
            "tokens_per_second": round(report.tokens_per_second, 1),
            "pairs_per_second": round(report.num_scored_pairs / report.seconds, 2),
            "computed_per_real_token": round(report.num_computed_tokens / report.num_tokens, 4),
        }
    if report.estimate is not None and math.isfinite(report.estimate.seconds):
        speed |= {
            "estimated_seconds": round(report.estimate.seconds, 1),
            "teraflop": round(report.estimate.flops / 1e12, 3),
        }
    if report.peak_share is not None:
        speed["share_of_matmul_peak"] = round(report.peak_share, 3)
    return speed


def of_rmi_scores(scores: pl.DataFrame) -> Numbers:
    """Report scorable pairs, null reasons, and the median of each score that has values."""
    names = ("rmi", "log_ppl_q", "log_ppl_q_given_a", "ifd_ppl", "nll_end")
    medians = {f"median_{name}": scores.select(pl.col(name).median().round(4)).item() for name in names}
    return {
        "scorable": scores.height - scores["rmi"].null_count(),
        "short_queries": int(scores["is_short_query"].sum()),
        "null_reasons_rmi": count_by(scores["null_reason_rmi"]),
        "null_reasons_ifd": count_by(scores["null_reason_ifd"]),
        "null_reasons_end": count_by(scores["null_reason_end"]),
        **{name: value for name, value in medians.items() if value is not None},
    }


def of_disagreement_scores(frame: pl.DataFrame, warnings: Sequence[str]) -> Numbers:
    """Report ranked pairs, strata, warnings, and the correlation of the ranks if it is defined."""
    num_ranked, correlation = spearman_of_ranks(frame)
    strata = to_long(frame, "ranks").filter(model="strong")["num_strata"]
    return {
        "ranked_by_both": num_ranked,
        "num_strata": 0 if strata.is_empty() else strata[0],
        "warnings": list(warnings),
        **({} if correlation is None else {"spearman_of_ranks": round(correlation, 4)}),
    }


def spearman_of_ranks(disagreement: pl.DataFrame) -> tuple[int, float | None]:
    """Count the pairs that both models rank, and correlate their ranks; None if the correlation is undefined."""
    by_model = to_long(disagreement, "ranks")
    ranks = pl.DataFrame({role: by_model.filter(model=role)["rank"] for role in ("strong", "weak")}).drop_nulls()
    correlation = ranks.select(pl.corr("strong", "weak", method="spearman")).item()
    return ranks.height, None if correlation is None or math.isnan(correlation) else correlation


def of_rank_reference(frame: pl.DataFrame, name: str, batches: Sequence[str], warnings: Sequence[str]) -> Numbers:
    """Report the batches, pairs and strata of a reference."""
    return {
        "name": name,
        "batches": list(batches),
        "pairs": frame["pair_id"].n_unique(),
        "num_strata": dict(frame.select("model", "num_strata").unique().sort("model").iter_rows()),
        "warnings": list(warnings),
    }


def of_validity_cuts(cuts: pl.DataFrame) -> Numbers:
    """Report what each signal tells, as sentences, and the numbers of its cut."""
    numbers = ("cut", "missed", "defect_share", "dropped", "false_share", "num_planted", "num_pairs", "null_reason")
    of_signal = {
        row["signal"]: {name: row[name] for name in numbers if row[name] is not None}
        for row in cuts.iter_rows(named=True)
    }
    return {"signals": of_cuts(cuts), "warnings": warnings_of_cuts(cuts), "cuts": of_signal}


def of_validity(validity: pl.DataFrame) -> Numbers:
    """Count the valid pairs, and the invalid ones by signal."""
    counts = count_invalid(validity)
    valid = counts.pop(None)
    return {"valid_pairs": valid, "invalid_pairs": {str(signal): count for signal, count in counts.items()}}


def of_decisions(frame: pl.DataFrame, verdicts: pl.DataFrame, published: str, *, is_gated: bool) -> Numbers:
    """Count the rows by decision and reason, and the pairs that each selection takes."""
    sizes = verdicts.filter(pl.col("selection") == published)["pool_size"]
    return {
        "published_selection": published,
        "pool_size": 0 if sizes.is_empty() else int(sizes[0]),
        "rows_by_decision": count_by(frame["decision"]),
        "rows_by_reason": count_by(frame["reason"]),
        "selected_by_selection": {} if is_gated else count_by(verdicts.filter("is_selected")["selection"]),
    }


def of_imported_tables(imported: Mapping[str, ImportedTable], raw: pl.DataFrame, screened: pl.DataFrame) -> Numbers:
    """Count the rows of each imported table, and those that belong to no pair of the batch; nothing without tables."""
    counts = {
        name: {
            "sha256": table.sha256,
            "rows": table.rows.height,
            "rows_of_no_pair": count_unmatched(raw, screened, table),
        }
        for name, table in imported.items()
    }
    return {"imported_tables": counts} if counts else {}


def not_reached(selections: Sequence[Selection], verdicts: pl.DataFrame, pairs: pl.DataFrame) -> dict[str, str]:
    """The selections that take less than their budget, by name, as "takes 40 of at most 68 pairs".

    Args:
        selections: whose budgets are of the batch.
        verdicts: of these selections.
        pairs: the candidates that they judged.
    """
    tokens = pairs.lazy().filter(model="strong").select("pair_id", "answer_tokens").collect()
    found = {}
    for one in selections:
        if not isinstance(one, RmiBandSelection):
            of_selection = verdicts.lazy().filter(pl.col("selection") == one.name)
            verdict = of_selection.select("pair_id", "is_selected", "reason", "pool_size").collect()
            verdict = verdict.join(tokens, on="pair_id", validate="1:1")
            if said := _less_than_budget(verdict, one.budget):
                found[one.name] = said
    return found


def _less_than_budget(verdict: pl.DataFrame, budget: Budget) -> str | None:
    taken, limit = verdict.filter("is_selected"), limit_of(budget, pool_size(verdict))
    if (verdict["reason"] == SelectionReason.BELOW_CUT.value).any():
        return None  # Only so many answers fit into a budget of tokens.
    if limit.answer_tokens is not None:
        used, most, unit = int(taken["answer_tokens"].sum()), limit.answer_tokens, "answer tokens"
    else:
        used, most, unit = taken.height, limit.num_rows or 0, "pairs"
    return f"takes {used:,} of at most {most:,} {unit}" if used < most else None


def of_selected_subset(num_selected: int, num_rows: int, selection: str) -> Numbers:
    """Compute the selected share of all rows."""
    share = {"share_of_rows_in": round(num_selected / num_rows, 4)} if num_rows else {}
    return {"selection": selection, "rows_in": num_rows, **share}


def of_publication(published: Publication, excluded: Mapping[str, str]) -> Numbers:
    """Report batches and rows of a version, and the rows that entered and left since the previous one, by cause."""
    entries = published.manifest["batches"]
    return {
        "version": published.version,
        "is_new_version": published.is_new,
        "dagster/row_count": sum(entry["rows_selected"] for entry in entries),
        "rows_in": sum(entry["rows_in"] for entry in entries),
        "batches": [entry["batch"] for entry in entries],
        "excluded_batches": dict(excluded),
        **_difference(published),
        "lineage": f"qaq lineage {published.version} --verify",
    }


def _difference(published: Publication) -> Numbers:
    found = published.changes
    if found is None:
        return {}
    rows = {way: sum(n for of, _, n in found if of == way) for way in ("entered", "left")}
    return {
        "previous_version": published.previous,
        "rows_entered": rows["entered"],
        "rows_left": rows["left"],
        "changes": {f"{way}: {why}": n for way, why, n in found},
    }
