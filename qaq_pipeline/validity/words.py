"""The reason why a pair is not valid, and what the cuts of a batch tell, as sentences for people.

Belongs here: the words. Does not belong here: the evidence and the cuts (`judgement`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import polars as pl

from qaq_pipeline.schema.vocabularies import NoCutReason, Signal
from qaq_pipeline.validity.judgement import MODELS, of_signal, spreads_of
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline.validity.signals.signal import Definition

WHY = "why_invalid"

_MOST_UNEXPLAINED = 0.05
"""Share of the pairs that a signal may find, beyond those that look like its planted rows, without a warning."""

_WHY_NO_CUT = {
    NoCutReason.TURNED_OFF: "it is turned off",
    NoCutReason.NOT_PLANTED: "no row with its defect was planted (calibration.defects)",
    NoCutReason.NOT_SCORED: "no pair has its score under both models",
    NoCutReason.TOO_FEW_PLANTED: "too few planted rows have its score",
    NoCutReason.CANNOT_TELL: "it does not tell pairs from planted ones",
}


def reasons(pairs: pl.DataFrame, validity: pl.DataFrame, cuts: pl.DataFrame) -> pl.DataFrame:
    """pair_id and `why_invalid` of each invalid pair, with the numbers that decide.

    Args:
        pairs: of `judgement.judged_pairs`.
        validity: Validity of the same pairs.
        cuts: the ValidityCuts that decided.
    """
    found: dict[str, list[str]] = {"pair_id": [], WHY: []}
    by_signal = {row["signal"]: row for row in cuts.iter_rows(named=True)}
    for one in SIGNALS:
        invalid = validity.filter(pl.col("invalid_by") == one.signal.value)
        if invalid.is_empty():
            continue
        evidence = dict(of_signal(invalid, one.signal).select("pair_id", "evidence").iter_rows())
        for pair_id, numbers in measured(one, pairs, by_signal[one.signal.value], evidence).items():
            found["pair_id"].append(pair_id)
            found[WHY].append(f"{one.fault[0].upper()}{one.fault[1:]} (signal {one.signal}). {numbers}")
    return pl.DataFrame(found, schema={"pair_id": pl.String, WHY: pl.String})


def measured(
    one: Definition, pairs: pl.DataFrame, cut: Mapping[str, Any], evidence: Mapping[str, float]
) -> dict[str, str]:
    """The numbers by which a signal judges pairs, as a sentence without a full stop, by pair.

    Args:
        one: the signal.
        pairs: of `judgement.judged_pairs`.
        cut: its row of ValidityCuts.
        evidence: of each wanted pair.
    """
    values = _values(one, pairs, cut, pl.Series(list(evidence), dtype=pl.String))
    return {pair_id: _numbers(one, values[pair_id], evidence[pair_id], cut) for pair_id in evidence}


def _values(
    one: Definition, pairs: pl.DataFrame, cut: Mapping[str, Any], wanted: pl.Series
) -> dict[str, dict[str, tuple[float, float]]]:
    """The number of each pair, and the mean of the planted rows beside it, by pair and model."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    spreads = spreads_of(cut["spreads"])
    rows = pairs.filter(pl.col("pair_id").is_in(wanted.implode()))
    for role in MODELS:
        of_model = rows.filter(pl.col("model") == role)
        numbers = of_model.select("pair_id", value=one.value, covariate=one.covariate.cast(pl.Float64))
        means = spreads[role].place.at(numbers["covariate"].to_numpy())
        for (pair_id, value, _), mean in zip(numbers.iter_rows(), means, strict=True):
            found.setdefault(pair_id, {})[role] = (one.sign * value, one.sign * float(mean))
    return found


