"""Hand-made frames of stored tables, which several test modules share."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import RankingSettings, Settings
from qaq_pipeline.ingest.records import ASIDE_KEY, UNREAD_KEY
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import CachedScores, RawData, RmiScores, Validity, dtypes
from qaq_pipeline.schema.vocabularies import Quantity, RejectReason, Status
from qaq_pipeline.screening import duplicates
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.decisions import selected_rows
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.decided import decide

HOSTILE_NAMES = ["../evil", "a/b", "[x]", "x|y", "", "x" * 300, ".hidden", "a..b", "a\n", "b 1", "~", "-rf"]
"""Names that would leave a folder, be a pattern, break a partition key, or be no name at all."""

IDENTITY = ScoreIdentity(
    model="tiny",
    revision="files:0",
    tokenizer_hash="0",
    template_hash="0",
    prior="null_answer",
    dtype="float32",
    max_tokens=512,
    too_long="truncate_answer",
)


TEXTS = tuple(quantity for quantity in Quantity if quantity is not Quantity.END)
"""The likelihoods of a text: every quantity but the end of the answer."""

ONE_STRATUM = RankingSettings.model_validate({"num_strata": 1, "min_rows_per_stratum": 1})


def pair_name(number: int) -> str:
    """A pair_id that is easy to read."""
    return f"{number:032x}"


def raw_rows(*rows: dict[str, Any], batch: str = "b1") -> pl.DataFrame:
    """RawData: accepted rows 1, 2, 3, … of one file, each a pair of its own, with the given changes."""
    return pl.DataFrame(
        [_raw_row(number, batch, row.get("pair_id")) | row for number, row in enumerate(rows, start=1)],
        schema=dtypes(RawData),
    )


def _raw_row(number: int, batch: str, pair_id: str | None) -> dict[str, Any]:
    pair = int(pair_id, 16) if pair_id else number
    return dict.fromkeys(dtypes(RawData)) | {
        "batch": batch,
        "source_file": "a.jsonl",
        "source_row": number,
        "turn_index": 0,
        "pair_id": pair_name(number),
        "query": f"query {pair}",
        "answer": f"answer {pair}",
        "record": "{}",
        "status": Status.ACCEPTED.value,
    }


def rejected(reason: RejectReason = RejectReason.EMPTY_QUERY, detail: str = "`query` is blank") -> dict[str, Any]:
    """The changes that make a row a rejected one."""
    return {
        "pair_id": None,
        "query": None,
        "answer": None,
        "status": Status.REJECTED.value,
        "reason": reason.value,
        "detail": detail,
    }


RMI_SCORE: dict[str, Any] = {
    "rmi": 0.5,
    "log_ppl_q": 2.0,
    "log_ppl_q_given_a": 1.5,
    "log_ppl_a": 1.0,
    "log_ppl_a_given_q": 0.5,
    "ifd_ppl": 0.6,
    "ifd_loss": 0.5,
    "nll_end": 0.25,
    "num_q_tokens": 7,
    "num_a_tokens": 11,
    "num_a_tokens_untruncated": 11,
    "is_truncated": False,
    "is_short_query": False,
}
"""Scores of a scorable pair under one model: RmiScores without its key."""


def rmi_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """RmiScores of the pairs 1, 2, 3, …, scorable, with the given changes."""
    return pl.DataFrame(
        [RMI_SCORE | {"pair_id": pair_name(number)} | row for number, row in enumerate(rows, start=1)],
        schema=dtypes(RmiScores),
    )


def all_valid(pair_ids: pl.Series) -> pl.DataFrame:
    """Validity of pairs that no signal looks at: every pair is valid."""
    rows = [{"pair_id": name, "query_in_answer": 0.0, "answer_in_query": 0.0, "signals": []} for name in pair_ids]
    return pl.DataFrame(rows, schema=dtypes(Validity))


def cached(*numbers: int, quantity: Quantity = Quantity.Q, sum_nll: float = 1.5) -> pl.DataFrame:
    """CachedScores: one text quantity of some pairs."""
    rows = [
        {"pair_id": pair_name(number), "quantity": quantity.value, "sum_nll": sum_nll, "num_tokens": 3, "end_ids": ""}
        for number in numbers
    ]
    return pl.DataFrame(rows, schema=dtypes(CachedScores))


def store_batch(
    storage: Storage,
    settings: Settings,
    batch: str = "b1",
    queries: tuple[str | dict[str, Any], ...] = ("a", "b", "c", "d"),
    source_file: str = "a.jsonl",
) -> None:
    """The tables of a batch that is published, as the assets leave them: one row a query, and a rejected one.

    A query may be all the changes of its row.
    """
    changes = [*({"query": query} if isinstance(query, str) else query for query in queries), rejected()]
    raw = raw_rows(*(row | {"source_file": source_file} for row in changes), batch=batch).sort(ROW_KEY)
    rmi = {"strong": [0.1 * n for n in range(len(queries))], "weak": [-0.1 * n for n in range(len(queries))]}
    scores = {role: rmi_rows(*({"rmi": value} for value in values)) for role, values in rmi.items()}
    disagreement, _ = disagreement_scores(scores, ONE_STRATUM, f"batch:{batch}")
    pairs = with_validity(candidates(disagreement, scores), all_valid(disagreement["pair_id"]))
    verdicts = select_all(pairs, settings.selections)
    files = {source_file: hashlib.sha256(repr(queries).encode()).hexdigest()}
    raw_data = StoredTable(raw, {"files": files, UNREAD_KEY: {"records": raw.height, "with_field": {}}, ASIDE_KEY: []})
    screened = StoredTable(
        screen_alone(raw, settings.screening),
        {"inputs": {}, "across_batches": False, "compared_with": {}, "withdrawn": {}, "benchmarks": {}},
    )
    made_of = {
        "code_version": "0",
        "files": files,
        "inputs": {"raw_data": raw_data.data_version, "screened_data": screened.data_version},
        "models": {role: dataclasses.asdict(IDENTITY) for role in scores},
        "settings_hash": settings_hash(settings.selections),
        "published_hash": settings_hash(settings.published),
        "pool_id": f"batch:{batch}",
        "ranking_hash": settings_hash(settings.ranking.without_pool()),
    }
    frame = decide(
        raw,
        screened.frame,
        pairs,
        verdicts,
        settings.published,
        storage.provenance.write(made_of, "run"),
    )
    storage.tables.write(raw_data, "raw_data", Partition(batch))
    storage.tables.write(StoredTable(duplicates.signatures(raw)), "signatures", Partition(batch))
    storage.tables.write(screened, "screened_data", Partition(batch))
    storage.tables.write(StoredTable(frame, made_of), "decisions", Partition(batch))
    store_selection(storage, settings, batch)


def store_selection(storage: Storage, settings: Settings, batch: str = "b1") -> None:
    """selected_subset of a batch, as the asset leaves it."""
    raw, decisions = (
        storage.tables.read("raw_data", Partition(batch)),
        storage.tables.read("decisions", Partition(batch)),
    )
    rows = selected_rows(settings.published.name, raw, decisions)
    inputs = {"raw_data": raw.data_version, "decisions": decisions.data_version}
    table = StoredTable(rows, {"selection": settings.published.name, "inputs": inputs})
    storage.tables.write(table, "selected_subset", Partition(batch))
