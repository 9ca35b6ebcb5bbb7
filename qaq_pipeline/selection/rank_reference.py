"""The pairs of a fixed set of batches, and the ranks of other pairs against them.

Belongs here: the contents of a reference, its name, and what follows from it. Does not belong here: ranks inside a
batch's own pool (`ranks`), the cut of a selection (`verdicts`), how far a batch drifts from it (`drift`), and where a
reference is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.long_form import by_pair
from qaq_pipeline.schema.tables import RankReference, RmiScores, Validity, dtypes
from qaq_pipeline.selection import ranks
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.disagreement_scores import disagreement

_POOL = "reference"

RANKED_BY = ("pair_id", "model", "stratum", "num_strata", "stratum_log_ppl_q", "rmi")
"""The columns of RankReference that other pairs are ranked by."""


def pool_id(name: str, version: str) -> str:
    """The name of a reference in the column pool_id."""
    return f"{_POOL}:{name}:{version}"


def pool_of(batch: str, ranking: RankingSettings, version: str | None) -> str:
    """The pool_id that the ranks of a batch should have: the batch's own, or the reference's.

    Args:
        batch: name of the batch.
        ranking: which pool, and which reference.
        version: data version of the stored reference; None: there is none.
    """
    if ranking.pool == "batch" or ranking.reference is None:
        return f"batch:{batch}"
    return pool_id(ranking.reference.name, version or "not made yet")


def name_in(pool: str) -> str | None:
    """The name of the reference in a pool_id; None: the pool is a batch."""
    kind, name, *_ = pool.split(":")
    return name if kind == _POOL else None


def freeze(
    batches: Sequence[Mapping[str, pl.DataFrame]], ranking: RankingSettings, validity: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, list[str]]:
    """The RankReference of some batches, and warnings as sentences.

    Args:
        batches: RmiScores by model, of each batch; a pair of several batches has its scores of the first of them.
        ranking: how strata are made.
        validity: Validity of these pairs, each once; None: they are not judged.

    Raises:
        ValueError: the models' frames of a batch do not hold the same pairs, or a model can rank none of them.
    """
    for batch in batches:
        ranks.pools(batch, ranking)
    first, *others = batches
    scores = {role: by_pair(_each_once([frame, *(batch[role] for batch in others)])) for role, frame in first.items()}
    pools = ranks.pools(scores, ranking)
    unranked = [role for role, pool in pools.items() if pool["rmi"].count() == 0]
    if unranked:
        raise ValueError(f"the models {unranked} can rank no pair; see the null reasons in rmi_scores")
    invalid_by = _invalid_by(scores["strong"], validity)
    ranked = {role: rows.drop("rmi") for role, rows in by_model(ranked_pool(pools, ranking), list(pools)).items()}
    of_models = (
        pl.concat([rows.drop("pair_id"), scores[role], invalid_by], how="horizontal") for role, rows in ranked.items()
    )
    return pl.concat(of_models).select(list(dtypes(RankReference))), ranks.few_strata_warnings(pools, ranking)


def _each_once(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The pairs of all batches; a pair of several has its scores of the first."""
    if len(frames) == 1:
        return frames[0]
    return pl.concat(frames).unique("pair_id", keep="first", maintain_order=True)


def _invalid_by(pairs: pl.DataFrame, validity: pl.DataFrame | None) -> pl.DataFrame:
    """The signal that declares each of these pairs invalid."""
    judged = pl.DataFrame(schema=dtypes(Validity)) if validity is None else validity
    invalid_by = judged.select("pair_id", "invalid_by")
    joined = pairs.select("pair_id").join(invalid_by, on="pair_id", how="left", validate="1:1", maintain_order="left")
    return joined.select("invalid_by")


def ranked_pool(pools: Mapping[str, pl.DataFrame], ranking: RankingSettings) -> pl.DataFrame:
    """`RANKED_BY` and rank of the pairs of `ranks.pools`, sorted by model and pair_id."""
    ranked = ranks.rank_pools(pools, ranking)
    return ranked.select("pair_id", "model", "stratum", "num_strata", "rank", "rmi", stratum_log_ppl_q="log_ppl_q")


def reference_candidates(reference: pl.DataFrame, roles: Sequence[str]) -> pl.DataFrame:
    """The reference's own pairs as `candidates`: a selection's last pair among them is its cut for every batch.

    Raises:
        ValueError: the reference lacks a model.
    """
    frozen = by_model(reference, roles)
    ranked = pl.concat(frozen.values()).with_columns(null_reason="null_reason_rmi")
    scores = {role: frame.select(list(dtypes(RmiScores))) for role, frame in frozen.items()}
    judged = frozen["strong"].select("pair_id", "invalid_by")
    return with_validity(candidates(disagreement(ranked, _POOL), scores), judged)


