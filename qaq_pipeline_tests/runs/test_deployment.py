"""deployment: one storage, and which batches it knows."""

from __future__ import annotations

from collections.abc import Callable

import dagster as dg
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline_tests.conftest import LockHolder

SettingsFor = Callable[..., Settings]


def test_a_deployment_opens_its_storage_once(settings_for: SettingsFor, instance: dg.DagsterInstance) -> None:
    deployment = Deployment(settings_for(), instance)
    assert deployment.storage is deployment.storage


def test_only_a_registered_batch_is_accepted(settings_for: SettingsFor, instance: dg.DagsterInstance) -> None:
    deployment = Deployment(settings_for(), instance)
    instance.add_dynamic_partitions("batch", ["b1"])
    deployment.require_batch("b1")
    for name, said in {"b2": "there is no batch 'b2'", "../b1": "cannot be used"}.items():
        with pytest.raises(ValueError, match=said):
            deployment.require_batch(name)


def test_a_batch_has_a_partition_for_each_model_where_its_table_has_one(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    deployment = Deployment(settings_for(), instance)
    assert deployment.partitions("decisions", "b1") == [Partition("b1")]
    assert deployment.partitions("logprobs", "b1") == [Partition("b1", "strong"), Partition("b1", "weak")]


def test_a_batch_that_another_process_holds_cannot_be_locked(
    settings_for: SettingsFor, instance: dg.DagsterInstance, lock_holder: LockHolder
) -> None:
    settings = settings_for(runtime={"lock_timeout_seconds": 0.1})
    lock_holder(settings.home / "locks", "batch", "b1")
    with pytest.raises(PartitionBusyError), Deployment(settings, instance).lock_batch("b1"):
        pass
