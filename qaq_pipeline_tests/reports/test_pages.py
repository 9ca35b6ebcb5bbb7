"""pages: self-contained pages, no script from a row, the numbers of the tables."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.config.settings import ExportSettings
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import curated_dataset, exports
from qaq_pipeline.publication.curated_dataset import BatchTables
from qaq_pipeline.publication.earlier_version import NO_VERSION
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.reports import page_rows, pages
from qaq_pipeline.reports.pages import Example, Made, Scoring
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.column_lineage import Column
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import GateReason, Signal
from qaq_pipeline.screening import gates
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY, VALIDITY_KEY
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.reports.test_summaries import SETTINGS
from qaq_pipeline_tests.support import synthetic
from qaq_pipeline_tests.support.frames import IDENTITY, rejected
from qaq_pipeline_tests.support.server import CHROMIUM, CHROMIUM_OPTIONS, NEEDS_CHROMIUM

DERIVED = PIPELINE.column_sources

MADE = Made("2026-11-25T12:00:00+00:00", "a-run", "1-x")
EVERY_FORMAT = ("alpaca", "messages", "parquet", "prompt_completion", "sharegpt")
"""All of `export.formats` except `hf`, which needs the extra `datasets`."""
CONTROLS = ["control_random", "control_stratified_random"]
SCORED = {
    "identity": dataclasses.asdict(IDENTITY),
    "frame": "chat",
    "identity_hash": "i",
    "scored_with": [{"libraries": {"torch": "2.13"}, "device": device} for device in ("cpu", "cuda")],
}
HOSTILE = {
    1: {"query": "my password is hunter2", "answer": "thanks"},
    97: rejected(detail="<i>blank</i>")  # One of three rejected rows, so always among the examples.
    | {
        "query": "<script>alert('q')</script> **md** [x](javascript:alert(1)) \u202edlrow\x00",
        "answer": "</pre><img src=http://evil.example/x onerror=alert(1)>{{ 7 * 7 }}" + "x" * 9_000,
    },
    5: {"language": "<b>py</b>", "source": "<svg onload=alert(1)>\u202e"},
}


class Seen(HTMLParser):
    """The tags, attributes and table cells of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._caption: str | None = None
        self._in: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self._caption = ""
        elif tag == "tr" and self._caption is not None:
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th") and self._caption in self.tables:
            self.tables[self._caption][-1].append("")
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = None
        if tag == "table":
            self._caption = None

    def handle_data(self, data: str) -> None:
        if self._in == "caption":
            self._caption = (self._caption or "") + data
        elif self._in in ("td", "th", "a") and self._caption in self.tables:
            self.tables[self._caption][-1][-1] += data


NO_LINKS = {"calibration": None, "rows": None}
NONE_INVALID = dict.fromkeys((one.value for one in Signal), 0)


def page_of(
    num_rows: int = 300, changes: dict[int, dict[str, Any]] | None = None, **options: Any
) -> tuple[bytes, BatchTables]:
    made = synthetic.batch(SETTINGS, num_rows, changes=changes)
    scorings = [Scoring(role, StoredTable(frame, SCORED), options.get("cost")) for role, frame in made.scores.items()]
    tables = options.get("changed", lambda tables: tables)(made.tables)
    frozen = ("r1", rank_reference.freeze([made.scores], SETTINGS.ranking)[0]) if options.get("frozen") else None
    links = NO_LINKS | {"calibration": options.get("calibration")}
    rows = page_rows.of_batch(tables)
    return pages.batch_page(tables, rows, scorings, SETTINGS.published, frozen, MADE, 10, links), tables


def changed(tables: BatchTables, **others: StoredTable) -> BatchTables:
    return BatchTables(tables.batch, {**tables.tables, **others})


