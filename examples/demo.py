"""The demo: fetch two small models, curate the two example batches, and show which planted defects were selected.

The pipeline never reads the labels in `planted/`; only this script does, after the runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import fetch_models
import polars as pl
from rich.console import Console
from rich.table import Table

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.lm import model_files
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import open_storage

HERE = Path(__file__).parent
console = Console()


def main() -> None:
    """Run the demo; exit with the code of the first command that fails."""
    settings = load_settings("demo")
    started = time.monotonic()
    fetch_models.fetch_all(settings.model_cache_dir)
    convert_models()
    ready = time.monotonic()
    batches = sorted((HERE / "batches").iterdir())
    for path in batches:
        run("run", str(path), "--batch", batch_name(path), "--config", "demo")
    run("status", "--config", "demo")
    print_defects(batches)
    done = time.monotonic()
    console.print(f"Models fetched and converted in {ready - started:.0f} s, batches curated in {done - ready:.0f} s.")
    console.print("Next: `make ui`, or `.venv/bin/qaq explain 2026-11-02 ROW`, or `.venv/bin/qaq trial latest`.")


def batch_name(path: Path) -> str:
    """Return the file's name up to the first dot: its date."""
    return path.name.split(".")[0]


def run(*arguments: str) -> None:
    """Run a `qaq` command."""
    qaq = str(Path(sys.executable).with_name("qaq"))
    console.print(f"\n$ qaq {' '.join(arguments)}", style="bold", highlight=False, soft_wrap=True)
    code = subprocess.run([qaq, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def convert_models() -> None:
    """Convert the GGUF files in parallel: reading a file uses one thread."""
    roles = sorted(load_settings("demo").models)
    with ProcessPoolExecutor(len(roles), mp_context=get_context("spawn")) as processes:
        list(processes.map(convert_model, roles))


def convert_model(role: str) -> None:
    """Convert one model, unless that is already done."""
    settings = load_settings("demo")
    model_files.locate(settings.models[role], settings.model_cache_dir)


def print_defects(batches: list[Path]) -> None:
    """Print the share of each kind of planted defect that each selection keeps, and the share of all rows."""
    storage = open_storage(load_settings("demo"))
    decisions = pl.concat([storage.tables.read("decisions", Partition(batch_name(path))).frame for path in batches])
    labels = [json.loads(line) for path in sorted((HERE / "planted").iterdir()) for line in path.open(encoding="utf-8")]
    rows = decisions.join(pl.DataFrame(labels), on=["source_file", "source_row"], how="left")
    rows = rows.with_columns(pl.col("defect").fill_null("clean")).with_columns(
        pl.col("verdicts").list.eval(
            pl.element().struct.field("selection").filter(pl.element().struct.field("is_selected"))
        )
    )
    selections = rows["verdicts"].explode().drop_nulls().unique().sort().to_list()
    table = Table("rows", "n", *selections, title="Kept by each selection: planted defects beside the base rate")
    kinds = ["all rows", "clean", *sorted(set(rows["defect"]) - {"clean"})]
    for kind in kinds:
        of_kind = rows if kind == "all rows" else rows.filter(pl.col("defect") == kind)
        shares = [f"{of_kind['verdicts'].list.contains(selection).mean():.2f}" for selection in selections]
        table.add_row(kind, f"{of_kind.height}", *shares)
    console.print(table)
    console.print("Each kind has 10 to 12 rows: a difference of 0.2 in its share is noise.", style="dim")


if __name__ == "__main__":
    main()
