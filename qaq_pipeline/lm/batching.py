"""Divides token sequences into batches: longest first, within a token budget, smaller when memory is short. No torch.

Belongs here: the order and the size of batches. Does not belong here: computation on them (`runners`), and the choice
of sequences (`scoring.planner`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from qaq_pipeline.lm.prompts import TokenSequence

CLEAN_BATCHES_BEFORE_GROWTH = 16


class BatchTooLargeError(MemoryError):
    """A batch does not fit into memory."""


def batch_size(lengths: Sequence[int], budget: int, *, is_padded: bool) -> int:
    """How many lengths, from the first on, make one batch: as many as the budget allows, and at least one.

    With padding, a batch of n sequences costs n times its longest length; without, the sum of its lengths.

    Args:
        lengths: lengths in tokens, longest first.
        budget: largest cost of a batch, in tokens.
        is_padded: whether sequences are padded to the longest of their batch.
    """
    tokens = 0
    for number, length in enumerate(lengths):
        tokens = (number + 1) * lengths[0] if is_padded else tokens + length
        if tokens > budget and number:
            return number
    return len(lengths)


class BatchQueue:
    """A queue of batches: longest sequences first within each window of sequences.

    The longest batch goes first because it needs the most memory: if it does not fit, that shows in the first
    second, not in the last hour. A batch that does not fit is returned as two halves, and later batches are smaller
    until enough of them have fitted.

    Args:
        windows: sequences to score, one window at a time; the next window is read when the last one is used up.
        budget: largest cost of a batch, in tokens.
        is_padded: whether sequences are padded to the longest of their batch.
        shares_prefixes: whether shared prefixes cost nothing; default: if there is no padding.
    """

    def __init__(
        self,
        windows: Iterable[Sequence[TokenSequence]],
        budget: int,
        *,
        is_padded: bool,
        shares_prefixes: bool | None = None,
    ) -> None:
        self._windows = iter(windows)
        self._full_budget = self.budget = budget
        self._is_padded = is_padded
        self._shares_prefixes = not is_padded if shares_prefixes is None else shares_prefixes
        self._window: Sequence[TokenSequence] = ()
        self._lengths: list[int] = []
        self._next = 0
        self._halves: deque[list[TokenSequence]] = deque()
        self._num_clean = 0

    def take(self) -> list[TokenSequence]:
        """Take the next batch; empty if none is left."""
        if self._halves:
            return self._halves.popleft()
        while self._next >= len(self._window):
            window = next(self._windows, None)
            if window is None:
                return []
            self._open(window)
        # A batch never has more sequences than tokens.
        lengths = self._lengths[self._next : self._next + self.budget + 1]
        stop = self._next + batch_size(lengths, self.budget, is_padded=self._is_padded)
        batch = list(self._window[self._next : stop])
        self._next = stop
        return batch

    def tokens(self, batch: Sequence[TokenSequence]) -> int:
        """The cost of the batch in tokens, including padding."""
        lengths = [self._cost(sequence) for sequence in batch]
        return max(lengths) * len(lengths) if self._is_padded else sum(lengths)

    def fitted(self) -> None:
        """Record that a batch fitted. After enough of them the budget grows again."""
        self._num_clean += 1
        if self._num_clean >= CLEAN_BATCHES_BEFORE_GROWTH and self.budget < self._full_budget:
            self.budget = min(2 * self.budget, self._full_budget)
            self._num_clean = 0

    def split(self, batch: Sequence[TokenSequence]) -> bool:
        """Queue the two halves of a batch that did not fit. Returns False for one sequence, which cannot be split."""
        self._num_clean = 0
        self.budget = max(min(self.budget, self.tokens(batch) // 2), 1)
        middle = len(batch) // 2
        if not middle:
            return False
        self._halves += [list(batch[:middle]), list(batch[middle:])]
        return True

    def _open(self, window: Sequence[TokenSequence]) -> None:
        order = sorted(range(len(window)), key=lambda index: (-self._cost(window[index]), index))
        self._window = [window[index] for index in order]
        self._lengths = [self._cost(sequence) for sequence in self._window]
        self._next = 0

    def _cost(self, sequence: TokenSequence) -> int:
        return len(sequence.token_ids) - (sequence.num_shared if self._shares_prefixes else 0)
