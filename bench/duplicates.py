"""Duplicates among many pairs: `python -m bench.duplicates PAIRS.json ROWS` prints time, memory, recall and precision.

Each row joins many pairs of the file, so that it is as long as a real row (about 500 words). The rows form two
batches. One row in ten of the newer batch is a planted duplicate of a row in either batch: with changed white space,
an inserted comment, or an identifier renamed everywhere.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl

from bench.rows import peak_extra_memory
from qaq_pipeline.config.settings import DuplicateSettings, RecordSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.screening import duplicates
from qaq_pipeline.screening.screen import texts_of
from qaq_pipeline.storage.stored_table import StoredTable

PLANTED_SHARE = 0.1
_QUERIES, _ANSWERS = 6, 15


def white_space(text: str, _: random.Random) -> str:
    """Replace four spaces by a tab, and double blank lines."""
    return text.replace("    ", "\t").replace("\n", "\n\n")


def comment(text: str, random_: random.Random) -> str:
    """Insert a comment at a random line."""
    lines = text.split("\n")
    lines.insert(random_.randrange(len(lines) + 1), "# Note that this step may fail, and what to do then.")
    return "\n".join(lines)


def identifier(text: str, random_: random.Random) -> str:
    """Rename one of the rarer words everywhere."""
    counts = Counter(re.findall(r"[a-z_]{4,}", text))
    renamed = random_.choice([word for word, count in counts.items() if count <= 6] or ["x"])
    return re.sub(rf"\b{renamed}\b", f"{renamed}_2", text)


EDITS = (white_space, comment, identifier)


def main(file: Path, number: int) -> None:
    """Make the rows, sign and compare them, and print the cost and the duplicates found."""
    random_ = random.Random(0)  # noqa: S311
    accepted = records.read_file(file.read_bytes(), file.name, "b", RecordSettings()).frame.filter(status="accepted")
    queries, answers = accepted["query"].to_list(), accepted["answer"].to_list()

    def made() -> tuple[str, str]:
        return "\n".join(random_.choices(queries, k=_QUERIES)), "\n".join(random_.choices(answers, k=_ANSWERS))

    texts = [made() for _ in range(number)]
    half = number // 2
    copies = set(random_.sample(range(half, number), int(PLANTED_SHARE * half)))
    originals = [row for row in range(number) if row not in copies]
    planted: dict[int, str] = {}
    for row in sorted(copies):
        query, answer = texts[random_.choice([of for of in random_.choices(originals, k=20) if of < row])]
        edit = random_.choice(EDITS)
        planted[row], texts[row] = edit.__name__, (query, edit(answer, random_))
    older, own = (_raw(texts[start:stop], name, start) for name, start, stop in (("b1", 0, half), ("b2", half, number)))
    print(f"{number} rows of {sum(len(q.split()) + len(a.split()) for q, a in texts) / number:.0f} words")  # noqa: T201
    rows: set[int] = set()

    def work() -> None:
        started = time.perf_counter()
        signed = [duplicates.signatures(raw) for raw in (older, own)]
        signing = time.perf_counter() - started
        related = duplicates.Related(signed[1]).among(signed[0])
        limits, texts = DuplicateSettings(), texts_of(map(StoredTable, [older, own]))
        found = duplicates.find(signed[1], [related], texts, limits.near_threshold, limits.cluster_threshold)
        rows.update(found.duplicates["source_row"])
        print(f"signatures {signing:.1f} s, all {time.perf_counter() - started:.1f} s")  # noqa: T201

    extra = peak_extra_memory(work)
    print(f"extra memory {extra / 2**30:.2f} GiB")  # noqa: T201
    for name in (edit.__name__ for edit in EDITS):
        of_edit = {row for row, edit in planted.items() if edit == name}
        print(f"{name}: {len(of_edit & rows)} of {len(of_edit)} found")  # noqa: T201
    print(f"precision: {len(rows & set(planted))} of {len(rows)}")  # noqa: T201


def _raw(texts: list[tuple[str, str]], batch: str, start: int) -> pl.DataFrame:
    """Return the columns of RawData that duplicates need; row numbers continue across batches."""
    rows = range(start, start + len(texts))
    return pl.DataFrame(
        {
            "batch": [batch] * len(texts),
            "source_file": ["a"] * len(texts),
            "source_row": rows,
            "turn_index": [0] * len(texts),
            "pair_id": [f"{row:032x}" for row in rows],
            "system": pl.Series([None] * len(texts), dtype=pl.String),
            "query": [query for query, _ in texts],
            "answer": [answer for _, answer in texts],
            "status": ["accepted"] * len(texts),
        }
    ).select(*ROW_KEY, "pair_id", "system", "query", "answer", "status")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
