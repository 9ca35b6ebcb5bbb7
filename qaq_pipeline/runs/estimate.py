"""Estimate the cost of scoring files that are not registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest import records
from qaq_pipeline.runs.job_runs import RunError
from qaq_pipeline.runs.registration import read_files
from qaq_pipeline.scoring.logprobs import accepted_pairs
from qaq_pipeline.scoring.runtime import ModelRuntime, ScoringCost
from qaq_pipeline.screening import screen
from qaq_pipeline.storage.storage import open_storage


def estimate(settings: Settings, files: Sequence[Path]) -> list[ScoringCost]:
    """The cost of scoring the files, model by model.

    It is an upper bound: rows that older batches or benchmarks contain are counted.

    Raises:
        RunError: a file is missing or cannot be read at all.
        ValueError: a model's files cannot be found, or it cannot be scored.
    """
    try:
        frames = [records.read_file(data, name, "b", settings.records) for name, data in read_files(files).items()]
    except records.UnreadableFileError as error:
        raise RunError(str(error)) from error
    raw = pl.concat(frames)
    pairs = accepted_pairs(raw, screen.screen_alone(raw, settings.screening))
    storage = open_storage(settings)
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    return [runtime.estimate(role, pairs, storage) for role in settings.models]
