"""failures: refusals of an asset become failures with their own words; faults of the code stay what they are."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest

from qaq_pipeline.orchestration.failures import refusing
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.storage.origin import OriginError


def test_a_refusal_fails_without_a_retry_in_its_own_words() -> None:
    @refusing
    def compute() -> None:
        raise OriginError("materialise raw_data first")

    with pytest.raises(dg.Failure, match=r"^materialise raw_data first$") as caught:
        compute()
    assert not caught.value.allow_retries
    assert isinstance(caught.value.__cause__, OriginError)


def test_a_refusal_of_an_asset_that_yields_is_one_too() -> None:
    @refusing
    def generate(number: int) -> Iterator[int]:
        yield number
        raise TableError("rows are missing")

    made = generate(3)
    assert next(made) == 3
    with pytest.raises(dg.Failure, match="rows are missing"):
        next(made)


def test_a_fault_of_the_code_is_no_refusal() -> None:
    @refusing
    def compute() -> None:
        raise ValueError("a frame has no such column")

    with pytest.raises(ValueError, match="no such column"):
        compute()
