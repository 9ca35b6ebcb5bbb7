"""forbidden: rows with secrets, and with licences that are not allowed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qaq_pipeline.config.settings import ScreeningSettings
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline_tests.screening.test_secrets import KINDS
from qaq_pipeline_tests.support.frames import raw_rows, rejected

KEY = KINDS["GitHub Token"]
PLAIN = {"query": "Connect.", "answer": "connect()"}


def screened(*rows: dict[str, Any], **settings: Any) -> list[tuple[Any, ...]]:
    """Status, reason and evidence of each row."""
    frame = screen_alone(raw_rows(*rows), ScreeningSettings.model_validate(settings))
    return frame.select("status", "reason", "evidence").rows()


@pytest.mark.parametrize("part", ["query", "answer", "system", "reasoning"])
def test_a_row_with_a_secret_is_not_published_and_its_evidence_does_not_repeat_it(part: str) -> None:
    rows = [PLAIN | {part: f"Use {KEY} now."}, {"query": "Another one entirely", "answer": "other()"}]
    (found, other) = screened(*rows)
    assert found == ("withdrawn", "secret", f"GitHub Token at character 5 of the {part}")
    assert other[0] == "accepted"
    assert screened(*rows, secrets="off")[0][0] == "accepted"


def test_a_secret_anywhere_in_the_record_counts() -> None:
    ((status, reason, evidence),) = screened(PLAIN | {"record": json.dumps({"note": KEY, **PLAIN})})
    assert (status, reason) == ("withdrawn", "secret")
    assert evidence == "GitHub Token at character 11 of the record"


def test_a_row_that_could_not_be_read_is_searched_too() -> None:
    ((status, reason, _),) = screened(rejected() | {"record": json.dumps({"query": KEY, "answer": ""})})
    assert (status, reason) == ("withdrawn", "secret")


def test_a_row_with_a_secret_represents_no_other() -> None:
    (first, second) = screened(PLAIN | {"record": KEY}, PLAIN)
    assert first[0] == "withdrawn"
    assert second[0] == "accepted"


@pytest.mark.parametrize(
    ("licence", "allowed", "is_accepted"),
    [
        ("MIT", None, True),
        ("MIT", ["mit", "apache-2.0"], True),
        (" Apache-2.0 ", ["apache-2.0"], True),
        ("GPL-3.0", ["mit"], False),
        ("mit, gpl-3.0", ["mit"], False),
        (None, ["mit"], True),
        ("MIT, Apache-2.0", ["apache-2.0", "mit"], True),
    ],
)
def test_a_row_that_names_a_licence_must_name_an_allowed_one(
    licence: str | None, allowed: list[str] | None, *, is_accepted: bool
) -> None:
    ((status, reason, evidence),) = screened(PLAIN | {"licence": licence}, licences=allowed)
    expected = (
        ("accepted", None, None)
        if is_accepted
        else ("withdrawn", "licence_not_allowed", f"it names the licence {licence}")
    )
    assert (status, reason, evidence) == expected
