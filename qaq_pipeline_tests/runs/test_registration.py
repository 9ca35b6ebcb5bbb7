"""registration: what is refused before it is kept, and a limit of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline_tests.support.frames import HOSTILE_NAMES

SettingsFor = Callable[..., Settings]


def test_only_the_first_rows_are_read_where_a_limit_says_so(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path
) -> None:
    settings = settings_for()
    registration.register(Deployment(settings, instance), "b1", [delivered], 3)
    assert run_batch.run_batch(Deployment(settings, instance), "b1").rows_in == 3


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_batch_name_is_refused_before_anything_is_kept(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered: Path, name: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="batch name"):
        registration.register(Deployment(settings_for(), instance), name, [delivered], None)
    assert instance.get_dynamic_partitions("batch") == []
    assert not (tmp_path / "home").exists()
