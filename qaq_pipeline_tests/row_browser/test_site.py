"""site: what each address of the row browser answers, over stored batches and versions."""

from __future__ import annotations

import json
import re
from html import unescape
from urllib.parse import quote

import polars as pl
import pytest
from starlette.testclient import TestClient

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.curated_dataset import publish, read_batches
from qaq_pipeline.row_browser import listing
from qaq_pipeline.row_browser.site import application
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import row_place
from qaq_pipeline.schema.tables import Validity, dtypes
from qaq_pipeline.schema.vocabularies import Status
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.support.frames import pair_name, store_batch

HOSTILE = '<img src=x onerror="alert(1)"> \u202eand {{ 7 * 7 }}'
SETTINGS = """
models:
  strong: {hub: tiny/strong}
  weak: {hub: tiny/weak}
selections: [{name: mine, strategy: diff_high, budget: {count: 2}}]
"""


@pytest.fixture
def settings() -> Settings:
    return parse_settings(SETTINGS)


@pytest.fixture
def stored(storage: Storage, settings: Settings) -> Storage:
    """Two batches of four pairs and a rejected row, in version 1; row 4 of b1 has a hostile query."""
    store_batch(storage, settings, "b1", ("a", "zebra crossing", "c", HOSTILE))
    store_batch(storage, settings, "b2", ("e", "f", "g", {"query": "h", "language": "rust"}))
    publish(storage, settings, *read_batches(storage, ["b1", "b2"], settings), run_id="run")
    return storage


@pytest.fixture
def client(stored: Storage) -> TestClient:
    return TestClient(application(stored), base_url="http://127.0.0.1")


def test_the_rows_of_a_batch_are_those_of_its_decisions(stored: Storage, client: TestClient) -> None:
    decided = stored.tables.read("decisions", Partition("b1")).frame
    answer = client.get("/batches/b1/rows.json").json()
    assert (answer["recordsTotal"], answer["recordsFiltered"]) == (5, 5)
    for row, shown in zip(decided.to_dicts(), answer["data"], strict=True):
        assert shown["decision"] == row["decision"]
        assert shown["reason"] == row["reason"]
        assert shown["gap"] == row["gap"]
        scores = {one["model"]: one for one in row["scores"]}
        for model in ("strong", "weak"):
            assert shown[f"rmi_{model}"] == (scores[model]["rmi"] if scores else None)
            assert shown[f"rank_{model}"] == (scores[model]["rank"] if scores else None)
        assert shown["position"] == (row["verdicts"][0]["position"] if row["verdicts"] else None)


def test_the_lines_of_a_version_are_those_of_its_training_files(stored: Storage, client: TestClient) -> None:
    version = versions.find_version(stored, "1").version
    lines = stored.files.read_bytes(*versions.place(version, "mine/messages.jsonl")).decode().splitlines()
    rows = client.get("/versions/latest/rows.json", params={"decision": "selected", "order": "line"}).json()["data"]
    assert [row["line"] for row in rows] == list(range(1, len(lines) + 1)) == [1, 2, 3, 4]
    for row, line in zip(rows, lines, strict=True):
        assert json.loads(line)["messages"][0]["content"] == stored_query(stored, row["place"])
        page = client.get(row["link"]).text
        assert f"line {row['line']} of the training files" in page


def stored_query(storage: Storage, place: str) -> str | None:
    raw = storage.tables.read("raw_data", Partition(place.split("/", maxsplit=1)[0])).frame
    return raw.filter(row_place() == place)["query"][0]


