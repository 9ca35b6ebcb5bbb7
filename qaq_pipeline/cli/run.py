"""Commands that run the pipeline, or prepare to: run, estimate, ui."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from qaq_pipeline.cli import render
from qaq_pipeline.cli.terminal import ConfigOption, fail, open_deployment, read_settings, say
from qaq_pipeline.config.load import home_directory
from qaq_pipeline.config.settings import ROWS_PORT


def run(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Delivered files, folders or patterns, as paths or URLs (hf://datasets/…, s3://…): JSON, JSONL, CSV, "
            "Parquet, Arrow; compressed too."
        ),
    ],
    batch: Annotated[str, typer.Option("--batch", help="Name of the batch: letters, digits, '_', '-', '.'.")],
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only the first N rows of the delivery.")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the files in place of an earlier delivery of the batch.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Register files as a batch, run every stage, publish, and print a summary."""
    with render.starting():
        from qaq_pipeline.runs import registration, run_batch
    with (
        open_deployment(config_file) as deployment,
        deployment.lock_batch(batch),
        render.progress_display() as events,
    ):
        if registration.register(deployment, batch, files, limit, replaces=replace):
            events.on_notice(f"this replaces the earlier delivery of batch {batch}, which had other content")
        summary = run_batch.run_batch(deployment, batch, events)
    render.print_summary(summary)


def estimate(
    files: Annotated[list[str], typer.Argument(help="Files as `qaq run` takes them.")],
    config_file: ConfigOption = None,
) -> None:
    """Estimate the cost of scoring files: tokens, operations, time on this machine, and what the cache saves."""
    from qaq_pipeline.runs import registration

    with open_deployment(config_file) as deployment:
        estimated = registration.estimate(deployment, files)
        render.print_estimate(estimated)
        limit = deployment.settings.gates.max_rejected_share
        if limit is not None and estimated.rejected > limit * estimated.rows:
            fail(f"`qaq run` would hold this batch back: more than {limit:.0%} of its rows cannot be read")


def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on 127.0.0.1.")] = 3000,
    rows_port: Annotated[
        int, typer.Option("--rows-port", min=1, max=65535, help="Port of the row browser on 127.0.0.1.")
    ] = ROWS_PORT,
    workspace: Annotated[
        Path | None, typer.Option("--workspace", help="Dagster workspace file. Default: the packaged one.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Open the Dagster UI and its daemon on 127.0.0.1, and the row browser, with the same QAQ_HOME as `qaq run`."""
    from qaq_pipeline.runs.deployment import prepare_home

    read_settings(config_file)
    workspace = workspace or Path(str(resources.files("qaq_pipeline") / "workspace.yaml"))
    if not workspace.exists():
        fail(f"{workspace}: no such file; without --workspace the packaged one is used", code=2)
    home = prepare_home()
    command = [sys.executable, "-m", "dagster", "dev", "-w", str(workspace), "-h", "127.0.0.1", "-p", str(port)]
    command += ["--log-level", "warning"]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "QAQ_HOME": str(home_directory())}
    # It ends with this process, which becomes dagster's.
    browser = [sys.executable, "-m", "qaq_pipeline.cli", "rows", "--port", str(rows_port), "--parent", str(os.getpid())]
    subprocess.Popen(browser, env=environment)  # noqa: S603
    say(f"Dagster UI: http://127.0.0.1:{port} (Dagster home {home}); Ctrl-C ends it")
    # A shell that starts this in the background makes it ignore Ctrl-C's signal, and with it dagster's own shutdown.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.execve(command[0], command, environment)  # noqa: S606
