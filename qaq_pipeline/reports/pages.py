"""Audit pages: one self-contained HTML file per batch and per published version.

Belongs here: the content of a page and its order, from stored tables to bytes. Does not belong here: counting
(`summaries`), drawing (`plots`), storage (`page_store`) and Dagster: facts of its event log are passed in.

A page is self-contained: no script, no other file, inline plots. Content of rows is always plain text: the templates
of `pages/` escape every value, and invisible characters are shown by code point.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from qaq_pipeline.config.selections import Selection
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import dataset_card, exports
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.reports import drift, plots, summaries
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.schema import column_lineage
from qaq_pipeline.schema.column_lineage import Column, Derivation
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.row_place import ROW_KEY, row_place
from qaq_pipeline.schema.vocabularies import Decision, GateReason
from qaq_pipeline.screening import gates

MOST_EXAMPLES = 10
_CLIPPED = 280
_LONGEST_TEXT = 4_000
"""Characters of a text that a page shows, so that 10 examples of 20 reasons stay under 2 MB."""
_UNKNOWN = "unknown"
_WITHDRAWN = {Decision.WITHDRAWN.value, GateReason.BATCH_WITHDRAWN.value}
"""Decisions, reasons and statuses of rows whose text no page shows. In a gated batch, only the status shows it."""

_IDENTITY = (
    "model",
    "revision",
    "dtype",
    "prior",
    "template_hash",
    "tokenizer_hash",
    "max_tokens",
    "too_long",
    "engine",
)
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
}
"""Metadata of a scoring's materialisation, and their labels on a page."""


@dataclass(frozen=True)
class Scoring:
    """The scores of one model, with their provenance and cost."""

    role: str
    provenance: Mapping[str, Any]
    """Provenance of its RmiScores."""
    scores: pl.DataFrame
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
class Examples:
    """A group of example rows."""

    title: str
    rows: Sequence[Example]


@dataclass(frozen=True)
class Sources:
    """Columns of one file that have the same sources."""

    columns: Sequence[str]
    sources: Mapping[str, Sequence[str]]
    """Source columns by table; empty if there are none."""


@dataclass(frozen=True)
class ColumnLineage:
    """The sources of the columns of a stored table, or of files of one format."""

    title: str
    num_columns: int
    rows: Sequence[Sources]
    underived: str
    """The text for a column without source columns."""


def batch_page(
    tables: BatchTables,
    scorings: Sequence[Scoring],
    published: Selection,
    frozen: tuple[str, pl.DataFrame] | None,
    made: Made,
    examples: int = MOST_EXAMPLES,
    calibration: str | None = None,
) -> bytes:
    """Render the page of a batch.

    Args:
        tables: tables of the batch.
        scorings: one per model, by role.
        published: the selection that made the decisions.
        frozen: name and RankReference to measure drift against; None if there is none.
        made: the run that renders the page, and when.
        examples: the most examples of each kind.
        calibration: link from this page to its calibration page; None if it is not calibrated.
    """
    raw, decided = tables["raw_data"], tables["decisions"]
    flat = with_origin(flat_scores(decided.frame), raw.frame)
    pairs = summaries.pairs(flat)
    gate = gates.of_provenance(decided.provenance)
    page = {
        "title": f"Batch {tables.batch}",
        "batch": tables.batch,
        "gate": gate,
        "published": published.name,
        "num_rows": flat.height,
        "num_selected": flat.filter(_is_selected()).height,
        "num_pairs": pairs.height,
        "made": made,
        "outcome": _outcome(flat),
        "outcome_plots": [plots.flow(summaries.flow(flat)), plots.by_reason(summaries.by_reason(flat))],
        "files": _files(raw.frame, raw.provenance["files"]),
        "models": _models(scorings),
        "cost": _cost(scorings),
        "made_of": _made_of(tables),
        "recipe": _recipe(published),
        "selections": _selections(flat, published),
        "selection_plots": _selection_plots(flat, pairs),
        "score_plots": score_plots(pairs),
        "calibration": calibration,
        "drift": _drift(scorings, frozen),
        "drift_plots": _drift_plots(pairs, frozen),
        "examples": _examples(flat, pairs, tables, examples),
        "limits": dataset_card.limits(published),
        "columns": _stored_columns(),
    }
    return render("batch.html", page)


