"""The closed vocabularies of text columns: every word that a status, reason or decision may be, with its meaning.

Belongs here: the words. Does not belong here: the columns that hold them (`tables`). It imports nothing, so that every
package can use it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Vocabulary(StrEnum):
    """The words that a text column may contain, each with its meaning: `WORD = "word", "meaning"`."""

    meaning: str

    def __new__(cls, word: str, meaning: str) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member


class Status(Vocabulary):
    """The result of screening for a delivered row."""

    ACCEPTED = "accepted", "The row is scored; if it has a reason, it is flagged as contaminated."
    REJECTED = "rejected", "The row could not be read as a pair."
    WITHDRAWN = "withdrawn", "The row must not be published."
    CONTAMINATED = "contaminated", "The row contains a benchmark task."
    DUPLICATE = "duplicate", "An equal or similar row is kept instead of this one."
    HELD_OUT = "held_out", "The row is held out for training trials: it is neither scored nor selected."
    BETWEEN = "between", "The row is similar to rows that are trained on and to held-out rows, so it is in neither."


class RejectReason(Vocabulary):
    """Reasons why a delivered row could not be read as a (query, answer) pair."""

    BAD_JSON = "bad_json", "The line, or the element of the array, is not JSON."
    BAD_CSV = "bad_csv", "The row of CSV has another number of cells than the header."
    INVALID_UTF8 = "invalid_utf8", "The bytes are not UTF-8, or a text cannot be encoded in it."
    NOT_AN_OBJECT = "not_an_object", "The row is JSON, but not an object with fields."
    MISSING_QUERY = "missing_query", "The field for the query is absent or null."
    MISSING_ANSWER = "missing_answer", "The field for the answer is absent or null."
    EMPTY_QUERY = "empty_query", "The query has no visible character."
    EMPTY_ANSWER = "empty_answer", "The answer has no visible character."
    WRONG_TYPE = "wrong_type", "A field that must be text or a list of turns has another type."
    UNKNOWN_ROLE = "unknown_role", "A turn has an unknown role."
    NO_ANSWERED_TURN = "no_answered_turn", "No user turn is followed by an assistant turn."
    OTHER_THAN_TEXT = "other_than_text", "The record, or a turn of it, has something else than text, such as an image."
    USES_TOOLS = "uses_tools", "The answer calls a tool, or needs what a tool said."
    NOT_FOR_TRAINING = "not_for_training", "The record says that its answer is not to be trained on."
    UNREADABLE_FILE = "unreadable_file", "The file cannot be split into rows; this one row is stored instead."


class DuplicateReason(Vocabulary):
    """Reasons why a readable row is not scored although its text is valid."""

    EXACT_DUPLICATE = (
        "exact_duplicate",
        "The row differs from the other one only in Unicode form, line ends, or white space at the end of lines.",
    )
    NEAR_DUPLICATE = "near_duplicate", "The similarity to the other row reaches `screening.duplicates.near_threshold`."


class HoldOutReason(Vocabulary):
    """Reasons why a readable row is not trained on although nothing is wrong with it."""

    CLUSTER_DRAWN = "cluster_drawn", "The draw of the row's cluster is below `held_out.share`."
    SIMILAR_TO_HELD_OUT = "similar_to_held_out", "The row's cluster contains a row that was held out before."
    SIMILAR_TO_BOTH = (
        "similar_to_both",
        "The row's cluster contains rows that were trained on and rows that were held out before.",
    )


class ContaminationReason(Vocabulary):
    """The part of a benchmark task that a row contains."""

    BENCHMARK_PROMPT = "benchmark_prompt", "The row contains a part of the task's statement."
    BENCHMARK_SOLUTION = "benchmark_solution", "The row contains a part of the task's solution."


class WithdrawalReason(Vocabulary):
    """Reasons why a readable row must not be published."""

    ROW_WITHDRAWN = "row_withdrawn", "`qaq withdraw` was run for a row with this text."
    SECRET = "secret", "The delivered record contains a key or token of a service, or a private key."
    PERSONAL_DATA = "personal_data", "The delivered record contains data of a kind in `screening.personal_data`."
    LICENCE_NOT_ALLOWED = "licence_not_allowed", "The row names a licence that is not in `screening.licences`."


class GateReason(Vocabulary):
    """Reasons why no row of a batch is published."""

    BATCH_WITHDRAWN = "batch_withdrawn", "`qaq withdraw` was run for the batch."
    EMPTY_BATCH = "empty_batch", "The batch has no rows."
    UNREADABLE_FILE = "unreadable_file", "A file of the batch cannot be split into rows."
    TOO_MANY_REJECTED = "too_many_rejected", "The share of rejected rows is above `gates.max_rejected_share`."
    TOO_FEW_SCORABLE = "too_few_scorable", "The share of pairs that a model scored is below `gates.min_scorable_share`."
    CANNOT_TELL = (
        "cannot_tell",
        "RMI does not tell the batch's pairs from answers to other queries, and `gates.must_tell` is true.",
    )
    MODEL_CHANGED = "model_changed", "The files of a model changed during scoring."


class Quantity(Vocabulary):
    """The likelihoods of a pair: NLL(X | C), the negative log-likelihood of X after C (page: The method).

    The setting `scoring.quantities` does not name these likelihoods, but the scores that are computed from them.
    """

    Q = "q", "The query without the answer, after the text of the prior (page: The method)."
    Q_GIVEN_A = "q_given_a", "The query after the reverse prompt with the answer."
    A = "a", "The answer after an empty query."
    A_GIVEN_Q = "a_given_q", "The answer after the query."
    END = "end", "An end token right after the answer, in the reverse prompt."

    @property
    def tokens_column(self) -> str | None:
        """Column with the number of scored tokens, the divisor of the quantity's mean; None: it is one token."""
        if self is Quantity.END:
            return None
        return "num_q_tokens" if self in (Quantity.Q, Quantity.Q_GIVEN_A) else "num_a_tokens"