def withdraw(tables: BatchTables) -> BatchTables:
    """Withdraw row 1."""
    first = pl.col("source_row") == 1
    frame = tables["decisions"].frame.with_columns(
        decision=pl.when(first).then(pl.lit("withdrawn")).otherwise("decision"),
        reason=pl.when(first).then(pl.lit("row_withdrawn")).otherwise("reason"),
    )
    decisions = StoredTable(frame, tables["decisions"].provenance)
    return changed(tables, decisions=decisions)


# Drawing a page takes two seconds, so most tests share two pages.
@pytest.fixture(scope="module")
def hostile() -> bytes:
    return page_of(changes=HOSTILE, changed=withdraw)[0]


@pytest.fixture(scope="module")
def plain() -> tuple[bytes, BatchTables]:
    cost = {"seconds": 7200.0, "processes": 2, "tokens": 1_234_567, "quantities_scored": 10}
    return page_of(cost=cost, frozen=True, calibration="calibration.html")


def test_a_page_asks_nobody_and_runs_nothing_whatever_rows_hold(hostile: bytes) -> None:
    seen = Seen(hostile)
    assert {tag for tag, _ in seen.tags} & {"script", "img", "iframe", "object", "embed", "link", "b", "base"} == set()
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "../")), (tag, attributes)
    text = hostile.decode()
    assert "&lt;script&gt;alert(&#39;q&#39;)&lt;/script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "⟦U+202E⟧dlrow⟦U+0000⟧" in text
    assert not re.search("[\x00-\x08\u202a-\u202e\u2066-\u2069]", text)
    assert "url(http" not in text
    assert "@import" not in text


def test_a_batch_page_says_first_what_became_of_the_batch_and_last_by_which_hashes(
    plain: tuple[bytes, BatchTables],
) -> None:
    page, tables = plain[0].decode(), plain[1]
    taken, delivered = tables["selected_subset"].frame.height, tables["raw_data"].frame.height
    said = f'<p class="verdict">{taken} of its {delivered} rows are selected by diff_high.</p>'
    places = [page.index(part) for part in (said, "<table>", 'id="examples"', 'id="limits"', 'id="made-of"')]
    assert places == sorted(places)


def test_a_batch_page_names_the_signal_that_declares_most_pairs_invalid() -> None:
    judged = {
        "valid_pairs": 7,
        "invalid_pairs": NONE_INVALID | {"echo": 1, "mismatch": 2},
        "signals": [],
        "warnings": [],
    }

    def with_verdicts(tables: BatchTables) -> BatchTables:
        decided = tables["decisions"]
        return changed(tables, decisions=StoredTable(decided.frame, decided.provenance | {VALIDITY_KEY: judged}))

    page = page_of(40, changed=with_verdicts)[0].decode()
    assert "Of 10 distinct pairs, 3 are invalid, most often by the signal mismatch (2).</p>" in page


def test_a_plot_of_no_rows_is_named_and_not_drawn(hostile: bytes) -> None:
    page = page_of(0)[0].decode()
    assert "<figure>" not in page
    assert "Not drawn, because there are no such rows: From delivered to selected" in page
    assert "Not drawn" not in hostile.decode()


def test_sentences_that_all_examples_of_a_group_begin_with_are_shown_once() -> None:
    def example(explanation: str) -> Example:
        return Example("b1/a.jsonl:1.0", "not_selected", "below_cut", explanation, {}, "")

    same = [
        example("No. It has 0.5 of it. Here 1."),
        example("No. It has 0.5 of it. Here 2."),
        example("No. It has 0.5 of"),
    ]
    assert pages._shared(same[:2]) == "No. It has 0.5 of it. "
    assert pages._shared(same) == "No. "
    assert pages._shared(same[:1]) == ""


def test_a_long_text_is_clipped_and_stands_in_full_behind(hostile: bytes) -> None:
    assert "answer in full, 9,0" in hostile.decode()
    assert "characters are not shown here" in hostile.decode()
    assert len(hostile) < 2_000_000


