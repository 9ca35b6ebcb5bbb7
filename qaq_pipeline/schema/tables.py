"""The schema of every stored table: columns, dtypes, keys, units, and the meaning of null.

Belongs here: the tables' schemas, and the check that a frame fits its schema. Does not belong here: how a table is
computed, or where it is stored.

Every write enforces the schema (`enforce`), and the Dagster UI shows it. No other column is written. A number
that cannot be computed is null, with a reason in another column, and never a number such as 0.
"""

from __future__ import annotations

import dataframely as dy
import polars as pl

from qaq_pipeline.schema.vocabularies import (
    Change,
    ContaminationReason,
    Decision,
    Defect,
    DuplicateReason,
    GateReason,
    HoldOutReason,
    NoCutReason,
    NullReason,
    Quantity,
    RejectReason,
    SelectionReason,
    Signal,
    Statistic,
    Status,
    UnknownReason,
    Vocabulary,
    WithdrawalReason,
)


def _closed(
    *vocabularies: type[Vocabulary],
    description: str,
    nullable: bool = False,
    primary_key: bool = False,
    explains: str | None = None,
) -> dy.String:
    """A column of words; `explains` names the column that is null exactly where this one gives a reason."""
    values = [member.value for vocabulary in vocabularies for member in vocabulary]
    return dy.String(
        nullable=nullable,
        primary_key=primary_key,
        check=lambda column: column.is_in(values),
        metadata={"vocabularies": vocabularies, "explains": explains},
        description=f"{description} One of: {', '.join(values)}.",
    )


def _null_reason(value: str, vocabulary: type[Vocabulary] = NullReason) -> dy.String:
    description = f"Reason why `{value}` is null; otherwise null."
    return _closed(vocabulary, nullable=True, explains=value, description=description)


def _nats(description: str, unit: str = "nats/token", minimum: float | None = 0.0) -> dy.Float64:
    return dy.Float64(nullable=True, min=minimum, metadata={"unit": unit}, description=description)


def _nll(symbol: str) -> dy.Float64:
    return _nats(f"Sum of -ln p over the scored tokens of {symbol}. Null: see the null reason.", unit="nats")


def _log_ppl(symbol: str) -> dy.Float64:
    return _nats(f"log PPL({symbol}) = sum of NLL / scored tokens. Null: see the null reason.")


def _count(what: str) -> dy.Int64:
    return dy.Int64(min=0, metadata={"unit": "tokens"}, description=what)


class _Explained(dy.Schema):
    """A table in which no value is null without a reason."""

    @dy.rule()
    def null_iff_reason(cls) -> pl.Expr:
        explained = {name: (column.metadata or {}).get("explains") for name, column in cls.columns().items()}
        return pl.all_horizontal(
            pl.col(value).is_null() == pl.col(reason).is_not_null() for reason, value in explained.items() if value
        )


class _RowKey(dy.Schema):
    """The key of one query and answer in a delivery: a delivered row, or one turn of a conversation."""

    batch = dy.String(primary_key=True, description="Name of the delivery: the batch partition.")
    source_file = dy.String(primary_key=True, description="Path of the file, relative to the delivery.")
    source_row = dy.Int64(
        primary_key=True,
        min=1,
        description="Row in the file, from 1: the line of a JSONL file, or the position in another format.",
    )
    turn_index = dy.Int64(
        primary_key=True,
        min=0,
        description="Number, from 0, of the query/answer turn in a conversation; 0 if the row is one pair.",
    )


_PAIR_ID = r"^[0-9a-f]{32}$"


class _PairScores(_Explained):
    """A table of scores: one row per distinct pair."""

    pair_id = dy.String(primary_key=True, regex=_PAIR_ID, description="Content hash of system, history, query, answer.")


