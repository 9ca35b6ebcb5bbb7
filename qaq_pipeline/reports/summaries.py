"""Summaries for pages and plots: small frames of counts, shares, bins and examples. Polars only.

Belongs here: computing the numbers that a person reads. Does not belong here: drawing (`plots`), the content of pages
(`pages`), and the measurements of asset checks (`check_metrics`).

The input is one flat frame in the order of the rows' keys: `page_rows`, or any other with columns of these names.
Scores and ranks count each distinct pair once; decisions count every delivered row.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from qaq_pipeline.config.selections import CONTROL_PREFIX
from qaq_pipeline.schema.vocabularies import INVALID_REASONS, Decision
from qaq_pipeline.selection import decisions

TAIL = 0.05
"""Share of a stratum in each tail of RMI: possible mismatches in the low tail, possible echoes in the high one."""

SELECTED = "is_selected:"
"""Before the name of a selection in the name of a column."""

_STANDS_FOR_NO_PAIR = [
    d.value
    for d in (Decision.DUPLICATE, Decision.CONTAMINATED, Decision.WITHDRAWN, Decision.HELD_OUT, Decision.BETWEEN)
]
_LONGEST_LABEL = 24
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control, invisible and direction characters, except line feeds and tabs."""
_IN_PART = 0.001
"""Share of pairs at each end of an axis that a plot may leave out."""

_GATES = "batch passed its gates"
_NOT_HELD_OUT, _ON_ONE_SIDE = "not held out", "not between"
_VALID, _TAKEN = "valid", "selected"
_INVALID = [reason.value for reason in INVALID_REASONS.values()]
_STEPS = (
    (Decision.REJECTED, "readable"),
    (Decision.WITHDRAWN, "not withdrawn"),
    (Decision.CONTAMINATED, "not contaminated"),
    (Decision.DUPLICATE, "not a duplicate"),
    (Decision.HELD_OUT, _NOT_HELD_OUT),
    (Decision.BETWEEN, _ON_ONE_SIDE),
    (Decision.BATCH_GATED, _GATES),
    (Decision.UNSCORABLE, "scorable"),
    (Decision.NOT_SELECTED, _TAKEN),
)
"""Each decision except `selected`, in the order in which rows leave, and the label of the rows that remain."""


def roles(columns: Sequence[str]) -> list[str]:
    """Return the roles of the models that have columns of these names."""
    return sorted(name.removeprefix("stratum_") for name in columns if name.startswith("stratum_"))


def selections(flat: pl.DataFrame) -> list[str]:
    """Return the names of the selections, the published one first, the controls last."""
    return [name.removeprefix(SELECTED) for name in flat.columns if name.startswith(SELECTED)]


def pairs(flat: pl.DataFrame) -> pl.DataFrame:
    """Return the representative row of each distinct scored pair, with its place in the frame as `row`, from 0.

    `is_selected` is the published selection's.
    """
    tokens = [pl.col(f"num_q_tokens_{role}") for role in roles(flat.columns)]
    representatives = (
        flat.lazy()
        .select("pair_id", pl.col("decision").is_in(_STANDS_FOR_NO_PAIR).alias("stands_for_none"), *tokens)
        .with_row_index("row")
        .filter(pl.any_horizontal(pl.lit(False), *(count.is_not_null() for count in tokens)))
        .select("row", "pair_id", "stands_for_none")
        .sort("stands_for_none", maintain_order=True)
        .unique("pair_id", keep="first", maintain_order=True)
        .collect()["row"]
    )
    return flat[representatives].with_columns(representatives, is_selected=_is_selected())


def num_selected(flat: pl.DataFrame) -> int:
    """Count the rows that the published selection takes."""
    return int(flat.select(_is_selected().sum()).item())


# --- rows -----------------------------------------------------------------------------------------------------------


def by_reason(flat: pl.DataFrame) -> pl.DataFrame:
    """Count the rows by decision and reason, as `selection.decisions.by_reason`, in words."""
    return decisions.by_reason([flat]).with_columns(pl.col("decision", "reason").cast(pl.String))


