"""origin: a table made from data other than the stored data is refused, with what to materialise."""

from __future__ import annotations

import polars as pl
import pytest

from qaq_pipeline.storage.origin import OriginError, batch_of, by_model, require_inputs
from qaq_pipeline.storage.stored_table import StoredTable

OLD, NEW = (StoredTable(pl.DataFrame({"number": [number]})) for number in (1, 2))
MADE = StoredTable(pl.DataFrame(), {"partition": ["b1", "weak"], "inputs": {"raw_data": OLD.data_version}})


def test_a_table_made_from_what_is_stored_passes() -> None:
    require_inputs("decisions", MADE, {"raw_data": OLD})
    require_inputs("decisions", MADE, {"raw_data": NEW}, {"raw_data": NEW.data_version})


@pytest.mark.parametrize("current", [{"raw_data": NEW}, {"raw_data": OLD, "signatures": OLD}])
def test_a_table_made_from_something_else_is_refused(current: dict[str, StoredTable]) -> None:
    changed = "signatures" if "signatures" in current else "raw_data"
    message = rf"rmi_scores\|weak of batch b1 was made from another {changed} than .*; materialise rmi_scores of this"
    with pytest.raises(OriginError, match=message):
        require_inputs("rmi_scores|weak", MADE, current)


def test_tables_of_models_are_named_as_provenance_names_inputs() -> None:
    assert by_model("rmi_scores", {"weak": OLD, "strong": NEW}) == {"rmi_scores|weak": OLD, "rmi_scores|strong": NEW}
    assert batch_of(MADE) == "b1"