class RawData(_RowKey):
    """One row per delivered row (or turn): accepted, or rejected with a reason. No delivered row is missing."""

    pair_id = dy.String(
        nullable=True, regex=_PAIR_ID, description="Content hash of system, history, query, answer; null if rejected."
    )
    system = dy.String(nullable=True, description="The row's own system text. It is context and is never scored.")
    history = dy.List(
        dy.Struct({"role": dy.String(), "content": dy.String()}),
        nullable=True,
        description="Earlier turns of the conversation, and the record's tools, which are context of Q and A and are "
        "never scored; null if there are none, or where `records.context` is none.",
    )
    query = dy.String(nullable=True, description="Q, as delivered; null if the row has none.")
    answer = dy.String(nullable=True, description="A, as delivered; null if the row has none.")
    reasoning = dy.String(
        nullable=True,
        description="The answer's reasoning, in tags named think, as it stands before the answer in training files; "
        "null if it has none, or if it is part of the answer (`records.reasoning`). It is never scored.",
    )
    source = dy.String(nullable=True, description="The row's own `source` field; null if it has none.")
    language = dy.String(
        nullable=True,
        description="The row's own `language` field, else the language that a code fence of the answer names first.",
    )
    licence = dy.String(nullable=True, description="The licence that the row names; null if it names none.")
    record = dy.String(
        description="The delivered record, verbatim; invalid bytes as \\xNN escapes. Empty for an unreadable file."
    )
    status = _closed(Status, description="Accepted or rejected.")
    reason = _closed(RejectReason, nullable=True, description="Reason for the rejection; null if accepted.")
    detail = dy.String(nullable=True, description="The exact problem, in words; null if accepted.")

    @dy.rule()
    def rejected_iff_reason(cls) -> pl.Expr:
        return (pl.col("status") == Status.REJECTED.value) == pl.col("reason").is_not_null()

    @dy.rule()
    def accepted_has_text(cls) -> pl.Expr:
        complete = pl.all_horizontal(pl.col("pair_id", "query", "answer").is_not_null())
        return (pl.col("status") != Status.ACCEPTED.value) | complete


class Signatures(_RowKey):
    """Hashes of every accepted row, used to find its duplicates. They depend only on the row's text."""

    pair_id = dy.String(regex=_PAIR_ID, description="Content hash of system, history, query, answer.")
    content_hash = dy.String(
        regex=_PAIR_ID,
        description="Hash of system text, query and answer, after Unicode normalisation (NFC) and with each run of "
        "white space as one space.",
    )
    exact_hash = dy.String(
        regex=_PAIR_ID,
        description="Hash of system text, query and answer: equal where they are, but for Unicode form, line ends, and "
        "white space at the end of lines.",
    )
    query_hash = dy.String(regex=_PAIR_ID, description="Hash of the query, normalised as for content_hash.")
    bands = dy.List(
        dy.UInt64(),
        description="25 short hashes (MinHash bands) of the 5-word sequences of query and answer; similar rows "
        "probably share one. Empty if there are no words.",
    )


class Contamination(_RowKey):
    """The rows of a batch that contain a task of one benchmark. If a row contains several, it is stored with
    the task of which it contains the largest share.
    """

    benchmark = dy.String(description="Name of the benchmark.")
    task = dy.String(description="The task's id.")
    reason = _closed(
        ContaminationReason, description="The part of the task that the row contains: statement or solution."
    )
    share = dy.Float64(
        min_exclusive=0.0, max=1.0, description="Share of that part's word sequences that are in the row."
    )
    matched_text = dy.String(
        description="The longest word sequence that the row and the task share, at most 200 characters; the solution "
        "if the row contains it as exact text."
    )


DISTINCT = (Status.ACCEPTED.value, Status.HELD_OUT.value, Status.BETWEEN.value)
"""Statuses of the rows that screening keeps: such a row represents its duplicates."""


