"""Failures of assets: the one place that turns an error into one, and the cause read back from a run's events.

Belongs here: which errors fail a step with their own words, and reading failure events. Does not belong here: what is
done about a failure.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import dagster as dg

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import home_directory
from qaq_pipeline.config.settings import RuntimeSettings
from qaq_pipeline.ingest.imported_tables import ImportedTableError
from qaq_pipeline.ingest.landing import LandingError
from qaq_pipeline.lm.model_error import ModelError
from qaq_pipeline.publication.curated_dataset import NothingToPublishError
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.screening.benchmarks import BenchmarkError
from qaq_pipeline.screening.gates import StaleVerdictError
from qaq_pipeline.storage import disk_faults, server_faults
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.trial.arms import TrialError

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_REFUSALS = (
    BenchmarkError,
    ImportedTableError,
    LandingError,
    ModelError,
    NothingToPublishError,
    OriginError,
    StaleVerdictError,
    StorageError,
    TableError,
    TrialError,
)
"""Errors that say what a person has to do: running the step again would raise them again."""

_WRAPPING = ("Dagster", dg.RetryRequested.__name__)
"""Beginnings of the names of the errors that Dagster raises from those of a step."""

_FAILURE = f"{dg.Failure.__module__}.{dg.Failure.__name__}: "
"""The beginning of the error message of a step that raised `dg.Failure`."""


def guarded(function: Callable[_Parameters, _Result], runtime: RuntimeSettings) -> Callable[_Parameters, _Result]:
    """The function of an asset, in `guarding`."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generate(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Any:
            with guarding(runtime):
                yield from function(*args, **kwargs)

        return generate

    return guarding(runtime)(function)


@contextmanager
def guarding(runtime: RuntimeSettings) -> Iterator[None]:
    """A part of a step. It fails without a retry where its inputs are refused, and is retried for a server's fault.

    Args:
        runtime: how often a step is retried, and when.

    Raises:
        dagster.Failure: a refusal, in its own words.
        dagster.RetryRequested: a server did not answer, or was at fault.
        Exception: any other error, as it was raised: a retry would raise it again.
    """
    try:
        yield
    except _REFUSALS as error:
        if isinstance(error, StorageError) and server_faults.may_pass(error):
            raise dg.RetryRequested(runtime.max_retries, runtime.retry_seconds) from error
        raise dg.Failure(str(error), allow_retries=False) from error
    except (dg.Failure, dg.RetryRequested, PartitionBusyError):
        raise
    except Exception as error:
        if server_faults.may_pass(error):
            raise dg.RetryRequested(runtime.max_retries, runtime.retry_seconds) from error
        raise


def describe(what: str, failures: Sequence[dg.DagsterEvent], run_id: str) -> str:
    """The failure of a run in words, and its remedy; `failures` as `cause` takes them."""
    found = cause(failures)
    if (fault := disk_faults.remedy(found, home_directory())) is not None:
        return f"{what} failed: {fault} (run {run_id})"
    return f"{what} failed: {found}\nRun {run_id}; earlier results are kept. Fix the cause and run again."


def cause(failures: Sequence[dg.DagsterEvent]) -> str:
    """The first failure's own words: what the step raised, out of Dagster's wrapping, and the step's name.

    Args:
        failures: step failures and run failures of one run, in their order.
    """
    for event in failures:
        error = event.step_failure_data.error if event.is_step_failure else None
        while error is not None and error.cause is not None and (error.cls_name or "").startswith(_WRAPPING):
            error = error.cause
        if error is not None:
            is_interrupted = error.cls_name == dg.DagsterExecutionInterruptedError.__name__
            message = "interrupted by a signal" if is_interrupted else error.message.strip().removeprefix(_FAILURE)
            return f"step {event.step_key}: {message}"
    for event in failures:  # A run whose executor refused it.
        error = getattr(event.event_specific_data, "error", None)
        if error is not None and error.cls_name == SettingsError.__name__:
            return error.message.strip().partition(f"{SettingsError.__name__}: ")[2]
    return "; ".join(event.message or "" for event in failures) or "no event says why; see the run's log"
