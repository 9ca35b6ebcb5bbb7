"""Audit pages: one self-contained HTML file per batch and per published version.

Belongs here: the content of a page and its order, from stored tables to bytes. Does not belong here: counting
(`summaries`), drawing (`plots`), storage (`page_store`) and Dagster: facts of its event log are passed in.

A page is self-contained: no script, no other file, inline plots. Content of rows is always plain text: the templates
of `pages/` escape every value, and invisible characters are shown by code point.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import polars as pl
from markupsafe import Markup

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.ingest import records
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import dataset_card, difference, exports, templates, versions
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.reports import drift, page_rows, plots, summaries
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.schema import column_lineage
from qaq_pipeline.schema.column_lineage import Column, Derivation
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.vocabularies import Decision, GateReason, Signal
from qaq_pipeline.screening import gates
from qaq_pipeline.selection.scored_batch import TABLES_KEY, UNREACHED_KEY, VALIDITY_KEY
from qaq_pipeline.storage.stored_table import StoredTable

_UNKNOWN = "unknown"
_WITHDRAWN = {Decision.WITHDRAWN.value, GateReason.BATCH_WITHDRAWN.value}
"""Decisions, reasons and statuses of rows whose text no page shows. In a gated batch, only the status shows it."""

_IDENTITY = (*dataset_card.IDENTITY, "engine")
_COST = {
    "quantities_scored": "likelihoods scored",
    "quantities_from_cache": "likelihoods from the cache",
    "tokens": "tokens",
    "seconds": "seconds",
    "tokens_per_second": "tokens/s",
    "pairs_per_second": "pairs/s",
    "processes": "processes",
    "share_of_matmul_peak": "share of the matmul peak",
    "batches_halved": "batches halved for memory",
    "device_hours": "device hours",
}
"""Metadata of a scoring's materialisation and what follows from them, and their labels on a page."""

Frozen = tuple[str, pl.DataFrame]
"""Name and rows of a reference."""


@dataclass(frozen=True)
class Scoring:
    """The scores of one model, with their provenance and cost."""

    role: str
    scores: StoredTable
    """Its RmiScores."""
    cost: Mapping[str, Any] | None = None
    """Metadata of the newest materialisation that scored pairs under the same identity; None if unknown."""


@dataclass(frozen=True)
class Made:
    """The run that rendered a page, and when; no hash covers this."""

    at: str
    run_id: str
    code_version: str


