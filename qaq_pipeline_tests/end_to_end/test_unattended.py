"""The pipeline's normal day: `qaq ui` runs, batches land, nobody is at the keyboard. Real daemon, sensors, SQLite."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from qaq_pipeline.config import load
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import landing
from qaq_pipeline.publication import versions
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.server import assert_nothing_runs, processes_of, running_ui, write_profile

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE_S = 600.0
WORDS = ["list", "string", "index", "file", "tree", "graph", "query", "sort", "cache", "token", "parse", "shell"]


@dataclass(frozen=True)
class Place:
    """A home with tiny models, whose sensors run from the start."""

    home: Path
    settings: Settings
    environment: dict[str, str]

    @property
    def landing(self) -> Path:
        return Path(self.settings.landing_url)

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.home / "dagster"))


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    models = {role: tiny_model_dir(seed=seed) for seed, role in enumerate(("strong", "weak"))}
    home, profile = tmp_path / "home", tmp_path / "settings.yaml"
    often = {"interval_seconds": 5}
    write_profile(profile, models, landing=often, automation=often | {"started": True})
    variables = {"QAQ_HOME": str(home), "QAQ_CONFIG": str(profile), "DAGSTER_HOME": str(home / "dagster")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    yield Place(home, load.load_settings(), {**os.environ, **variables})
    assert_nothing_runs(home)


def rows(start: int, number: int) -> list[dict[str, str]]:
    """Rows of different texts, long enough to be told apart."""
    made = []
    for index in range(start, start + number):
        first, second, third = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 7))
        query = f"Write function number {index} that takes a {first} and a {second} and gives back the {third} of both."
        answer = f"def {first}_{second}_{index}(a, b):\n    return {third}(a, b, {index})  # {second} before {first}\n"
        made.append({"query": query, "response": answer})
    return made


def wait_until(place: Place, what: str, is_so: Callable[[], bool], log: Path, every: float = 1.0) -> float:
    """Seconds until it is so; asked every so many."""
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S:
        if is_so():
            return time.monotonic() - started
        time.sleep(every)
    pytest.fail(f"after {PATIENCE_S:.0f} s not {what}; runs: {run_states(place)}; log:\n{log.read_text()[-5000:]}")


def run_states(place: Place) -> Counter[tuple[str, str]]:
    """Runs by what they made and how they ended."""
    with place.instance() as instance:
        return Counter((name_of(run), run.status.value) for run in instance.get_runs())


def name_of(run: dg.DagsterRun) -> str:
    assets = ", ".join(sorted(key.to_user_string() for key in run.asset_selection or ()))
    return f"{assets or run.job_name} of {run.tags.get('dagster/partition', 'all')}"


def latest(place: Place) -> dict[str, Any]:
    """The newest version, with the batches in it and those left out."""
    storage = open_storage(place.settings)
    newest = versions.latest(storage)
    if newest is None:
        return {"batches": [], "excluded_batches": {}}
    batches = [entry["batch"] for entry in versions.read_manifest(storage, newest.version)["batches"]]
    return {"version": newest.version, "excluded_batches": newest.excluded_batches, "batches": batches}


def is_published(place: Place, *batches: str) -> bool:
    return latest(place)["batches"] == sorted(batches)


def decisions(place: Place, batch: str) -> Counter[str]:
    return Counter(open_storage(place.settings).tables.read("decisions", Partition(batch)).frame["decision"].to_list())


def test_three_deliveries_land_and_two_are_published_and_one_is_listed(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "ui.log"
    malformed = [{"query": "no answer is here"}, {"query": "", "response": "nothing was asked"}]
    with running_ui(place.environment, log):
        # Malformed in part: two rows of 22 cannot be read.
        write_jsonl(place.landing / "first.jsonl", [*rows(0, 20), *malformed])
        seconds = wait_until(place, "first published", lambda: is_published(place, "first"), log)
        print(f"first: published {seconds:.0f} s after it landed")
        # Half of it is in the first; marked as complete, so that it is taken at once.
        write_jsonl(place.landing / "second" / "part-0.jsonl", [*rows(10, 10), *rows(20, 10)])
        (place.landing / "second" / "_SUCCESS").touch()
        # More than a fifth of it cannot be read: it must be gated.
        write_jsonl(place.landing / "third.jsonl", [*rows(40, 6), *malformed * 4])
        write_jsonl(place.landing / "bad name.jsonl", rows(60, 2))
        seconds = wait_until(
            place,
            "second published and third listed",
            lambda: is_published(place, "first", "second") and "gated" in latest(place)["excluded_batches"]["third"],
            log,
        )
        print(f"second and third: published and listed {seconds:.0f} s after they landed")
        wait_until(place, "at rest", lambda: not unfinished(place), log)
        refused = landing.read_refused(open_storage(place.settings))
    states = run_states(place)
    for (name, state), number in sorted(states.items()):
        print(f"{number} x {name}: {state}")
    assert {state for _, state in states} == {"SUCCESS"}
    assert {name: number for (name, _), number in states.items() if "raw_data" in name} == {
        f"raw_data of {batch}": 1 for batch in ("first", "second", "third")
    }
    pointer = latest(place)
    print(json.dumps(pointer, indent=2))
    assert pointer["excluded_batches"]["third"].startswith("gated (too_many_rejected): 8 of its 14 rows cannot be read")
    for batch, delivered in {"first": 22, "second": 20, "third": 14}.items():
        counts = decisions(place, batch)
        print(f"{batch}: {delivered} rows in = {' + '.join(f'{name} {n}' for name, n in sorted(counts.items()))}")
        assert counts.total() == delivered
    assert decisions(place, "first")["rejected"] == 2
    assert decisions(place, "second")["duplicate"] == 10
    assert decisions(place, "third") == {"batch_gated": 14}
    assert list(refused) == ["bad name.jsonl"]


def is_scoring(place: Place) -> bool:
    return any("logprobs" in name and state == "STARTED" for name, state in run_states(place))


def unfinished(place: Place) -> list[str]:
    with place.instance() as instance:
        return [name_of(run) for run in instance.get_runs() if not run.is_finished]


@pytest.mark.parametrize("moment", ["between two runs", "in a run"])
def test_a_daemon_killed_in_the_middle_of_the_chain_neither_loses_nor_repeats_a_batch(
    place: Place, tmp_path: Path, moment: str
) -> None:
    first, second = tmp_path / "before.log", tmp_path / "after.log"
    with running_ui(place.environment, first):
        write_jsonl(place.landing / "b1.jsonl", rows(0, 20))
        write_jsonl(place.landing / "b2.jsonl", rows(20, 20))
        storage = open_storage(place.settings)
        wait_until(place, "b1 screened", lambda: storage.tables.has("screened_data", Partition("b1")), first)
        if moment == "in a run":
            wait_until(place, "scoring", lambda: is_scoring(place), first, every=0.1)
        for pid in processes_of(place.home):
            os.kill(pid, signal.SIGKILL)
    print(f"killed, all of it, when these runs were there: {dict(run_states(place))}")
    started = [name for name, state in run_states(place) if state == "STARTED"]
    assert started or moment == "between two runs"
    with running_ui(place.environment, second):
        seconds = wait_until(place, "both published", lambda: is_published(place, "b1", "b2"), second)
        print(f"published {seconds:.0f} s after the start")
        wait_until(place, "at rest", lambda: not unfinished(place), second)
    states = run_states(place)
    for (name, state), number in sorted(states.items()):
        print(f"{number} x {name}: {state}")
    succeeded = {name: number for (name, state), number in states.items() if state == "SUCCESS"}
    assert {name for name, state in states if state != "SUCCESS"} <= set(started)
    assert set(started) <= set(succeeded)
    assert {name: number for name, number in succeeded.items() if "raw_data" in name} == {
        "raw_data of b1": 1,
        "raw_data of b2": 1,
    }
    for batch in ("b1", "b2"):
        assert decisions(place, batch).total() == 20
