"""gates: the conditions on a batch, and verdicts that name the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from qaq_pipeline.config.selections import DiffSelection
from qaq_pipeline.config.settings import GateSettings, ScreeningSettings
from qaq_pipeline.schema.tables import Decisions, enforce
from qaq_pipeline.schema.vocabularies import GateReason
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline_tests.support.decided import decide, selected_rows
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

UNSCORED = {"rmi": None, "log_ppl_q": None, "log_ppl_q_given_a": None, "null_reason_rmi": "query_too_long"}
NO_IFD = {"ifd_ppl": None, "ifd_loss": None, "log_ppl_a": None, "null_reason_ifd": "non_finite"}


def of_rows(*rows: dict[str, Any], **settings: Any) -> Gate | None:
    screened = screen_alone(raw_rows(*rows), ScreeningSettings())
    return gates.before_scoring(screened, GateSettings.model_validate(settings))


def test_a_batch_without_a_row_is_gated() -> None:
    assert of_rows() == Gate(GateReason.EMPTY_BATCH, "it has no row; deliver it again with some")


@pytest.mark.parametrize(
    ("num_rejected", "settings", "is_gated"),
    [
        (1, {}, False),
        (2, {}, True),
        (2, {"max_rejected_share": 0.4}, False),
        (5, {"max_rejected_share": None}, False),
        (5, {"max_rejected_share": 1.0}, False),
        (1, {"max_rejected_share": 0.0}, True),
        (0, {"max_rejected_share": 0.0}, False),
    ],
)
def test_too_many_rejected_rows_gate_a_batch(
    num_rejected: int, settings: dict[str, Any], is_gated: bool, check_sentence: Check
) -> None:
    gate = of_rows(*[rejected()] * num_rejected, *[{}] * (5 - num_rejected), **settings)
    assert (gate is not None) == is_gated
    if gate:
        assert gate.reason is GateReason.TOO_MANY_REJECTED
        check_sentence(gate.sentence)


def test_duplicates_are_no_reason_to_gate() -> None:
    assert of_rows(*[{"pair_id": pair_name(1)}] * 10) is None


@pytest.mark.parametrize(
    ("weak", "minimum", "is_gated"),
    [
        ([{}, {}, UNSCORED | NO_IFD, UNSCORED | NO_IFD], 0.5, False),
        ([{}, UNSCORED | NO_IFD, UNSCORED | NO_IFD, UNSCORED | NO_IFD], 0.5, True),
        ([{}, UNSCORED, UNSCORED, UNSCORED], 0.5, False),
        ([UNSCORED | NO_IFD] * 4, None, False),
        ([UNSCORED | NO_IFD] * 4, 0.0, False),
    ],
)
def test_too_few_pairs_that_a_model_scores_gate_a_batch(
    weak: list[dict[str, Any]], minimum: float | None, is_gated: bool
) -> None:
    settings = GateSettings.model_validate({"min_scorable_share": minimum})
    assert gates.after_scoring("strong", rmi_rows({}, {}, {}, {}), {}, settings) is None
    gate = gates.after_scoring("weak", rmi_rows(*weak), {}, settings)
    assert (gate is not None) == is_gated
    if gate:
        assert gate.reason is GateReason.TOO_FEW_SCORABLE
        assert gate.sentence.startswith("the weak model could score 1 of its 4 pairs, less than the share of 0.5")


def test_a_model_whose_files_changed_while_it_scored_gates_a_batch() -> None:
    settings = GateSettings.model_validate({})
    before, after = {"model": "tiny", "revision": "files:1"}, {"model": "tiny", "revision": "files:2"}
    changed = {"identity": before, "identity_after": after}
    assert gates.after_scoring("weak", rmi_rows({}, {}), changed, settings) == Gate(
        GateReason.MODEL_CHANGED,
        "the files of the weak model tiny changed while it scored (files:1 before, files:2 after), so its scores may "
        "come from either; run the batch again: scores made after the change are not in the cache",
    )
    assert gates.after_scoring("weak", rmi_rows({}, {}), {"identity": before}, settings) is None


def test_a_changed_model_counts_before_too_few_scorable_pairs() -> None:
    changed = {"identity": {"model": "m", "revision": "1"}, "identity_after": {"model": "m", "revision": "2"}}
    gate = gates.after_scoring("weak", rmi_rows(UNSCORED | NO_IFD), changed, GateSettings.model_validate({}))
    assert gate is not None
    assert gate.reason is GateReason.MODEL_CHANGED


def test_a_batch_without_pairs_is_not_gated_for_its_scores() -> None:
    assert gates.after_scoring("strong", rmi_rows(), {}, GateSettings.model_validate({})) is None


FEW, OTHER, CHANGED = (
    Gate(reason, f"so it is {number}")
    for number, reason in enumerate(
        (GateReason.TOO_FEW_SCORABLE, GateReason.TOO_FEW_SCORABLE, GateReason.MODEL_CHANGED)
    )
)
EMPTY = Gate(GateReason.EMPTY_BATCH, "it has no row")


@pytest.mark.parametrize(
    ("screened", "strong", "weak", "expected"),
    [
        (None, None, None, None),
        (None, None, FEW, FEW),
        (None, FEW, OTHER, FEW),
        (None, FEW, CHANGED, CHANGED),
        (EMPTY, FEW, CHANGED, EMPTY),
    ],
)
def test_the_verdict_on_a_batch_is_the_first_stored_one(
    screened: Gate | None, strong: Gate | None, weak: Gate | None, expected: Gate | None
) -> None:
    limit = {gates.LIMIT_KEY: 0.5}
    scored = {"weak": gates.as_provenance(weak) | limit, "strong": gates.as_provenance(strong) | limit}
    settings = GateSettings.model_validate({"min_scorable_share": 0.5})
    assert gates.of_batch("b1", gates.as_provenance(screened), scored, settings) == expected


def test_a_verdict_that_was_made_under_another_limit_is_refused() -> None:
    settings = GateSettings.model_validate({"min_scorable_share": 0.9})
    scored = {"strong": {gates.LIMIT_KEY: 0.9}, "weak": {gates.LIMIT_KEY: None}}
    with pytest.raises(
        gates.StaleVerdictError,
        match=r"rmi_scores\|weak of batch b1 were judged with gates.min_scorable_share None, the settings say 0.9; mat",
    ):
        gates.of_batch("b1", {}, scored, settings)


def test_a_verdict_is_new_where_another_one_or_none_was_stored() -> None:
    assert gates.is_new(FEW, None)
    assert gates.is_new(FEW, {})
    assert gates.is_new(FEW, gates.as_provenance(CHANGED))
    assert not gates.is_new(FEW, gates.as_provenance(FEW))
    assert not gates.is_new(None, None)


def test_every_row_of_a_gated_batch_says_why_and_what_was_wrong_with_itself() -> None:
    raw = raw_rows({}, rejected(), {"pair_id": pair_name(1)}, {"pair_id": pair_name(2)})
    scores = {role: rmi_rows({}, {}) for role in ("strong", "weak")}
    disagreement, _ = disagreement_scores(scores, ONE_STRATUM, "batch:b1")
    published = DiffSelection(name="mine", strategy="diff_high")
    pairs = candidates(disagreement, scores)
    verdicts = select_all(pairs, [published])
    gate = Gate(GateReason.TOO_MANY_REJECTED, "so it is")
    screened = screen_alone(raw, ScreeningSettings())
    frame = enforce(Decisions, decide(raw, screened, pairs, verdicts, published, pair_name(0), gate))
    assert frame["decision"].to_list() == ["batch_gated"] * 4
    assert frame["reason"].to_list() == ["too_many_rejected"] * 4
    assert frame["explanation"].to_list() == [
        "No row of the batch is published: so it is.",
        "No row of the batch is published: so it is. Of the row itself: `query` is blank.",
        "No row of the batch is published: so it is. Of the row itself: equal system text, query and answer.",
        "No row of the batch is published: so it is.",
    ]
    assert frame["verdicts"].list.len().to_list() == [0] * 4
    same = Gate(GateReason.UNREADABLE_FILE, "one of its files cannot be read: `query` is blank; deliver it again")
    said = decide(raw, screened, pairs, verdicts, published, pair_name(0), same)["explanation"]
    assert said[1] == f"No row of the batch is published: {same.sentence}."
    assert selected_rows("mine", raw, frame).is_empty()


def test_a_verdict_is_read_as_it_was_stored() -> None:
    gate = Gate(GateReason.EMPTY_BATCH, "it has no row")
    assert gates.of_provenance(gates.as_provenance(gate)) == gate
    assert gates.of_provenance(gates.as_provenance(None)) is None
