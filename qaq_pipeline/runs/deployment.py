"""A deployment of the pipeline: its settings, and the storage and the Dagster home that they are used with."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dagster as dg
import yaml
from dagster._core.instance.ref import InstanceRef

from qaq_pipeline.config.load import dagster_home, home_directory
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.freshness.staleness import Freshness
from qaq_pipeline.orchestration.jobs import made_under, present
from qaq_pipeline.pipeline import PIPELINE, Pipeline
from qaq_pipeline.schema.partition import Partition, check_batch_name
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage, open_storage

_NO_CAPTURE = {
    "module": "dagster._core.storage.noop_compute_log_manager",
    "class": "NoOpComputeLogManager",
    "config": {},
}


@dataclass(frozen=True)
class Deployment:
    """What one command, or one tick of a sensor, works on."""

    settings: Settings
    instance: dg.DagsterInstance

    @cached_property
    def storage(self) -> Storage:
        """The storage that the settings name, opened once."""
        return open_storage(self.settings)

    @cached_property
    def pipeline(self) -> Pipeline:
        """The part of the pipeline that is made under the settings."""
        return made_under(self.settings)

    @cached_property
    def model_runtime(self) -> ModelRuntime:
        """The models that the settings name, without a report of progress."""
        settings = self.settings
        return ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)

    @property
    def batches(self) -> Sequence[str]:
        """Names of the registered batches."""
        return self.instance.get_dynamic_partitions("batch")

    def freshness(self) -> Freshness:
        """The freshness of the registered batches, as they are stored now."""
        return Freshness(self.storage, self.batches, present(self.settings, self.storage), hashes=self._hashes)

    @cached_property
    def _hashes(self) -> dict[str, str | None]:
        """sha256 of benchmarks and imported tables: they are read once."""
        return {}

    def partitions(self, table: str, batch: str) -> list[Partition]:
        """Partitions of a batch's table: one for each model, or one."""
        return PIPELINE[table].partitions(batch, list(self.settings.models))

    def require_batch(self, batch: str) -> None:
        """Refuse a batch that is not registered.

        Raises:
            ValueError: there is no such batch, or its name cannot be used.
        """
        if check_batch_name(batch) not in self.batches:
            raise ValueError(f"there is no batch {batch!r}; `qaq status` lists the batches")

    def lock_batch(self, batch: str) -> AbstractContextManager[None]:
        """Lock a batch, so that two drivers cannot mix their deliveries and stages.

        Raises:
            PartitionBusyError: another driver holds it.
            ValueError: the name cannot be used.
        """
        return self.storage.locks.hold("batch", check_batch_name(batch))


def prepare_home() -> Path:
    """Create DAGSTER_HOME and the landing zone, with the packaged instance settings unless it has its own.

    Raises:
        OSError: a folder or the file cannot be made; the text names the remedy.
    """
    home = dagster_home()
    target = home / "dagster.yaml"
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home_directory() / "landing").mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.write_bytes((importlib.resources.files("qaq_pipeline") / "dagster.yaml").read_bytes())
    except OSError as error:
        raise OSError(
            f"{error.filename} cannot be written ({error.strerror}); set QAQ_HOME to a folder that can, now it is "
            f"{home_directory()}"
        ) from error
    return home


def open_instance() -> dg.DagsterInstance:
    """The Dagster instance in DAGSTER_HOME.

    Unless its dagster.yaml says how to capture what steps print, nothing is captured in this process: to capture it,
    Dagster points the terminal's output elsewhere while a step runs, and no progress could be shown.
    """
    home = prepare_home()
    configured = yaml.safe_load((home / "dagster.yaml").read_text(encoding="utf-8")) or {}
    overrides = {} if "compute_logs" in configured else {"compute_logs": _NO_CAPTURE}
    return dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home), overrides=overrides))
