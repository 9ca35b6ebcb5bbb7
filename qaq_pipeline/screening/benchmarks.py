"""Parsing of benchmark files: the published formats of HumanEval, MBPP and LiveCodeBench.

Belongs here: reading tasks. Does not belong here: finding their text in training data (`contamination`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qaq_pipeline.storage.files import StorageError, read_url


class BenchmarkError(ValueError):
    """A benchmark file cannot be read. The text names the file, the record and what is expected."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a benchmark: its prompt, and its reference solution if it has one."""

    task_id: str
    prompt: str
    solution: str | None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The tasks of a file, and the file's hash."""

    name: str
    sha256: str
    tasks: tuple[Task, ...]


def _human_eval(record: dict[str, Any]) -> Task:
    return Task(str(record["task_id"]), record["prompt"], record["canonical_solution"])


def _mbpp(record: dict[str, Any]) -> Task:
    # "text" in the full release, "prompt" in the sanitized one.
    return Task(f"MBPP/{record['task_id']}", record.get("text", record.get("prompt")), record["code"])


def _live_code_bench(record: dict[str, Any]) -> Task:
    return Task(f"{record['platform']}/{record['question_id']}", record["question_content"], None)


_FORMATS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any]], Task]]] = {
    "HumanEval": (frozenset({"task_id", "prompt", "canonical_solution"}), _human_eval),
    "MBPP": (frozenset({"task_id", "text", "code"}), _mbpp),
    "MBPP sanitized": (frozenset({"task_id", "prompt", "code"}), _mbpp),
    "LiveCodeBench": (frozenset({"platform", "question_id", "question_content"}), _live_code_bench),
}
"""By format name: the keys that identify it, and the function that reads a record."""


def read_benchmark(data: bytes, name: str) -> Benchmark:
    """Read the tasks of a file: JSONL or a JSON array, optionally gzipped.

    Raises:
        BenchmarkError: the file is damaged or has no task, or a record has an unknown format.
    """
    tasks = tuple(_task(record, number, name) for number, record in enumerate(_records(data, name), start=1))
    if not tasks:
        raise BenchmarkError(f"benchmark {name}: the file has no task; use another, or leave it out")
    return Benchmark(name, hashlib.sha256(data).hexdigest(), tasks)


def load_benchmark(name: str, path: str) -> Benchmark:
    """Load the benchmark at a local path or fsspec URL. Raises `BenchmarkError`."""
    try:
        data = read_url(path)
    except StorageError as error:
        raise BenchmarkError(f"benchmark {name}: {path} cannot be read ({error}); check the path") from error
    return read_benchmark(data, name)


def _records(data: bytes, name: str) -> list[Any]:
    try:
        text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise BenchmarkError(
            f"benchmark {name}: cannot be read ({error}); expected JSONL or a JSON array, optionally gzipped"
        ) from error


def _is_text(value: Any) -> bool:
    """Return whether the value is text that can be stored, without a lone surrogate."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")


def _task(record: Any, number: int, name: str) -> Task:
    keys = set(record) if isinstance(record, dict) else set()
    for expected, read in _FORMATS.values():
        if expected <= keys:
            task = read(record)
            if all(map(_is_text, (task.prompt, task.solution or ""))):
                return task
    known = "; ".join(f"{name}: {', '.join(sorted(expected))}" for name, (expected, _) in _FORMATS.items())
    raise BenchmarkError(
        f"benchmark {name}, record {number}: unknown format (its keys: {sorted(keys)}). Known, all with text: {known}"
    )
