"""Benchmark files as tasks: the formats in which HumanEval, MBPP and LiveCodeBench are published.

Belongs here: reading them. Does not belong here: finding their text in training data (`contamination`).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec


class BenchmarkError(ValueError):
    """A benchmark file cannot be read. The text names the file, the record and what is expected."""


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a benchmark: what is asked, and the reference solution where it has one."""

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
"""By name: the keys that tell a format, and how a record of it is read."""


def read_benchmark(data: bytes, name: str) -> Benchmark:
    """The tasks of a file: JSONL or a JSON array, perhaps gzipped.

    Raises:
        BenchmarkError: the file is damaged, holds no task, or a record is of no known format.
    """
    tasks = tuple(_task(record, number, name) for number, record in enumerate(_records(data, name), start=1))
    if not tasks:
        raise BenchmarkError(f"benchmark {name}: the file holds no task; name another, or leave it out")
    return Benchmark(name, hashlib.sha256(data).hexdigest(), tasks)


def load_benchmark(name: str, path: str) -> Benchmark:
    """The benchmark at a local path or fsspec URL. Raises `BenchmarkError`."""
    try:
        with fsspec.open(path, "rb") as stream:
            data = stream.read()  # type: ignore[union-attr]
    except (OSError, ValueError, ImportError) as error:
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
            f"benchmark {name}: cannot be read ({error}); expected JSONL or a JSON array, perhaps gzipped"
        ) from error


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be stored: one with a lone surrogate cannot."""
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
        f"benchmark {name}, record {number}: of no known format (its keys: {sorted(keys)}). Known, by text in: {known}"
    )
