"""`python -m qaq_pipeline_tests.chaos`: a campaign, bounded in time and number; `make chaos` is an hour of it."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qaq_pipeline_tests.chaos import story
from qaq_pipeline_tests.chaos.campaign import Campaign, Tally
from qaq_pipeline_tests.chaos.ends import ENDS, OF_WORKERS
from qaq_pipeline_tests.chaos.places import Disk, Servers
from qaq_pipeline_tests.chaos.warm import Warm

_HOUR = 3600.0


def main() -> int:
    """Run a campaign and print what came of it; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m qaq_pipeline_tests.chaos", description="Disturb the pipeline.")
    parser.add_argument("--seconds", type=float, default=_HOUR, help="time after which no attack begins")
    parser.add_argument("--ends", type=int, default=10_000, help="number of ends after which no attack begins")
    parser.add_argument("--seed", type=int, help="of the draws; default: another one each time")
    parser.add_argument("--servers", action="store_true", help="on Postgres and an S3 server; default: on a disk")
    parser.add_argument("--workers", action="store_true", help="score in two processes, and end those")
    parser.add_argument("--kinds", nargs="+", help="of disturbances; default: all of such a place")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(3)) if arguments.seed is None else arguments.seed
    console = Console(width=160, highlight=False)
    console.print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        storage = {"root": Servers.ROOT, "locks": {"kind": "postgres"}} if arguments.servers else {}
        models = story.build_models(folder / "models")
        pool = {"pool": {"kind": "processes", "size": 2}} if arguments.workers else {}
        config = story.write_story_settings(folder / "settings.yaml", models, storage=storage, runtime=pool)
        place = (Servers if arguments.servers else Disk)(folder, config)
        ends = OF_WORKERS if arguments.workers else ENDS[type(place)]
        ends = {name: end for name, end in ends.items() if name in (arguments.kinds or ends)}
        with place.running(), Warm(folder) as commands:
            os.environ |= place.own_environment
            campaign = Campaign(
                place,
                commands,
                story.commands(story.deliver(folder)),
                ends=ends,
                seed=seed,
                on_attack=lambda line: console.print(line, markup=False, soft_wrap=True),
            )
            tally = campaign.run(seconds=arguments.seconds, ends=arguments.ends)
    report(tally, list(ends), console)
    return 1 if tally.wrong else 0


def report(tally: Tally, kinds: list[str], console: Console) -> None:
    """Print the counts."""
    table = Table("disturbance", "ends", "over before it")
    for kind in kinds:
        table.add_row(kind, f"{tally.ends[kind]:,}", f"{tally.over_before[kind]:,}")
    table.add_row("all", f"{tally.ends.total():,}", f"{tally.over_before.total():,}")
    console.print(table)
    console.print(f"{tally.compared:,} results compared; {len(tally.wrong):,} lines of faults")


if __name__ == "__main__":
    raise SystemExit(main())