def by_model(reference: pl.DataFrame, roles: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The rows of each model, in the order in which they are stored, by pair_id.

    Raises:
        ValueError: the reference lacks a model.
    """
    known = reference["model"].unique().to_list()
    missing = sorted(set(roles) - set(known))
    if missing:
        raise ValueError(
            f"the reference has scores of the models {sorted(known)}, not of {missing}; build one under another name"
        )
    return {role: reference.filter(pl.col("model") == role) for role in sorted(roles)}


def disagreement_scores(
    scores: Mapping[str, pl.DataFrame], reference: pl.DataFrame, ranking: RankingSettings, pool: str
) -> pl.DataFrame:
    """DisagreementScores of a batch against a reference, sorted by pair_id; the reference's own pairs keep its ranks.

    stratum = the first whose last pair has (log_ppl_q, pair_id) not below the row's; beyond all, the last stratum
    rank    = min(1, (less + (equal + 1) / 2) / m), of the m RMIs of that stratum of the reference

    Args:
        scores: RmiScores of the batch by model.
        reference: RankReference, or `RANKED_BY` of it.
        ranking: the settings with which the reference was frozen.
        pool: its pool_id.

    Raises:
        ValueError: as `disagreement_scores.disagreement_scores`, or the reference lacks a model.
    """
    pools = ranks.pools(scores, ranking)
    frozen = by_model(reference, list(pools))
    ranked = [_rank_against(in_pool, frozen[role]).with_columns(model=pl.lit(role)) for role, in_pool in pools.items()]
    return disagreement(pl.concat(ranked), pool)


def _rank_against(pool: pl.DataFrame, frozen: pl.DataFrame) -> pl.DataFrame:
    """A pool of `ranks.pools` with stratum, num_strata and rank; null where the pair is not ranked."""
    numbered = pool.with_row_index("row")
    inside = numbered.filter(pl.col("rmi").is_not_null())
    stratum = _strata_against(inside, frozen)
    ranks = inside.select("row", stratum=stratum, rank=_ranks_against(inside["rmi"], stratum, frozen))
    return numbered.join(ranks, on="row", how="left", maintain_order="left", validate="1:1").with_columns(
        num_strata=pl.lit(frozen["num_strata"][0], pl.Int64)
    )


def _strata_against(inside: pl.DataFrame, frozen: pl.DataFrame) -> pl.Series:
    """1 + the number of edges below the row's (log_ppl_q, pair_id). The last stratum is open: it has no edge."""
    edges = (
        frozen.drop_nulls("stratum")
        .sort("stratum_log_ppl_q", "pair_id")
        .group_by("stratum", maintain_order=True)
        .agg(pl.col("stratum_log_ppl_q").last(), edge_pair_id=pl.col("pair_id").last())
        .head(-1)
    )
    below = np.searchsorted(edges["stratum_log_ppl_q"].to_numpy(), inside["log_ppl_q"].to_numpy(), side="left")
    level = inside.select("pair_id", "log_ppl_q", place=pl.int_range(pl.len())).join(
        edges, left_on="log_ppl_q", right_on="stratum_log_ppl_q"
    )
    np.add.at(below, level.filter(pl.col("edge_pair_id") < pl.col("pair_id"))["place"].to_numpy(), 1)
    return pl.Series("stratum", below + 1, dtype=pl.Int64)


def _ranks_against(rmi: pl.Series, stratum: pl.Series, frozen: pl.DataFrame) -> pl.Series:
    values, strata_of_rows = rmi.to_numpy(), stratum.to_numpy()
    ranks = np.empty(values.size)
    ranked = frozen.drop_nulls("stratum").sort("stratum", "rmi")
    for (number,), peers in ranked.select("stratum", "rmi").partition_by("stratum", as_dict=True).items():
        rows = np.flatnonzero(strata_of_rows == number)
        of_stratum = peers["rmi"].to_numpy()
        less = np.searchsorted(of_stratum, values[rows], side="left")
        equal = np.searchsorted(of_stratum, values[rows], side="right") - less
        ranks[rows] = np.minimum(1.0, (less + (equal + 1) / 2) / of_stratum.size)
    return pl.Series("rank", ranks)
