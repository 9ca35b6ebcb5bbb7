"""Token sequences into batches: longest first, cut by a budget of padded tokens. No torch.

Belongs here: the order and the size of batches. Does not belong here: what is computed on them.
"""

from __future__ import annotations

from collections.abc import Sequence


def token_budget_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of the sequences, batch by batch: longest first, each batch as full as its budget allows.

    A batch of n sequences costs n * (its longest length) padded tokens, which stays within `batch_tokens`; a
    sequence longer than that is a batch of its own. The longest batch goes first because it needs the most memory:
    if it does not fit, that shows in the first second, not in the last hour.

    Args:
        lengths: length of each sequence, in tokens.
        batch_tokens: padded tokens that a batch may hold.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (len(batches[-1]) + 1) * longest <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
