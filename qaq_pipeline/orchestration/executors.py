"""Where steps run, by `runtime.executor`: Dagster's executors, and what a step that scores asks of its machine.

Belongs here: the choice and the configuration of an executor. Does not belong here: where a step's pairs are scored
(`scoring.pools`). Each executor's package is imported where it is chosen, and no cluster is asked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import dagster as dg
from dagster._core.storage.tags import MAX_RUNTIME_SECONDS_TAG as MAX_RUNTIME

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import ModelSettings, RuntimeSettings, Settings

_PACKAGES = {"k8s": "dagster_k8s", "ray": "dagster_ray"}
_ONE_AT_A_TIME = {"max_concurrent": 1, "start_method": {"forkserver": {}}}


def build_executor(runtime: RuntimeSettings) -> dg.ExecutorDefinition:
    """The executor of all jobs.

    Raises:
        SettingsError: its package is not installed, or it refuses `runtime.executor_config`.
    """
    package = _PACKAGES.get(runtime.executor)
    if package is not None and find_spec(package) is None:
        raise SettingsError(
            f"runtime.executor: {runtime.executor} needs the package {package.replace('_', '-')}; install "
            f"qaq-pipeline[{runtime.executor}]"
        )
    if runtime.executor == "in_process":
        return dg.in_process_executor
    if runtime.executor == "multiprocess":
        return dg.multiprocess_executor.configured(_ONE_AT_A_TIME)
    executor = _of_cluster(runtime.executor)
    probe = dg.JobDefinition(name="probe", graph_def=dg.GraphDefinition(name="probe"), executor_def=executor)
    try:
        dg.validate_run_config(probe, {"execution": {"config": runtime.executor_config}})
    except dg.DagsterInvalidConfigError as error:
        faults = "; ".join(one.message.partition(". Expected")[0] for one in error.errors)
        raise SettingsError(f"runtime.executor_config: {package} refuses it: {faults}") from error
    return executor.configured(runtime.executor_config, name=runtime.executor)


def _of_cluster(name: str) -> dg.ExecutorDefinition:
    if name == "k8s":
        from dagster_k8s import k8s_job_executor

        return k8s_job_executor
    from dagster_ray import ray_executor

    return ray_executor


def run_tags(runtime: RuntimeSettings) -> dict[str, str]:
    """Tags of every run that Dagster launches."""
    limit = {} if runtime.max_runtime_seconds is None else {MAX_RUNTIME: str(runtime.max_runtime_seconds)}
    told = {name: value if isinstance(value, str) else json.dumps(value) for name, value in runtime.run_tags.items()}
    return limit | told


def check_op_tags(runtime: RuntimeSettings, assets: Collection[str]) -> None:
    """Raise `SettingsError` if there are tags for an asset that is not there."""
    if unknown := sorted(runtime.op_tags.keys() - set(assets)):
        raise SettingsError(f"runtime.op_tags: no asset {', '.join(unknown)}; the assets are {', '.join(assets)}")


def on_gpu(settings: Settings, number: int) -> dict[str, Any]:
    """Options of an asset that uses a model: such assets share a concurrency pool, so that one of them runs at a time.

    Args:
        settings: of the executor.
        number: GPUs that the step asks of its cluster.
    """
    limits = {"nvidia.com/gpu": str(number)}
    tags: dict[str, dict[str, Any]] = {
        "k8s": {"dagster-k8s/config": {"container_config": {"resources": {"limits": limits}}}},
        "ray": {"dagster-ray/config": {"num_gpus": number}},
    }
    asked = tags.get(settings.runtime.executor, {}) if number else {}
    return {"kinds": {"pytorch", "huggingface"}, "pool": "gpu", "op_tags": asked}


def gpus_to_score(settings: Settings) -> int:
    """GPUs of a step that scores; with a pool on Ray it needs none itself."""
    pool = settings.runtime.pool
    return 0 if pool.kind == "ray" else max(map(_gpus, settings.models.values())) * (pool.size or 1)


def gpus_to_train(settings: Settings) -> int:
    """GPUs of a step that trains, in its own process."""
    return _gpus(settings.models[settings.trial.model])


def _gpus(model: ModelSettings) -> int:
    """Whole GPUs: only a Ray pool divides one."""
    return math.ceil(float(model.device.startswith("cuda")) if model.gpus is None else model.gpus)
