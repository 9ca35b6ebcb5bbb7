"""The audit pages: one self-contained HTML file of a batch, and one of a published version.

Belongs here: which facts stand on a page and in which order, from stored tables to bytes. Does not belong here: what is
counted (`summaries`), how it is drawn (`plots`), where a page is stored, and Dagster: what its event log knows comes as
data.

A page asks nobody for anything: no script, no file beside it, its plots are in it. Whatever rows hold is text in it:
the templates of `pages/` escape every value, and characters that cannot be seen are named.
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
"""Characters of a text that stand on a page: 10 examples of 20 reasons stay under 2 MB."""
_UNKNOWN = "unknown"
_WITHDRAWN = {Decision.WITHDRAWN.value, GateReason.BATCH_WITHDRAWN.value}
"""Decisions, reasons and statuses of rows whose text no page shows: in a gated batch only the status says it."""

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
"""Metadata of a scoring's materialisation, and what a page calls it."""


@dataclass(frozen=True)
class Scoring:
    """What made the scores of one model, and what it took."""

    role: str
    provenance: Mapping[str, Any]
    """Of its RmiScores."""
    scores: pl.DataFrame
    """Its RmiScores."""
    cost: Mapping[str, Any] | None = None
    """Metadata of the newest materialisation that scored something under the same identity; None: unknown."""


@dataclass(frozen=True)
class Made:
    """Who made a page, and when: what no hash knows of."""

    at: str
    run_id: str
    code_version: str


@dataclass(frozen=True)
class Table:
    """A table of a page. A cell is a text, a number, or None where nothing is known or nothing applies."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    total: Sequence[Any] = ()


@dataclass(frozen=True)
class Example:
    """A row as a page shows it."""

    place: str
    """batch/file:row.turn, as `qaq explain` takes it."""
    decision: str
    reason: str
    explanation: str
    texts: Mapping[str, str]
    numbers: str


@dataclass(frozen=True)
class Examples:
    """Some rows that have something in common."""

    title: str
    rows: Sequence[Example]


@dataclass(frozen=True)
class Sources:
    """Columns of one file that are made of the same."""

    columns: Sequence[str]
    sources: Mapping[str, Sequence[str]]
    """Columns by table; empty: no source column."""


@dataclass(frozen=True)
class ColumnLineage:
    """What the columns of a stored table, or of files of one form, are made of."""

    title: str
    num_columns: int
    rows: Sequence[Sources]
    underived: str
    """What is said of a column that is made of none."""


def batch_page(
    tables: BatchTables,
    scorings: Sequence[Scoring],
    published: Selection,
    frozen: tuple[str, pl.DataFrame] | None,
    made: Made,
    examples: int = MOST_EXAMPLES,
    calibration: str | None = None,
) -> bytes:
    """The page of a batch.

    Args:
        tables: of the batch.
        scorings: one a model, by role.
        published: the selection that decided.
        frozen: name and RankReference that drift is measured against; None: there is none.
        made: by whom and when.
        examples: at most so many of each kind.
        calibration: where the page of its calibration lies, as a link from this page; None: it is not calibrated.
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
    """The page of a published version.

    Args:
        version: hash of the manifest.
        manifest: of the version.
        flat: its scores.parquet.
        published: the selection, as the manifest has it.
        neighbours: `previous` version or None, `difference` to it as Difference or None, `excluded` batches with the
            reason, `pages` of batches by name, as links from this page.
        sizes: bytes of each of its files, by the name in the manifest.
        frozen: name and RankReference that drift is measured against; None: there is none.
        made: by whom and when.
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
        "files": Table(
            "Exported files",
            ("file", "sha256", "bytes"),
            [(name, sha256, sizes.get(name)) for name, sha256 in sorted(manifest["files"].items())],
        ),
        "limits": dataset_card.limits(published),
        "columns": _exported_columns(manifest, flat, published.name),
    }
    return render("version.html", page)


def with_origin(flat: pl.DataFrame, raw: pl.DataFrame) -> pl.DataFrame:
    """Flat scores with source and language of RawData."""
    return summaries.with_texts(flat, raw, ("source", "language"))


def score_plots(pairs: pl.DataFrame, *, has_strata: bool = True) -> list[Plot]:
    """The plots of scores and ranks of distinct pairs; the strata only where all were ranked in the same ones."""
    grid = summaries.rank_grid(pairs)
    of_models = [
        plots.density(
            summaries.density(pairs, role), _strata_with_edges(pairs, role) if has_strata else pl.DataFrame(), role
        )
        for role in summaries.roles(pairs)
    ]
    return [*of_models, plots.ranks(grid), plots.ranks(grid, is_selected=True), *length_plots(pairs)]


def _strata_with_edges(pairs: pl.DataFrame, role: str) -> pl.DataFrame:
    """The strata of a model; none where they are another's."""
    strata = summaries.strata(pairs, role)
    return strata if summaries.has_edges(strata) else strata.clear()


