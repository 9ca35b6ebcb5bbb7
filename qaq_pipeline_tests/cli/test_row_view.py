"""row_view: the evidence of the signals for a judged pair, read from the tables that its decision used."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from rich.console import Console

from qaq_pipeline.cli import row_view
from qaq_pipeline.lineage import row_history
from qaq_pipeline.lineage.dossier import Dossier
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import Decisions, Validity, ValidityCuts, dtypes
from qaq_pipeline.storage.provenance import Provenance
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import pair_name

ROW = dict.fromkeys(dtypes(Decisions)) | {
    "batch": "b1",
    "source_file": "a.jsonl",
    "source_row": 1,
    "turn_index": 0,
    "pair_id": pair_name(1),
    "decision": "not_selected",
    "reason": "invalid_mismatch",
    "explanation": "Not valid.",
    "scores": [{"model": "strong"}, {"model": "weak"}],
    "verdicts": [],
    "provenance_id": "p" * 32,
}
RAISED = {"echo": True, "mismatch": True, "unfinished": True}
ORDER = ["echo", "implausible_query", "mismatch", "unfinished"]


def store(storage: Storage, **changes: Any) -> dict[str, str]:
    """Store validity and cuts of two pairs of batch b1; return the data versions."""
    signals = [
        {"signal": name, "evidence": None if name == "implausible_query" else -1.5, "is_raised": name in RAISED}
        for name in ORDER
    ]
    pair = {"pair_id": pair_name(1), "invalid_by": "mismatch", "query_in_answer": 0.5, "answer_in_query": 0.25}
    other = pair | {"pair_id": pair_name(2), "signals": []}
    validity = pl.DataFrame([pair | {"signals": signals} | changes, other], schema=dtypes(Validity))
    no_cut = dict.fromkeys(dtypes(ValidityCuts)) | {"num_planted": 0, "num_pairs": 2, "spreads": [], "chosen_from": []}
    cuts = [
        no_cut
        | {"signal": name, "cut": None if name == "implausible_query" else -1.0}
        | ({"null_reason": "cannot_tell"} if name == "implausible_query" else {})
        for name in ORDER
    ]
    tables = {"validity": validity, "validity_cuts": pl.DataFrame(cuts, schema=dtypes(ValidityCuts))}
    for name, frame in tables.items():
        storage.tables.write(StoredTable(frame, {"inputs": {}}), name, Partition("b1"))
    return {name: str(storage.tables.version(name, Partition("b1"))) for name in tables}


def shown(signals: list[dict[str, Any]] | None) -> str:
    console = Console(width=120, record=True)
    row = ROW | {"scores": []}
    row_view.show(console, Dossier(row, None, {}, None, signals, [], Provenance("p", None, [])), with_template=False)
    return " ".join(console.export_text().split())


def test_a_judged_pair_shows_the_evidence_the_cut_and_the_result_of_every_signal(
    storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = store(storage)
    signals = row_history.validity_of(storage, ROW, inputs)
    assert signals is not None
    assert [signal["signal"] for signal in signals] == ORDER
    text = shown(signals)
    capsys.readouterr()
    assert "│ echo │ -1.5000 │ -1.0000 │ flagged │" in text  # The first that declares something is mismatch.
    assert "│ implausible_query │ - │ - │ no cut (cannot_tell) │" in text
    assert "│ mismatch │ -1.5000 │ -1.0000 │ raised: the pair is invalid │" in text
    assert "│ unfinished │ -1.5000 │ -1.0000 │ raised │" in text


def test_a_valid_pair_is_only_flagged(storage: Storage) -> None:
    signals = row_history.validity_of(storage, ROW, store(storage, invalid_by=None))
    assert signals is not None
    assert [signal["is_reason"] for signal in signals] == [False] * 4
    text = shown(signals)
    assert text.count("flagged") == 3
    assert "invalid │" not in text


def test_evidence_that_another_decision_used_is_not_shown(storage: Storage) -> None:
    inputs = store(storage)
    assert row_history.validity_of(storage, ROW, inputs | {"validity": "of before"}) is None
    assert "The evidence of the signals was judged again since this decision" in shown(None)


@pytest.mark.parametrize(("changes", "has_inputs"), [({}, False), ({"pair_id": None}, True), ({"scores": []}, True)])
def test_a_row_that_was_not_judged_has_no_evidence(storage: Storage, changes: dict[str, Any], has_inputs: bool) -> None:
    inputs = store(storage)
    assert row_history.validity_of(storage, ROW | changes, inputs if has_inputs else {}) == []
