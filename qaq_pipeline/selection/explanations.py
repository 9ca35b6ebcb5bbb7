"""The decision about a row as sentences for a reader who knows no code.

Belongs here: the words. Does not belong here: the decision itself (`decisions`).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from posixpath import commonprefix
from typing import Any

from qaq_pipeline.config.conditions import NO_VALUE, Condition, Quotas
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

_GAP = "gap (rank under the strong model minus rank under the weak model)"

_MEASURES = {
    "diff_high": ("gap", _GAP),
    "diff_low": ("gap", _GAP),
    "sum_high": ("sum", "sum of the ranks under both models"),
    "sum_low": ("sum", "sum of the ranks under both models"),
    "rmi_top": ("rank", "rank under the {model} model"),
    "rmi_band": ("rank", "rank under the {model} model"),
    "length": ("answer length", "answer length in tokens of the {model} model"),
    "random": ("random number", "random number between 0 and 1"),
    "stratified_random": (
        "place",
        "place in a random order of the stratum of query perplexity (below 1: in the share of the stratum)",
    ),
    "ifd_ppl": (
        "IFD",
        "IFD (the {model} model's perplexity of the answer after the query, divided by that of the answer alone)",
    ),
    "ifd_loss": (
        "IFD",
        "IFD (the {model} model's log perplexity of the answer after the query, divided by that of the answer alone)",
    ),
    "log_ppl_q": ("log perplexity", "log perplexity of the query under the {model} model, in nats per token"),
    "log_ppl_q_given_a": (
        "log perplexity",
        "log perplexity of the query after the answer under the {model} model, in nats per token",
    ),
    "log_ppl_a": ("log perplexity", "log perplexity of the answer under the {model} model, in nats per token"),
    "log_ppl_a_given_q": (
        "log perplexity",
        "log perplexity of the answer after the query under the {model} model, in nats per token",
    ),
}
"""The score that a selection orders by, in a word and in full, by its measure or else its strategy."""

_MOST_CHARACTERS = 80
"""Characters of a value of a column that a sentence shows."""

_NOT_SCORED = {
    Decision.WITHDRAWN: "Withdrawn, so it is not published:",
    Decision.CONTAMINATED: "Contaminated, and not scored: it contains",
    Decision.HELD_OUT: "Held out for training trials, and not scored:",
    Decision.BETWEEN: "Between: it is similar to rows that are trained on and to held-out rows, so it is in neither, "
    "and not scored:",
}
"""What comes before the evidence of a row that screening leaves out."""

_WHY_NULL = {
    NullReason.NOT_WANTED: "the settings (scoring.quantities) do not ask for the score",
    NullReason.QUERY_TOO_LONG: "the query alone exceeds the window (scoring.max_tokens), and no query is truncated",
    NullReason.PAIR_TOO_LONG: "query and answer exceed the window (scoring.max_tokens), and scoring.too_long leaves "
    "such pairs unscored",
    NullReason.NO_TOKENS_TO_SCORE: "there is no token to score",
    NullReason.TOKEN_BEYOND_EMBEDDING: "the text of the pair has a token that the model has no embedding for",
    NullReason.NON_FINITE: "a result is not a finite number",
    NullReason.ANSWER_TRUNCATED: "the answer was truncated, so its end is unknown",
    NullReason.NO_END_TOKEN: "no token ends a text or a turn",
    NullReason.OUT_OF_MEMORY: "the pair did not fit into memory, even alone",
    NullReason.WORKER_LOST: "three scoring processes ended over the pair",
    NullReason.TOO_FEW_QUERY_TOKENS: "the query has fewer tokens than eligibility.min_query_tokens",
}


def explain(row: Mapping[str, Any], published: Selection) -> str:
    """The decision about a row, its reason and the numbers behind it.

    Args:
        row: the columns of Decisions, the `detail` of RawData, the pool_id, `why_invalid` where pairs are judged, and
            the published verdict's columns as `verdict_<column>`.
        published: the selection that decides.
    """
    decision = Decision(row["decision"])
    if decision is Decision.REJECTED:
        return f"Rejected when it was read, and never scored: {_sentence(row['detail'])}"
    if decision is Decision.DUPLICATE:
        return _duplicate(row)
    if decision in _NOT_SCORED:
        return f"{_NOT_SCORED[decision]} {_sentence(row['evidence'])}"
    flag = f" Flagged but kept: it contains {_sentence(row['evidence'])}" if row["evidence"] else ""
    if decision is Decision.UNSCORABLE:
        return f'Not scorable: {_why_unscorable(row)}. So "{published.name}" can neither rank nor take the pair.{flag}'
    return " ".join([_ranks(row), *_cautions(row), _verdict(row, published)]) + flag


def explain_in_version(
    row: Mapping[str, Any] | None, *, has_batch: bool, left_out: str | None, was_in: int | None, told: str | None
) -> str:
    """The fate of a row in a published version, as one line.

    Args:
        row: decision and explanation; None: the version has no such row.
        has_batch: whether the version contains the row's batch.
        left_out: why it does not, where that is recorded.
        was_in: the number of the version before, where that one had the row in its selection.
        told: an explanation that the reader has just read, which is not repeated.
    """
    dropped = "" if was_in is None else f"dropped (it was in version {was_in}): "
    if row is None:
        absent = "the version does not contain its batch" + ("" if left_out is None else f": {left_out}")
        return dropped + ("the batch had no such row" if has_batch else absent)
    is_in = row["decision"] == Decision.SELECTED.value
    fate = "published" if is_in else dropped.removesuffix(": ") or "not published"
    return fate + _news(row["explanation"], told or "")


def _news(why: str, told: str) -> str:
    """The explanation without the sentences at its beginning that were just told."""
    if why == told:
        return ", for the same reason"
    start = commonprefix([why, told]).rfind(". ") + 1
    return f", as explained above, but:{why[start:]}" if start else f": {why}"


def _sentence(text: str) -> str:
    """The text with one full stop at its end."""
    return text.rstrip(" .") + "."


def _duplicate(row: Mapping[str, Any]) -> str:
    original, why = row["duplicate_of"], _sentence(row["evidence"])
    if row["reason"] == DuplicateReason.EXACT_DUPLICATE.value:
        return f"Duplicate of {original}, which represents it: {why}"
    similarity = f"similarity {row['similarity']:.3f}, where 1 is equal"
    return f"Near-duplicate of {original} ({similarity}), which represents it: {why}"


def _why_unscorable(row: Mapping[str, Any]) -> str:
    models = _models_by({score["model"]: score["null_reason"] for score in row["scores"] if score["null_reason"]})
    return "; ".join(f"under {of}, {_WHY_NULL[NullReason(why)]}" for why, of in models.items())


def _models_by(facts: Mapping[str, Any]) -> dict[Any, str]:
    """The models by their fact: the strong model, or the strong model and the weak model."""
    return {
        fact: " and ".join(f"the {model} model" for model in facts if facts[model] == fact)
        for fact in dict.fromkeys(facts.values())
    }


def _ranks(row: Mapping[str, Any]) -> str:
    if all(score["rank"] is None for score in row["scores"]):
        return "No model ranks the pair by RMI."
    return (
        "RMI measures how much the answer helps to predict the query. Among pairs of similar query perplexity (a "
        f"stratum){_of_reference(row)}, the rank grows with the RMI, up to 1 for the highest. This pair has "
        f"{' and '.join(map(_rank, row['scores']))}."
    )


def _rank(score: Mapping[str, Any]) -> str:
    if score["rank"] is None:
        return f"no rank under the {score['model']} model"
    where = "the only stratum" if score["num_strata"] == 1 else "stratum {stratum} of {num_strata}".format_map(score)
    return f"rank {score['rank']:.3f} under the {score['model']} model ({where})"


def _of_reference(row: Mapping[str, Any]) -> str:
    """The owner of those pairs, where it is not the batch."""
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
        f"Only the first {kept} of the answer's {whole} tokens were read by {models}."
        for (kept, whole), models in _models_by(cut).items()
    ] + [
        f"The query has only {_tokens(tokens)} for {models}, so the scores are noisy."
        for tokens, models in _models_by(short).items()
    ]


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _verdict(row: Mapping[str, Any], published: Selection) -> str:
    reason = SelectionReason(row["verdict_reason"])
    fate = "Selected" if reason in vocabularies.SELECTED_REASONS else "Not selected"
    return f'{fate} by "{published.name}", which takes {_grounds(row, published, reason)}.'


def _grounds(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    """What the selection takes, and the number of this pair that decides."""
    if reason in vocabularies.INVALID_REASONS.values():
        return f"valid pairs only. {row['why_invalid']}"
    if reason is SelectionReason.WHERE_NOT_MET:
        return _not_met(published.where[row["verdict_condition"]], row["verdict_value"])
    if reason in (SelectionReason.QUERY_FULL, SelectionReason.CLUSTER_FULL):
        return _beyond_cap(row, published, reason)
    if published.quotas is not None and row["verdict_position"] is not None:
        return _in_group(row, published, published.quotas)
    return _grounds_of_strategy(row, published, reason)


def _grounds_of_strategy(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    strong = next((score for score in row["scores"] if score["model"] == "strong"), {})
    score, limits = row["verdict_score"], published.model_dump()
    if isinstance(published, RmiBandSelection):
        return _within("pairs with a rank", published.band, f" under the {published.model} model", "rank", score)
    if reason is SelectionReason.GAP_BELOW_MINIMUM:
        return _within(f"only pairs with a {_GAP}", (limits["min_gap"], None), "", "gap", row["gap"])
    if reason is SelectionReason.RANK_STRONG_OUT_OF_RANGE:
        ends = limits["rank_strong"] or (0, 1)
        return _within("only pairs with a rank", ends, " under the strong model", "rank", strong["rank"])
    if reason is SelectionReason.RMI_STRONG_OUT_OF_RANGE:
        ends = limits["rmi_strong"] or (None, None)
        return _within("only pairs with an RMI", ends, " nats/token under the strong model", "RMI", strong["rmi"])
    if reason is SelectionReason.IFD_ABOVE_MAXIMUM:
        return _within(f"only pairs with an {_measure(published)[1]}", (None, limits["maximum"]), "", "IFD", score)
    return f"{_size(row, published, published.budget)}. {_place(row, published, reason)}"


def _not_met(condition: Condition, value: str | None) -> str:
    """A condition of `where`, and the value of a pair that does not meet it."""
    column = condition.column
    own = f"This pair has no {column}" if value is None else f"This pair's {column} is {shorten(value)}"
    if condition.is_present is not None:
        return f"only pairs {'with a value of' if condition.is_present else 'without'} {column}. {own}"
    return f"only pairs whose {column} is {_wanted(condition)}. {own}"


def _wanted(condition: Condition) -> str:
    if condition.at_least is not None:
        return f"at least {_setting(condition.at_least)}"
    if condition.at_most is not None:
        return f"at most {_setting(condition.at_most)}"
    if condition.one_of is None:
        return _setting(condition.equals)
    *first, last = map(_setting, condition.one_of)
    return f"{', '.join(first)} or {last}" if first else last


def _setting(value: bool | float | str | None) -> str:
    """A value of the settings as it is written there."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else shorten(str(value))