@dataclass(frozen=True)
class Table:
    """A table of a page. A cell is a text, a number, or None if unknown or not applicable."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] = ()


@dataclass(frozen=True)
class Example:
    """A row shown as an example."""

    place: str
    """batch/file:row.turn, as in `qaq explain`."""
    decision: str
    reason: str
    explanation: str
    texts: Mapping[str, str]
    numbers: str


@dataclass(frozen=True)
class ColumnLineage:
    """The sources of the columns of a stored table, or of files of one format."""

    title: str
    num_columns: int
    rows: Sequence[tuple[Sequence[str], Mapping[str, Sequence[str]]]]
    """Columns that have the same sources, and those sources by table (empty if there are none)."""
    underived: str
    """The text for a column without source columns."""


def batch_page(
    tables: BatchTables,
    flat: pl.DataFrame,
    scorings: Sequence[Scoring],
    published: Selection,
    frozen: Frozen | None,
    made: Made,
    examples: int,
    links: Mapping[str, str | None],
) -> bytes:
    """Render the page of a batch.

    Args:
        tables: tables of the batch.
        flat: their rows, as `page_rows.of_batch`.
        scorings: one per model, by role.
        published: the selection that made the decisions.
        frozen: name and RankReference to measure drift against; None if there is none.
        made: the run that renders the page, and when.
        examples: the most examples of each kind.
        links: `calibration`, from this page to its calibration page, or None if it is not calibrated; `rows`, the
            address of its rows in the row browser, or None.
    """
    raw, decided = tables["raw_data"], tables["decisions"]
    pairs = summaries.pairs(flat)
    page = _of_rows(flat, pairs, published) | {
        "title": f"Batch {tables.batch}",
        "verdict": _verdict_on_batch(flat, decided.provenance.get(VALIDITY_KEY), published),
        "batch": tables.batch,
        "gate": gates.of_provenance(decided.provenance),
        "warnings": _warnings(decided.provenance, published),
        "validity": _validity(decided.provenance.get(VALIDITY_KEY)),
        "signals": decided.provenance.get(VALIDITY_KEY, {}).get("signals", []),
        "made": made,
        "files": _files(raw.select("source_file"), raw.provenance["files"]),
        "not_read": records.not_read(raw.provenance),
        "models": _models(scorings),
        "cost": _cost(scorings),
        "made_of": _made_of(tables),
        "calibration": links["calibration"],
        "rows": links["rows"],
        "drift": _drift(partial(_drift_of_batch, scorings), frozen),
        "drift_plots": [] if frozen is None else _drift_plots(pairs, frozen[1]),
        "examples": _examples(flat, pairs, tables, examples),
        "columns": [
            _lineage(table, column_lineage.of_table(PIPELINE.column_sources, table), column_lineage.UNDERIVED)
            for table in PIPELINE.column_sources
        ],
    }
    page["selection_plots"] += [
        plots.kept(f"kept_{of}", summaries.kept_by(flat, of), of) for of in ("language", "source")
    ]
    return render("batch.html", page)


def version_page(
    version: str,
    manifest: Mapping[str, Any],
    flat: pl.DataFrame,
    columns: Sequence[str],
    published: Selection,
    neighbours: Mapping[str, Any],
    frozen: Frozen | None,
    made: Made,
) -> bytes:
    """Render the page of a published version.

    Args:
        version: hash of the manifest.
        manifest: manifest of the version.
        flat: its rows, as `page_rows.of_version`.
        columns: names of the columns of its scores.
        published: the selection recorded in the manifest.
        neighbours: its `name`; `rows`, the address of its rows in the row browser; the `previous` version, as its
            `version`, its `name` and the link to its `page` or None, or None; `difference` to it as Difference or
            None; `excluded` batches with the reasons; `pages` of batches by name, as links from this page; what is
            said `of_trial`, its training trial, and the link `trial` to its page, or None; `sizes`, the bytes of each
            of its files, by the name in the manifest.
        frozen: name and RankReference to measure drift against; None if there is none.
        made: the run that renders the page, and when.
    """
    pairs = summaries.pairs(flat)
    is_one_pool = len({entry["pool"] for entry in manifest["batches"]}) == 1
    page = _of_rows(flat, pairs, published, has_strata=is_one_pool) | {
        "title": neighbours["name"].capitalize(),
        "verdict": _verdict_on_version(flat, manifest, published, neighbours),
        "version": version,
        "made": made,
        "batches": _batches(manifest["batches"]),
        "pages": neighbours["pages"],
        "excluded": Table("Batches left out", ("batch", "reason"), sorted(neighbours["excluded"].items())),
        "rows": neighbours["rows"],
        "previous": neighbours["previous"],
        "of_trial": neighbours["of_trial"],
        "trial": neighbours["trial"],
        "difference": _difference(neighbours["difference"]),
        "models": _models_of(manifest["batches"]),
        "drift": _drift(partial(_drift_by_batch, pairs), frozen),
        "files": Table(
            "Exported files",
            ("file", "sha256", "bytes"),
            [(name, sha256, neighbours["sizes"].get(name)) for name, sha256 in sorted(manifest["files"].items())],
        ),
        "columns": _exported_columns(manifest, columns, published.name),
    }
    page["outcome_plots"].append(plots.kept("kept_batch", summaries.kept_by(flat, "batch", most=40), "batch"))
    return render("version.html", page)


def _of_rows(
    flat: pl.DataFrame, pairs: pl.DataFrame, published: Selection, *, has_strata: bool = True
) -> dict[str, Any]:
    """Return what both pages say of their rows; strata are drawn only if all pairs were ranked in the same ones."""
    reasons = summaries.by_reason(flat)
    selection_plots = [plots.overlap(summaries.overlap(flat))]
    if has_strata and "strong" in summaries.roles(flat.columns):
        strata = summaries.strata(pairs, "strong")
        selection_plots.append(plots.kept("kept_stratum", strata, "stratum of PPL(Q)", "stratum"))
    return {
        "published": published.name,
        "num_rows": flat.height,
        "num_selected": summaries.num_selected(flat),
        "num_pairs": pairs.height,
        "outcome": Table(
            "Rows by decision and reason",
            ("decision", "reason", "rows", "share"),
            [(decision, reason, n, _share(n, flat.height)) for decision, reason, n in reasons.iter_rows()],
            ("all", "", flat.height, _share(flat.height, flat.height)),
        ),
        "outcome_plots": [plots.flow(summaries.flow(flat)), plots.by_reason(reasons)],
        "recipe": _recipe(published),
        "selections": Table(
            "Selections and controls",
            ("selection", "kind", "rows", "answer tokens", "shared with published", "share of its rows"),
            [(*size, _share(size[-1], size[2])) for size in summaries.sizes(flat, published.name)],
        ),
        "selection_plots": selection_plots,
        "score_plots": _score_plots(pairs, has_strata=has_strata),
        "limits": dataset_card.limits(published),
    }


def _score_plots(pairs: pl.DataFrame, *, has_strata: bool) -> list[Plot]:
    grid = summaries.rank_grid(pairs)
    of_models = [
        plots.density(summaries.density(pairs, role), _strata_with_edges(pairs, role, has_strata=has_strata), role)
        for role in summaries.roles(pairs.columns)
    ]
    return [*of_models, plots.ranks(grid), plots.ranks(grid, is_selected=True), *_length_plots(pairs)]


def _strata_with_edges(pairs: pl.DataFrame, role: str, *, has_strata: bool) -> pl.DataFrame:
    """Return the strata of a model; none if the pairs have no common ones, or if they come from another model."""
    strata = summaries.strata(pairs, role)
    return strata if has_strata and summaries.has_edges(strata) else strata.clear()


def _length_plots(pairs: pl.DataFrame) -> list[Plot]:
    """Plot the lengths of queries and answers: selected pairs, all pairs, and the random control."""
    lengths = {"query": "num_q_tokens_strong", "answer": "num_a_tokens_strong"}
    return [
        plots.lengths(f"{what}_tokens", *summaries.lengths(summaries.groups_of_lengths(pairs, column)), what)
        for what, column in lengths.items()
    ]


def batch_overview(flat: pl.DataFrame) -> list[Plot]:
    """Return the plots of a batch that the UI shows."""
    pairs = summaries.pairs(flat)
    return [
        plots.flow(summaries.flow(flat)),
        plots.overlap(summaries.overlap(flat)),
        plots.ranks(summaries.rank_grid(pairs), is_selected=True),
        *_length_plots(pairs),
    ]


def dataset_overview(flat: pl.DataFrame) -> list[Plot]:
    """Return the plots of a version that the UI shows."""
    return [plots.flow(summaries.flow(flat)), plots.kept("kept_batch", summaries.kept_by(flat, "batch"), "batch")]


def rank_plot(disagreement: pl.DataFrame) -> Plot:
    """Plot the ranks of both models in DisagreementScores."""
    return plots.ranks(summaries.rank_grid(to_columns(disagreement, "ranks", fields=["rank"])))


def density_without_strata(scores: pl.DataFrame, role: str) -> Plot:
    """Plot RMI over log PPL(Q) from one model's RmiScores, without strata: the pool is not known yet."""
    named = scores.select(pl.col(name).alias(f"{name}_{role}") for name in ("log_ppl_q", "rmi"))
    return plots.density(summaries.density(named, role), pl.DataFrame(), role)