def test_rows_are_filtered_sorted_searched_and_paged(client: TestClient) -> None:
    def places(of: str, **parameters: str) -> list[str]:
        return [row["place"] for row in client.get(f"/{of}/rows.json", params=parameters).json()["data"]]

    assert places("batches/b1", text="zebra  crossing") == ["a.jsonl:2.0"]
    assert places("batches/b1", decision="rejected") == ["a.jsonl:5.0"]
    assert places("batches/b1", order="rmi_strong", direction="desc", length="2") == ["a.jsonl:4.0", "a.jsonl:3.0"]
    assert places("batches/b1", order="rmi_strong", start="4") == ["a.jsonl:5.0"]
    assert places("batches/b1", number="rmi_strong", low="0.15") == ["a.jsonl:3.0", "a.jsonl:4.0"]
    assert places("versions/1", language="rust") == ["b2/a.jsonl:4.0"]
    assert places("versions/1", batch="b2", text="f") == ["b2/a.jsonl:2.0"]


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/batches/b1/sides", 200),
        ("/versions/1/sides", 200),
        ("/row?place=b1/a.jsonl:4.0", 200),
        (f"/batches/b1?text={quote(HOSTILE)}", 200),
        (f"/batches/{quote(HOSTILE, safe='')}", 400),
        (f"/row?place={quote(HOSTILE)}", 400),
    ],
)
def test_content_is_text_on_every_page(client: TestClient, address: str, status: int) -> None:
    page = client.get(address)
    assert page.status_code == status
    assert "<img" not in page.text
    assert "\u202e" not in page.text
    assert "and 49" not in page.text


def test_the_page_of_a_row_shows_its_sentence_texts_and_history(stored: Storage, client: TestClient) -> None:
    (row,) = stored.tables.read("decisions", Partition("b1")).frame.filter(source_row=2).to_dicts()
    page = unescape(client.get("/row", params={"place": "b1/a.jsonl:2.0"}).text)
    assert row["explanation"] in page
    assert "zebra crossing" in page
    assert "version 1 (" in page
    assert row["provenance_id"] in page
    rejected = unescape(client.get("/row", params={"place": "b1/a.jsonl:5.0"}).text)
    assert "`query` is blank" in rejected
    assert "The row was not scored." in rejected


def test_both_sides_show_all_rows_of_the_filter(client: TestClient) -> None:
    page = client.get("/versions/1/sides").text
    assert "Selected: 4 rows" in page
    assert "Not selected: 6 rows" in page
    assert page.count("<article>") == 10
    assert "rel=" not in page


def test_the_next_rows_of_both_sides_are_a_link_away(storage: Storage, settings: Settings) -> None:
    store_batch(storage, settings, "b1", tuple(f"query of row {n}" for n in range(30)))
    client = TestClient(application(storage), base_url="http://127.0.0.1")
    seen: list[str] = []
    address: str | None = "/batches/b1/sides?order=gap&direction=desc"
    while address is not None:
        page = client.get(address).text
        seen += re.findall(r"<h3><a href=[^>]*><code>([^<]*)", page)
        found = re.search(r'href="([^"]*)" rel="next"', page)
        address = None if found is None else unescape(found[1])
    assert len(seen) == len(set(seen)) == 31


def withdraw(stored: Storage, source_row: int) -> None:
    """Mark turn 0 of a record of b1 as withdrawn."""
    screened = stored.tables.read("screened_data", Partition("b1"))
    is_it = (pl.col("source_row") == source_row) & (pl.col("turn_index") == 0)
    changed = screened.frame.with_columns(
        status=pl.when(is_it).then(pl.lit(Status.WITHDRAWN.value)).otherwise("status"),
        reason=pl.when(is_it).then(pl.lit("row_withdrawn")).otherwise("reason"),
        cluster=pl.when(is_it).then(None).otherwise("cluster"),
    )
    stored.tables.write(StoredTable(changed, screened.provenance), "screened_data", Partition("b1"))


def test_a_withdrawn_text_is_shown_nowhere(stored: Storage, client: TestClient) -> None:
    shown = ("/batches/b1/rows.json", "/batches/b1/sides", "/versions/1/sides", "/row?place=b1/a.jsonl:2.0")
    assert all("zebra" in client.get(address).text for address in shown)  # These listings are kept in memory.
    withdraw(stored, 2)
    assert not any("zebra" in client.get(address).text for address in shown)


