"""Plans which sequences to score: the wanted quantities of the pairs, minus the cached ones. No torch.

Belongs here: windows of pairs, tokenised ahead of the model, and the forecast of the remaining work.
Does not belong here: the content of a sequence (`lm.prompts`), and the choice of batches (`lm.batching`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import polars as pl

from qaq_pipeline.config.settings import ScoringSettings
from qaq_pipeline.lm.prompts import EncodedPair, Pair, PairEncoder, TokenSequence
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, Quantity

WINDOW_PAIRS = 4096

T = TypeVar("T")


def wanted_quantities(scoring: ScoringSettings) -> frozenset[Quantity]:
    """The negative log-likelihoods that the wanted scores are computed from."""
    return frozenset(quantity for score in scoring.quantities for quantity in QUANTITIES_OF[score])


class Plan:
    """The sequences that yield the wanted quantities of some pairs, window by window, and their counts so far.

    The longest pairs come first, by number of characters. A window then holds sequences of similar length, and
    sequences that do not fit into memory show at once. Counts grow as windows are taken; at the end they are exact.

    Args:
        pairs: distinct pairs.
        encoder: turns them into sequences.
        wanted: the quantities to score.
        cached: `CachedScores` of the pairs.
        window_pairs: number of pairs tokenised at once.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        encoder: PairEncoder,
        wanted: Collection[Quantity],
        cached: pl.DataFrame,
        window_pairs: int = WINDOW_PAIRS,
    ) -> None:
        self._pairs = sorted(pairs, key=lambda pair: (-_num_characters(pair), pair.pair_id))
        self._encoder = encoder
        self._wanted = frozenset(wanted)
        self.cached = cached
        """The argument `cached`: scores of the pairs, wanted or not."""
        self._known = set(cached.select("pair_id", "quantity", "num_tokens", "end_ids").iter_rows())
        self._window_pairs = window_pairs
        self._finished = self._without_work()
        self._pairs_left, self._characters_left = self._unfinished(pairs)
        self._pairs_planned = self._characters_planned = 0
        self.encoded: list[EncodedPair] = []
        """All pairs planned so far, without their sequences."""
        self.num_cached = 0
        """Wanted quantities found in the cache."""
        self.num_quantities = 0
        """Quantities to score."""
        self.num_pairs_to_score = 0
        """Pairs with at least one sequence to score."""
        self.num_sequences = 0
        self.num_tokens = 0
        """Tokens of the sequences to score, shared prefixes included."""
        self.num_shared_tokens = 0
        """The part of `num_tokens` that lies in shared prefixes."""
        self.num_targets = 0
        """The part of `num_tokens` whose log-probability is wanted."""

    def windows(self) -> Iterator[list[TokenSequence]]:
        """The sequences to score. Each window is tokenised while the previous one is scored."""
        windows = (
            self._pairs[start : start + self._window_pairs] for start in range(0, len(self._pairs), self._window_pairs)
        )
        for pairs, encoded in _one_ahead((pairs, self._encoder.encode(pairs, self._wanted)) for pairs in windows):
            yield self._plan(pairs, encoded)

    @property
    def expected_tokens(self) -> int:
        """Forecast of all tokens to score, from the tokens per character of the pairs planned so far."""
        return _extrapolate(self.num_tokens, self._characters_planned, self._characters_left)

    @property
    def expected_shared_tokens(self) -> int:
        """Forecast of the tokens in shared prefixes, made as `expected_tokens` is."""
        return _extrapolate(self.num_shared_tokens, self._characters_planned, self._characters_left)

    @property
    def expected_targets(self) -> int:
        """Forecast of the tokens whose log-probability is wanted, made as `expected_tokens` is."""
        return _extrapolate(self.num_targets, self._characters_planned, self._characters_left)

    @property
    def expected_sequences(self) -> int:
        """Forecast of all sequences to score, from the sequences per pair planned so far."""
        return _extrapolate(self.num_sequences, self._pairs_planned, self._pairs_left)

    def _without_work(self) -> set[str]:
        """Ids of the pairs whose wanted quantities are all cached, as far as can be known before tokenising.

        An end scored with other end tokens than those of the default system text is to be scored again.
        """
        ends = " ".join(map(str, self._encoder.end_ids()))
        wanted = self._wanted if ends else self._wanted - {Quantity.END}
        known = {
            (pair_id, quantity)
            for pair_id, quantity, _, end_ids in self._known
            if quantity in wanted and end_ids in ("", ends)
        }
        counts = Counter(pair_id for pair_id, _ in known)
        return {pair_id for pair_id, count in counts.items() if count == len(wanted)}

    def _unfinished(self, pairs: Iterable[Pair]) -> tuple[int, int]:
        """Number and characters of the pairs that have wanted quantities outside the cache."""
        unfinished = [pair for pair in pairs if pair.pair_id not in self._finished]
        return len(unfinished), sum(map(_num_characters, unfinished))

    def _plan(self, pairs: Sequence[Pair], encoded: Sequence[EncodedPair]) -> list[TokenSequence]:
        by_pair = [list(self._not_cached(pair.sequences)) for pair in encoded]
        sequences = [sequence for sequences in by_pair for sequence in sequences]
        self.num_pairs_to_score += sum(map(bool, by_pair))
        num_unfinished, num_characters = self._unfinished(pairs)
        self._pairs_left -= num_unfinished
        self._pairs_planned += num_unfinished
        self._characters_left -= num_characters
        self._characters_planned += num_characters
        num_quantities = sum(len(sequence.targets) for sequence in sequences)
        self.encoded += [replace(pair, sequences=()) for pair in encoded]
        self.num_cached += sum(len(one.targets) for pair in encoded for one in pair.sequences) - num_quantities
        self.num_quantities += num_quantities
        self.num_sequences += len(sequences)
        self.num_tokens += sum(len(sequence.token_ids) for sequence in sequences)
        self.num_shared_tokens += sum(sequence.num_shared for sequence in sequences)
        self.num_targets += sum(target.stop - target.start for one in sequences for target in one.targets)
        return sequences

    def _not_cached(self, sequences: Iterable[TokenSequence]) -> Iterator[TokenSequence]:
        """The sequences without their cached targets, and no longer than to the last target that is left.

        A cached sum over another number of tokens comes from another segmentation, and one of other end tokens answers
        another question: such a quantity is scored again. A sequence without any target left is dropped.
        """
        for sequence in sequences:
            targets = tuple(
                target
                for target in sequence.targets
                if (sequence.pair_id, target.quantity.value, target.stop - target.start, target.end_ids)
                not in self._known
            )
            if targets:
                token_ids = sequence.token_ids[: max(target.stop for target in targets)]
                yield replace(sequence, targets=targets, token_ids=token_ids)


def _num_characters(pair: Pair) -> int:
    return len(pair.query) + len(pair.answer)


def _extrapolate(count: int, done: int, left: int) -> int:
    return count + (round(count / done * left) if done else 0)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each computed in a thread while the caller uses the previous one."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item
