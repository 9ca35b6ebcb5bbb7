"""The decision about a row as sentences.

Belongs here: the words. Does not belong here: the decision (`decisions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from posixpath import commonprefix
from typing import Any

from qaq_pipeline.config.selections import (
    Budget,
    IfdSelection,
    PplSelection,
    RandomSelection,
    RmiBandSelection,
    Selection,
)
from qaq_pipeline.schema import vocabularies
from qaq_pipeline.schema.vocabularies import Decision, DuplicateReason, NullReason, SelectionReason
from qaq_pipeline.selection import rank_reference

# --- words ------------------------------------------------------------------------------------------------------

_GAP = "the rank under the strong model less that under the weak one"

_MEASURES = {
    "diff_high": f"the gap, {_GAP}",
    "diff_low": f"the gap, {_GAP}",
    "sum_high": "the sum of the two models' ranks",
    "sum_low": "the sum of the two models' ranks",
    "rmi_top": "the rank under the {model} model",
    "length": "the answer's length in tokens of the {model} model",
    "random": "a random draw in [0, 1)",
    "stratified_random": "the place in a random draw inside every stratum of query perplexity",
    "ifd_ppl": "IFD, the {model} model's perplexity of the answer after the query over that of the answer alone",
    "ifd_loss": "IFD, the {model} model's log perplexity of the answer after the query over that of the answer alone",
    "log_ppl_q": "the {model} model's log perplexity of the query in nats per token",
    "log_ppl_q_given_a": "the {model} model's log perplexity of the query after the answer in nats per token",
    "log_ppl_a": "the {model} model's log perplexity of the answer in nats per token",
    "log_ppl_a_given_q": "the {model} model's log perplexity of the answer after the query in nats per token",
}
"""What a selection orders by, by its measure or else its strategy."""

_WHY_NULL = {
    NullReason.NOT_WANTED: "the settings (scoring.quantities) do not ask for the score",
    NullReason.QUERY_TOO_LONG: "the query alone does not fit into the window (scoring.max_tokens), and none is cut",
    NullReason.PAIR_TOO_LONG: "query and answer do not fit into the window (scoring.max_tokens), and scoring.too_long "
    "leaves such pairs unscored",
    NullReason.NO_TOKENS_TO_SCORE: "there is no token to score",
    NullReason.NON_FINITE: "the model gave no finite number",
    NullReason.OUT_OF_MEMORY: "it did not fit into memory, even alone",
    NullReason.TOO_FEW_QUERY_TOKENS: "its query has fewer tokens than eligibility.min_query_tokens",
}


def explain(row: Mapping[str, Any], published: Selection) -> str:
    """The decision of a row as sentences for a reader who knows no code.

    Args:
        row: the columns of Decisions, the `detail` of RawData, the pool_id, and the published verdict's columns as
            `verdict_<column>`.
        published: the selection that decides.
    """
    decision = Decision(row["decision"])
    if decision is Decision.REJECTED:
        return f"Rejected when it was read, and never scored: {_sentence(row['detail'])}"
    if decision is Decision.WITHDRAWN:
        return f"Withdrawn, so it is not published any more: {_sentence(row['evidence'])}"
    if decision is Decision.CONTAMINATED:
        return f"Contaminated, and not scored: it holds {_sentence(row['evidence'])}"
    if decision is Decision.DUPLICATE:
        return _duplicate(row)
    flag = f" Flagged, and kept all the same: it holds {_sentence(row['evidence'])}" if row["evidence"] else ""
    if decision is Decision.UNSCORABLE:
        return f"Not scorable: {_why_unscorable(row)}. So {published.name} cannot place it, nor take it.{flag}"
    return " ".join([_ranks(row), *_cautions(row), _verdict(row, published)]) + flag


def explain_in_version(
    row: Mapping[str, Any] | None, *, has_batch: bool, left_out: str | None, was_in: int | None, told: str | None
) -> str:
    """What a published version says of a row, as one line.

    Args:
        row: decision, reason and, since versions have it, explanation; None: the version has no such row.
        has_batch: whether the row's batch is in the version.
        left_out: why it is not, where that is recorded.
        was_in: the number of the version before, where that one had the row in its selection.
        told: an explanation that the reader has just read, and need not read again.
    """
    dropped = "" if was_in is None else f"dropped, had been in version {was_in}: "
    if row is None:
        absent = "its batch was not in it" + ("" if left_out is None else f": {left_out}")
        return dropped + ("no such row had been delivered" if has_batch else absent)
    is_in = row["decision"] == Decision.SELECTED.value
    fate = "in it: " if is_in else dropped or "not in it: "
    why = row.get("explanation") or f"{row['decision']} ({row['reason']}); older versions hold no sentence"
    return fate + _news(why, told or "")


def _news(why: str, told: str) -> str:
    """What a sentence says that was not just told: the sentences with which both begin are not told twice."""
    if why == told:
        return "as above"
    start = commonprefix([why, told]).rfind(". ") + 1
    return f"as above, but:{why[start:]}" if start else why


def _sentence(text: str) -> str:
    """With one full stop at its end."""
    return text.rstrip(" .") + "."


def _duplicate(row: Mapping[str, Any]) -> str:
    is_exact = row["reason"] == DuplicateReason.EXACT_DUPLICATE.value
    alike = "Equal to" if is_exact else f"Near (similarity {row['similarity']:.3f}, where 1 is equal) to"
    return f"Duplicate. {alike} {row['duplicate_of']}, which stands for it: {_sentence(row['evidence'])}"


def _why_unscorable(row: Mapping[str, Any]) -> str:
    models = _models_by({score["model"]: score["null_reason"] for score in row["scores"] if score["null_reason"]})
    return "; ".join(f"under {of}, {_WHY_NULL[NullReason(why)]}" for why, of in models.items())


def _models_by(said: Mapping[str, Any]) -> dict[Any, str]:
    """By what is said of them: the strong model, or the strong model and the weak model."""
    return {
        what: " and ".join(f"the {model} model" for model in said if said[model] == what)
        for what in dict.fromkeys(said.values())
    }


def _ranks(row: Mapping[str, Any]) -> str:
    ranks = [_rank(score) for score in row["scores"] if score["rank"] is not None]
    if not ranks:
        return "No model ranks it by RMI."
    unranked = [f"the {score['model']} model does not rank it" for score in row["scores"] if score["rank"] is None]
    return (
        "Ranked by RMI, how much the answer helps to predict the query, from 0 to 1 among pairs of like query "
        f"perplexity{_of_reference(row)}: {', '.join([*ranks, *unranked])}."
    )


def _rank(score: Mapping[str, Any]) -> str:
    stratum, num_strata = score["stratum"], score["num_strata"]
    where = "the only stratum" if num_strata == 1 else f"the {_ordinal(stratum)} of {num_strata} strata"
    return f"the {score['model']} model ranks it {score['rank']:.3f} in {where}"


def _ordinal(number: int) -> str:
    is_teen = number % 100 in (11, 12, 13)
    return f"{number}{'th' if is_teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def _of_reference(row: Mapping[str, Any]) -> str:
    """Words for whose pairs those are, where they are not the batch's own."""
    name = rank_reference.name_in(row["pool_id"])
    return "" if name is None else f" of the reference {name}"


