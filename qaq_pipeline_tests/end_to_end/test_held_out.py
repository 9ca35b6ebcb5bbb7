"""Held-out rows through the whole pipeline: nothing after the screening sees them, and every row is explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lineage import row_history
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.summary import BatchSummary
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import SAMPLES, write_jsonl

SettingsFor = Callable[..., Settings]
SELECTION = {"name": "mine", "strategy": "diff_high", "budget": {"fraction": 1.0}}


@pytest.fixture
def settings(settings_for: SettingsFor) -> Settings:
    return settings_for(
        held_out={"share": 0.5, "seed": 1},
        selections=[SELECTION | {"max_per_cluster": 1}],
        records={"multi_turn": "every"},
        export={"formats": ["messages"], "meta": True},
    )


def curate(
    settings: Settings, instance: dg.DagsterInstance, folder: Path, batch: str, *records: dict[str, Any]
) -> BatchSummary:
    delivered = write_jsonl(folder / batch / "rows.jsonl", records)
    registration.register(Deployment(settings, instance), batch, [delivered], None, replaces=True)
    return run_batch.run_batch(Deployment(settings, instance), batch)


def table(settings: Settings, name: str, *partition: str) -> pl.DataFrame:
    return open_storage(settings).tables.read(name, Partition(*partition)).frame


def conversation(*pairs: tuple[str, str]) -> dict[str, Any]:
    turns = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": turns}


def test_held_out_rows_are_neither_scored_nor_published_and_their_twins_follow_them(
    settings: Settings, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    records = [conversation(first, second) for first, second in zip(SAMPLES[::2], SAMPLES[1::2], strict=True)]
    summary = curate(settings, instance, tmp_path, "b1", *records)
    screened = table(settings, "screened_data", "b1")
    held_out = screened.filter(status="held_out")
    assert 0 < held_out.height < screened.height
    assert summary.rows_by_decision["held_out"] == held_out.height
    assert summary.reasons_by_decision["held_out"] == {"cluster_drawn": held_out.height}
    assert summary.rows_by_decision["selected"] == screened.height - held_out.height
    for name, role in (("logprobs", "strong"), ("rmi_scores", "weak")):
        assert table(settings, name, "b1", role).join(held_out, on="pair_id", how="semi").is_empty()
    texts = table(settings, "raw_data", "b1").join(held_out, on="pair_id", how="semi")
    storage = open_storage(settings)
    folder = Path(settings.storage_root).joinpath(*versions.place(versions.find_version(storage, "latest").version))
    published = [
        json.loads(line) for path in (folder / "mine").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    # A record of two turns would show the turn that is held out.
    shown = json.dumps(published, ensure_ascii=False)
    assert len(published) == summary.rows_by_decision["selected"]
    for query, answer in texts.select("query", "answer").iter_rows():
        assert json.dumps(query, ensure_ascii=False)[1:-1] not in shown or len(query) < 4
        assert json.dumps(answer, ensure_ascii=False)[1:-1] not in shown or len(answer) < 4

    query = texts.filter(pl.col("query").str.len_chars() > 10)["query"][0]
    twins = [conversation((query, "Another answer.")), conversation((query, "Yet another one."))]
    second = curate(settings, instance, tmp_path, "b2", *twins)
    assert second.reasons_by_decision["held_out"] == {"similar_to_held_out": 2}
    (row,) = row_history.find_row(storage, "b2", "1").rows
    assert row["decision"] == "held_out"
    assert row["explanation"].startswith(
        "Held out for training trials, and not scored: its cluster contains the held-out row b1/rows.jsonl:"
    )


def test_of_a_cluster_the_best_pair_is_selected(
    settings_for: SettingsFor, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    trained = settings_for(
        selections=[SELECTION | {"max_per_cluster": 1}], screening={"duplicates": {"near_threshold": None}}
    )
    records = [conversation((query, f"{answer} {number}")) for query, answer in SAMPLES[3:9] for number in range(3)]
    summary = curate(trained, instance, tmp_path, "b1", *records)
    assert summary.reasons_by_decision["not_selected"] == {"cluster_full": 12}
    best = table(trained, "decisions", "b1").join(table(trained, "screened_data", "b1"), on="pair_id")
    for _, rows in best.group_by("cluster"):
        assert rows.filter(decision="selected")["gap"].to_list() == [rows["gap"].max()]
