"""The closed vocabularies of text columns: every word that a status, reason or decision may be, with its meaning.

Belongs here: the words. Does not belong here: the columns that hold them (`tables`). It imports nothing, so that every
package can use it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class Vocabulary(StrEnum):
    """The words that a text column may hold, each with what it says of a row: `WORD = "word", "meaning"`."""

    meaning: str

    def __new__(cls, word: str, meaning: str) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member


class Status(Vocabulary):
    """What screening says of an input row."""

    ACCEPTED = "accepted", "It is scored, perhaps with a flag."
    REJECTED = "rejected", "It could not be read as a pair."
    WITHDRAWN = "withdrawn", "Its text was withdrawn."
    CONTAMINATED = "contaminated", "It holds a benchmark's task."
    DUPLICATE = "duplicate", "An older row stands for it."


class RejectReason(Vocabulary):
    """Why a delivered row could not be read as a (query, answer) pair."""

    BAD_JSON = "bad_json", "The line, or the element of the array, is no JSON."
    INVALID_UTF8 = "invalid_utf8", "Its bytes are no UTF-8, or a text of it cannot be written in it."
    NOT_AN_OBJECT = "not_an_object", "It is JSON, but no object with fields."
    MISSING_QUERY = "missing_query", "It has no field for the query, or null in it."
    MISSING_ANSWER = "missing_answer", "It has no field for the answer, or null in it."
    EMPTY_QUERY = "empty_query", "The query has no visible character."
    EMPTY_ANSWER = "empty_answer", "The answer has no visible character."
    WRONG_TYPE = "wrong_type", "A field that must be text or a list of turns is something else."
    UNKNOWN_ROLE = "unknown_role", "A turn is by nobody known: neither user, assistant nor system."
    NO_ANSWERED_TURN = "no_answered_turn", "No user turn is followed by an assistant turn."
    UNREADABLE_FILE = "unreadable_file", "The whole file cannot be cut into rows: this row stands for it."


class DuplicateReason(Vocabulary):
    """Why a readable row is not scored although nothing is wrong with its text."""

    EXACT_DUPLICATE = "exact_duplicate", "Equal to that row but for white space and Unicode form."
    NEAR_DUPLICATE = "near_duplicate", "As similar to that row as `screening.duplicates.near_threshold`, or more."


class ContaminationReason(Vocabulary):
    """What of a benchmark's task a row holds."""

    BENCHMARK_PROMPT = "benchmark_prompt", "Of the task's statement."
    BENCHMARK_SOLUTION = "benchmark_solution", "Of the task's solution."


class WithdrawalReason(Vocabulary):
    """Why a readable row may not be published."""

    ROW_WITHDRAWN = "row_withdrawn", "`qaq withdraw` named a row with this text."


class GateReason(Vocabulary):
    """Why no row of a batch is scored, or published."""

    BATCH_WITHDRAWN = "batch_withdrawn", "`qaq withdraw` named the batch."
    EMPTY_BATCH = "empty_batch", "It has no row."
    UNREADABLE_FILE = "unreadable_file", "A file of it cannot be cut into rows."
    TOO_MANY_REJECTED = "too_many_rejected", "More of its rows are rejected than `gates.max_rejected_share` allows."
    TOO_FEW_SCORABLE = "too_few_scorable", "A model could score less than `gates.min_scorable_share` of its pairs."
    MODEL_CHANGED = "model_changed", "The files of a model changed while it scored."


class Quantity(Vocabulary):
    """The four negative log-likelihoods that a model can give of a pair (method: log PPL(X | C))."""

    Q = "q", "Of the query in the prior's context."
    Q_GIVEN_A = "q_given_a", "Of the query after the reverse prompt with the answer."
    A = "a", "Of the answer after an empty query."
    A_GIVEN_Q = "a_given_q", "Of the answer after the query."


class NullReason(Vocabulary):
    """Why a quantity of a pair is null."""

    NOT_WANTED = "not_wanted", "`scoring.quantities` does not ask for it."
    QUERY_TOO_LONG = "query_too_long", "The query, never cut, fills `scoring.max_tokens` by itself."
    PAIR_TOO_LONG = "pair_too_long", "The pair is over `scoring.max_tokens`, and `scoring.too_long` is leave_unscored."
    NO_TOKENS_TO_SCORE = "no_tokens_to_score", "Query or answer has no token to score."
    NON_FINITE = "non_finite", "The model, or the formula, gave no finite number."
    OUT_OF_MEMORY = "out_of_memory", "It did not fit into memory, even in a batch of its own."
    TOO_FEW_QUERY_TOKENS = "too_few_query_tokens", "The query has fewer tokens than `eligibility.min_query_tokens`."


