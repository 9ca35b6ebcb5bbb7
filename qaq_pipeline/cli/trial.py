"""The command `trial`: does what is published train better than random rows?"""

from __future__ import annotations

from typing import Annotated

import typer

from qaq_pipeline.cli import render
from qaq_pipeline.cli.terminal import ConfigOption, expected, open_deployment, say
from qaq_pipeline.schema.vocabularies import Verdict


def trial(
    version: Annotated[str, typer.Argument(help="A published version: number, first digits of its hash, or `latest`.")],
    only_estimate: Annotated[
        bool, typer.Option("--estimate", help="Print the trainings and their estimated time, and run nothing.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Train a model on what a version publishes and on random rows, and compare them on held-out pairs."""
    from qaq_pipeline.reports import trial_page
    from qaq_pipeline.runs import trial_runs
    from qaq_pipeline.trial.arms import TrialError

    with open_deployment(config_file) as deployment:
        with expected(TrialError):
            say(f"{trial_runs.estimate(deployment, version).sentence}.")
        if only_estimate:
            return
        with render.progress_display() as events:
            stored = trial_runs.run_trial(deployment, version, events)
    shown = trial_page.of_stored(stored.version, stored.frame, stored.provenance)
    render.print_page_tables(trial_page.tables(shown))
    is_good = shown.primary.verdict is Verdict.BETTER
    say(shown.verdict, style="bold" if is_good else "bold yellow")
    if stored.page:
        say(f"With plots: {stored.page}")
