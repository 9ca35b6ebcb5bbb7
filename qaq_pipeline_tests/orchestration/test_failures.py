"""failures: refusals of an asset become failures with their own words; faults of the code stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import botocore.exceptions
import dagster as dg
import psycopg2
import pytest

from qaq_pipeline.config.settings import RuntimeSettings
from qaq_pipeline.orchestration.failures import cause, guarded
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.locks import PartitionBusyError
from qaq_pipeline.storage.origin import OriginError
from qaq_pipeline.storage.postgres_locks import LockServerError


def test_a_refusal_fails_without_a_retry_in_its_own_words() -> None:
    def compute() -> None:
        raise OriginError("materialise raw_data first")

    with pytest.raises(dg.Failure, match=r"^materialise raw_data first$") as caught:
        guarded(compute, RuntimeSettings())()
    assert not caught.value.allow_retries
    assert isinstance(caught.value.__cause__, OriginError)


def test_a_refusal_of_an_asset_that_yields_is_one_too() -> None:
    def generate(number: int) -> Iterator[int]:
        yield number
        raise TableError("rows are missing")

    made = guarded(generate, RuntimeSettings())(3)
    assert next(made) == 3
    with pytest.raises(dg.Failure, match="rows are missing"):
        next(made)


def test_a_fault_of_the_code_is_no_refusal() -> None:
    def compute() -> None:
        raise ValueError("a frame has no such column")

    with pytest.raises(ValueError, match="no such column"):
        guarded(compute, RuntimeSettings())()


def raised_from(error: Exception) -> OSError:
    """An error as s3fs raises one of botocore."""
    outer = OSError(5, f"it failed: {error}")
    outer.__cause__ = error
    return outer


def unread(error: Exception) -> StorageError:
    """An error of a file that could not be read for this reason."""
    outer = StorageError("table.parquet: cannot be read")
    outer.__cause__ = error
    return outer


def of_botocore(status: int) -> Exception:
    answer: Any = {"Error": {"Code": "Any"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return botocore.exceptions.ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "num_tries"),
    [
        (ConnectionResetError("gone"), 3),
        (TimeoutError("silent"), 3),
        (LockServerError("no lock"), 3),
        (psycopg2.OperationalError("no database"), 3),
        (botocore.exceptions.EndpointConnectionError(endpoint_url="http://127.0.0.1:1"), 3),
        (botocore.exceptions.ReadTimeoutError(endpoint_url="http://127.0.0.1:1"), 3),
        (raised_from(of_botocore(503)), 3),
        (raised_from(of_botocore(403)), 1),
        (unread(ConnectionResetError("gone")), 3),
        (unread(FileNotFoundError("a file")), 1),
        (FileNotFoundError("a file"), 1),
        (OSError(28, "No space left on device"), 1),
        (PartitionBusyError("raw_data/b1 is being written by another process"), 1),
        (ValueError("a fault of the code"), 1),
        (OriginError("materialise raw_data first"), 1),
    ],
    ids=lambda one: str(one).partition(":")[0] if isinstance(one, Exception) else str(one),
)
def test_a_step_is_retried_for_the_fault_of_a_server_and_for_no_other(error: Exception, num_tries: int) -> None:
    tries = []

    def compute() -> None:
        tries.append(1)
        raise error

    asset = dg.asset(name="made")(guarded(compute, RuntimeSettings(max_retries=2, retry_seconds=0)))
    result = dg.materialize([asset], raise_on_error=False)
    assert len(tries) == num_tries
    failures = [event for event in result.all_events if event.is_step_failure]
    assert len(failures) == 1
    assert str(error).splitlines()[0] in cause(failures)


def test_a_step_whose_server_answers_again_succeeds() -> None:
    tries = []

    def compute() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionResetError("gone")
        return 1

    asset = dg.asset(name="made")(guarded(compute, RuntimeSettings(max_retries=2, retry_seconds=0)))
    assert dg.materialize([asset]).success
    assert len(tries) == 3
