"""Ranks and one selection of many rows, in a separate process: `python -m bench.ranks ROWS` prints seconds, bytes."""

from __future__ import annotations

import sys
import time

import numpy as np
import polars as pl

from bench.rows import peak_extra_memory
from qaq_pipeline.config.selections import DiffSelection
from qaq_pipeline.config.settings import EligibilitySettings, RankingSettings
from qaq_pipeline.schema import tables
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.selection import disagreement_scores
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.strategies import select


def logprobs(number: int, seed: int) -> pl.DataFrame:
    """Return a Logprobs table of `number` pairs, with plausible sums."""
    random = np.random.default_rng(seed)
    num_q, num_a = random.integers(5, 300, number), random.integers(5, 1200, number)
    query = random.normal(2.5, 0.6, number).clip(0.1)
    sums = {
        "sum_nll_q": query * num_q,
        "sum_nll_q_given_a": (query - random.normal(0.5, 0.3, number)).clip(0.01) * num_q,
        "sum_nll_a": random.normal(1.5, 0.4, number).clip(0.1) * num_a,
        "sum_nll_a_given_q": random.normal(1.2, 0.4, number).clip(0.1) * num_a,
    }
    counts = {"num_q_tokens": num_q, "num_a_tokens": num_a, "num_a_tokens_untruncated": num_a}
    columns = {"pair_id": pl.int_range(number, eager=True).cast(pl.String).str.zfill(32), **sums, **counts}
    frame = pl.DataFrame(columns).with_columns(is_truncated=pl.lit(value=False))
    dtypes = tables.dtypes(tables.Logprobs)
    missing = [pl.lit(None, dtype=dtype).alias(name) for name, dtype in dtypes.items() if name not in frame.columns]
    return frame.with_columns(missing).select(pl.col(name).cast(dtype) for name, dtype in dtypes.items())


def main(number: int) -> None:
    """Compute strata, ranks, the gap and Diff-High's verdicts from two models' RMI scores."""
    limits = EligibilitySettings(min_query_tokens=1, short_query_tokens=3)
    tables = {
        role: rmi_scores.rmi_scores(logprobs(number, seed), limits) for seed, role in enumerate(("strong", "weak"))
    }
    chosen = DiffSelection.model_validate({"name": "diff_high", "strategy": "diff_high", "budget": {"fraction": 0.25}})
    started = time.perf_counter()

    def work() -> None:
        ranked, _ = disagreement_scores.disagreement_scores(tables, RankingSettings(), "bench")
        verdicts = select(candidates(ranked, tables), chosen)
        if int(verdicts["is_selected"].sum()) != round(number / 4):
            raise RuntimeError("the budget was not met")

    extra = peak_extra_memory(work)
    print(time.perf_counter() - started, extra)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
