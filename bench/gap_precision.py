"""How well the gap survives the rounding of bfloat16, by the number of pairs: simulated from real scores.

    python -m bench.gap_precision LOGPROBS_STRONG LOGPROBS_WEAK PAIRS [PAIRS …] [--error STRONG WEAK]

The two are tables of logprobs of the same pairs, such as `var/storage/logprobs/BATCH/strong/table.parquet`. Pairs are
drawn from them with a little noise, so that no two are alike (Silverman's bandwidth; the spread stays as it is). A
second copy gets errors in log PPL(Q) and log PPL(Q | A), normal and independent, so that RMI has an error of the given
mean size: in bfloat16 0.012 and 0.009 nats per token (LOG.md, 2026-11-23). Both copies are ranked as scoring does.
With few pairs a stratum is small: a pair that passes one other, or moves to the next stratum, changes its rank by much.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

from bench.ranks import logprobs
from qaq_pipeline.config.settings import EligibilitySettings, RankingSettings
from qaq_pipeline.scoring.rmi_scores import rmi_scores
from qaq_pipeline.selection.disagreement_scores import disagreement_scores

BFLOAT16_ERRORS = (0.012, 0.009)
"""Mean size of the error of an RMI of the demo's models, in nats per token."""
DRAWS = 5
_Q, _Q_GIVEN_A = "sum_nll_q", "sum_nll_q_given_a"


def real_pairs(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return log PPL(Q) and RMI under each model [pairs, 4], and the number of query tokens [pairs, 2]."""
    tables = [pl.read_parquet(file).drop_nulls([_Q, _Q_GIVEN_A]) for file in files]
    both = tables[0].join(tables[1], on="pair_id", suffix="_weak", maintain_order="left")
    columns = []
    for suffix in ("", "_weak"):
        tokens = both[f"num_q_tokens{suffix}"]
        query = both[f"{_Q}{suffix}"] / tokens
        columns += [query, query - both[f"{_Q_GIVEN_A}{suffix}"] / tokens]
    values = np.column_stack([column.to_numpy() for column in columns])
    return values, both.select("num_q_tokens", "num_q_tokens_weak").to_numpy()


def drawn(values: np.ndarray, number: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return `number` pairs like the given ones [number, 4], and the place of the pair that each is like."""
    places = random.integers(len(values), size=number)
    width = (4 / (values.shape[1] + 2) / len(values)) ** (1 / (values.shape[1] + 4))
    noise = random.multivariate_normal(np.zeros(values.shape[1]), np.cov(values.T), number)
    mean = values.mean(axis=0)
    return mean + (values[places] - mean + width * noise) / np.sqrt(1 + width**2), places


def gaps(values: np.ndarray, num_tokens: np.ndarray) -> pl.DataFrame:
    """Return the gap of each pair that has one."""
    scored = {}
    for number, role in enumerate(("strong", "weak")):
        query, rmi, tokens = values[:, 2 * number], values[:, 2 * number + 1], num_tokens[:, number]
        sums = {_Q: pl.Series(query * tokens), _Q_GIVEN_A: pl.Series((query - rmi) * tokens)}
        table = logprobs(len(values), 0).with_columns(**sums, num_q_tokens=pl.Series(tokens))
        scored[role] = rmi_scores(table, EligibilitySettings())
    ranked, _ = disagreement_scores(scored, RankingSettings(), "bench")
    return ranked.select("pair_id", "gap").drop_nulls()


def correlation(
    values: np.ndarray, num_tokens: np.ndarray, number: int, errors: tuple[float, float], random: np.random.Generator
) -> float:
    """Return Spearman's correlation of the gap with and without errors, of `number` pairs."""
    exact, places = drawn(values, number, random)
    rounded = exact.copy()
    for column, error in zip((0, 2), errors, strict=True):
        of_query, given_answer = random.normal(0, error * np.sqrt(np.pi / 2) / np.sqrt(2), (2, number))
        rounded[:, column] += of_query
        rounded[:, column + 1] += of_query - given_answer
    tokens = num_tokens[places]
    both = gaps(exact, tokens).join(gaps(rounded, tokens), on="pair_id", suffix="_rounded")
    return both.select(pl.corr("gap", "gap_rounded", method="spearman")).item()


def main() -> None:
    """Print the correlation for each number of pairs."""
    parser = argparse.ArgumentParser(prog="python -m bench.gap_precision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("logprobs", nargs=2, type=Path)
    parser.add_argument("pairs", nargs="+", type=int)
    parser.add_argument("--error", nargs=2, type=float, default=BFLOAT16_ERRORS, metavar=("STRONG", "WEAK"))
    arguments = parser.parse_args()
    values, num_tokens = real_pairs(arguments.logprobs)
    for number in arguments.pairs:
        random = np.random.default_rng(0)
        found = [correlation(values, num_tokens, number, tuple(arguments.error), random) for _ in range(DRAWS)]
        print(f"{number:>8,} pairs: Spearman of the gap {np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")  # noqa: T201


if __name__ == "__main__":
    main()
