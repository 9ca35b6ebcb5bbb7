"""Every number of every explanation of a batch, computed again from the stored sums by the formulas as written.

For tests, and for whoever doubts decisions: `check_batch(storage, settings, batch)` over a home of real models.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from qaq_pipeline.config.conditions import Quotas
from qaq_pipeline.config.selections import DiffSelection
from qaq_pipeline.config.settings import Settings, TableSettings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.screening import shingles
from qaq_pipeline.storage.storage import Storage

_TEXT = re.compile(r"up to 1 for the highest|where 1 is equal|the [\d.]+% of")
_RANK = re.compile(r"rank ([\d.]+) under the (\w+) model \((?:the only stratum|stratum (\d+) of (\d+))\)")
_LIMITS = r"(?:those that pass the limits \(where\) in a pool of )?"
_PLACE = re.compile(
    rf"gap is (-?[\d.]+), number (\d+) of {_LIMITS}(\d+) pairs; the gap of the last pair taken is (-?[\d.]+\d)"
)
_WHERE = re.compile(r"is at least ([\d.]+)\. This pair(?:'s [\w.]+ is| has no [\w.]+?)(?: ([\d.]+))?\.$")
_QUERY = re.compile(
    r"at most (\d+) pairs? of one query, .*gap is (-?[\d.]+), number (\d+) of the pairs with its query\.$"
)
_GROUP = re.compile(
    r": (\d+|no) pairs? (?:whose [\w.]+ is \w+|without [\w.]+)\. "
    r"This pair's gap is (-?[\d.]+), number (\d+) of its group"
    r"(?:; the gap of the last pair taken of the group is (-?[\d.]+\d)|, of which (?:every eligible|no) pair was taken)"
)
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
    expected = _selection(gaps, published, _columns(storage, settings, batch, sums["strong"]))
    texts = _texts(storage, batch)
    num_ranked = 0
    for row in storage.tables.read("decisions", Partition(batch)).frame.iter_rows(named=True):
        if row["decision"] in ("selected", "not_selected"):
            _check_ranked(row, sums, ranks, settings)
            reason, said = expected[row["pair_id"]]
            assert row["reason"] == reason, (row, reason)
            _check_numbers(row, said)
            _check_no_other_number(row["explanation"])
            ends = {role: of_role[row["pair_id"]]["sum_nll_end"] for role, of_role in sums.items()}
            assert {one["model"]: one["nll_end"] for one in row["scores"]} == ends, row
            num_ranked += 1
        elif row["reason"] == "near_duplicate":
            (found,) = re.findall(r"similarity ([\d.]+), where", row["explanation"])
            assert _close(found, _jaccard(texts[_reference(row)], texts[row["duplicate_of"]])), row
    return num_ranked


# --- the selection ---------------------------------------------------------------------------------------------------

Said = tuple[re.Pattern[str], tuple[float | str, ...]]
"""The part of a sentence that tells a verdict, and the numbers and words in it."""


def _selection(
    gaps: dict[str, float], published: DiffSelection, columns: dict[str, dict[str, str | None]]
) -> dict[str, tuple[str, Said]]:
    """The reason of each pair, and the numbers of its sentence."""
    order = sorted(gaps, key=lambda pair: (-round(gaps[pair], 12), pair))
    found: dict[str, tuple[str, Said]] = {}
    for pair in order:
        if (not_met := _not_met(columns[pair], published)) is not None:
            found[pair] = "where_not_met", (_WHERE, not_met)
    placed = [pair for pair in order if pair not in found]
    of_query: Counter[str | None] = Counter()
    for pair in placed:
        of_query[query := columns[pair]["query"]] += 1
        if published.max_per_query is not None and of_query[query] > published.max_per_query:
            found[pair] = "query_full", (_QUERY, (published.max_per_query, gaps[pair], of_query[query]))
    num_taken = math.floor((published.budget.fraction or 0) * len(order) + 0.5)
    left = [pair for pair in placed if pair not in found]
    if published.quotas is not None:
        return found | _of_groups(left, gaps, published.quotas, columns, num_taken)
    for number, pair in enumerate(left):
        reason = "within_budget" if number < num_taken else "below_cut"
        said = (gaps[pair], placed.index(pair) + 1, len(order), gaps[left[min(num_taken, len(left)) - 1]])
        found[pair] = reason, (_PLACE, said)
    return found


def _not_met(values: dict[str, str | None], published: DiffSelection) -> tuple[float | str, ...] | None:
    """The limit and the value of the first condition that is not met; only lowest numbers are checked here."""
    for condition in published.where:
        value = values[condition.column]
        assert condition.at_least is not None
        if value is None or float(value) < condition.at_least:
            return condition.at_least, "" if value is None else value
    return None


def _of_groups(
    left: list[str], gaps: dict[str, float], quotas: Quotas, columns: dict[str, dict[str, str | None]], total: int
) -> dict[str, tuple[str, Said]]:
    """Equal shares, given out one at a time, the odd ones to the first groups by name."""
    assert quotas.shares == "equal"
    groups: dict[str, list[str]] = {}
    for pair in left:
        groups.setdefault(columns[pair][quotas.per] or "none", []).append(pair)
    quota = dict.fromkeys(groups, 0)
    while total and (room := [group for group in sorted(groups) if quota[group] < len(groups[group])]):
        for group in room[:total]:
            quota[group] += 1
        total -= len(room[:total])
    found: dict[str, tuple[str, Said]] = {}
    for group, pairs in groups.items():
        is_cut = 0 < quota[group] < len(pairs)
        cut = (gaps[pairs[quota[group] - 1]],) if is_cut else ("",)
        for number, pair in enumerate(pairs, start=1):
            reason = "within_budget" if number <= quota[group] else "quota_full"
            found[pair] = reason, (_GROUP, (quota[group] or "no", gaps[pair], number, *cut))
    return found


def _check_numbers(row: dict[str, Any], said: Said) -> None:
    pattern, expected = said
    (found,) = pattern.findall(row["explanation"])
    for shown, value in zip(found, expected, strict=True):
        is_same = shown == value if isinstance(value, str) else _close(shown, value)
        assert is_same, (row, shown, value)


def _columns(
    storage: Storage, settings: Settings, batch: str, strong: dict[str, dict[str, Any]]
) -> dict[str, dict[str, str | None]]:
    """The query and each column that the selection names, by pair: of the row that is kept, and of imported tables."""
    kept = {
        _reference(row)
        for row in storage.tables.read("screened_data", Partition(batch)).frame.iter_rows(named=True)
        if row["status"] == "accepted"
    }
    tables = {table.name: _imported(table) for table in settings.tables}
    found = {}
    for row in storage.tables.read("raw_data", Partition(batch)).frame.iter_rows(named=True):
        if (place := _reference(row)) in kept:
            values = {"query": " ".join(row["query"].split())}
            for column in settings.published.columns:
                table, dot, name = column.partition(".")
                if table == "record":
                    value = json.loads(row["record"]).get(name)
                elif dot:
                    value = tables[table].get(row["pair_id"], tables[table].get(place, {})).get(name) or None
                else:
                    value = row[column] if column in row else strong[row["pair_id"]][column]
                values[column] = None if value is None else str(value)
            found[row["pair_id"]] = values
    return found


def _imported(table: TableSettings) -> dict[str, dict[str, str]]:
    with Path(table.path).open(encoding="utf-8", newline="") as stream:
        return {row[table.key]: row for row in csv.DictReader(stream)}


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
    for pattern in (_PLACE, _WHERE, _QUERY, _GROUP, _RANK, _CUT, _SHORT, _TEXT):
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
