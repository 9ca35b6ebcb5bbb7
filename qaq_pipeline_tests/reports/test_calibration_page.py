"""calibration_page: tables, Markdown, and a self-contained page."""

from __future__ import annotations

import html
import re
from typing import Any

import polars as pl
import pytest

from qaq_pipeline.calibration.calibration import Judged
from qaq_pipeline.reports import calibration_page, check_metrics
from qaq_pipeline.reports.calibration_page import Shown
from qaq_pipeline.reports.pages import Made
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.tables import BOTH_MODELS
from qaq_pipeline.schema.vocabularies import Defect, GateReason, NoCutReason, Signal, Statistic
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import words
from qaq_pipeline.validity.judgement import of_signal
from qaq_pipeline_tests.calibration.test_calibration import (
    calibrated,
    clean_scores,
    clean_texts,
    cuts,
    judged_batch,
    number_of,
    planted_rows,
    settings,
)
from qaq_pipeline_tests.reports.test_pages import Seen
from qaq_pipeline_tests.support.frames import pair_name

MADE = Made("2026-11-25T00:00:00+00:00", "run", "1-abc")


@pytest.fixture(scope="module")
def judged() -> Judged:
    return judged_batch()


def stored_scores() -> dict[str, StoredTable]:
    return {role: StoredTable(scores) for role, scores in clean_scores().items()}


def page_of(
    frame: pl.DataFrame,
    judged: Judged | None,
    planted: pl.DataFrame,
    gate: Gate | None = None,
    texts: pl.DataFrame | None = None,
    **sections: Any,
) -> str:
    wanted = settings(**sections)
    findings = check_metrics.of_calibration(frame, wanted.published.name, wanted.checks)
    of_batch = clean_texts() if texts is None else texts
    shown = Shown("b1", lambda: of_batch.iter_slices(7), stored_scores(), planted, cuts())
    return calibration_page.page(shown, gate, judged, frame, findings, wanted, MADE).decode()


def test_every_number_that_is_known_stands_in_a_table_with_its_interval(judged: Judged) -> None:
    frame = calibrated(judged)
    cells = [cell for table in calibration_page.tables(frame) for row in table.rows for cell in row]
    known = frame.drop_nulls("value").filter(pl.col("statistic") != "dropped_share")
    for value, lower, upper in known.select("value", "lower", "upper").iter_rows():
        said = f"{value:.3f}" if lower is None else f"{value:.3f} [{lower:.2f}, {upper:.2f}]"
        assert said in cells
        cells.remove(said)
    row = number_of(frame, Statistic.AUROC, Defect.OTHER_ANSWER, "strong", "rmi")
    first = calibration_page.tables(frame)[2]
    assert first.head == ("score", "defect", "strong", "weak")
    assert first.rows[0][:3] == ("RMI", "other_answer", f"{row['value']:.3f} [{row['lower']:.2f}, {row['upper']:.2f}]")
    assert first.rows[1][:2] == ("", "echo")


def test_the_share_that_each_signal_drops_stands_beside_its_defect(judged: Judged) -> None:
    frame = calibrated(judged)
    dropped = calibration_page.tables(frame)[1]
    signals = [signal.value for signal in Signal]
    assert sorted(dropped.head) == sorted(["rows", *signals, "valid"])
    assert [row[0] for row in dropped.rows] == ["clean", "other_answer", "echo"]
    for row in dropped.rows:
        for measure, cell in zip(dropped.head[1:], row[1:], strict=True):
            number = number_of(frame, Statistic.DROPPED_SHARE, row[0], BOTH_MODELS, measure)
            assert cell == ("no cut" if number["value"] is None else f"{number['value']:.3f}")


