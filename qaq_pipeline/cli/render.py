"""Print results as tables, trees and progress bars.

Belongs here: labels and formats. Does not belong here: options, and reading what is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic_core import to_json
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Column, Table

from qaq_pipeline.cli.terminal import complain, console, say, warn
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.withdrawn import withdrawn_batches

if TYPE_CHECKING:
    from rich.tree import Tree

    from qaq_pipeline.reports.pages import Table as PageTable
    from qaq_pipeline.runs.job_runs import Events
    from qaq_pipeline.runs.registration import Estimate
    from qaq_pipeline.runs.status import BatchStatus, TableStatus
    from qaq_pipeline.runs.summary import BatchSummary
    from qaq_pipeline.scoring.logprobs import Progress as ScoringProgress
    from qaq_pipeline.storage.score_cache import CachedModel
    from qaq_pipeline.storage.storage import Storage
    from qaq_pipeline.trial.trial import TrialProgress

_LONGEST_LINE = 10_000

# --- progress --------------------------------------------------------------------------------------------------------


def starting() -> Status:
    """A sign of life on a terminal while Dagster is imported, which takes seconds."""
    return console.status("starting")


@contextmanager
def progress_display() -> Iterator[Events]:
    """Show the progress of runs; yields the callbacks that report it."""
    from qaq_pipeline.runs.job_runs import Events

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as bars:
        display = _Display(bars)
        yield Events(display.stage, display.scoring, display.training, display.notice)
        display.finish()


class _Display:
    """One bar per stage; that of scoring shows sequences, tokens per second, and the time left."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._current: TaskID | None = None

    def stage(self, job: str, partition: str) -> None:
        self.finish()
        self._current = self._bars.add_task(f"{job} {partition}", total=None, detail="")
        if not console.is_terminal:
            console.print(f"{job} {partition}", highlight=False)

    def scoring(self, progress: ScoringProgress) -> None:
        assert self._current is not None
        total, done = progress.total_tokens, progress.done_tokens
        self._bars.update(self._current, total=total, completed=done, detail=progress.sentence)

    def training(self, progress: TrialProgress) -> None:
        assert self._current is not None
        self._bars.update(self._current, total=progress.num_steps, completed=progress.step, detail=progress.sentence)

    def notice(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", style="yellow", markup=False, highlight=False)

    def finish(self) -> None:
        if self._current is not None:
            self._bars.update(self._current, total=1, completed=1)


# --- a run and its cost ----------------------------------------------------------------------------------------------


def print_summary(summary: BatchSummary) -> None:
    """Print the result of `qaq run`: first what the signals could not tell."""
    for sentence in summary.untold:
        say(f"WARNING: {sentence}.", style="bold red")
    rows = Table("rows", "", "why", title=f"Batch {summary.batch}")
    rows.add_row("in", f"{summary.rows_in:,}", "", style="bold")
    for decision, count in summary.rows_by_decision.items():
        reasons = summary.reasons_by_decision[decision].items()
        rows.add_row(decision, f"{count:,}", ", ".join(f"{reason} {n:,}" for reason, n in reasons))
    rows.add_row("sum", f"{sum(summary.rows_by_decision.values()):,}", "", style="bold")
    console.print(rows)
    _print_models(summary)
    if summary.valid_pairs is not None:
        invalid = ", ".join(f"{signal} {count:,}" for signal, count in summary.invalid_pairs.items())
        say(f"Valid pairs: {summary.valid_pairs:,}; declared invalid by {invalid}")
    sizes = ", ".join(f"{name} {count:,}" for name, count in summary.selected_by_selection.items())
    selected = summary.rows_by_decision["selected"]
    say(
        f"Published selection {summary.published}: {selected:,} of {summary.pool_size:,} pairs in its pool, "
        f"{selected / max(summary.rows_in, 1):.1%} of all rows"
    )
    say(f"Pairs by selection: {sizes}")
    for warning in summary.warnings:
        warn(f"warning: {warning}")
    if summary.scored == 0:
        say(f"Nothing was scored: {'every score was in the cache' if summary.cached else 'no pair was left to score'}.")
    unchanged = "" if summary.is_new_version else " (unchanged)"
    for name, url in {f"Dataset{unchanged}": summary.dataset_url, **summary.tables, **summary.pages}.items():
        say(f"{name}: {url}")


def _print_models(summary: BatchSummary) -> None:
    rows = {
        "model": [model.model for model in summary.models],
        "frame, dtype": [f"{model.frame}, {model.dtype}" for model in summary.models],
        "likelihoods scored": [f"{model.scored:,}" for model in summary.models],
        "from the cache": [f"{model.cached:,}" for model in summary.models],
        "answers cut": [f"{model.truncated:,}" for model in summary.models],
        "tokens": [f"{model.tokens:,}" for model in summary.models],
        "tokens/s": [f"{model.tokens / model.seconds:,.0f}" if model.seconds else "-" for model in summary.models],
    }
    for name in dict.fromkeys(name for model in summary.models for name in model.medians):
        medians = (model.medians.get(name) for model in summary.models)
        rows[f"median {name}"] = ["-" if median is None else f"{median:.3f}" for median in medians]
    _print_columns("Scoring", [model.role for model in summary.models], rows)


def print_estimate(estimate: Estimate) -> None:
    """Print what can be read of files, and the estimated cost of scoring it under each model."""
    say(f"Rows: {estimate.rows:,}, of which {estimate.rejected:,} cannot be read")
    if estimate.faults:
        warn(f"warning: {estimate.faults}")
    for sentence in estimate.not_read:
        warn(f"warning: {sentence}")
    costs = estimate.costs
    rows = {
        "model": [cost.model for cost in costs],
        "pairs, planted ones too": [f"{cost.num_pairs:,}" for cost in costs],
        "likelihoods in the cache": [f"{cost.num_cached:,}" for cost in costs],
        "sequences": [f"{cost.estimate.num_sequences:,}" for cost in costs],
        "tokens": [f"{cost.estimate.num_tokens:,}" for cost in costs],
        "of them shared": [f"{cost.num_shared_tokens:,}" for cost in costs],
        "teraFLOP": [f"{cost.estimate.flops / 1e12:,.2f}" for cost in costs],
        "matmul peak": [f"{cost.peak_flops_per_second / 1e12:,.2f} TFLOP/s, {cost.device}" for cost in costs],
        "time": [_duration(cost.estimate.seconds) for cost in costs],
    }
    _print_columns("To score", [cost.role for cost in costs], rows)
    say(f"In all about {_duration(sum(cost.estimate.seconds for cost in costs))}, without loading the models.")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def print_cache(models: Sequence[CachedModel]) -> None:
    """Print the contents of the score cache, one column per key."""
    if not models:
        say("The score cache is empty.")
        return
    rows = {
        "model": [one.identity["model"] for one in models],
        "dtype, prior": [f"{one.identity['dtype']}, {one.identity['prior']}" for one in models],
        "template": [one.identity["template_hash"] for one in models],
        "engine": [f"{one.identity['engine']} {one.identity['engine_version']}" for one in models],
        "scores": [f"{one.num_scores:,}" for one in models],
        "files": [f"{one.num_files:,}" for one in models],
        "set aside": [f"{one.num_set_aside:,}" for one in models],
        "size": [f"{one.num_bytes / 1e6:,.2f} MB" for one in models],
        "hits": [f"{one.num_hits:,}" for one in models],
    }
    _print_columns("Score cache, by key", [one.digest[:8] for one in models], rows)


def _print_columns(title: str, heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Print one column per model and one row per label: it fits into 80 characters."""
    _print_table(title, ("", *heads), [(label, *cells) for label, cells in rows.items()])


# --- batches ---------------------------------------------------------------------------------------------------------


def print_states(batches: Sequence[BatchStatus]) -> None:
    """Print one line per batch; the middle of a name that is too long is left out."""
    from qaq_pipeline.reports import summaries

    rows = [(*(_count(one.tables[name]) for name in ("raw_data", "selected_subset")), one.state) for one in batches]
    heads = ("rows", "selected", "state")
    taken = sum(max(map(len, column)) + 2 for column in zip(heads, *rows, strict=True))
    shown = Table("batch", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        shown.add_column(head, justify="left" if head == "state" else "right", no_wrap=True)
    for one, row in zip(batches, rows, strict=True):
        shown.add_row(escape(summaries.shortened(one.batch, console.width - taken - 2)), *row)
    console.print(shown)


def _count(table: TableStatus) -> str:
    return "-" if table.num_rows is None else f"{table.num_rows:,}"


def print_tables(batches: Sequence[BatchStatus]) -> None:
    """Print the number of rows of every table of every batch."""
    for one in batches:
        say(f"{one.batch}: {one.state}", style="bold")
        width = max(map(len, one.tables))
        for name, table in one.tables.items():
            say(f"  {name:<{width}}  {table.sentence}")


def warn_of_withdrawn(storage: Storage) -> None:
    """Warn loudly if the newest version contains withdrawn rows."""
    if batches := withdrawn_batches(storage, versions.latest(storage)):
        complain(
            f"The newest version contains withdrawn rows of {', '.join(batches)}: `qaq refresh` until they are gone",
            style="bold red",
        )


# --- anything --------------------------------------------------------------------------------------------------------


def _print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    shown = Table(*(Column(head, overflow="fold") for head in heads), title=title)
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def print_page_tables(tables: Sequence[PageTable]) -> None:
    """Print tables of an audit page."""
    for table in tables:
        _print_table(table.caption, table.head, table.rows)


def print_tree(tree: Tree) -> None:
    """Print a tree without breaking its lines, so that hashes and paths can be copied."""
    Console(width=_LONGEST_LINE).print(tree, soft_wrap=True)


def print_json(value: object) -> None:
    """Print dataclasses, and containers of them, as JSON."""
    print(to_json(value, indent=2).decode())
