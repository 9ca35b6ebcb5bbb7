"""Every number of every explanation of a batch, computed again from the stored sums by the formulas as written.

For tests, and for whoever doubts decisions: `check_batch(storage, settings, batch)` over a home of real models.
"""

from __future__ import annotations

import math
import re
from typing import Any

import polars as pl

from qaq_pipeline.config.selections import DiffSelection
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import shingles
from qaq_pipeline.storage.storage import Storage

_TEXT = re.compile(r"up to 1 for the highest|where 1 is equal|the [\d.]+% of")
_RANK = re.compile(r"rank ([\d.]+) under the (\w+) model \((?:the only stratum|stratum (\d+) of (\d+))\)")
_PLACE = re.compile(r"gap is (-?[\d.]+), number (\d+) of (\d+) pairs; the gap of the last pair taken is (-?[\d.]+\d)")
_CUT = re.compile(r"Only the first (\d+) of the answer's (\d+) tokens were read by ([\w ]+)\.")
_SHORT = re.compile(r"The query has only (\d+) tokens? for ([\w ]+),")


def check_batch(storage: Storage, settings: Settings, batch: str) -> int:
    """Assert it of every row of a batch that is ranked in itself and published by diff_high; how many were ranked."""
    published = settings.published
    assert isinstance(published, DiffSelection)
    assert published.strategy == "diff_high"
    sums = {role: _sums(storage, batch, role) for role in settings.models}
    ranks = {role: _ranks(of_role, settings) for role, of_role in sums.items()}
    gaps = {
        pair: ranks["strong"][pair][0] - ranks["weak"][pair][0] for pair in ranks["strong"] if pair in ranks["weak"]
    }
    order = sorted(gaps, key=lambda pair: (-round(gaps[pair], 12), pair))
    num_taken = math.floor((published.budget.fraction or 0) * len(order) + 0.5)
    texts = _texts(storage, batch)
    num_ranked = 0
    for row in storage.tables.read("decisions", Partition(batch)).frame.iter_rows(named=True):
        if row["decision"] in ("selected", "not_selected"):
            _check_ranked(row, sums, ranks, settings)
            place = order.index(row["pair_id"]) + 1
            (found,) = _PLACE.findall(row["explanation"])
            gap, cut = gaps[row["pair_id"]], gaps[order[num_taken - 1]]
            assert _close(found[0], gap), (row, gap)
            assert _close(found[3], cut), (row, cut)
            assert (int(found[1]), int(found[2])) == (place, len(order)), row
            assert (row["decision"] == "selected") == (place <= num_taken), row
            _check_no_other_number(row["explanation"])
            ends = {role: of_role[row["pair_id"]]["sum_nll_end"] for role, of_role in sums.items()}
            assert {one["model"]: one["nll_end"] for one in row["scores"]} == ends, row
            num_ranked += 1
        elif row["reason"] == "near_duplicate":
            (found,) = re.findall(r"similarity ([\d.]+), where", row["explanation"])
            assert _close(found, _jaccard(texts[_reference(row)], texts[row["duplicate_of"]])), row
    return num_ranked


def _sums(storage: Storage, batch: str, role: str) -> dict[str, dict[str, Any]]:
    return {
        row["pair_id"]: row
        for row in storage.tables.read("logprobs", Partition(batch, role)).frame.iter_rows(named=True)
    }


def _ranks(sums: dict[str, dict[str, Any]], settings: Settings) -> dict[str, tuple[float, int, int]]:
    """Rank, stratum and number of strata of every pair that has an RMI."""
    rmi, log_ppl = {}, {}
    for pair, row in sums.items():
        tokens = row["num_q_tokens"]
        if None in (row["sum_nll_q"], row["sum_nll_q_given_a"]) or tokens < settings.eligibility.min_query_tokens:
            continue
        log_ppl[pair] = row["sum_nll_q"] / tokens
        rmi[pair] = row["sum_nll_q"] / tokens - row["sum_nll_q_given_a"] / tokens
    ranking = settings.ranking
    count = max(1, min(ranking.num_strata, len(rmi) // ranking.min_rows_per_stratum))
    ordered = sorted(rmi, key=lambda pair: (log_ppl[pair], pair))
    stratum = {pair: place * count // len(ordered) + 1 for place, pair in enumerate(ordered)}
    return {pair: (_rank(pair, rmi, stratum), stratum[pair], count) for pair in rmi}


def _rank(pair: str, rmi: dict[str, float], stratum: dict[str, int]) -> float:
    values = [rmi[other] for other in rmi if stratum[other] == stratum[pair]]
    less, equal = sum(value < rmi[pair] for value in values), values.count(rmi[pair])
    return (less + (equal + 1) / 2) / len(values)


def _check_ranked(
    row: dict[str, Any],
    sums: dict[str, dict[str, dict[str, Any]]],
    ranks: dict[str, dict[str, tuple[float, int, int]]],
    settings: Settings,
) -> None:
    pair, said = row["pair_id"], row["explanation"]
    found = {role: (rank, stratum, count) for rank, role, stratum, count in _RANK.findall(said)}
    assert set(found) == set(ranks), row
    for role, (rank, stratum, count) in found.items():
        expected = ranks[role][pair]
        assert _close(rank, expected[0]), (row, expected)
        assert (int(stratum or 1), int(count or 1)) == expected[1:], (row, expected)
    cut = {role: (int(kept), int(whole)) for kept, whole, models in _CUT.findall(said) for role in _roles(models)}
    counts = ("num_a_tokens", "num_a_tokens_untruncated")
    of_pair = {role: of_role[pair] for role, of_role in sums.items()}
    assert cut == {role: tuple(one[n] for n in counts) for role, one in of_pair.items() if one["is_truncated"]}, row
    least = settings.eligibility.short_query_tokens
    short = {role: one["num_q_tokens"] for role, one in of_pair.items() if one["num_q_tokens"] < least}
    assert {role: int(tokens) for tokens, models in _SHORT.findall(said) for role in _roles(models)} == short, row


def _roles(models: str) -> list[str]:
    return re.findall(r"the (\w+) model", models)


def _check_no_other_number(said: str) -> None:
    """Nothing that was not checked: the patterns and the fixed phrases hold every digit."""
    rest = said.partition(" Flagged,")[0]
    for pattern in (_PLACE, _RANK, _CUT, _SHORT, _TEXT):
        rest = pattern.sub("", rest)
    assert not re.search(r"\d", rest), (said, rest)


def _close(shown: str, value: float) -> bool:
    """Whether the shown decimals are the value's, give or take the last bit before rounding."""
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - value) <= 0.5 * 10**-decimals + 1e-9


def _texts(storage: Storage, batch: str) -> dict[str, str]:
    rows = storage.tables.read("raw_data", Partition(batch)).frame.iter_rows(named=True)
    return {_reference(row): f"{row['query']}\n{row['answer']}" for row in rows}


def _reference(row: dict[str, Any]) -> str:
    return f"{row['batch']}/{row['source_file']}:{row['source_row']}.{row['turn_index']}"


def _jaccard(one: str, other: str) -> float:
    first, second = _ngrams(one), _ngrams(other)
    return len(first & second) / len(first | second)


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = shingles.words(pl.Series([text]), shingles.WORD_OR_SYMBOL)[0].to_list()
    return {tuple(words[start : start + 5]) for start in range(max(len(words) - 4, 1))}
