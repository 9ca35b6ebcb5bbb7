"""A run killed while it scores: the next run takes up where it fell, and loses or doubles nothing.

Tolerance: 1e-5 nats per token between two runs, which cut their batches at other places.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.runs import deployment, registration, run_batch
from qaq_pipeline.runs.summary import BatchSummary
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.cached_scores import quantities_in
from qaq_pipeline_tests.support.frames import TEXTS
from qaq_pipeline_tests.support.uncalibrated import TABLES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QAQ = Path(sys.executable).with_name("qaq")
NUM_PAIRS = 160
NUM_QUANTITIES = 5 * NUM_PAIRS
RUN_TOLERANCE = 1e-5
UNFINISHED = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]

MODEL_TABLES = ("logprobs", "rmi_scores")
NUMBERS = [*(f"log_ppl_{quantity}" for quantity in TEXTS), "nll_end"]


@pytest.fixture
def delivery(tmp_path: Path) -> Path:
    """Distinct pairs of varied length, one of them twice, and a row that cannot be read."""
    draw = np.random.default_rng(0)
    words = ["list", "sort", "node", "return", "for", "größe", "index", "tree", "x", "value"]
    texts = [" ".join(draw.choice(words, draw.integers(1, 12))) for _ in range(2 * NUM_PAIRS)]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [{"query": f"{n} {query}", "response": answer} for n, (query, answer) in enumerate(pairs)]
    return write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[3], {"query": "", "response": "a"}])


@pytest.fixture
def slow_settings(settings_for: Callable[..., Settings]) -> Callable[[], Settings]:
    """Settings under which the scoring takes seconds, in small batches, and a shard is stored for each."""
    return lambda: settings_for(runtime={"batch_tokens": 300, "shard_seconds": 0}, ranking={"num_strata": 5})


def shards(storage_root: Path) -> dict[str, int]:
    """Stored shards by score identity, without packed ones."""
    folders = (storage_root / "score_cache").glob("*")
    return {folder.name: len(list(folder.glob("shards/*.parquet"))) for folder in folders}


def num_cached(storage_root: Path) -> int:
    """Distinct quantities that the cache holds."""
    cached = quantities_in(Storage(str(storage_root), storage_root.parent / "locks"))
    assert cached.is_unique().all(), "a quantity was scored twice"
    return cached.height


def kill_once(
    is_due: Callable[[dict[str, int]], bool],
    delivery: Path,
    config: Path,
    storage_root: Path,
    by: signal.Signals = signal.SIGKILL,
) -> None:
    """Start `qaq run`, and end it by that signal as soon as its shards are those."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "QAQ_CONFIG": str(config)}
    command = [str(QAQ), "run", str(delivery), "--batch", "b1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not is_due(shards(storage_root)):
            time.sleep(0.002)
        process.send_signal(by)
        _, errors = process.communicate()
    if by == signal.SIGKILL:
        assert process.returncode == -by, f"the run ended before it was killed: {errors.decode()}"
    else:
        assert process.returncode == 128 + by, errors.decode()
        assert "interrupted by a signal" in errors.decode()


def curate(settings: Settings, delivery: Path) -> BatchSummary:
    with deployment.open_instance() as instance:
        registration.register(deployment.Deployment(settings, instance), "b1", [delivery], None)
        summary = run_batch.run_batch(deployment.Deployment(settings, instance), "b1")
        assert instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)) == []
    return summary


def tables(settings: Settings) -> dict[str, pl.DataFrame]:
    storage = open_storage(settings)
    partitions = {name: sorted(settings.models) if name in MODEL_TABLES else [None] for name in TABLES}
    return {
        f"{name}|{model}": storage.tables.read(name, Partition(*(part for part in ("b1", model) if part))).frame
        for name, models in partitions.items()
        for model in models
    }


KILL_TIMES: dict[str, Callable[[dict[str, int]], bool]] = {
    "at_the_first_shard": lambda stored: bool(stored) and max(stored.values()) >= 1,
    "amid_the_strong_model": lambda stored: bool(stored) and max(stored.values()) >= 40,
    "amid_the_weak_model": lambda stored: len(stored) == 2 and min(stored.values()) >= 5,
}


def test_a_killed_run_is_taken_up_where_it_fell(
    slow_settings: Callable[[], Settings],
    settings_file: Callable[[Settings], Path],
    delivery: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = slow_settings()
    whole = curate(undisturbed, delivery)
    assert whole.scored == 2 * NUM_QUANTITIES
    expected = tables(undisturbed)
    for moment, is_due in KILL_TIMES.items():
        monkeypatch.setenv("QAQ_HOME", str(tmp_path / moment))
        settings = slow_settings()
        root = Path(settings.storage_root)
        kill_once(is_due, delivery, settings_file(settings), root)
        assert not open_storage(settings).tables.has("logprobs", Partition("b1", "weak")), moment
        saved = num_cached(root)
        assert 0 < saved < 2 * NUM_QUANTITIES, moment

        resumed = curate(settings, delivery)

        assert resumed.scored == 2 * NUM_QUANTITIES - saved, moment
        assert sum(model.cached for model in resumed.models) == saved, moment
        assert num_cached(root) == 2 * NUM_QUANTITIES, moment
        assert resumed.rows_by_decision == whole.rows_by_decision, moment
        compare(tables(settings), expected)


def test_a_terminated_run_stores_what_it_has_finished_and_is_taken_up_there(
    slow_settings: Callable[[], Settings], settings_file: Callable[[Settings], Path], delivery: Path
) -> None:
    settings = slow_settings()
    root = Path(settings.storage_root)
    kill_once(KILL_TIMES["at_the_first_shard"], delivery, settings_file(settings), root, by=signal.SIGTERM)
    saved = num_cached(root)
    assert 0 < saved < 2 * NUM_QUANTITIES
    assert curate(settings, delivery).scored == 2 * NUM_QUANTITIES - saved


def compare(resumed: dict[str, pl.DataFrame], expected: dict[str, pl.DataFrame]) -> None:
    """The same rows under the same keys in every table; scores within the tolerance."""
    assert resumed.keys() == expected.keys()
    for name, frame in resumed.items():
        key = TABLES[name.partition("|")[0]].primary_key()
        assert frame.select(key).sort(key).equals(expected[name].select(key).sort(key)), name
    for role in ("strong", "weak"):
        ours, theirs = (frames[f"rmi_scores|{role}"].sort("pair_id") for frames in (resumed, expected))
        for column in NUMBERS:
            assert (ours[column] - theirs[column]).abs().max() <= RUN_TOLERANCE, column  # type: ignore[operator]
