"""The work that is disturbed: commands, one after the other, each of which changes what is stored and published.

Belongs here: the deliveries, the settings and the commands. Does not belong here: what disturbs them (`ends`).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from qaq_pipeline_tests.cli.conftest import write_settings
from qaq_pipeline_tests.conftest import TinyModel, build_tiny_model, write_jsonl

NUM_PAIRS = 8
_WORDS = ("list", "sort", "node", "return", "index", "tree", "value", "file", "größe", "cache", "token", "shell")
_ROLES = ("strong", "weak")

ONE_BY_ONE = {"batch_tokens": 16, "shard_seconds": 0.02, "retry_seconds": 1, "lock_timeout_seconds": 30}
"""A forward pass for each sequence: no score then depends on where a scoring was taken up."""


def build_models(folder: Path) -> dict[str, Path]:
    """Two tiny models by role."""
    return {role: build_tiny_model(TinyModel(seed=seed), folder / role) for seed, role in enumerate(_ROLES)}


def write_story_settings(path: Path, models: dict[str, Path], **sections: Any) -> Path:
    """The settings of the commands."""
    runtime = ONE_BY_ONE | sections.pop("runtime", {})
    return write_settings(path, models, runtime=runtime, **sections)


def deliver(folder: Path) -> dict[str, str]:
    """The files of the deliveries by name."""
    first, second, again = (_rows(seed) for seed in range(3))
    # Rows of the second are those of the first, and nearly those; the first is delivered again with half of its rows.
    near = [row | {"query": row["query"] + " Please."} for row in first[2:4]]
    batches = {
        "b1": [*first, {"query": "", "response": "nothing was asked"}],
        "b2": [*second, *first[:2], *near],
        "b1_again": [*first[: NUM_PAIRS // 2], *again[: NUM_PAIRS // 2]],
    }
    return {name: str(write_jsonl(folder / f"{name}.jsonl", rows)) for name, rows in batches.items()}


def commands(files: dict[str, str]) -> dict[str, list[str]]:
    """The commands in order, by name. Each can be given again, and then does what is left of it."""
    return {
        "run": ["run", files["b1"], "--batch", "b1"],
        "run on top": ["run", files["b2"], "--batch", "b2"],
        "withdraw": ["withdraw", "b1/b1.jsonl:3", "--reason", "asked for"],
        "restore": ["withdraw", "b1/b1.jsonl:3", "--reason", "in error", "--restore"],
        "replace": ["run", files["b1_again"], "--batch", "b1", "--replace"],
    }


def _rows(seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(draw.choices(_WORDS, k=number))

    return [
        {"query": f"Write function {seed}-{n} of {words(8)}.", "response": f"def f{n}(x):\n    return {words(10)}"}
        for n in range(NUM_PAIRS)
    ]
