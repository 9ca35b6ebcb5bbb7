"""A frozen pool of several batches' pairs: the ranks of other pairs against it, and how far a batch drifts from it.

Belongs here: what a reference is made of, what follows from it, and drift. Does not belong here: ranks inside a pool
(`strata`), what is taken by a selection's cut (`selection`), and where a reference is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import RankingSettings
from qaq_pipeline.schema.tables import RankReference, RmiScores, dtypes
from qaq_pipeline.selection import ranks, strategies
from qaq_pipeline.selection.disagreement_scores import disagreement

DRIFT_BINS = 10
_POOL = "reference"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the models' numbers of a batch lie from those of a reference."""

    statistics: Mapping[str, float]
    """`psi_<quantity>_<model>`, the population stability index of the reference's deciles, and `ks_<quantity>_<model>`,
    the two-sample Kolmogorov-Smirnov statistic in [0, 1], of log_ppl_q and rmi; 0 where the numbers are equal."""
    evidence: float
    """The least n m / (n + m) of a model, of n pairs of the batch and m of the reference: chance alone makes a PSI of
    about 9 / evidence."""


def pool_id(name: str, version: str) -> str:
    """How a reference is called in the column pool_id."""
    return f"{_POOL}:{name}:{version}"


def pool_of(batch: str, ranking: RankingSettings, version: str | None) -> str:
    """The pool_id that the ranks of a batch should have: of itself, or of the reference.

    Args:
        batch: name of the batch.
        ranking: which pool, and which reference.
        version: data version of the stored reference; None: there is none.
    """
    if ranking.pool == "batch" or ranking.reference is None:
        return f"batch:{batch}"
    return pool_id(ranking.reference.name, version or "not made yet")


def name_in(pool: str) -> str | None:
    """The name of the reference that a pool_id names; None: it names a batch."""
    kind, name, *_ = pool.split(":")
    return name if kind == _POOL else None


def freeze(batches: Sequence[Mapping[str, pl.DataFrame]], ranking: RankingSettings) -> tuple[pl.DataFrame, list[str]]:
    """The RankReference of some batches, and warnings as sentences.

    Args:
        batches: RmiScores by role, of each batch; a pair of several batches counts as in the first of them.
        ranking: how strata are made.

    Raises:
        ValueError: the roles' frames of a batch do not hold the same pairs, or a model can rank none of them.
    """
    for batch in batches:
        ranks.pools(batch, ranking)
    scores = {
        role: pl.concat([batch[role] for batch in batches]).unique("pair_id", keep="first", maintain_order=True)
        for role in batches[0]
    }
    pools = ranks.pools(scores, ranking)
    unranked = [role for role, pool in pools.items() if pool["rmi"].count() == 0]
    if unranked:
        raise ValueError(f"no pair can be ranked under the models {unranked}; see the null reasons in rmi_scores")
    columns = dtypes(RankReference)
    frames = [
        ranks.rank_pool(pool, ranking)
        .select("pair_id", "stratum", "num_strata", "rank", model=pl.lit(role), stratum_log_ppl_q="log_ppl_q")
        .join(scores[role], on="pair_id", validate="1:1", maintain_order="left")
        .select(list(columns))
        for role, pool in pools.items()
    ]
    return pl.concat(frames), ranks.few_strata_warnings(pools, ranking)


def candidates(reference: pl.DataFrame, roles: Sequence[str]) -> pl.DataFrame:
    """The reference's own pairs as `selection.candidates`: what a selection takes of them is its cut for all batches.

    Raises:
        ValueError: the reference lacks a role.
    """
    frozen = _by_role(reference, roles)
    ranked = {role: frame.with_columns(null_reason="null_reason_rmi") for role, frame in frozen.items()}
    scores = {role: frame.select(list(dtypes(RmiScores))) for role, frame in frozen.items()}
    return strategies.candidates(disagreement(ranked, _POOL), scores)


