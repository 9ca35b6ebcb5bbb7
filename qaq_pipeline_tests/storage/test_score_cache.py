"""score_cache: scores by identity; damaged files are set aside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.tables import TableError
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.storage.tables import empty
from qaq_pipeline_tests.support.frames import IDENTITY, cached, pair_name, raw_rows
from qaq_pipeline_tests.support.sentences import Check

SCORED_WITH = {"libraries": {"torch": "2.13.0"}, "device": "cpu"}


def pair_ids(*numbers: int) -> pl.Series:
    return pl.Series([pair_name(number) for number in numbers], dtype=pl.String)


def read_scores(storage: Storage, *numbers: int) -> pl.DataFrame:
    """The cached scores of these pairs, as CachedScores with `scored_with`."""
    asked = pair_ids(*numbers)
    scores = storage.scores.read(IDENTITY, asked)
    named = scores.select(
        asked.gather(scores["place"]).alias("pair_id"),
        pl.exclude("place", "scored_with"),
        null_reason=None,
        scored_with="scored_with",
    )
    return named.cast({**tables.dtypes(tables.CachedScores), "scored_with": pl.String()})


def keys(scores: pl.DataFrame) -> list[tuple[str, str]]:
    return sorted(scores.select("pair_id", "quantity").iter_rows())


def test_cached_scores_come_back_for_the_pairs_that_are_asked_for(any_storage: Storage) -> None:
    any_storage.scores.append(IDENTITY, cached(1, 2, 3), SCORED_WITH)
    any_storage.scores.append(IDENTITY, cached(4), SCORED_WITH)
    any_storage.scores.append(IDENTITY, cached(1, quantity=Quantity.A), SCORED_WITH)
    found = read_scores(any_storage, 1, 4, 9).drop("scored_with")
    assert keys(found) == [(pair_name(1), "a"), (pair_name(1), "q"), (pair_name(4), "q")]
    assert dict(found.schema) == tables.dtypes(tables.CachedScores)


def test_scores_of_other_end_tokens_are_kept_beside_each_other(any_storage: Storage) -> None:
    ends = cached(1, quantity=Quantity.END).with_columns(num_tokens=pl.lit(1, pl.Int64))
    for end_ids, sum_nll in (("7", 2.0), ("7 12", 1.0), ("7", 2.5)):
        scores = ends.with_columns(end_ids=pl.lit(end_ids), sum_nll=pl.lit(sum_nll))
        any_storage.scores.append(IDENTITY, scores, SCORED_WITH)
    found = read_scores(any_storage, 1)
    assert sorted(found.select("end_ids", "sum_nll").iter_rows()) == [("7", 2.0), ("7 12", 1.0)]


@pytest.mark.parametrize("end_ids", [" 7", "7  12", "7,12", "a"])
def test_end_tokens_that_are_no_list_of_ids_are_refused(any_storage: Storage, end_ids: str) -> None:
    with pytest.raises(TableError, match="end_ids"):
        any_storage.scores.append(IDENTITY, cached(1).with_columns(end_ids=pl.lit(end_ids)), SCORED_WITH)


def test_a_cache_without_shards_has_no_scores(any_storage: Storage) -> None:
    assert read_scores(any_storage, 1).drop("scored_with").equals(empty(tables.CachedScores))


def test_a_score_that_two_writers_stored_is_read_once(any_storage: Storage) -> None:
    for sum_nll in (1.5, 1.5000001):
        any_storage.scores.append(IDENTITY, cached(1, 2, sum_nll=sum_nll), SCORED_WITH)
    found = read_scores(any_storage, 1, 2).drop("scored_with")
    assert keys(found) == [(pair_name(1), "q"), (pair_name(2), "q")]
    assert found.equals(read_scores(any_storage, 1, 2).drop("scored_with"))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(IDENTITY)])
def test_scores_of_another_identity_are_not_read(storage: Storage, field: str) -> None:
    value = getattr(IDENTITY, field)
    changes: dict[str, Any] = {field: value * 2}
    other = dataclasses.replace(IDENTITY, **changes)
    storage.scores.append(other, cached(1), SCORED_WITH)
    assert read_scores(storage, 1).is_empty()
    assert storage.scores.read(other, pair_ids(1)).height == 1


def test_the_folder_of_the_scores_says_whose_they_are(any_storage: Storage) -> None:
    any_storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    stored = any_storage.files.read_json("score_cache", IDENTITY.digest(), "identity.json")
    assert stored == dataclasses.asdict(IDENTITY)


def shards(storage: Storage) -> list[Path]:
    return sorted(Path(storage.files.url("score_cache", IDENTITY.digest())).glob("shards/*.parquet"))


def flip_a_byte(data: bytes) -> bytes:
    """Flip one bit of the byte at offset 40, inside the columns."""
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def shard_of(scores: pl.DataFrame) -> bytes:
    return parquet_file.encode(scores, {"data_version": StoredTable(scores).data_version, "scored_with": SCORED_WITH})


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"hello",
    "foreign": lambda _: parquet_file.encode(raw_rows({}), {}),
    "torn": lambda data: data[:-9],
    "changed": flip_a_byte,
    "without a column": lambda _: shard_of(cached(1).drop("num_tokens")),
    "of other types": lambda _: shard_of(cached(1).cast({"sum_nll": pl.Float32})),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_no_shard_is_set_aside_named_and_never_read(
    storage: Storage, spoil: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    (spoiled,) = shards(storage)
    spoiled.write_bytes(content := spoil(spoiled.read_bytes()))
    storage.scores.append(IDENTITY, cached(2), SCORED_WITH)
    assert keys(read_scores(storage, 1, 2)) == [(pair_name(2), "q")]
    assert f"{spoiled}: no file of scores" in caplog.text
    set_aside = Path(storage.files.path("score_cache", IDENTITY.digest(), "set_aside"))
    assert [file.read_bytes() for file in set_aside.iterdir()] == [content]
    assert not spoiled.exists()
    caplog.clear()
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    assert keys(read_scores(storage, 1, 2)) == [(pair_name(1), "q"), (pair_name(2), "q")]
    assert caplog.text == ""
    (entry,) = storage.scores.models()
    assert (entry.num_files, entry.num_set_aside, entry.num_scores) == (2, 1, 2)


def test_the_cache_lists_what_it_holds_by_model_and_removes_it(any_storage: Storage) -> None:
    other = dataclasses.replace(IDENTITY, model="another")
    assert any_storage.scores.models() == []
    for identity, numbers in ((IDENTITY, (1, 2, 3)), (IDENTITY, (4,)), (other, (1,))):
        any_storage.scores.append(identity, cached(*numbers), SCORED_WITH)
    for number in (3, 4):
        any_storage.scores.count_hits(IDENTITY, number)
    by_model = {entry.identity["model"]: entry for entry in any_storage.scores.models()}
    assert by_model.keys() == {IDENTITY.model, "another"}
    ours = by_model[IDENTITY.model]
    assert (ours.digest, ours.num_files, ours.num_scores, ours.num_hits) == (IDENTITY.digest(), 2, 4, 7)
    assert ours.num_bytes > 1000
    any_storage.scores.prune(ours.digest)
    assert [entry.identity["model"] for entry in any_storage.scores.models()] == ["another"]
    assert read_scores(any_storage, 1).is_empty()


def test_a_shard_that_is_still_being_written_is_not_read(storage: Storage) -> None:
    storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    (shard,) = shards(storage)
    shard.with_name(".0123.tmp").write_bytes(b"half")
    assert read_scores(storage, 1).height == 1


SCORERS = [{"libraries": {"torch": version}, "device": "cpu"} for version in ("2.13", "2.14")]


def scorers(storage: Storage, *numbers: int) -> list[Any]:
    found = read_scores(storage, *numbers)
    return [json.loads(scorer) for scorer in found["scored_with"]]


def test_every_score_says_which_libraries_and_device_made_it(any_storage: Storage) -> None:
    for number, scorer in enumerate(SCORERS, start=1):
        any_storage.scores.append(IDENTITY, cached(number), scorer)
    assert scorers(any_storage, 1, 2) == SCORERS


def test_columns_of_a_shard_that_nobody_reads_do_no_harm(storage: Storage) -> None:
    wider = cached(1).with_columns(token_logprobs=pl.lit(None, pl.List(pl.Float32)))
    storage.scores.append(IDENTITY, cached(1, sum_nll=9.0), SCORED_WITH)
    shards(storage)[0].write_bytes(shard_of(wider))
    assert read_scores(storage, 1).drop("scored_with").equals(cached(1))


def test_of_equal_scores_the_scorer_that_sorts_first_is_named(any_storage: Storage) -> None:
    for scorer in reversed(SCORERS):
        any_storage.scores.append(IDENTITY, cached(1), scorer)
    assert scorers(any_storage, 1) == [SCORERS[0]]


def test_scores_that_do_not_fit_are_not_appended(storage: Storage) -> None:
    with pytest.raises(TableError, match="CachedScores"):
        storage.scores.append(IDENTITY, cached(1).with_columns(sum_nll=pl.lit(-1.0)), SCORED_WITH)
    assert shards(storage) == []


def test_a_cache_that_is_pruned_while_it_is_read_is_no_error(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        storage.scores.append(IDENTITY, cached(number), SCORED_WITH)
    read_if_any, first = storage.files.read_if_any, shards(storage)[0].name

    def read_and_prune(*parts: str) -> bytes | None:
        data = read_if_any(*parts)
        if parts[-1] == first and data is not None:
            storage.scores.prune(IDENTITY.digest())
        return data

    monkeypatch.setattr(storage.files, "read_if_any", read_and_prune)
    assert keys(read_scores(storage, 1, 2)) == [(pair_name(1), "q")]


def test_a_changed_shard_has_a_fault_and_a_missing_one_is_an_error(any_storage: Storage, check_sentence: Check) -> None:
    any_storage.scores.append(IDENTITY, cached(1), SCORED_WITH)
    digest = IDENTITY.digest()
    (name,) = any_storage.scores.names(digest)
    assert any_storage.scores.fault(digest, name) is None
    place = any_storage.scores.place(digest, *name.split("/"))
    any_storage.files.write_bytes(flip_a_byte(any_storage.files.read_bytes(*place)), *place)
    check_sentence(any_storage.scores.fault(digest, name))
    any_storage.files.remove(*place)
    with pytest.raises(StorageError, match="not stored yet"):
        any_storage.scores.fault(digest, name)
