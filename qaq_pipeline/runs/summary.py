"""Summarise a batch after its run, from its stored tables and the metadata of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaq_pipeline.ingest import records
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.runs.run_results import Results
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.selection.decisions import by_reason
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY, VALIDITY_KEY


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
    """The decisions on a batch, and the work of its run. Rows by decision add up to the rows in."""

    batch: str
    rows_in: int
    rows_by_decision: dict[str, int]
    reasons_by_decision: dict[str, dict[str, int]]
    published: str
    pool_size: int
    selected_by_selection: dict[str, int]
    untold: list[str]
    """What the signals could not tell: to be read first."""
    invalid_pairs: dict[str, int]
    """Pairs declared invalid, by signal; empty: no pair was judged."""
    valid_pairs: int | None
    """Pairs that no signal declares invalid; None: no pair was judged."""
    models: list[ModelSummary]
    warnings: list[str]
    dataset_url: str
    is_new_version: bool
    tables: dict[str, str]
    pages: dict[str, str]
    """URLs of the audit pages, by name."""

    @property
    def scored(self) -> int:
        """Quantities scored in this run, over all models."""
        return sum(model.scored for model in self.models)

    @property
    def cached(self) -> int:
        """Quantities that the cache had, over all models."""
        return sum(model.cached for model in self.models)


def summarise(deployment: Deployment, batch: str, results: Results, unpassed: Sequence[str]) -> BatchSummary:
    """The summary of a batch, from its stored tables, the metadata of its runs and the checks that did not pass.

    Raises:
        RunError: it has not one decision for each of its rows, or it was left out of the published dataset.
    """
    settings, storage, partition = deployment.settings, deployment.storage, Partition(batch)
    stored = storage.tables.read("decisions", partition)
    judged = stored.provenance.get(VALIDITY_KEY, {})
    num_rows = storage.tables.footer("raw_data", partition).num_rows
    if stored.num_rows != num_rows:
        raise RunError(
            f"batch {batch} has {num_rows} delivered rows but {stored.num_rows} decisions: report this fault"
        )
    reasons: dict[str, dict[str, int]] = {decision.value: {} for decision in vocabularies.Decision}
    for decision, reason, count in by_reason([stored.select("decision", "reason")]).iter_rows():
        reasons[decision][reason] = count
    published, decided = results["curated_dataset", None], results["decisions", partition]
    return BatchSummary(
        batch=batch,
        rows_in=num_rows,
        rows_by_decision={decision: sum(counts.values()) for decision, counts in reasons.items()},
        reasons_by_decision=reasons,
        published=settings.published.name,
        pool_size=decided["pool_size"],
        selected_by_selection=dict(decided["selected_by_selection"]),
        untold=list(judged.get("warnings", [])),
        invalid_pairs=dict(judged.get("invalid_pairs", {})),
        valid_pairs=judged.get("valid_pairs"),
        models=[_model_summary(role, settings.models[role].frame, batch, results) for role in sorted(settings.models)],
        warnings=[
            *records.not_read(storage.tables.footer("raw_data", partition).provenance),
            *results["disagreement_scores", partition]["warnings"],
            *_unreached(settings.published.name, decided.get(UNREACHED_KEY, {})),
            *unpassed,
            *_exclusions(batch, published),
        ],
        dataset_url=storage.files.url(*versions.place(published["version"])),
        is_new_version=published["is_new_version"],
        tables={name: storage.tables.url(name, partition) for name in ("decisions", "selected_subset")},
        pages={
            name: storage.files.url(*parts)
            for name, parts in {
                "Report of the batch": page_store.batch_page(batch),
                "Report of the version": versions.page_place(published["version"]),
            }.items()
            if storage.files.exists(*parts)
        },
    )


def _unreached(published: str, not_reached: Mapping[str, str]) -> list[str]:
    return [f"{published} {not_reached[published]}"] if published in not_reached else []


def _exclusions(batch: str, published: Mapping[str, Any]) -> list[str]:
    excluded = published["excluded_batches"]
    if batch in excluded:
        raise RunError(f"batch {batch} was left out of the published dataset: {excluded[batch]}")
    return [f"batch {name} is not in the published dataset: {reason}" for name, reason in excluded.items()]


def _model_summary(role: str, frame: str, batch: str, results: Results) -> ModelSummary:
    scoring, scores = (results[name, Partition(batch, role)] for name in ("logprobs", "rmi_scores"))
    return ModelSummary(
        role=role,
        model=scoring["model"],
        dtype=scoring["dtype"],
        frame=frame,
        scored=scoring["quantities_scored"],
        cached=scoring["quantities_from_cache"],
        truncated=scoring["truncated_answers"],
        tokens=scoring["tokens"],
        seconds=scoring["seconds"],
        medians={name.removeprefix("median_"): value for name, value in scores.items() if name.startswith("median_")},
    )
