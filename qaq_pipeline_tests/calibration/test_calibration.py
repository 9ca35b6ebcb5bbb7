"""calibration: every number against the naive formula, its interval, and what it says where nothing is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from scipy import stats

from qaq_pipeline.calibration import calibration
from qaq_pipeline.calibration.calibration import VALID, auroc, calibrate, judge, paired_share
from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.reports import check_metrics
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.long_form import to_columns
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN
from qaq_pipeline.schema.vocabularies import Defect, Statistic, UnknownReason
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.disagreement_scores import disagreement_scores
from qaq_pipeline.selection.strategies import select
from qaq_pipeline.validity import judgement
from qaq_pipeline_tests.support.frames import pair_name, rmi_rows
from qaq_pipeline_tests.support.sentences import Check

SAMPLES = 400
NAN = math.nan


def settings(**sections: Any) -> Settings:
    values: dict[str, Any] = {
        "models": {"strong": {"hub": "tiny/s"}, "weak": {"hub": "tiny/w"}},
        "ranking": {"num_strata": 2, "min_rows_per_stratum": 5},
        "selections": [
            {"name": "diff_high", "strategy": "diff_high", "budget": {"fraction": 0.25}},
            {"name": "band", "strategy": "rmi_band", "model": "weak"},
        ],
    }
    return parse_settings(yaml.safe_dump(values | sections))


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_auroc_is_the_share_of_pairs_in_order_with_ties_half() -> None:
    random = np.random.default_rng(0)
    clean, planted = random.integers(0, 6, 30).astype(float), random.integers(0, 5, 30).astype(float)
    clean[3] = planted[7] = NAN
    pairs = [(c, p) for i, c in enumerate(clean) for j, p in enumerate(planted) if i != j and not np.isnan(c + p)]
    found = auroc(clean, planted, SAMPLES, seed=0)
    assert found.value == pytest.approx(np.mean([(c > p) + (c == p) / 2 for c, p in pairs]))
    assert (found.num_clean, found.num_planted) == (29, 29)
    twins = [(c > p) + (c == p) / 2 for c, p in zip(clean, planted, strict=True) if not np.isnan(c + p)]
    u = stats.mannwhitneyu(clean, planted, nan_policy="omit").statistic
    assert found.value == pytest.approx((u - sum(twins)) / (29**2 - len(twins)))


def test_the_interval_is_the_percentile_bootstrap_over_rows_with_their_twins() -> None:
    random = np.random.default_rng(1)
    clean = random.normal(0.5, 1, 25)
    planted = clean - random.normal(0.3, 0.2, 25)
    draws = np.random.default_rng(7).multinomial(25, [1 / 25] * 25, size=SAMPLES)
    naive = []
    for counts in draws:
        rows = np.repeat(np.arange(25), counts)
        naive.append(np.mean([clean[i] > planted[j] for i in rows for j in rows if i != j]))
    found = auroc(clean, planted, SAMPLES, seed=7)
    assert (found.lower, found.upper) == pytest.approx(tuple(np.quantile(naive, [0.025, 0.975])))
    assert found.lower is not None
    assert found.value is not None
    assert found.upper is not None
    assert found.lower < found.value < found.upper


@pytest.mark.parametrize(("spread", "rows"), [(0.02, 100), (0.3, 40)], ids=["near twins", "twins"])
def test_the_interval_holds_the_true_auroc_where_a_row_and_its_twin_are_alike(spread: float, rows: int) -> None:
    random = np.random.default_rng(5)
    true = stats.norm.cdf(spread / math.sqrt(2 + spread**2))
    held = 0
    for _ in range(200):
        clean = random.normal(0, 1, rows)
        found = auroc(clean, clean - random.normal(spread, spread, rows), 200, seed=0)
        assert found.value is not None
        assert found.lower is not None
        assert found.upper is not None
        assert found.lower <= found.value <= found.upper
        held += found.lower <= true <= found.upper
    assert 0.86 <= held / 200 <= 0.99


def test_the_interval_of_an_auroc_holds_the_true_one_about_as_often_as_it_says() -> None:
    random, true = np.random.default_rng(2), stats.norm.cdf(1 / math.sqrt(2))
    held = 0
    for _ in range(200):
        found = auroc(random.normal(1, 1, 40), random.normal(0, 1, 40), 200, seed=0)
        assert found.lower is not None
        assert found.upper is not None
        held += found.lower <= true <= found.upper
    assert 0.88 <= held / 200 <= 0.99


def test_where_all_is_told_apart_the_interval_still_has_a_width() -> None:
    above, below = np.arange(20.0) + 100, np.arange(20.0)
    best, worst = auroc(above, below, SAMPLES, seed=0), auroc(below, above, SAMPLES, seed=0)
    exact = stats.binomtest(20, 20).proportion_ci(0.95, "exact").low
    assert (best.value, best.lower, best.upper) == pytest.approx((1.0, exact, 1.0))
    assert (worst.value, worst.lower, worst.upper) == pytest.approx((0.0, 0.0, 1 - exact))


def test_what_was_not_scored_has_no_auroc_and_no_share() -> None:
    nothing = np.array([NAN, NAN])
    assert auroc(nothing, np.ones(2), SAMPLES, 0).null_reason is UnknownReason.NOT_SCORED
    assert paired_share(np.array([NAN, 1]), np.array([1, NAN])).null_reason is UnknownReason.NOT_SCORED


def test_the_paired_share_counts_rows_above_their_own_twin() -> None:
    found = paired_share(np.array([1, 2, 3, NAN, 5]), np.array([0, 3, 3, 1, 1]))
    wilson = stats.binomtest(2, 4).proportion_ci(0.95, "wilson")
    assert (found.value, found.lower, found.upper, found.num_clean) == (0.5, wilson.low, wilson.high, 4)


# --- the table --------------------------------------------------------------------------------------------------------


def scored(number: int, shift: float, seed: int, first: int = 1) -> dict[str, pl.DataFrame]:
    """RmiScores of both models: pairs `first`, …, with an RMI of about `shift`."""
    random = np.random.default_rng(seed)
    frames = {}
    for role in ("strong", "weak"):
        rmi, log_ppl = random.normal(shift, 0.5, number), random.uniform(1, 4, number)
        frame = rmi_rows(*({"rmi": x, "log_ppl_q": y} for x, y in zip(rmi, log_ppl, strict=True)))
        frames[role] = frame.with_columns(pair_id=pl.Series([pair_name(first + n) for n in range(number)]))
    return frames


def planted_of(defects: dict[Defect, int], first: int) -> pl.DataFrame:
    rows, number = [], first
    for defect, count in defects.items():
        for twin in range(count):
            row = {"pair_id": pair_name(number), "defect": defect.value, "original_pair_id": pair_name(twin + 1)}
            answer = "q" if defect is Defect.ECHO else "a"
            rows.append(row | {"system": None, "query": "q", "answer": answer})
            number += 1
    return pl.DataFrame(rows, schema=tables.dtypes(tables.PlantedRows))


@pytest.fixture(scope="module", name="judged")
def _judged() -> calibration.Judged:
    return judged_batch()


def planted_rows() -> pl.DataFrame:
    """20 mismatches and 20 echoes."""
    return planted_of({Defect.OTHER_ANSWER: 20, Defect.ECHO: 20}, first=101)


def clean_texts() -> pl.DataFrame:
    """Texts of the clean pairs."""
    numbers = range(1, 41)
    texts = {"query": [f"query {n}" for n in numbers], "answer": [f"answer {n}" for n in numbers]}
    return pl.DataFrame({"pair_id": [pair_name(n) for n in numbers]} | texts)


def clean_scores() -> dict[str, pl.DataFrame]:
    """RmiScores of 40 clean pairs."""
    return scored(40, 1.0, seed=0)


def planted_scores() -> dict[str, pl.DataFrame]:
    """The mismatches below the clean pairs, the echoes above."""
    low, high = scored(20, -0.3, seed=1, first=101), scored(20, 4.0, seed=2, first=121)
    return {role: pl.concat([low[role], high[role]]) for role in low}


def sample() -> judgement.Sample:
    """The clean pairs and the planted rows, as the signals read them."""
    rows = planted_rows()
    planted = judgement.judged_pairs(planted_scores(), rows).join(rows.select("pair_id", "defect"), on="pair_id")
    return judgement.Sample(judgement.judged_pairs(clean_scores(), clean_texts()), planted, ("b1",))


def cuts() -> pl.DataFrame:
    """ValidityCuts of the batch: of mismatch and echo, for whose defects rows are planted."""
    return judgement.choose_cuts(sample(), settings().validity)


def judged_batch() -> calibration.Judged:
    """40 clean pairs; the mismatches below them, the echoes above."""
    whole, clean = settings(), clean_scores()
    ranks, _ = disagreement_scores(clean, whole.ranking, "batch:b1")
    pairs = sample()
    validity = tuple(judgement.judge(rows, cuts(), whole.validity) for rows in (pairs.pairs, pairs.planted))
    return judge(
        planted_rows(), planted_scores(), clean, ranks, (validity[0], validity[1]), whole.ranking, whole.selections
    )


def calibrated(judged: calibration.Judged | None, **sections: Any) -> pl.DataFrame:
    whole = settings(**sections)
    return calibrate(judged, whole.models, whole.scoring.quantities, whole.selections, whole.calibration)


def number_of(frame: pl.DataFrame, statistic: Statistic, defect: str, model: str, measure: str) -> dict[str, Any]:
    (row,) = frame.filter(statistic=statistic.value, defect=str(defect), model=model, measure=measure).to_dicts()
    return row


def test_a_calibration_fits_its_table_and_has_every_measure_of_every_defect(judged: calibration.Judged) -> None:
    frame = tables.enforce(tables.Calibration, calibrated(judged))
    aurocs = frame.filter(pl.col("statistic") == "auroc")
    assert aurocs.height == 9 * (2 * len(calibration.MEASURES) + len(calibration.MEASURES_OF_BOTH))
    known = aurocs.drop_nulls("value")
    assert set(known["defect"]) == {"other_answer", "echo"}
    assert set(aurocs.filter(pl.col("value").is_null())["null_reason"]) == {"not_planted"}
    assert number_of(frame, Statistic.AUROC, Defect.OTHER_ANSWER, "weak", "rmi")["value"] > 0.9
    assert number_of(frame, Statistic.AUROC, Defect.ECHO, "weak", "rmi")["value"] < 0.05
    assert number_of(frame, Statistic.PAIRED_SHARE, Defect.OTHER_ANSWER, "strong", "rmi")["value"] > 0.9
    assert number_of(frame, Statistic.AUROC, Defect.OTHER_ANSWER, "strong", "num_a_tokens_untruncated")["value"] == 0.5


def test_the_rank_of_a_planted_pair_is_that_of_a_new_pair_against_the_batch(judged: calibration.Judged) -> None:
    clean = scored(40, 1.0, seed=0)
    pool, _ = rank_reference.freeze([clean], settings().ranking)
    low, high = scored(20, -0.3, seed=1, first=101), scored(20, 4.0, seed=2, first=121)
    planted = {role: pl.concat([low[role], high[role]]) for role in low}
    ranks = rank_reference.disagreement_scores(planted, pool, settings().ranking, "p")
    of_strong = judged.planted.filter(model="strong")
    assert of_strong["rank"].to_list() == to_columns(ranks, "ranks")["rank_strong"].to_list()
    assert of_strong["gap"].to_list() == ranks["gap"].to_list()
    alone, _ = disagreement_scores(clean, settings().ranking, "batch:b1")
    assert judged.clean.filter(model="weak")["rank"].to_list() == to_columns(alone, "ranks")["rank_weak"].to_list()


def test_the_auroc_compares_with_the_twins_alone(judged: calibration.Judged) -> None:
    frame = calibrated(judged)
    twins = judged.clean.filter(pl.col("pair_id").is_in([pair_name(n) for n in range(1, 21)]))
    echoes = judged.planted.filter(pl.col("defect") == "echo")
    for measure, model in (("gap", BOTH_MODELS), ("rank", "weak")):
        of_clean, of_echoes = (pairs.filter(model="weak") for pairs in (twins, echoes))
        beside = of_clean.join(of_echoes, left_on="pair_id", right_on="original_pair_id", suffix=":planted")
        values = beside.select(measure, f"{measure}:planted").rows()
        naive = np.mean(
            [(c > p) + (c == p) / 2 for i, (c, _) in enumerate(values) for j, (_, p) in enumerate(values) if i != j]
        )
        assert number_of(frame, Statistic.AUROC, Defect.ECHO, model, measure)["value"] == pytest.approx(naive)


def test_kept_shares_are_by_the_cut_of_the_batch_and_clean_rows_are_taken_as_they_were(
    judged: calibration.Judged,
) -> None:
    frame = calibrated(judged)
    clean = number_of(frame, Statistic.KEPT_SHARE, CLEAN, BOTH_MODELS, "diff_high")
    assert (clean["value"], clean["num_kept"], clean["num_clean"]) == (0.25, 10, 40)
    verdicts = select(judged.clean, settings().selections[0])
    cut = verdicts.filter("is_selected")["score"].min()
    mismatches = judged.planted.filter(defect="other_answer", model="strong")
    above = int((mismatches["gap"] > cut).sum())  # type: ignore[operator]
    row = number_of(frame, Statistic.KEPT_SHARE, Defect.OTHER_ANSWER, BOTH_MODELS, "diff_high")
    wilson = stats.binomtest(row["num_kept"], 20).proportion_ci(0.95, "wilson")
    assert above <= row["num_kept"] <= above + int((mismatches["gap"] == cut).sum())
    assert (row["value"], row["lower"], row["upper"]) == (row["num_kept"] / 20, wilson.low, wilson.high)
    band = number_of(frame, Statistic.KEPT_SHARE, Defect.OTHER_ANSWER, "weak", "band")
    assert (band["value"], band["num_planted"]) == (0, 20)


def test_the_dropped_share_counts_every_pair_that_a_signal_is_raised_for(judged: calibration.Judged) -> None:
    frame = calibrated(judged)
    clean, planted = judged.validity
    evidence = cuts().select("signal", "cut").to_dicts()
    for defect, of_defect in {CLEAN: clean, "echo": planted.filter(defect="echo")}.items():
        rows = of_defect.to_dicts()
        raised = {one["signal"]: 0 for one in evidence}
        for row in rows:
            for one in row["signals"]:
                raised[one["signal"]] += one["is_raised"]
        for signal in ("mismatch", "echo"):
            row = number_of(frame, Statistic.DROPPED_SHARE, defect, BOTH_MODELS, signal)
            assert (row["num_kept"], row["num_clean"] or row["num_planted"]) == (raised[signal], len(rows))
            assert row["value"] == raised[signal] / len(rows)
            assert row["lower"] < row["value"] < row["upper"] or row["value"] in (0, 1)
    echoes = number_of(frame, Statistic.DROPPED_SHARE, Defect.ECHO, BOTH_MODELS, "echo")
    assert echoes["num_kept"] >= 19
    assert number_of(frame, Statistic.DROPPED_SHARE, Defect.OTHER_ANSWER, BOTH_MODELS, "mismatch")["value"] >= 0.8


def test_the_share_of_valid_pairs_is_that_which_no_signal_declares_invalid(judged: calibration.Judged) -> None:
    clean, planted = judged.validity
    frame = calibrated(judged)
    valid = {
        name: number_of(frame, Statistic.DROPPED_SHARE, name, BOTH_MODELS, VALID)["num_kept"]
        for name in (CLEAN, "other_answer", "echo")
    }
    assert valid == {
        CLEAN: clean["invalid_by"].null_count(),
        "other_answer": planted.filter(defect="other_answer")["invalid_by"].null_count(),
        "echo": planted.filter(defect="echo")["invalid_by"].null_count(),
    }
    assert valid["echo"] <= 1 < valid[CLEAN]


def test_a_signal_without_a_cut_drops_an_unknown_share(judged: calibration.Judged) -> None:
    frame = calibrated(judged)
    untold = frame.filter(statistic="dropped_share", measure="implausible_query")
    reasons = dict(untold.select("defect", "null_reason").iter_rows())
    assert reasons[CLEAN] == reasons["echo"] == "no_cut"
    assert reasons["refusal"] == "not_planted"
    assert untold["value"].null_count() == untold.height


def test_without_a_planted_row_every_number_is_null_with_its_reason() -> None:
    frame = tables.enforce(tables.Calibration, calibrated(None))
    assert frame["value"].null_count() == frame.height
    assert set(frame["null_reason"]) == {"not_planted"}
    without_ifd = calibrated(None, scoring={"quantities": ["rmi"]})
    not_wanted = without_ifd.filter(pl.col("null_reason") == "not_wanted")
    assert set(not_wanted["measure"]) == {"ifd_ppl", "log_ppl_a_given_q", "nll_end"}
    assert "nll_end" not in set(calibrated(None).filter(null_reason="not_wanted")["measure"])


def test_a_model_that_cannot_tell_is_named_and_few_rows_are_not_judged(
    judged: calibration.Judged, check_sentence: Check
) -> None:
    frame = calibrated(judged)
    finding = check_metrics.discrimination(frame, 0.8, 20)
    assert finding.passed
    assert finding.numbers["auroc_other_answer_strong"] > 0.9
    blind = frame.with_columns(
        value=pl.when((pl.col("model") == "weak") & (pl.col("measure") == "rmi")).then(0.55).otherwise("value")
    )
    found = check_metrics.discrimination(blind, 0.8, 20)
    assert not found.passed
    assert found.sentence.startswith("RMI cannot tell good from bad on this batch under weak")
    assert found.numbers["auroc_other_answer_weak"] == 0.55
    is_weak = (pl.col("model") == "weak") & (pl.col("statistic") == "auroc")
    unscored = frame.with_columns(
        value=pl.when(is_weak).then(None).otherwise("value"),
        num_planted=pl.when(is_weak).then(0).otherwise("num_planted"),
    )
    half = check_metrics.discrimination(unscored, 0.8, 20)
    assert not half.passed
    assert half.sentence.startswith("Not judged: weak, with fewer than 20 scored rows of other_answer. AUROC")
    blind_too = check_metrics.discrimination(
        unscored.with_columns(value=pl.col("value").clip(upper_bound=0.5)), 0.8, 20
    )
    check_sentence(blind_too.sentence)
    none = frame.with_columns(value=pl.when(pl.col("statistic") == "auroc").then(None).otherwise("value"))
    assert not check_metrics.discrimination(none, 0.8, 20).passed
    few = check_metrics.discrimination(blind, 0.8, 21)
    assert not few.passed
    assert few.sentence.startswith("Too few rows were planted to judge: 20 with other_answer; 21 are needed.")


def test_the_published_selection_is_judged_by_what_it_keeps_of_each_defect(
    judged: calibration.Judged, check_sentence: Check
) -> None:
    frame = calibrated(judged, calibration={"defects": ["other_answer", "echo"]})
    shares = {CLEAN: 0.25, "other_answer": 0.3, "echo": 0.1}
    is_kept = (pl.col("statistic") == "kept_share") & (pl.col("measure") == "diff_high")
    frame = frame.with_columns(
        value=pl.when(is_kept).then(pl.col("defect").replace_strict(shares)).otherwise("value"),
    )
    passing = check_metrics.kept_defects(frame, "diff_high", 0.3, 20)
    assert passing.passed
    assert passing.numbers == {f"kept_share_{defect}": share for defect, share in shares.items()}
    check_sentence(passing.sentence)
    failing = check_metrics.kept_defects(frame, "diff_high", 0.29, 20)
    assert not failing.passed
    check_sentence(failing.sentence)
    assert not check_metrics.kept_defects(frame, "another", 1.0, 20).passed


def test_too_few_planted_rows_of_a_defect_are_a_warning_and_a_wrong_token_is_not_judged(
    judged: calibration.Judged, check_sentence: Check
) -> None:
    frame = calibrated(judged)
    few = check_metrics.kept_defects(frame, "diff_high", 1.0, 20)
    assert not few.passed
    check_sentence(few.sentence)
    assert "one_token_bug" not in few.sentence
    none = check_metrics.kept_defects(calibrated(None), "diff_high", 1.0, 20)
    assert not none.passed
    check_sentence(none.sentence)
    kept = pl.col("value").is_null() & (pl.col("statistic") == "kept_share")
    bug = frame.with_columns(
        value=pl.when(kept).then(0.0).otherwise("value"), num_planted=pl.when(kept).then(60).otherwise("num_planted")
    )
    is_bug = (pl.col("defect") == "one_token_bug") & (pl.col("statistic") == "kept_share")
    of_bug = bug.with_columns(value=pl.when(is_bug).then(0.99).otherwise("value"))
    assert check_metrics.kept_defects(of_bug, "diff_high", 0.9, 20).passed
    assert not check_metrics.kept_defects(of_bug.with_columns(value=pl.lit(0.99)), "diff_high", 0.9, 20).passed
