"""A large batch from its files to the published version: time and memory of each stage beside the models.

    python -m bench.large_batch PAIRS.json ROWS [ROWS …] [--then ROWS …] [--lines QUERY ANSWER] [--config SETTINGS]

Each size is curated in a home of its own, by a process of its own. A row joins lines of the pairs' texts, so that rows
are as real ones to a tokeniser and no two are alike. The models of the settings (`QAQ_HOME` has them) only tokenise:
a scorer that costs nothing takes the place of their weights. `--then` adds batches, one on top of the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.rows import peak_memory
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.lm import causal_lm
from qaq_pipeline.lm.prompts import TokenSequence
from qaq_pipeline.lm.workers import Load, ScorerFacts, Scores
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment, open_instance
from qaq_pipeline.runs.job_runs import Events

LINES = (2, 9)
"""Lines of a row's query and answer: some 490 bytes of JSON, as in the data of instructions that are published."""

_NLLS = np.random.default_rng(0).gamma(2.0, 1.0, 4096).astype(np.float32)


class FreeScorer:
    """Log-probabilities looked up by token, in place of a model."""

    facts = ScorerFacts(runner="free", is_padded=False, shares_prefixes=True, batch_tokens=1 << 16)

    def score(self, sequences: Sequence[TokenSequence]) -> Scores:
        """As a model would give them: one for each token of a target, less likely in a longer context."""
        return [self._of(sequence) for sequence in sequences]

    def _of(self, sequence: TokenSequence) -> list[np.ndarray]:
        values = -_NLLS[np.asarray(sequence.token_ids) % len(_NLLS)]
        parts = ((values[target.start : target.stop], target) for target in sequence.targets)
        return [part[:1] if target.any_of else part * (0.5 + 0.5 / (1 + target.start / 50)) for part, target in parts]


@contextlib.contextmanager
def free_loaders(*_: object, **__: object) -> Iterator[list[Load]]:
    """One loader of the scorer that costs nothing."""
    yield [FreeScorer]


class Stage(NamedTuple):
    """What a stage took."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of all threads of this process: other processes change it little."""
    peak_gb: float
    """Highest resident memory, in GB."""


@dataclass
class Measured:
    """Time and peak memory of each stage of this process."""

    stages: list[Stage] = field(default_factory=list)
    _name: str | None = None
    _started: tuple[float, float] = (0.0, 0.0)

    def begin(self, name: str | None) -> None:
        """End the present stage, and begin another."""
        now = (time.perf_counter(), time.process_time())
        if self._name is not None:
            seconds, cpu_seconds = (end - start for start, end in zip(self._started, now, strict=True))
            self.stages.append(Stage(self._name, seconds, cpu_seconds, peak_memory() / 1e9))
            print(self.stages[-1], file=sys.stderr)  # noqa: T201
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Resets the high-water mark.
        self._name, self._started = name, now


def write_rows(file: Path, pairs: Path, rows: int, seed: int, lines: Sequence[int] = LINES) -> None:
    """Write rows of lines that are drawn from the texts of pairs."""
    drawn = random.Random(seed)  # noqa: S311
    accepted = records.read_file(pairs.read_bytes(), pairs.name, "b", RecordSettings()).frame.filter(status="accepted")
    queries = [line for text in accepted["query"] for line in text.splitlines() if line.strip()]
    answers = [line for text in accepted["answer"] for line in text.splitlines() if line.strip()]
    with file.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            query = " ".join(drawn.choices(queries, k=lines[0]))
            answer = "\n".join(drawn.choices(answers, k=lines[1]))
            stream.write(json.dumps({"query": f"{query} ({seed}-{number})", "response": answer}) + "\n")


def curate(home: Path, files: Sequence[Path], config: str | None) -> list[Stage]:
    """Curate files, a batch each, in a home; return what was measured."""
    os.environ["QAQ_HOME"], os.environ["DAGSTER_HOME"] = str(home), str(home / "dagster")
    measured = Measured()
    with mock.patch.object(causal_lm, "loaders", free_loaders), open_instance() as instance:
        deployment = Deployment(load_settings(config), instance)
        for file in files:
            batch = file.stem

            def begin(job: str, partition: str, batch: str = batch) -> None:
                measured.begin(f"{batch}: {job} {partition}".rstrip())

            measured.begin(f"{batch}: register")
            registration.register(deployment, batch, [file], None)
            summary = run_batch.run_batch(deployment, batch, Events(on_stage=begin))
            measured.begin(None)
            print(f"{batch}: {summary.rows_by_decision}", file=sys.stderr)  # noqa: T201
    return measured.stages


def main() -> None:
    """Measure each size in a process of its own, and print a table of each."""
    parser = argparse.ArgumentParser(prog="python -m bench.large_batch", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", type=Path, help="file of pairs whose lines the rows are made of")
    parser.add_argument("rows", type=int, nargs="+", help="rows of the batch")
    parser.add_argument("--then", type=int, nargs="+", default=[], help="rows of each batch that follows")
    parser.add_argument("--lines", type=int, nargs=2, default=LINES, help="lines of a query and of an answer")
    parser.add_argument("--config", help="settings; default: QAQ_CONFIG, else demo")
    arguments = parser.parse_args()
    if len(arguments.rows) > 1:
        for rows in arguments.rows:
            others = ["--lines", *map(str, arguments.lines)]
            others += ["--then", *map(str, arguments.then)] if arguments.then else []
            others += ["--config", arguments.config] if arguments.config else []
            command = [sys.executable, "-m", "bench.large_batch", str(arguments.pairs), str(rows), *others]
            subprocess.run(command, check=True)
        return
    models = load_settings(arguments.config).model_cache_dir.absolute()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        home.mkdir()
        (home / "models").symlink_to(models)
        sizes = [arguments.rows[0], *arguments.then]
        files = [Path(folder) / f"batch-{n}.jsonl" for n in range(1, len(sizes) + 1)]
        for seed, (file, rows) in enumerate(zip(files, sizes, strict=True)):
            write_rows(file, arguments.pairs, rows, seed, arguments.lines)
        stages = curate(home, files, arguments.config)
    table = Table("stage", "seconds", "CPU seconds", "peak GB", title=f"{sum(sizes):,} rows, {os.cpu_count()} cores")
    for file in files:
        own = [stage for stage in stages if stage.name.startswith(f"{file.stem}:")]
        sums = sum(one.seconds for one in own), sum(one.cpu_seconds for one in own)
        for one in (*own, Stage(f"{file.stem}: all", *sums, max(one.peak_gb for one in own))):
            table.add_row(one.name, f"{one.seconds:.1f}", f"{one.cpu_seconds:.1f}", f"{one.peak_gb:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