class ScreenedData(_RowKey):
    """The rows of raw_data with the results of screening, which comes before scoring. Only accepted rows are scored."""

    pair_id = RawData.pair_id
    status = _closed(
        Status,
        description="Accepted, rejected (as in raw_data), withdrawn, contaminated, duplicate, held_out or between.",
    )
    reason = _closed(
        RejectReason,
        WithdrawalReason,
        ContaminationReason,
        DuplicateReason,
        HoldOutReason,
        nullable=True,
        description="Reason why the row is not scored or is flagged; otherwise null.",
    )
    duplicate_of = dy.String(
        nullable=True,
        description="The row that is kept instead of this one, as batch/file:row.turn; null unless duplicate.",
    )
    similarity = dy.Float64(
        nullable=True,
        min=0.0,
        max=1.0,
        description="Duplicate: Jaccard similarity to the row in `duplicate_of`. Contaminated: share of the word "
        "sequences of the benchmark's task that the row contains. Otherwise null.",
    )
    cluster = dy.String(
        nullable=True,
        description="The row's near-duplicate cluster, named by its first row, as batch/file:row.turn: rows with equal "
        "queries, or with a similarity of at least `screening.duplicates.cluster_threshold`, and rows similar to "
        "these. Null unless accepted, held_out or between.",
    )
    evidence = dy.String(nullable=True, description="Evidence for the status, in words; null if there is none.")
    batch_gate = _closed(
        GateReason,
        nullable=True,
        description="Reason why no row of the batch is scored, the same in every row; null: the batch passed.",
    )

    @dy.rule()
    def duplicate_names_its_row(cls) -> pl.Expr:
        return (pl.col("status") == Status.DUPLICATE.value) == pl.col("duplicate_of").is_not_null()

    @dy.rule()
    def distinct_rows_have_a_cluster(cls) -> pl.Expr:
        return pl.col("status").is_in(DISTINCT) == pl.col("cluster").is_not_null()

    @dy.rule()
    def pairs_are_scored_once(cls) -> pl.Expr:
        accepted = pl.col("status") == Status.ACCEPTED.value
        return ~accepted | pl.struct("pair_id", "status").is_unique()


class CachedScores(_PairScores):
    """Score cache: one row per likelihood of a pair. The folder's name is the score identity: a hash of the model,
    prompts and settings that determine a score.
    """

    quantity = _closed(Quantity, primary_key=True, description="The likelihood.")
    sum_nll = _nats("Sum of NLL. Null: see the reason.", unit="nats")
    num_tokens = _count("Number of scored tokens. The mean is the sum divided by it.")
    end_ids = dy.String(
        regex=r"^(\d+( \d+)*)?$",
        description="For `end`: ids of the end tokens, any of which may come next. Otherwise empty.",
    )
    null_reason = _null_reason("sum_nll")


class Logprobs(_PairScores):
    """Sums of negative log-likelihoods of each distinct accepted pair under one model, with token counts."""

    sum_nll_q = _nll("Q without A, after the text of the prior (page: The method)")
    sum_nll_q_given_a = _nll("Q after the reverse prompt with A")
    sum_nll_a = _nll("A after an empty query, in the text of the forward pass (page: The method)")
    sum_nll_a_given_q = _nll("A after Q, in the text of the forward pass (page: The method)")
    sum_nll_end = _nats(
        "-ln p that an end token comes right after A, in the reverse prompt. Null: see the null reason.", unit="nats"
    )
    null_reason_q = _null_reason("sum_nll_q")
    null_reason_q_given_a = _null_reason("sum_nll_q_given_a")
    null_reason_a = _null_reason("sum_nll_a")
    null_reason_a_given_q = _null_reason("sum_nll_a_given_q")
    null_reason_end = _null_reason("sum_nll_end")
    num_q_tokens = _count(
        "Number of scored tokens of Q; the same for sum_nll_q and sum_nll_q_given_a. Each sum is divided by it."
    )
    num_a_tokens = _count("Number of scored tokens of A after truncation. Each sum of A is divided by it.")
    num_a_tokens_untruncated = _count("All tokens of A.")
    is_truncated = dy.Bool(
        description="True if the end of A was removed to fit into `scoring.max_tokens`. Q is never shortened."
    )

    @dy.rule()
    def scored_has_tokens(cls) -> pl.Expr:
        counts = {q: pl.col(q.tokens_column) for q in Quantity if q.tokens_column}
        return pl.all_horizontal(pl.col(f"sum_nll_{q}").is_null() | (count > 0) for q, count in counts.items())