def length_plots(pairs: pl.DataFrame) -> list[Plot]:
    """Lengths of queries and answers: selected, all, and drawn at random."""
    lengths = {"query": "num_q_tokens_strong", "answer": "num_a_tokens_strong"}
    return [
        plots.lengths(f"{what}_tokens", *summaries.lengths(summaries.groups_of_lengths(pairs, column)), what)
        for what, column in lengths.items()
    ]


def batch_overview(tables: BatchTables) -> list[Plot]:
    """The plots of a batch that the UI shows beside its page."""
    flat = with_origin(flat_scores(tables["decisions"].frame), tables["raw_data"].frame)
    pairs = summaries.pairs(flat)
    return [
        plots.flow(summaries.flow(flat)),
        plots.overlap(summaries.overlap(flat)),
        plots.ranks(summaries.rank_grid(pairs), is_selected=True),
        *length_plots(pairs),
    ]


def dataset_overview(flat: pl.DataFrame) -> list[Plot]:
    """The plots of a version that the UI shows beside its page."""
    return [plots.flow(summaries.flow(flat)), plots.kept("kept_batch", summaries.kept_by(flat, "batch"), "batch")]


def rank_plot(disagreement: pl.DataFrame) -> Plot:
    """The ranks of both models in DisagreementScores."""
    return plots.ranks(summaries.rank_grid(to_columns(disagreement, "ranks", fields=["rank"])))


def density_without_strata(scores: pl.DataFrame, role: str) -> Plot:
    """RMI over log PPL(Q) of one model's RmiScores. Strata belong to a pool, which is known later."""
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
    """One column a model."""
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
    """One row for each role and identity, with its batches."""
    batches: dict[tuple[Any, ...], list[str]] = {}
    for entry in manifest["batches"]:
        for role, identity in entry["models"].items():
            key = (role, *(identity.get(name, _UNKNOWN) for name in _IDENTITY))
            batches.setdefault(key, []).append(entry["batch"])
    rows = [(*key, ", ".join(names)) for key, names in sorted(batches.items(), key=str)]
    return Table("The models that scored", ("role", *(n.replace("_", " ") for n in _IDENTITY), "batches"), rows)


def _cost(scorings: Sequence[Scoring]) -> Table:
    """One column a model; what the event log does not say is unknown."""
    known = [scoring.cost or {} for scoring in scorings]
    rows = [(label, *(cost.get(name, _UNKNOWN) for cost in known)) for name, label in _COST.items()]
    rows.append(("device hours", *(_device_hours(cost) for cost in known)))
    return Table("Throughput and cost of scoring", ("", *(scoring.role for scoring in scorings)), rows)


def _device_hours(cost: Mapping[str, Any]) -> str:
    """Seconds of every process, in hours: a process is a GPU, or a part of the CPU."""
    if "seconds" not in cost or "processes" not in cost:
        return _UNKNOWN
    return f"{cost['seconds'] * cost['processes'] / 3600:.4f}"


