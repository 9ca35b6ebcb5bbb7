"""The Dagster UI as a person meets it in a browser: what is visible, and that a click materialises a batch.

Two batches of tiny models: b1 was curated by `qaq run`, b2 is registered only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from playwright.sync_api import Page, expect

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.publication import versions
from qaq_pipeline.runs import deployment, registration
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import NO_REPORTS, write_jsonl
from qaq_pipeline_tests.support.browsing import VIEWPORT, metadata_value, seen, take_picture
from qaq_pipeline_tests.support.server import NEEDS_CHROMIUM, PATIENCE_S, curated_ui, variables_of, write_profile
from qaq_pipeline_tests.support.uncalibrated import STAGES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.timeout(900),
    NEEDS_CHROMIUM,
]


@dataclass(frozen=True)
class Site:
    """The running UI, and what stands behind it."""

    url: str
    settings: Settings
    model_names: dict[str, str]
    """Names of the models' folders, by role."""


# --- the UI, started and ended -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path], twenty_samples: list[Pair]
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ui")
    models = {role: tiny_model_dir(seed=seed) for seed, role in enumerate(("strong", "weak"))}
    home, profile = folder / "home", write_profile(folder / "settings.yaml", models, reports=NO_REPORTS)
    rows = [{"instruction": pair.query, "output": pair.answer} for pair in twenty_samples]
    files = {batch: write_jsonl(folder / f"{batch}.jsonl", rows) for batch in ("b1", "b2")}
    variables = variables_of(home, profile)
    settings = register(files["b2"], "b2", variables)
    with curated_ui(variables, "b1", files["b1"], folder / "ui.log") as url:
        yield Site(url, settings, {role: path.name for role, path in models.items()})


def register(file: Path, batch: str, variables: dict[str, str]) -> Settings:
    """Deliver a batch and add its partition, as `qaq run` does before it materialises anything."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = load_settings()
        with deployment.open_instance() as instance:
            registration.register(deployment.Deployment(settings, instance), batch, [file], None)
    return settings


# --- what a person sees --------------------------------------------------------------------------------------------


def test_partitions_are_batches_by_models(page: Page, site: Site, pictures: Path):
    page.goto(f"{site.url}/assets/logprobs?view=partitions")

    for key in ("b1", "b2", "strong", "weak", "Materialized (2)", "Missing (2)", "Failed (0)"):
        expect(seen(page, key)).to_be_in_viewport(ratio=1)
    take_picture(page, pictures / "partitions.png")


def test_partition_tells_model_prompt_speed_and_provenance(page: Page, site: Site, pictures: Path):
    provenance = open_storage(site.settings).tables.read("logprobs", Partition("b1", "strong")).provenance
    identity = provenance["identity"]
    page.set_viewport_size({"width": VIEWPORT[0], "height": 1150})
    page.goto(f"{site.url}/assets/logprobs?view=partitions&partition={quote('b1|strong')}")

    expect(seen(page, "b1|strong")).to_be_in_viewport(ratio=1)
    shown = {
        "model": site.model_names["strong"],
        "revision": identity["revision"],
        "dtype": "float32",
        "template_hash": identity["template_hash"],
        "identity_hash": provenance["identity_hash"],
        "pairs": "20",
    }
    for key, value in shown.items():
        expect(metadata_value(page, key)).to_have_text(value)
        expect(seen(page, key)).to_be_in_viewport(ratio=1)
    for key in ("tokens", "tokens_per_second", "seconds"):
        expect(metadata_value(page, key)).to_have_text(re.compile(r"^[1-9]\d*(\.\d+)?$|^0\.\d+$"))
    take_picture(page, pictures / "partition_metadata.png")
    metadata_value(page, "provenance").get_by_text("Show JSON").click()
    expect(page.get_by_role("dialog")).to_contain_text(provenance["inputs"]["screened_data"])
    take_picture(page, pictures / "provenance.png")


def test_overview_shows_description_row_count_and_columns(page: Page, site: Site, pictures: Path):
    column = tables.Logprobs.columns()["sum_nll_q_given_a"]
    page.goto(f"{site.url}/assets/logprobs?view=overview")

    expect(seen(page, " ".join((tables.Logprobs.__doc__ or "").split()))).to_be_in_viewport(ratio=1)
    expect(seen(page, "Row count")).to_be_in_viewport(ratio=1)
    expect(seen(page, "20")).to_be_in_viewport(ratio=1)
    row = page.get_by_role("row").filter(has=page.get_by_text("sum_nll_q_given_a", exact=True)).first
    for text in ("Float64", str(column.description), "unit: nats"):
        expect(seen(row, text)).to_be_in_viewport(ratio=1)
    take_picture(page, pictures / "column_schema.png")


def test_batch_is_materialised_by_clicking(page: Page, site: Site, pictures: Path):
    storage = open_storage(site.settings)
    assert not storage.tables.has("raw_data", Partition("b2"))

    for number, asset in enumerate(STAGES["ingest_batch"]):
        materialise(page, site, asset, "b2", pictures / f"materialise_{number}.png")
    assert storage.tables.read("screened_data", Partition("b2")).frame.height == 20

    page.goto(f"{site.url}/assets/raw_data?view=partitions&partition=b2")
    expect(metadata_value(page, "dagster/row_count")).to_have_text("20")
    take_picture(page, pictures / "materialised.png")


def materialise(page: Page, site: Site, asset: str, partition: str, picture: Path) -> None:
    page.goto(f"{site.url}/assets/{asset}?view=partitions")
    page.locator("button", has_text=re.compile("^Materialize")).click()
    dialog = page.get_by_role("dialog").filter(has_text=f"Launch runs to materialize {asset}")
    dialog.get_by_text("Select a partition or create one").click()
    page.get_by_role("menuitem").filter(has_text=partition).filter(visible=True).click()
    page.keyboard.press("Escape")  # Closes the list of partitions.
    expect(seen(dialog, "1 partition")).to_be_visible()
    take_picture(page, picture)
    dialog.get_by_role("button", name="Launch 1 run").click()
    page.get_by_text("View", exact=True).filter(visible=True).click()
    ended = page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).filter(visible=True).first
    expect(ended).to_be_visible(timeout=PATIENCE_S * 1000)
    expect(ended).to_have_text("Success")


def test_curated_dataset_shows_version_and_excluded_batches(page: Page, site: Site, pictures: Path):
    latest = versions.find_version(open_storage(site.settings), "latest")
    assert set(latest.excluded_batches) == {"b2"}
    page.goto(f"{site.url}/assets/curated_dataset?view=events")

    expect(metadata_value(page, "version")).to_have_text(latest.version)
    expect(metadata_value(page, "excluded_batches")).to_have_text(json.dumps(latest.excluded_batches, indent=2))
    expect(metadata_value(page, "rows_in")).to_have_text("20")
    take_picture(page, pictures / "curated_dataset.png")