def test_the_record_of_a_withdrawn_turn_is_neither_shown_nor_searched_with_its_other_turns(stored: Storage) -> None:
    partition = Partition("b1")
    for name in ("raw_data", "screened_data", "decisions"):  # Rows 2 and 3 become turns 0 and 1 of record 2.
        table = stored.tables.read(name, partition)
        is_second = pl.col("source_row") == 3
        turns = table.frame.with_columns(
            turn_index=pl.when(is_second).then(1).otherwise("turn_index").cast(pl.Int64),
            source_row=pl.when(is_second).then(2).otherwise("source_row").cast(pl.Int64),
        )
        stored.tables.write(StoredTable(turns, table.provenance), name, partition)
    raw = stored.tables.read("raw_data", partition)
    conversation = pl.when(pl.col("source_row") == 2).then(pl.lit('{"turns": ["zebra crossing", "c"]}'))
    whole = raw.frame.with_columns(record=conversation.otherwise("record"))
    stored.tables.write(StoredTable(whole, raw.provenance), "raw_data", partition)
    client = TestClient(application(stored), base_url="http://127.0.0.1")
    second = "/row?place=b1/a.jsonl:2.1"
    assert "zebra" in client.get(second).text
    assert client.get("/batches/b1/rows.json?text=zebra").json()["recordsFiltered"] == 2
    withdraw(stored, 2)
    for address in ("/batches/b1/rows.json", "/batches/b1/sides", "/row?place=b1/a.jsonl:2.0", second):
        assert "zebra" not in client.get(address).text
    assert '<pre dir="auto">c</pre>' in client.get(second).text
    assert client.get("/batches/b1/rows.json?text=zebra").json()["recordsFiltered"] == 0


def test_raised_signals_are_shown_and_not_those_of_a_newer_judgement(storage: Storage, settings: Settings) -> None:
    def judge(raised: str) -> str:
        signals = [{"signal": name, "evidence": 0.0, "is_raised": name == raised} for name in ("echo", "mismatch")]
        pair = {"pair_id": pair_name(2), "query_in_answer": 0.0, "answer_in_query": 0.0, "signals": signals}
        table = StoredTable(pl.DataFrame([pair], schema=dtypes(Validity)))
        storage.tables.write(table, "validity", Partition("b1"))
        return table.data_version

    store_batch(storage, settings)
    decided = storage.tables.read("decisions", Partition("b1"))
    inputs = decided.provenance["inputs"] | {"validity": judge("mismatch")}
    table = StoredTable(decided.frame, decided.provenance | {"inputs": inputs})
    storage.tables.write(table, "decisions", Partition("b1"))
    assert listing.of_batch(storage, "b1").rows["signals"].to_list() == [None, "mismatch", None, None, None]
    judge("echo")
    assert listing.of_batch(storage, "b1").rows["signals"].to_list() == [None] * 5


def test_a_batch_that_is_decided_again_is_read_again(stored: Storage, client: TestClient, settings: Settings) -> None:
    assert client.get("/batches/b1/rows.json").json()["recordsTotal"] == 5
    store_batch(stored, settings, "b1", ("a", "b"))
    assert client.get("/batches/b1/rows.json").json()["recordsTotal"] == 3


def test_a_version_shows_no_text_that_came_to_a_place_since(stored: Storage, client: TestClient) -> None:
    raw = stored.tables.read("raw_data", Partition("b1"))
    other = pl.when(pl.col("source_row") == 2).then(pl.lit("f" * 32)).otherwise("pair_id").alias("pair_id")
    stored.tables.write(StoredTable(raw.frame.with_columns(other), raw.provenance), "raw_data", Partition("b1"))
    rows = client.get("/versions/1/rows.json", params={"batch": "b1"}).json()["data"]
    assert [row["query"] is None for row in rows] == [False, True, False, False, True]
    assert "zebra" not in client.get("/row", params={"place": "b1/a.jsonl:2.0", "version": "1"}).text


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/batches/b9", 404),
        ("/versions/9", 404),
        ("/things/b1", 404),
        ("/assets/settings.yaml", 404),
        ("/row?place=b1/a.jsonl:99.0", 404),
        ("/batches/b1?colour=red", 400),
        ("/batches/b1/rows.json?order=colour", 400),
        ("/row", 400),
    ],
)
def test_what_is_not_there_is_said(client: TestClient, address: str, status: int) -> None:
    page = client.get(address)
    assert page.status_code == status
    assert re.search(r'role="alert">[^<]{10,}<', page.text)


def test_another_site_s_name_for_this_machine_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_the_first_page_lists_batches_and_versions(client: TestClient) -> None:
    page = client.get("/").text
    for link in ("/batches/b1", "/batches/b2", "/versions/1"):
        assert f'href="{link}"' in page
