"""Evaluates sensors and runs their requests, as Dagster's daemon does, over deliveries in a landing zone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import status
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import SAMPLES, delivered_rows, write_jsonl
from qaq_pipeline_tests.support.uncalibrated import STAGES


class Daemon:
    """Evaluates sensors and runs what they ask for, as Dagster's daemon does."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        self.cursors: dict[str, str | None] = {}
        self.run_keys: set[str | None] = set()
        self.use(settings)

    def use(self, settings: Settings) -> None:
        self.settings = settings
        self.defs = build_defs(settings)

    @property
    def deployment(self) -> Deployment:
        return Deployment(self.settings, self.instance)

    def look(self, name: str) -> dg.SensorResult:
        """One look of a sensor, of which nothing comes: the daemon dies."""
        sensor = self.defs.resolve_sensor_def(name)
        context = dg.build_sensor_context(
            instance=self.instance, cursor=self.cursors.get(name), repository_def=self.defs.get_repository_def()
        )
        result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        return result

    def tick(self, name: str) -> dg.SensorResult:
        """One look of a sensor; partitions are added, and runs with a new key run."""
        result = self.look(name)
        if result.cursor is not None:
            self.cursors[name] = result.cursor
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
        for request in result.run_requests or []:
            if request.run_key is None or request.run_key not in self.run_keys:
                self.run_keys |= {request.run_key} - {None}
                [asset] = {"landing_zone": ["raw_data"], "rescreening": ["screened_data"]}[name]
                self.materialise(asset, partition=request.partition_key, tags=dict(request.tags))
        return result

    def materialise(self, *assets: str, partition: str | None, tags: dict[str, str] | None = None) -> bool:
        [job] = [name for name, of_job in STAGES.items() if set(assets) <= set(of_job)]
        return (
            self.defs.resolve_job_def(job)
            .execute_in_process(
                instance=self.instance,
                partition_key=partition,
                asset_selection=[dg.AssetKey(asset) for asset in assets],
                tags=tags,
                raise_on_error=False,
            )
            .success
        )

    def curate(self, batch: str) -> None:
        """What the conditions run of a batch whose raw_data is there."""
        assert self.materialise("signatures", "screened_data", partition=batch)
        for model in ("strong", "weak"):
            key = dg.MultiPartitionKey({"batch": batch, "model": model})
            assert self.materialise("logprobs", "rmi_scores", partition=key)
        assert self.materialise("disagreement_scores", "decisions", "selected_subset", partition=batch)

    def events(self, asset: str) -> int:
        return len(self.instance.fetch_materializations(dg.AssetKey(asset), limit=100).records)

    def statuses(self, batch: str) -> list[str]:
        return open_storage(self.settings).tables.read("screened_data", Partition(batch)).frame["status"].to_list()

    def kept(self) -> list[str]:
        return versions.kept_versions(open_storage(self.settings))

    def night(self) -> bool:
        job = self.defs.resolve_job_def("refresh")
        return job.execute_in_process(instance=self.instance, raise_on_error=False).success

    def left_out(self) -> dict[str, str]:
        return status.batches_left_out(self.deployment)


def zone_of(settings: Settings) -> Path:
    return Path(settings.landing_url)


def land(settings: Settings, name: str, rows: list[dict[str, Any]] | None = None) -> Path:
    return write_jsonl(zone_of(settings) / name, delivered_rows() if rows is None else rows)


def some_rows(*numbers: int) -> list[dict[str, str]]:
    return [{"query": SAMPLES[number][0], "response": SAMPLES[number][1]} for number in numbers]
