"""Of every column of every stored table and exported file, the columns that it is derived from: back to raw_data, and
so to the delivery.

Belongs here: what the code of the assets makes of what, declared once, and the walk through it. Does not belong here:
the columns themselves (`schema`), and which files a version was made from (`lineage`).

A source is a column whose values enter the derived value, or decide it. What only decides which rows a table has stands
with the table's key. All sources that some settings make one are named: with ranks in the pool of the batch nothing
comes from rank_reference, and of the scores a verdict reads those of its strategy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Quantity

Column = tuple[str, str]
"""A stored table, and a column of it."""
Sources = tuple[Column, ...]
ColumnSources = Mapping[str, Mapping[str, Sources]]
"""Sources by table and column, tables in the order in which they are made."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """A column, and what it is derived from."""

    table: str
    column: str
    sources: tuple[Column, ...]
    """None: it is of the delivery (raw_data), of the settings, or of the partition."""


UNDERIVED = "of no column: of the delivery, the settings or the partition"
"""What is said of a column without sources."""


def _of(table: str, *columns: str) -> tuple[Column, ...]:
    return tuple((table, column) for column in columns)


def _merged(*sources: tuple[Column, ...]) -> tuple[Column, ...]:
    return tuple(dict.fromkeys(column for part in sources for column in part))


def _same(table: str, *columns: str) -> dict[str, tuple[Column, ...]]:
    return {column: _of(table, column) for column in columns}


_TEXT = _of("raw_data", "query", "answer")
_CONTENT = _of("raw_data", "system", "query", "answer")
_SIGNED = (*_of("signatures", *ROW_KEY, "content_hash", "bands"), *_TEXT)
"""What duplicates and benchmark tasks are found by."""


def raw_data() -> dict[str, Sources]:
    """No column of raw_data is derived from another table."""
    return dict.fromkeys(tables.RawData.columns(), ())


def signatures() -> dict[str, Sources]:
    """Of accepted rows."""
    accepted = _of("raw_data", "status")
    key = {column: _merged(_of("raw_data", column), accepted) for column in ROW_KEY}
    return key | {"pair_id": _of("raw_data", "pair_id"), "content_hash": _CONTENT, "bands": _CONTENT}


def screened_data() -> dict[str, Sources]:
    """Sources of the verdicts of screening."""
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
    """Of distinct accepted pairs. Whether the window holds a pair is a matter of all its texts, for every quantity."""
    scored = {f"{column}_{quantity}": _CONTENT for quantity in Quantity for column in ("sum_nll", "null_reason")}
    return scored | {
        "pair_id": _merged(_of("raw_data", "pair_id"), _of("screened_data", "status", "batch_gate")),
        "num_q_tokens": _of("raw_data", "query"),
        "num_a_tokens": _CONTENT,
        "num_a_tokens_untruncated": _of("raw_data", "answer"),
        "is_truncated": _CONTENT,
    }


def rmi_scores() -> dict[str, Sources]:
    """Log PPL(X) is a sum over a count; RMI and IFD are null by the reasons of both their sums."""
    tokens = {Quantity.Q: "num_q_tokens", Quantity.Q_GIVEN_A: "num_q_tokens"}
    log_ppl = {
        quantity: _of("logprobs", f"sum_nll_{quantity}", tokens.get(quantity, "num_a_tokens")) for quantity in Quantity
    }
    rmi = _score(log_ppl, Quantity.Q, Quantity.Q_GIVEN_A)
    ifd = _score(log_ppl, Quantity.A, Quantity.A_GIVEN_Q)
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


def _score(log_ppl: Mapping[Quantity, tuple[Column, ...]], *parts: Quantity) -> tuple[Column, ...]:
    reasons = _of("logprobs", *(f"null_reason_{part}" for part in parts), "num_q_tokens")
    return _merged(*(log_ppl[part] for part in parts), reasons)


_BINNED = _of("rmi_scores", "pair_id", "log_ppl_q", "rmi")
"""What strata are made of: pairs with an RMI, in the order of (log PPL(Q), pair_id)."""
_EDGES = _of("rank_reference", "pair_id", "model", "stratum_log_ppl_q", "stratum", "num_strata")
_RANK = _merged(_BINNED, _EDGES, _of("rank_reference", "rmi", "rank"))


def rank_reference() -> dict[str, Sources]:
    """Sources of a frozen pool."""
    return {
        **{column: _of("rmi_scores", column) for column in tables.RmiScores.columns()},
        "model": (),
        "stratum_log_ppl_q": _of("rmi_scores", "log_ppl_q", "rmi"),
        "stratum": _BINNED,
        "num_strata": _of("rmi_scores", "rmi"),
        "rank": _BINNED,
    }


def disagreement_scores() -> dict[str, Sources]:
    """Sources of strata, ranks and gaps."""
    return {
        "pair_id": _of("rmi_scores", "pair_id"),
        "pool_id": (),
        "gap": _RANK,
        "rank_sum": _RANK,
        "null_reason": _of("rmi_scores", "null_reason_rmi"),
        "ranks": _RANK,
    }


def decisions() -> dict[str, Sources]:
    """Sources of decisions and their reasons."""
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
    """Sources of the published rows."""
    taken = _of("decisions", "verdicts")
    copied = ("pair_id", "system", "query", "answer", "source", "language")
    key = {column: _merged(_of("raw_data", column), taken) for column in ROW_KEY}
    return key | {"position": taken} | _same("raw_data", *copied)


def planted_rows() -> dict[str, Sources]:
    """Made of the texts of pairs that both models rank, of every stratum by turns."""
    made = _merged(
        _of("raw_data", *ROW_KEY, "pair_id", "language"),
        _CONTENT,
        _of("screened_data", "status", "batch_gate"),
        _of("rmi_scores", "rmi"),
        _of("disagreement_scores", "pair_id", "gap", "ranks"),
    )
    return dict.fromkeys(tables.PlantedRows.columns(), made)


def planted_scores() -> dict[str, Sources]:
    """Sources of the scores of planted rows."""
    texts = _of("planted_rows", "system", "query", "answer")
    return dict.fromkeys(tables.PlantedScores.columns(), texts) | {"pair_id": _of("planted_rows", "pair_id")}


def calibration() -> dict[str, Sources]:
    """Which numbers there are is a matter of the settings; each is of all that the two sides rest on."""
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
"""Of every field of an exported record, in any format, columns of the row that it is of; `input` is always empty."""


def of_records(file: str, fields: Iterable[str], table: str) -> list[Derivation]:
    """The fields of a file's records, whose rows are of `table`: selected_subset, or raw_data of another selection."""
    record = _of("raw_data", "record")
    return [
        Derivation(file, field, _merged(_of(table, *EXPORTED[field]), record if field == "meta" else ()))
        for field in fields
    ]


