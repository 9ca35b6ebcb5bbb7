"""A batch of any size as the assets would leave it, from seeded numbers and the pure functions: no model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.config.base import settings_hash
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest.records import ASIDE_KEY, UNREAD_KEY
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.schema.tables import RawData, RmiScores, dtypes
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.decided import decide, selected_rows
from qaq_pipeline_tests.support.frames import IDENTITY, all_valid, pair_name, rejected

LANGUAGES = ["python", "javascript", "java", "c++", "go", "rust", "sql", "bash", None]
SOURCES = ["evol-instruct", "oss-instruct", "self-instruct"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The tables that a page reads, and the RmiScores that they rest on."""

    tables: BatchTables
    scores: dict[str, pl.DataFrame]


def batch(
    settings: Settings, num_rows: int, name: str = "b1", changes: dict[int, dict[str, Any]] | None = None
) -> Batch:
    """Rows of one file, of which a few cannot be read, repeat others, or cannot be scored.

    Args:
        settings: whose selections decide.
        num_rows: delivered.
        name: of the batch.
        changes: columns of RawData by row, from 1.
    """
    rng = np.random.default_rng(0)
    raw = _raw(name, num_rows, rng, changes or {})
    screened = screen_alone(raw, settings.screening)
    pair_ids = screened.filter(pl.col("status") == Status.ACCEPTED.value)["pair_id"].sort()
    scores = _scores(pair_ids, rng)
    disagreement, _ = disagreement_scores(scores, settings.ranking, f"batch:{name}")
    pairs = with_validity(candidates(disagreement, scores), all_valid(pair_ids))
    verdicts = select_all(pairs, settings.selections)
    raw_data = StoredTable(
        raw,
        {
            "files": {"rows.jsonl": "f" * 64},
            "delivery": "d" * 32,
            UNREAD_KEY: {"records": raw.height, "with_field": {}},
            ASIDE_KEY: [],
        },
    )
    screened_data = StoredTable(
        screened,
        {
            "inputs": {},
            "across_batches": False,
            "compared_with": {},
            "withdrawn": {},
            "benchmarks": {"humaneval": "e" * 64},
        },
    )
    made_of = {
        "inputs": {"raw_data": raw_data.data_version, "screened_data": screened_data.data_version},
        "models": {role: dataclasses.asdict(IDENTITY) for role in scores},
        "settings_hash": settings_hash(settings.selections),
        "published_hash": settings_hash(settings.published),
        "pool_id": f"batch:{name}",
        "ranking_hash": settings_hash(settings.ranking.without_pool()),
        "files": raw_data.provenance["files"],
    }
    decided = decide(raw, screened, pairs, verdicts, settings.published, hash_json(made_of))
    decisions = StoredTable(decided, made_of)
    selected = StoredTable(
        selected_rows(settings.published.name, raw, decided),
        {"selection": settings.published.name, "inputs": {}},
    )
    tables = {
        "raw_data": raw_data,
        "screened_data": screened_data,
        "decisions": decisions,
        "selected_subset": selected,
    }
    return Batch(BatchTables(name, tables), scores)


def _raw(name: str, num_rows: int, rng: np.random.Generator, changes: dict[int, dict[str, Any]]) -> pl.DataFrame:
    number = np.arange(1, num_rows + 1)
    # One row in fifty repeats the row before it.
    pair = np.where((number % 50 == 0) & (number > 1), number - 1, number)
    rows = pl.DataFrame({"source_row": number, "pair": pair}).with_columns(
        batch=pl.lit(name),
        source_file=pl.lit("rows.jsonl"),
        turn_index=pl.lit(0, pl.Int64),
        pair_id=pl.Series([pair_name(int(one)) for one in pair], dtype=pl.String),
        system=pl.lit(None, pl.String),
        history=pl.lit(None, dtypes(RawData)["history"]),
        query=pl.format("Write a function that solves task {}.", "pair"),
        answer=pl.format("def solve_{}(values):\n    return sorted(values)[{}]\n", "pair", "pair"),
        reasoning=pl.lit(None, pl.String),
        licence=pl.lit(None, pl.String),
        source=pl.Series(rng.choice(SOURCES, num_rows)),
        language=pl.Series([LANGUAGES[int(i)] for i in rng.integers(0, len(LANGUAGES), num_rows)], dtype=pl.String),
        record=pl.lit("{}"),
        status=pl.lit(Status.ACCEPTED.value),
        reason=pl.lit(None, pl.String),
        detail=pl.lit(None, pl.String),
    )
    all_changes = {int(one): rejected() for one in number if one % 97 == 0} | changes
    for column in dtypes(RawData):
        values = {row: change[column] for row, change in all_changes.items() if column in change}
        if values:
            rows = rows.with_columns(
                pl.col("source_row")
                .replace_strict(values, default=pl.col(column), return_dtype=rows.schema[column])
                .alias(column)
            )
    return rows.select(pl.col(column).cast(dtype) for column, dtype in dtypes(RawData).items())


def _scores(pair_ids: pl.Series, rng: np.random.Generator) -> dict[str, pl.DataFrame]:
    n = len(pair_ids)
    hardness, coherence = rng.gamma(4, 0.35, n) + 0.4, rng.normal(0, 1, n)
    num_q, num_a = (np.maximum(1, rng.lognormal(mean, 0.7, n)).astype(np.int64) for mean in (3.2, 4.6))
    unscored = rng.random(n) < 0.003
    scores = {}
    for role, noise in (("strong", 0.5), ("weak", 0.8)):
        log_ppl_q = np.maximum(0.05, hardness + rng.normal(0, 0.15, n))
        rmi = log_ppl_q * 0.35 + 0.25 * (coherence + rng.normal(0, noise, n))
        values = {
            "pair_id": pair_ids,
            "log_ppl_q": log_ppl_q,
            "log_ppl_q_given_a": np.maximum(0.0, log_ppl_q - rmi),
            "rmi": rmi,
            "null_reason_ifd": ["not_wanted"] * n,
            "null_reason_end": ["not_wanted"] * n,
            "null_reason_rmi": pl.Series(np.where(unscored, "pair_too_long", "")).replace("", None),
            "num_q_tokens": num_q,
            "num_a_tokens": num_a,
            "num_a_tokens_untruncated": num_a,
            "is_truncated": np.zeros(n, bool),
            "is_short_query": num_q < 5,
        }
        frame = pl.DataFrame(values).with_columns(
            pl.when(pl.col("null_reason_rmi").is_null()).then("rmi").alias("rmi"),
            **{column: pl.lit(None) for column in dtypes(RmiScores) if column not in values},
        )
        scores[role] = frame.select(pl.col(column).cast(dtype) for column, dtype in dtypes(RmiScores).items())
    return scores
