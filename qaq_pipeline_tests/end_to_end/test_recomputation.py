"""recomputation: every number of every explanation follows from the stored sums, on rows of every fate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
import yaml

from qaq_pipeline.config.load import load_settings, parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.tables import StoredTable
from qaq_pipeline_tests.conftest import NO_REPORTS, SAMPLES, write_jsonl
from qaq_pipeline_tests.support.recomputation import check_batch

EXAMPLES = Path(__file__).parents[2] / "examples" / "batches" / "2026-11-02.alpaca.jsonl"
ANSWER = "Take the list, sort it by its second field, and keep every row whose first field is not empty or null. " * 3


@pytest.fixture
def curated(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Path
) -> tuple[Settings, Storage]:
    """Rows of every fate under two tiny models: ranked, cut, too long, near and equal duplicates, rejected."""
    settings = settings_for(runtime={"processes": 1})
    examples = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()[:10]]
    rows = [{"query": row["instruction"], "response": row["output"]} for row in examples]
    rows += [{"query": query, "response": answer} for query, answer in SAMPLES]
    rows += [{"query": "Filter the rows of a list.", "response": ANSWER}] * 2
    rows += [{"query": "Filter the rows of a list.", "response": ANSWER + "Then stop."}]
    rows += [{"query": "Explain. " * 100, "response": "No."}, {"query": "", "response": "nothing was asked"}]
    registration.register(Deployment(settings, instance), "b1", [write_jsonl(tmp_path / "rows.jsonl", rows)], None)
    run_batch.run_batch(Deployment(settings, instance), "b1")
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


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.timeout(3600)
def test_every_number_of_the_demo_follows_from_the_sums(
    instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = load_settings("demo").model_cache_dir
    if not (models / "SmolLM2-135M-Instruct.Q4_1.gguf").exists():
        pytest.fail(f"{models}: no models; `make test-slow` fetches them")
    monkeypatch.setenv("QAQ_HOME", str(tmp_path))
    changes = {"model_cache": str(models), "reports": NO_REPORTS, "calibration": {"enabled": False}}
    values = load_settings("demo").model_dump(mode="json", exclude_defaults=True) | changes
    settings = parse_settings(yaml.safe_dump(values), "demo")
    for path in sorted(EXAMPLES.parent.iterdir()):
        batch = path.name.split(".")[0]
        registration.register(Deployment(settings, instance), batch, [path], None)
        run_batch.run_batch(Deployment(settings, instance), batch)
        print(f"{batch}: every number of {check_batch(open_storage(settings), settings, batch)} ranked rows follows")


def test_a_number_that_does_not_follow_is_found(curated: tuple[Settings, Storage]) -> None:
    settings, storage = curated
    logprobs = storage.tables.read("logprobs", Partition("b1", "weak"))
    moved = logprobs.frame.with_columns(sum_nll_q=pl.col("sum_nll_q") * (1 + pl.int_range(pl.len()) % 3))
    storage.tables.write(StoredTable(moved, logprobs.provenance), "logprobs", Partition("b1", "weak"))
    with pytest.raises(AssertionError):
        check_batch(storage, settings, "b1")