QUANTITIES_OF = {
    "rmi": (Quantity.Q, Quantity.Q_GIVEN_A),
    "ifd": (Quantity.A, Quantity.A_GIVEN_Q),
    "end": (Quantity.END,),
}
"""The likelihoods from which each score is computed."""


class NullReason(Vocabulary):
    """Reasons why a likelihood or a score of a pair is null."""

    NOT_WANTED = "not_wanted", "This score or likelihood is not needed for `scoring.quantities`."
    QUERY_TOO_LONG = "query_too_long", "The query alone does not fit into `scoring.max_tokens`; a query is never cut."
    PAIR_TOO_LONG = "pair_too_long", "The pair exceeds `scoring.max_tokens`, and `scoring.too_long` is leave_unscored."
    NO_TOKENS_TO_SCORE = "no_tokens_to_score", "Query or answer has no token to score."
    TOKEN_BEYOND_EMBEDDING = "token_beyond_embedding", "The text has a token that the model has no embedding for."
    NON_FINITE = "non_finite", "The model or the formula returned a number that is not finite."
    ANSWER_TRUNCATED = "answer_truncated", "The answer was truncated, so the model has not seen where it ends."
    NO_END_TOKEN = "no_end_token", "The model has no token that ends a text or a turn."
    OUT_OF_MEMORY = "out_of_memory", "The pair did not fit into memory, even alone in a forward pass."
    WORKER_LOST = "worker_lost", "Three scoring processes ended while they scored the pair."
    TOO_FEW_QUERY_TOKENS = "too_few_query_tokens", "The query has fewer tokens than `eligibility.min_query_tokens`."


