"""personal_data: what is found, what stands for nobody, and that nothing of it is returned."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import polars as pl
import pytest

from qaq_pipeline.config.settings import PersonalData, RecordSettings, ScreeningSettings
from qaq_pipeline.ingest.records import read_file
from qaq_pipeline.screening import personal_data
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline_tests.support.frames import raw_rows

ALL: tuple[PersonalData, ...] = get_args(PersonalData)

SOME: list[tuple[PersonalData, str]] = [
    ("email", "k.huber-weiss@uni-graz.at"),
    ("email", "Peter_Nowak77@GMAIL.com"),
    ("ip_address", "93.184.215.14"),
    ("ip_address", "2a00:1450:4001:0829:0000:0000:0000:200e"),
    ("payment_card", "4556 7375 8689 9855"),
    ("payment_card", "5398228707871527"),
    ("payment_card", "3714-496353-98456"),
    ("bank_account", "AT61 1904 3002 3457 3201"),
    ("bank_account", "GB94BARC10201530093459"),
    ("phone_number", "+43 664 1937260"),
    ("phone_number", "+1 (212) 736-5000"),
    ("us_social_security", "536-22-8726"),
]


@pytest.mark.parametrize(("kind", "data"), SOME)
@pytest.mark.parametrize("code", ["contact = '{}'\n", "# {}, thanks", "{}"])
def test_personal_data_is_found_where_it_is(kind: PersonalData, data: str, code: str) -> None:
    text = "def f():\n" + code.format(data)
    (found,) = personal_data.find(text, [kind])
    assert (found.kind, text[found.place - 1 :][: len(data)]) == (kind.replace("_", " "), data)
    assert pl.select(personal_data.may_have(pl.lit(text), [kind])).item()
    assert data not in str(found)
    assert not list(personal_data.find(text, [other for other in ALL if other != kind]))


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com, a.b@mail.example.org, dev@my.test, you@host.local, john.doe@gmail.com, git@github.com:a/b",
        "yourname@yourdomain.com; info@firma.de; icon@2x.png; 1234+name@users.noreply.github.com; @decorator.call",
        "127.0.0.1 10.1.2.3 192.168.0.1 203.0.113.7 255.255.255.0 8.8.8.8 1.2.3.4.5 version 999.1.1.1 v10.2.3.4-rc",
        "4111 1111 1111 1111, 4242424242424242, 378282246310005, 4444444444444444",
        "4556737586899854",  # Fails the check.
        "0.4556737586899855, 45567375868998551234567, abc4556737586899855",
        "DE89 3704 0044 0532 0130 00; GB00 BARC 1020 1530 0934 59; AB12 CONST ANT",
        "+1 555 123 4567, +1234567890, x = a +1 23, +00 11 22 33, +49 000 000 000",
        "123-45-6789 000-12-3456 666-12-3456 900-12-3456 2024-01-02 111-11-1111",
        "2001:db8:0:0:0:0:0:1 at 12:30:45:67:89:10:11:12",
    ],
)
def test_what_stands_for_nobody_is_none(text: str) -> None:
    assert list(personal_data.find(text, ALL)) == []


def test_a_row_with_a_kind_that_is_named_is_not_published_and_its_evidence_does_not_repeat_it() -> None:
    (_, data) = SOME[0]
    raw = raw_rows({"answer": f"mail({data!r})"}, {"record": "{}"})

    def first(**settings: object) -> tuple[object, ...]:
        return (
            screen_alone(raw, ScreeningSettings.model_validate(settings)).select("status", "reason", "evidence").row(0)
        )

    assert first() == first(personal_data=["payment_card"]) == ("accepted", None, None)
    assert first(personal_data=ALL) == ("withdrawn", "personal_data", "email at character 7 of the answer")
    key = raw.with_columns(query=pl.lit("ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dF3hJ5"))
    both = screen_alone(key, ScreeningSettings.model_validate({"personal_data": ALL}))
    assert both.height == raw.height
    assert both["reason"][0] == "secret"


def test_a_long_line_is_searched_in_little_time() -> None:
    text = "1." * 100_000 + "a" * 100_000 + "@" + "b." * 50_000 + "4" * 100_000 + "+1" * 50_000 + "AB12" * 50_000
    start = time.perf_counter()
    list(personal_data.find(text, ALL))
    assert time.perf_counter() - start < 5


def test_real_pairs_hold_hardly_any(code_alpaca: Path) -> None:
    rows = read_file(code_alpaca.read_bytes(), code_alpaca.name, "b1", RecordSettings()).frame
    texts = rows.select(pl.concat_str("query", "answer", separator="\n")).to_series().drop_nulls()
    found = [(one.kind, text[one.place - 1 :][:30]) for text in texts for one in personal_data.find(text, ALL)]
    assert len(found) <= 10, found
