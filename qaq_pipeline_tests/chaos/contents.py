"""What a storage and its Dagster instance hold, as far as an undisturbed run makes the same.

Belongs here: which files are compared, and how. Does not belong here: what was done to them (`campaign`).

Not compared: the ids of runs, and the times of publications and withdrawals, which differ between any two runs; the
files of the score cache, whose number depends on where a scoring was taken up (its scores are compared); what a killed
process left unfinished, under a name that begins with a dot, for a day.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

import dagster as dg
import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lineage import lineage, verify
from qaq_pipeline.publication import versions
from qaq_pipeline.runs.deployment import open_instance
from qaq_pipeline.schema.tables import CachedScores, dtypes
from qaq_pipeline.storage.storage import Storage, open_storage

Contents = Mapping[str, str]
"""A digest for each file, or part, by its name."""

_RUNS = ("provenance", "runs")
_CACHE = "score_cache/"
_PUBLICATIONS, _WITHDRAWALS = "curated_dataset/publications.json", "withdrawals.json"
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def contents(settings: Settings) -> Contents:
    """What the storage of these settings holds."""
    storage = open_storage(settings)
    found = {name: storage.files.sha256(*name.split("/")) for name in _compared(storage)}
    found["publications"] = json.dumps(
        [(one.number, one.version, one.excluded_batches) for one in versions.log(storage)]
    )
    if storage.files.exists(_WITHDRAWALS):
        entries = storage.files.read_json(_WITHDRAWALS)
        found["withdrawals"] = json.dumps([{**entry, "at": None} for entry in entries], sort_keys=True)
    scores = _scores(storage)
    found["scores"] = hashlib.sha256(scores.write_csv().encode()).hexdigest()
    keys = scores.select("model", "pair_id", "quantity")
    found["scores twice"] = str(keys.height - keys.unique().height)
    # An object store may list folders that are empty by now.
    found["runs of provenance"] = " ".join(sorted({name.split("/")[0] for name in storage.files.files_below(*_RUNS)}))
    return found


def differences(expected: Contents, found: Contents) -> list[str]:
    """What differs, a line each."""
    lines = [f"{name}: is missing" for name in sorted(expected.keys() - found.keys())]
    lines += [f"{name}: should not be there" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    lines += [f"{name}: {found[name]}, not {expected[name]}" for name in both if found[name] != expected[name]]
    return lines


def faults(settings: Settings) -> Iterator[str]:
    """What is wrong with a storage and its instance by themselves: changed files, runs that never end."""
    storage = open_storage(settings)
    newest = versions.latest(storage)
    if newest is not None:
        yield from (one.sentence for one in verify.verify(storage, lineage.walk(storage, newest.version)))
    with open_instance() as instance:
        for run in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
            yield f"run {run.run_id} of {run.job_name} is {run.status.value} for ever"


def _compared(storage: Storage) -> Iterator[str]:
    for name in storage.files.files_below():
        is_unfinished = any(part.startswith(".") for part in name.split("/"))
        if (
            not is_unfinished
            and not name.startswith(("/".join(_RUNS), _CACHE))
            and name not in (_PUBLICATIONS, _WITHDRAWALS)
        ):
            yield name


def _scores(storage: Storage) -> pl.DataFrame:
    """Every score in the cache, in one order."""
    columns = dtypes(CachedScores)
    frames = [
        storage.files.read_frame(*storage.scores.place(digest, *name.split("/")), columns=list(columns)).with_columns(
            model=pl.lit(digest)
        )
        for digest in storage.files.names("score_cache")
        for name in storage.scores.names(digest)
    ]
    return pl.concat([pl.DataFrame(schema={**dtypes(CachedScores), "model": pl.String()}), *frames]).sort(pl.all())