def test_numbers_of_a_page_add_up_to_the_tables(plain: tuple[bytes, BatchTables]) -> None:
    page, tables = plain
    seen = Seen(page)
    outcome = seen.tables["Rows by decision and reason"]
    counts = tables["decisions"].frame.group_by("decision", "reason").len()
    assert {(a, b): int(n.replace(",", "")) for a, b, n, _ in outcome[1:-1]} == {
        (a, b): n for a, b, n in counts.iter_rows()
    }
    assert int(outcome[-1][2]) == tables["raw_data"].frame.height
    files = seen.tables["Delivered files"]
    assert files[1] == ["rows.jsonl", "f" * 64, str(tables["raw_data"].frame.height)]
    sizes = {row[0]: int(row[2]) for row in seen.tables["Selections and controls"][1:]}
    assert sizes["diff_high"] == sizes["control_random"] == tables["selected_subset"].frame.height
    assert tables["decisions"].provenance_id in page.decode()


def test_what_the_event_log_does_not_say_is_unknown_and_what_it_says_is_shown(
    hostile: bytes, plain: tuple[bytes, BatchTables]
) -> None:
    unknown = Seen(hostile).tables["Throughput and cost of scoring"]
    assert {cell for row in unknown[1:] for cell in row[1:]} == {"unknown"}
    known = {row[0]: row[1] for row in Seen(plain[0]).tables["Throughput and cost of scoring"]}
    assert (known["tokens"], known["device hours"], known["tokens/s"]) == ("1,234,567", "4.0000", "unknown")


def test_the_models_come_with_their_identity_and_with_what_scored_their_pairs(
    plain: tuple[bytes, BatchTables],
) -> None:
    known = {row[0]: row[1:] for row in Seen(plain[0]).tables["The models that scored"]}
    assert known["revision"] == [IDENTITY.revision] * 2
    assert known["scored with"] == ["torch 2.13, on cpu; torch 2.13, on cuda"] * 2


def gate(tables: BatchTables) -> BatchTables:
    sentence = "3 of its 4 rows cannot be read <b>"
    verdict = {gates.PROVENANCE_KEY: Gate(GateReason.TOO_MANY_REJECTED, sentence).as_json()}
    frame = tables["decisions"].frame.with_columns(
        decision=pl.lit("batch_gated"), reason=pl.lit("too_many_rejected"), verdicts=pl.col("verdicts").list.head(0)
    )
    decisions = StoredTable(frame, tables["decisions"].provenance | verdict)
    return changed(tables, decisions=decisions)


def test_a_gated_batch_gets_a_page_that_says_so() -> None:
    text = page_of(changed=gate)[0].decode()
    assert "Not published (too_many_rejected):" in text
    assert "3 of its 4 rows cannot be read &lt;b&gt;" in text
    assert "<strong>0</strong> rows selected" in text


def judge_invalid(tables: BatchTables) -> BatchTables:
    """Declare the pairs that were not selected for `below_cut` invalid, and tell of it in the provenance."""
    decided = tables["decisions"].frame.with_columns(
        reason=pl.when(reason="below_cut").then(pl.lit("invalid_mismatch")).otherwise("reason")
    )
    counts = {"echo": 0, "mismatch": 1_234}
    judged = {"warnings": ["<b>RMI</b> tells nothing"], "signals": ["mismatch: 5% of the pairs"]}
    judged |= {"valid_pairs": 3_766, "invalid_pairs": NONE_INVALID | counts}
    unreached = {"diff_high": "takes 4 of at most 5 pairs", "other": "takes 1 of at most 2 pairs"}
    facts = {VALIDITY_KEY: judged, UNREACHED_KEY: unreached}
    return changed(tables, decisions=StoredTable(decided, tables["decisions"].provenance | facts))