def flow(flat: pl.DataFrame) -> pl.DataFrame:
    """Count the rows that remain and that leave at each step, from delivered to selected, as step, rows, left.

    The gates are a step only if a batch failed one; held-out and invalid rows only if there are any.
    """
    counts = dict(flat.group_by("decision").len().iter_rows())
    leaving = {"delivered": 0} | {step: counts.get(decision.value, 0) for decision, step in _STEPS}
    is_invalid = (pl.col("decision") == Decision.NOT_SELECTED.value) & pl.col("reason").is_in(_INVALID)
    invalid = int(flat.select(is_invalid.sum()).item())
    selected = leaving.pop(_TAKEN) - invalid
    leaving |= {_VALID: invalid, _TAKEN: selected}
    steps = pl.DataFrame({"step": list(leaving), "left": pl.Series(leaving.values(), dtype=pl.Int64)})
    may_be_absent = pl.col("step").is_in([_GATES, _NOT_HELD_OUT, _ON_ONE_SIDE, _VALID])
    shown = steps.filter(~may_be_absent | (pl.col("left") > 0))
    return shown.select("step", rows=flat.height - pl.col("left").cum_sum(), left="left")


def kept_by(flat: pl.DataFrame, column: str, most: int = 12) -> pl.DataFrame:
    """Count value, rows, selected, share by the most frequent values of a column, with the rest in one row."""
    by_value = flat.group_by(value=column).agg(rows=pl.len(), selected=_is_selected().sum())
    named = by_value.with_columns(pl.col("value").cast(pl.String).fill_null("not stated"))
    counts = named.group_by("value").agg(pl.col("rows", "selected").sum())
    ordered = counts.sort("rows", "value", descending=[True, False])
    rest = ordered.slice(most)
    shown = ordered.head(most) if rest.height > 1 else ordered
    shown = shown.with_columns(value=pl.Series(_as_labels(shown["value"].to_list()), dtype=pl.String))
    if rest.height > 1:
        others = rest.select(pl.lit(f"{rest.height} others").alias("value"), pl.col("rows", "selected").sum())
        shown = pl.concat([shown, others])
    return _with_share(shown)


def _as_labels(names: Sequence[str]) -> list[str]:
    """Return one-line labels of a plot: long names lose their middle, and equal labels get a number."""
    labels: list[str] = []
    for name in names:
        seen = " ".join(visible(name).split())
        label = shortened(seen, _LONGEST_LABEL)
        alike = itertools.chain([label], (f"{label[: _LONGEST_LABEL - 4]} ({n})" for n in itertools.count(2)))
        labels.append(next(one for one in alike if one not in labels))
    return labels


def shortened(text: str, most: int) -> str:
    """Return the text without its middle if it is longer than `most`, since names of batches differ at the ends."""
    if len(text) <= most:
        return text
    end = max(most - 1, 2) // 2
    return f"{text[: max(most - 1, 2) - end]}…{text[-end:]}"


def visible(text: str) -> str:
    """Return the text with every invisible character, and every mark of reading direction, as ⟦U+202E⟧.

    Line feeds and tabs stay.
    """
    return _UNSEEN.sub(lambda found: f"⟦U+{ord(found[0]):04X}⟧", text)


def _with_share(counts: pl.DataFrame) -> pl.DataFrame:
    return counts.with_columns(
        pl.col("rows", "selected").cast(pl.Int64), share=pl.col("selected") / pl.col("rows").cast(pl.Float64)
    )


