"""planted_batch: planted rows of other ranks, or scored otherwise than the batch, are refused."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.calibration.planting import scorable_pairs
from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.tables import PlantedRows, RmiScores, dtypes
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.scoring.logprobs import pairs_of
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.tables import StoredTable, empty
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}
SCORED: dict[str, Any] = {"partition": ["b1", "m"], "identity_hash": "0", "scoring": {}}


def batch(planted: dict[str, Any] | None = None, planted_scores: dict[str, Any] | None = None) -> PlantedBatch:
    """A batch with nothing planted; the arguments change what the tables record."""
    frames = {role: rmi_rows({}, {}) for role in ("strong", "weak")}
    rmi = {role: StoredTable(frame, SCORED) for role, frame in frames.items()}
    ranked = StoredTable(disagreement_scores(frames, ONE_STRATUM, "batch:b1")[0], {"partition": ["b1"]})
    inputs = {f"rmi_scores|{role}": table.data_version for role, table in rmi.items()}
    inputs["disagreement_scores"] = ranked.data_version
    rows = StoredTable(empty(PlantedRows), {"partition": ["b1"], "inputs": inputs} | (planted or {}))
    made_of = {**SCORED, "inputs": {"planted_rows": rows.data_version}} | (planted_scores or {})
    return PlantedBatch(rows, {role: StoredTable(empty(RmiScores), made_of) for role in rmi}, rmi, ranked)


def test_tables_that_belong_together_are_inputs_by_name() -> None:
    assert sorted(batch().inputs) == [
        "disagreement_scores",
        "planted_rows",
        "planted_scores|strong",
        "planted_scores|weak",
        "rmi_scores|strong",
        "rmi_scores|weak",
    ]
    assert batch().gate is None


def test_the_verdict_is_the_one_that_the_planted_rows_record() -> None:
    verdict = Gate(GateReason.EMPTY_BATCH, "it has no row")
    planted = batch().planted_rows.provenance | gates.as_provenance(verdict)
    assert batch(planted).gate == verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (({"inputs": {}}, None), "planted_rows of batch b1 was made from another disagreement_scores"),
        ((None, {"inputs": {}}), r"planted_scores\|strong of batch b1 was made from another planted_rows"),
        ((None, {"identity_hash": "1"}), r"were made by other models .* as \['strong', 'weak'\]; materialise logprobs"),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(changes: tuple[Any, Any], message: str) -> None:
    with pytest.raises(OriginError, match=message):
        batch(*changes)


def test_scorable_pairs_are_those_that_are_accepted_and_ranked_by_both_models() -> None:
    raw = raw_rows({"query": "one"}, {"query": "two"}, rejected(), {"pair_id": pair_name(1), "query": "one"})
    scores = {"strong": rmi_rows({}, {}), "weak": rmi_rows({}, UNSCORED)}
    ranked, _ = disagreement_scores(scores, ONE_STRATUM, "batch:b1")
    pairs = scorable_pairs(raw, screen_alone(raw, ScreeningSettings()), ranked)
    assert pairs.select("pair_id", "query", "stratum").rows() == [(pair_name(1), "one", 1)]


def test_planted_rows_are_scored_with_their_texts() -> None:
    texts = {"pair_id": pair_name(1), "query": "q", "answer": "a"}
    planted = pl.DataFrame([texts], schema=dtypes(PlantedRows))
    assert pairs_of(planted) == [Pair(pair_name(1), None, "q", "a")]
