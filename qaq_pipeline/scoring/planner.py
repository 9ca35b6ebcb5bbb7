"""Plans which sequences to score: the wanted quantities of the pairs, minus the cached ones. No torch.

Belongs here: windows of pairs, tokenised ahead of the model, and the forecast of the remaining work.
Does not belong here: the content of a sequence (`lm.prompts`), and the choice of batches (`lm.batching`).
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import ScoringSettings
from qaq_pipeline.lm.batching import num_attended
from qaq_pipeline.lm.prompts import EncodedPair, PairEncoder, TokenSequence
from qaq_pipeline.schema.vocabularies import QUANTITIES_OF, Quantity
from qaq_pipeline.scoring.pairs import LongestFirst
from qaq_pipeline.scoring.sums import Sums

WINDOW_PAIRS = 4096

T = TypeVar("T")
_Score = tuple[int, str, int, str]
"""Place of the pair, quantity, number of tokens, end tokens."""


def wanted_quantities(scoring: ScoringSettings) -> frozenset[Quantity]:
    """The negative log-likelihoods that the wanted scores are computed from."""
    return frozenset(quantity for score in scoring.quantities for quantity in QUANTITIES_OF[score])


class Plan:
    """The sequences that yield the wanted quantities of some pairs, window by window, and their counts so far.

    The longest pairs come first, by number of characters. A window then holds sequences of similar length, and
    sequences that do not fit into memory show at once. Counts grow as windows are taken; at the end they are exact.

    Args:
        pairs: to score.
        encoder: turns them into sequences.
        wanted: the quantities to score.
        cached: scores of the pairs, wanted or not, as `ScoreCache.read` gives them for `pairs.pair_ids()`.
        window_pairs: number of pairs tokenised at once.
    """

    def __init__(
        self,
        pairs: LongestFirst,
        encoder: PairEncoder,
        wanted: Collection[Quantity],
        cached: pl.DataFrame,
        window_pairs: int = WINDOW_PAIRS,
    ) -> None:
        self.pairs = pairs
        self._encoder = encoder
        self.wanted = frozenset(wanted)
        self.cached = cached
        self._window_pairs = window_pairs
        self._is_unfinished = ~self._without_work()
        self._pairs_left, self._characters_left = self._unfinished(0, len(pairs))
        self._pairs_planned = self._characters_planned = 0
        self.sums = Sums(len(pairs))
        """What is known of the pairs planned so far: counts of tokens, null reasons and cached sums."""
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
        self.num_attended = self.num_shared_attended = 0
        """Pairs of a token and one that it attends to, and those of shared prefixes."""
        self.num_targets = 0
        """The part of `num_tokens` whose log-probability is wanted."""

    def windows(self) -> Generator[list[TokenSequence], None, None]:
        """The sequences to score. Each window is tokenised while the previous one is scored."""
        windows = self.pairs.windows(self._window_pairs)
        for encoded in _one_ahead(self._encoder.encode(pairs, self.wanted) for pairs in windows):
            yield self._plan(encoded)

    @property
    def num_pairs(self) -> int:
        """Number of pairs, scored or not."""
        return len(self.pairs)

    @property
    def expected_tokens(self) -> int:
        """Forecast of all tokens to score, from the tokens per character of the pairs planned so far."""
        return _extrapolate(self.num_tokens, self._characters_planned, self._characters_left)

    @property
    def expected_shared_tokens(self) -> int:
        """Forecast of the tokens in shared prefixes, made as `expected_tokens` is."""
        return _extrapolate(self.num_shared_tokens, self._characters_planned, self._characters_left)

    @property
    def expected_attended(self) -> int:
        """Forecast of the pairs of a token and one that it attends to, made as `expected_tokens` is."""
        return _extrapolate(self.num_attended, self._characters_planned, self._characters_left)

    @property
    def expected_shared_attended(self) -> int:
        """Forecast of such pairs in shared prefixes, made as `expected_tokens` is."""
        return _extrapolate(self.num_shared_attended, self._characters_planned, self._characters_left)

    @property
    def expected_targets(self) -> int:
        """Forecast of the tokens whose log-probability is wanted, made as `expected_tokens` is."""
        return _extrapolate(self.num_targets, self._characters_planned, self._characters_left)

    @property
    def expected_sequences(self) -> int:
        """Forecast of all sequences to score, from the sequences per pair planned so far."""
        return _extrapolate(self.num_sequences, self._pairs_planned, self._pairs_left)

    def cached_scorers(self) -> set[str]:
        """The distinct scorers (JSON) of the cached scores of wanted quantities."""
        return set(self.cached.filter(self._is_wanted())["scored_with"].unique())

    def _is_wanted(self) -> pl.Expr:
        return pl.col("quantity").is_in([quantity.value for quantity in self.wanted])

    def _without_work(self) -> np.ndarray:
        """Whether the wanted quantities of a pair are all cached, by place, as far as can be known before tokenising.

        An end scored with other end tokens than those of the default system text is to be scored again.
        """
        ends = " ".join(map(str, self._encoder.end_ids()))
        wanted = self.wanted if ends else self.wanted - {Quantity.END}
        known = self.cached.filter(self._is_wanted(), pl.col("end_ids").is_in(["", ends]))
        num_known = np.zeros(len(self.pairs), np.uint8)
        for quantity in wanted:
            num_known[known.filter(quantity=quantity.value)["place"].unique().to_numpy()] += 1
        return num_known == len(wanted)

    def _unfinished(self, first: int, stop: int) -> tuple[int, int]:
        """Number and characters of the pairs at these places that have wanted quantities outside the cache."""
        is_unfinished = self._is_unfinished[first:stop]
        num_characters = self.pairs.num_characters(first, stop).sum(where=is_unfinished, dtype=np.int64)
        return int(is_unfinished.sum()), int(num_characters)

    def _plan(self, encoded: Sequence[EncodedPair]) -> list[TokenSequence]:
        first = self.sums.num_encoded
        stop = first + len(encoded)
        self.sums.add_encoded(encoded)
        known = self._known(first, stop)
        by_pair = [list(self._not_cached(place, pair, known)) for place, pair in enumerate(encoded, first)]
        sequences = [sequence for sequences in by_pair for sequence in sequences]
        self.num_pairs_to_score += sum(map(bool, by_pair))
        num_unfinished, num_characters = self._unfinished(first, stop)
        self._pairs_left -= num_unfinished
        self._pairs_planned += num_unfinished
        self._characters_left -= num_characters
        self._characters_planned += num_characters
        num_quantities = sum(len(sequence.targets) for sequence in sequences)
        self.num_cached += sum(len(one.targets) for pair in encoded for one in pair.sequences) - num_quantities
        self.num_quantities += num_quantities
        self.num_sequences += len(sequences)
        self.num_tokens += sum(len(sequence.token_ids) for sequence in sequences)
        self.num_shared_tokens += sum(sequence.num_shared for sequence in sequences)
        self.num_attended += sum(num_attended(len(sequence.token_ids)) for sequence in sequences)
        self.num_shared_attended += sum(num_attended(sequence.num_shared) for sequence in sequences)
        self.num_targets += sum(target.stop - target.start for one in sequences for target in one.targets)
        return sequences

    def _known(self, first: int, stop: int) -> dict[_Score, float]:
        """The cached sums of the pairs at these places."""
        rows = scores_at(self.cached, first, stop).select("place", "quantity", "num_tokens", "end_ids", "sum_nll")
        return {(place, *score): sum_nll for place, *score, sum_nll in rows.iter_rows()}

    def _not_cached(self, place: int, pair: EncodedPair, known: Mapping[_Score, float]) -> Iterator[TokenSequence]:
        """The sequences without their cached targets, and no longer than to the last target that is left.

        A cached sum over another number of tokens comes from another segmentation, and one of other end tokens answers
        another question: such a quantity is scored again. A sequence without any target left is dropped.
        """
        for sequence in pair.sequences:
            left = []
            for target in sequence.targets:
                score = (place, target.quantity.value, target.stop - target.start, target.end_ids)
                if score in known:
                    self.sums.add_cached(place, target.quantity, known[score])
                else:
                    left.append(target)
            if left:
                token_ids = sequence.token_ids[: max(target.stop for target in left)]
                yield replace(sequence, targets=tuple(left), token_ids=token_ids)


def scores_at(cached: pl.DataFrame, first: int, stop: int) -> pl.DataFrame:
    """The rows of `ScoreCache.read` of the pairs at these places."""
    places = cached["place"].to_numpy()
    start, end = np.searchsorted(places, np.array([first, stop], places.dtype))
    return cached[int(start) : int(end)]


def _extrapolate(count: int, done: int, left: int) -> int:
    return count + (round(count / done * left) if done else 0)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each computed in a thread while the caller uses the previous one."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as thread:
        upcoming = thread.submit(next, items, None)
        while (item := upcoming.result()) is not None:
            upcoming = thread.submit(next, items, None)
            yield item
