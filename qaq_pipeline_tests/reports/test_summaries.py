"""summaries: counts that add up, shares and bins against naive ones, and invisible characters."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import yaml

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.reports import plots, summaries
from qaq_pipeline.schema.vocabularies import Decision
from qaq_pipeline_tests.support import synthetic

SETTINGS = parse_settings(
    yaml.safe_dump(
        {
            "models": {"strong": {"hub": "tiny/s"}, "weak": {"hub": "tiny/w"}},
            "selections": [
                {"name": "diff_high", "strategy": "diff_high"},
                {"name": "rmi_band", "strategy": "rmi_band"},
            ],
        }
    )
)


@pytest.fixture(scope="module")
def flat() -> pl.DataFrame:
    return flat_scores(synthetic.batch(SETTINGS, 600).tables["decisions"].frame)


def published(settings: Settings = SETTINGS) -> str:
    return settings.published.name


def test_rows_by_reason_and_the_flow_add_up_to_all_rows(flat: pl.DataFrame) -> None:
    counts, steps = summaries.by_reason(flat), summaries.flow(flat)
    assert counts["rows"].sum() == steps["rows"][0] == flat.height
    assert steps["rows"].to_list() == [flat.height - left for left in np.cumsum(steps["left"].to_numpy())]
    assert steps["rows"][-1] == sum(decision == "selected" for decision in flat["decision"])


def test_a_gate_is_a_step_of_a_gated_batch_only(flat: pl.DataFrame) -> None:
    gated = flat.with_columns(decision=pl.lit(Decision.BATCH_GATED.value))
    assert "batch passed its gates" not in summaries.flow(flat)["step"]
    assert dict(summaries.flow(gated).select("step", "rows").iter_rows())["batch passed its gates"] == 0


def test_held_out_rows_are_a_step_only_where_there_are_any(flat: pl.DataFrame) -> None:
    assert not {"not held out", "not between"} & set(summaries.flow(flat)["step"])
    is_selected = pl.col("decision") == Decision.SELECTED.value
    held_out = pl.when(is_selected).then(pl.lit(Decision.HELD_OUT.value)).otherwise("decision")
    steps = summaries.flow(flat.with_columns(decision=held_out))
    assert dict(steps.select("step", "left").iter_rows())["not held out"] == flat.filter(is_selected).height
    assert (steps["rows"][-1], "not between" in steps["step"]) == (0, False)


def test_invalid_rows_are_a_step_of_their_own_before_the_selection(flat: pl.DataFrame) -> None:
    assert "valid" not in summaries.flow(flat)["step"]
    places = [place for place, decision in enumerate(flat["decision"]) if decision == "not_selected"][:3]
    is_invalid = pl.int_range(pl.len()).is_in(places)
    judged = flat.with_columns(reason=pl.when(is_invalid).then(pl.lit("invalid_echo")).otherwise("reason"))
    steps = summaries.flow(judged)
    assert steps["step"].to_list()[-2:] == ["valid", "selected"]
    assert steps["left"].to_list()[-2:] == [3, summaries.flow(flat)["left"][-1] - 3]


def test_a_pair_counts_once_and_by_the_row_that_stands_for_it(flat: pl.DataFrame) -> None:
    pairs = summaries.pairs(flat)
    assert pairs["pair_id"].is_unique().all()
    assert set(pairs["pair_id"]) == set(flat.drop_nulls("num_q_tokens_strong")["pair_id"])
    assert set(pairs["decision"]) == {"selected", "not_selected", "unscorable"}
    assert pairs["is_selected"].sum() == flat.filter(pl.col("decision") == "selected").height


def test_overlap_is_that_of_sets(flat: pl.DataFrame) -> None:
    chosen = {
        name: set(flat.filter(pl.col(f"is_selected:{name}").fill_null(value=False))["pair_id"])
        for name in summaries.selections(flat)
    }
    assert list(chosen) == ["diff_high", "rmi_band", "control_random", "control_stratified_random"]
    for first, second, both, share in summaries.overlap(flat).iter_rows():
        assert both == len(chosen[first] & chosen[second])
        assert share == pytest.approx(both / len(chosen[first]))


def test_kept_by_puts_the_rare_values_together_and_loses_no_row(flat: pl.DataFrame) -> None:
    named = flat.with_columns(value=pl.Series([f"v{i % 20}" for i in range(flat.height)]))
    found = summaries.kept_by(named, "value", most=5)
    assert found["value"].to_list()[-1] == "15 others"
    assert (found["rows"].sum(), found["selected"].sum()) == (
        flat.height,
        flat.filter(pl.col("decision") == "selected").height,
    )
    unknown = flat.with_columns(value=pl.lit(None, pl.String))
    assert summaries.kept_by(unknown, "value")["value"].to_list() == ["not stated"]


def test_long_values_that_look_alike_stay_apart(flat: pl.DataFrame) -> None:
    weeks = ["synthetic-code-of-the-year-2026-week-47", "synthetic-code-of-the-year-2026-week-48"]
    weeks += ["a" * 40 + "1" * 20, "a" * 40 + "2" + "1" * 19]
    named = flat.with_columns(value=pl.Series([weeks[i % 4] for i in range(flat.height)]))
    found = summaries.kept_by(named, "value")
    assert found["value"].n_unique() == found.height == 4
    assert all(len(label) <= 24 for label in found["value"])
    assert found["rows"].sum() == flat.height


def test_every_pair_is_in_a_cell_of_the_grids(flat: pl.DataFrame) -> None:
    pairs = summaries.pairs(flat)
    ranked = pairs.drop_nulls("rank_strong")
    grid = summaries.rank_grid(pairs, bins=4)
    assert grid["rows"].sum() == ranked.height
    naive = ranked.filter(pl.col("rank_strong") > 0.75, pl.col("rank_weak") <= 0.25)
    cell = grid.filter(pl.col("x") == 0.75, pl.col("y") == 0.0).row(0, named=True)
    assert (cell["rows"], cell["selected"]) == (naive.height, naive["is_selected"].sum())
    # 600 pairs: a thousandth of them is none.
    assert summaries.density(pairs, "weak")["rows"].sum() == pairs["rmi_weak"].count()


def test_strata_show_the_tails_of_each(flat: pl.DataFrame) -> None:
    pairs = summaries.pairs(flat)
    for row in summaries.strata(pairs, "strong").iter_rows(named=True):
        inside = pairs.filter(pl.col("stratum_strong") == row["stratum"]).drop_nulls("rmi_strong")
        assert row["rows"] == inside.height
        assert (inside["rmi_strong"] < row["low_tail"]).mean() <= summaries.TAIL  # type: ignore[operator]
        assert (inside["rmi_strong"] > row["high_tail"]).mean() <= summaries.TAIL  # type: ignore[operator]


def test_strata_of_the_other_model_have_no_edges_on_this_one_s_axis(flat: pl.DataFrame) -> None:
    pairs = summaries.pairs(flat)
    assert summaries.has_edges(summaries.strata(pairs, "weak"))
    of_strong = pairs.with_columns(stratum_weak="stratum_strong")
    assert not summaries.has_edges(summaries.strata(of_strong, "weak"))
    assert "Vertical lines" not in plots.density(summaries.density(pairs, "weak"), pl.DataFrame(), "weak").caption


def test_lengths_are_shares_of_each_group() -> None:
    shares, numbers = summaries.lengths(
        {"all": pl.Series([1, 2, 3, 900]), "one": pl.Series([7]), "none": pl.Series([])}
    )
    assert shares.group_by("group").agg(pl.col("share").sum()).sort("group").rows() == [("all", 1.0), ("one", 1.0)]
    assert numbers.select("group", "pairs", "median").rows() == [("all", 4, 3.0), ("one", 1, 7.0)]


def test_examples_of_a_reason_are_spread_evenly_and_the_same_every_time() -> None:
    assert summaries.evenly(100, 10) == list(range(0, 100, 10))
    assert summaries.evenly(3, 10) == [0, 1, 2]
    assert summaries.evenly(0, 10) == []


def test_tails_are_the_outermost_pairs(flat: pl.DataFrame) -> None:
    pairs = summaries.pairs(flat)
    lowest, highest, least, most = (flat[rows] for rows in summaries.tails(pairs, "strong", 10).values())
    assert max(lowest["rank_strong"]) <= min(pairs.drop_nulls("rank_strong")["rank_strong"].sort()[9:])
    assert set(highest["rank_strong"]) == {1.0}
    assert max(least["gap"]) < 0 < min(most["gap"])
    assert lowest["rank_strong"].is_sorted()
    assert most["gap"].is_sorted(descending=True)


def test_examples_of_a_reason_have_it(flat: pl.DataFrame) -> None:
    found = summaries.of_each_reason(flat, 3)
    assert len(found) == summaries.by_reason(flat).height
    for title, rows in found.items():
        (decision, reason), num_rows = flat[rows].select("decision", "reason").unique().row(0), len(rows)
        assert title.startswith(f"{decision}: {reason} (")
        assert num_rows == min(3, flat.filter(decision=decision, reason=reason).height)


def test_what_cannot_be_seen_is_named() -> None:
    assert summaries.visible("a\x00b\u202ec\u200b\r\n\td") == "a⟦U+0000⟧b⟦U+202E⟧c⟦U+200B⟧⟦U+000D⟧\n\td"
    assert summaries.visible("Größe 日本語 עברית") == "Größe 日本語 עברית"
