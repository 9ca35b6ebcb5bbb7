"""Runs that died with their process: they are found and ended, so that nothing waits for them.

Belongs here: the sign that the process of a run is alive, and the end of runs whose process is dead.
Does not belong here: the callers (`runs`, `automation`).

A killed run would stay started for ever and keep its place in the queue and its slot in the GPU pool: the next run
would wait for it without end. Dagster notices the death of a run only while the code server that started it is alive,
and a reboot ends both.

The process that executes a run holds a lock of its own, which is free however the process ends. A tag of the run says
that it did, and on which machine. A run whose lock cannot be seen from here is left alone: with lock files, that of
another machine; also one that has not begun to execute.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator

import dagster as dg
from dagster._core.execution.context.system import PlanOrchestrationContext
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.retries import RetryMode
from dagster._core.execution.step_dependency_config import StepDependencyConfig
from dagster._core.storage.runs import InMemoryRunStorage, SqliteRunStorage

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import dagster_home
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.storage.locks import Locks, open_locks

SETTINGS_TAG = "qaq/settings"
"""Hash of the settings under which a run was submitted."""
TAG = "qaq/process"
"""Run id, and the machine of the process. The id tells a tag of the run from one that it took over from another."""
_LOCK = "run"
_UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]


def run_locks(settings: Settings) -> Locks:
    """The locks of runs. Lock files lie in the Dagster home, beside the runs.

    Raises:
        SettingsError: as `open_locks`.
    """
    return open_locks(settings, dagster_home() / "run_locks")


@contextlib.contextmanager
def living(locks: Locks, run_id: str) -> Iterator[dict[str, str]]:
    """Show that this process is alive while it executes a run; gives the tag of the run.

    Raises:
        ConnectionError: the server of the locks cannot be reached, or ended the lock.
    """
    with locks.hold(_LOCK, run_id):
        yield {TAG: _of_process(run_id)}
    locks.forget(_LOCK, run_id)


def in_living_process(executor: dg.ExecutorDefinition, locks: Locks, own_settings: str) -> dg.ExecutorDefinition:
    """The executor, in a process that shows that it is alive.

    Args:
        executor: that executes the steps.
        locks: of runs.
        own_settings: hash of the settings of this process. A run that was submitted under other settings fails.
    """
    create = executor.executor_creation_fn
    if create is None:
        raise ValueError(f"executor {executor.name} is not defined")

    def create_living(context: dg.InitExecutorContext) -> dg.Executor:
        return _LivingExecutor(create(context), locks, own_settings)

    return dg.ExecutorDefinition(
        executor.name, executor.config_schema.as_field(), executor.get_requirements, create_living, executor.description
    )


class _LivingExecutor(dg.Executor):
    def __init__(self, executor: dg.Executor, locks: Locks, own_settings: str) -> None:
        self._executor = executor
        self._locks = locks
        self._own_settings = own_settings

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """The events of the run. Raises `SettingsError` if it was submitted under other settings."""
        if plan_context.dagster_run.tags.get(SETTINGS_TAG, self._own_settings) != self._own_settings:
            raise SettingsError(
                "the code location reads other settings than the command that submitted the run; give both the same "
                "file by QAQ_CONFIG"
            )
        with living(self._locks, plan_context.run_id) as tag:
            plan_context.instance.add_run_tags(plan_context.run_id, tag)
            yield from self._executor.execute(plan_context, execution_plan)

    @property
    def retries(self) -> RetryMode:
        """Whether it retries steps."""
        return self._executor.retries

    @property
    def step_dependency_config(self) -> StepDependencyConfig:
        """What a step waits for."""
        return self._executor.step_dependency_config


def end_dead_runs(instance: dg.DagsterInstance, locks: Locks) -> list[str]:
    """Mark the runs of dead processes as failed and free their slots in pools; gives their run ids.

    Dagster's daemon retries those that it had started itself (`run_retries`).
    """
    ended = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        is_gone = is_dead(instance, locks, run)
        now = instance.get_run_by_id(run.run_id)
        if is_gone and now is not None and not now.is_finished:  # It may have ended since the query.
            instance.report_run_failed(now, "the process that ran it is gone")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            locks.forget(_LOCK, run.run_id)
            ended.append(run.run_id)
    return ended


def holders_of_pools(instance: dg.DagsterInstance) -> list[str]:
    """Ids of the runs that hold a slot of a pool now: other runs wait for them."""
    storage = instance.event_log_storage
    pools = [storage.get_concurrency_info(key) for key in storage.get_concurrency_keys()]
    return sorted({slot.run_id for pool in pools for slot in pool.claimed_slots})


def is_dead(instance: dg.DagsterInstance, locks: Locks, run: dg.DagsterRun) -> bool:
    """Whether the process that executed a run is gone. False where that cannot be seen from here."""
    run_id, _, machine = run.tags.get(TAG, "").partition(" ")
    if run_id != run.run_id:
        return False
    is_seen = not locks.are_of_one_machine or machine == platform.node() or _is_of_one_machine(instance)
    return is_seen and not locks.is_held(_LOCK, run_id)


def _of_process(run_id: str) -> str:
    return f"{run_id} {platform.node()}"


def _is_of_one_machine(instance: dg.DagsterInstance) -> bool:
    """Whether the runs are in files: the name of the machine may change, as laptops' do."""
    return isinstance(instance.run_storage, (SqliteRunStorage, InMemoryRunStorage))