def test_a_batch_page_says_what_is_invalid_and_what_the_signals_cannot_tell() -> None:
    page, tables = page_of(40, changed=judge_invalid)
    text, seen = page.decode(), Seen(page)
    assert 'role="alert"><strong>Warning:</strong> &lt;b&gt;RMI&lt;/b&gt; tells nothing.' in text
    assert "<strong>Warning:</strong> diff_high takes 4 of at most 5 pairs." in text
    assert "takes 1 of at most 2" not in text
    of_signals = seen.tables["Distinct pairs by validity"][1:]
    assert [row[0] for row in of_signals] == ["valid", *(f"invalid: {one.value}" for one in Signal), "all"]
    assert of_signals[0] == ["valid", "3,766", "75.3%"]
    assert of_signals[3] == ["invalid: mismatch", "1,234", "24.7%"]
    assert of_signals[-1] == ["all", "5,000", "100.0%"]
    assert "<li>mismatch: 5% of the pairs.</li>" in text
    invalid = tables["decisions"].frame.filter(reason="invalid_mismatch").height
    assert invalid > 0
    (row,) = (row for row in seen.tables["Rows by decision and reason"] if row[1] == "invalid_mismatch")
    assert row[2] == str(invalid)
    assert re.search(r"<h3>[^<]*invalid_mismatch", text)


def test_a_page_of_a_batch_that_was_not_judged_says_nothing_of_validity(hostile: bytes) -> None:
    assert "Distinct pairs by validity" not in Seen(hostile).tables
    assert b"<strong>Warning:</strong>" not in hostile


def test_the_text_of_a_withdrawn_row_is_not_shown(hostile: bytes) -> None:
    assert b"Its text is not shown: it was withdrawn." in hostile
    assert b"hunter2" not in hostile


def gate_withdrawn(tables: BatchTables) -> BatchTables:
    """Withdraw row 1 of a gated batch, so that its decision and reason are those of the gate."""
    screened = tables["screened_data"].frame.with_columns(
        status=pl.when(pl.col("source_row") == 1).then(pl.lit("withdrawn")).otherwise("status")
    )
    decided = tables["decisions"].frame.with_columns(
        decision=pl.lit("batch_gated"), reason=pl.lit("too_many_rejected"), verdicts=pl.col("verdicts").list.head(0)
    )
    return changed(
        tables,
        screened_data=StoredTable(screened, tables["screened_data"].provenance),
        decisions=StoredTable(decided, tables["decisions"].provenance),
    )


def test_the_text_of_a_withdrawn_row_of_a_gated_batch_is_not_shown() -> None:
    page = page_of(40, changes={1: {"query": "hunter2"}}, changed=gate_withdrawn)[0]
    assert b"too_many_rejected" in page
    assert b"hunter2" not in page


def test_a_batch_without_a_row_has_a_page() -> None:
    assert b"<strong>0</strong> rows delivered" in page_of(0)[0]


def test_drift_is_of_the_reference_or_unknown(hostile: bytes, plain: tuple[bytes, BatchTables]) -> None:
    assert b"The drift is unknown: no reference is configured (ranking.reference)" in hostile
    table = Seen(plain[0]).tables["Drift from the reference r1 (0: no drift)"]
    assert {row[0] for row in table[1:]} >= {"psi rmi strong", "ks log ppl q weak"}
    assert {float(row[1]) for row in table[1:]} == {0.0}


def test_a_page_leads_to_the_calibration_where_there_is_one(hostile: bytes, plain: tuple[bytes, BatchTables]) -> None:
    assert ("a", {"href": "calibration.html"}) in Seen(plain[0]).tags
    assert b"tell good from bad" not in hostile


def lineage_of(page: bytes) -> dict[str, dict[str, set[Column]]]:
    """Return the sources of each column, by table or files."""
    found: dict[str, dict[str, set[Column]]] = {}
    for title, body in re.findall(
        r'<h3>([^<]*)</h3> <span class="muted">[^<]*</span></summary>\n<dl class="made-of">(.*?)</dl>',
        page.decode(),
        re.DOTALL,
    ):
        assert title not in found
        found[title] = {}
        for columns, lines in re.findall(r"<dt>(.*?)</dt>(.*?)</div>", body, re.DOTALL):
            sources = {
                (table, column)
                for table, named in re.findall(r"<dd>(\w+): (.*?)</dd>", lines)
                for column in re.findall("<code>(.*?)</code>", named)
            }
            assert sources or '<dd class="muted">no source column' in lines
            found[title] |= dict.fromkeys(re.findall("<code>(.*?)</code>", columns), sources)
    return found