class Decision(Vocabulary):
    """The fate of an input row under the published selection."""

    SELECTED = "selected", "It is in the published dataset."
    NOT_SELECTED = "not_selected", "It was ranked, and not taken."
    REJECTED = "rejected", "It could not be read as a pair."
    WITHDRAWN = "withdrawn", "Its text was withdrawn."
    CONTAMINATED = "contaminated", "It holds a benchmark's task, and `screening.contamination.action` is drop."
    DUPLICATE = "duplicate", "An older row stands for it."
    UNSCORABLE = "unscorable", "A model that the selection uses has no score of it."
    BATCH_GATED = "batch_gated", "Its whole batch goes no further."


class SelectionReason(Vocabulary):
    """Why a pair in the pool of a selection is, or is not, selected by it."""

    WITHIN_BUDGET = "within_budget", "Selected: its place in the order is within the budget."
    IN_BAND = "in_band", "Selected: its rank is in the band."
    BELOW_CUT = "below_cut", "Not selected: others come before it, and the budget ends with them."
    OUTSIDE_BAND = "outside_band", "Not selected: its rank is outside the band."
    GAP_BELOW_MINIMUM = "gap_below_minimum", "Not selected: its gap is `min_gap` or less."
    RANK_STRONG_OUT_OF_RANGE = "rank_strong_out_of_range", "Not selected: its rank is outside `rank_strong`."
    RMI_STRONG_OUT_OF_RANGE = "rmi_strong_out_of_range", "Not selected: its RMI is outside `rmi_strong`."
    IFD_ABOVE_MAXIMUM = "ifd_above_maximum", "Not selected: its IFD is above `maximum`."
    NOT_IN_POOL = "not_in_pool", "Not selected: a model that the selection uses has no score of it."


class Defect(Vocabulary):
    """What is done to a batch's own pair to see whether the scores notice; the most telling first."""

    OTHER_ANSWER = "other_answer", "The answer of another row of its stratum stands in place of its own."
    ECHO = "echo", "The answer repeats the query."
    REFUSAL = "refusal", "The answer declines."
    INVENTED_TERMS = "invented_terms", "Words of the query are replaced by words that do not exist."
    CUT_ANSWER = "cut_answer", "The answer ends after a part of it."
    FILLER = "filler", "The answer says nothing."
    WRONG_LANGUAGE = "wrong_language", "The answer is in another programming language than asked."
    ONE_TOKEN_BUG = (
        "one_token_bug",
        "One operator, name or number of the code is another: no likelihood can be expected to tell.",
    )


class Statistic(Vocabulary):
    """What a row of a calibration says."""

    AUROC = "auroc", "P(a row as delivered scores above a planted one), ties counted half."
    PAIRED_SHARE = "paired_share", "Of the planted rows, those that score below their own twin."
    KEPT_SHARE = "kept_share", "Of the rows, those that a selection takes."
    LOW_CUT = (
        "low_cut",
        "The largest RMI that is not told from a mismatch at the false-discovery rate.",
    )
    HIGH_CUT = "high_cut", "The RMI above which a row may be an echo."


class UnknownReason(Vocabulary):
    """Why a calibration does not know a number."""

    NOT_PLANTED = "not_planted", "No row has this defect: none could be made, or the batch is too small."
    NOT_WANTED = "not_wanted", "`scoring.quantities` does not ask for it."
    NOT_SCORED = "not_scored", "No row of either side has the number."
    NONE_TOLD_FROM_NULL = "none_told_from_null", "No row stands out from the null: there is no cut."
    ALL_TOLD_FROM_NULL = "all_told_from_null", "Every row stands out from the null: there is nothing to cut."


SELECTED_REASONS = (SelectionReason.WITHIN_BUDGET, SelectionReason.IN_BAND)


class Change(Vocabulary):
    """Why a row is in one version of the dataset and not in the one before, or the other way round."""

    BATCH_ENTERED = "batch_entered", "Its batch is in the newer version only."
    BATCH_LEFT = "batch_left", "Its batch is in the older version only."
    ROW_DELIVERED = "row_delivered", "Its batch is in both, and the row was not in the older delivery."
    ROW_GONE = "row_gone", "Its batch is in both, and the row is not in the newer delivery."
    DECIDED_OTHERWISE = "decided_otherwise", "It is in both deliveries, and was decided otherwise."
