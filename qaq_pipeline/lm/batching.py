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


def batch_size(lengths: Iterable[int], budget: int, *, is_padded: bool) -> int:
    """How many lengths, from the first on, make one batch: as many as the budget allows, and at least one.

    With padding, a batch of n sequences costs n times its longest length; without, the sum of its lengths.

    Args:
        lengths: lengths in tokens, longest first.
        budget: largest cost of a batch, in tokens.
        is_padded: whether sequences are padded to the longest of their batch.
    """
    number = longest = tokens = 0
    for number, length in enumerate(lengths, start=1):
        longest = max(longest, length)
        tokens = number * longest if is_padded else tokens + length
        if tokens > budget and number > 1:
            return number - 1
    return number


def num_attended(length: int, num_shared: int = 0) -> int:
    """Pairs of a token and one that it attends to, itself included, without those of `num_shared` leading tokens."""
    return (length * (length + 1) - num_shared * (num_shared + 1)) // 2


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
        self._window: list[TokenSequence] = []
        """The rest of the current window, longest first."""
        self._halves: deque[list[TokenSequence]] = deque()
        self._num_clean = 0

    def take(self) -> list[TokenSequence]:
        """Take the next batch; empty if none is left."""
        if self._halves:
            return self._halves.popleft()
        while not self._window:
            window = next(self._windows, None)
            if window is None:
                return []
            self._window = sorted(window, key=self._cost, reverse=True)
        size = batch_size(map(self._cost, self._window), self.budget, is_padded=self._is_padded)
        batch, self._window = self._window[:size], self._window[size:]
        return batch

    def tokens(self, batch: Sequence[TokenSequence]) -> int:
        """The cost of the batch in tokens, including padding."""
        lengths = [self._cost(sequence) for sequence in batch]
        return max(lengths) * len(lengths) if self._is_padded else sum(lengths)

    def attended(self, batch: Sequence[TokenSequence]) -> int:
        """Pairs of a token and one that it attends to in a forward pass of the batch, including padding."""
        if self._is_padded:
            return len(batch) * num_attended(max(len(one.token_ids) for one in batch))
        return sum(num_attended(len(one.token_ids), one.num_shared * self._shares_prefixes) for one in batch)

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

    def _cost(self, sequence: TokenSequence) -> int:
        return len(sequence.token_ids) - (sequence.num_shared if self._shares_prefixes else 0)