def version_page(
    version: str,
    manifest: Mapping[str, Any],
    flat: pl.DataFrame,
    published: Selection,
    neighbours: Mapping[str, Any],
    sizes: Mapping[str, int],
    frozen: tuple[str, pl.DataFrame] | None,
    made: Made,
) -> bytes:
    """Render the page of a published version.

    Args:
        version: hash of the manifest.
        manifest: manifest of the version.
        flat: its scores.parquet.
        published: the selection recorded in the manifest.
        neighbours: `previous` version or None, `difference` to it as Difference or None, `excluded` batches with the
            reasons, `pages` of batches by name, as links from this page.
        sizes: bytes of each of its files, by the name in the manifest.
        frozen: name and RankReference to measure drift against; None if there is none.
        made: the run that renders the page, and when.
    """
    pairs = summaries.pairs(flat)
    by_batch = summaries.kept_by(flat, "batch", most=40)
    is_one_pool = len({entry["pool"] for entry in manifest["batches"]}) == 1
    page = {
        "title": f"Version {version}",
        "version": version,
        "published": published.name,
        "num_rows": flat.height,
        "num_selected": flat.filter(_is_selected()).height,
        "num_pairs": pairs.height,
        "made": made,
        "batches": _batches(manifest),
        "pages": neighbours["pages"],
        "excluded": _excluded(neighbours["excluded"]),
        "previous": neighbours["previous"],
        "difference": _difference(neighbours["difference"]),
        "outcome": _outcome(flat),
        "outcome_plots": [
            plots.flow(summaries.flow(flat)),
            plots.by_reason(summaries.by_reason(flat)),
            plots.kept("kept_batch", by_batch, "batch"),
        ],
        "recipe": _recipe(published),
        "selections": _selections(flat, published),
        "selection_plots": [
            plots.overlap(summaries.overlap(flat)),
            *(_kept_by_stratum(pairs) if is_one_pool and "strong" in summaries.roles(flat) else []),
        ],
        "score_plots": score_plots(pairs, has_strata=is_one_pool),
        "models": _models_of(manifest),
        "drift": _drift_by_batch(flat, frozen),
        "files": _exported_files(manifest, sizes),
        "limits": dataset_card.limits(published),
        "columns": _exported_columns(manifest, flat, published.name),
    }
    return render("version.html", page)