class Decision(Vocabulary):
    """The decision about a delivered row under the published selection."""

    SELECTED = (
        "selected",
        "The published selection takes the row. It is in every published version that was made from this decision.",
    )
    NOT_SELECTED = "not_selected", "The row was ranked and not selected."
    REJECTED = "rejected", "The row could not be read as a pair."
    WITHDRAWN = "withdrawn", "The row must not be published."
    CONTAMINATED = "contaminated", "The row contains a benchmark task, and `screening.contamination.action` is drop."
    DUPLICATE = "duplicate", "An equal or similar row is kept instead of this one."
    HELD_OUT = "held_out", "The row is held out for training trials: it is neither scored nor selected."
    BETWEEN = "between", "The row is similar to rows that are trained on and to held-out rows, so it is in neither."
    UNSCORABLE = "unscorable", "A model that the selection uses has no score for the pair."
    BATCH_GATED = "batch_gated", "A gate stopped the batch: no row of it is published."


class Signal(Vocabulary):
    """The signals of validity, in the order in which they are asked: each tells one kind of pair that should not be
    trained on.
    """

    ECHO = (
        "echo",
        "The answer repeats the query word for word and little else, and makes it as predictable as an echo does.",
    )
    IMPLAUSIBLE_QUERY = "implausible_query", "PPL(Q) is as high as that of queries with invented words."
    MISMATCH = "mismatch", "RMI is not clearly above that of answers to other queries."
    UNFINISHED = "unfinished", "The models expect the end of the answer as little as that of a cut answer."
    UNCLOSED = "unclosed", "The answer leaves a bracket or a code fence open."


class NoCutReason(Vocabulary):
    """Reasons why a signal has no cut, so that it declares no pair invalid."""

    TURNED_OFF = "turned_off", "The setting of the signal is off."
    NOT_PLANTED = "not_planted", "`calibration.defects` does not include the defects of the signal."
    NOT_SCORED = "not_scored", "No pair of the batch has the score of the signal under both models."
    TOO_FEW_PLANTED = "too_few_planted", "Too few planted rows have the score to choose a cut."
    CANNOT_TELL = "cannot_tell", "The batch's pairs are not clearly different from planted ones by this signal."


class SelectionReason(Vocabulary):
    """Reasons why a selection takes a pair or does not take it."""

    WITHIN_BUDGET = (
        "within_budget",
        "Selected: the pair is within the budget; with `ranking.pool: reference`, it does not come after the last pair "
        "taken from the reference.",
    )
    IN_BAND = "in_band", "Selected: the rank is in the band."
    BELOW_CUT = (
        "below_cut",
        "Not selected: the pair comes after the last pair that the selection takes, in the batch or, with "
        "`ranking.pool: reference`, in the reference.",
    )
    OUTSIDE_BAND = "outside_band", "Not selected: the rank is outside the band."
    GAP_BELOW_MINIMUM = "gap_below_minimum", "Not selected: the gap is not above `min_gap`."
    RANK_STRONG_OUT_OF_RANGE = (
        "rank_strong_out_of_range",
        "Not selected: the strong model's rank is outside `rank_strong`.",
    )
    RMI_STRONG_OUT_OF_RANGE = "rmi_strong_out_of_range", "Not selected: the strong model's RMI is outside `rmi_strong`."
    IFD_ABOVE_MAXIMUM = "ifd_above_maximum", "Not selected: the IFD is above `maximum`."
    INVALID_MISMATCH = (
        "invalid_mismatch",
        "Not selected: not valid, because the answer may belong to another query (signal `mismatch`).",
    )
    INVALID_ECHO = "invalid_echo", "Not selected: not valid, because the answer repeats the query (signal `echo`)."
    INVALID_UNFINISHED = (
        "invalid_unfinished",
        "Not selected: not valid, because the answer seems to be cut (signal `unfinished`).",
    )
    INVALID_UNCLOSED = (
        "invalid_unclosed",
        "Not selected: not valid, because the answer leaves a bracket or a code fence open (signal `unclosed`).",
    )
    INVALID_IMPLAUSIBLE_QUERY = (
        "invalid_implausible_query",
        "Not selected: not valid, because the query seems to have no meaning (signal `implausible_query`).",
    )
    WHERE_NOT_MET = "where_not_met", "Not selected: the pair does not meet a condition of `where`."
    QUERY_FULL = "query_full", "Not selected: better pairs with the same query reach `max_per_query`."
    CLUSTER_FULL = "cluster_full", "Not selected: better pairs of the same cluster reach `max_per_cluster`."
    QUOTA_FULL = "quota_full", "Not selected: pairs before it in its group fill the group's quota."
    NOT_IN_POOL = "not_in_pool", "Not selected: a model that the selection uses has no score for the pair."