def of_scores(file: str, columns: Iterable[str]) -> list[Derivation]:
    """The columns of a scores Parquet: those of the decisions, one a score and model, `field:selection` a verdict."""
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
    """The columns of each table among the sources, in their order."""
    found: dict[str, list[str]] = {}
    for table, column in sources:
        found.setdefault(table, []).append(column)
    return found


def derivations(derived: ColumnSources) -> list[Derivation]:
    """Every column of every stored table, in the order of the schema, as rows to print."""
    return [
        Derivation(table, column, sources) for table, columns in derived.items() for column, sources in columns.items()
    ]


def sources_in(derived: ColumnSources, table: str, inputs: Collection[str]) -> dict[str, Sources]:
    """Sources of each of a table's columns, restricted to the tables that it was made from."""
    return {
        column: tuple(source for source in sources if source[0] in inputs) for column, sources in derived[table].items()
    }


def of_table(derived: ColumnSources, table: str) -> list[Derivation]:
    """The columns of a table.

    Raises:
        ValueError: there is no such table; the text names the tables that there are.
    """
    if table not in derived:
        raise ValueError(f"{table!r} is no table; known: {', '.join(derived)}")
    return [Derivation(table, column, sources) for column, sources in derived[table].items()]


def ancestry(derived: ColumnSources, table: str, column: str) -> list[Derivation]:
    """The column and everything that it is derived from, each once: its own sources first, raw_data last.

    Raises:
        ValueError: there is no such table or column; the text names those that there are.
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
