"""recomputation: every number of every explanation follows from the stored sums, on rows of every fate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml

from qaq_pipeline.config.load import load_settings, parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import refresh, registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.runs.summary import BatchSummary
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.conftest import NO_CALIBRATION, NO_REPORTS, SAMPLES, write_jsonl
from qaq_pipeline_tests.support.recomputation import check_batch
from qaq_pipeline_tests.support.recomputed_validity import check_validity

EXAMPLES = Path(__file__).parents[2] / "examples" / "batches" / "2026-11-02.alpaca.jsonl"
ANSWER = "Take the list, sort it by its second field, and keep every row whose first field is not empty or null. " * 3


def rows_of_every_fate() -> list[dict[str, Any]]:
    """Rows that are ranked, cut, too long, near and equal duplicates, and rejected."""
    examples = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()[:10]]
    rows = [{"query": row["instruction"], "response": row["output"]} for row in examples]
    rows += [{"query": query, "response": answer} for query, answer in SAMPLES]
    rows += [{"query": "Filter the rows of a list.", "response": ANSWER}] * 2
    rows += [{"query": "Filter the rows of a list.", "response": ANSWER + "Then stop."}]
    return [*rows, {"query": "Explain. " * 100, "response": "No."}, {"query": "", "response": "nothing was asked"}]


def curate(
    settings: Settings, instance: dg.DagsterInstance, folder: Path, rows: Sequence[dict[str, Any]]
) -> BatchSummary:
    """Curate the rows as batch b1."""
    registration.register(Deployment(settings, instance), "b1", [write_jsonl(folder / "rows.jsonl", rows)], None)
    return run_batch.run_batch(Deployment(settings, instance), "b1")


@pytest.fixture
def curated(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path
) -> tuple[Settings, Storage]:
    """Rows of every fate under two tiny models."""
    settings = settings_for(runtime={"pool": {"size": 1}})
    curate(settings, instance, tmp_path, rows_of_every_fate())
    return settings, open_storage(settings)


def test_every_number_of_an_explanation_follows_from_the_sums_and_every_row_from_what_made_it(
    curated: tuple[Settings, Storage],
) -> None:
    settings, storage = curated
    decisions = storage.tables.read("decisions", Partition("b1"))
    fates = set(decisions.frame["reason"])
    assert fates >= {"within_budget", "below_cut", "query_too_long", "exact_duplicate", "near_duplicate", "empty_query"}
    for pattern in (r"Only the first \d+ of the answer's \d+ tokens", r"The query has only \d+ tokens"):
        assert decisions.frame["explanation"].str.contains(pattern).any()
    assert check_batch(storage, settings, "b1") > 20

    made_of = storage.provenance.read(decisions.frame["provenance_id"][0])
    assert made_of.made_of == decisions.provenance
    assert hash_json(made_of.made_of) == made_of.provenance_id
    assert len(made_of.runs) == 1
    for role in ("strong", "weak"):
        scored_by = decisions.provenance["scored_by"][role]
        (scorer,) = scored_by["scored_with"]
        assert scorer["device"] == "cpu"
        assert set(scorer["libraries"]) == {"torch", "transformers", "tokenizers"}
        assert "TASK: Given an answer" in json.dumps(scored_by["template"])


def demo_settings(home: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Settings:
    """The demo's settings with its fetched models, without reports, in another home."""
    models = load_settings("demo").model_cache_dir
    if not (models / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        pytest.fail(f"{models}: no models; `make test-slow` fetches them")
    monkeypatch.setenv("QAQ_HOME", str(home))
    changes |= {"model_cache": str(models), "reports": NO_REPORTS}
    values = load_settings("demo").model_dump(mode="json", exclude_defaults=True) | changes
    return parse_settings(yaml.safe_dump(values), "demo")


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_every_number_of_the_demo_follows_from_the_sums(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = demo_settings(tmp_path, monkeypatch, **NO_CALIBRATION)
    for path in sorted(EXAMPLES.parent.iterdir()):
        batch = path.name.split(".")[0]
        registration.register(Deployment(settings, instance), batch, [path], None)
        run_batch.run_batch(Deployment(settings, instance), batch)
        print(f"{batch}: every number of {check_batch(open_storage(settings), settings, batch)} ranked rows follows")


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_every_number_of_the_validity_of_a_demo_batch_follows_from_the_scores(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = demo_settings(tmp_path, monkeypatch)
    registration.register(Deployment(settings, instance), "b1", [EXAMPLES], None)
    run_batch.run_batch(Deployment(settings, instance), "b1")
    invalid = check_validity(open_storage(settings), settings, "b1")
    print(f"every number of the reasons of {invalid} invalid rows follows")
    assert invalid > 10


JUDGED = [{"column": "record.score", "at_least": 1}, {"column": "judge.score", "at_least": 6.5}]


def composed_rows() -> list[dict[str, Any]]:
    """Rows with languages and scores, of which some have one query and other answers."""
    rows = rows_of_every_fate()
    rows += [{"query": f" {row['query']}", "response": row["response"][::-1]} for row in rows[:12]]
    languages = ["python", None, "go", "python", "go"]
    return [row | {"score": number % 10, "language": languages[number % 5]} for number, row in enumerate(rows)]


def write_scores(path: Path, scores: Sequence[object]) -> None:
    """A table of a judge's scores, with an empty one, no row for the last rows, and a row of another batch."""
    rows = [f"b1/rows.jsonl:{row}.0,{'' if row == 4 else score}\n" for row, score in enumerate(scores, start=1)]
    path.write_text("row,score,unread\n" + "".join(rows) + "b0/rows.jsonl:1.0,9\n", encoding="utf-8")


@pytest.mark.parametrize("quotas", [None, {"per": "language", "shares": "equal"}], ids=["ordered", "by_quotas"])
def test_every_number_of_a_composed_selection_follows_too(
    quotas: dict[str, Any] | None, settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    judge = tmp_path / "judge.csv"
    write_scores(judge, [5 + row % 5 / 2 for row in range(40)])
    grammar = {"where": JUDGED, "max_per_query": 1, "quotas": quotas}
    composed = {"name": "judged", "strategy": "diff_high", "budget": {"fraction": 0.25}} | grammar
    settings = settings_for(
        runtime={"pool": {"size": 1}},
        selections=[composed],
        tables=[{"name": "judge", "path": str(judge), "key": "row"}],
    )
    summary = curate(settings, instance, tmp_path, composed_rows())
    storage = open_storage(settings)
    decisions = storage.tables.read("decisions", Partition("b1"))
    full = {"below_cut"} if quotas is None else {"quota_full"}
    assert set(decisions.frame["reason"]) >= {"within_budget", "where_not_met", "query_full"} | full
    assert check_batch(storage, settings, "b1") > 20
    assert decisions.provenance["tables"] == {"judge": hashlib.sha256(judge.read_bytes()).hexdigest()}
    taken = summary.selected_by_selection
    assert taken["control_random"] == taken["control_stratified_random"] == taken["judged"] > 0

    write_scores(judge, [9] * 40)
    (stale,) = Deployment(settings, instance).freshness().stale("b1")
    assert (stale.table, stale.reason) == (
        "decisions",
        "decisions was made from another file of the imported table judge",
    )
    refresh.refresh_all(Deployment(settings, instance))
    assert check_batch(storage, settings, "b1") > 20
    assert Deployment(settings, instance).freshness().stale("b1") == []
    judge.unlink()
    with pytest.raises(RunError, match=r"table judge, .*judge\.csv: cannot be opened"):
        refresh.refresh_all(Deployment(settings, instance))


def test_a_number_that_does_not_follow_is_found(curated: tuple[Settings, Storage]) -> None:
    settings, storage = curated
    logprobs = storage.tables.read("logprobs", Partition("b1", "weak"))
    moved = logprobs.frame.with_columns(sum_nll_q=pl.col("sum_nll_q") * (1 + pl.int_range(pl.len()) % 3))
    storage.tables.write(StoredTable(moved, logprobs.provenance), "logprobs", Partition("b1", "weak"))
    with pytest.raises(AssertionError):
        check_batch(storage, settings, "b1")
