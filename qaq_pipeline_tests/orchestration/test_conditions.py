"""conditions: what is run without a hand, by the real graph and conditions, with assets that do as they are told.

`World` evaluates the definitions of the pipeline, tick by tick, and runs what they ask for. What runs are stand-ins of
the same keys and partitions, so that one can fail or give the same data again.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any

import dagster as dg
import pytest
import yaml

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.orchestration.conditions import BY_DRIVER
from qaq_pipeline_tests.conftest import NO_CALIBRATION, NO_REPORTS

MODELS = {"strong": {"hub": "tiny/s"}, "weak": {"hub": "tiny/w"}}
PLAIN = {"models": MODELS, **NO_CALIBRATION, "reports": NO_REPORTS}
SETTINGS = parse_settings(yaml.safe_dump(PLAIN))
REPORTING = parse_settings(yaml.safe_dump({"models": MODELS, **NO_CALIBRATION}))
RANKING = {"pool": "reference", "reference": {"name": "r1", "batches": ["b1", "b2"]}}
REFERRING = parse_settings(yaml.safe_dump(PLAIN | {"ranking": RANKING}))
INGEST = ["screened_data", "signatures"]
SCORE = ["logprobs", "rmi_scores"]
SELECT = ["decisions", "disagreement_scores", "selected_subset"]

Requested = dict[str, set[str | None]]


@cache
def definitions() -> dg.Definitions:
    """Of the pipeline; they keep nothing of what is evaluated."""
    return build_defs(SETTINGS)


class World:
    """An instance, the conditions' cursor, and what the stand-ins do."""

    def __init__(self, instance: dg.DagsterInstance, defs: dg.Definitions | None = None) -> None:
        self.instance = instance
        self.defs = defs or definitions()
        self.cursor: Any = None
        self.failing: set[tuple[str, str | None]] = set()
        graph = self.defs.resolve_asset_graph()
        keys = list(graph.materializable_asset_keys)
        self.stand_ins = {
            key.to_user_string(): self._stand_in(
                key.to_user_string(), graph.get(key).partitions_def, sorted(graph.get(key).parent_keys)
            )
            for key in keys
        }

    def _stand_in(
        self, name: str, partitions: dg.PartitionsDefinition | None, deps: list[dg.AssetKey]
    ) -> dg.AssetsDefinition:
        @dg.asset(name=name, partitions_def=partitions, deps=deps)
        def stand_in(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            partition = context.partition_key if context.has_partition_key and partitions is not None else None
            if (name, partition) in self.failing:
                raise RuntimeError(f"{name} of {partition} was told to fail")
            return dg.MaterializeResult(data_version=dg.DataVersion(context.run.run_id))

        return stand_in

    def deliver(self, *batches: str, **tags: str) -> None:
        """What the landing zone's sensor does of these batches."""
        self.instance.add_dynamic_partitions("batch", list(batches))
        for batch in batches:
            self.run(["raw_data"], batch, **tags)

    def run(self, names: list[str], partition: str | None, **tags: str) -> bool:
        return dg.materialize(
            list(self.stand_ins.values()),
            selection=dg.AssetSelection.assets(*names),
            partition_key=partition,
            instance=self.instance,
            tags={key.replace("__", "/"): value for key, value in tags.items()},
            raise_on_error=False,
        ).success

    def tick(self) -> Requested:
        """One evaluation of the conditions: what is asked for.

        The batches are read once: Dagster's tester reads them for every node of every condition, 800 times a tick.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.instance, "get_dynamic_partitions", cache(self.instance.get_dynamic_partitions))
            result = dg.evaluate_automation_conditions(
                self.defs, self.instance, asset_selection=dg.AssetSelection.all(), cursor=self.cursor
            )
        self.cursor = result.cursor
        names = {name: result.get_requested_partitions(dg.AssetKey(name)) for name in self.stand_ins}
        return {name: set(partitions) for name, partitions in names.items() if partitions}

    def execute(self, requested: Requested) -> None:
        """Run what was asked for: a run for each partition."""
        by_partition: dict[str | None, list[str]] = defaultdict(list)
        for name, partitions in requested.items():
            for partition in partitions:
                by_partition[partition].append(name)
        for partition, names in sorted(by_partition.items(), key=str):
            self.run(names, partition)

    def settle(self, *, most: int = 12) -> list[Requested]:
        """Tick and run until nothing more is asked for; what was asked for, tick by tick."""
        history = []
        for _ in range(most):
            requested = self.tick()
            if not requested:
                return history
            self.execute(requested)
            history.append(requested)
        pytest.fail(f"the conditions never come to rest: {history[-3:]}")


@pytest.fixture
def world() -> Iterator[World]:
    """A world without a batch; the conditions were evaluated once."""
    with dg.DagsterInstance.ephemeral() as instance:
        fresh = World(instance)
        assert fresh.tick() == {}
        yield fresh


def each(names: list[str], *partitions: str) -> Requested:
    """The same partitions of each asset."""
    return {name: set(partitions) for name in names}


def whole_chain(*batches: str) -> list[Requested]:
    """What is asked for, tick by tick, of batches whose raw_data is there."""
    return [
        each(INGEST, *batches),
        each(SCORE, *(f"{batch}|{model}" for batch in batches for model in ("strong", "weak"))),
        each(SELECT, *batches),
        {"curated_dataset": {None}},
    ]


def test_nothing_is_asked_for_before_a_batch_is_there(world: World) -> None:
    assert world.settle() == []


def test_a_batch_runs_through_in_four_steps_and_is_published_once(world: World) -> None:
    world.deliver("b1")
    assert world.settle() == whole_chain("b1")
    assert world.settle() == []


@pytest.fixture
def calibrating() -> Iterator[World]:
    """A world whose batches are calibrated; the conditions were evaluated once."""
    with dg.DagsterInstance.ephemeral() as instance:
        fresh = World(instance, build_defs(parse_settings(yaml.safe_dump({"models": MODELS, "reports": NO_REPORTS}))))
        assert fresh.tick() == {}
        yield fresh


def test_planted_rows_are_scored_with_their_batch_which_is_calibrated_beside_the_publication(
    calibrating: World,
) -> None:
    calibrating.deliver("b1")
    assert calibrating.settle() == [
        each([*INGEST, "planted_rows"], "b1"),
        each([*SCORE, "planted_scores"], "b1|strong", "b1|weak"),
        each([*SELECT, "validity_cuts", "validity"], "b1"),
        {"curated_dataset": {None}} | each(["calibration"], "b1"),
    ]
    assert calibrating.settle() == []


def test_a_calibration_that_fails_stops_no_publication_and_is_not_tried_again_and_again(calibrating: World) -> None:
    calibrating.failing = {("calibration", "b1")}
    calibrating.deliver("b1")
    assert calibrating.settle()[3] == {"curated_dataset": {None}} | each(["calibration"], "b1")
    assert calibrating.settle() == []


def test_batches_that_were_there_before_the_first_tick_are_curated() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(instance)
        world.deliver("b1", "b2")
        assert world.settle() == whole_chain("b1", "b2")


def test_a_batch_that_was_half_done_before_the_first_tick_is_ended() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(instance)
        world.deliver("b1")
        world.run(INGEST, "b1")
        world.run(SCORE, dg.MultiPartitionKey({"batch": "b1", "model": "strong"}))
        assert world.settle() == [
            each(SCORE, "b1|weak"),
            each(SELECT, "b1"),
            {"curated_dataset": {None}},
        ]


def test_two_batches_at_once_are_curated_side_by_side_and_published_together(world: World) -> None:
    world.deliver("b1", "b2")
    assert world.settle() == whole_chain("b1", "b2")


def test_a_batch_that_lands_while_another_is_under_way_is_published_with_it(world: World) -> None:
    world.deliver("b1")
    world.execute(world.tick())
    world.deliver("b2")
    asked = world.settle()
    assert [step for step in asked if "curated_dataset" in step] == [asked[-1]]
    assert {partition for step in asked for partition in step.get("selected_subset", set())} == {"b1", "b2"}


@pytest.mark.parametrize("failing", ["signatures", "decisions"])
def test_a_failed_batch_holds_up_no_other_and_is_not_tried_again_and_again(world: World, failing: str) -> None:
    world.failing = {(failing, "bad")}
    world.deliver("bad", "good")
    asked = world.settle()
    assert asked[-1]["curated_dataset"] == {None}
    # Once more where its input was made in the same run: that is an input made since it was asked for.
    assert sum("bad" in step.get(failing, set()) for step in asked) == (2 if failing == "decisions" else 1)
    assert world.settle() == []


def test_a_batch_without_the_scores_of_one_model_waits_and_the_others_are_published(world: World) -> None:
    world.failing = {("logprobs", "b1|weak")}
    world.deliver("b1", "b2")
    asked = world.settle()
    assert {partition for step in asked for partition in step.get("disagreement_scores", set())} == {"b2"}
    assert asked[-1] == {"curated_dataset": {None}}
    # The model is there now: a person runs the failed partition again, and the rest follows.
    world.failing = set()
    assert world.run(SCORE, dg.MultiPartitionKey({"batch": "b1", "model": "weak"}))
    assert world.settle() == [each(SELECT, "b1"), {"curated_dataset": {None}}]


def test_a_corrected_delivery_is_curated_again(world: World) -> None:
    world.deliver("b1", "b2")
    world.settle()
    world.deliver("b1")
    assert world.settle() == whole_chain("b1")


def test_a_corrected_delivery_of_a_batch_that_failed_is_curated(world: World) -> None:
    world.failing = {("signatures", "b1")}
    world.deliver("b1")
    world.settle()
    world.failing = set()
    world.deliver("b1")
    assert world.settle() == whole_chain("b1")


def test_when_a_scoring_of_a_corrected_delivery_fails_the_old_ranks_are_not_mixed_with_new_scores(world: World) -> None:
    world.deliver("b1")
    world.settle()
    world.failing = {("logprobs", "b1|weak")}
    world.deliver("b1")
    asked = world.settle()
    assert not any("disagreement_scores" in step for step in asked)


def test_a_delivery_that_lands_while_its_batch_is_under_way_is_curated_after_it(world: World) -> None:
    world.deliver("b1")
    ingest = world.tick()
    world.deliver("b1")
    world.execute(ingest)
    asked = world.settle()
    assert asked[-1] == {"curated_dataset": {None}}
    assert {"logprobs", "decisions"} <= {name for step in asked for name in step}


def test_a_correction_right_after_its_batch_was_screened_is_not_overlooked(world: World) -> None:
    world.deliver("b1")
    world.execute(world.tick())
    world.deliver("b1")  # Between two ticks, both the screening and the correction.
    ingest, score, select, publish = whole_chain("b1")
    # The scoring of what was screened first is asked for as well; it runs after, so nothing is left to be done.
    assert world.settle() == [ingest | score, select, publish]


def test_a_failed_check_in_another_run_stops_nothing_since_verdicts_are_stored_with_the_tables(world: World) -> None:
    world.deliver("b1")
    world.execute(world.tick())
    for check in ("not_gated", "screening"):
        world.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=dg.AssetKey("screened_data"), check_name=check, passed=False, metadata={}, partition="b1"
            )
        )
    assert world.settle() == whole_chain("b1")[1:]


# --- a frozen reference ---------------------------------------------------------------------------------------------


@pytest.fixture
def referring() -> Iterator[World]:
    """A world whose ranks are taken against a reference of b1 and b2."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield World(instance, build_defs(REFERRING))


def scored(*batches: str) -> Requested:
    return each(SCORE, *(f"{batch}|{model}" for batch in batches for model in ("strong", "weak")))


def test_a_reference_is_made_once_when_all_its_batches_are_scored_and_the_ranks_follow(referring: World) -> None:
    referring.deliver("b1")
    assert referring.settle() == [each(INGEST, "b1"), scored("b1")]
    referring.deliver("b2")
    assert referring.settle() == [
        each(INGEST, "b2"),
        scored("b2"),
        {"rank_reference": {None}},
        each(SELECT, "b1", "b2"),
        {"curated_dataset": {None}},
    ]
    referring.deliver("b1", "b3")
    assert referring.settle() == whole_chain("b1", "b3")


def test_a_reference_that_could_not_be_made_is_not_tried_again_and_again(referring: World) -> None:
    referring.failing = {("rank_reference", None)}
    referring.deliver("b1", "b2")
    assert referring.settle() == [each(INGEST, "b1", "b2"), scored("b1", "b2"), {"rank_reference": {None}}]
    referring.failing = set()
    assert referring.run(["rank_reference"], None)
    assert referring.settle() == [each(SELECT, "b1", "b2"), {"curated_dataset": {None}}]


# --- audit pages ----------------------------------------------------------------------------------------------------


@pytest.fixture
def reporting() -> Iterator[World]:
    """A world with audit pages; the conditions were evaluated once."""
    with dg.DagsterInstance.ephemeral() as instance:
        fresh = World(instance, build_defs(REPORTING))
        assert fresh.tick() == {}
        yield fresh


def test_pages_follow_what_they_show(reporting: World) -> None:
    *chain, publish = whole_chain("b1", "b2")
    reporting.deliver("b1", "b2")
    assert reporting.settle() == [*chain, publish | each(["batch_report"], "b1", "b2"), {"dataset_report": {None}}]
    assert reporting.settle() == []


def test_a_page_that_fails_stops_no_publication_and_is_not_tried_again_and_again(reporting: World) -> None:
    reporting.failing = {("batch_report", "b1"), ("dataset_report", None)}
    reporting.deliver("b1")
    asked = reporting.settle()
    assert [step for step in asked if "curated_dataset" in step] == [asked[3]]
    assert reporting.settle() == []
    # A failed page holds up no other delivery.
    reporting.deliver("b2")
    assert {"curated_dataset"} <= {name for step in reporting.settle() for name in step}


def test_pages_of_what_the_driver_makes_are_left_to_the_driver(reporting: World) -> None:
    tag = {BY_DRIVER.replace("/", "__"): "some driver"}
    reporting.deliver("b1", **tag)
    reporting.run(INGEST, "b1", **tag)
    for model in ("strong", "weak"):
        reporting.run(SCORE, dg.MultiPartitionKey({"batch": "b1", "model": model}), **tag)
    reporting.run(SELECT, "b1", **tag)
    assert reporting.tick() == {}


# --- beside `qaq run` and screening again ---------------------------------------------------------------------------


def test_what_the_driver_makes_is_left_to_the_driver(world: World) -> None:
    tag = {BY_DRIVER.replace("/", "__"): "some driver"}
    world.deliver("b1", **tag)
    assert world.tick() == {}
    world.run(INGEST, "b1", **tag)
    assert world.tick() == {}
    for model in ("strong", "weak"):
        world.run(SCORE, dg.MultiPartitionKey({"batch": "b1", "model": model}), **tag)
    assert world.tick() == {}
    world.run(SELECT, "b1", **tag)
    assert world.tick() == {}


def test_a_corrected_delivery_of_a_batch_that_the_driver_made_is_curated(world: World) -> None:
    tag = {BY_DRIVER.replace("/", "__"): "some driver"}
    world.deliver("b1", **tag)
    world.run(INGEST, "b1", **tag)
    for model in ("strong", "weak"):
        world.run(SCORE, dg.MultiPartitionKey({"batch": "b1", "model": model}), **tag)
    world.run(SELECT, "b1", **tag)
    world.run(["curated_dataset"], None, **tag)
    assert world.settle() == []
    world.deliver("b1")
    assert world.settle() == whole_chain("b1")


def test_screening_again_that_found_something_else_is_followed_and_published(world: World) -> None:
    world.deliver("b1", "b2")
    world.settle()
    world.run(["screened_data"], "b2")
    assert world.settle() == whole_chain("b2")[1:]


# --- a daemon that is restarted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("is_cursor_lost", [False, True])
def test_a_daemon_restarted_in_the_middle_neither_loses_nor_repeats_a_batch(steps: int, is_cursor_lost: bool) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        before = World(instance)
        before.tick()
        before.deliver("b1", "b2")
        asked = []
        for _ in range(steps):
            requested = before.tick()
            before.execute(requested)
            asked.append(requested)
        after = World(instance)
        after.cursor = None if is_cursor_lost else before.cursor
        asked += after.settle()
    assert [step for step in asked if step] == whole_chain("b1", "b2")