class RmiScores(_PairScores):
    """The scores of each pair under one model, without ranks: computed from the sums in logprobs, without a GPU."""

    log_ppl_q = _log_ppl("Q")
    log_ppl_q_given_a = _log_ppl("Q | A")
    log_ppl_a = _log_ppl("A")
    log_ppl_a_given_q = _log_ppl("A | Q")
    rmi = _nats("RMI = log PPL(Q) - log PPL(Q | A). Low: mismatch. Very high: A echoes Q.", minimum=None)
    ifd_ppl = dy.Float64(
        nullable=True, min=0.0, description="IFD as a ratio of perplexities: exp(log PPL(A | Q) - log PPL(A))."
    )
    ifd_loss = dy.Float64(nullable=True, min=0.0, description="IFD as a ratio of losses: log PPL(A | Q) / log PPL(A).")
    nll_end = _nats(
        "-ln p(end | A): low if the answer ends where the model expects it to, high if it was cut.", unit="nats"
    )
    null_reason_rmi = _null_reason("rmi")
    null_reason_ifd = _null_reason("ifd_ppl")
    null_reason_end = _null_reason("nll_end")
    num_q_tokens = _count("Scored tokens of Q.")
    num_a_tokens = _count("Scored tokens of A after truncation.")
    num_a_tokens_untruncated = _count("All tokens of A.")
    is_truncated = dy.Bool(description="True if the end of A was removed to fit into `scoring.max_tokens`.")
    is_short_query = dy.Bool(description="True if Q has fewer tokens than `eligibility.short_query_tokens`: noisy.")


_MODEL = dy.String(description="Role of the model.")

SPREAD = dy.Struct(
    {
        "model": _MODEL,
        "place": dy.Float64(description="Mean value of the planted rows where the covariate is 0."),
        "place_slope": dy.Float64(description="Change of that mean per unit of the covariate."),
        "scale": dy.Float64(description="Mean absolute deviation of the planted rows where the covariate is 0."),
        "scale_slope": dy.Float64(description="Change of that deviation per unit of the covariate."),
    }
)


def _share(description: str) -> dy.Float64:
    return dy.Float64(nullable=True, min=0.0, max=1.0, description=f"{description} Null: there is no cut.")


class ValidityCuts(_Explained):
    """The cut of each signal, chosen from the planted rows and the batch itself, and its estimated cost.

    One row per signal.
    """

    signal = _closed(Signal, primary_key=True, description="The signal.")
    cut = dy.Float64(
        nullable=True,
        description="Pairs whose evidence is at most this have the defect by this signal. The evidence is a pair's "
        "value relative to the planted rows, in their mean absolute deviations, averaged over both models.",
    )
    null_reason = _null_reason("cut", NoCutReason)
    missed = _share("Share of pairs with the defect that are expected above the cut.")
    defect_share = _share("Estimated share of the batch's pairs that have the defect.")
    defect_share_upper = _share("Upper 95 % bound of that share.")
    dropped = _share("Share of the batch's pairs that are at or below the cut.")
    false_share = _share("Estimated share of pairs with the defect among those above the cut.")
    num_planted = dy.Int64(min=0, description="Planted rows from which the cut is chosen.")
    num_pairs = dy.Int64(min=0, description="Pairs of the batch, or of the reference, from which the cut is chosen.")
    spreads = dy.List(SPREAD, description="Place and scale of the planted rows under each model; empty: no cut.")
    chosen_from = dy.List(
        dy.String(),
        description="The batches whose planted rows and pairs are used: this one, older ones, or a reference's.",
    )


SIGNAL_EVIDENCE = dy.Struct(
    {
        "signal": _closed(Signal, description="The signal."),
        "evidence": dy.Float64(
            nullable=True,
            description="The pair's value relative to the planted rows, in their mean absolute deviations, averaged "
            "over both models: low where the pair has the defect. Null: a model has no such score, or there is no cut.",
        ),
        "is_raised": dy.Bool(description="True if the pair has the defect by this signal."),
    }
)


