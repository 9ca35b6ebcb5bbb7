"""The source columns of every column of every stored table and exported file, back to raw_data and the delivery.

Belongs here: the sources of each column, declared once, and the functions that follow them. Does not belong here: the
columns themselves (`schema`), and the files from which a version was made (`lineage`).

A source is a column whose values enter or decide the derived value. A column that only decides which rows a table has
is a source of the table's key. The declaration covers all settings, so some sources may be unused: with ranks in the
pool of the batch, nothing comes from rank_reference, and a verdict reads only the scores of its strategy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Quantity

Column = tuple[str, str]
"""A stored table and one of its columns."""
Sources = tuple[Column, ...]
ColumnSources = Mapping[str, Mapping[str, Sources]]
"""Sources by table and column, with the tables in the order of the pipeline."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """A column and its sources."""

    table: str
    column: str
    sources: Sources
    """Empty if the column comes from the delivery (raw_data), the settings or the partition."""


UNDERIVED = "no source column: from the delivery, the settings or the partition"
"""The text for a column without sources."""


def _of(table: str, *columns: str) -> Sources:
    return tuple((table, column) for column in columns)


def _same(table: str, *columns: str) -> dict[str, Sources]:
    return {column: _of(table, column) for column in columns}


_CONTENT = _of("raw_data", "system", "history", "query", "answer")
_FORBIDDEN = _of("raw_data", "system", "query", "answer", "reasoning", "licence", "record")
"""The columns that are searched for what must not be published."""
_SIGNED = _of("signatures", *ROW_KEY, "pair_id", "content_hash", "exact_hash", "query_hash", "bands") + _of(
    "raw_data", *ROW_KEY, "history", "query", "answer", "language"
)
"""The columns that are used to find withdrawn rows, duplicates, clusters and benchmark tasks."""
_SCREENED = _of("raw_data", "status") + _FORBIDDEN + _SIGNED
_SCREENED_FOR = _SCREENED + _of("raw_data", "reason")

_LOG_PPL = {
    f"log_ppl_{one}": _of("logprobs", f"sum_nll_{one}", one.tokens_column) for one in Quantity if one.tokens_column
}
"""A sum divided by a count."""
_RMI = _of("logprobs", "sum_nll_q", "num_q_tokens", "sum_nll_q_given_a", "null_reason_q", "null_reason_q_given_a")
_IFD = _LOG_PPL["log_ppl_a"] + _of(
    "logprobs", "sum_nll_a_given_q", "null_reason_a", "null_reason_a_given_q", "num_q_tokens"
)
"""RMI and IFD are null if a sum is."""

_NUMBERS = _of("rmi_scores", *(name for name in tables.RmiScores.columns() if name != "pair_id"))
_RANKED = _of("disagreement_scores", "pair_id", "gap", "rank_sum", "ranks")
_REFERENCE = _of("rank_reference", *tables.RankReference.columns())
_BINNED = _of("rmi_scores", "pair_id", "log_ppl_q", "rmi")
"""The sources of strata: pairs with an RMI, in the order of (log PPL(Q), pair_id)."""
_RANK = _BINNED + _of("rank_reference", "pair_id", "model", "stratum_log_ppl_q", "stratum", "num_strata", "rmi", "rank")
_SCORES = _NUMBERS + _of("disagreement_scores", "ranks")
_CONDITIONS = _of("raw_data", *ROW_KEY, "pair_id", "query", "source", "language", "record")
"""The columns that conditions, quotas and caps read, and those that match the rows of imported tables."""
_VERDICT = (
    _CONDITIONS
    + _of("screened_data", "status", "cluster")
    + _RANKED
    + _NUMBERS
    + _REFERENCE
    + _of("validity", "pair_id", "invalid_by")
    + _of("screened_data", "batch_gate")
)
_REASON = _VERDICT + _of("screened_data", "reason")
_TAKEN = _of("decisions", "verdicts")
_EVIDENCE = _of("rmi_scores", "pair_id", "log_ppl_q", "rmi", "nll_end", "num_q_tokens") + _of(
    "raw_data", *ROW_KEY, "pair_id", "query", "answer"
)
"""The columns that the signals of validity read."""
_PLANTED_EVIDENCE = (
    _of("planted_rows", "pair_id", "defect", "query", "answer")
    + _of("planted_scores", "pair_id", "log_ppl_q", "rmi", "nll_end", "num_q_tokens")
    + _of("screened_data", "status")
)
_CUT = _EVIDENCE + _PLANTED_EVIDENCE
_OWN_CUTS = _CUT + _of("reference_cuts", *tables.ValidityCuts.columns())
_VALIDITY = _EVIDENCE + _of("screened_data", "status") + _of("validity_cuts", "signal", "cut", "spreads")

_PLANTED = _of("raw_data", *ROW_KEY, "pair_id", "language", "system", "history", "query", "answer") + _of(
    "screened_data", "status", "batch_gate"
)
"""Texts of accepted pairs."""
_JUDGED = (
    _of("raw_data", "pair_id")
    + _of("screened_data", "status")
    + _of("planted_rows", "pair_id", "defect", "original_pair_id")
    + _of("planted_scores", *tables.PlantedScores.columns())
    + _of("rmi_scores", *tables.RmiScores.columns())
    + _RANKED
    + _REFERENCE
    + _of("validity_cuts", "signal", "cut", "spreads")
    + _of("validity", "pair_id", "invalid_by", "signals")
)

SOURCES: ColumnSources = {
    "raw_data": dict.fromkeys(tables.RawData.columns(), ()),
    "signatures": {
        **{column: _of("raw_data", column, "status") for column in ROW_KEY},
        **_same("raw_data", "pair_id"),
        **dict.fromkeys(("content_hash", "exact_hash", "bands"), _CONTENT),
        "query_hash": _of("raw_data", "query"),
    },
    "screened_data": {
        **_same("raw_data", *ROW_KEY, "pair_id"),
        "status": _SCREENED,
        **dict.fromkeys(("reason", "batch_gate"), _SCREENED_FOR),
        **dict.fromkeys(("duplicate_of", "similarity", "cluster"), _SCREENED),
        "evidence": _SCREENED + _of("raw_data", "detail"),
    },
    # Every score depends on all texts of the pair, because all must fit into the window.
    "logprobs": dict.fromkeys(tables.Logprobs.columns(), _CONTENT)
    | {
        "pair_id": _of("raw_data", "pair_id") + _of("screened_data", "status", "batch_gate"),
        "num_q_tokens": _of("raw_data", "query"),
        "num_a_tokens_untruncated": _of("raw_data", "answer"),
    },
    "rmi_scores": {
        **_same("logprobs", "pair_id", "num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated", "is_truncated"),
        **_LOG_PPL,
        **dict.fromkeys(("rmi", "null_reason_rmi"), _RMI),
        **dict.fromkeys(("ifd_ppl", "ifd_loss", "null_reason_ifd"), _IFD),
        "nll_end": _of("logprobs", "sum_nll_end"),
        "null_reason_end": _of("logprobs", "null_reason_end"),
        "is_short_query": _of("logprobs", "num_q_tokens"),
    },
    "reference_cuts": dict.fromkeys(tables.ValidityCuts.columns(), _CUT) | {"signal": (), "chosen_from": ()},
    "rank_reference": {
        **_same("rmi_scores", *tables.RmiScores.columns()),
        "invalid_by": _EVIDENCE + _of("screened_data", "status") + _of("reference_cuts", "signal", "cut", "spreads"),
        "model": (),
        "stratum_log_ppl_q": _of("rmi_scores", "log_ppl_q", "rmi"),
        "num_strata": _of("rmi_scores", "rmi"),
        **dict.fromkeys(("stratum", "rank"), _BINNED),
    },
    "disagreement_scores": {
        **_same("rmi_scores", "pair_id"),
        "pool_id": (),
        **dict.fromkeys(("gap", "rank_sum", "ranks"), _RANK),
        "null_reason": _of("rmi_scores", "null_reason_rmi"),
    },
    "validity_cuts": dict.fromkeys(tables.ValidityCuts.columns(), _OWN_CUTS)
    | {"signal": (), "chosen_from": _of("reference_cuts", "chosen_from")},
    "validity": {
        "pair_id": _of("rmi_scores", "pair_id"),
        **dict.fromkeys(("invalid_by", "signals"), _VALIDITY),
        **dict.fromkeys(("query_in_answer", "answer_in_query"), _of("raw_data", "query", "answer")),
    },
    "decisions": {
        **_same("screened_data", *ROW_KEY, "pair_id", "duplicate_of", "similarity", "evidence"),
        **_same("disagreement_scores", "gap", "rank_sum"),
        **dict.fromkeys(("decision", "verdicts"), _VERDICT),
        "reason": _REASON,
        "explanation": _REASON
        + _of("screened_data", "duplicate_of", "evidence")
        + _of("raw_data", "detail")
        + _of("disagreement_scores", "pool_id")
        + _of("validity", "signals")
        + _of("validity_cuts", *tables.ValidityCuts.columns()),
        "scores": _SCORES,
        "provenance_id": (),
    },
    "selected_subset": {
        **{column: _of("raw_data", column) + _TAKEN for column in ROW_KEY},
        "position": _TAKEN,
        **_same("raw_data", "pair_id", "system", "history", "query", "answer", "reasoning", "source", "language"),
    },
    "planted_rows": dict.fromkeys(tables.PlantedRows.columns(), _PLANTED),
    "planted_scores": dict.fromkeys(
        tables.PlantedScores.columns(), _of("planted_rows", "system", "history", "query", "answer")
    )
    | _same("planted_rows", "pair_id"),
    "calibration": dict.fromkeys(tables.Calibration.columns(), _JUDGED)
    | dict.fromkeys(tables.Calibration.primary_key(), ()),
    "training_trial": {
        **dict.fromkeys(("measure", "arm", "seed"), ()),
        **dict.fromkeys(("item", "num_tokens"), _CONTENT + _of("screened_data", "status")),
        # The cuts are read to check that the validity is of them.
        "nll": _CONTENT + _VERDICT + _of("decisions", "verdicts") + _of("validity_cuts", "cut"),
    },
}
"""Sources of every stored table of the pipeline; the settings decide the keys of a calibration."""


EXPORTED: dict[str, tuple[str, ...]] = {
    "messages": ("system", "history", "query", "reasoning", "answer"),
    "prompt": ("system", "history", "query"),
    "completion": ("reasoning", "answer"),
    "conversations": ("system", "history", "query", "reasoning", "answer"),
    "instruction": ("query",),
    "input": (),
    "output": ("reasoning", "answer"),
    "system": ("system",),
    "meta": (*ROW_KEY, "pair_id", "source", "language"),
    "record": (),
}
"""Source columns of each field of an exported record, in any format; `input` is always empty, and `record` stands for
all fields of a delivered record."""


def of_records(file: str, fields: Iterable[str], table: str) -> list[Derivation]:
    """Return the fields of a file's records; `table` is selected_subset, or raw_data for another selection."""
    records = dict.fromkeys(("meta", "record"), _of("raw_data", "record"))
    return [Derivation(file, field, _of(table, *EXPORTED[field]) + records.get(field, ())) for field in fields]


