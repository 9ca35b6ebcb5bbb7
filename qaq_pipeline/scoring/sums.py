"""The content of Logprobs while it is made: sums, null reasons and token counts as arrays over the pairs.

Belongs here: the assembly of the table. Does not belong here: what is scored (`planner`), and the files of scores
(`shards`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from qaq_pipeline.lm.prompts import EncodedPair
from qaq_pipeline.schema.tables import Logprobs, dtypes
from qaq_pipeline.schema.vocabularies import NullReason, Quantity
from qaq_pipeline.storage.ordered_rows import ROWS_AT_ONCE

_COUNTS = {
    "num_q_tokens": np.uint32,
    "num_a_tokens": np.uint32,
    "num_a_tokens_untruncated": np.uint32,
    "is_truncated": np.bool_,
}
"""The columns of Logprobs that the encoding determines."""

_QUANTITIES = [quantity.value for quantity in Quantity]
_UNKNOWN, _SCORED = 0, 1
_REASONS = [None, None, *(reason.value for reason in NullReason)]
"""A reason is held as its place in this list, after `_UNKNOWN` and `_SCORED`."""
_CODES: dict[str, int] = {reason.value: code for code, reason in enumerate(NullReason, start=_SCORED + 1)}


class Sums:
    """Sums and null reasons of each quantity, and token counts, of pairs by their place in the order of scoring.

    It takes memory only for the pairs that were added.

    Args:
        number: of distinct pairs.
    """

    def __init__(self, number: int) -> None:
        self._ids: list[pl.Series] = []
        """pair_ids by place, some after the others."""
        self._sums_qp = np.zeros((len(_QUANTITIES), number))  # q: quantity, p: place of the pair.
        self._codes_qp = np.zeros((len(_QUANTITIES), number), np.uint8)  # `_UNKNOWN`
        self._counts = {name: np.zeros(number, dtype) for name, dtype in _COUNTS.items()}
        self._waiting: list[pl.DataFrame] = []
        self.num_encoded = 0
        """Pairs with counts so far."""
        self.num_scored = 0
        """Sums so far that were not in the cache."""

    def add_encoded(self, encoded: Sequence[EncodedPair]) -> None:
        """Add the counts and the null reasons of the next pairs."""
        self._ids.append(pl.Series("pair_id", [pair.pair_id for pair in encoded], pl.String))
        first, stop = self.num_encoded, self.num_encoded + len(encoded)
        for name, counts in self._counts.items():
            counts[first:stop] = [getattr(pair, name) for pair in encoded]
        for place, quantity in enumerate(Quantity):
            reasons = (pair.null_reasons.get(quantity) for pair in encoded)
            codes = [_UNKNOWN if reason is None else _CODES[reason] for reason in reasons]
            self._codes_qp[place, first:stop] = codes
        self.num_encoded = stop

    def add_cached(self, place: int, quantity: Quantity, sum_nll: float) -> None:
        """Add a sum that was in the cache."""
        cell = _QUANTITIES.index(quantity), place
        self._sums_qp[cell], self._codes_qp[cell] = sum_nll, _SCORED

    def add_shard(self, shard: pl.DataFrame) -> None:
        """Add scores of this run, as `CachedScores`, including failures."""
        self.num_scored += shard["sum_nll"].count()
        self._waiting.append(shard)
        if sum(waiting.height for waiting in self._waiting) >= ROWS_AT_ONCE:
            self._add_waiting()

    def parts(self) -> Iterator[pl.DataFrame]:
        """The Logprobs table in the order of pair_id, some rows at a time; of no pairs, one part without rows.

        Raises:
            AssertionError: a quantity of a pair has neither a sum nor a reason.
        """
        self._add_waiting()
        self._require_all()
        pair_ids = self._pair_ids()
        by_id = pair_ids.arg_sort()
        for start in range(0, max(len(by_id), 1), ROWS_AT_ONCE):
            places = by_id[start : start + ROWS_AT_ONCE]
            yield self._rows(pair_ids.gather(places), places.to_numpy())

    def _pair_ids(self) -> pl.Series:
        """Of the pairs so far, by place."""
        self._ids = [pl.concat([pl.Series("pair_id", dtype=pl.String), *self._ids])]
        return self._ids[0]

    def _rows(self, pair_ids: pl.Series, order: np.ndarray) -> pl.DataFrame:
        """The rows of Logprobs of these pairs, which have these places."""
        reasons = pl.Series(_REASONS, dtype=pl.String)
        columns = {"pair_id": pair_ids}
        for quantity, sums, codes in zip(_QUANTITIES, self._sums_qp, self._codes_qp, strict=True):
            of_rows = codes[order]
            columns[f"sum_nll_{quantity}"] = pl.Series(
                np.where(of_rows == _SCORED, sums[order], np.nan), nan_to_null=True
            )
            columns[f"null_reason_{quantity}"] = reasons.gather(of_rows)
        columns |= {name: pl.Series(counts[order]) for name, counts in self._counts.items()}
        types = dtypes(Logprobs)
        return pl.DataFrame({name: columns[name].cast(dtype) for name, dtype in types.items()})

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        pairs = self._pair_ids().to_frame().with_row_index("place")
        scored = pl.concat(self._waiting).join(pairs, on="pair_id", validate="m:1")
        rows = scored["quantity"].replace_strict(_QUANTITIES, range(len(_QUANTITIES)), return_dtype=pl.UInt8)
        codes = scored["null_reason"].replace_strict({None: _SCORED, **_CODES}, return_dtype=pl.UInt8)
        cells = (rows.to_numpy(), scored["place"].to_numpy())
        self._sums_qp[cells] = scored["sum_nll"].to_numpy()
        self._codes_qp[cells] = codes.to_numpy()
        self._waiting = []

    def _require_all(self) -> None:
        for quantity, codes in zip(_QUANTITIES, self._codes_qp, strict=True):
            lost = np.flatnonzero(codes == _UNKNOWN)
            if lost.size:
                pair_id = self._pair_ids()[int(lost[0])]
                raise AssertionError(f"pair {pair_id}: {quantity} was neither scored nor refused")
