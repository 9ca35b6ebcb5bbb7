"""Every number of a batch's validity, computed again from the stored scores by the formulas as written in the method.

For tests, and for whoever doubts that a pair is invalid: `check_validity(storage, settings, batch)`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.storage.storage import Storage

MODELS = ("strong", "weak")
LIMITS = {"echo": 0.05, "implausible_query": 0.2, "mismatch": 0.08, "unfinished": 0.2, "unclosed": 0.6}
SHORTEST = 9
"""Least number of tokens of an answer whose RMI is judged."""
DEFECTS = {
    "echo": ("echo",),
    "implausible_query": ("invented_terms",),
    "mismatch": ("other_answer",),
    "unfinished": ("cut_answer", "cut_at_line"),
    "unclosed": ("cut_answer", "cut_at_line"),
}
_NUMBERS = re.compile(
    r"is (-?[\d.]+) under the strong model and (-?[\d.]+) under the weak model; .* have (-?[\d.]+) and (-?[\d.]+) on "
    r"average\. In mean deviations from these, the pair is at (-?\d+\.\d+)\. The signal is raised at or below "
    r"(-?\d+\.\d+), where (\d+)% of these"
)

Rows = dict[str, dict[str, dict[str, Any]]]
"""The scores of each pair, by pair and model."""
Line = tuple[float, float]


def check_validity(storage: Storage, settings: Settings, batch: str) -> int:
    """Assert that cuts, evidence, verdicts and sentences of a batch follow; how many pairs are invalid."""
    cuts = {row["signal"]: row for row in _read(storage, "validity_cuts", batch)}
    validity = {row["pair_id"]: row for row in _read(storage, "validity", batch)}
    texts = {row["pair_id"]: row for row in _read(storage, "raw_data", batch) if row["pair_id"] in validity}
    planted_rows = _read(storage, "planted_rows", batch)
    pairs, planted = (_rows(storage, name, batch) for name in ("rmi_scores", "planted_scores"))
    evidence: dict[str, dict[str, float]] = {}
    for signal, cut in cuts.items():
        if cut["cut"] is None or cut["chosen_from"] != [batch]:
            continue
        bad = {row["pair_id"]: row for row in planted_rows if row["defect"] in DEFECTS[signal]}
        of_bad = {pair: planted[pair] for pair in bad}
        numbers = {pair: [_number(signal, of_bad[pair][role], bad[pair]) for role in MODELS] for pair in bad}
        known = [both for both in numbers.values() if None not in both]
        lines = {role: _lines([both[place] for both in known]) for place, role in enumerate(MODELS)}
        evidence[signal] = _evidence(signal, pairs, texts, lines)
        of_planted = _evidence(signal, of_bad, bad, lines)
        possible = [
            value if _is_possible(signal, texts[pair]) else math.inf for pair, value in evidence[signal].items()
        ]
        possible_bad = [value if _is_possible(signal, bad[pair]) else math.inf for pair, value in of_planted.items()]
        expected = _cut(possible, possible_bad, LIMITS[signal], settings.validity.max_false_share)
        assert [cut[name] for name in ("cut", "missed", "defect_share", "dropped", "false_share")] == [
            pytest.approx(number, abs=1e-9) for number in expected
        ]
    for pair, row in validity.items():
        _check_pair(row, pair, evidence, cuts, texts, settings)
    return _check_sentences(storage, batch, cuts, validity, pairs, texts)


def _read(storage: Storage, table: str, batch: str) -> list[dict[str, Any]]:
    return storage.tables.read(table, Partition(batch)).frame.to_dicts()


def _rows(storage: Storage, table: str, batch: str) -> Rows:
    found: Rows = {}
    for role in MODELS:
        for row in storage.tables.read(table, Partition(batch, role)).frame.iter_rows(named=True):
            found.setdefault(row["pair_id"], {})[role] = row
    return found


def _number(signal: str, scores: dict[str, Any], text: dict[str, Any]) -> tuple[float, float] | None:
    """Value and covariate, low where the pair is bad; None: there is none."""
    if signal == "unclosed":
        return -float(_is_unclosed(text["answer"])), 0.0
    needed = {"echo": ("rmi", "log_ppl_q"), "implausible_query": ("log_ppl_q",), "mismatch": ("rmi", "log_ppl_q")}
    if any(scores[name] is None for name in needed.get(signal, ("nll_end",))):
        return None
    if signal == "mismatch" and scores["num_a_tokens_untruncated"] < SHORTEST:
        return None
    if signal == "echo" and scores["log_ppl_q"] == 0:
        return None
    return {
        "echo": lambda: (-scores["rmi"] / scores["log_ppl_q"], 0.0),
        "implausible_query": lambda: (-scores["log_ppl_q"], 1 / scores["num_q_tokens"]),
        "mismatch": lambda: (scores["rmi"], scores["log_ppl_q"]),
        "unfinished": lambda: (-scores["nll_end"], 0.0),
    }[signal]()


def _lines(numbers: list[tuple[float, float] | None]) -> tuple[Line, Line]:
    """Place and scale, each as (intercept, slope)."""
    known = [one for one in numbers if one is not None]
    values, covariates = np.array([one[0] for one in known]), np.array([one[1] for one in known])
    if np.ptp(covariates) < 1e-6:
        place = float(values.mean())
        return (place, 0.0), (max(float(np.abs(values - place).mean()), 1e-9), 0.0)
    slope, intercept = np.polyfit(covariates, values, 1)
    deviations = np.abs(values - intercept - slope * covariates)
    mean, center = max(float(deviations.mean()), 1e-9), float(covariates.mean())
    steep = float(np.clip(np.polyfit(covariates, deviations, 1)[0], 0.0, 0.75 * mean / center))
    return (float(intercept), float(slope)), (mean - steep * center, steep)


def _evidence(
    signal: str, pairs: Rows, texts: dict[str, dict[str, Any]], lines: dict[str, tuple[Line, Line]]
) -> dict[str, float]:
    found = {}
    for pair, scores in pairs.items():
        numbers = {role: _number(signal, scores[role], texts[pair]) for role in MODELS}
        residuals = []
        for role, number in numbers.items():
            if number is not None:
                (place, place_slope), (scale, scale_slope) = lines[role]
                value, covariate = number
                residuals.append((value - place - place_slope * covariate) / (scale + scale_slope * covariate))
        if len(residuals) == len(MODELS):
            found[pair] = sum(residuals) / len(MODELS)
    return found


def _cut(batch: list[float], planted: list[float], limit: float, most_false: float) -> list[float]:
    """cut, missed, defect_share, dropped and false_share, by a loop over every planted value from the top."""
    ordered, n = sorted(planted), len(planted)
    finite = [value for value in ordered if math.isfinite(value)]

    def below(values: list[float], t: float) -> float:
        return sum(value <= t for value in values) / len(values)

    quantiles = [min(ordered[math.ceil(q * n - 1e-9) - 1], finite[-1]) for q in (0.3, 0.5, 0.7, 0.9)]
    share = min(1.0, *(below(batch, t) / below(planted, t) for t in quantiles))
    best: list[float] | None = None
    for k, value in enumerate(finite, start=1):
        if (n - k + 1) / (n + 1) > max(limit, (n - len(finite) + 1) / (n + 1)) + 1e-12:
            continue
        missed = (sum(one > value for one in ordered) + 1) / (n + 1)
        dropped = below(batch, value)
        false = 1.0 if dropped == 1 else min(1.0, share * missed / (1 - dropped))
        found = [value, missed, share, dropped, false]
        if false <= most_false:
            return found
        best = found if best is None or false < best[4] else best
    assert best is not None
    return best


def _is_possible(signal: str, text: dict[str, Any]) -> bool:
    if signal == "unclosed":
        return _is_unclosed(text["answer"])
    if signal != "echo":
        return True
    query, answer = (_sequences(text[one], text["query"]) for one in ("query", "answer"))
    both = len(query & answer)
    return bool(query and answer) and both / len(query) >= 0.9 and both / len(answer) >= 0.5


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _sequences(text: str, query: str) -> set[tuple[str, ...]]:
    """The sequences of 4 words, or the words where the query has fewer than 4; all words of a shorter text."""
    words, size = _words(text), 4 if len(_words(query)) >= 4 else 1
    return {tuple(words[at : at + size]) for at in range(max(1, len(words) - size + 1))} if words else set()


def _is_unclosed(answer: str) -> bool:
    opened: list[str] = []
    for character in re.findall(r"```|[()\[\]{}]", answer):
        if character in "([{":
            opened.append(character)
        elif character != "```" and opened and opened[-1] + character in ("()", "[]", "{}"):
            opened.pop()
    return bool(opened) or answer.count("```") % 2 == 1


def _check_pair(
    row: dict[str, Any],
    pair: str,
    evidence: dict[str, dict[str, float]],
    cuts: dict[str, dict[str, Any]],
    texts: dict[str, dict[str, Any]],
    settings: Settings,
) -> None:
    """Assert the evidence of every signal and the first that declares the pair invalid."""
    first = None
    for signal in row["signals"]:
        name, cut = signal["signal"], cuts[signal["signal"]]["cut"]
        if name not in evidence:
            continue
        value = evidence[name].get(pair)
        assert signal["evidence"] == (None if value is None else pytest.approx(value, abs=1e-6))
        is_raised = value is not None and _is_possible(name, texts[pair]) and signal["evidence"] <= cut
        assert signal["is_raised"] == is_raised
        if is_raised and getattr(settings.validity, name) == "drop" and first is None:
            first = name
    assert row["invalid_by"] == first


def _check_sentences(
    storage: Storage,
    batch: str,
    cuts: dict[str, dict[str, Any]],
    validity: dict[str, dict[str, Any]],
    pairs: Rows,
    texts: dict[str, dict[str, Any]],
) -> int:
    """Assert the numbers of the explanation of every invalid pair."""
    checked = 0
    for row in _read(storage, "decisions", batch):
        if not row["reason"].startswith("invalid_"):
            continue
        pair, signal = row["pair_id"], row["reason"].removeprefix("invalid_")
        assert validity[pair]["invalid_by"] == signal
        if signal == "unclosed":
            share = -cuts[signal]["spreads"][0]["place"]
            assert _is_unclosed(texts[pair]["answer"])
            assert f"is left open, as in {share:.0%} of the planted cut answers" in row["explanation"]
            checked += 1
            continue
        said = _NUMBERS.search(row["explanation"])
        assert said is not None, row["explanation"]
        numbers = {role: _number(signal, pairs[pair][role], texts[pair]) for role in MODELS}
        sign = 1 if signal == "mismatch" else -1
        spreads = {one["model"]: one for one in cuts[signal]["spreads"]}
        own, means = [], []
        for role, number in numbers.items():
            assert number is not None
            own.append(sign * number[0])
            means.append(sign * (spreads[role]["place"] + spreads[role]["place_slope"] * number[1]))
        (evidence,) = [one["evidence"] for one in validity[pair]["signals"] if one["signal"] == signal]
        expected = [*own, *means, evidence, cuts[signal]["cut"]]
        assert [float(one) for one in said.groups()[:-1]] == [pytest.approx(number, abs=6e-4) for number in expected]
        assert int(said[7]) == pytest.approx(100 * (1 - cuts[signal]["missed"]), abs=0.51)
        checked += 1
    return checked
