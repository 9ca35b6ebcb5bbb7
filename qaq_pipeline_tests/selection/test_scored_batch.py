"""scored_batch, stored_reference: tables that do not belong together are refused, with what to materialise."""

from __future__ import annotations

from typing import Any

import pytest

from qaq_pipeline.config.settings import GateSettings, RankingSettings, ScreeningSettings
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.scoring import stored_scores
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection import scored_batch, stored_reference
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.scored_batch import ScoredBatch
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import ONE_STRATUM, raw_rows, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

LIMITS = GateSettings.model_validate({"min_scorable_share": 0.5})
SCORED: dict[str, Any] = {
    "scoring": {"max_tokens": 8},
    "frame": "chat",
    "identity_hash": "0",
    "identity": {},
    "warnings": [],
}


def batch(**changes: Any) -> ScoredBatch:
    """Tables of two rows that belong together, but for the changed ones."""
    raw = raw_rows({}, {})
    raw_data = StoredTable(raw, {"partition": ["b1"]})
    made_of = {"partition": ["b1"], "inputs": {"raw_data": raw_data.data_version}}
    screened = StoredTable(screen_alone(raw, ScreeningSettings()), made_of)
    rows = {"raw_data": raw_data.data_version, "screened_data": screened.data_version}
    provenance = {"partition": ["b1", "m"], "scored_from": rows, gates.LIMIT_KEY: 0.5, **SCORED}
    rmi = {role: StoredTable(rmi_rows({}, {}), provenance) for role in ("strong", "weak")}
    frame, _ = disagreement_scores({role: table.frame for role, table in rmi.items()}, ONE_STRATUM, "batch:b1")
    inputs = {f"rmi_scores|{role}": table.data_version for role, table in rmi.items()}
    ranked = StoredTable(frame, {"partition": ["b1"], "inputs": inputs, "pool_id": "batch:b1", "ranking_hash": "0"})
    tables: dict[str, Any] = {"raw_data": raw_data, "screened_data": screened, "disagreement_scores": ranked}
    tables["rmi_scores"] = rmi
    return ScoredBatch(**tables | changes)


def test_tables_that_belong_together_are_inputs_by_name() -> None:
    names = ["disagreement_scores", "raw_data", "rmi_scores|strong", "rmi_scores|weak", "screened_data"]
    assert sorted(batch().inputs) == names
    assert batch().gate(LIMITS) is None


def with_provenance(table: StoredTable, **changes: Any) -> StoredTable:
    return StoredTable(table.frame, table.provenance | changes)


def test_ranks_of_other_scores_are_refused(check_sentence: Check) -> None:
    ranked = batch().disagreement_scores
    made_of = ranked.provenance["inputs"] | {"rmi_scores|strong": "0"}
    with pytest.raises(OriginError) as error:
        batch(disagreement_scores=with_provenance(ranked, inputs=made_of))
    check_sentence(error.value)


def test_a_screening_of_another_delivery_is_refused(check_sentence: Check) -> None:
    with pytest.raises(OriginError) as error:
        batch(raw_data=StoredTable(raw_rows({}), {"partition": ["b1"]}))
    check_sentence(error.value)


def test_the_verdict_on_a_batch_is_read_from_its_tables() -> None:
    verdict = Gate(GateReason.EMPTY_BATCH, "it has no row")
    screened = with_provenance(batch().screened_data, **gates.as_provenance(verdict))
    assert batch(screened_data=screened).gate(LIMITS) == verdict
    with pytest.raises(gates.StaleVerdictError):
        batch().gate(GateSettings.model_validate({"min_scorable_share": 0.7}))


def test_ranks_in_another_pool_than_the_settings_name_are_refused(check_sentence: Check) -> None:
    stored_reference.require_pool(batch().disagreement_scores, RankingSettings(), None)
    ranked = with_provenance(batch().disagreement_scores, pool_id="reference:r1:0")
    with pytest.raises(OriginError) as error:
        stored_reference.require_pool(ranked, RankingSettings(), None)
    check_sentence(error.value)


def test_models_that_were_asked_differently_are_not_ranked_together(check_sentence: Check) -> None:
    scores = dict(batch().rmi_scores)
    scores["weak"] = with_provenance(scores["weak"], scoring={"max_tokens": 9})
    with pytest.raises(OriginError) as error:
        scored_batch.rank(scores, ONE_STRATUM, "batch:b1", None)
    check_sentence(error.value)


def test_different_frames_are_a_warning() -> None:
    scores = dict(batch().rmi_scores)
    assert scored_batch.rank(scores, ONE_STRATUM, "batch:b1", None)[1] == []
    scores["weak"] = with_provenance(scores["weak"], frame="plain")
    _, warnings = scored_batch.rank(scores, ONE_STRATUM, "batch:b1", None)
    assert warnings == ["the models' frames differ (strong: chat, weak: plain): the gap measures the frame too"]


def test_the_warnings_of_a_model_are_warnings_of_its_ranks() -> None:
    scores = dict(batch().rmi_scores)
    scores["weak"] = with_provenance(scores["weak"], warnings=["its tokenizer changes texts"])
    assert scored_batch.rank(scores, ONE_STRATUM, "batch:b1", None)[1] == ["model 'weak': its tokenizer changes texts"]


def test_scores_under_other_prompts_than_those_of_a_reference_are_refused(check_sentence: Check) -> None:
    scores = batch().rmi_scores
    frozen = StoredTable(rmi_rows(), {"partition": ["r1"], "scored_by": stored_scores.scored_by(scores)})
    assert stored_scores.differently_scored(frozen.provenance["scored_by"], scores) == []
    changed = dict(scores) | {"weak": with_provenance(scores["weak"], identity_hash="1")}
    with pytest.raises(stored_reference.RankReferenceError) as error:
        stored_reference.require_comparable(frozen, changed)
    check_sentence(error.value)


def test_a_lost_row_is_a_fault(check_sentence: Check) -> None:
    whole = batch()
    lost = StoredTable(whole.screened_data.frame.head(1), whole.screened_data.provenance)
    rows = {"raw_data": whole.raw_data.data_version, "screened_data": lost.data_version}
    rmi = {role: with_provenance(table, scored_from=rows) for role, table in whole.rmi_scores.items()}
    torn = ScoredBatch(whole.raw_data, lost, rmi, whole.disagreement_scores)
    with pytest.raises(StorageError) as error:
        list(torn.rows())
    check_sentence(error.value)
