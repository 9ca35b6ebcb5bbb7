"""Time and memory of a score cache with many shards: reading them before and after they are packed.

    python -m bench.score_log SHARDS SCORES [--writers 2] [--root URL]

Processes write SHARDS shards of SCORES scores each and pack none, as if all of them had been killed. Then each step is
timed in a process of its own: a batch whose 10,000 pairs are in the last shards is looked up; everything is packed; the
batch is looked up again, also with listings that have every second name; so is one of 310,000 new pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import fsspec
import polars as pl

from qaq_pipeline.schema import tables
from qaq_pipeline.schema.vocabularies import Quantity
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.identity import ScoreIdentity
from qaq_pipeline.storage.score_log import Index
from qaq_pipeline.storage.storage import Storage

IDENTITY = ScoreIdentity("m", "r", "t", "h", "bare", "bfloat16", 2048, "truncate_answer")
SCORED_WITH = {"libraries": {"torch": "2.13.0"}, "device": "cuda"}
NUM_WANTED, NUM_NEW = 10_000, 310_000


def pair_ids(numbers: range) -> list[str]:
    """Hashes, as pair_ids are."""
    return [hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest() for number in numbers]


def write(storage: Storage, shards: range, num_scores: int) -> None:
    """Store shards, each of the pairs that its number gives."""
    files, _ = fsspec.core.url_to_fs(storage.files.url())  # Without the care that a single write takes.
    files.makedirs(storage.files.path(*storage.scores.place(IDENTITY.digest(), "shards")), exist_ok=True)
    quantities = [quantity.value for quantity in Quantity]
    per_shard = num_scores // len(quantities)
    for number in shards:
        frame = pl.DataFrame(
            {
                "pair_id": [
                    one for one in pair_ids(range(number * per_shard, (number + 1) * per_shard)) for _ in quantities
                ],
                "quantity": quantities * per_shard,
                "sum_nll": [number + 0.1 * place for place in range(per_shard * len(quantities))],
            }
        ).with_columns(num_tokens=pl.lit(100), end_ids=pl.lit(""), null_reason=pl.lit(None, pl.String))
        scores = frame.select(pl.col(name).cast(kind) for name, kind in tables.dtypes(tables.CachedScores).items())
        footer = {"data_version": parquet_file.hash_rows(scores), "scored_with": SCORED_WITH}
        place = storage.scores.place(IDENTITY.digest(), "shards", f"{number:012d}.parquet")
        files.pipe_file(storage.files.path(*place), parquet_file.encode(scores, footer))


def step(name: str, root: str, num_shards: int, num_scores: int, part: tuple[int, int]) -> dict[str, float]:
    """Run a step; give its seconds, peak of memory in GB, and what it found."""
    storage = Storage(root, Path(tempfile.gettempdir()) / "bench_score_log_locks")
    num_pairs = num_shards * (num_scores // len(Quantity))
    wanted = pl.Series(pair_ids(range(max(num_pairs - NUM_WANTED, 0), num_pairs)))
    names = storage.files.names
    found: dict[str, float] = {}
    started = time.monotonic()
    match name:
        case "write":
            write(storage, range(*part), num_scores)
        case "pack":
            storage.scores.pack(IDENTITY)
            found["files"] = len(storage.scores.names(IDENTITY.digest()))
        case "new batch":
            new = pl.Series(pair_ids(range(num_pairs, num_pairs + NUM_NEW)))
            found["scores"] = storage.scores.read(IDENTITY, new).height
        case _:
            lying = mock.patch.object(storage.files, "names", lambda *place: names(*place)[::2])
            with lying if "listing" in name else contextlib.nullcontext():
                found["scores"] = storage.scores.read(IDENTITY, wanted).height
            assert found["scores"] == len(wanted) * len(Quantity), "a score is lost"
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, **found}


def show(name: str, found: dict[str, float]) -> None:
    """Print one line."""
    print(f"{name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in found.items()), flush=True)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every step, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.score_log", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=int)
    parser.add_argument("scores", type=int, help="scores of a shard")
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--root", help="local path or URL; default: a temporary folder")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 0), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.step:
        found = step(asked.step, asked.root, asked.shards, asked.scores, tuple(asked.part))
        print(json.dumps(found))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as folder:
        root = asked.root or folder

        def start(name: str, *part: int) -> Callable[[], dict[str, float]]:
            options = ["--root", root, "--step", name, *(["--part", *map(str, part)] if part else [])]
            command = [sys.executable, "-m", "bench.score_log", str(asked.shards), str(asked.scores), *options]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            return lambda: json.loads(_output(process))

        storage = Storage(root, Path(folder) / "locks")
        storage.files.write_json(Index().as_json(), *storage.scores.place(IDENTITY.digest(), "index.json"))
        bounds = [asked.shards * number // asked.writers for number in range(asked.writers + 1)]
        writers = [start("write", *part) for part in itertools.pairwise(bounds)]
        for number, end in enumerate(writers):
            show(f"writer {number}", end())
        for name in ("look up", "pack", "look up, packed", "look up, half a listing", "new batch"):
            show(name, start(name)())


def _output(process: subprocess.Popen[str]) -> str:
    shown, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return shown


if __name__ == "__main__":
    main()