def test_what_was_not_planted_or_not_asked_for_is_said_once(judged: Judged) -> None:
    frame = calibrated(judged, scoring={"quantities": ["rmi"]})
    assert calibration_page.missing(frame) == [
        "Not planted: invented_terms, cut_answer, cut_at_line, refusal, filler, wrong_language, one_token_bug.",
        "Not scored, because `scoring.quantities` does not include it: IFD, log PPL(A|Q), NLL of the end.",
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


def test_the_page_has_its_plots_and_its_verdicts(judged: Judged) -> None:
    frame = calibrated(judged)
    text = page_of(frame, judged, planted_rows())
    pictures = re.findall(r'aria-labelledby="(\w+)-title"', text)
    assert set(pictures) == {
        *("told_apart", "auroc_strong", "auroc_weak", "auroc_both", "kept_defects"),
        *("evidence_echo", "evidence_mismatch"),
    }
    verdict = "AUROC of matched pairs against mismatched ones (the same query with another row's answer): strong"
    assert verdict in html.unescape(text)
    assert "<script" not in text
    assert "http:" not in text.replace("http://www.w3.org/", "")
    assert "https:" not in text


def test_the_published_selection_comes_first_and_the_page_says_which_shares_prove_something(judged: Judged) -> None:
    frame = calibrated(judged)
    text = page_of(frame, judged, planted_rows())
    seen = Seen(text.encode())
    rows = seen.tables["What the selection diff_high keeps, 95% interval"]
    assert [row[0] for row in rows] == ["rows", "as delivered", "other_answer", "echo"]
    assert [row[3] for row in rows[1:]] == ["", "mismatch", "echo"]
    number = number_of(frame, Statistic.KEPT_SHARE, "echo", BOTH_MODELS, "diff_high")
    assert rows[3][1] == f"{number['num_kept']} of 20"
    assert next(iter(seen.tables)) == "What the selection diff_high keeps, 95% interval"
    assert "what is kept of them is not an independent test" in text
    assert "set no cut, so what is kept of them" not in text
    more = pl.concat([planted_rows(), planted_rows().head(2).with_columns(defect=pl.lit("refusal"))])
    more = more.with_columns(pair_id=pl.Series([pair_name(101 + n) for n in range(42)]))
    assert "Rows of refusal set no cut, so what is kept of them is an independent test." in page_of(frame, None, more)


def test_each_signal_has_its_sentence_and_the_untouched_pairs_nearest_to_its_cut(judged: Judged) -> None:
    hostile = clean_texts().with_columns(query=pl.lit("<script>alert(2)</script>"))
    text = page_of(calibrated(judged), judged, planted_rows(), texts=hostile, reports={"examples": 3})
    assert "<script" not in text
    for sentence in words.of_cuts(cuts()):
        assert f"<p>{sentence}.</p>" in text
    of_mismatch = {row["signal"]: row["cut"] for row in cuts().to_dicts()}["mismatch"]
    evidence = of_signal(judged.validity[0], Signal.MISMATCH)
    for title, is_raised in (("drop", True), ("keep", False)):
        part = text.partition(f"Nearest pairs that it would {title} (mismatch)")[2].partition("</details>\n<details")[0]
        shown = re.findall(r"<code>pair (\w+)</code>", part.partition("</details>")[0])
        nearest = sorted(
            (abs(value - of_mismatch), name) for name, value, raised in evidence.iter_rows() if raised == is_raised
        )
        assert shown == [name for _, name in nearest[:3]]


def test_a_signal_that_tells_nothing_is_an_alert(judged: Judged) -> None:
    untold = cuts().with_columns(
        cut=pl.lit(None, pl.Float64), null_reason=pl.lit(NoCutReason.CANNOT_TELL.value), spreads=pl.lit([])
    )
    frame, whole = calibrated(judged), settings()
    findings = check_metrics.of_calibration(frame, "diff_high", whole.checks)
    shown = Shown("b1", lambda: [clean_texts()], stored_scores(), planted_rows(), untold)
    text = calibration_page.page(shown, None, judged, frame, findings, whole, MADE).decode()
    assert f'role="alert"><strong>Warning:</strong> {words.untold(untold)}.' in text
    assert "Nearest pairs" not in text


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
    assert "Not planted: other_answer, echo" in text
