"""calibration_page: tables, Markdown, and a self-contained page."""

from __future__ import annotations

import html
import re

import polars as pl
import pytest

from qaq_pipeline.calibration.calibration import Judged
from qaq_pipeline.reports import calibration_page, check_metrics
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import Defect, GateReason, Statistic
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.tables import StoredTable
from qaq_pipeline_tests.calibration.test_calibration import calibrated, judged_batch, number_of, planted_rows, settings

MADE = Made("2026-11-25T00:00:00+00:00", "run", "1-abc")


@pytest.fixture(scope="module")
def judged() -> Judged:
    return judged_batch()


def page_of(frame: pl.DataFrame, judged: Judged | None, planted: pl.DataFrame, gate: Gate | None = None) -> str:
    wanted = settings()
    finding = check_metrics.discrimination(frame, wanted.checks.min_auc)
    stored, defects = StoredTable(planted, {"partition": ["b1"]}), wanted.calibration.defects
    return calibration_page.page(stored, gate, judged, frame, finding, defects, wanted.published, MADE).decode()


def test_every_number_that_is_known_stands_in_a_table_with_its_interval(judged: Judged) -> None:
    frame = calibrated(judged)
    cells = [cell for table in calibration_page.tables(frame) for row in table.rows for cell in row]
    known = frame.drop_nulls("value")
    for value, lower, upper in known.select("value", "lower", "upper").iter_rows():
        said = f"{value:.3f}" if lower is None else f"{value:.3f} [{lower:.2f}, {upper:.2f}]"
        assert said in cells
        cells.remove(said)
    row = number_of(frame, Statistic.AUROC, Defect.OTHER_ANSWER, "strong", "rmi")
    first = calibration_page.tables(frame)[0]
    assert first.head == ("score", "defect", "strong", "weak")
    assert first.rows[0][:3] == ("RMI", "other_answer", f"{row['value']:.3f} [{row['lower']:.2f}, {row['upper']:.2f}]")
    assert first.rows[1][:2] == ("", "echo")


def test_what_was_not_planted_or_not_asked_for_is_said_once(judged: Judged) -> None:
    frame = calibrated(judged, scoring={"quantities": ["rmi"]})
    assert calibration_page.missing(frame) == [
        "Not planted: invented_terms, cut_answer, cut_at_line, refusal, filler, wrong_language, one_token_bug.",
        "Not scored, because `scoring.quantities` does not include it: IFD, log PPL(A|Q).",
    ]
    text = calibration_page.as_markdown(frame)
    assert "refusal |" not in text
    assert "| IFD |" not in text
    assert text.count("\n\n**") == 4


def test_of_a_gated_batch_there_is_a_page_that_says_why() -> None:
    empty = pl.DataFrame(schema=tables.dtypes(tables.Calibration))
    gate = Gate(GateReason.EMPTY_BATCH, "it has <no> row")
    text = page_of(empty, None, planted_rows().clear(), gate)
    assert "Not calibrated (empty_batch):" in text
    assert "it has &lt;no&gt; row" in text
    assert calibration_page.as_markdown(empty)


def test_the_page_has_its_plots_its_verdict_and_the_selection_to_paste(judged: Judged) -> None:
    frame = calibrated(judged)
    text = page_of(frame, judged, planted_rows())
    pictures = re.findall(r'aria-labelledby="(\w+)-title"', text)
    assert set(pictures) == {
        *("told_apart", "auroc_strong", "auroc_weak", "auroc_both", "kept_defects", "cuts_strong", "cuts_weak"),
    }
    verdict = "AUROC of matched pairs against mismatched ones (the same query with another row's answer): strong"
    assert verdict in html.unescape(text)
    assert 'role="alert"' not in text
    assert "rmi_strong:" in text
    assert "<script" not in text
    assert "http:" not in text.replace("http://www.w3.org/", "")
    assert "https:" not in text


def test_models_that_cannot_tell_are_an_alert(judged: Judged) -> None:
    frame = calibrated(judged).with_columns(
        value=pl.when(pl.col("measure") == "rmi").then(pl.col("value").clip(upper_bound=0.55)).otherwise("value")
    )
    text = page_of(frame, judged, planted_rows())
    assert re.search(r'role="alert">RMI cannot tell good from bad on this batch', text)


def test_examples_are_the_best_told_the_middle_and_the_worst_told_of_each_defect(judged: Judged) -> None:
    hostile = planted_rows().with_columns(answer=pl.lit("<script>alert(1)</script>\u202e"))
    text = page_of(calibrated(judged), judged, hostile)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;⟦U+202E⟧") == 6
    assert text.count("made from pair ") == 6
    shown = re.findall(r"strong: RMI (-?[\d.]+) as delivered, (-?[\d.]+) planted", text)
    told = [float(before) - float(after) for before, after in shown]
    assert told[:3] == sorted(told[:3], reverse=True)
    assert told[3:] == sorted(told[3:])  # An echo scores above its original.
    of_echoes = judged.planted.filter(defect="echo", model="strong").join(
        judged.clean, left_on=["original_pair_id", "model"], right_on=["pair_id", "model"], suffix=":twin"
    )
    least = (of_echoes["rmi:twin"] - of_echoes["rmi"]).min()
    assert told[3] == pytest.approx(least, abs=2e-3)


def test_without_a_planted_row_the_page_says_that_nothing_is_known() -> None:
    text = page_of(calibrated(None), None, planted_rows().clear())
    assert "Too few rows were planted to judge" in text
    assert "No cut is offered." in text
    assert "Not planted: other_answer, echo" in text