class Validity(dy.Schema):
    """Each distinct pair, and whether the signals declare it valid."""

    pair_id = dy.String(primary_key=True, regex=_PAIR_ID, description="Content hash of system, history, query, answer.")
    invalid_by = _closed(
        Signal,
        nullable=True,
        description="The first signal that declares the pair invalid; null: it is valid. A signal whose setting is "
        "`flag` declares nothing.",
    )
    query_in_answer = dy.Float64(
        min=0.0, max=1.0, description="Share of the query's word sequences (up to 4 words) that occur in the answer."
    )
    answer_in_query = dy.Float64(
        min=0.0, max=1.0, description="Share of the answer's word sequences (up to 4 words) that occur in the query."
    )
    signals = dy.List(SIGNAL_EVIDENCE, description="The evidence of every signal, in their order.")


class RankReference(RmiScores):
    """A reference, a fixed set of batches: the scores, strata and ranks of its pairs under each model.

    The edges of the strata, the distribution of RMI within each stratum, and the cut of every selection follow from
    these rows.
    """

    model = dy.String(primary_key=True, description="Role of the model.")
    stratum_log_ppl_q = _nats(
        "log PPL(Q) that determines the stratum: the model's own or the strong model's; null: no rank."
    )
    stratum = dy.Int64(
        nullable=True, min=1, description="Stratum of PPL(Q) in the ranking pool, from 1; null: no rank."
    )
    num_strata = dy.Int64(min=1, description="Number of strata under the model.")
    rank = dy.Float64(
        nullable=True,
        min_exclusive=0.0,
        max=1.0,
        description="Rank of RMI within the stratum, in (0, 1]; ties get their average; null: no score.",
    )
    invalid_by = _closed(
        Signal,
        nullable=True,
        description="The signal that declares the pair invalid; null: it is valid, or not judged.",
    )

    @dy.rule()
    def ranked_in_a_stratum(cls) -> pl.Expr:
        ranked = pl.col("rank").is_not_null()
        return (pl.col("stratum").is_not_null() == ranked) & (pl.col("stratum_log_ppl_q").is_not_null() == ranked)


MODEL_RANK = dy.Struct(
    {
        "model": _MODEL,
        "stratum": RankReference.stratum,
        "num_strata": dy.Int64(min=0, description="Number of strata under the model; 0: no pair is ranked."),
        "rank": RankReference.rank,
    }
)


class DisagreementScores(_PairScores):
    """Strata, ranks, the gap between the strong and the weak model, and the pool on which they depend."""

    pool_id = dy.String(description="The ranking pool: batch:NAME or reference:NAME:VERSION.")
    gap = dy.Float64(
        nullable=True,
        min=-1.0,
        max=1.0,
        description="rank_strong - rank_weak (cognitive gap). High: only the strong model ranks the pair high.",
    )
    rank_sum = dy.Float64(nullable=True, min=0.0, max=2.0, description="rank_strong + rank_weak.")
    null_reason = _null_reason("gap")
    ranks = dy.List(MODEL_RANK, description="Stratum and rank under each model, models in alphabetical order.")


VERDICT = dy.Struct(
    {
        "selection": dy.String(description="Name of the selection."),
        "is_selected": dy.Bool(description="True if the selection takes this pair."),
        "reason": _closed(SelectionReason, description="Reason why the selection takes the pair or not."),
        "score": dy.Float64(nullable=True, description="The value that orders the selection."),
        "position": dy.Int64(
            nullable=True,
            description="Place of the pair in the order of the selection, from 1, among the pairs that no filter or "
            "condition excludes, also if a cap or a quota stops it; otherwise null.",
        ),
        "cut": dy.Float64(
            nullable=True,
            description="Score of the last pair taken in this batch or, with `ranking.pool: reference`, in the "
            "reference (random selections: always in this batch); with quotas, in the pair's group. Null if no pair or "
            "every eligible pair was taken there, and for rmi_band without quotas, which has no budget.",
        ),
        "pool_size": dy.Int64(description="Pairs in the selection's pool."),
    }
)