def _numbers(
    one: Definition, values: Mapping[str, tuple[float, float]], evidence: float, cut: Mapping[str, Any]
) -> str:
    if one.of_text is not None:
        is_found, mean = values[MODELS[0]]  # Both models see the same text.
        is_so, is_not = one.of_text
        of_planted = f"in {mean:.0%} of the planted {one.compared_with}"
        return f"Here {is_so}, as {of_planted}" if is_found else f"Here {is_not}; one is {of_planted}"
    own = " and ".join(f"{_number(values[role][0])} under the {role} model" for role in MODELS)
    means = " and ".join(_number(values[role][1]) for role in MODELS)
    return (
        f"Here {one.measure} is {own}; {one.compared_with} have {means} on average. In mean deviations from these, "
        f"the pair is at {_number(evidence)}. The signal is raised at or below {_number(cut['cut'])}, where "
        f"{1 - cut['missed']:.0%} of these are expected"
    )


def _number(value: float) -> str:
    """The number with three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def of_cuts(cuts: pl.DataFrame) -> list[str]:
    """A sentence about each signal that is not turned off: its cut and what it costs, or why there is none."""
    said = []
    for row in cuts.iter_rows(named=True):
        if row["null_reason"] == NoCutReason.TURNED_OFF.value:
            continue
        if row["cut"] is None:
            why = _WHY_NO_CUT[NoCutReason(row["null_reason"])]
            said.append(f"{row['signal']} (rows of {', '.join(row['chosen_from'])}): declares nothing, because {why}")
        else:
            said.append(_of_cut(row))
    return said


def _of_cut(row: Mapping[str, Any]) -> str:
    share = f"{row['defect_share']:.1%} (at most {row['defect_share_upper']:.1%})"
    return (
        f"{row['signal']} (cut from {', '.join(row['chosen_from'])}): {row['dropped']:.1%} of the pairs are at or "
        f"below the cut. An estimated {share} have the defect; up to {row['missed']:.0%} of these are above the cut, "
        f"where they are {row['false_share']:.1%} of the pairs"
    )


def warnings(cuts: pl.DataFrame) -> list[str]:
    """What a reader must know first: the signals that could not tell anything, as sentences."""
    others = cuts.filter(_cannot_tell(), pl.col("signal") != Signal.MISMATCH.value)
    first = [untold(cuts)] if is_untold(cuts) else []
    return (
        first
        + [
            f"the signal {row['signal']} does not tell the pairs of {_source(row)} from planted ones, so it declares "
            "none invalid"
            for row in others.iter_rows(named=True)
        ]
        + [_too_many(row) for row in cuts.iter_rows(named=True) if _drops_too_many(row)]
    )


def _drops_too_many(cut: Mapping[str, Any]) -> bool:
    return cut["cut"] is not None and cut["dropped"] > cut["defect_share_upper"] + _MOST_UNEXPLAINED


def _too_many(cut: Mapping[str, Any]) -> str:
    return (
        f"the signal {cut['signal']} finds {cut['dropped']:.1%} of the pairs, but at most "
        f"{cut['defect_share_upper']:.1%} look like its planted rows; the others have another defect, or are good: "
        "read some of them on the page of the calibration, and set the signal to `flag` if they are good"
    )


def is_untold(cuts: pl.DataFrame) -> bool:
    """Whether RMI tells nothing about the batches from which the cuts were chosen."""
    return not cuts.filter(_cannot_tell(), signal=Signal.MISMATCH.value).is_empty()


def untold(cuts: pl.DataFrame) -> str:
    """The sentence for people where `is_untold`. It names the batches that RMI tells nothing about.

    They are others than the judged one where it has the cuts of an older batch or of a reference.
    """
    of = _source(cuts.row(by_predicate=pl.col("signal") == Signal.MISMATCH.value, named=True))
    return (
        f"RMI does not tell the pairs of {of} from the same queries with answers to other queries, so it declares none "
        f"invalid; either the models cannot judge such data, or hardly a pair of {of} is valid"
    )


def _cannot_tell() -> pl.Expr:
    return pl.col("null_reason") == NoCutReason.CANNOT_TELL.value


def _source(cut: Mapping[str, Any]) -> str:
    """The batches whose rows a signal was compared with."""
    batches = cut["chosen_from"]
    return f"{'batch' if len(batches) == 1 else 'the batches'} {', '.join(batches)}"
