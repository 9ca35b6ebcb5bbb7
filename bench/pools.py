"""Time of one scoring in one process, in two, and by two actors of a Ray cluster: alternating, on an idle machine.

    python -m bench.pools PAIRS.json PAIRS POOL [POOL …] [--rounds 5] [--config SETTINGS]

A pool is `in_process`, `processes` or the address of a Ray cluster. The strong model scores in float32. Reading its
weights is not counted, nor, in process, tokenising the first 4,096 pairs; there torch uses every core. The first pool
is compared with each other one, by round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.frames import read_pairs
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import PoolSettings, Settings
from qaq_pipeline.scoring.pairs import Pairs, pairs_of
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage


def settings_of(pool: str, config: str | None) -> Settings:
    """The settings with the pool."""
    kinds = {"in_process": {"kind": "in_process"}, "processes": {"kind": "processes", "size": 2}}
    chosen = PoolSettings.model_validate(kinds.get(pool, {"kind": "ray", "size": 2, "address": pool}))
    settings = load_settings(config)
    model = settings.models["strong"].model_copy(update={"dtype": "float32", "device": "cpu", "gpus": 0.0})
    runtime = settings.runtime.model_copy(update={"pool": chosen})
    return settings.model_copy(update={"models": settings.models | {"strong": model}, "runtime": runtime})


def score(settings: Settings, pairs: Pairs) -> float:
    """Seconds of a scoring of which nothing is cached, from the first batch to the last."""
    runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
    with tempfile.TemporaryDirectory() as folder:
        return runtime.score("strong", pairs, Storage(folder, Path(folder) / "locks"), lambda _: None).report.seconds


def show(seconds: dict[str, list[float]], first: str) -> None:
    """Print the seconds of each pool, and how many times as long the first one takes."""
    for pool, of_rounds in seconds.items():
        ratios = [one / other for one, other in zip(seconds[first], of_rounds, strict=True)]
        text = " ".join(f"{value:.1f}" for value in of_rounds)
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"{pool}: {text}; median {statistics.median(of_rounds):.1f} s; {first} / {pool}: {ratio}")  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, each round in another order."""
    parser = argparse.ArgumentParser(prog="python -m bench.pools", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="file of pairs")
    parser.add_argument("pairs", type=int, help="how many of them")
    parser.add_argument("pools", nargs="+", help="in_process, processes, or the address of a Ray cluster")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", help="settings; default: QAQ_CONFIG, else demo")
    asked = parser.parse_args(arguments)
    pairs = Pairs.of(pairs_of(read_pairs(asked.file, asked.pairs)))
    settings = {pool: settings_of(pool, asked.config) for pool in asked.pools}
    seconds: dict[str, list[float]] = {pool: [] for pool in asked.pools}
    for number in range(asked.rounds):
        shift = number % len(asked.pools)
        for pool in asked.pools[shift:] + asked.pools[:shift]:
            seconds[pool].append(score(settings[pool], pairs))
            print(f"round {number + 1}, {pool}: {seconds[pool][-1]:.1f} s", flush=True)  # noqa: T201
    show(seconds, asked.pools[0])


if __name__ == "__main__":
    main()
