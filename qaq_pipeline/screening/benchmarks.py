"""Parsing of benchmark files: the published formats of well-known benchmarks, and any other whose fields are named.

Belongs here: reading tasks. Does not belong here: finding their text in training data (`contamination`).
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qaq_pipeline.config.settings import BenchmarkSettings
from qaq_pipeline.storage import row_files
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


Fields = Mapping[str, Any]


def _human_eval(record: Fields) -> list[Task]:
    return [Task(str(record["task_id"]), record["prompt"], record["canonical_solution"])]


def _mbpp(record: Fields) -> list[Task]:
    # "text" in the full release, "prompt" in the sanitized one.
    return [Task(f"MBPP/{record['task_id']}", record.get("text", record.get("prompt")), record["code"])]


def _live_code_bench(record: Fields) -> list[Task]:
    return [Task(f"{record['platform']}/{record['question_id']}", record["question_content"], None)]


def _big_code_bench(record: Fields) -> list[Task]:
    """Each task has two prompts: a function's head with its docstring, and an instruction."""
    name = str(record["task_id"])
    complete = Task(name, record["complete_prompt"], record["canonical_solution"])
    return [complete, Task(name, record["instruct_prompt"], None)]


def _apps(record: Fields) -> list[Task]:
    """Of the many solutions, which the file has as JSON text, the first."""
    given = record["solutions"]
    solutions = given if isinstance(given, list) else json.loads(given or "[]")
    return [Task(f"APPS/{record['problem_id']}", record["question"], next(iter(solutions), None))]


def _ds_1000(record: Fields) -> list[Task]:
    return [Task(f"DS-1000/{record['metadata']['problem_id']}", record["prompt"], record["reference_code"])]


def _swe_bench(record: Fields) -> list[Task]:
    return [Task(str(record["instance_id"]), record["problem_statement"], record["patch"])]


def _multipl_e(record: Fields) -> list[Task]:
    return [Task(f"{record['name']}/{record['language']}", record["prompt"], None)]


_FORMATS: dict[str, tuple[frozenset[str], Callable[[Fields], list[Task]]]] = {
    "BigCodeBench": (
        frozenset({"task_id", "complete_prompt", "instruct_prompt", "canonical_solution"}),
        _big_code_bench,
    ),
    "HumanEval": (frozenset({"task_id", "prompt", "canonical_solution"}), _human_eval),
    "MBPP": (frozenset({"task_id", "text", "code"}), _mbpp),
    "MBPP sanitized": (frozenset({"task_id", "prompt", "code"}), _mbpp),
    "LiveCodeBench": (frozenset({"platform", "question_id", "question_content"}), _live_code_bench),
    "APPS": (frozenset({"problem_id", "question", "solutions"}), _apps),
    "DS-1000": (frozenset({"prompt", "reference_code", "metadata"}), _ds_1000),
    "SWE-bench": (frozenset({"instance_id", "problem_statement", "patch"}), _swe_bench),
    "MultiPL-E": (frozenset({"name", "language", "prompt", "tests"}), _multipl_e),
}
"""By format name: the keys that identify it, and the function that reads a record. HumanEval+ and MBPP+ of EvalPlus
have HumanEval's keys."""


def read_benchmark(data: bytes, source: BenchmarkSettings) -> Benchmark:
    """Read the tasks of a file: of any format of a delivery, or one JSON object with a task for each id.

    Raises:
        BenchmarkError: the file is damaged or has no task, a record has an unknown format, or none has a named field.
    """
    records = list(_records(data, source))
    tasks = tuple(itertools.chain.from_iterable(_tasks(*record, source) for record in records))
    if not tasks:
        raise BenchmarkError(f"benchmark {source.name}: the file has no task; use another, or leave it out")
    _require_named(records, source)
    return Benchmark(source.name, hashlib.sha256(data).hexdigest(), tasks)


def load_benchmark(source: BenchmarkSettings) -> Benchmark:
    """Load the benchmark at a local path or fsspec URL. Raises `BenchmarkError`."""
    name, path = source.name, source.path
    try:
        data = read_url(path)
    except StorageError as error:
        raise BenchmarkError(f"benchmark {name}: {path} cannot be read ({error}); check the path") from error
    return read_benchmark(data, source)


def _records(data: bytes, source: BenchmarkSettings) -> Iterator[tuple[int, Any]]:
    """The number and the value of each record."""
    try:
        if (by_id := _by_id(row_files.decompress(data, source.path))) is not None:
            yield from enumerate(by_id, start=1)
            return
        rows = list(row_files.split(data, source.path, lambda record: _reader(record, source) is not None))
    except row_files.UnreadableFileError as error:
        raise BenchmarkError(f"benchmark {source.name}: {error}") from error
    for row in rows:
        if row.fault is not None:
            raise BenchmarkError(
                f"benchmark {source.name}, record {row.source_row}: cannot be read ({row.fault.detail})"
            )
        yield row.source_row, row.value


def _by_id(data: bytes) -> list[Any] | None:
    """The tasks of one JSON object that has an object for each id; None: the file is something else."""
    text = data.decode("utf-8-sig", "replace")
    if not text.lstrip().startswith("{"):
        return None
    try:
        tasks = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_by_id = isinstance(tasks, dict) and len(tasks) > 0 and all(isinstance(task, dict) for task in tasks.values())
    return list(tasks.values()) if is_by_id else None


def _reader(record: Mapping[str, Any], source: BenchmarkSettings) -> Callable[[Fields], list[Task]] | None:
    """What reads a record: the fields that the settings name, or a known format; None: nothing does."""
    if source.prompt is not None:
        return functools.partial(_named, source=source) if source.prompt in record else None
    return next((read for expected, read in _FORMATS.values() if expected <= record.keys()), None)


def _named(record: Fields, source: BenchmarkSettings) -> list[Task]:
    assert source.prompt is not None
    solution = None if source.solution is None else record.get(source.solution)
    return [Task(str(record.get(source.id or "", "")), record[source.prompt], solution)]


def _require_named(records: Sequence[tuple[int, Any]], source: BenchmarkSettings) -> None:
    """Refuse a named field that no record has: its name is misspelt."""
    keys = {key for _, record in records for key in record}
    named = {"id": source.id, "solution": source.solution} if source.prompt is not None else {}
    for setting, field in named.items():
        if field is not None and field not in keys:
            raise BenchmarkError(
                f"benchmark {source.name}: no record has the field that `{setting}: {field}` names (keys of the "
                f"records: {sorted(keys)}); correct the setting, or leave it out"
            )


def _tasks(number: int, record: Any, source: BenchmarkSettings) -> list[Task]:
    keys = sorted(record) if isinstance(record, dict) else []
    read = _reader(record, source) if isinstance(record, dict) else None
    if read is not None:
        try:
            tasks = read(record)
        except (KeyError, TypeError, ValueError):
            tasks = []
        if tasks and all(_is_text(text) for task in tasks for text in (task.prompt, task.solution or "")):
            return [replace(task, task_id=task.task_id or f"{source.name}/{number}") for task in tasks]
    known = "; ".join(f"{name}: {', '.join(sorted(expected))}" for name, (expected, _) in _FORMATS.items())
    wanted = f"known, all with text: {known}" if source.prompt is None else f"`prompt: {source.prompt}` names its text"
    raise BenchmarkError(
        f"benchmark {source.name}, record {number}: unknown format (its keys: {keys}); {wanted}. Name its fields as "
        "`id`, `prompt` and `solution` in the settings"
    )


def _is_text(value: Any) -> bool:
    """Return whether the value is text that can be stored, without a lone surrogate."""
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")