def overlap(flat: pl.DataFrame) -> pl.DataFrame:
    """Count the pairs that two selections share, as first, second, both, of_first (share of the first one's pairs)."""
    taken = {name: flat[f"{SELECTED}{name}"].fill_null(value=False) for name in selections(flat)}
    sizes = {name: int(is_taken.sum()) for name, is_taken in taken.items()}
    rows = [
        (a, b, both := int((taken[a] & taken[b]).sum()), both / sizes[a] if sizes[a] else None)
        for a, b in itertools.product(taken, taken)
    ]
    columns = {"first": pl.String, "second": pl.String, "both": pl.Int64, "of_first": pl.Float64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def sizes(flat: pl.DataFrame, published: str) -> list[tuple[str, str, int, int | None, int]]:
    """List name, kind, pairs and answer tokens of each selection, and the pairs that the published one also takes."""
    tokens = pl.col("num_a_tokens_strong") if "num_a_tokens_strong" in flat.columns else pl.lit(None, pl.Int64)
    found = []
    for name in selections(flat):
        is_taken = pl.col(f"{SELECTED}{name}").fill_null(value=False)
        kind = "control" if name.startswith(CONTROL_PREFIX) else "published" if name == published else "named"
        size, both = flat.select(is_taken.sum(), (is_taken & _is_selected()).sum().alias("both")).row(0)
        used = flat.select(tokens.filter(is_taken).sum()).item() if "num_a_tokens_strong" in flat.columns else None
        found.append((name, kind, size, used, both))
    return found


def _is_selected() -> pl.Expr:
    return pl.col("decision") == Decision.SELECTED.value


# --- numbers of pairs -----------------------------------------------------------------------------------------------


def strata(pairs: pl.DataFrame, role: str) -> pl.DataFrame:
    """Summarise each stratum of a model's PPL(Q): edges, rows, selected, share, and RMI at both tails and the median.

    If the strata come from another model (`ranking.strata_from`), they have no edges on this model's axis: their
    ranges overlap, and `has_edges` is false.
    """
    rmi = pl.col(f"rmi_{role}")
    columns = [f"stratum_{role}", f"rmi_{role}"]
    known = pairs.select(*columns, f"log_ppl_q_{role}", "is_selected").drop_nulls(columns)
    return _with_share(
        known.group_by(stratum=f"stratum_{role}")
        .agg(
            low=pl.col(f"log_ppl_q_{role}").min(),
            high=pl.col(f"log_ppl_q_{role}").max(),
            rows=pl.len(),
            selected=pl.col("is_selected").sum(),
            low_tail=rmi.quantile(TAIL, "lower"),
            median=rmi.median(),
            high_tail=rmi.quantile(1 - TAIL, "higher"),
        )
        .sort("stratum")
    )


def has_edges(strata: pl.DataFrame) -> bool:
    """Return whether every stratum begins at or above the end of the one before."""
    return bool((strata["low"][1:] >= strata["high"][:-1]).all())


def density(pairs: pl.DataFrame, role: str) -> pl.DataFrame:
    """Count pairs by log PPL(Q) and RMI of a model, nats/token, as x, x2, y, y2, rows; empty cells are left out.

    A thousandth of the pairs at each end of each axis may lie outside.
    """
    known = pairs.select(x=f"log_ppl_q_{role}", y=f"rmi_{role}").drop_nulls()
    return _grid(known, _edges(known["x"], 40), _edges(known["y"], 28))


def rank_grid(pairs: pl.DataFrame, bins: int = 20) -> pl.DataFrame:
    """Count pairs by rank under both models, as x, x2, y, y2, rows, selected, share; no selection gives 0."""
    ranks = {"x": "rank_strong", "y": "rank_weak"}
    if not set(ranks.values()) <= set(pairs.columns):
        pairs = pl.DataFrame(schema=dict.fromkeys(ranks.values(), pl.Float64))
    chosen = pl.col("is_selected") if "is_selected" in pairs.columns else pl.lit(None, pl.Boolean)
    known = pairs.select(chosen.alias("is_selected"), **ranks).drop_nulls(["x", "y"])
    edges = np.linspace(0, 1, bins + 1)
    cells = _grid(known, edges, edges, selected=pl.col("is_selected").sum().cast(pl.Int64))
    return cells.with_columns(share=pl.col("selected") / pl.col("rows"))


def _edges(values: pl.Series, bins: int) -> np.ndarray:
    """Return equal steps over the values, without a thousandth at each end; a single value gets one step around it."""
    low, high = (float(values.quantile(end, how) or 0) for end, how in ((_IN_PART, "lower"), (1 - _IN_PART, "higher")))
    return np.linspace(low, high, bins + 1) if low < high else np.array([low - 0.5, high + 0.5])


def _grid(points: pl.DataFrame, x_edges: np.ndarray, y_edges: np.ndarray, **counts: pl.Expr) -> pl.DataFrame:
    """Count the points x, y by cell (edge, edge]; the first cell is closed on both sides."""
    for axis, edges in (("x", x_edges), ("y", y_edges)):
        points = points.filter(pl.col(axis).is_between(edges[0], edges[-1]))
        place = np.maximum(np.searchsorted(edges, points[axis].to_numpy()) - 1, 0)
        points = points.with_columns(pl.Series(axis, edges[place]), pl.Series(f"{axis}2", edges[place + 1]))
    cells = points.group_by("x", "x2", "y", "y2").agg(rows=pl.len().cast(pl.Int64), **counts)
    return cells.sort("x", "y")


def lengths(groups: dict[str, pl.Series]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Summarise the lengths of texts by group of pairs.

    Args:
        groups: number of tokens of every pair, by the group's name.

    Returns:
        group, low, high, share: the share of the group's pairs in [low, high) tokens; 24 bins of equal width on a
            logarithmic axis, the same for all groups.
        group, pairs, p5, median, mean, p95: tokens.
    """
    known = {group: values for group, values in groups.items() if not values.is_empty()}
    longest = max((max(values) for values in known.values()), default=0)
    edges = np.unique(np.floor(np.geomspace(1, longest + 1, 25)))
    quantiles = {"p5": TAIL, "median": 0.5, "p95": 1 - TAIL}
    said = [
        {"group": group, "pairs": len(values), "mean": values.mean()}
        | {name: values.quantile(share, "nearest") for name, share in quantiles.items()}
        for group, values in known.items()
    ]
    schema = {"group": pl.String, "pairs": pl.Int64} | dict.fromkeys(("p5", "median", "mean", "p95"), pl.Float64)
    at_least_one = {group: values.clip(1) for group, values in known.items()}
    return _shares(at_least_one, edges), pl.DataFrame(said, schema=schema)


def _shares(groups: Mapping[str, pl.Series], edges: np.ndarray) -> pl.DataFrame:
    """Return group, low, high, share: the share of the group's values in each bin [low, high)."""
    rows = [
        (group, float(low), float(high), int(count) / len(values))
        for group, values in groups.items()
        for low, high, count in zip(edges[:-1], edges[1:], np.histogram(values.to_numpy(), edges)[0], strict=True)
    ]
    schema = {"group": pl.String, "low": pl.Float64, "high": pl.Float64, "share": pl.Float64}
    return pl.DataFrame(rows, schema=schema, orient="row")


def groups_of_lengths(pairs: pl.DataFrame, column: str) -> dict[str, pl.Series]:
    """Return the token counts of the selected pairs, of all scored pairs, and of the random control."""
    control = f"{SELECTED}{CONTROL_PREFIX}random"
    if column not in pairs.columns:
        return {}
    groups = {
        "selected": pl.col("is_selected"),
        "all scored pairs": pl.lit(value=True),
        "random control": pl.col(control) if control in pairs.columns else pl.lit(value=False),
    }
    return {
        group: pairs.lazy().filter(of).select(column).collect()[column].drop_nulls() for group, of in groups.items()
    }


def spread(groups: Mapping[str, pl.Series]) -> pl.DataFrame:
    """Return the distribution of a number in groups of pairs, as group, low, high, share.

    The 30 bins have equal width and are the same for all groups. They run from the lowest number to the highest,
    without a thousandth of each group at each end.

    Args:
        groups: the number of every pair, by the group's name; nulls and groups without a number are left out.
    """
    values = {group: of.drop_nulls().cast(pl.Float64) for group, of in groups.items() if of.drop_nulls().len()}
    ends = [float(end) for of in values.values() for end in _edges(of, 1)]
    return _shares(values, _edges(pl.Series(ends, dtype=pl.Float64), 30))


# --- examples -------------------------------------------------------------------------------------------------------


def tails(pairs: pl.DataFrame, role: str, most: int) -> dict[str, list[int]]:
    """Return the `row`s with the lowest and highest rank of a model and gap between the models, most extreme first."""
    ends = {
        f"lowest rank of RMI, {role} model: query and answer may not belong together": (f"rank_{role}", False),
        f"highest rank of RMI, {role} model: the answer may echo its query": (f"rank_{role}", True),
        "lowest gap: the weak model ranks the pair higher than the strong one": ("gap", False),
        "highest gap: only the strong model finds the pair coherent": ("gap", True),
    }
    return {
        title: pairs.select("row", "pair_id", column)
        .drop_nulls(column)
        .sort(column, "pair_id", descending=[descending, False])["row"]
        .head(most)
        .to_list()
        for title, (column, descending) in ends.items()
        if column in pairs.columns
    }


def of_each_reason(flat: pl.DataFrame, most: int) -> dict[str, list[int]]:
    """Return examples of each decision and reason by their places in the frame, from 0: spread evenly over the
    delivery, and the same on every call.
    """
    found = {}
    for decision, reason, rows in by_reason(flat).iter_rows():
        of_it = flat.select((pl.col("decision") == decision) & (pl.col("reason") == reason)).to_series().arg_true()
        found[f"{decision}: {reason} ({rows:,} rows)"] = of_it[evenly(rows, most)].to_list()
    return found


def evenly(length: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices of a list of that length, from 0."""
    return sorted({math.floor(i * length / min(most, length)) for i in range(min(most, length))})
