"""Rows of the demo under each pool: in process, two processes, and a real Ray cluster of two nodes.

`QAQ_TEST_POOL_ROWS` is how many rows of each batch; all of them take half an hour on two cores.
Tolerance: 1e-4 nats per token between pools, whose batches differ in shape; float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.scoring.chunk_scorer import OtherIdentityError
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.pools import RayPool
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline_tests.conftest import NO_CALIBRATION
from qaq_pipeline_tests.end_to_end.test_real_models import read_pairs
from qaq_pipeline_tests.end_to_end.test_recomputation import EXAMPLES, demo_settings
from qaq_pipeline_tests.support.cached_scores import quantities_in
from qaq_pipeline_tests.support.ray_cluster import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(3600)]

TOLERANCE = 1e-4
NUM_ROWS = int(os.environ.get("QAQ_TEST_POOL_ROWS", "40"))
ROLES = ("strong", "weak")
SCORES = ("log_ppl_q", "log_ppl_q_given_a", "rmi", "nll_end")
"""All in nats per token."""


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, dict[str, Any]]]:
    """The settings of each pool."""
    with two_nodes() as address:
        yield {
            "in_process": {"kind": "in_process"},
            "processes": {"kind": "processes", "size": 2},
            "ray": {"kind": "ray", "size": 2, "address": address},
        }


def settings_under(pool: dict[str, Any], home: Path, monkeypatch: pytest.MonkeyPatch, **runtime: Any) -> Settings:
    """The demo's in float32; on Ray each worker takes one of the cluster's two GPUs, which are only counted."""
    with monkeypatch.context() as patch:
        settings = demo_settings(home, patch, runtime={"pool": pool, **runtime}, **NO_CALIBRATION)
    placed = {"dtype": "float32", "device": "cpu", "gpus": 1.0}
    models = {role: model.model_copy(update=placed) for role, model in settings.models.items()}
    return settings.model_copy(update={"models": models})


def test_rows_of_the_demo_have_the_same_scores_and_decisions_under_every_pool(
    pools: dict[str, dict[str, Any]], instance: dg.DagsterInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storages: dict[str, Storage] = {}
    batches = {file.name.split(".")[0]: first_rows(file, tmp_path) for file in sorted(EXAMPLES.parent.iterdir())}
    for name, pool in pools.items():
        settings = settings_under(pool, tmp_path / name, monkeypatch)
        storages[name] = open_storage(settings)
        for batch, file in batches.items():
            registration.register(Deployment(settings, instance), batch, [file], None)
            run_batch.run_batch(Deployment(settings, instance), batch)
            for role in ROLES:
                shown = metadata_of(instance, f"{batch}|{role}")
                assert (shown["pool"], shown["processes"]) == (name, 1 if name == "in_process" else 2)
                assert all((" of " in device) == (name == "ray") for device in shown["devices"])
    first = storages.pop("in_process")
    for name, other in storages.items():
        for batch in batches:
            print(f"{batch} under {name}:")
            for role in ROLES:
                check_scores(
                    *(found.tables.read("rmi_scores", Partition(batch, role)).frame for found in (first, other))
                )
            check_decisions(*(found.tables.read("decisions", Partition(batch)).frame for found in (first, other)))


def first_rows(file: Path, folder: Path) -> Path:
    """A file of the first rows of a batch of the demo."""
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)[:NUM_ROWS]
    (folder / file.name).write_text("".join(rows), encoding="utf-8")
    return folder / file.name


def check_scores(one: pl.DataFrame, two: pl.DataFrame) -> None:
    """The scores of one model under two pools are equal within the tolerance, and null in the same pairs."""
    assert one["pair_id"].equals(two["pair_id"])
    shift = max(float((one[score] - two[score]).abs().max()) for score in SCORES)  # type: ignore[arg-type]
    print(f"{one.height} pairs, largest difference from in_process {shift:.1e} nats per token")
    assert shift <= TOLERANCE
    assert one.select(pl.col(*SCORES).is_null()).equals(two.select(pl.col(*SCORES).is_null()))


def check_decisions(one: pl.DataFrame, two: pl.DataFrame) -> None:
    """Every row has the same decision under two pools."""
    decided = [frame.select("source_row", "turn_index", "pair_id", "decision", "reason") for frame in (one, two)]
    differ = decided[0].join(decided[1], on=decided[0].columns, how="anti", nulls_equal=True)
    print(f"{differ.height} of {one.height} rows are decided otherwise {differ.rows()}")
    assert one.height == two.height
    assert differ.is_empty()


def metadata_of(instance: dg.DagsterInstance, partition: str) -> dict[str, Any]:
    """The metadata of the newest logprobs of a partition."""
    asked = dg.AssetRecordsFilter(dg.AssetKey("logprobs"), asset_partitions=[partition])
    made = instance.fetch_materializations(asked, limit=1).records[0].asset_materialization
    assert made is not None
    return {key: value.value for key, value in made.metadata.items()}


def test_a_scoring_begun_on_processes_is_finished_on_ray_and_nothing_is_scored_again(
    pools: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, pairs = Storage(str(tmp_path / "storage"), tmp_path / "locks"), Pairs.of(read_pairs())

    def under(name: str, stop_at: float) -> ModelRuntime:
        def stop(progress: Progress) -> None:
            if progress.done_tokens > stop_at * progress.total_tokens:
                raise InterruptedError(name)

        settings = settings_under(pools[name], tmp_path, monkeypatch, shard_seconds=0.0, batch_tokens=512)
        return ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir, stop)

    runtime = under("processes", 0.5)
    with pytest.raises(InterruptedError):
        runtime.score("strong", pairs, storage, lambda _: None)
    identity = runtime.identity("strong")
    stored = storage.scores.read(identity, pl.Series([pair.pair_id for pair in read_pairs()]))
    found = under("ray", 2.0).score("strong", pairs, storage, lambda _: None)
    assert found.provenance["identity_hash"] == identity.digest()
    assert found.report.pool == "ray"
    assert found.report.num_cached_quantities == stored.height > 0
    assert found.report.num_scored_quantities > 0
    rows = quantities_in(storage)
    assert not rows.is_duplicated().any()
    assert rows.height == found.report.num_cached_quantities + found.report.num_scored_quantities


def test_a_worker_of_another_identity_is_refused(
    pools: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_under(pools["ray"], tmp_path, monkeypatch)
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    storage = Storage(str(tmp_path / "storage"), tmp_path / "locks")
    monkeypatch.setattr(RayPool, "kind", kind_of_a_gpu)
    with pytest.raises(OtherIdentityError, match="dtype: float32, not bfloat16"):
        runtime.score("strong", Pairs.of(read_pairs()), storage, lambda _: None)
    assert not storage.files.exists("score_cache")


def kind_of_a_gpu(*_: object) -> tuple[str, dict[str, Any]]:
    """What a worker with a GPU says, whose colleague has none."""
    return "bfloat16", {"libraries": {}, "device": "cuda"}
