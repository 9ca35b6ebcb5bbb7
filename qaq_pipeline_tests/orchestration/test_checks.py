"""checks and measures: what each check finds, exactly; that it is recorded for its partition, and never stops a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from qaq_pipeline.config.settings import CheckSettings, RankingSettings, ScreeningSettings, Settings
from qaq_pipeline.orchestration.checks import build_checks
from qaq_pipeline.orchestration.jobs import build_job_defs
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import curated_dataset, versions
from qaq_pipeline.publication.curated_dataset import read_batches
from qaq_pipeline.reports import check_metrics
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.tables import DisagreementScores, Logprobs, dtypes
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.screening.screen import screen_alone
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline_tests.conftest import SAMPLES, write_jsonl
from qaq_pipeline_tests.support.frames import IDENTITY, pair_name, raw_rows, rejected, rmi_rows, store_batch
from qaq_pipeline_tests.support.sentences import Check

REFERENCE_JOB = PIPELINE["rank_reference"].job

SettingsFor = Callable[..., Settings]

LIMITS = CheckSettings.model_validate({})
TWO_STRATA = RankingSettings.model_validate({"num_strata": 2, "min_rows_per_stratum": 2})


def logprob_rows(*rows: dict[str, Any]) -> pl.DataFrame:
    """Logprobs of the pairs 1, 2, 3, …, all quantities scored, with the given changes."""
    scored = {f"sum_nll_{quantity}": 5.0 for quantity in Quantity} | {
        "num_q_tokens": 7,
        "num_a_tokens": 11,
        "num_a_tokens_untruncated": 11,
        "is_truncated": False,
    }
    return pl.DataFrame(
        [scored | {"pair_id": pair_name(number)} | row for number, row in enumerate(rows, start=1)],
        schema=dtypes(Logprobs),
    )


def ranked(strong: Sequence[float | None], weak: Sequence[float | None], strata: Sequence[int | None]) -> pl.DataFrame:
    """DisagreementScores with these ranks of the two models; both have these strata."""
    rows = [
        {
            "pair_id": pair_name(number),
            "pool_id": "batch:b1",
            "ranks": [
                {"model": "strong", "stratum": stratum, "num_strata": 2, "rank": of_strong},
                {"model": "weak", "stratum": stratum, "num_strata": 2, "rank": of_weak},
            ],
        }
        for number, (of_strong, of_weak, stratum) in enumerate(zip(strong, weak, strata, strict=True), start=1)
    ]
    return pl.DataFrame(rows, schema=dtypes(DisagreementScores))


# --- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "passes"), [(0.4, True), (0.39, False), (None, True)])
def test_the_share_of_rejected_rows_is_counted_by_reason(limit: float | None, passes: bool) -> None:
    found = check_metrics.rejected_rows(raw_rows(rejected(), {}, rejected(), {}, {}), limit)
    assert found.passed is passes
    assert found.numbers == {
        "rows": 5,
        "rejected": 2,
        "rejected_share": 0.4,
        "rejected_by_reason": {"empty_query": 2},
    }
    assert found.sentence.startswith("2 of 5 rows cannot be read (share 0.4; ")
    assert found.sentence.endswith(" empty_query: 2.")


def test_a_delivery_without_a_row_has_no_share_of_rejected_rows() -> None:
    found = check_metrics.rejected_rows(raw_rows(), None)
    assert found == Finding(False, "The delivery has no rows.", {"rows": 0, "rejected": 0})


def test_screened_rows_are_shares_of_the_batch_and_its_gate_is_named() -> None:
    screened = screen_alone(
        raw_rows({}, {"pair_id": pair_name(1)}, rejected(), {"pair_id": pair_name(4)}), ScreeningSettings()
    )
    passed = check_metrics.screened_rows(screened, None)
    gated = check_metrics.screened_rows(screened, "it has no row")
    assert (passed.passed, passed.sentence) == (True, "2 of 4 rows will be scored.")
    assert (gated.passed, gated.sentence) == (False, "The batch is gated before scoring: it has no row.")
    assert gated.numbers == passed.numbers
    assert passed.numbers["rows"] == 4
    shares = ("accepted_share", "rejected_share", "duplicate_share", "contaminated_share", "withdrawn_share")
    assert [passed.numbers[name] for name in shares] == [0.5, 0.25, 0.25, 0.0, 0.0]
    assert set(check_metrics.screened_rows(screened.clear(), "it has no row").numbers).isdisjoint(shares)


def test_null_quantities_are_a_share_of_the_wanted_ones() -> None:
    unwanted = {"sum_nll_a": None, "null_reason_a": "not_wanted", "sum_nll_a_given_q": None}
    unwanted |= {"null_reason_a_given_q": "not_wanted", "sum_nll_end": None, "null_reason_end": "not_wanted"}
    failed = {"sum_nll_q": None, "null_reason_q": "query_too_long"}
    failed |= {"sum_nll_q_given_a": None, "null_reason_q_given_a": "non_finite"}
    frame = logprob_rows(unwanted, unwanted, unwanted, unwanted | failed)
    found = check_metrics.null_quantities([frame], 0.25)
    assert found.passed
    assert found.numbers == {
        "wanted": 8,
        "null": 2,
        "null_share": 0.25,
        "null_by_reason": {"query_too_long": 1, "non_finite": 1},
    }
    assert not check_metrics.null_quantities([frame], 0.24).passed
    assert not check_metrics.null_quantities([frame], LIMITS.max_null_logprob_share).passed


def test_the_ends_of_truncated_answers_are_neither_null_nor_wanted_for_the_check_of_nulls() -> None:
    """The check of truncated answers judges them. Any other reason of an end counts."""
    cut = {"sum_nll_end": None, "null_reason_end": "answer_truncated", "is_truncated": True}
    endless = {"sum_nll_end": None, "null_reason_end": "no_end_token"}
    found = check_metrics.null_quantities([logprob_rows(cut, cut, {})], 0.0)
    assert (found.passed, found.numbers["wanted"], found.numbers["null"]) == (True, 13, 0)
    found = check_metrics.null_quantities([logprob_rows(cut, endless)], 0.0)
    assert (found.passed, found.numbers["null_by_reason"]) == (False, {"no_end_token": 1})


def test_truncated_answers_are_a_share_of_the_pairs() -> None:
    frame = logprob_rows({"is_truncated": True}, {}, {}, {})
    found = check_metrics.truncated_answers(frame, 0.25)
    assert (found.passed, found.numbers) == (True, {"pairs": 4, "truncated": 1, "truncated_share": 0.25})
    assert not check_metrics.truncated_answers(frame, LIMITS.max_truncated_share).passed


def test_where_no_pair_was_to_be_scored_nothing_is_null_and_nothing_has_a_share() -> None:
    nothing = "No pair was to be scored."
    assert check_metrics.null_quantities([logprob_rows()], 0.0) == Finding(True, nothing, {"wanted": 0, "null": 0})
    assert check_metrics.truncated_answers(logprob_rows(), 0.0) == Finding(True, nothing, {"pairs": 0, "truncated": 0})


def test_the_mean_of_rmi_comes_with_its_standard_error() -> None:
    unscored = {"rmi": None, "null_reason_rmi": "query_too_long"}
    found = check_metrics.mean_rmi(rmi_rows({"rmi": -0.25}, {"rmi": 0.25}, {"rmi": 0.75}, unscored), 0.0)
    assert found.passed
    assert found.numbers == {
        "scorable_pairs": 3,
        "mean_rmi": 0.25,
        "negative_share": 1 / 3,
        "standard_error": pytest.approx(0.5 / 3**0.5, rel=1e-15),
    }
    assert found.sentence.startswith("Mean RMI is 0.25 ± 0.289 nats/token over 3 pairs, expected above 0 ")


@pytest.mark.parametrize(("rmi", "minimum", "passes"), [(0.0, 0.0, False), (0.1, 0.1, False), (0.1, 0.0, True)])
def test_a_mean_of_rmi_at_the_limit_does_not_pass(rmi: float, minimum: float, passes: bool) -> None:
    found = check_metrics.mean_rmi(rmi_rows({"rmi": rmi}), minimum)
    assert found.passed is passes
    assert found.numbers == {"scorable_pairs": 1, "mean_rmi": rmi, "negative_share": 0.0}


def test_without_a_scorable_pair_the_mean_of_rmi_is_no_number_and_does_not_pass() -> None:
    found = check_metrics.mean_rmi(rmi_rows({"rmi": None, "null_reason_rmi": "non_finite"}), -1.0)
    assert found == Finding(False, "None of 1 pairs has an RMI: the mean is unknown.", {"scorable_pairs": 0})


@pytest.mark.parametrize(
    ("strata", "passes", "fewest"),
    [([1, 1, 2, 2, None], True, 2), ([1, 1, 1, 2, None], False, 1), ([1, 1, 1, 1, 1], False, 5)],
)
def test_strata_are_filled_where_each_has_the_wanted_rows(strata: list[int | None], passes: bool, fewest: int) -> None:
    ranks = [None if stratum is None else 0.5 for stratum in strata]
    found = check_metrics.filled_strata(ranked(ranks, ranks, strata), TWO_STRATA)
    assert found.passed is passes
    num_strata = len({stratum for stratum in strata if stratum})
    assert found.numbers == {"num_strata": num_strata, "fewest_rows_in_a_stratum": fewest}


def test_strata_are_not_filled_where_a_model_ranks_nothing(check_sentence: Check) -> None:
    frame = ranked([0.5] * 4, [0.5] * 4, [1, 1, 2, 2])
    of_weak = pl.element().struct.field("model") == "weak"
    unranked = pl.element().struct.with_fields(stratum=pl.lit(None, pl.Int64), rank=pl.lit(None, pl.Float64))
    of_strong_alone = frame.with_columns(
        ranks=pl.col("ranks").list.eval(pl.when(of_weak).then(unranked).otherwise(pl.element()))
    )
    found = check_metrics.filled_strata(of_strong_alone, TWO_STRATA)
    assert (found.passed, found.numbers) == (False, {"num_strata": 0})
    check_sentence(found.sentence)


def test_without_a_ranked_pair_there_is_no_stratum() -> None:
    found = check_metrics.filled_strata(ranked([None], [None], [None]), TWO_STRATA)
    assert found == Finding(False, "None of 1 pairs is ranked: there are no strata.", {"num_strata": 0})


@pytest.mark.parametrize(
    ("weak", "correlation", "passes"),
    [([0.25, 0.5, 0.75, 1.0], 1.0, False), ([1.0, 0.75, 0.5, 0.25], -1.0, True), ([0.5, 0.25, 0.75, 1.0], 0.8, True)],
)
def test_models_that_rank_alike_do_not_differ(weak: list[float], correlation: float, passes: bool) -> None:
    frame = ranked([0.25, 0.5, 0.75, 1.0, None], [*weak, 0.5], [1] * 5)
    found = check_metrics.rank_correlation(frame, LIMITS.max_rank_correlation)
    assert found.passed is passes
    assert found.numbers == {"pairs_ranked_by_both": 4, "spearman": pytest.approx(correlation, abs=1e-12)}


@pytest.mark.parametrize("ranks", [[], [0.5], [0.5, 0.5, 0.5], [None, None]])
def test_an_undefined_correlation_does_not_pass_and_is_no_number(ranks: list[float | None]) -> None:
    found = check_metrics.rank_correlation(ranked(ranks, ranks, [1] * len(ranks)), 1.0)
    assert not found.passed
    assert found.numbers == {"pairs_ranked_by_both": len([rank for rank in ranks if rank is not None])}
    assert "is not known" in found.sentence


def test_drift_is_held_against_the_limit_of_each_statistic(check_sentence: Check) -> None:
    near = {"psi_rmi_strong": 0.25, "ks_rmi_strong": 0.2}
    assert check_metrics.drift(near, 100, LIMITS) == Finding(
        True,
        "The batch is similar to the reference; limits: PSI 0.25 (checks.max_psi), KS 0.2 (checks.max_ks).",
        near,
    )
    far = check_metrics.drift({"psi_rmi_strong": 0.3, "ks_rmi_strong": 0.2, "ks_log_ppl_q_weak": 0.5}, 100, LIMITS)
    assert not far.passed
    check_sentence(far.sentence)
    assert not check_metrics.drift({}, 0, LIMITS).passed


def test_drift_of_few_pairs_is_a_number_and_no_alarm() -> None:
    far = {"psi_rmi_strong": 9.0, "ks_rmi_strong": 1.0}
    found = check_metrics.drift(far, 99, LIMITS)
    assert (found.passed, found.numbers) == (True, far)
    assert found.sentence.startswith("Too few pairs to judge: n m / (n + m) is 99 for n pairs of the batch ")


def test_every_row_has_one_decision_and_faults_are_counted() -> None:
    decisions = pl.Series(["selected", "not_selected", "not_selected", "rejected"])
    decided = raw_rows({}, {}, {}, {}).with_columns(decision=decisions)
    found = check_metrics.decided_rows(4, decided)
    assert (found.passed, found.sentence) == (True, "4 rows; 4 decisions for 4 rows, 1 of them selected.")
    assert found.numbers["selected_share"] == 0.25
    assert not check_metrics.decided_rows(5, decided).passed
    repeated = check_metrics.decided_rows(4, pl.concat([decided.head(3), decided.head(1)]))
    assert not repeated.passed
    assert repeated.numbers == {"rows": 4, "decided_rows": 3, "decisions": 4, "selected": 2, "selected_share": 0.5}


def test_other_models_than_the_published_are_named_with_what_changed(check_sentence: Check) -> None:
    before = dataclasses.asdict(IDENTITY)
    manifest = {
        "batches": [{"batch": "b1", "models": {"strong": before}}, {"batch": "b2", "models": {"strong": before}}]
    }
    assert check_metrics.same_models({"strong": before}, None).passed
    assert check_metrics.same_models({"strong": before}, manifest).passed
    moved = check_metrics.same_models({"strong": before | {"revision": "main2"}}, manifest)
    assert not moved.passed
    assert moved.numbers == {"batches_of_other_models": 2}
    check_sentence(moved.sentence)


def test_a_batch_left_out_is_named_with_its_reason(check_sentence: Check) -> None:
    found = check_metrics.left_out({"b2": "gated", "b1": None})
    assert (found.passed, found.numbers) == (False, {"registered_batches": 2, "batches_left_out": 1})
    check_sentence(found.sentence)
    assert check_metrics.left_out({"b1": None}).passed


def test_a_published_file_that_is_changed_or_missing_is_named() -> None:
    found = check_metrics.matching_files({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "c": None}, 70)
    assert (found.passed, found.numbers) == (False, {"files": 3, "differing_files": 2, "bytes": 70})
    assert found.sentence.startswith("b is changed; c is missing: ")
    assert check_metrics.matching_files({"a": "1"}, {"a": "1"}, 5).passed


# --- the checks of stored tables ------------------------------------------------------------------------------------


@pytest.fixture
def delivered_samples(tmp_path: Path) -> Path:
    """A file of the samples: twenty rows, all of them good."""
    rows = [{"query": query, "response": answer} for query, answer in SAMPLES]
    return write_jsonl(tmp_path / "delivered" / "rows.jsonl", rows)


Evaluations = dict[str, dg.AssetCheckEvaluation]
"""The newest evaluation of every check, as `asset.check` or `asset.check|partition`."""


def evaluations(instance: dg.DagsterInstance) -> Evaluations:
    found = {}
    for run in reversed(instance.get_runs()):
        events = instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records
        for record in events:
            event = record.event_log_entry.dagster_event
            assert event is not None
            one = event.asset_check_evaluation_data
            name = f"{one.asset_key.to_user_string()}.{one.check_name}"
            found[f"{name}|{one.partition}" if one.partition else name] = one
    return found


def check_only(settings: Settings, instance: dg.DagsterInstance, asset: str, partition: str | None) -> Evaluations:
    """Make the checks of an asset alone, of what is stored."""
    selection = dg.AssetSelection.checks_for_assets(asset)
    definitions = build_job_defs(settings)
    job = dg.define_asset_job("checks_alone", selection=selection)
    merged = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job]))
    # By its tag: Dagster takes a partition key only where a job has assets as well.
    tags = {"dagster/partition": partition} if partition else {}
    result = merged.resolve_job_def("checks_alone").execute_in_process(instance=instance, tags=tags)
    assert result.success
    return evaluations(instance)


def numbers(evaluation: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in evaluation.metadata.items()}


TABLE_CHECKS = {
    "raw_data.rows_can_be_read|b1",
    "screened_data.passes_gate|b1",
    "logprobs.few_nulls|b1|strong",
    "logprobs.few_nulls|b1|weak",
    "logprobs.few_truncated|b1|strong",
    "logprobs.few_truncated|b1|weak",
    "rmi_scores.answers_explain_queries|b1|strong",
    "rmi_scores.answers_explain_queries|b1|weak",
    "disagreement_scores.models_differ|b1",
    "disagreement_scores.strata_are_filled|b1",
    "decisions.every_row_is_decided|b1",
    "decisions.passes_gates|b1",
    "decisions.same_models_as_published|b1",
}
DATASET_CHECKS = {"curated_dataset.every_batch_is_in_it", "curated_dataset.files_are_as_published"}


def test_a_run_makes_every_check_once_for_its_partition_and_none_blocks(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered_samples: Path
) -> None:
    settings = settings_for(checks={"min_mean_rmi": -10})
    registration.register(Deployment(settings, instance), "b1", [delivered_samples], None)
    summary = run_batch.run_batch(Deployment(settings, instance), "b1")
    found = evaluations(instance)
    assert set(found) == TABLE_CHECKS | DATASET_CHECKS
    assert not any(one.blocking for one in found.values())
    assert {one.severity for one in found.values()} == {dg.AssetCheckSeverity.WARN}
    assert {name for name, one in found.items() if not one.passed} == set()
    assert summary.warnings == []

    assert numbers(found["raw_data.rows_can_be_read|b1"])["rejected_share"] == 0.0
    assert numbers(found["logprobs.few_nulls|b1|weak"])["wanted_weak"] == 5 * 20
    assert numbers(found["disagreement_scores.strata_are_filled|b1"]) == {
        "num_strata": 2,
        "fewest_rows_in_a_stratum": 10,
    }
    scores = open_storage(settings).tables.read("rmi_scores", Partition("b1", "weak")).frame["rmi"]
    mean = numbers(found["rmi_scores.answers_explain_queries|b1|weak"])
    assert mean["mean_rmi_weak"] == pytest.approx(scores.mean(), rel=1e-3)
    assert mean["scorable_pairs_weak"] == 20
    assert numbers(found["decisions.every_row_is_decided|b1"])["selected_share"] == 0.25
    event = instance.get_latest_materialization_event(dg.AssetKey("decisions"))
    target = found["decisions.passes_gates|b1"].target_materialization_data
    assert event is not None
    assert target is not None
    assert target.run_id == event.run_id
    (latest,) = instance.event_log_storage.get_asset_check_execution_history(
        dg.AssetCheckKey(dg.AssetKey("logprobs"), "few_nulls"),
        limit=1,
    )
    assert latest.partition == "b1|weak"


def test_a_check_that_does_not_pass_is_a_warning_of_the_summary_and_stops_nothing(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered_samples: Path
) -> None:
    settings = settings_for(
        checks={"min_mean_rmi": 10, "max_rank_correlation": -1.0},
        ranking={"num_strata": 10, "min_rows_per_stratum": 2},
    )
    registration.register(Deployment(settings, instance), "b1", [delivered_samples], None)
    summary = run_batch.run_batch(Deployment(settings, instance), "b1")
    assert summary.rows_by_decision["selected"] == 5
    said = [warning.split(":")[0] for warning in summary.warnings]
    assert said == [
        "check answers_explain_queries of rmi_scores of b1|strong",
        "check answers_explain_queries of rmi_scores of b1|weak",
        "check models_differ of disagreement_scores of b1",
    ]


def test_what_the_asset_warns_of_is_not_said_twice(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered_samples: Path
) -> None:
    settings = settings_for(checks={"min_mean_rmi": -10}, ranking={"num_strata": 10, "min_rows_per_stratum": 20})
    registration.register(Deployment(settings, instance), "b1", [delivered_samples], None)
    summary = run_batch.run_batch(Deployment(settings, instance), "b1")
    assert not evaluations(instance)["disagreement_scores.strata_are_filled|b1"].passed
    assert [warning.split(":")[0] for warning in summary.warnings] == ["model 'strong'", "model 'weak'"]


def test_a_torn_table_makes_its_checks_errors_that_say_so_and_the_run_goes_on(
    settings_for: SettingsFor, instance: dg.DagsterInstance
) -> None:
    settings = settings_for()
    storage = open_storage(settings)
    store_batch(storage, settings)
    instance.add_dynamic_partitions("batch", ["b1", "b2"])
    store_batch(storage, settings, "b2")
    storage.files.write_bytes(b"PAR1torn", "raw_data", "b1", "table.parquet")
    found = check_only(settings, instance, "decisions", "b1")
    for name in ("every_row_is_decided", "passes_gates", "same_models_as_published"):
        one = found[f"decisions.{name}|b1"]
        assert (one.passed, one.severity) == (False, dg.AssetCheckSeverity.ERROR)
        assert one.description is not None
        assert one.description.startswith("The check cannot be made: ")
        assert "raw_data/b1/table.parquet" in one.description
    assert check_only(settings, instance, "raw_data", "b2")["raw_data.rows_can_be_read|b2"].passed


@pytest.mark.parametrize("fault", ["gone", "torn"])
def test_a_published_version_that_is_gone_or_torn_is_an_error_of_what_reads_it_alone(
    settings_for: SettingsFor, instance: dg.DagsterInstance, fault: str
) -> None:
    settings = settings_for()
    storage = open_storage(settings)
    store_batch(storage, settings)
    instance.add_dynamic_partitions("batch", ["b1"])
    version = publish(storage, settings, "b1")
    if fault == "gone":
        storage.files.remove_folder(*versions.place(version))
    else:
        storage.files.write_bytes(b'{"batches": [', *versions.place(version, versions.MANIFEST))
    found = check_only(settings, instance, "decisions", "b1")
    assert found["decisions.every_row_is_decided|b1"].passed
    assert found["decisions.passes_gates|b1"].passed
    one = found["decisions.same_models_as_published|b1"]
    assert (one.passed, one.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert f"{version}/manifest.json" in (one.description or "")


def test_a_model_that_moved_since_the_publication_is_a_warning(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    settings = settings_for()
    storage = open_storage(settings)
    instance.add_dynamic_partitions("batch", ["b1"])
    store_batch(storage, settings)
    name = "decisions.same_models_as_published|b1"
    first = check_only(settings, instance, "decisions", "b1")[name]
    assert (first.passed, first.description) == (True, "No version is published yet.")
    publish(storage, settings, "b1")
    assert check_only(settings, instance, "decisions", "b1")[name].passed
    decisions = storage.tables.read("decisions", Partition("b1"))
    models = decisions.provenance["models"]
    moved = models | {"weak": models["weak"] | {"revision": "another"}}
    storage.tables.write(
        StoredTable(decisions.frame, decisions.provenance | {"models": moved}), "decisions", Partition("b1")
    )
    after = check_only(settings, instance, "decisions", "b1")[name]
    assert (after.passed, after.severity) == (False, dg.AssetCheckSeverity.WARN)
    check_sentence(after.description or "")


def publish(storage: Storage, settings: Settings, *registered: str) -> str:
    included, excluded = read_batches(storage, registered, settings)
    return curated_dataset.publish(storage, settings, included, excluded).version


def test_the_published_files_are_hashed_and_a_batch_left_out_is_named(
    settings_for: SettingsFor, instance: dg.DagsterInstance, check_sentence: Check
) -> None:
    settings = settings_for()
    storage = open_storage(settings)
    instance.add_dynamic_partitions("batch", ["b1"])
    store_batch(storage, settings)
    version = publish(storage, settings, "b1")
    found = check_only(settings, instance, "curated_dataset", None)
    assert all(found[name].passed for name in DATASET_CHECKS)
    instance.add_dynamic_partitions("batch", ["b2"])
    folder = Path(storage.files.path(*versions.place(version)))
    (folder / "scores" / "b1.parquet").write_bytes(b"")
    (folder / "diff_high" / "alpaca.json").unlink()
    found = check_only(settings, instance, "curated_dataset", None)
    left_out, files = (found[name] for name in sorted(DATASET_CHECKS))
    assert not left_out.passed
    check_sentence(left_out.description)
    assert not files.passed
    assert (files.description or "").startswith("diff_high/alpaca.json is missing; scores/b1.parquet is changed: ")
    assert numbers(files)["differing_files"] == 2


def test_drift_is_checked_where_a_reference_is_named_and_strata_where_the_batch_is_the_pool(
    settings_for: SettingsFor,
) -> None:
    def names(settings: Settings) -> set[str]:
        checks = {key.name for definition in build_checks(settings) for key in definition.check_keys}
        return checks & {"models_differ", "strata_are_filled", "is_near_reference"}

    named = {"reference": {"name": "r1", "batches": ["b1"]}}
    assert names(settings_for()) == {"models_differ", "strata_are_filled"}
    assert names(settings_for(ranking=named)) == {"models_differ", "strata_are_filled", "is_near_reference"}
    assert names(settings_for(ranking=named | {"pool": "reference"})) == {"models_differ", "is_near_reference"}


def test_where_no_rmi_is_wanted_none_is_checked(settings_for: SettingsFor) -> None:
    settings = settings_for(
        scoring={"quantities": ["ifd"]}, selections=[{"name": "ifd", "strategy": "ifd", "budget": {"count": 1}}]
    )
    assets = {key.asset_key.to_user_string() for checks in build_checks(settings) for key in checks.check_keys}
    assert assets == {"raw_data", "screened_data", "logprobs", "decisions", "curated_dataset"}


def test_the_checks_load_and_are_of_every_table_that_is_measured(settings_for: SettingsFor) -> None:
    checks = build_checks(settings_for())
    dg.Definitions.validate_loadable(build_job_defs(settings_for()))
    keys = {key for definition in checks for key in definition.check_keys}
    assert {f"{key.asset_key.to_user_string()}.{key.name}" for key in keys} == {
        name.partition("|")[0] for name in TABLE_CHECKS | DATASET_CHECKS
    }
    assert len({definition.op.name for definition in checks}) == len(checks) == 7
    assert all(spec.description for definition in checks for spec in definition.check_specs)


def test_drift_from_the_reference_is_measured_once_it_is_made(
    settings_for: SettingsFor, instance: dg.DagsterInstance, delivered_samples: Path, check_sentence: Check
) -> None:
    settings = settings_for(ranking={"reference": {"name": "r1", "batches": ["b1"]}})
    registration.register(Deployment(settings, instance), "b1", [delivered_samples], None)
    run_batch.run_batch(Deployment(settings, instance), "b1")
    before = evaluations(instance)["disagreement_scores.is_near_reference|b1"]
    assert (before.passed, numbers(before)) == (False, {})
    check_sentence(before.description)
    build_job_defs(settings).resolve_job_def(REFERENCE_JOB).execute_in_process(instance=instance)
    found = check_only(settings, instance, "disagreement_scores", "b1")["disagreement_scores.is_near_reference|b1"]
    assert found.passed
    statistics = [
        f"{name}_{of}_{model}" for name in ("psi", "ks") for of in ("log_ppl_q", "rmi") for model in settings.models
    ]
    assert numbers(found) == dict.fromkeys(statistics, 0.0)
    other = open_storage(settings)
    scores = other.tables.read("rmi_scores", Partition("b1", "weak"))
    moved = scores.frame.with_columns(rmi=pl.col("rmi") + 100.0)
    other.tables.write(StoredTable(moved, scores.provenance), "rmi_scores", Partition("b1", "weak"))
    drifted = check_only(settings, instance, "disagreement_scores", "b1")["disagreement_scores.is_near_reference|b1"]
    assert (drifted.description or "").startswith("Too few pairs to judge: n m / (n + m) is 10 for")
    assert numbers(drifted)["ks_rmi_weak"] == 1.0
    assert numbers(drifted)["ks_rmi_strong"] == 0.0