MODEL_SCORE = dy.Struct(
    {
        "model": _MODEL,
        "rmi": RmiScores.rmi,
        **{name: column for name, column in RmiScores.columns().items() if name != "pair_id" and "reason" not in name},
        **MODEL_RANK.inner,
        "null_reason": _closed(
            NullReason,
            nullable=True,
            description="Reason why RMI or IFD is null, if `scoring.quantities` asks for it (RMI's reason if both are "
            "null); otherwise null.",
        ),
        "null_reason_end": _closed(
            NullReason, nullable=True, description="Reason why a requested nll_end is null; otherwise null."
        ),
    }
)


class Decisions(_RowKey):
    """The decision about every delivered row under every named selection, with its reason and numbers."""

    pair_id = RawData.pair_id
    decision = _closed(Decision, description="Decision under the published selection.")
    reason = _closed(
        SelectionReason,
        RejectReason,
        WithdrawalReason,
        ContaminationReason,
        DuplicateReason,
        HoldOutReason,
        NullReason,
        GateReason,
        description="Reason for the decision.",
    )
    explanation = dy.String(min_length=1, description="The reason as a sentence, with its numbers.")
    duplicate_of = ScreenedData.duplicate_of
    similarity = ScreenedData.similarity
    evidence = ScreenedData.evidence
    gap = DisagreementScores.gap
    rank_sum = DisagreementScores.rank_sum
    scores = dy.List(MODEL_SCORE, description="Scores and ranks by model; empty if the pair was not scored.")
    verdicts = dy.List(
        VERDICT, description="Result of every named selection and control; empty if the pair was not scored."
    )
    provenance_id = dy.String(
        regex=_PAIR_ID, description="Hash of the provenance of this decision, and name of its file in provenance/."
    )


class PlantedRows(dy.Schema):
    """Pairs of the batch made bad on purpose, to validate the scores. They enter no decision and no dataset."""

    pair_id = dy.String(primary_key=True, regex=_PAIR_ID, description="Content hash of the defective pair.")
    defect = _closed(Defect, description="The defect that was planted.")
    original_pair_id = dy.String(
        regex=_PAIR_ID, description="The pair of the batch from which it was made: its original."
    )
    system = dy.String(nullable=True, description="The row's own system text.")
    history = RawData.history
    query = dy.String(min_length=1, description="Q; differs from the original's for invented_terms only.")
    answer = dy.String(min_length=1, description="A; equals the original's for invented_terms only.")


class PlantedScores(RmiScores):
    """The scores of each planted pair under one model, not yet ranked, with the columns of rmi_scores."""


CLEAN = "clean"
"""The value of `defect` for rows as delivered."""

BOTH_MODELS = "strong-weak"
"""The value of `model` for a number that needs both models; no model can have this name."""


class Calibration(_Explained):
    """A validation of the scores by planted defects: how well they separate original pairs from planted ones.

    One number per row.
    """

    statistic = _closed(Statistic, primary_key=True, description="The statistic.")
    defect = dy.String(
        primary_key=True,
        check=lambda column: column.is_in([CLEAN, *Defect]),
        description=f"Defect of the planted rows; `{CLEAN}`: the rows as delivered. One of: {CLEAN}, "
        f"{', '.join(Defect)}.",
    )
    model = dy.String(
        primary_key=True, description=f"Role of the model; `{BOTH_MODELS}` if the number needs both models."
    )
    measure = dy.String(
        primary_key=True,
        description="The score that is judged; for kept_share, the named selection; for dropped_share, the signal or "
        "`valid`.",
    )
    value = dy.Float64(
        nullable=True,
        description="auroc: the probability that a row as delivered scores above a planted one, a tie counted half. "
        "paired_share, kept_share, dropped_share: a share. Null: see null_reason.",
    )
    lower = dy.Float64(nullable=True, description="Lower end of the 95 % interval; null if there is none.")
    upper = dy.Float64(nullable=True, description="Upper end of the 95 % interval; null if there is none.")
    num_clean = dy.Int64(min=0, description="Number of original rows, as delivered, from which the value is computed.")
    num_planted = dy.Int64(min=0, description="Number of planted rows from which the value is computed.")
    num_kept = dy.Int64(nullable=True, min=0, description="kept_share and dropped_share: rows that are counted.")
    null_reason = _null_reason("value", UnknownReason)