def _exported_files(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> Table:
    rows = [(name, sha256, sizes.get(name)) for name, sha256 in sorted(manifest["files"].items())]
    return Table("Exported files", ("file", "sha256", "bytes"), rows)


def with_origin(flat: pl.DataFrame, raw: pl.DataFrame) -> pl.DataFrame:
    """Join source and language of RawData to the flat scores."""
    return summaries.with_texts(flat, raw, ("source", "language"))


def score_plots(pairs: pl.DataFrame, *, has_strata: bool = True) -> list[Plot]:
    """Plot scores and ranks of distinct pairs; strata are drawn only if all pairs were ranked in the same ones."""
    grid = summaries.rank_grid(pairs)
    of_models = [
        plots.density(
            summaries.density(pairs, role), _strata_with_edges(pairs, role) if has_strata else pl.DataFrame(), role
        )
        for role in summaries.roles(pairs)
    ]
    return [*of_models, plots.ranks(grid), plots.ranks(grid, is_selected=True), *length_plots(pairs)]


def _strata_with_edges(pairs: pl.DataFrame, role: str) -> pl.DataFrame:
    """Return the strata of a model; none if they come from another model."""
    strata = summaries.strata(pairs, role)
    return strata if summaries.has_edges(strata) else strata.clear()


def length_plots(pairs: pl.DataFrame) -> list[Plot]:
    """Plot the lengths of queries and answers: selected pairs, all pairs, and the random control."""
    lengths = {"query": "num_q_tokens_strong", "answer": "num_a_tokens_strong"}
    return [
        plots.lengths(f"{what}_tokens", *summaries.lengths(summaries.groups_of_lengths(pairs, column)), what)
        for what, column in lengths.items()
    ]


def batch_overview(tables: BatchTables) -> list[Plot]:
    """Return the plots of a batch that the UI shows."""
    flat = with_origin(flat_scores(tables["decisions"].frame), tables["raw_data"].frame)
    pairs = summaries.pairs(flat)
    return [
        plots.flow(summaries.flow(flat)),
        plots.overlap(summaries.overlap(flat)),
        plots.ranks(summaries.rank_grid(pairs), is_selected=True),
        *length_plots(pairs),
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


def _is_selected() -> pl.Expr:
    return pl.col("decision") == Decision.SELECTED.value


def _outcome(flat: pl.DataFrame) -> Table:
    counts = summaries.by_reason(flat)
    rows = [(decision, reason, n, _share(n, flat.height)) for decision, reason, n in counts.iter_rows()]
    total = ("all", "", sum(row[2] for row in rows), _share(flat.height, flat.height))
    return Table("Rows by decision and reason", ("decision", "reason", "rows", "share"), rows, total)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _files(raw: pl.DataFrame, files: Mapping[str, str]) -> Table:
    rows = dict(raw.group_by("source_file").len().iter_rows())
    delivered = [(name, sha256, rows.get(name, 0)) for name, sha256 in sorted(files.items())]
    return Table(
        "Delivered files", ("file", "sha256", "rows"), delivered, ("all", "", sum(row[2] for row in delivered))
    )


def _models(scorings: Sequence[Scoring]) -> Table:
    """Build the table of the models, one column per model."""
    made_of = [scoring.provenance for scoring in scorings]
    identity = [one.get("identity", {}) for one in made_of]
    rows: list[tuple[Any, ...]] = [
        (name.replace("_", " "), *(one.get(name, _UNKNOWN) for one in identity)) for name in _IDENTITY
    ]
    rows += [
        (name.replace("_", " "), *(one.get(name, _UNKNOWN) for one in made_of))
        for name in ("frame", "device", "identity_hash")
    ]
    libraries = [", ".join(f"{k} {v}" for k, v in one.get("libraries", {}).items()) for one in made_of]
    rows.append(("libraries", *(said or _UNKNOWN for said in libraries)))
    return Table("The models that scored", ("", *(scoring.role for scoring in scorings)), rows)


def _models_of(manifest: Mapping[str, Any]) -> Table:
    """Build the table of the models, one row per role and identity, with its batches."""
    batches: dict[tuple[Any, ...], list[str]] = {}
    for entry in manifest["batches"]:
        for role, identity in entry["models"].items():
            key = (role, *(identity.get(name, _UNKNOWN) for name in _IDENTITY))
            batches.setdefault(key, []).append(entry["batch"])
    rows = [(*key, ", ".join(names)) for key, names in sorted(batches.items(), key=str)]
    return Table("The models that scored", ("role", *(n.replace("_", " ") for n in _IDENTITY), "batches"), rows)


def _cost(scorings: Sequence[Scoring]) -> Table:
    """Build the table of costs, one column per model; facts missing from the event log are unknown."""
    known = [scoring.cost or {} for scoring in scorings]
    rows = [(label, *(cost.get(name, _UNKNOWN) for cost in known)) for name, label in _COST.items()]
    rows.append(("device hours", *(_device_hours(cost) for cost in known)))
    return Table("Throughput and cost of scoring", ("", *(scoring.role for scoring in scorings)), rows)


def _device_hours(cost: Mapping[str, Any]) -> str:
    """Return the sum of the seconds of all processes in hours; a process is one GPU or a share of the CPU."""
    if "seconds" not in cost or "processes" not in cost:
        return _UNKNOWN
    return f"{cost['seconds'] * cost['processes'] / 3600:.4f}"


def _made_of(tables: BatchTables) -> Table:
    decided, screened = tables["decisions"], tables["screened_data"].provenance
    facts: list[tuple[str, Any]] = [
        ("provenance id of the decisions", decided.provenance_id),
        ("pool of the ranks", decided.provenance.get("pool_id", _UNKNOWN)),
        ("settings hash of all selections", decided.provenance.get("settings_hash", _UNKNOWN)),
        ("settings hash of the published selection", decided.provenance.get("published_hash", _UNKNOWN)),
        ("settings hash of the ranks", decided.provenance.get("ranking_hash", _UNKNOWN)),
    ]
    facts += [(f"data version of {name}", table.data_version) for name, table in tables.tables.items()]
    facts += [(f"input version of {name}", version) for name, version in sorted(decided.provenance["inputs"].items())]
    facts += [(f"benchmark {name}, sha256", sha256) for name, sha256 in sorted(screened.get("benchmarks", {}).items())]
    older = ", ".join(sorted(screened.get("compared_with", {}))) or "none"
    return Table(
        "Provenance of the decisions", ("", "value"), [*facts, ("older batches compared for duplicates", older)]
    )


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


def _selections(flat: pl.DataFrame, published: Selection) -> Table:
    found = summaries.sizes(flat, published.name)
    rows = [
        (
            one["selection"],
            "control" if one["is_control"] else "published" if one["is_published"] else "named",
            one["pairs"],
            one["answer_tokens"],
            one["shared"],
            _share(one["shared"], one["pairs"]),
        )
        for one in found.iter_rows(named=True)
    ]
    head = ("selection", "kind", "rows", "answer tokens", "shared with published", "share")
    return Table("Selections and controls", head, rows)


def _batches(manifest: Mapping[str, Any]) -> Table:
    entries = manifest["batches"]
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


def _excluded(reasons: Mapping[str, str]) -> Table:
    return Table("Batches left out", ("batch", "reason"), sorted(reasons.items()))


def _difference(found: pl.DataFrame | None) -> Table | None:
    if found is None:
        return None
    counts = found.group_by("is_added", "change").len().sort("is_added", "change", descending=[True, False])
    rows = [("entered" if added else "left", change, n) for added, change, n in counts.iter_rows()]
    return Table("Rows that entered and left", ("", "reason", "rows"), rows, ("all", "", found.height))


def _drift(scorings: Sequence[Scoring], frozen: tuple[str, pl.DataFrame] | None) -> Table | str:
    """Compute PSI and Kolmogorov-Smirnov against the reference, or return the reason why there are none."""
    if frozen is None:
        return "The drift is unknown: no reference is configured (ranking.reference), or it is not built yet."
    name, rows = frozen
    try:
        found = drift.drift({scoring.role: scoring.scores for scoring in scorings}, rows)
    except ValueError as error:
        return f"The drift from the reference {name} is unknown: {error}."
    if not found.statistics:
        return f"No pair of the batch has an RMI: the drift from the reference {name} is unknown."
    said = [(statistic.replace("_", " "), value) for statistic, value in found.statistics.items()]
    return Table(f"Drift from the reference {name} (0: no drift)", ("statistic", "value"), said)


def _drift_by_batch(flat: pl.DataFrame, frozen: tuple[str, pl.DataFrame] | None) -> Table | str:
    roles = summaries.roles(flat)
    if frozen is None or not roles:
        return "The drift is unknown: no reference is configured (ranking.reference), or it is not built yet."
    name, rows = frozen
    found: dict[str, Mapping[str, float]] = {}
    for (batch,), of_batch in summaries.pairs(flat).partition_by("batch", as_dict=True, maintain_order=True).items():
        columns = {role: {q: f"{q}_{role}" for q in ("log_ppl_q", "rmi")} for role in roles}
        scores = {role: of_batch.select(**of_role) for role, of_role in columns.items()}
        try:
            found[str(batch)] = drift.drift(scores, rows).statistics
        except ValueError as error:
            return f"The drift from the reference {name} is unknown: {error}."
    names = list(dict.fromkeys(statistic for one in found.values() for statistic in one))
    head = ("batch", *(statistic.replace("_", " ") for statistic in names))
    said = [(batch, *(one.get(statistic) for statistic in names)) for batch, one in found.items()]
    return Table(f"Drift from the reference {name}, by batch (0: no drift)", head, said)


# --- columns --------------------------------------------------------------------------------------------------------


def _stored_columns() -> list[ColumnLineage]:
    """Return the lineage of every stored table's columns, in the order of the pipeline."""
    return [
        _lineage(table, column_lineage.of_table(PIPELINE.column_sources, table), column_lineage.UNDERIVED)
        for table in PIPELINE.column_sources
    ]


def _exported_columns(manifest: Mapping[str, Any], flat: pl.DataFrame, published: str) -> list[ColumnLineage]:
    """Return the lineage of every exported file of rows; files of one format and source table are grouped."""
    has_meta = manifest.get("export", {}).get("meta", False)  # Manifests of format 1 have no such key.
    files: dict[tuple[str, str], dict[str, None]] = {}
    for name in sorted(manifest["files"]):
        selection, _, path = name.partition("/")
        if (written := exports.format_of(path)) is not None:
            rows = "selected_subset" if selection == published else "raw_data"
            files.setdefault((rows, written), {})[f"{selection}/{exports.FORMATS[written].path}"] = None
    records = [
        _lineage(
            title := ", ".join(names),
            column_lineage.of_records(title, exports.columns(written, has_meta=has_meta).names, rows),
            "no source column: always empty",
        )
        for (rows, written), names in sorted(files.items(), key=lambda one: one[0][0], reverse=True)
    ]
    scores = "scores.parquet"
    return [*records, _lineage(scores, column_lineage.of_scores(scores, flat.columns), column_lineage.UNDERIVED)]


def _lineage(title: str, rows: Sequence[Derivation], underived: str) -> ColumnLineage:
    alike: dict[tuple[Column, ...], list[str]] = {}
    for row in rows:
        alike.setdefault(row.sources, []).append(row.column)
    made_of = [Sources(columns, column_lineage.by_table(sources)) for sources, columns in alike.items()]
    return ColumnLineage(title, len(rows), made_of, underived)


# --- plots ----------------------------------------------------------------------------------------------------------


def _selection_plots(flat: pl.DataFrame, pairs: pl.DataFrame) -> list[Plot]:
    return [
        plots.overlap(summaries.overlap(flat)),
        *(_kept_by_stratum(pairs) if "strong" in summaries.roles(flat) else []),
        *(plots.kept(f"kept_{of}", summaries.kept_by(flat, of), of) for of in ("language", "source")),
    ]


def _kept_by_stratum(pairs: pl.DataFrame) -> list[Plot]:
    return [plots.kept("kept_stratum", summaries.strata(pairs, "strong"), "stratum of PPL(Q)", "stratum")]


def _drift_plots(pairs: pl.DataFrame, frozen: tuple[str, pl.DataFrame] | None) -> list[Plot]:
    if frozen is None:
        return []
    quantities = {"log PPL(Q)": "log_ppl_q", "RMI": "rmi"}
    return [
        plots.drift(
            said,
            role,
            summaries.spread(
                {"batch": pairs[f"{quantity}_{role}"], "reference": _of_role(frozen[1], role)[quantity]},
            ),
        )
        for role in summaries.roles(pairs)
        for said, quantity in quantities.items()
    ]


def _of_role(frozen: pl.DataFrame, role: str) -> pl.DataFrame:
    return frozen.filter(pl.col("model") == role).drop_nulls("rmi")


# --- examples -------------------------------------------------------------------------------------------------------


def _examples(flat: pl.DataFrame, pairs: pl.DataFrame, tables: BatchTables, most: int) -> list[Examples]:
    groups = summaries.tails(pairs, "strong", most)
    reasons = summaries.of_each_reason(flat, most)
    groups |= {f"{decision}: {reason} ({n:,} rows)": rows for decision, reason, n, rows in reasons}
    texts = ("query", "answer", "record")
    screened = tables["screened_data"].frame.select(*ROW_KEY, "status")
    return [
        Examples(
            title[0].upper() + title[1:],
            [
                _example(row, summaries.roles(flat))
                for row in summaries.with_texts(rows, tables["raw_data"].frame, texts)
                .join(screened, on=ROW_KEY, how="left", maintain_order="left")
                .with_columns(place=row_place())
                .iter_rows(named=True)
            ],
        )
        for title, rows in groups.items()
    ]


def _example(row: Mapping[str, Any], roles: Iterable[str]) -> Example:
    texts = {name: row[name] for name in ("query", "answer") if row[name] is not None} or {"record": row["record"]}
    is_withdrawn = _WITHDRAWN & {row["decision"], row["reason"], row["status"]}
    numbers = [
        f"{role}: RMI {row[f'rmi_{role}']:.3f} nats/token, rank {row[f'rank_{role}']:.3f} in stratum "
        f"{row[f'stratum_{role}']}"
        for role in roles
        if row.get(f"rank_{role}") is not None
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
    """Render a template of `pages/` with text, numbers, `Table`s, `Plot`s and `Examples`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qaq_pipeline", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["picture"] = _picture
    environment.filters["numbers"] = _numbers
    environment.tests["number"] = lambda value: isinstance(value, int | float)
    limits = {"clipped": _CLIPPED, "longest": _LONGEST_TEXT}
    return environment.get_template(template).render(limits_of_text=limits, **page).encode()


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


def _picture(plot: Plot) -> Markup:
    """Render the plot as SVG, in which content of rows is already escaped."""
    return Markup(plots.svg(plot))  # noqa: S704


def _numbers(plot: Plot) -> Table:
    """Return the numbers of a plot as a table."""
    head = [name.replace("_", " ") for name in plot.table.columns]
    return Table(f"Numbers of the plot: {plot.title}", head, plot.table.rows())