def test_a_batch_page_says_of_each_column_of_every_stored_table_what_it_is_made_of(hostile: bytes) -> None:
    found = lineage_of(hostile)
    assert found == {
        table: {column: set(DERIVED[table][column]) for column in stored.columns()}
        for table, stored in PIPELINE.tables().items()
    }
    assert list(found) == list(DERIVED)
    assert f'<h3>raw_data</h3> <span class="muted">{len(tables.RawData.columns())} columns</span>' in hostile.decode()


def version_of(
    num_rows: int = 300,
    *,
    has_meta: bool = False,
    verdict: str | None = None,
    difference: pl.DataFrame | None = None,
) -> tuple[bytes, pl.DataFrame]:
    tables = synthetic.batch(SETTINGS, num_rows).tables
    flat = flat_scores(tables["decisions"].frame)
    entry = {
        "batch": "b1",
        "rows_in": num_rows,
        "rows_selected": tables["selected_subset"].frame.height,
        "pool": "batch:b1",
        "provenance_id": "p" * 32,
        "models": tables["decisions"].provenance["models"],
    }
    settings = SETTINGS.model_copy(update={"export": ExportSettings(formats=EVERY_FORMAT, meta=has_meta)})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        curated_dataset.write_files(
            folder, settings.published, settings.exported, settings.export, [tables], NO_VERSION
        )
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    manifest = {
        "batches": [entry],
        "export": settings.export.model_dump(mode="json"),
        "files": dict.fromkeys(files, "s" * 64),
    }
    neighbours = {
        "name": "version 2 (v1, 2026-11-29)",
        "previous": {"version": "v0", "name": "version 1 (v0, 2026-11-28)", "page": "v0.html"},
        "difference": difference,
        "excluded": {"b<2>": "not materialised: raw_data"},
        "pages": {"b1": "../../reports/b1/report.html"},
        "rows": "http://127.0.0.1:3001/versions/v1",
        "of_trial": verdict,
        "trial": None if verdict is None else "../trials/v1.html",
        "sizes": {"scores/b1.parquet": 10},
    }
    rows = page_rows.of_version(flat.iter_slices(100))
    return pages.version_page("v1", manifest, rows, flat.columns, SETTINGS.published, neighbours, None, MADE), flat


def test_a_version_page_names_its_version_by_number_and_day_says_what_it_has_and_leads_to_the_previous_one() -> None:
    rows, flat = version_of()
    page, taken = rows.decode(), flat.filter(decision="selected").height
    assert "<h1>Version 2 (v1, 2026-11-29)</h1>" in page
    assert f'<p class="verdict">{taken} of {flat.height} rows of 1 batch are published by diff_high.</p>' in page
    assert '<a href="v0.html">version 1 (v0, 2026-11-28)</a>' in page
    assert page.index('id="limits"') < page.index('id="files"')


def test_a_version_page_says_how_many_rows_entered_and_left() -> None:
    changes = pl.DataFrame({"is_added": [True, True, False], "change": ["batch_entered"] * 2 + ["row_gone"]})
    page = version_of(difference=changes)[0].decode()
    assert "Since version 1 (v0, 2026-11-28), 2 rows entered and 1 left.</p>" in page


def test_a_version_page_says_the_verdict_of_its_trial_or_how_to_get_one() -> None:
    assert "Not tested yet: does this selection train better" in version_of()[0].decode()
    page = version_of(verdict="mine trains better.")[0].decode()
    assert '<a href="../trials/v1.html">Training trial</a>: mine trains better.' in page


