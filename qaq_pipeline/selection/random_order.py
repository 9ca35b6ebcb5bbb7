"""Random orders that are the same on every machine: a draw for each pair, and stratified places by quota."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import polars as pl

from qaq_pipeline.schema.draws import draws


def draw_column(seed: int) -> str:
    """The name of the column that `with_draws` adds."""
    return f"draw:{seed}"


def with_draws(candidates: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The candidates with the draw of each pair; unchanged where they have it already."""
    name = draw_column(seed)
    if name in candidates.columns:
        return candidates
    pair_ids = candidates["pair_id"].unique()
    drawn = pl.DataFrame({"pair_id": pair_ids, name: draws(pair_ids, seed)})
    of_rows = candidates.select("pair_id").join(drawn, on="pair_id", how="left", maintain_order="left", validate="m:1")
    return candidates.with_columns(of_rows[name])


def stratified_places(stratum: pl.Series, draw: pl.Expr, num_rows: int | None) -> pl.Expr:
    """(i - 1/2) / q for the i-th draw of a stratum, from 1, whose quota is q; beyond it 1 + (i - q - 1/2) / (n - q).

    Sorted by it, the first `num_rows` pairs are exactly the quotas, spread evenly. Without a number of rows (a token
    budget) the quota is the whole stratum n, and a prefix of k rows of S strata holds k * n / N of it, give or take
    1/2 + S * n / (2 * N): one row where strata are of equal size.

    Args:
        stratum: of each pair; null: not in the pool. The frame of the result has it as a column, too.
        draw: of each pair.
        num_rows: how many are taken; None: a token budget.
    """
    sizes = dict(stratum.drop_nulls().value_counts().iter_rows())
    total = sum(sizes.values())
    taken = quotas(sizes, total if num_rows is None else min(num_rows, total))
    place = pl.when(pl.col("stratum").is_not_null()).then(draw).rank("ordinal").over("stratum").cast(pl.Float64) - 0.5
    quota, size = (
        pl.col("stratum").replace_strict(list(of), list(of.values()), default=None, return_dtype=pl.Float64)
        for of in (taken, sizes)
    )
    return pl.when(place < quota).then(place / quota).otherwise(1 + (place - quota) / (size - quota))


_Key = TypeVar("_Key", int, str)


def quotas(sizes: Mapping[_Key, int], num_rows: int) -> dict[_Key, int]:
    """floor(k * n_s / n), and one more for the largest remainders until k are given; ties to the lower stratum."""
    total = sum(sizes.values())
    shares = {stratum: divmod(num_rows * size, total) for stratum, size in sorted(sizes.items())}
    left = num_rows - sum(whole for whole, _ in shares.values())
    larger = set(sorted(shares, key=lambda stratum: (-shares[stratum][1], stratum))[:left])
    return {stratum: whole + (stratum in larger) for stratum, (whole, _) in shares.items()}
