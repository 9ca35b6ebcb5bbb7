"""A year of weekly batches in one home: the time per batch stays flat, and the UI answers at the end of it."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment, open_instance
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.server import (
    CHROMIUM,
    CHROMIUM_OPTIONS,
    NEEDS_CHROMIUM,
    assert_nothing_runs,
    running_ui,
    write_profile,
)

WEEKS = int(os.environ.get("QAQ_TEST_WEEKS", "52"))
ROWS = 300
WORDS = ["list", "string", "index", "file", "tree", "graph", "query", "sort", "cache", "token", "parse", "shell"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.timeout(3600),
    NEEDS_CHROMIUM,
]


def week_of_rows(week: int) -> list[dict[str, str]]:
    """Rows of words drawn by the week; each tenth repeats one of the week before."""
    return [_row(week - 1, n + 1) if week and n % 10 == 0 else _row(week, n) for n in range(ROWS)]


def _row(week: int, number: int) -> dict[str, str]:
    drawn = random.Random(f"{week} {number}").choices(WORDS, k=18)
    query = f"Write a function {week}-{number}: {' '.join(drawn[:8])}?"
    return {"query": query, "response": f"def f_{number}():\n    return {' + '.join(drawn[8:])}\n"}


def test_a_year_of_weekly_batches_is_no_slower_at_its_end_and_the_ui_answers(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {role: tiny_model_dir(seed=seed) for seed, role in enumerate(("strong", "weak"))}
    home, profile = tmp_path / "home", tmp_path / "settings.yaml"
    scoring = {"max_tokens": 512, "quantities": ["rmi"]}
    write_profile(profile, models, scoring=scoring, ranking={}, publication={"keep_versions": 4})
    variables = {"QAQ_HOME": str(home), "QAQ_CONFIG": str(profile), "DAGSTER_HOME": str(home / "dagster")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    seconds = []
    with open_instance() as instance:
        for week in range(WEEKS):
            batch = f"week-{week + 1:02}"
            file = write_jsonl(tmp_path / "delivered" / f"{batch}.jsonl", week_of_rows(week))
            started = time.monotonic()
            registration.register(Deployment(settings, instance), batch, [file], None)
            summary = run_batch.run_batch(Deployment(settings, instance), batch)
            seconds.append(time.monotonic() - started)
            assert sum(summary.rows_by_decision.values()) == ROWS
            assert summary.rows_by_decision["duplicate"] == (ROWS // 10 if week else 0)
    storage = open_storage(settings)
    manifest = versions.read_manifest(storage, versions.find_version(storage, "latest").version)
    assert sum(entry["rows_in"] for entry in manifest["batches"]) == WEEKS * ROWS
    sizes = {
        name: sum(path.stat().st_size for path in (home / name).rglob("*") if path.is_file()) / 1e6
        for name in ("dagster", "storage")
    }
    quarter = max(1, WEEKS // 4)
    first, last = statistics.median(seconds[1 : 1 + quarter]), statistics.median(seconds[-quarter:])
    print(f"seconds a batch: {' '.join(f'{one:.1f}' for one in seconds)}")
    print(f"median of the first quarter {first:.2f} s, of the last {last:.2f} s: {last / first:.2f} times")
    print(f"event log, runs and their logs: {sizes['dagster']:.1f} MB; storage: {sizes['storage']:.1f} MB")
    with running_ui({**os.environ, **variables}, tmp_path / "ui.log") as url:
        look_at(url)
    assert_nothing_runs(home)
    assert last < 1.5 * first


def look_at(url: str) -> None:
    """The pages that a person opens first."""
    pages = {
        "assets/raw_data?view=partitions": f"Materialized ({WEEKS})",
        "assets/curated_dataset": "curated_dataset",
        "runs": "publish_dataset",
        "locations/qaq_pipeline/asset-groups/ingest/lineage": "screened_data",
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        for path, text in pages.items():
            started = time.monotonic()
            page.goto(f"{url}/{path}")
            expect(page.get_by_text(text).first).to_be_visible(timeout=90_000)
            expect(page.get_by_text("Loading...")).to_have_count(0, timeout=90_000)
            print(f"/{path}: shown after {time.monotonic() - started:.1f} s")
        folder = os.environ.get("QAQ_SCREENSHOTS")
        if folder:
            page.screenshot(path=str(Path(folder) / "after_a_year.png"))
        browser.close()
