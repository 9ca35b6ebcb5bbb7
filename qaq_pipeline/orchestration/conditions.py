"""When an asset is made automatically: the automation condition of each, in one rule for a batch and one for all.

Belongs here: the conditions. Does not belong here: what evaluates them (`automation`), and what an asset does.

The assets of a batch are a chain: each follows the input that is made last. What `qaq run` makes is the driver's: it
brings its own followers, and a condition that fired between two of its jobs would run one of them twice.
"""

from collections.abc import Sequence

import dagster as dg

from qaq_pipeline.pipeline import PIPELINE, Asset, Pipeline, Purpose

BY_DRIVER = "qaq/driver"
"""Tag of the runs of a driver, such as `qaq run`."""

_Condition = dg.AutomationCondition


def automate(assets: Sequence[dg.AssetsDefinition], pipeline: Pipeline = PIPELINE) -> list[dg.AssetsDefinition]:
    """The assets with their conditions. An asset without inputs has none: the landing zone's sensor runs it."""

    def with_condition(spec: dg.AssetSpec) -> dg.AssetSpec:
        condition = _condition(pipeline[spec.key.to_user_string()], pipeline)
        return spec.replace_attributes(automation_condition=condition)

    return [asset.map_asset_specs(with_condition) for asset in assets]


def _condition(asset: Asset, pipeline: Pipeline) -> dg.AutomationCondition | None:
    last_input = pipeline.last_input(asset.name)
    if last_input is None:
        return None
    match asset.purpose:
        case Purpose.REFERENCE:
            return of_reference()
        case Purpose.PUBLICATION:
            return of_dataset(last_input)
        case Purpose.PAGE | Purpose.CALIBRATION:
            return of_report(last_input)
        case Purpose.CURATION:
            return of_batch(last_input)
        case Purpose.TRIAL:
            return None


def of_batch(last_input: str) -> dg.AutomationCondition:
    """An asset of a batch: made when the last of its inputs was made, and in the same run where both are due.

    It waits for inputs that are missing, under way, or failed when they were last to be made.
    """
    is_due_with_input = _input_matches(last_input, _Condition.will_be_requested())
    has_failed = _Condition.execution_failed() & ~_Condition.will_be_requested()
    return (
        (_follows(last_input) | _was_missing() | is_due_with_input)
        & ~_Condition.any_deps_missing()
        & ~_Condition.any_deps_match(has_failed)
        & _is_idle()
    ).with_label(f"after {last_input}")


def of_reference() -> dg.AutomationCondition:
    """The reference: made once, when the scores of all its batches are there. It is fixed, so nothing makes it again.

    Where it could not be made, it waits for a person, whom the failed run alerts.
    """
    is_not_ready = _Condition.missing() | _Condition.in_progress() | _Condition.will_be_requested()
    return (
        _Condition.missing()
        & ~_Condition.any_deps_match(is_not_ready)
        & ~_Condition.in_progress()
        & ~_Condition.execution_failed()
    ).with_label("once, after rmi_scores of all its batches")


def of_dataset(last_input: str) -> dg.AutomationCondition:
    """The dataset: published when a batch was selected from, whatever became of others, once nothing is under way."""
    follows = _follows(last_input) | _was_missing(last_input)
    return (follows & _is_idle()).with_label(f"after {last_input}, once nothing is under way")


def of_report(last_input: str) -> dg.AutomationCondition:
    """A page or a calibration: made when its inputs were made, in a run of its own; its failure fails nothing else."""
    follows = _follows(last_input) | _was_missing(last_input)
    return (follows & ~_Condition.any_deps_missing() & _is_idle()).with_label(f"after {last_input}, alone")


def _is_idle() -> dg.AutomationCondition:
    return ~_Condition.any_deps_in_progress() & ~_Condition.in_progress()


def _input_matches(name: str, condition: dg.AutomationCondition) -> dg.AutomationCondition:
    return _Condition.any_deps_match(condition).allow(dg.AssetSelection.assets(name))


def _follows(last_input: str) -> dg.AutomationCondition:
    """The input was made since this was last asked for, and since it was last made; and not by a driver.

    Two comparisons, because each is by time only where it stands alone: `since_last_handled` lets an input that was
    made between asking and making go unseen.
    """
    is_made = _input_matches(last_input, _Condition.newly_updated())
    since_both = is_made.since(_Condition.newly_requested()) & is_made.since(_Condition.newly_updated())
    return since_both & ~_was_last_made_by_driver(last_input)


def _was_last_made_by_driver(last_input: str) -> dg.AutomationCondition:
    tag = {BY_DRIVER}
    # The first sees no event where there was none before; the second sees the newest batch only.
    by_driver = _Condition.all_new_updates_have_run_tags(tag_keys=tag) | _Condition.executed_with_tags(tag_keys=tag)
    made_otherwise = _input_matches(last_input, _Condition.newly_updated() & ~by_driver)
    return _input_matches(last_input, by_driver).since(made_otherwise)


def _was_missing(beside: str | None = None) -> dg.AutomationCondition:
    """It was missing when the conditions were evaluated for the first time: what landed before there was a daemon.

    Args:
        beside: an input of which a partition must have been there then.
    """
    at_first = _Condition.missing() & _Condition.initial_evaluation()
    if beside is not None:
        at_first &= _input_matches(beside, ~_Condition.missing())
    return at_first.since(_Condition.newly_requested() | _Condition.newly_updated())
