"""The study: does what is selected train better, on real pairs of which a share is made bad?

    python -m bench.trial run PAIRS.json FOLDER [--shares 0.25 0.6] [--arms …] [--seeds 0 1 2 3 4]
    python -m bench.trial truth PAIRS.json FOLDER [--rows 48]
    python -m bench.trial show FOLDER

PAIRS.json is a file in Alpaca form. The demo's two models score the pools (fetched by `python
examples/fetch_models.py`), and the strong one is trained. Every training is a file in FOLDER; a second run goes on
where the first one stopped. `truth` tests the trial itself, on short trainings. `show` prints what is there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.trial import pools, truth
from bench.trial.pools import ARMS, RANDOM
from bench.trial.studies import Study
from bench.trial.truth import Truth
from bench.validity.bad_rows import CLEAN
from qaq_pipeline.config.settings import BenchmarkSettings, Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.screening.benchmarks import load_benchmark
from qaq_pipeline.trial import verdict

console = Console(width=160)


def main() -> int:
    """Run trainings, or show the finished ones."""
    parser = argparse.ArgumentParser(prog="python -m bench.trial", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run, planted, show = (commands.add_parser(name) for name in ("run", "truth", "show"))
    for command in (run, planted):
        command.add_argument("pairs", type=Path)
        command.add_argument("--learning-rate", type=float)
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    for command in (run, planted, show):
        command.add_argument("folder", type=Path)
    run.add_argument("--benchmark", nargs=2, action="append", default=[], metavar=("NAME", "FILE"))
    run.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.6])
    run.add_argument("--only", type=float, nargs="+", help="pools to train on; default: all shares")
    run.add_argument("--arms", nargs="*", default=list(ARMS))
    planted.add_argument("--rows", type=int, default=48, help="rows of a training")
    show.add_argument("--against", default=RANDOM, help="arm that every arm is compared with")
    arguments = parser.parse_args()
    if arguments.command == "show":
        show_results(Study(arguments.folder, pools.pool_settings([]), {}), arguments.against)
        return 0
    settings = with_rate(pools.pool_settings(arguments.seeds), arguments.learning_rate)
    pairs, held_out = pools.read_sides(arguments.pairs)
    if arguments.command == "truth":
        study = Study(arguments.folder, settings, {"held_out": held_out[: truth.MEASURED]})
        Truth(study, pairs, arguments.rows, arguments.seeds).run()
        return 0
    measured = {"held_out": held_out}
    for name, path in arguments.benchmark:
        tasks = load_benchmark(BenchmarkSettings(name=name, path=path)).tasks
        measured[name] = [Pair(one.task_id, None, one.prompt, one.solution) for one in tasks if one.solution]
    study = Study(arguments.folder, settings, measured)
    wanted = {f"{share:.0%}" for share in arguments.only or arguments.shares}
    made = pools.make_pools(pairs, arguments.shares, settings)
    study.run([pool for pool in made if pool.name in wanted], arguments.arms, arguments.seeds)
    return 0


def with_rate(settings: Settings, rate: float | None) -> Settings:
    """The settings with another learning rate."""
    trial = settings.trial.model_copy(update={"learning_rate": rate or settings.trial.learning_rate})
    return settings.model_copy(update={"trial": trial})


def show_results(study: Study, against: str) -> None:
    """Print the arms of each pool, and their differences from one of them, with Holm's p-values."""
    for sentence in truth.sentences(study):
        console.print(sentence, soft_wrap=True)
    names = {file.name.split(" ")[0] for file in study.folder.glob("*% *.json")}
    for pool in sorted(names):
        results, frame = study.results(pool), study.losses(pool)
        measures = frame["measure"].unique(maintain_order=True).to_list()
        table = Table("arm", "seeds", "rows", "bad rows", "answer tokens", "seconds", *measures, title=f"{pool} bad")
        means = verdict.arm_means(frame)
        for arm in dict.fromkeys(one["arm"] for one in results):
            own = [one for one in results if one["arm"] == arm]
            bad = [sum(n for kind, n in one.get("kinds", {}).items() if kind != CLEAN) for one in own]
            tokens, seconds = ([one["result"][name] for one in own] for name in ("num_tokens", "seconds"))
            counts = [own[0].get("rows", 0), *(sum(each) / len(own) for each in (bad, tokens, seconds))]
            losses = [means.filter(arm=arm, measure=measure)["loss"].mean() for measure in measures]
            table.add_row(arm, str(len(own)), *(f"{one:,.0f}" for one in counts), *(f"{one:.4f}" for one in losses))
        console.print(table)
        for measure in measures:
            arms = [arm for arm in dict.fromkeys(frame["arm"]) if arm != against]
            found = verdict.holm([verdict.compare(frame, measure, arm, against) for arm in arms])
            for one in sorted(found, key=lambda one: one.difference):
                p_value = "" if one.p_value is None else f" p = {one.p_value:.3g}."
                console.print(f"{verdict.sentence(one)}{p_value}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