class TrainingTrial(dy.Schema):
    """A training trial of a published version: the loss of every measured answer under every trained model.

    All arms are trained by the same amount. The differences between arms are computed from this table.
    """

    measure = dy.String(primary_key=True, description="held_out, or the name of a benchmark.")
    arm = dy.String(
        primary_key=True,
        description="The rows that the model was trained on: a named selection, one of its random controls drawn anew, "
        "everything, or untrained.",
    )
    seed = dy.Int64(primary_key=True, min=0, description="Seed of the order of the rows, and of random draws.")
    item = dy.String(primary_key=True, description="pair_id of the held-out pair, or id of the benchmark's task.")
    num_tokens = dy.Int64(min=1, metadata={"unit": "tokens"}, description="Number of tokens of the answer.")
    nll = dy.Float64(
        min=0.0,
        metadata={"unit": "nats"},
        description="Sum of -ln p over the tokens of the answer after the query.",
    )


class SelectedSubset(_RowKey):
    """The rows of the published selection, best first: text and origin, without scores."""

    position = dy.Int64(min=1, description="Place in the selection's order, from 1.")
    pair_id = dy.String(regex=_PAIR_ID, description="Content hash of system, history, query, answer.")
    system = RawData.system
    history = RawData.history
    query = dy.String(description="Q, as delivered.")
    answer = dy.String(description="A, as delivered.")
    reasoning = RawData.reasoning
    source = RawData.source
    language = RawData.language


class Difference(_RowKey):
    """The rows that are in only one of two versions of the published selection."""

    pair_id = dy.String(primary_key=True, regex=_PAIR_ID, description="Content hash of system, history, query, answer.")
    is_added = dy.Bool(description="True if the row is in the newer version, false if in the older.")
    change = _closed(Change, description="Reason for the change.")
    decision_before = dy.String(nullable=True, description="Decision in the older version; null: not in it.")
    reason_before = dy.String(nullable=True, description="Reason for that decision.")
    decision_after = dy.String(nullable=True, description="Decision in the newer version; null: not in it.")
    reason_after = dy.String(nullable=True, description="Reason for that decision.")


class TableError(ValueError):
    """A frame does not fit its table: an error in the code, raised before anything is written."""


def dtypes(schema: type[dy.Schema]) -> dict[str, pl.DataType]:
    """Return the Polars dtypes of a table's columns, in order, as needed for an empty frame."""
    return {name: column.dtype for name, column in schema.columns().items()}


def enforce(schema: type[dy.Schema], frame: pl.DataFrame) -> pl.DataFrame:
    """Return `frame` with exactly the declared columns, in order.

    Raises:
        TableError: a column is missing, is undeclared or has the wrong dtype, or rows break a rule; the text names the
            columns and rules, the number of rows that break each, and one example.
    """
    expected = dtypes(schema)
    undeclared = [name for name in frame.columns if name not in expected]
    missing = [name for name in expected if name not in frame.columns]
    if undeclared or missing:
        raise TableError(f"{schema.__name__}: columns missing {missing}, columns not declared {undeclared}")
    wrong = {n: f"{frame.schema[n]}, not {d}" for n, d in expected.items() if frame.schema[n] != d}
    if wrong:
        raise TableError(f"{schema.__name__}: columns of the wrong type: {wrong}")
    valid, failures = schema.filter(frame.select(list(expected)))
    counts = failures.counts()
    if counts:
        example = failures.invalid().select(schema.primary_key()).row(0, named=True)
        broken = ", ".join(f"{rule} ({count} rows)" for rule, count in counts.items())
        raise TableError(f"{schema.__name__}: rows break the rules {broken}; first example: {example}")
    return valid
