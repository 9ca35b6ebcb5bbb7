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
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, Quantity

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
    sources: tuple[Column, ...]
    """Empty if the column comes from the delivery (raw_data), the settings or the partition."""


UNDERIVED = "no source column: from the delivery, the settings or the partition"
"""The text for a column without sources."""


def _of(table: str, *columns: str) -> tuple[Column, ...]:
    return tuple((table, column) for column in columns)


def _merged(*sources: tuple[Column, ...]) -> tuple[Column, ...]:
    return tuple(dict.fromkeys(column for part in sources for column in part))


def _same(table: str, *columns: str) -> dict[str, tuple[Column, ...]]:
    return {column: _of(table, column) for column in columns}


_TEXT = _of("raw_data", "query", "answer")
_CONTENT = _of("raw_data", "system", "query", "answer")
_SIGNED = (*_of("signatures", *ROW_KEY, "content_hash", "bands"), *_TEXT)
"""The columns that are used to find duplicates and benchmark tasks."""


def raw_data() -> dict[str, Sources]:
    """Return no sources: no column of raw_data is derived from another table."""
    return dict.fromkeys(tables.RawData.columns(), ())


def signatures() -> dict[str, Sources]:
    """Return the sources of the hashes of accepted rows."""
    accepted = _of("raw_data", "status")
    key = {column: _merged(_of("raw_data", column), accepted) for column in ROW_KEY}
    return key | {"pair_id": _of("raw_data", "pair_id"), "content_hash": _CONTENT, "bands": _CONTENT}


def screened_data() -> dict[str, Sources]:
    """Return the sources of the verdicts of screening."""
    verdict = _merged(_of("raw_data", "status"), _SIGNED)
    reason = _merged(verdict, _of("raw_data", "reason"))
    return {
        **_same("raw_data", *ROW_KEY, "pair_id"),
        "status": verdict,
        "reason": reason,
        "duplicate_of": _SIGNED,
        "similarity": _SIGNED,
        "evidence": _merged(_SIGNED, _of("raw_data", "detail")),
        "batch_gate": reason,
    }


def logprobs() -> dict[str, Sources]:
    """Return the sources of the sums. Each depends on all texts of the pair, because all must fit into the window."""
    scored = {f"{column}_{quantity}": _CONTENT for quantity in Quantity for column in ("sum_nll", "null_reason")}
    return scored | {
        "pair_id": _merged(_of("raw_data", "pair_id"), _of("screened_data", "status", "batch_gate")),
        "num_q_tokens": _of("raw_data", "query"),
        "num_a_tokens": _CONTENT,
        "num_a_tokens_untruncated": _of("raw_data", "answer"),
        "is_truncated": _CONTENT,
    }


def rmi_scores() -> dict[str, Sources]:
    """Return the sources of log PPL(X), a sum divided by a count, and of RMI and IFD, which are null if a sum is."""
    log_ppl = {quantity: _of("logprobs", f"sum_nll_{quantity}", quantity.tokens_column) for quantity in Quantity}
    rmi, ifd = (_score(log_ppl, QUANTITIES_OF[score]) for score in ("rmi", "ifd"))
    counts = ("num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated", "is_truncated")
    return {
        **_same("logprobs", "pair_id", *counts),
        **{f"log_ppl_{quantity}": sources for quantity, sources in log_ppl.items()},
        "rmi": rmi,
        "null_reason_rmi": rmi,
        "ifd_ppl": ifd,
        "ifd_loss": ifd,
        "null_reason_ifd": ifd,
        "is_short_query": _of("logprobs", "num_q_tokens"),
    }


def _score(log_ppl: Mapping[Quantity, tuple[Column, ...]], parts: Iterable[Quantity]) -> tuple[Column, ...]:
    reasons = _of("logprobs", *(f"null_reason_{part}" for part in parts), "num_q_tokens")
    return _merged(*(log_ppl[part] for part in parts), reasons)


_BINNED = _of("rmi_scores", "pair_id", "log_ppl_q", "rmi")
"""The sources of strata: pairs with an RMI, in the order of (log PPL(Q), pair_id)."""
_EDGES = _of("rank_reference", "pair_id", "model", "stratum_log_ppl_q", "stratum", "num_strata")
_RANK = _merged(_BINNED, _EDGES, _of("rank_reference", "rmi", "rank"))


def rank_reference() -> dict[str, Sources]:
    """Return the sources of a frozen pool."""
    return {
        **{column: _of("rmi_scores", column) for column in tables.RmiScores.columns()},
        "model": (),
        "stratum_log_ppl_q": _of("rmi_scores", "log_ppl_q", "rmi"),
        "stratum": _BINNED,
        "num_strata": _of("rmi_scores", "rmi"),
        "rank": _BINNED,
    }


