"""Measurements of stored tables for the asset checks: numbers, a verdict, and a sentence. Polars only.

Belongs here: each measurement and its verdict. Does not belong here: the limits (`config`), reading the tables
(`orchestration.checks`), numbers without a limit (`table_numbers`), and what stops a batch (`screening.gates`).

A number that cannot be computed is left out, and the sentence gives the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from qaq_pipeline.calibration import planting
from qaq_pipeline.config.settings import CheckSettings, RankingSettings
from qaq_pipeline.reports.table_numbers import count_by, spearman_of_ranks
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import CLEAN
from qaq_pipeline.schema.vocabularies import Decision, Defect, NullReason, Quantity, Statistic, Status

_LEAST_EVIDENCE = 100
"""Pairs, n m / (n + m). Batches drawn from the reference itself exceed the default limits of drift in 50 % of
cases with 50 pairs against 5,000, in 2 % with 100, and in 1.5 % with 200 against 200."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check of a table."""

    passed: bool
    sentence: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Floats and ints by name, and counts by reason."""


def rejected_rows(raw: pl.DataFrame, max_share: float | None) -> Finding:
    """Count the rows of RawData that cannot be read; without `max_share`, any share passes."""
    counts = {"rows": raw.height, "rejected": raw.filter(status=Status.REJECTED.value).height}
    if raw.is_empty():
        return Finding(False, "The delivery has no rows.", counts)
    return _at_most(max_share, "gates.max_rejected_share", counts, "rows cannot be read", raw["reason"])


def screened_rows(screened: pl.DataFrame, gate: str | None) -> Finding:
    """Count the rows by status, and check the gate before scoring; `gate` is its sentence if it failed."""
    statuses = {status: screened.filter(status=status.value).height for status in Status}
    counts = {"rows": screened.height} | {f"{status}_rows": number for status, number in statuses.items()}
    shares = {f"{status}_share": number / screened.height for status, number in statuses.items() if screened.height}
    accepted = f"{statuses[Status.ACCEPTED]} of {screened.height} rows will be scored"
    sentence = f"{accepted}." if gate is None else f"The batch is gated before scoring: {gate}."
    return Finding(gate is None, sentence, counts | shares)


def null_quantities(logprobs: Iterable[pl.DataFrame], max_share: float) -> Finding:
    """Count the wanted quantities that are null, by reason. Ends of truncated answers are left out.

    `truncated_answers` judges them.

    Args:
        logprobs: parts of Logprobs.
        max_share: of the wanted quantities.
    """
    judged_elsewhere = [NullReason.NOT_WANTED.value, NullReason.ANSWER_TRUNCATED.value]
    num_wanted, nulls = 0, [pl.Series(dtype=pl.String)]
    for part in logprobs:
        reasons = pl.concat([part[f"null_reason_{quantity}"] for quantity in Quantity])
        wanted = reasons.filter(~reasons.is_in(judged_elsewhere).fill_null(value=False))
        num_wanted += len(wanted)
        nulls.append(wanted.drop_nulls())
    found = pl.concat(nulls)
    counts = {"wanted": num_wanted, "null": len(found)}
    if not num_wanted:
        return Finding(True, "No pair was to be scored.", counts)
    return _at_most(max_share, "checks.max_null_logprob_share", counts, "wanted quantities are null", found)


def truncated_answers(logprobs: pl.DataFrame, max_share: float) -> Finding:
    """Count the answers of Logprobs that were truncated to the window."""
    counts = {"pairs": logprobs.height, "truncated": int(logprobs["is_truncated"].sum())}
    if logprobs.is_empty():
        return Finding(True, "No pair was to be scored.", counts)
    return _at_most(max_share, "checks.max_truncated_share", counts, "answers are truncated to scoring.max_tokens")


def _at_most(
    limit: float | None, setting: str, counts: Mapping[str, int], what: str, reasons: pl.Series | None = None
) -> Finding:
    """Check that the second count is at most this share of the first; without a limit, any share passes.

    Args:
        limit: of the share.
        setting: that contains the limit.
        counts: all, and those of which the share is limited, by name.
        what: the end of a sentence about the latter.
        reasons: of the latter, among nulls.
    """
    (_, whole), (name, part) = counts.items()
    share = part / whole
    said = "no limit" if limit is None else f"limit {limit:g}, {setting}"
    sentence = f"{part} of {whole} {what} (share {share:.4g}; {said})."
    by_reason = {} if reasons is None else count_by(reasons)
    if by_reason:
        sentence += f" {', '.join(f'{reason}: {number}' for reason, number in by_reason.items())}."
    numbers: dict[str, Any] = {**counts, f"{name}_share": share}
    if reasons is not None:
        numbers[f"{name}_by_reason"] = by_reason
    return Finding(limit is None or share <= limit, sentence, numbers)


def mean_rmi(scores: pl.DataFrame, min_mean: float) -> Finding:
    """Compute the mean RMI, its standard error s / sqrt(n) with s over n - 1, and the share of pairs with RMI < 0.

    A broken model, prompt or token boundary shows here first: answers unrelated to their queries have an RMI near 0.
    """
    rmi = scores["rmi"].drop_nulls()
    n = len(rmi)
    if n == 0:
        return Finding(False, f"None of {scores.height} pairs has an RMI: the mean is unknown.", {"scorable_pairs": 0})
    numbers: dict[str, float | int] = {
        "scorable_pairs": n,
        "mean_rmi": float(rmi.mean()),  # type: ignore[arg-type]
        "negative_share": int((rmi < 0).sum()) / n,
    }
    error = ""
    if n > 1:
        numbers["standard_error"] = float(rmi.std()) / math.sqrt(n)  # type: ignore[arg-type]
        error = f" ± {numbers['standard_error']:.3g}"
    return Finding(
        numbers["mean_rmi"] > min_mean,
        f"Mean RMI is {numbers['mean_rmi']:.3g}{error} nats/token over {n} pairs, expected above {min_mean:g} "
        f"(checks.min_mean_rmi); a share of {numbers['negative_share']:.4g} is below 0.",
        numbers,
    )


def filled_strata(disagreement: pl.DataFrame, ranking: RankingSettings) -> Finding:
    """Check that every model of DisagreementScores has the wanted strata, each with enough rows."""
    by_model = to_long(disagreement, "ranks")
    ranks = by_model.drop_nulls("stratum")
    unranked = sorted(set(by_model["model"]) - set(ranks["model"]))
    if unranked or ranks.is_empty():
        models = (
            ": there are no strata" if ranks.is_empty() else f" under the models {unranked}, so they have no strata"
        )
        return Finding(False, f"None of {disagreement.height} pairs is ranked{models}.", {"num_strata": 0})
    rows = ranks.group_by("model", "stratum").len()
    strata = rows.group_by("model").agg(num_strata=pl.len(), fewest=pl.col("len").min()).sort("model")
    num_strata, fewest = int(strata["num_strata"].min()), int(strata["fewest"].min())  # type: ignore[arg-type]
    wanted, least = ranking.num_strata, ranking.min_rows_per_stratum
    numbers = "; ".join(f"{model}: {number} with at least {few} rows each" for model, number, few in strata.iter_rows())
    return Finding(
        num_strata >= wanted and fewest >= least,
        f"Strata by model: {numbers}. Expected: {wanted} (ranking.num_strata), with at least {least} rows each "
        "(ranking.min_rows_per_stratum).",
        {"num_strata": num_strata, "fewest_rows_in_a_stratum": fewest},
    )


def rank_correlation(disagreement: pl.DataFrame, maximum: float) -> Finding:
    """Compute Spearman's correlation of the strong and weak model's ranks: near 1, their gap is mostly noise."""
    num_ranked, correlation = spearman_of_ranks(disagreement)
    numbers = {"pairs_ranked_by_both": num_ranked}
    if correlation is None:
        return Finding(
            False,
            f"The correlation of the models' ranks over {num_ranked} pairs is undefined: there are too few pairs, or "
            "all ranks are equal. It is not known if the second model adds information.",
            numbers,
        )
    return Finding(
        correlation < maximum,
        f"Spearman's correlation of the models' ranks is {correlation:.4g} over {num_ranked} pairs, expected below "
        f"{maximum:g} (checks.max_rank_correlation): above it, the second model adds little.",
        numbers | {"spearman": correlation},
    )


def drift(numbers: Mapping[str, float], evidence: float, limits: CheckSettings) -> Finding:
    """Check that a batch is close to the reference.

    Args:
        numbers: the statistics, as `psi_<quantity>_<model>` and `ks_…`.
        evidence: n m / (n + m), for n pairs of the batch and m of the reference; below 100 nothing is judged.
        limits: limits of the statistics.
    """
    if not numbers:
        return Finding(False, "No pair can be compared with the reference, so the drift is unknown.")
    if evidence < _LEAST_EVIDENCE:
        return Finding(
            True,
            f"Too few pairs to judge: n m / (n + m) is {evidence:.3g} for n pairs of the batch and m of the reference; "
            f"at least {_LEAST_EVIDENCE} is needed.",
            numbers,
        )
    maximum = {"psi": limits.max_psi, "ks": limits.max_ks}
    over = {name: value for name, value in sorted(numbers.items()) if value > maximum[name.partition("_")[0]]}
    said = ", ".join(f"{name} is {value:.3g}" for name, value in over.items())
    return Finding(
        not over,
        (f"The batch differs from the reference: {said}" if over else "The batch is similar to the reference")
        + f"; limits: PSI {limits.max_psi:g} (checks.max_psi), KS {limits.max_ks:g} (checks.max_ks).",
        numbers,
    )


def discrimination(calibration: pl.DataFrame, min_auc: float, enough: int = planting.ENOUGH) -> Finding:
    """Check by AUROC that every model's RMI separates the batch's pairs from mismatched ones.

    Args:
        calibration: Calibration of the batch.
        min_auc: the lowest AUROC that passes.
        enough: the fewest planted rows that are judged.
    """
    of_rmi = calibration.filter(statistic=Statistic.AUROC.value, measure="rmi")
    known = of_rmi.drop_nulls("value")
    numbers = {
        f"auroc_{defect}_{model}": auc for defect, model, auc in known.select("defect", "model", "value").iter_rows()
    }
    is_mismatch = pl.col("defect") == Defect.OTHER_ANSWER.value
    kept = calibration.filter(pl.col("statistic") == Statistic.KEPT_SHARE.value, is_mismatch)
    num_planted = max(kept["num_planted"], default=0)  # Scored or not: the same in every selection.
    if num_planted < enough:
        return Finding(
            False,
            f"Too few rows were planted to judge: {num_planted} with {Defect.OTHER_ANSWER}; {enough} are needed.",
            numbers,
        )
    mismatches = known.filter(is_mismatch, pl.col("num_planted") >= enough)
    unjudged = sorted(set(of_rmi["model"]) - set(mismatches["model"]))
    unknown = f"Not judged: {' and '.join(unjudged)}, with fewer than {enough} scored rows of {Defect.OTHER_ANSWER}. "
    said = ", ".join(
        f"{model} {auc:.3f} [{lower:.3f}, {upper:.3f}]"
        for model, auc, lower, upper in mismatches.select("model", "value", "lower", "upper").iter_rows()
    )
    blind = sorted(mismatches.filter(pl.col("value") < min_auc)["model"])
    verdict = f"RMI cannot tell good from bad on this batch under {' and '.join(blind)}: do not trust its selection. "
    return Finding(
        not blind and not unjudged,
        (verdict if blind else "")
        + (unknown if unjudged else "")
        + "AUROC of matched pairs against mismatched ones (the same query with another row's answer): "
        f"{said or 'unknown'}; expected at least {min_auc:g} (checks.min_auc).",
        numbers,
    )


def of_calibration(calibration: pl.DataFrame, published: str, limits: CheckSettings) -> list[Finding]:
    """Judge what the published selection keeps of planted rows, then whether the models can tell them."""
    return [
        kept_defects(calibration, published, limits.max_kept_share),
        discrimination(calibration, limits.min_auc),
    ]


def kept_defects(calibration: pl.DataFrame, published: str, max_share: float, enough: int = planting.ENOUGH) -> Finding:
    """Check that the published selection keeps few of the planted rows of every defect.

    A wrong token of code is not judged: it is the negative control.

    Args:
        calibration: Calibration of the batch.
        published: name of the published selection.
        max_share: the largest kept share that passes.
        enough: the fewest planted rows of a defect that are judged.
    """
    kept = calibration.filter(statistic=Statistic.KEPT_SHARE.value, measure=published)
    numbers = {
        f"kept_share_{defect}": value
        for defect, value in kept.drop_nulls("value").select("defect", "value").iter_rows()
    }
    of_defects = kept.filter(~pl.col("defect").is_in([CLEAN, Defect.ONE_TOKEN_BUG.value]))
    few = of_defects.filter(pl.col("num_planted") < enough)
    judged = of_defects.filter(pl.col("num_planted") >= enough)
    over = judged.filter(pl.col("value") > max_share).sort("value", descending=True)
    limit = f"limit {max_share:g}, checks.max_kept_share"
    unjudged = ", ".join(f"{number} of {defect}" for defect, number in few.select("defect", "num_planted").iter_rows())
    said = ", ".join(f"{value:.1%} of {defect}" for defect, value in over.select("defect", "value").iter_rows())
    if judged.is_empty():
        sentence = f"Too few rows were planted to judge the selection {published}; {enough} of a defect are needed."
        return Finding(False, sentence, numbers)
    most = judged.sort("value")["value"][-1]
    verdict = (
        f"keeps too many planted rows: {said}"
        if said
        else f"keeps at most {most:.1%} of the planted rows of each judged defect"
    )
    verdict = f"The selection {published} {verdict} ({limit})."
    too_few = f" Too few planted rows to judge, {enough} are needed: {unjudged}." if unjudged else ""
    return Finding(over.is_empty() and few.is_empty(), verdict + too_few, numbers)


def decided_rows(num_rows: int, decisions: pl.DataFrame) -> Finding:
    """Check that Decisions has exactly one decision per row of RawData, and compute the selected share."""
    counts = {
        "rows": num_rows,
        "decided_rows": decisions.select(ROW_KEY).n_unique(),
        "decisions": decisions.height,
        "selected": decisions.filter(decision=Decision.SELECTED.value).height,
    }
    share = {"selected_share": counts["selected"] / num_rows} if num_rows else {}
    return Finding(
        num_rows == counts["decided_rows"] == decisions.height,
        f"{num_rows} rows; {decisions.height} decisions for {counts['decided_rows']} rows, {counts['selected']} of "
        "them selected.",
        counts | share,
    )


def ungated(gate: str | None) -> Finding:
    """Check that a batch passed all gates; `gate` is the sentence of the one that failed."""
    return Finding(gate is None, "All gates are passed." if gate is None else f"The batch is gated: {gate}.")


def same_models(models: Mapping[str, Mapping[str, Any]], manifest: Mapping[str, Any] | None) -> Finding:
    """Check that a batch was scored by the models of the newest published version.

    A hub model without `revision` follows its main branch, so it can change.

    Args:
        models: ScoreIdentities by role.
        manifest: of the newest version; None if nothing is published yet.
    """
    if manifest is None:
        return Finding(True, "No version is published yet.", {"batches_of_other_models": 0})
    differing: dict[str, list[str]] = {}
    for entry in manifest["batches"]:
        for role, identity in sorted(models.items()):
            if changed := _differing_fields(entry["models"].get(role, {}), identity):
                differing.setdefault(f"{role}, {changed}", []).append(entry["batch"])
    batches = {batch for names in differing.values() for batch in names}
    if not differing:
        number = len(manifest["batches"])
        sentence = f"All {number} batches of the newest published version were scored by the same models."
    else:
        said = ". ".join(f"{what}: {', '.join(names)}" for what, names in differing.items())
        sentence = f"Some batches of the newest published version were scored by different models. {said}."
    return Finding(not differing, sentence, {"batches_of_other_models": len(batches)})


def _differing_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}
    return "; ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())


def left_out(registered: Mapping[str, str | None]) -> Finding:
    """Check that every registered batch is in a version; `registered` gives the reason why one is not, else None."""
    missing = {batch: reason for batch, reason in sorted(registered.items()) if reason is not None}
    numbers = {"registered_batches": len(registered), "batches_left_out": len(missing)}
    said = ". ".join(f"{batch}: {reason}" for batch, reason in missing.items())
    sentence = (
        f"{len(missing)} of {len(registered)} registered batches are left out. {said}."
        if missing
        else f"All {len(registered)} registered batches are in the version."
    )
    return Finding(not missing, sentence, numbers)


def matching_files(expected: Mapping[str, str], found: Mapping[str, str | None], num_bytes: int) -> Finding:
    """Check the files of a version against the sha256 of its manifest; None in `found`: the file is missing."""
    faults = {
        name: "missing" if found[name] is None else "changed"
        for name, sha256 in sorted(expected.items())
        if found[name] != sha256
    }
    numbers = {"files": len(expected), "differing_files": len(faults), "bytes": num_bytes}
    said = "; ".join(f"{name} is {what}" for name, what in faults.items())
    return Finding(
        not faults,
        f"{said}: remove the version's folder and publish again."
        if faults
        else f"All {len(expected)} files match the manifest.",
        numbers,
    )