def shorten(text: str, most: int = _MOST_CHARACTERS) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return f"{line[:most]}…" if len(line) > most else line


def _beyond_cap(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    word, measure = _measure(published)
    if reason is SelectionReason.QUERY_FULL:
        most, of, place = published.max_per_query, "query", row["verdict_query_place"]
    else:
        most, of, place = published.max_per_cluster, "cluster of similar pairs", row["verdict_cluster_place"]
    rest = "the pairs with its query" if reason is SelectionReason.QUERY_FULL else "its cluster"
    pairs = "1 pair" if most == 1 else f"{most} pairs"
    end = "lowest" if _is_ascending(published) else "highest"
    return (
        f"at most {pairs} of one {of}, with the {end} {measure}. This pair's {word} is "
        f"{_number(row['verdict_score'])}, number {place} of {rest}"
    )


def _in_group(row: Mapping[str, Any], published: Selection, quotas: Quotas) -> str:
    """The part of the budget that the pair's group has, and the pair's place in the group."""
    shares = quotas.shares if isinstance(quotas.shares, str) else "stated"
    group, count = row["verdict_group"], row["verdict_group_taken"]
    of_group = f"without {quotas.per}" if group == NO_VALUE else f"whose {quotas.per} is {shorten(group)}"
    own, last = _apart(row["verdict_score"], row["verdict_cut"])
    word = _measure(published)[0]
    taken = f"{count:,} {'pair' if count == 1 else 'pairs'} {of_group}" if count else f"no pair {of_group}"
    place = f"This pair's {word} is {own}, number {row['verdict_group_place']} of its group"
    if row["verdict_cut"] is None:
        rest = f", of which {'every eligible' if count else 'no'} pair was taken"
    else:
        rest = f"; the {word} of the last pair taken of the group is {last}"
    return f"{_whole(row, published)}, in {shares} shares by {quotas.per}: {taken}. {place}{rest}"


def _whole(row: Mapping[str, Any], published: Selection) -> str:
    """All that the selection takes."""
    if isinstance(published, RmiBandSelection):
        return f"pairs with a rank {_range(published.band)} under the {published.model} model"
    return _size(row, published, published.budget)


def _within(taken: str, ends: tuple[float | None, float | None], of: str, number: str, value: float) -> str:
    """The range that is taken, and this pair's number."""
    return f"{taken} {_range(ends)}{of}. This pair's {number} is {_beside(value, *ends)}"


def _range(ends: tuple[float | None, float | None]) -> str:
    words = zip(("above", "up to"), ends, strict=True)
    return " and ".join(f"{word} {end:g}" for word, end in words if end is not None)


def _size(row: Mapping[str, Any], published: Selection, budget: Budget) -> str:
    pool = "the pool" if isinstance(published, RandomSelection) else f"the pool{_of_reference(row)}"
    order = f"with the {'lowest' if _is_ascending(published) else 'highest'} {_measure(published)[1]}"
    if budget.fraction == 1:
        limits = _limits(published)
        return f"every pair of {pool}" + (f" within the limits ({limits})" if limits else "")
    if budget.fraction is not None:
        return f"the {(Decimal(str(budget.fraction)) * 100).normalize():f}% of {pool} {order}"
    if budget.count is not None:
        return f"the {budget.count:,} pairs of {pool} {order}"
    return (
        f"the pairs of {pool} {order}, as long as their answers have at most {budget.answer_tokens:,} tokens in total"
    )


def _is_ascending(published: Selection) -> bool:
    if isinstance(published, PplSelection):
        return published.order == "low"
    return isinstance(published, RandomSelection) or published.strategy in ("diff_low", "sum_low")


def _place(row: Mapping[str, Any], published: Selection, reason: SelectionReason) -> str:
    """The pair's value, its place, and the value of the last pair taken, with the decimals that tell them apart."""
    value, cut = row["verdict_score"], row["verdict_cut"]
    is_count = published.strategy == "length" and cut is not None
    own, last = (f"{value:.0f}", f"{cut:.0f}") if is_count else _apart(value, cut)
    of, number = f"{row['verdict_pool_size']} pairs", _measure(published)[0]
    if limits := _limits(published):
        of = f"those that pass the limits ({limits}) in a pool of {of}"
    place = f"This pair's {number} is {own}, number {row['verdict_position']} of {of}; "
    if cut is None:
        return place + ("no pair was taken" if reason is SelectionReason.BELOW_CUT else "every eligible pair was taken")
    of_reference = "" if isinstance(published, RandomSelection) else _of_reference(row)
    is_tie = reason is SelectionReason.BELOW_CUT and value == cut
    tie = " too, but its pair_id is smaller, which decides between equal values" if is_tie else ""
    return f"{place}the {number} of the last pair taken{of_reference} is {last}{tie}"


def _limits(published: Selection) -> str:
    """The settings that exclude pairs of the pool, whatever their place."""
    names = ("valid", "where", "min_gap", "rank_strong", "rmi_strong", "maximum")
    return " and ".join(name for name in names if getattr(published, name, None) not in (None, (), False))


def _apart(value: float, cut: float | None) -> tuple[str, str]:
    """Both numbers, with at least 3 decimals and as many as it takes to tell them apart."""
    if cut is None:
        return _number(value), ""
    decimals = next((n for n in range(3, 15) if value == cut or f"{value:.{n}f}" != f"{cut:.{n}f}"), 15)
    return _number(value, decimals), _number(cut, decimals)


def _beside(value: float, *bounds: float | None) -> str:
    """The number, with as many decimals as it takes to tell it from each bound that it does not equal."""
    return max((_apart(value, bound)[0] for bound in bounds if bound is not None), key=len, default=_number(value))


def _number(value: float, decimals: int = 3) -> str:
    """The number with so many decimals, and no minus before a zero."""
    return f"{value:.{decimals}f}" if round(value, decimals) else f"{0:.{decimals}f}"


def _measure(published: Selection) -> tuple[str, str]:
    of = published.measure if isinstance(published, IfdSelection | PplSelection) else published.strategy
    word, measure = _MEASURES[of]
    return word, measure.format(model=getattr(published, "model", "strong"))
