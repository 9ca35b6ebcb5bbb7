"""planted_batch: ranks or validity of other scores are refused, and a gated or unranked batch is not judged."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.config.settings import GateSettings, ValiditySettings
from qaq_pipeline.schema.tables import PlantedRows, ValidityCuts, dtypes
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.scored_batch import JudgedBatch
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline.validity.planted_sample import PlantedSample
from qaq_pipeline_tests.support.frames import ONE_STRATUM, all_valid, pair_name
from qaq_pipeline_tests.support.planted import planted_sample

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}
LIMITS = GateSettings(min_scorable_share=None)


def batch(
    sample: PlantedSample | None = None,
    *,
    ranked: dict[str, Any] | None = None,
    judged: dict[str, Any] | None = None,
) -> PlantedBatch:
    """A batch whose pairs are all valid; the dictionaries change the provenance of ranks and validity."""
    tables = sample or planted_sample()
    frames = {role: table.frame for role, table in tables.rmi_scores.items()}
    of_scores = {f"rmi_scores|{role}": table.data_version for role, table in tables.rmi_scores.items()}
    made_of = {"partition": ["b1"], "inputs": of_scores} | (ranked or {})
    ranks = StoredTable(disagreement_scores(frames, ONE_STRATUM, "batch:b1")[0], made_of)
    cuts = StoredTable(empty(ValidityCuts), {"partition": ["b1"]})
    made_of = {"partition": ["b1"], "inputs": of_scores | {"validity_cuts": cuts.data_version}} | (judged or {})
    validity = StoredTable(all_valid(frames["strong"]["pair_id"]), made_of)
    return PlantedBatch(tables, ranks, JudgedBatch(cuts, validity))


def test_tables_that_belong_together_are_inputs_by_name() -> None:
    assert sorted(batch().inputs) == [
        "disagreement_scores",
        "planted_rows",
        "planted_scores|strong",
        "planted_scores|weak",
        "raw_data",
        "rmi_scores|strong",
        "rmi_scores|weak",
        "screened_data",
        "validity",
        "validity_cuts",
    ]
    assert batch().gate(LIMITS) is None


def test_the_verdict_is_that_of_the_screening_before_those_of_the_scores() -> None:
    before, after = Gate(GateReason.EMPTY_BATCH, "it has no row"), Gate(GateReason.TOO_FEW_SCORABLE, "none is scored")
    gated = planted_sample(gates.as_provenance(before), scores=gates.as_provenance(after))
    assert batch(gated).gate(LIMITS) == before
    assert batch(planted_sample(scores=gates.as_provenance(after))).gate(LIMITS) == after


def test_a_verdict_by_another_limit_is_refused() -> None:
    with pytest.raises(gates.StaleVerdictError, match="materialise rmi_scores of this batch first"):
        batch().gate(GateSettings(min_scorable_share=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranked": {"inputs": {}}}, r"disagreement_scores of batch b1 was made from another rmi_scores\|strong"),
        (
            {"judged": {"inputs": {}}},
            r"validity of batch b1 was made from another rmi_scores\|strong, rmi_scores\|weak, validity_cuts",
        ),
    ],
)
def test_ranks_and_validity_of_other_scores_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OriginError, match=message):
        batch(**changes)


def test_where_no_pair_is_ranked_nothing_is_judged() -> None:
    planted = pl.DataFrame([{"pair_id": pair_name(9), "query": "q", "answer": "a"}], schema=dtypes(PlantedRows))
    unscored = batch(planted_sample(score=UNSCORED, rows=planted))
    assert unscored.judge(ONE_STRATUM, [], ValiditySettings(), None) is None