def _made_of(tables: BatchTables) -> Table:
    decided, screened = tables["decisions"], tables["screened_data"].provenance
    facts: list[tuple[str, Any]] = [
        ("provenance id of the decisions", decided.provenance_id),
        ("pool of the ranks", decided.provenance.get("pool_id", _UNKNOWN)),
        ("settings hash of the selections", decided.provenance.get("settings_hash", _UNKNOWN)),
        ("settings hash of the published one", decided.provenance.get("published_hash", _UNKNOWN)),
        ("settings hash of the ranks", decided.provenance.get("ranking_hash", _UNKNOWN)),
    ]
    facts += [(f"data version of {name}", table.data_version) for name, table in tables.tables.items()]
    facts += [(f"made of {name}", version) for name, version in sorted(decided.provenance["inputs"].items())]
    facts += [(f"benchmark {name}, sha256", sha256) for name, sha256 in sorted(screened.get("benchmarks", {}).items())]
    older = ", ".join(sorted(screened.get("compared_with", {}))) or "none"
    return Table("What the decisions rest on", ("", "value"), [*facts, ("older batches compared with", older)])


def _recipe(published: Selection) -> Table:
    values = published.model_dump(mode="json", exclude_none=True)
    return Table(
        inspect.getdoc(type(published)) or "",
        ("setting", "value"),
        [(name, _setting(value)) for name, value in values.items()],
    )


def _setting(value: Any) -> str:
    """A setting's value in words."""
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
    return Table("Batches left out, and why", ("batch", "why"), sorted(reasons.items()))


def _difference(found: pl.DataFrame | None) -> Table | None:
    if found is None:
        return None
    counts = found.group_by("is_added", "change").len().sort("is_added", "change", descending=[True, False])
    rows = [("entered" if added else "left", change, n) for added, change, n in counts.iter_rows()]
    return Table("Rows that entered and left", ("", "because", "rows"), rows, ("all", "", found.height))


def _drift(scorings: Sequence[Scoring], frozen: tuple[str, pl.DataFrame] | None) -> Table | str:
    """PSI and Kolmogorov-Smirnov against the reference, or why there are none."""
    if frozen is None:
        return "No reference is configured, or it is not made yet (ranking.reference): the drift is unknown."
    name, rows = frozen
    try:
        found = drift.drift({scoring.role: scoring.scores for scoring in scorings}, rows)
    except ValueError as error:
        return f"The drift from the reference {name} is unknown: {error}."
    if not found.statistics:
        return f"No pair of the batch has an RMI: the drift from the reference {name} is unknown."
    said = [(statistic.replace("_", " "), value) for statistic, value in found.statistics.items()]
    return Table(f"Drift from the reference {name}: 0 is none", ("statistic", "value"), said)


def _drift_by_batch(flat: pl.DataFrame, frozen: tuple[str, pl.DataFrame] | None) -> Table | str:
    roles = summaries.roles(flat)
    if frozen is None or not roles:
        return "No reference is configured, or it is not made yet (ranking.reference): the drift is unknown."
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
    return Table(f"Drift from the reference {name}, by batch: 0 is none", head, said)


# --- columns --------------------------------------------------------------------------------------------------------


def _stored_columns() -> list[ColumnLineage]:
    """Of every stored table, in the order in which they are made."""
    return [
        _lineage(table, column_lineage.of_table(PIPELINE.column_sources, table), column_lineage.UNDERIVED)
        for table in PIPELINE.column_sources
    ]


def _exported_columns(manifest: Mapping[str, Any], flat: pl.DataFrame, published: str) -> list[ColumnLineage]:
    """Of every file or folder of a version that holds rows; those of one format and of like rows are one."""
    has_meta = manifest.get("export", {}).get("meta", False)  # Manifests of format 1 do not say: there was none.
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
    """A page: the template of `pages/`, filled with text, numbers, `Table`s, `Plot`s and `Examples`."""
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
    """A value as a page shows it: numbers with commas, and no character that cannot be seen."""
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
    """The SVG: what rows hold is escaped in it already."""
    return Markup(plots.svg(plot))  # noqa: S704


def _numbers(plot: Plot) -> Table:
    """The numbers of a plot as a table."""
    head = [name.replace("_", " ") for name in plot.table.columns]
    return Table(f"Numbers of the plot: {plot.title}", head, plot.table.rows())
