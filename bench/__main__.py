"""The benchmark: the engine against its goals and other engines, in one run, on the same pairs. No downloads.

    python -m bench [--quick] [--device cpu|cuda] [--json FILE]

Prints a table of ratios (min, median, max over rotated blocks, with a matrix product timed in each), writes it as JSON,
and exits with 1 if a goal is missed. On a CPU it measures process seconds with one thread, on a GPU CUDA events. Not
here: bf16's Spearman correlation of RMI, which random weights cannot show (LOG.md); work lost to a kill
(test_endurance).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench import rows
from bench.rows import Row


def main() -> int:
    """Run every row that this machine can measure; return 1 as exit status if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="two rotations instead of five, for a first look")
    parser.add_argument("--only", default="", help="run only rows whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("var/bench.json"), help="file to write the numbers to")
    arguments = parser.parse_args()
    rotations = 2 if arguments.quick else 5
    results: list[Row] = []
    for name, measure in rows.for_device(arguments.device).items():
        if arguments.only in name:
            found = measure(rotations)
            results += found
            for row in found:
                print(row, file=sys.stderr)  # noqa: T201
    if not results:
        parser.error(f"no row's name contains {arguments.only!r}")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps([row.as_json() for row in results], indent=2) + "\n", encoding="utf-8")
    show(results, arguments.device)
    return 1 if any(row.is_missed for row in results) else 0


def show(results: list[Row], device: str) -> None:
    """Print the table, with the machine as its title."""
    table = Table("", "goal", "min", "median", "max", "", title=f"{rows.machine(device)}")
    for row in results:
        low, middle, high = (f"{value:.4g}" for value in (row.low, row.median, row.high))
        table.add_row(row.name, row.goal_text, low, middle, high, "[red]missed[/]" if row.is_missed else "")
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