def disagreement_scores() -> dict[str, Sources]:
    """Return the sources of strata, ranks and gaps."""
    return {
        "pair_id": _of("rmi_scores", "pair_id"),
        "pool_id": (),
        "gap": _RANK,
        "rank_sum": _RANK,
        "null_reason": _of("rmi_scores", "null_reason_rmi"),
        "ranks": _RANK,
    }


def decisions() -> dict[str, Sources]:
    """Return the sources of decisions and their reasons."""
    fields = [name for name in tables.MODEL_SCORE.inner if name in tables.RmiScores.columns()]
    reasons = ("null_reason_rmi", "null_reason_ifd")
    numbers = (*fields, *reasons, "num_a_tokens_untruncated")
    verdict = _merged(
        _of("disagreement_scores", "pair_id", "gap", "rank_sum", "ranks"),
        _of("rmi_scores", *numbers),
        _of("rank_reference", *tables.RankReference.columns()),
        _of("screened_data", "batch_gate"),
    )
    scores = _merged(_of("rmi_scores", *fields, *reasons), _of("disagreement_scores", "ranks"))
    decision = _merged(_of("screened_data", "status"), verdict)
    reason = _merged(decision, _of("screened_data", "reason"))
    words = _merged(_of("screened_data", "duplicate_of", "evidence"), _of("raw_data", "detail"))
    return {
        **_same("screened_data", *ROW_KEY, "pair_id", "duplicate_of", "similarity", "evidence"),
        "decision": decision,
        "reason": reason,
        "explanation": _merged(reason, words, scores, _of("disagreement_scores", "pool_id")),
        **_same("disagreement_scores", "gap", "rank_sum"),
        "scores": scores,
        "verdicts": _merged(_of("screened_data", "status"), verdict),
        "provenance_id": (),
    }


def selected_subset() -> dict[str, Sources]:
    """Return the sources of the published rows."""
    taken = _of("decisions", "verdicts")
    copied = ("pair_id", "system", "query", "answer", "source", "language")
    key = {column: _merged(_of("raw_data", column), taken) for column in ROW_KEY}
    return key | {"position": taken} | _same("raw_data", *copied)


def planted_rows() -> dict[str, Sources]:
    """Return the sources of planted rows: the texts of pairs that both models rank, from each stratum in turn."""
    made = _merged(
        _of("raw_data", *ROW_KEY, "pair_id", "language"),
        _CONTENT,
        _of("screened_data", "status", "batch_gate"),
        _of("rmi_scores", "rmi"),
        _of("disagreement_scores", "pair_id", "gap", "ranks"),
    )
    return dict.fromkeys(tables.PlantedRows.columns(), made)


def planted_scores() -> dict[str, Sources]:
    """Return the sources of the scores of planted rows."""
    texts = _of("planted_rows", "system", "query", "answer")
    return dict.fromkeys(tables.PlantedScores.columns(), texts) | {"pair_id": _of("planted_rows", "pair_id")}


def calibration() -> dict[str, Sources]:
    """Return the sources of a calibration. The settings decide its keys; each value depends on all scores compared."""
    judged = _merged(
        _of("planted_rows", "pair_id", "defect", "original_pair_id"),
        _of("planted_scores", *tables.PlantedScores.columns()),
        _of("rmi_scores", *tables.RmiScores.columns()),
        _of("disagreement_scores", "pair_id", "gap", "rank_sum", "ranks"),
        _of("rank_reference", *tables.RankReference.columns()),
    )
    keys = tables.Calibration.primary_key()
    return {column: () if column in keys else judged for column in tables.Calibration.columns()}


EXPORTED: dict[str, tuple[str, ...]] = {
    "messages": ("system", "query", "answer"),
    "prompt": ("system", "query"),
    "completion": ("answer",),
    "conversations": ("system", "query", "answer"),
    "instruction": ("query",),
    "input": (),
    "output": ("answer",),
    "system": ("system",),
    "meta": (*ROW_KEY, "pair_id", "source", "language"),
}
"""Source columns of each field of an exported record, in any format; `input` is always empty."""


def of_records(file: str, fields: Iterable[str], table: str) -> list[Derivation]:
    """Return the fields of a file's records; `table` is selected_subset, or raw_data for another selection."""
    record = _of("raw_data", "record")
    return [
        Derivation(file, field, _merged(_of(table, *EXPORTED[field]), record if field == "meta" else ()))
        for field in fields
    ]


def of_scores(file: str, columns: Iterable[str]) -> list[Derivation]:
    """Return the columns of a scores Parquet: those of decisions, one per score and model, and `field:selection`."""
    decided = tables.Decisions.columns()
    return [
        Derivation(
            file,
            column,
            _of("decisions", column if column in decided else "verdicts" if ":" in column else "scores"),
        )
        for column in columns
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