def of_scores(file: str, columns: Iterable[str]) -> list[Derivation]:
    """Return the columns of a scores Parquet: those of decisions, one per score and model, and `field:selection`."""
    of = {name: name for name in tables.Decisions.columns()}
    return [
        Derivation(file, name, _of("decisions", of.get(name, "verdicts" if ":" in name else "scores")))
        for name in columns
    ]


def by_table(sources: Iterable[Column]) -> dict[str, list[str]]:
    """Group the source columns by table, in their order."""
    found: dict[str, list[str]] = {}
    for table, column in sources:
        found.setdefault(table, []).append(column)
    return found


def derivations(derived: ColumnSources) -> list[Derivation]:
    """Return every column of every stored table, in the order of the schema, as rows to print."""
    return [
        Derivation(table, column, sources) for table, columns in derived.items() for column, sources in columns.items()
    ]


def sources_in(derived: ColumnSources, table: str, inputs: Collection[str]) -> dict[str, Sources]:
    """Return the sources of each column of a table, restricted to the tables in `inputs`."""
    return {
        column: tuple(source for source in sources if source[0] in inputs) for column, sources in derived[table].items()
    }


def of_table(derived: ColumnSources, table: str) -> list[Derivation]:
    """Return the columns of a table.

    Raises:
        ValueError: the table does not exist; the text names those that do.
    """
    if table not in derived:
        raise ValueError(f"{table!r} is no table; known: {', '.join(derived)}")
    return [Derivation(table, column, sources) for column, sources in derived[table].items()]


def ancestry(derived: ColumnSources, table: str, column: str) -> list[Derivation]:
    """Return the column and all its direct and indirect sources, each once: nearest first, raw_data last.

    Raises:
        ValueError: the table or column does not exist; the text names those that do.
    """
    of_table(derived, table)
    if column not in derived[table]:
        raise ValueError(f"{table} has no column {column!r}; it has {', '.join(derived[table])}")
    wanted: set[Column] = {(table, column)}
    found = []
    for derivation in reversed(derivations(derived)):  # A table's sources are declared before it.
        if (derivation.table, derivation.column) in wanted:
            found.append(derivation)
            wanted.update(derivation.sources)
    return found
