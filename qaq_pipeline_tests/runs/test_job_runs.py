"""job_runs: signals between two runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._utils.interrupts import capture_interrupts

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import Driver, RunError
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.support.sentences import Check

SettingsFor = Callable[..., Settings]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_dagster_drops_between_two_steps_ends_the_run(
    settings_for: SettingsFor,
    instance: dg.DagsterInstance,
    delivered: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    check_sentence: Check,
) -> None:
    settings = settings_for()
    run_job = Driver._run_job

    def run_and_be_told_to_end(*arguments: Any) -> str:
        with capture_interrupts():  # As Dagster's executor does around its steps.
            run_id = run_job(*arguments)
            os.kill(os.getpid(), number)
        return run_id

    registration.register(Deployment(settings, instance), "b1", [delivered], None)
    with monkeypatch.context() as patch:
        patch.setattr(Driver, "_run_job", run_and_be_told_to_end)
        with pytest.raises(RunError) as error:
            run_batch.run_batch(Deployment(settings, instance), "b1")
        check_sentence(error.value)
    assert open_storage(settings).tables.has("screened_data", Partition("b1"))
    assert not open_storage(settings).tables.has("logprobs", Partition("b1", "strong"))
