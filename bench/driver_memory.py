"""Memory and time of the process that hands out pairs to scoring processes, whose work costs nothing here.

    python -m bench.driver_memory PAIRS.json ROWS [ROWS …] [--config SETTINGS]

Each size is scored by two processes, in a driver of its own. A scoring process returns made-up sums without reading its
model. `QAQ_HOME` has the tokenizer of the strong model.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl

from bench import frames
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.lm.workers import Load, ScorerFacts
from qaq_pipeline.schema.tables import Logprobs, RawData, dtypes
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.scoring import pools
from qaq_pipeline.scoring.chunk_scorer import ScoringSpec
from qaq_pipeline.scoring.chunks import ChunkPair, Work
from qaq_pipeline.scoring.logprobs import Progress
from qaq_pipeline.scoring.pairs import TEXTS, Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.parquet_file import ROWS_PER_GROUP, Writer
from qaq_pipeline.storage.storage import Storage

ANSWER_LINES = 9
"""Lines of an answer: some 490 characters with the query, as in the data of instructions that are published."""


class FreeChunkScorer:
    """Made-up sums for every pair of a chunk."""

    def __init__(self, _: ScoringSpec, __: Load) -> None:
        self.facts = ScorerFacts(runner="free", is_padded=False, shares_prefixes=True, batch_tokens=1024)

    def score(self, chunk: Sequence[ChunkPair], _: Callable[[Progress], None]) -> tuple[pl.DataFrame, Work]:
        """A Logprobs table."""
        ids = pl.Series("pair_id", [one.pair.pair_id for one in chunk])
        sums = {f"sum_nll_{quantity}": pl.Series(np.random.default_rng(0).random(len(ids))) for quantity in Quantity}
        reasons = {f"null_reason_{quantity}": None for quantity in Quantity}
        counts = {"num_q_tokens": 20, "num_a_tokens": 100, "num_a_tokens_untruncated": 100, "is_truncated": False}
        columns = pl.DataFrame([ids]).with_columns(**sums, **{n: pl.lit(v) for n, v in (reasons | counts).items()})
        table = columns.select(pl.col(name).cast(dtype) for name, dtype in dtypes(Logprobs).items())
        return table, Work(num_scored_pairs=len(chunk))


def write_pairs(file: Path, pairs: Path, rows: int) -> None:
    """Write pairs of lines that are drawn from the texts of others, no two alike."""
    answers = frames.read_pairs(pairs, sys.maxsize)["answer"]
    lines = np.array([line for text in answers for line in text.splitlines() if line.strip()], object)
    schema = pl.Schema({name: dtypes(RawData)[name] for name in ("pair_id", *TEXTS)})
    drawn = np.random.default_rng(0)
    with file.open("wb") as stream:
        writer = Writer(stream, schema)
        for start in range(0, rows, ROWS_PER_GROUP):
            numbers = range(start, min(start + ROWS_PER_GROUP, rows))
            parts = drawn.choice(lines, (len(numbers), ANSWER_LINES))
            lengths = drawn.integers(1, ANSWER_LINES + 1, len(numbers))
            texts = ["\n".join(answer[:length]) for answer, length in zip(parts, lengths, strict=True)]
            ids = [hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest() for number in numbers]
            texts_of = {"query": [f"Write task {number}." for number in numbers], "answer": texts}
            writer.append(pl.DataFrame({"pair_id": ids, **texts_of, "system": None, "history": None}, schema))
        writer.close({})


def read_pairs(file: Path, rows: int) -> Pairs:
    """Pairs of a file, whose texts are read when they are needed."""

    def read(*columns: str) -> Iterator[pl.DataFrame]:
        wanted = pl.scan_parquet(file).select("pair_id", *columns)
        for start in range(0, rows, ROWS_PER_GROUP):
            yield wanted.slice(start, ROWS_PER_GROUP).collect()

    return Pairs(read)


def measure(file: Path, rows: int, config: str | None) -> dict[str, float]:
    """Score the pairs of a file, and return seconds, and the own memory before it and at its peak, in GB."""
    settings = load_settings(config)
    runtime = settings.runtime.model_copy(
        update={"pool": settings.runtime.pool.model_copy(update={"kind": "processes", "size": 2})}
    )
    models = ModelRuntime(settings.models, settings.scoring, runtime, settings.model_cache_dir)
    models.identity("strong")  # The tokenizer and its libraries are loaded.
    before = own_memory()
    started = time.monotonic()
    patched = mock.patch.object(pools, "ChunkScorer", FreeChunkScorer)
    with tempfile.TemporaryDirectory() as folder, patched, peak_of_own_memory() as peak:
        storage = Storage(folder, Path(folder) / "locks")
        scored = models.score("strong", read_pairs(file, rows), storage, lambda _: None)
        num_scores = sum(part.height for part in scored.rows.parts())
    if num_scores != rows:
        raise AssertionError(f"{rows} pairs, {num_scores} scores")
    return {"seconds": time.monotonic() - started, "gb_before": before / 1e9, "gb": max(peak) / 1e9}


def own_memory() -> int:
    """Resident bytes of this process without the pages of files, which the system takes back when it needs them."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (own,) = re.findall(r"^RssAnon:\s+(\d+) kB$", status, flags=re.MULTILINE)
    return int(own) * 1024


@contextlib.contextmanager
def peak_of_own_memory() -> Iterator[list[int]]:
    """The own memory of this process, 20 times a second."""
    found, is_over = [own_memory()], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            found.append(own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.driver_memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", type=Path, help="file of pairs whose lines the rows are made of")
    parser.add_argument("rows", type=int, nargs="+", help="numbers of pairs")
    parser.add_argument("--config", help="settings; default: QAQ_CONFIG, else demo")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file is not None:
        print(json.dumps(measure(arguments.file, arguments.rows[0], arguments.config)))  # noqa: T201
        return
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pairs.parquet"
            write_pairs(file, arguments.pairs, rows)
            others = ["--config", arguments.config] if arguments.config else []
            command = [sys.executable, "-m", "bench.driver_memory", str(arguments.pairs), str(rows), *others]
            done = subprocess.run([*command, "--file", str(file)], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            text = f"{found['seconds']:.0f} s, {found['gb_before']:.2f} GB before, {found['gb']:.2f} GB at the peak"
            print(f"{rows:,} pairs: {text}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