def test_a_version_page_lists_batches_files_and_those_left_out() -> None:
    page, flat = version_of()
    seen = Seen(page)
    assert ["scores/b1.parquet", "s" * 64, "10"] in seen.tables["Exported files"]
    assert seen.tables["Batches left out"][1] == ["b<2>", "not materialised: raw_data"]
    assert ("a", {"href": "../../reports/b1/report.html"}) in seen.tags
    assert int(seen.tables["Rows by decision and reason"][-1][2]) == flat.height


def test_a_version_page_says_of_each_column_of_every_exported_file_what_it_is_made_of() -> None:
    page, flat = version_of(has_meta=True)
    found = lineage_of(page)
    scores = found.pop("scores/*.parquet")
    assert list(scores) == flat.columns
    assert scores["gap"] == {("decisions", "gap")}
    assert scores["rmi_strong"] == {("decisions", "scores")}
    assert scores["is_selected:diff_high"] == {("decisions", "verdicts")}
    text, place = ("system", "history", "query", "reasoning", "answer"), (*ROW_KEY, "pair_id", "source", "language")
    for selections, table in ((["diff_high"], "selected_subset"), (CONTROLS, "raw_data")):
        meta = {(table, column) for column in place} | {("raw_data", "record")}
        for name in EVERY_FORMAT:
            fields = found.pop(", ".join(f"{selection}/{exports.FORMATS[name].path}" for selection in selections))
            assert list(fields) == exports.columns(name, has_meta=True).names
            assert fields.pop("meta") == meta
            read = [column for column in text if (name, column) != ("alpaca", "history")]
            assert set().union(*fields.values()) == {(table, column) for column in read}
    assert not found


def test_a_page_can_be_walked_by_its_headings_and_every_name_is_given_once(hostile: bytes) -> None:
    seen = Seen(hostile)
    assert dict(seen.tags)["html"] == {"lang": "en"}
    levels = [int(tag[1]) for tag, _ in seen.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    names = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for tag, attributes in seen.tags:
        assert tag != "th" or attributes["scope"] in ("row", "col")
        assert tag != "svg" or {attributes["aria-labelledby"], attributes["aria-describedby"]} <= set(names)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_aa_in_both_schemes(hostile: bytes) -> None:
    schemes = re.findall(r":root \{(.*?)\}", hostile.decode(), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for ground in ("page", "surface", "alert"):
            for ink in ("plot-ink", "plot-muted", "link"):
                light, dark = sorted((luminance(colours[ground]), luminance(colours[ink])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)
        for mark in ("plot-one", "plot-two", "plot-three"):
            light, dark = sorted((luminance(colours["page"]), luminance(colours[mark])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, mark


# --- slow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> bytes:
    """A page of 300,000 rows."""
    made = synthetic.batch(SETTINGS, 300_000)
    scorings = [Scoring(role, StoredTable(frame, SCORED)) for role, frame in made.scores.items()]
    start = time.process_time()
    page = pages.batch_page(
        made.tables, page_rows.of_batch(made.tables), scorings, SETTINGS.published, None, MADE, 10, NO_LINKS
    )
    print(f"{len(page):,} bytes in {time.process_time() - start:.1f} s of all cores")
    return page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_page_of_300_000_rows_is_under_5_mb(large: bytes) -> None:
    assert len(large) < 5_000_000


@pytest.mark.slow
@pytest.mark.browser
@NEEDS_CHROMIUM
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1400])
@pytest.mark.parametrize("of", ["hostile", "large"])
def test_a_page_opens_offline_in_under_2_seconds_and_scrolls_one_way(
    tmp_path: Path, of: str, width: int, scheme: Any, request: pytest.FixtureRequest
) -> None:
    from playwright.sync_api import sync_playwright

    (tmp_path / "report.html").write_bytes(request.getfixturevalue(of))
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        for details in page.locator("details").all():
            details.evaluate("element => element.open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shown = page.locator("svg").first.bounding_box()
        browser.close()
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert timing < 2_000
    assert shown is not None
    assert 300 <= shown["width"] <= 450