def _by_role(reference: pl.DataFrame, roles: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Its rows of each role, in the order in which they are stored, by pair_id."""
    known = reference["model"].unique().to_list()
    missing = sorted(set(roles) - set(known))
    if missing:
        raise ValueError(f"the reference knows the models {sorted(known)}, not {missing}; make a new one")
    return {role: reference.filter(pl.col("model") == role) for role in sorted(roles)}


def disagreement_scores(
    scores: Mapping[str, pl.DataFrame], reference: pl.DataFrame, ranking: RankingSettings, pool: str
) -> pl.DataFrame:
    """DisagreementScores of each role's RmiScores against a reference, sorted by pair_id; of its own pairs, as in it.

    stratum = the first whose last pair has (log_ppl_q, pair_id) not below the row's; beyond all, the last stratum
    rank    = min(1, (less + (equal + 1) / 2) / m), of the m RMIs of that stratum of the reference

    Args:
        scores: RmiScores of the batch by role.
        reference: RankReference.
        ranking: under which the reference was frozen.
        pool: its pool_id.

    Raises:
        ValueError: as `strata.disagreement_scores`, or the reference lacks a role.
    """
    pools = ranks.pools(scores, ranking)
    frozen = _by_role(reference, list(pools))
    ranked = {role: _rank_against(pool_of_role, frozen[role]) for role, pool_of_role in pools.items()}
    return disagreement(ranked, pool)


def _rank_against(pool: pl.DataFrame, frozen: pl.DataFrame) -> pl.DataFrame:
    """A pool of `strata.pools` with stratum, num_strata and rank; null where the pair is not ranked."""
    numbered = pool.with_row_index("row")
    inside = numbered.filter(pl.col("rmi").is_not_null())
    stratum = _strata_against(inside, frozen)
    ranks = inside.select("row", stratum=stratum, rank=_ranks_against(inside["rmi"], stratum, frozen))
    return numbered.join(ranks, on="row", how="left", maintain_order="left", validate="1:1").with_columns(
        num_strata=pl.lit(frozen["num_strata"][0], pl.Int64)
    )


def _strata_against(inside: pl.DataFrame, frozen: pl.DataFrame) -> pl.Series:
    """1 + the edges below the row's (log_ppl_q, pair_id). The last stratum has no edge: it is open."""
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


# --- drift ----------------------------------------------------------------------------------------------------------


def drift(scores: Mapping[str, pl.DataFrame], reference: pl.DataFrame) -> Drift:
    """How far log_ppl_q and rmi of a batch lie from those of a reference. Pairs without an RMI are left out, and so is
    a model without any.

    Args:
        scores: RmiScores of the batch by role.
        reference: RankReference.

    Raises:
        ValueError: the reference lacks a role.
    """
    statistics: dict[str, float] = {}
    evidence = []
    for role, frozen in _by_role(reference, list(scores)).items():
        own, others = frozen.drop_nulls("rmi"), scores[role].drop_nulls("rmi")
        evidence.append(own.height * others.height / (own.height + others.height))
        if others.is_empty():
            continue
        for quantity in ("log_ppl_q", "rmi"):
            r, b = (np.sort(frame[quantity].to_numpy()) for frame in (own, others))
            statistics |= {f"psi_{quantity}_{role}": _psi(r, b), f"ks_{quantity}_{role}": _ks(r, b)}
    return Drift(statistics, min(evidence))


def _psi(of_reference: np.ndarray, of_batch: np.ndarray) -> float:
    """The sum of (b - r) ln(b / r) over the reference's deciles, b and r the shares of batch and reference in each.

    A share is (rows + 1/2) / (all rows + bins / 2), so that an empty bin has a logarithm. Equal edges count once. Both
    arguments are sorted.
    """
    places = np.arange(1, DRIFT_BINS) * of_reference.size // DRIFT_BINS
    edges = np.unique(of_reference[places])
    shares = []
    for values in (of_reference, of_batch):
        rows = np.bincount(np.searchsorted(edges, values, side="right"), minlength=edges.size + 1)
        shares.append((rows + 0.5) / (values.size + 0.5 * rows.size))
    r, b = shares
    return float(np.sum((b - r) * np.log(b / r)))


def _ks(of_reference: np.ndarray, of_batch: np.ndarray) -> float:
    """The maximum over x of |share of the reference up to x - share of the batch up to x|."""
    from scipy import stats

    with np.errstate(divide="ignore"):  # In the p-value of one pair against one, which nobody reads.
        return float(stats.ks_2samp(of_reference, of_batch, method="asymp").statistic)
