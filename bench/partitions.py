"""What many batches cost Dagster: time of one evaluation of all automation conditions, and size of the event log.

    python -m bench.partitions BATCHES [BATCHES …] [--postgres QAQ_POSTGRES_URL]

Each batch has one materialisation of each table of it, as a run stores it, without metadata. The instance is in
SQLite, or in the empty database that an environment variable names.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import yaml
from dagster._core.instance.ref import InstanceRef

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.definitions import build_defs
from qaq_pipeline.pipeline import PIPELINE, Partitioning, Purpose


def add(instance: dg.DagsterInstance, numbers: range, roles: Sequence[str]) -> int:
    """Add batches with the materialisations of their tables; return the number of events."""
    batches = [f"b{number:06d}" for number in numbers]
    instance.add_dynamic_partitions("batch", batches)
    of_batches = (Partitioning.BATCH, Partitioning.BATCH_AND_MODEL)
    assets = [one for one in PIPELINE.assets if one.partitioning in of_batches and one.purpose is not Purpose.TRIAL]
    events = 0
    for batch in batches:
        for asset in assets:
            keys = (
                [batch]
                if asset.partitioning is Partitioning.BATCH
                else [dg.MultiPartitionKey({"batch": batch, "model": role}) for role in roles]
            )
            for key in keys:
                instance.report_runless_asset_event(dg.AssetMaterialization(asset.name, partition=key))
                events += 1
    return events


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each size on top of the one before."""
    parser = argparse.ArgumentParser(prog="python -m bench.partitions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--postgres", help="environment variable with the URL of an empty database")
    asked = parser.parse_args(arguments)
    settings = load_settings()
    with tempfile.TemporaryDirectory() as home:
        if asked.postgres:
            address = {"storage": {"postgres": {"postgres_url": {"env": asked.postgres}}}}
            (Path(home) / "dagster.yaml").write_text(yaml.safe_dump(address), encoding="utf-8")
        os.environ["DAGSTER_HOME"] = home
        with dg.DagsterInstance.from_ref(InstanceRef.from_dir(home)) as instance:
            definitions, done = build_defs(settings), 0
            for batches in asked.batches:
                started = time.monotonic()
                events = add(instance, range(done, batches), sorted(settings.models))
                stored = time.monotonic() - started
                first = timed(definitions, instance, None)
                second = timed(definitions, instance, first[1])
                print(  # noqa: T201
                    f"{batches:,} batches: {events:,} events in {stored:.0f} s; evaluation {first[0]:.1f} s, next "
                    f"{second[0]:.1f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB",
                    flush=True,
                )
                done = batches


def timed(definitions: dg.Definitions, instance: dg.DagsterInstance, cursor: object) -> tuple[float, object]:
    """Seconds of an evaluation, and its cursor."""
    started = time.monotonic()
    result = dg.evaluate_automation_conditions(definitions, instance, cursor=cursor)  # type: ignore[arg-type]
    return time.monotonic() - started, result.cursor


if __name__ == "__main__":
    main()
