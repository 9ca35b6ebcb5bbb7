"""planted_batch: planted rows of other ranks, or scored otherwise than the batch, are refused."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.config.settings import GateSettings, ScreeningSettings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.tables import PlantedRows, RmiScores, dtypes
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.scoring.logprobs import accepted_rows, pairs_of
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.tables import StoredTable, empty
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}
SCREENED = {"raw_data": "1", "screened_data": "2"}
SCORED: dict[str, Any] = {"partition": ["b1", "m"], "identity_hash": "0", "scoring": {}, "scored_from": SCREENED}
SCORED |= {"min_scorable_share": None}
LIMITS = GateSettings(min_scorable_share=None)


def batch(
    planted: dict[str, Any] | None = None,
    planted_scores: dict[str, Any] | None = None,
    ranked: dict[str, Any] | None = None,
    scores: dict[str, Any] | None = None,
    *,
    is_scored: bool = True,
    rows: pl.DataFrame | None = None,
) -> PlantedBatch:
    """A batch with nothing planted; the dictionaries change what the tables record."""
    row = {} if is_scored else UNSCORED
    frames = {role: rmi_rows(row, row) for role in ("strong", "weak")}
    rmi = {role: StoredTable(frame, SCORED | (scores or {})) for role, frame in frames.items()}
    of_scores = {f"rmi_scores|{role}": table.data_version for role, table in rmi.items()}
    made_of = {"partition": ["b1"], "inputs": of_scores} | (ranked or {})
    ranks = StoredTable(disagreement_scores(frames, ONE_STRATUM, "batch:b1")[0], made_of)
    texts = empty(PlantedRows) if rows is None else rows
    drawn = StoredTable(texts, {"partition": ["b1"], "inputs": SCREENED} | (planted or {}))
    made_of = {**SCORED, "inputs": {"planted_rows": drawn.data_version}} | (planted_scores or {})
    return PlantedBatch(drawn, {role: StoredTable(empty(RmiScores), made_of) for role in rmi}, rmi, ranks)


def test_tables_that_belong_together_are_inputs_by_name() -> None:
    assert sorted(batch().inputs) == [
        "disagreement_scores",
        "planted_rows",
        "planted_scores|strong",
        "planted_scores|weak",
        "rmi_scores|strong",
        "rmi_scores|weak",
    ]
    assert batch().gate(LIMITS) is None


def test_the_verdict_is_that_of_the_screening_before_those_of_the_scores() -> None:
    before, after = Gate(GateReason.EMPTY_BATCH, "it has no row"), Gate(GateReason.TOO_FEW_SCORABLE, "none is scored")
    gated = batch(gates.as_provenance(before), scores=gates.as_provenance(after))
    assert gated.gate(LIMITS) == before
    assert batch(scores=gates.as_provenance(after)).gate(LIMITS) == after


def test_a_verdict_by_another_limit_is_refused() -> None:
    with pytest.raises(gates.StaleVerdictError, match="materialise rmi_scores of this batch first"):
        batch().gate(GateSettings(min_scorable_share=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ({"inputs": {**SCREENED, "screened_data": "3"}},),
            r"planted_rows of batch b1 were not drawn from the rows that rmi_scores\|strong, rmi_scores\|weak scored",
        ),
        ((None, None, {"inputs": {}}), r"disagreement_scores of batch b1 was made from another rmi_scores\|strong"),
        ((None, {"inputs": {}}), r"planted_scores\|strong of batch b1 was made from another planted_rows"),
        ((None, {"identity_hash": "1"}), r"were made by other models .* as \['strong', 'weak'\]; materialise logprobs"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(changes: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OriginError, match=message):
        batch(*changes)


def test_where_no_pair_is_ranked_nothing_is_judged() -> None:
    planted = pl.DataFrame([{"pair_id": pair_name(9), "query": "q", "answer": "a"}], schema=dtypes(PlantedRows))
    assert batch(is_scored=False, rows=planted).judge(ONE_STRATUM, [], None) is None


def test_rows_are_planted_among_the_distinct_accepted_ones() -> None:
    raw = raw_rows({"query": "one"}, {"query": "two"}, rejected(), {"pair_id": pair_name(1), "query": "one"})
    pairs = accepted_rows(raw, screen_alone(raw, ScreeningSettings()))
    assert pairs.select("pair_id", "query").rows() == [(pair_name(1), "one"), (pair_name(2), "two")]


def test_planted_rows_are_scored_with_their_texts() -> None:
    texts = {"pair_id": pair_name(1), "query": "q", "answer": "a"}
    planted = pl.DataFrame([texts], schema=dtypes(PlantedRows))
    assert pairs_of(planted) == [Pair(pair_name(1), None, "q", "a")]
