"""The content of Logprobs while it is made: sums, null reasons and token counts as arrays over the pairs.

Belongs here: the assembly of the table. Does not belong here: what is scored (`planner`), and the files of scores
(`shards`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from qaq_pipeline.lm.prompts import EncodedPair
from qaq_pipeline.schema.tables import Logprobs, dtypes
from qaq_pipeline.schema.vocabularies import NullReason, Quantity

_COUNTS = {
    "num_q_tokens": np.uint32,
    "num_a_tokens": np.uint32,
    "num_a_tokens_untruncated": np.uint32,
    "is_truncated": np.bool_,
}
"""The columns of Logprobs that the encoding determines."""

_QUANTITIES = [quantity.value for quantity in Quantity]
_REASONS = [None, *(reason.value for reason in NullReason)]
"""A reason is held as its place in this list."""
_CODES: dict[str | None, int] = {reason: code for code, reason in enumerate(_REASONS)}

_ROWS_AT_ONCE = 1 << 17


class Sums:
    """Sums and null reasons of each quantity, and token counts, of pairs by their place in the order of scoring.

    Args:
        pair_ids: of distinct pairs, by place.
    """

    def __init__(self, pair_ids: pl.Series) -> None:
        self._pair_ids = pair_ids.alias("pair_id")
        number = len(pair_ids)
        self._sums_qp = np.full((len(_QUANTITIES), number), np.nan)  # q: quantity, p: place of the pair.
        self._reasons_qp = np.zeros((len(_QUANTITIES), number), np.uint8)
        self._counts = {name: np.zeros(number, dtype) for name, dtype in _COUNTS.items()}
        self._waiting: list[pl.DataFrame] = []
        self.num_encoded = 0
        """Pairs with counts so far."""
        self.num_scored = 0
        """Sums so far that were not in the cache."""

    def add_encoded(self, encoded: Sequence[EncodedPair]) -> None:
        """Add the counts and the null reasons of the next pairs."""
        first, stop = self.num_encoded, self.num_encoded + len(encoded)
        for name, counts in self._counts.items():
            counts[first:stop] = [getattr(pair, name) for pair in encoded]
        for place, quantity in enumerate(Quantity):
            reasons = [_CODES[pair.null_reasons.get(quantity)] for pair in encoded]
            self._reasons_qp[place, first:stop] = reasons
        self.num_encoded = stop

    def add_cached(self, place: int, quantity: Quantity, sum_nll: float) -> None:
        """Add a sum that was in the cache."""
        self._sums_qp[_QUANTITIES.index(quantity), place] = sum_nll

    def add_shard(self, shard: pl.DataFrame) -> None:
        """Add scores of this run, as `CachedScores`, including failures."""
        self.num_scored += shard["sum_nll"].count()
        self._waiting.append(shard)
        if sum(waiting.height for waiting in self._waiting) >= _ROWS_AT_ONCE:
            self._add_waiting()

    def table(self) -> pl.DataFrame:
        """The Logprobs table, sorted by pair_id.

        Raises:
            AssertionError: a quantity of a pair has neither a sum nor a reason.
        """
        self._add_waiting()
        self._require_all()
        by_id = self._pair_ids.arg_sort()
        order = by_id.to_numpy()
        reasons = pl.Series(_REASONS, dtype=pl.String)
        columns = {"pair_id": self._pair_ids.gather(by_id)}
        for quantity, sums, codes in zip(_QUANTITIES, self._sums_qp, self._reasons_qp, strict=True):
            columns[f"sum_nll_{quantity}"] = pl.Series(sums[order], nan_to_null=True)
            columns[f"null_reason_{quantity}"] = reasons.gather(codes[order])
        columns |= {name: pl.Series(counts[order]) for name, counts in self._counts.items()}
        types = dtypes(Logprobs)
        return pl.DataFrame({name: columns[name].cast(dtype) for name, dtype in types.items()})

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        pairs = pl.DataFrame([self._pair_ids]).with_row_index("place")
        scored = pl.concat(self._waiting).join(pairs, on="pair_id", validate="m:1")
        rows = scored["quantity"].replace_strict(_QUANTITIES, range(len(_QUANTITIES)), return_dtype=pl.UInt8)
        codes = scored["null_reason"].replace_strict(_REASONS, range(len(_REASONS)), return_dtype=pl.UInt8)
        cells = (rows.to_numpy(), scored["place"].to_numpy())
        self._sums_qp[cells] = scored["sum_nll"].to_numpy()
        self._reasons_qp[cells] = codes.to_numpy()
        self._waiting = []

    def _require_all(self) -> None:
        for quantity, sums, codes in zip(_QUANTITIES, self._sums_qp, self._reasons_qp, strict=True):
            lost = np.flatnonzero(np.isnan(sums) & (codes == 0))
            if lost.size:
                raise AssertionError(f"pair {self._pair_ids[int(lost[0])]}: {quantity} was neither scored nor refused")
