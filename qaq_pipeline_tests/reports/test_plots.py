"""plots: every plot draws no row, one row or many; it is small, self-contained, and uses the page's colours."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import polars as pl
import pytest

from qaq_pipeline.reports import page_rows, plots, summaries
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline_tests.reports.test_summaries import SETTINGS
from qaq_pipeline_tests.support import synthetic


def flat_rows(num_rows: int) -> pl.DataFrame:
    made = synthetic.batch(SETTINGS, 200).tables
    return page_rows.of_batch(made).head(num_rows)


def drawn(flat: pl.DataFrame) -> list[Plot]:
    """One plot of each function."""
    pairs = summaries.pairs(flat)
    grid = summaries.rank_grid(pairs)
    return [
        plots.flow(summaries.flow(flat)),
        plots.by_reason(summaries.by_reason(flat)),
        plots.density(summaries.density(pairs, "strong"), summaries.strata(pairs, "strong"), "strong"),
        plots.ranks(grid),
        plots.ranks(grid, is_selected=True),
        plots.lengths(
            "a_tokens", *summaries.lengths(summaries.groups_of_lengths(pairs, "num_a_tokens_strong")), "answer"
        ),
        plots.drift("RMI", "strong", summaries.spread({"batch": pairs["rmi_strong"], "reference": pairs["rmi_weak"]})),
        plots.overlap(summaries.overlap(flat)),
        plots.kept("kept_stratum", summaries.strata(pairs, "strong"), "stratum", "stratum"),
        plots.kept("kept_language", summaries.kept_by(flat, "language"), "language"),
    ]


@pytest.mark.parametrize("num_rows", [1, 200])
def test_every_plot_draws_in_the_colours_of_the_page_and_asks_nobody(num_rows: int) -> None:
    for plot in drawn(flat_rows(num_rows)):
        picture = plots.svg(plot)
        root = ET.fromstring(picture)
        assert root.attrib["aria-labelledby"] == f"{plot.name}-title"
        assert float(root.attrib["viewBox"].split()[2]) <= plots.WIDTH + 10
        colours = set(re.findall(r'(?:fill|stroke)="([^"]*)"', picture)) - {"none", "transparent"}
        assert colours <= {f"var(--plot-{name})" for name in plots.VARIABLES.values()}, plot.name
        assert "<script" not in picture
        assert "http" not in picture.replace("http://www.w3.org/", "")
        assert "NaN" not in picture


def test_of_no_row_there_is_nothing_to_draw_and_the_page_can_say_so() -> None:
    for plot in drawn(flat_rows(0)):
        if plot.name != "overlap":  # Selections have names even without rows, so their overlap is drawn.
            assert (plots.svg(plot), plots.png(plot)) == ("", b""), plot.name


def test_pictures_for_the_ui_are_under_100_kb() -> None:
    flat = flat_rows(200)
    pairs = summaries.pairs(flat)
    for plot in [plots.flow(summaries.flow(flat)), plots.ranks(summaries.rank_grid(pairs))]:
        picture = plots.png(plot)
        assert picture.startswith(b"\x89PNG")
        assert len(picture) * 4 / 3 < 100_000


def test_names_in_rows_are_text_in_a_picture() -> None:
    hostile = flat_rows(200).with_columns(language=pl.lit("<script>alert(1)</script>\u202e&"))
    picture = plots.svg(plots.kept("kept_language", summaries.kept_by(hostile, "language"), "language"))
    assert "<script" not in picture
    assert "&lt;script&gt;" in picture
    assert "\u202e" not in picture
