"""Find a row among many: `python -m bench.row_history [ROWS]` prints time and memory of `qaq explain`. No models.

Builds decisions about 10 million synthetic rows in a temporary folder (batches of 310,000 and one large batch), and one
published version of all of them. Then it looks up rows by place and by pair_id, by the whole command and by the call.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from qaq_pipeline.config import load
from qaq_pipeline.lineage import row_history
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.schema import tables
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import hash_json
from qaq_pipeline.storage.storage import Storage, open_storage
from qaq_pipeline.storage.stored_table import StoredTable

BATCH_ROWS, LARGE_ROWS = 310_000, 1_010_000
VERSION = "0" * 32
_EXPLAIN = """
import atexit, sys
atexit.register(lambda: sys.stderr.writelines(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
from qaq_pipeline.cli.__main__ import main
main()
"""
"""The command, which prints its own peak memory; that of `getrusage` would include its parent's."""


def main(num_rows: int) -> None:
    """Build, ask, print."""
    with tempfile.TemporaryDirectory(prefix="qaq-decisions-") as folder:
        os.environ["QAQ_HOME"] = folder
        storage = open_storage(load.load_settings())
        started = time.perf_counter()
        rows = build(storage, num_rows)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet")) / 1e9
        print(f"{num_rows:,} rows, {size:.1f} GB, built in {time.perf_counter() - started:.0f} s")  # noqa: T201
        for batch, row, pair_id in rows:
            for label, arguments in ((f"row {row} of {batch}", [batch, str(row)]), ("pair_id", [pair_id])):
                print(f"{label}: {_command(arguments)}")  # noqa: T201
            print(f"call, by row: {_timed(lambda b=batch, r=row: row_history.find_row(storage, b, str(r)))}")  # noqa: T201
            print(f"call, by pair_id: {_timed(lambda p=pair_id: row_history.find_pair(storage, p))}")  # noqa: T201


def _command(arguments: list[str]) -> str:
    """Return wall and process seconds, and peak memory, of the command in its own process (Linux)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _EXPLAIN, "explain", *arguments], capture_output=True, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = done.stdout.decode().count("provenance ")
    memory = int(done.stderr.decode().split("VmHWM:")[1].split()[0]) / 2**10
    return f"{wall:.2f} s wall, {seconds:.2f} s process, peak memory {memory:.0f} MiB, {found} found"


def _timed(call: Callable[[], row_history.Answer]) -> str:
    started, process = time.perf_counter(), time.process_time()
    found = len(call().rows)
    wall, seconds = time.perf_counter() - started, time.process_time() - process
    return f"{wall:.3f} s wall, {seconds:.3f} s process, {found} found"


def build(storage: Storage, num_rows: int) -> list[tuple[str, int, str]]:
    """Store decisions and the version; return some rows to look up: batch, row, pair_id."""
    asked, keys, entries = [], [], []
    for batch, decisions in _batches(num_rows):
        table = StoredTable(decisions, _provenance(batch), stored_version=hash_json(batch))
        storage.tables.write(table, "decisions", Partition(batch))
        scores = parquet_file.encode(flat_scores(decisions), {})
        storage.files.write_bytes(scores, *versions.place(VERSION, versions.scores_name(batch)))
        keys.append(decisions.select("pair_id", *ROW_KEY))
        entries.append({"batch": batch})
        place = decisions.height * 2 // 3
        asked.append((batch, place + 1, decisions["pair_id"][place]))
    storage.provenance.write(_provenance("b"), "run")
    manifest = {"batches": entries, "files": {}}
    storage.files.write_json(manifest, *versions.place(VERSION, versions.MANIFEST))
    versions.index_pairs(storage, VERSION, keys)
    versions.record(storage, VERSION, {}, run_id=None)
    return [asked[0], asked[len(asked) // 2]]


def _provenance(batch: str) -> dict[str, Any]:
    hashes = dict.fromkeys(("settings_hash", "code_version"), "0")
    return {"partition": [batch], "inputs": {}, "files": {"a.jsonl": "0"}, "models": {}, "pool_id": "b", **hashes}


def _batches(num_rows: int) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the large batch, then those of usual size; except for keys, all have the first one's numbers."""
    random = np.random.default_rng(0)
    large = min(LARGE_ROWS, num_rows)
    sizes = [large, *[BATCH_ROWS] * ((num_rows - large) // BATCH_ROWS)]
    sizes += [rest] if (rest := num_rows - sum(sizes)) else []
    template = _decisions(large, random)
    for number, size in enumerate(sizes):
        batch = f"week-{number:03}"
        digits = np.frombuffer(random.bytes(16 * size).hex().encode(), dtype="S32").astype(str)
        frame = template[:size].with_columns(batch=pl.lit(batch), pair_id=pl.Series(digits, dtype=pl.String))
        yield batch, frame.select(list(tables.dtypes(tables.Decisions)))


def _decisions(num_rows: int, random: np.random.Generator) -> pl.DataFrame:
    """Return decisions that cost as much to read as real ones: two models, three selections, a sentence."""
    rank = pl.Series(random.random(num_rows))
    score = {name: pl.lit(None, dtype.dtype) for name, dtype in tables.MODEL_SCORE.inner.items()}
    score |= {"rmi": pl.col("rank") * 2, "rank": pl.col("rank"), "log_ppl_q": pl.col("rank") + 1}
    score |= {"num_strata": pl.lit(10), "stratum": (pl.col("rank") * 10).cast(pl.Int64) + 1}
    score |= dict.fromkeys(("num_q_tokens", "num_a_tokens", "num_a_tokens_untruncated"), pl.lit(10))
    score |= dict.fromkeys(("is_truncated", "is_short_query"), pl.lit(value=False))
    verdict = {name: pl.lit(None, dtype.dtype) for name, dtype in tables.VERDICT.inner.items()}
    verdict |= {"is_selected": pl.col("rank") > 0.75, "score": pl.col("rank"), "position": pl.col("source_row")}
    verdict |= {"reason": pl.lit("below_cut"), "pool_size": pl.lit(num_rows)}
    frame = pl.DataFrame({"rank": rank, "source_row": range(1, num_rows + 1)})
    models = [_struct(score | {"model": pl.lit(role)}) for role in ("strong", "weak")]
    names = ("diff_high", "control_random", "control_stratified_random")
    verdicts = [_struct(verdict | {"selection": pl.lit(name)}) for name in names]
    types = tables.dtypes(tables.Decisions)
    values = {name: pl.lit(None, dtype) for name, dtype in types.items()} | {
        "source_file": pl.lit("a.jsonl"),
        "source_row": pl.col("source_row"),
        "turn_index": pl.lit(0),
        "decision": pl.lit("not_selected"),
        "reason": pl.lit("below_cut"),
        "explanation": pl.format("Ranked {} of 1, and so on. {}", "rank", pl.lit("A sentence of real length. " * 12)),
        "gap": pl.col("rank"),
        "scores": pl.concat_list(models),
        "verdicts": pl.concat_list(verdicts),
        "provenance_id": pl.lit(hash_json(_provenance("b"))),
    }
    return frame.select(value.cast(types[name]).alias(name) for name, value in values.items())


def _struct(values: dict[str, pl.Expr]) -> pl.Expr:
    return pl.struct([value.alias(name) for name, value in values.items()])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