def _cautions(row: Mapping[str, Any]) -> list[str]:
    cut = {
        score["model"]: (score["num_a_tokens"], score["num_a_tokens_untruncated"])
        for score in row["scores"]
        if score["is_truncated"]
    }
    short = {score["model"]: score["num_q_tokens"] for score in row["scores"] if score["is_short_query"]}
    return [
        f"The answer has {whole} tokens, of which only the first {kept} were read by {models}."
        for (kept, whole), models in _models_by(cut).items()
    ] + [
        f"The query has only {tokens} tokens for {models}, which makes scores noisy."
        for tokens, models in _models_by(short).items()
    ]


def _verdict(row: Mapping[str, Any], published: Selection) -> str:
    reason = SelectionReason(row["verdict_reason"])
    fate = "Selected" if reason in vocabularies.SELECTED_REASONS else "Not selected"
    return f"{fate} by {published.name}, which takes {_grounds(row, published, reason)}."


def _grounds(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    """What the selection takes, and where this pair stands."""
    if isinstance(published, RmiBandSelection):
        low, high = published.band
        rank = f"it ranks this one {_beside(row['verdict_score'], low, high)}"
        return f"what the {published.model} model ranks above {low:g} and up to {high:g}: {rank}"
    if reason is SelectionReason.GAP_BELOW_MINIMUM:
        least = getattr(published, "min_gap", None)
        return f"only pairs whose gap, {_GAP}, is above {least:g}: this one's is {_beside(row['gap'], least)}"
    if reason is SelectionReason.RANK_STRONG_OUT_OF_RANGE:
        low, high = getattr(published, "rank_strong", None) or (0, 1)
        rank = next(score["rank"] for score in row["scores"] if score["model"] == "strong")
        own = _beside(rank, low, high)
        return f"only pairs that the strong model ranks above {low:g} and up to {high:g}: it ranks this one {own}"
    if reason is SelectionReason.RMI_STRONG_OUT_OF_RANGE:
        low, high = getattr(published, "rmi_strong", None) or (None, None)
        rmi = next(score["rmi"] for score in row["scores"] if score["model"] == "strong")
        ends = [*([] if low is None else [f"above {low:g}"]), *([] if high is None else [f"up to {high:g}"])]
        return (
            f"only pairs whose RMI under the strong model is {' and '.join(ends)} nats/token: this one's is "
            f"{_beside(rmi, low, high)}"
        )
    if reason is SelectionReason.IFD_ABOVE_MAXIMUM:
        most = getattr(published, "maximum", None)
        own = _beside(row["verdict_score"], most)
        return f"no pair above {most:g} by {_measure(published)}: this one has {own}"
    return f"{_budget(row, published)} by {_measure(published)}: {_place(row, published, reason)}"


def _budget(row: Mapping[str, Any], published: Selection) -> str:
    budget: Budget = getattr(published, "budget")  # noqa: B009
    of = "of the pool" if isinstance(published, RandomSelection) else f"of the pool{_of_reference(row)}"
    end = "lowest" if _is_ascending(published) else "highest"
    if budget.fraction is not None:
        return f"the {end} {(Decimal(str(budget.fraction)) * 100).normalize():f}% {of}"
    if budget.count is not None:
        return f"the {end} {budget.count:,} {of}"
    return f"the {end} {of} whose answers have {budget.answer_tokens:,} tokens in all"


def _is_ascending(published: Selection) -> bool:
    if isinstance(published, PplSelection):
        return published.order == "low"
    return isinstance(published, RandomSelection) or published.strategy in ("diff_low", "sum_low")


def _place(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    """The pair's value, its place, and the value of the last pair taken, told apart where they differ."""
    value, cut = row["verdict_score"], row["verdict_cut"]
    own, last = (f"{value:.0f}", f"{cut:.0f}") if _counts(published) and cut is not None else _apart(value, cut)
    of = f"{row['verdict_pool_size']}"
    if limits := _limits(published):
        of = f"those that pass {limits}, in a pool of {of}"
    place = f"this one, with {own}, is number {row['verdict_position']} of {of}; "
    if cut is None:
        return place + ("nothing was taken" if reason is SelectionReason.BELOW_CUT else "all that could be taken were")
    of_reference = "" if isinstance(published, RandomSelection) else _of_reference(row)
    is_tie = reason is SelectionReason.BELOW_CUT and value == cut
    tie = " too, and a smaller pair_id, which goes first among equals" if is_tie else ""
    return f"{place}the last pair taken{of_reference} has {last}{tie}"


def _limits(published: Selection) -> str:
    """The settings that keep pairs of the pool from being taken, whatever their place."""
    names = ("min_gap", "rank_strong", "rmi_strong", "maximum")
    return " and ".join(name for name in names if getattr(published, name, None) is not None)


def _counts(published: Selection) -> bool:
    return published.strategy == "length"


def _apart(value: float, cut: float | None) -> tuple[str, str]:
    """Both numbers, with as many decimals as it takes to tell them apart, from 3."""
    if cut is None:
        return _number(value), ""
    decimals = next((n for n in range(3, 16) if value == cut or f"{value:.{n}f}" != f"{cut:.{n}f}"), 15)
    decimals = 3 if value == cut else decimals
    return _number(value, decimals), _number(cut, decimals)


def _beside(value: float, *bounds: float | None) -> str:
    """The number, with as many decimals as it takes to tell it from the bounds that it is not equal to."""
    return max((_apart(value, bound)[0] for bound in bounds if bound is not None), key=len, default=_number(value))


def _number(value: float, decimals: int = 3) -> str:
    """No minus before a zero."""
    return f"{value:.{decimals}f}" if round(value, decimals) else f"{0:.{decimals}f}"


def _measure(published: Selection) -> str:
    of = published.measure if isinstance(published, IfdSelection | PplSelection) else published.strategy
    return _MEASURES[of].format(model=getattr(published, "model", "strong"))
