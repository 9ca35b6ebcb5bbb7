"""The Dagster UI as an auditor uses it: by clicks from the dataset back to the delivery, and what every page says.

A batch of the examples was curated and calibrated with tiny models, by `qaq run`. What is expected is read from the
definitions and from the storage; what counts is what is visible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.orchestration.assets import build_assets
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import versions
from qaq_pipeline.reports import page_store
from qaq_pipeline.schema import column_lineage
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline_tests.support.browsing import latest_value, metadata_value, row_of, seen, take_picture, watched
from qaq_pipeline_tests.support.server import NEEDS_CHROMIUM, REPOSITORY, curated_ui, variables_of, write_profile

pytestmark = [pytest.mark.slow, pytest.mark.browser, pytest.mark.timeout(1800), NEEDS_CHROMIUM]

BATCH = "week-45"
DELIVERY = REPOSITORY / "examples" / "batches" / "2026-11-02.alpaca.jsonl"
WAY_BACK = [
    "selected_subset",
    "decisions",
    "disagreement_scores",
    "rmi_scores",
    "logprobs",
    "screened_data",
    "raw_data",
]
"""From curated_dataset on, each is one click from the one before it."""

GRAPH_VIEWPORT = (1500, 1900)
"""As the graph is laid out: it is made to fit by its width, and is cut in a lower window."""

PLOTS = {
    "decisions": ["plot_by_reason"],
    "disagreement_scores": ["plot_ranks"],
    "batch_report": ["plot_flow", "plot_overlap", "plot_ranks_selected", "plot_query_tokens", "plot_answer_tokens"],
}


@dataclass(frozen=True)
class Site:
    """The running UI, and what stands behind it."""

    url: str
    storage: Storage
    specs: dict[str, dg.AssetSpec]
    """As the definitions have them, by asset."""

    def version(self) -> str:
        return versions.find_version(self.storage, "latest").version


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ui_audit")
    models = {role: tiny_model_dir(seed=seed, max_context=2048) for seed, role in enumerate(("strong", "weak"))}
    profile = write_profile(
        folder / "settings.yaml",
        models,
        scoring={"max_tokens": 2048},
        ranking={"num_strata": 4, "min_rows_per_stratum": 10},
        calibration={"mismatches": 24, "rows_per_defect": 24},
    )
    variables = variables_of(folder / "home", profile)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings = load_settings()
        specs = {asset.key.to_user_string(): next(iter(asset.specs)) for asset in build_assets(settings)}
    with curated_ui(variables, BATCH, DELIVERY, folder / "ui.log") as url:
        yield Site(url, open_storage(settings), specs)


# --- the graph -----------------------------------------------------------------------------------------------------


def test_lineage_shows_all_assets_in_one_picture(page: Page, site: Site, pictures: Path):
    page.set_viewport_size({"width": GRAPH_VIEWPORT[0], "height": GRAPH_VIEWPORT[1]})
    page.goto(f"{site.url}/asset-groups")
    graph = page.locator("svg")
    groups = {str(spec.group_name) for spec in site.specs.values()}
    for group in groups:
        expect(seen(graph, group)).to_be_in_viewport(ratio=1)
    page.get_by_text("Hide navigation").click()
    page.keyboard.press("Alt+KeyE")  # Expands all groups.

    for name in groups:
        expect(seen(graph, name)).to_be_in_viewport(ratio=1)
    for name in site.specs:
        expect(graph.get_by_text(cut_or_whole(name)).filter(visible=True).first).to_be_in_viewport(ratio=1)
    take_picture(page, pictures / "lineage.png")


def cut_or_whole(name: str) -> re.Pattern[str]:
    """The name, of which a node shows both ends where it is long."""
    return re.compile(f"^({name}|{name[:5]}.*….*{name[-5:]})$")


# --- the way back --------------------------------------------------------------------------------------------------


def test_clicks_lead_from_the_dataset_to_the_delivery(page: Page, site: Site, pictures: Path):
    page.set_viewport_size({"width": 1450, "height": 1180})
    page.goto(f"{site.url}/assets/curated_dataset?view=overview")
    page.get_by_text("Hide navigation").click()
    assert_defined(page, site.specs["curated_dataset"])
    version = site.version()
    expect(latest_value(page, "version")).to_have_text(version)
    manifest = versions.read_manifest(site.storage, version)
    (entered,) = manifest["batches"]
    for table, data_version in entered["data_versions"].items():
        row = latest_value(page, "made_from").get_by_role("row").filter(has=page.get_by_text(table, exact=True))
        expect(row).to_contain_text(data_version)
    expect(seen(page, f"qaq lineage {version} --verify")).to_be_visible()
    take_picture(page, pictures / "audit_dataset.png")

    for name in WAY_BACK:
        upstream(page, name).click()
        expect(page).to_have_url(re.compile(f"/assets/{name}\\b"))
        assert_defined(page, site.specs[name])
        assert_columns(page, name)
        rows = site.storage.tables.footer(name, Partition(BATCH, *model_of(site, name))).num_rows
        expect(seen(page, "Row count")).to_be_visible()
        expect(seen(page, f"{rows:,}")).to_be_visible()
        take_picture(page, pictures / f"audit_{name}.png")

    expect(latest_value(page, "files")).to_contain_text(DELIVERY.name)
    (file_hash,) = site.storage.tables.footer("raw_data", Partition(BATCH)).provenance["files"].values()
    expect(latest_value(page, "files")).to_contain_text(file_hash)


def upstream(page: Page, name: str) -> Locator:
    """The link to an asset that the shown one is made of."""
    return page.locator(f'a[href="/assets/{name}"]').filter(visible=True).first


def model_of(site: Site, name: str) -> tuple[str, ...]:
    return ("strong",) if isinstance(site.specs[name].partitions_def, dg.MultiPartitionsDefinition) else ()


def assert_defined(page: Page, spec: dg.AssetSpec) -> None:
    """The page says what the asset is, and whose."""
    expect(page.get_by_text("Definition", exact=True).filter(visible=True).first).to_be_visible()
    first, *_ = (spec.description or "").split("\n\n")
    assert len(first) > 40, f"{spec.key}: a description that says little"
    expect(seen(page, " ".join(first.split()))).to_be_visible()
    expect(seen(page, str(spec.group_name))).to_be_visible()
    for kind in spec.kinds:
        expect(page.get_by_text(re.compile(r"^\W*" + r"\s?".join(kind) + "$", re.IGNORECASE)).first).to_be_visible()
    for owner in spec.owners:
        expect(seen(page, owner.removeprefix("team:"))).to_be_visible()
    for key, value in spec.tags.items():
        if not key.startswith("dagster/"):
            expect(seen(page, f"{key}: {value}")).to_be_visible()


def assert_columns(page: Page, name: str) -> None:
    """Every column with its type and its description, none of which is cut."""
    for column, definition in PIPELINE.tables()[name].columns().items():
        row = row_of(page, column)
        assert definition.description, f"{name}.{column}"
        expect(row).to_contain_text(definition.description.replace("`", ""))
        cut = row.evaluate(
            "row => [...row.querySelectorAll('*')].filter(e => e.children.length === 0"
            " && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === 'hidden').map(e => e.innerText)"
        )
        assert cut == [], f"{name}.{column}"


def test_a_page_says_of_what_its_columns_are_made(page: Page, site: Site, pictures: Path):
    page.set_viewport_size({"width": 1500, "height": 1100})
    page.goto(f"{site.url}/assets/disagreement_scores?view=partitions&partition={BATCH}")

    table = metadata_value(page, "columns_made_of")
    for column, sources in column_lineage.sources_in(
        PIPELINE.column_sources, "disagreement_scores", {"rmi_scores"}
    ).items():
        row = table.get_by_role("row").filter(has=page.get_by_text(column, exact=True)).first
        for name, source in sources:
            expect(seen(row, f"{name}.{source}")).to_be_visible()
    take_picture(page, pictures / "audit_columns.png")


# --- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asset", PLOTS)
def test_plots_are_drawn(page: Page, site: Site, pictures: Path, asset: str):
    page.goto(f"{site.url}/assets/{asset}?view=partitions&partition={BATCH}")
    for plot in PLOTS[asset]:
        metadata_value(page, plot).get_by_text("Show Markdown").click()
        dialog = page.get_by_role("dialog").filter(visible=True)
        assert_loaded(dialog.get_by_role("img").and_(page.locator("img")))
        expect(dialog.locator("p").last).to_have_text(re.compile(r"\w.*\.$"))
        take_picture(page, pictures / f"audit_{plot}.png")
        dialog.get_by_role("button", name="Close").click()


def assert_loaded(image: Locator) -> None:
    expect(image).to_be_visible()
    assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 0


@pytest.mark.parametrize(
    ("asset", "check", "numbers"),
    [
        ("decisions", "every_row_is_decided", ["rows", "decisions", "selected_share"]),
        ("screened_data", "passes_gate", []),
        ("calibration", "models_can_tell", ["auroc_other_answer_strong", "auroc_other_answer_weak"]),
        ("curated_dataset", "files_are_as_published", []),
    ],
)
def test_checks_say_their_numbers(page: Page, site: Site, pictures: Path, asset: str, check: str, numbers: list[str]):
    page.goto(f"{site.url}/assets/{asset}?view=checks&checkDetail={check}")

    expect(seen(page, "Latest execution")).to_be_visible()
    expect(page.get_by_text(re.compile("^(Passed|Warning|Warn|Failed)$")).filter(visible=True).first).to_be_visible()
    for number in numbers:
        expect(row_of(page, number)).to_have_text(re.compile(r"\d"))
    take_picture(page, pictures / f"audit_check_{check}.png")


def test_calibration_says_what_the_scores_can_tell(page: Page, site: Site, pictures: Path):
    page.set_viewport_size({"width": 1500, "height": 1150})
    page.goto(f"{site.url}/assets/calibration?view=partitions&partition={BATCH}")

    expect(metadata_value(page, "findings")).to_contain_text(re.compile(r"\w.*\."))
    expect(metadata_value(page, "page")).to_contain_text(site.storage.files.url(*page_store.calibration_page(BATCH)))
    take_picture(page, pictures / "audit_calibration.png")


# --- the pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch_report", "calibration", "dataset_report"])
def test_the_page_that_an_asset_names_opens_without_a_network(
    page: Page, browser: Browser, site: Site, pictures: Path, name: str
):
    view = "overview" if site.specs[name].partitions_def is None else f"partitions&partition={BATCH}"
    page.goto(f"{site.url}/assets/{name}?view={view}")
    value = latest_value if view == "overview" else metadata_value
    file = Path(value(page, "page").inner_text().strip())
    assert file.is_file()

    asked: list[str] = []
    with watched(browser) as context:
        context.on("request", lambda request: asked.append(request.url))
        report = context.new_page()
        report.goto(file.as_uri())
        expect(report.get_by_role("heading", level=1)).to_be_visible()
        assert report.locator("svg").count() > 0
        take_picture(report, pictures / f"audit_page_{name}.png")
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