# --- tables ---------------------------------------------------------------------------------------------------------


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _files(raw: pl.DataFrame, files: Mapping[str, str]) -> Table:
    rows = dict(raw.group_by("source_file").len().iter_rows())
    delivered = [(name, sha256, rows.get(name, 0)) for name, sha256 in sorted(files.items())]
    return Table("Delivered files", ("file", "sha256", "rows"), delivered, ("all", "", raw.height))


def _models(scorings: Sequence[Scoring]) -> Table:
    """Build the table of the models, one column per model."""
    facts = [
        facts["identity"]
        | {name: facts[name] for name in ("frame", "identity_hash")}
        | {"scored_with": "; ".join(map(_scorer, facts["scored_with"]))}
        for facts in (one.scores.provenance for one in scorings)
    ]
    names = (*_IDENTITY, "frame", "identity_hash", "scored_with")
    rows = [(name.replace("_", " "), *(of_model[name] for of_model in facts)) for name in names]
    return Table("The models that scored", ("", *(scoring.role for scoring in scorings)), rows)


def _scorer(scorer: Mapping[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(scorer["libraries"].items()))
    return f"{libraries}, on {scorer['device']}"


def _models_of(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Build the table of the models, one row per role and identity, with its batches."""
    head = ("role", *(name.replace("_", " ") for name in _IDENTITY), "batches")
    return Table("The models that scored", head, dataset_card.models(entries, _IDENTITY))


def _cost(scorings: Sequence[Scoring]) -> Table:
    """Build the table of costs, one column per model; facts missing from the event log are unknown."""
    known = [{"device_hours": _device_hours(one.cost or {})} | dict(one.cost or {}) for one in scorings]
    rows = [(label, *(cost.get(name, _UNKNOWN) for cost in known)) for name, label in _COST.items()]
    return Table("Throughput and cost of scoring", ("", *(scoring.role for scoring in scorings)), rows)


def _device_hours(cost: Mapping[str, Any]) -> str:
    """Return the sum of the seconds of all processes in hours; a process is one GPU or a share of the CPU."""
    if "seconds" not in cost or "processes" not in cost:
        return _UNKNOWN
    return f"{cost['seconds'] * cost['processes'] / 3600:.4f}"


def _verdict_on_batch(flat: pl.DataFrame, judged: Mapping[str, Any] | None, published: Selection) -> str:
    """Return what became of a batch, in one or two sentences."""
    taken = summaries.num_selected(flat)
    said = f"{taken:,} of its {flat.height:,} rows are selected by {published.name}."
    if judged is None:
        return said
    invalid: Mapping[str, int] = judged["invalid_pairs"]
    num_invalid = sum(invalid.values())
    if not num_invalid + judged["valid_pairs"]:
        return said
    most = max(invalid, key=lambda name: invalid[name], default=None)
    why = f", most often by the signal {most} ({invalid[most]:,})" if most is not None and num_invalid else ""
    return f"{said} Of {num_invalid + judged['valid_pairs']:,} distinct pairs, {num_invalid:,} are invalid{why}."


def _verdict_on_version(
    flat: pl.DataFrame, manifest: Mapping[str, Any], published: Selection, neighbours: Mapping[str, Any]
) -> str:
    """Return what a version has, and what changed since the previous one, in one or two sentences."""
    taken, batches = summaries.num_selected(flat), len(manifest["batches"])
    of = "1 batch" if batches == 1 else f"{batches:,} batches"
    said = f"{taken:,} of {flat.height:,} rows of {of} are published by {published.name}."
    if neighbours["difference"] is None:
        return said
    is_added: pl.Series = neighbours["difference"]["is_added"]
    entered, left = is_added.sum(), (~is_added).sum()
    return f"{said} Since {neighbours['previous']['name']}, {entered:,} rows entered and {left:,} left."


def _warnings(provenance: Mapping[str, Any], published: Selection) -> list[str]:
    """Return what a reader must know first: what the signals could not tell, and a budget that was not reached."""
    unreached = provenance.get(UNREACHED_KEY, {})
    of_budget = [f"{name} {said}" for name, said in unreached.items() if name == published.name]
    return [*provenance.get(VALIDITY_KEY, {}).get("warnings", []), *of_budget]


def _validity(judged: Mapping[str, Any] | None) -> Table | None:
    if judged is None:
        return None
    invalid = judged["invalid_pairs"]
    counts = {"valid": judged["valid_pairs"]} | {f"invalid: {one.value}": invalid[one.value] for one in Signal}
    total = sum(counts.values())
    rows = [(name, number, _share(number, total)) for name, number in counts.items()]
    return Table("Distinct pairs by validity", ("", "pairs", "share"), rows, ("all", total, _share(total, total)))


def _made_of(tables: BatchTables) -> Table:
    decided, screened = tables["decisions"], tables["screened_data"].provenance
    imported = decided.provenance.get(TABLES_KEY, {})
    facts = [
        ("provenance id of the decisions", decided.provenance_id),
        ("pool of the ranks", decided.provenance["pool_id"]),
        ("settings hash of all selections", decided.provenance["settings_hash"]),
        ("settings hash of the published selection", decided.provenance["published_hash"]),
        ("settings hash of the ranks", decided.provenance["ranking_hash"]),
        *((f"data version of {name}", table.data_version) for name, table in tables.tables.items()),
        *((f"input version of {name}", version) for name, version in sorted(decided.provenance["inputs"].items())),
        *((f"benchmark {name}, sha256", sha256) for name, sha256 in sorted(screened["benchmarks"].items())),
        *((f"imported table {name}, sha256", sha256) for name, sha256 in sorted(imported.items())),
        ("older batches compared for duplicates", ", ".join(sorted(screened["compared_with"])) or "none"),
    ]
    return Table("Provenance of the decisions", ("", "value"), facts)


def _recipe(published: Selection) -> Table:
    values = published.model_dump(mode="json", exclude_none=True)
    return Table(
        inspect.getdoc(type(published)) or "",
        ("setting", "value"),
        [(name, _setting(value)) for name, value in values.items()],
    )


def _setting(value: Any) -> str:
    """Format a setting's value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"({value[0]:g}, {value[1]:g}]" if isinstance(value, list) else str(value)


def _batches(entries: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (
            e["batch"],
            e["rows_in"],
            e["rows_selected"],
            _share(e["rows_selected"], e["rows_in"]),
            e["pool"],
            e["provenance_id"],
        )
        for e in entries
    ]
    rows_in, selected = (sum(entry[name] for entry in entries) for name in ("rows_in", "rows_selected"))
    head = ("batch", "rows in", "selected", "share", "pool of the ranks", "provenance id")
    return Table("Batches of this version", head, rows, ("all", rows_in, selected, _share(selected, rows_in), "", ""))


def _difference(found: pl.DataFrame | None) -> Table | None:
    if found is None:
        return None
    rows = difference.count_changes(found)
    return Table("Rows that entered and left", ("", "reason", "rows"), rows, ("all", "", found.height))


def _drift(tabulate: Callable[[str, pl.DataFrame], Table], frozen: Frozen | None) -> Table | str:
    """Tabulate PSI and Kolmogorov-Smirnov against the reference, or return the reason why they are unknown."""
    if frozen is None:
        return "The drift is unknown: no reference is configured (ranking.reference), or it is not built yet."
    try:
        return tabulate(*frozen)
    except ValueError as error:
        return f"The drift from the reference {frozen[0]} is unknown: {error}."


def _drift_of_batch(scorings: Sequence[Scoring], name: str, reference: pl.DataFrame) -> Table:
    of_batch = {scoring.role: scoring.scores.select(*drift.QUANTITIES) for scoring in scorings}
    found = drift.drift(of_batch, reference).statistics
    if not found:
        raise ValueError("no pair of the batch has an RMI")
    rows = [(statistic.replace("_", " "), value) for statistic, value in found.items()]
    return Table(f"Drift from the reference {name} (0: no drift)", ("statistic", "value"), rows)


def _drift_by_batch(pairs: pl.DataFrame, name: str, reference: pl.DataFrame) -> Table:
    columns = {role: {q: f"{q}_{role}" for q in drift.QUANTITIES} for role in summaries.roles(pairs.columns)}
    numbers = pairs.select("batch", *(name for of_role in columns.values() for name in of_role.values()))
    found = {
        batch: drift.drift({role: rows.select(**of_role) for role, of_role in columns.items()}, reference).statistics
        for (batch,), rows in numbers.partition_by("batch", as_dict=True, maintain_order=True).items()
    }
    names = list(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    head = ("batch", *(statistic.replace("_", " ") for statistic in names))
    rows = [(batch, *(one.get(statistic) for statistic in names)) for batch, one in found.items()]
    return Table(f"Drift from the reference {name}, by batch (0: no drift)", head, rows)


# --- columns --------------------------------------------------------------------------------------------------------


def _exported_columns(manifest: Mapping[str, Any], of_scores: Sequence[str], published: str) -> list[ColumnLineage]:
    """Return the lineage of every exported file of rows; files of one format and source table are grouped."""
    files: dict[tuple[str, str], dict[str, None]] = {}
    for name in sorted(manifest["files"]):
        selection, _, path = name.partition("/")
        if (written := exports.format_of(path)) is not None:
            rows = "selected_subset" if selection == published else "raw_data"
            files.setdefault((rows, written), {})[f"{selection}/{exports.WRITTEN[written].path}"] = None
    records = [
        _lineage(
            title := ", ".join(names),
            column_lineage.of_records(title, exports.columns(written, has_meta=manifest["export"]["meta"]).names, rows),
            "no source column: always empty",
        )
        for (rows, written), names in sorted(files.items(), key=lambda one: one[0][0], reverse=True)
    ]
    scores = versions.scores_name("*")
    return [*records, _lineage(scores, column_lineage.of_scores(scores, of_scores), column_lineage.UNDERIVED)]


def _lineage(title: str, rows: Sequence[Derivation], underived: str) -> ColumnLineage:
    alike: dict[tuple[Column, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(row.sources, []).append(row.column)
    made_of = [(columns, column_lineage.by_table(sources)) for sources, columns in alike.items()]
    return ColumnLineage(title, len(rows), made_of, underived)


# --- plots ----------------------------------------------------------------------------------------------------------


def _drift_plots(pairs: pl.DataFrame, reference: pl.DataFrame) -> list[Plot]:
    frozen = {
        role: reference.filter(pl.col("rmi").is_not_null(), model=role) for role in summaries.roles(pairs.columns)
    }
    return [
        plots.drift(
            said, role, summaries.spread({"batch": pairs[f"{quantity}_{role}"], "reference": of_role[quantity]})
        )
        for role, of_role in frozen.items()
        for said, quantity in (("log PPL(Q)", "log_ppl_q"), ("RMI", "rmi"))
    ]


# --- examples -------------------------------------------------------------------------------------------------------


def _examples(flat: pl.DataFrame, pairs: pl.DataFrame, tables: BatchTables, most: int) -> dict[str, list[Example]]:
    """Return groups of examples by title."""
    groups = summaries.tails(pairs, "strong", most) | summaries.of_each_reason(flat, most)
    found = page_rows.of_examples(tables, set(itertools.chain.from_iterable(groups.values())))
    return {title[0].upper() + title[1:]: [_example(found[row]) for row in rows] for title, rows in groups.items()}


def _example(row: Mapping[str, Any]) -> Example:
    texts = {name: row[name] for name in ("query", "answer") if row[name] is not None} or {"record": row["record"]}
    is_withdrawn = _WITHDRAWN & {row["decision"], row["reason"], row["status"]}
    numbers = [
        f"{one['model']}: RMI {one['rmi']:.3f} nats/token, rank {one['rank']:.3f} in stratum {one['stratum']}"
        for one in sorted(row["scores"], key=lambda one: one["model"])
        if one["rank"] is not None
    ]
    return Example(
        place=row["place"],
        decision=row["decision"],
        reason=row["reason"],
        explanation=row["explanation"],
        texts={} if is_withdrawn else texts,
        numbers="; ".join(numbers),
    )


# --- the page -------------------------------------------------------------------------------------------------------


def render(template: str, page: Mapping[str, Any]) -> bytes:
    """Render a template of `pages/` with text, numbers, `Table`s, `Plot`s and `Example`s."""
    return templates.render(
        template, page, {"picture": _picture, "numbers": _numbers, "shared": _shared}, finalize=_shown
    )


def _shown(value: Any) -> Any:
    """Format a value for a page: numbers with commas, and invisible characters by code point."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return value if isinstance(value, Markup) else summaries.visible(str(value))


def _shared(examples: Sequence[Example]) -> str:
    """Return the sentences with which the explanations of several examples begin: a page shows them once."""
    if len(examples) < 2:
        return ""
    sentences = zip(*(re.split(r"(?<=\. )", one.explanation) for one in examples), strict=False)
    return "".join(first for first, *others in itertools.takewhile(lambda said: len(set(said)) == 1, sentences))


def _picture(plot: Plot) -> Markup:
    """Render the plot as SVG, in which content of rows is already escaped."""
    return Markup(plots.svg(plot))  # noqa: S704


def _numbers(plot: Plot) -> Table:
    """Return the numbers of a plot as a table."""
    head = [name.replace("_", " ") for name in plot.table.columns]
    return Table(f"Numbers of the plot: {plot.title}", head, plot.table.rows())