class Defect(Vocabulary):
    """The ways in which a copy of a pair is made bad to validate the scores."""

    OTHER_ANSWER = "other_answer", "The answer is replaced by the answer to another query, which is not similar."
    ECHO = "echo", "The answer repeats the query, alone or after a short introduction."
    INVENTED_TERMS = "invented_terms", "Words of the query are replaced by invented words."
    CUT_ANSWER = "cut_answer", "The end of the answer is missing."
    CUT_AT_LINE = "cut_at_line", "The answer ends at the end of a line, and the rest is missing."
    REFUSAL = "refusal", "The answer declines."
    FILLER = "filler", "The answer has no content."
    WRONG_LANGUAGE = "wrong_language", "The answer is in another programming language than the query asks for."
    ONE_TOKEN_BUG = "one_token_bug", "One operator, name or number of the code is replaced: the negative control."


class Statistic(Vocabulary):
    """The statistics of a calibration."""

    AUROC = "auroc", "Probability that a row as delivered scores above a planted one, a tie counted half."
    PAIRED_SHARE = "paired_share", "Share of planted rows that score below their own original."
    KEPT_SHARE = "kept_share", "Share of rows that a selection takes."
    DROPPED_SHARE = (
        "dropped_share",
        "Share of rows that have the defect by a signal, whatever its action; for the measure `valid`, share of rows "
        "that no signal declares invalid.",
    )


class UnknownReason(Vocabulary):
    """Reasons why a number of a calibration is null."""

    NOT_PLANTED = "not_planted", "No row has this defect, or none can be compared: no pair of the batch is ranked."
    NOT_WANTED = "not_wanted", "`scoring.quantities` does not include this score."
    NOT_SCORED = "not_scored", "None of the rows as delivered, or none of the planted rows, has this score."
    NO_CUT = "no_cut", "The signal has no cut, so that it tells nothing of any row."


SELECTED_REASONS = (SelectionReason.WITHIN_BUDGET, SelectionReason.IN_BAND)

INVALID_REASONS = {signal: SelectionReason(f"invalid_{signal}") for signal in Signal}
"""Reason with which a selection excludes the pairs that a signal declares invalid."""


class Change(Vocabulary):
    """Reasons why a row is in only one of two versions of the dataset."""

    BATCH_ENTERED = "batch_entered", "The batch is in the newer version only."
    BATCH_LEFT = "batch_left", "The batch is in the older version only."
    ROW_DELIVERED = "row_delivered", "The batch is in both versions; the row was not in the older delivery."
    ROW_GONE = "row_gone", "The batch is in both versions; the row is not in the newer delivery."
    WITHDRAWN = "withdrawn", "The row is in both deliveries, and was withdrawn."
    DECIDED_OTHERWISE = (
        "decided_otherwise",
        "The row is in both deliveries, and its decision changed: its own score, or those of others.",
    )


class Verdict(Vocabulary):
    """Outcomes of the comparison of two arms of a training trial."""

    BETTER = "better", "The arm's loss is lower, with a p-value below 0.05."
    NOT_TOLD_APART = "not_told_apart", "The p-value is at least 0.05."
    WORSE = "worse", "The arm's loss is higher, with a p-value below 0.05."
    TOO_FEW_SEEDS = "too_few_seeds", "There are fewer than 5 seeds."
