"""Partitions and inputs as values."""

from __future__ import annotations

import pytest

from qaq_pipeline.schema.partition import Input, Partition


@pytest.mark.parametrize(("key", "parts"), [("b1", ("b1",)), ("b1|strong", ("b1", "strong"))])
def test_a_partition_is_read_from_its_key_and_written_as_it(key: str, parts: tuple[str, ...]) -> None:
    partition = Partition.parse(key)
    assert partition.parts == parts
    assert str(partition) == partition.key == key


@pytest.mark.parametrize("key", ["", "../evil", "[x]", "a|b|c", "b1|", "|strong", "b1|../evil"])
def test_a_key_that_cannot_be_a_path_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        Partition.parse(key)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("raw_data", Input("raw_data")),
        ("logprobs|weak", Input("logprobs", "weak")),
        ("rmi_scores|b1|weak", Input("rmi_scores", "weak", "b1")),
    ],
)
def test_an_input_is_read_from_its_name_and_written_as_it(name: str, source: Input) -> None:
    assert Input.parse(name) == source
    assert str(source) == name
