"""Summaries for pages and plots: small frames of counts, shares, bins and examples. Polars only.

Belongs here: computing the numbers that a person reads. Does not belong here: drawing (`plots`), the content of pages
(`pages`), and the measurements of asset checks (`check_metrics`).

The input is one flat frame: `flat_scores` of Decisions, or a version's scores.parquet, which is the same.
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
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Decision

TAIL = 0.05
"""Share of a stratum in each tail of RMI: possible mismatches in the low tail, possible echoes in the high one."""

_SELECTED = "is_selected:"
_STANDS_FOR_NO_PAIR = [d.value for d in (Decision.DUPLICATE, Decision.CONTAMINATED, Decision.WITHDRAWN)]
_LONGEST_LABEL = 24
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202f\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff"
    r"\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""Control, invisible and direction characters, except line feeds and tabs."""
_IN_PART = 0.001
"""Share of pairs at each end of an axis that a plot may leave out."""

_STEPS = (
    (Decision.REJECTED, "readable"),
    (Decision.WITHDRAWN, "not withdrawn"),
    (Decision.CONTAMINATED, "not contaminated"),
    (Decision.DUPLICATE, "not a duplicate"),
    (Decision.BATCH_GATED, "batch passed its gates"),
    (Decision.UNSCORABLE, "scorable"),
    (Decision.NOT_SELECTED, "selected"),
)
"""Each decision except `selected`, in the order in which rows leave, and the label of the rows that remain."""


def roles(flat: pl.DataFrame) -> list[str]:
    """Return the roles of the models that scored the rows."""
    return sorted(name.removeprefix("stratum_") for name in flat.columns if name.startswith("stratum_"))


def selections(flat: pl.DataFrame) -> list[str]:
    """Return the names of the selections, the published one first, the controls last."""
    return [name.removeprefix(_SELECTED) for name in flat.columns if name.startswith(_SELECTED)]


def pairs(flat: pl.DataFrame) -> pl.DataFrame:
    """Return the representative row of each distinct scored pair; `is_selected` is the published selection's."""
    scored = pl.any_horizontal(pl.lit(False), *(pl.col(f"num_q_tokens_{role}").is_not_null() for role in roles(flat)))
    chosen = pl.col("decision") == Decision.SELECTED.value
    return (
        flat.filter(scored)
        .sort(pl.col("decision").is_in(_STANDS_FOR_NO_PAIR), *ROW_KEY)
        .unique("pair_id", keep="first", maintain_order=True)
        .with_columns(is_selected=chosen)
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def by_reason(flat: pl.DataFrame) -> pl.DataFrame:
    """Count rows as decision, reason, rows: decisions in their order, the most frequent reason first."""
    order = {decision.value: place for place, decision in enumerate(Decision)}
    counts = flat.group_by("decision", "reason").agg(rows=pl.len().cast(pl.Int64))
    place = pl.col("decision").replace_strict(order, return_dtype=pl.Int64)
    return counts.sort(place, "rows", "reason", descending=[False, True, False])


def flow(flat: pl.DataFrame) -> pl.DataFrame:
    """Count the rows that remain and that leave at each step, from delivered to selected, as step, rows, left.

    The gates are a step only if a batch failed one.
    """
    counts = dict(flat.group_by("decision").len().iter_rows())
    remaining = flat.height
    steps: list[tuple[str, int, int]] = [("delivered", remaining, 0)]
    for decision, step in _STEPS:
        leaving = counts.get(decision.value, 0)
        if decision is Decision.BATCH_GATED and not leaving:
            continue
        remaining -= leaving
        steps.append((step, remaining, leaving))
    return pl.DataFrame(steps, schema={"step": pl.String, "rows": pl.Int64, "left": pl.Int64}, orient="row")


def kept_by(flat: pl.DataFrame, column: str, most: int = 12) -> pl.DataFrame:
    """Count value, rows, selected, share by the most frequent values of a column, with the rest in one row."""
    named = flat.select(
        value=pl.col(column).cast(pl.String).fill_null("not stated"),
        is_selected=pl.col("decision") == Decision.SELECTED.value,
    )
    counts = named.group_by("value").agg(rows=pl.len(), selected=pl.col("is_selected").sum())
    ordered = counts.sort("rows", "value", descending=[True, False])
    rest = ordered.slice(most)
    shown = ordered.head(most) if rest.height > 1 else ordered
    shown = shown.with_columns(value=pl.Series(_as_labels(shown["value"].to_list()), dtype=pl.String))
    if rest.height > 1:
        others = pl.DataFrame({"value": [f"{rest.height} others"]}).with_columns(
            rows=pl.lit(rest["rows"].sum()), selected=pl.lit(rest["selected"].sum())
        )
        shown = pl.concat([shown, others], how="vertical_relaxed")
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
    names = selections(flat)
    taken = [f"{_SELECTED}{name}" for name in names]
    chosen = flat.select(pl.col(name).fill_null(value=False).cast(pl.Float64) for name in taken).to_numpy()
    both = (chosen.T @ chosen).astype(np.int64)
    sizes = np.diag(both)
    rows = [
        (a, b, int(both[i, j]), int(both[i, j]) / int(sizes[i]) if sizes[i] else None)
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]
    columns = {"first": pl.String, "second": pl.String, "both": pl.Int64, "of_first": pl.Float64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def sizes(flat: pl.DataFrame, published: str) -> pl.DataFrame:
    """Count selection, pairs, answer_tokens, shared; `shared` is the pairs that the published selection also takes."""
    answer_tokens = next((name for name in flat.columns if name == "num_a_tokens_strong"), None)
    frames = []
    for name in selections(flat):
        of_it = flat.filter(pl.col(f"{_SELECTED}{name}").fill_null(value=False))
        shared = of_it.filter(pl.col("decision") == Decision.SELECTED.value).height
        frames.append(
            {
                "selection": name,
                "is_control": name.startswith(CONTROL_PREFIX),
                "is_published": name == published,
                "pairs": of_it.height,
                "answer_tokens": None if answer_tokens is None else int(of_it[answer_tokens].sum()),
                "shared": shared,
            }
        )
    return pl.DataFrame(frames)


# --- numbers of pairs -----------------------------------------------------------------------------------------------


def strata(pairs: pl.DataFrame, role: str) -> pl.DataFrame:
    """Summarise each stratum of a model's PPL(Q): edges, rows, selected, share, and RMI at both tails and the median.

    If the strata come from another model (`ranking.strata_from`), they have no edges on this model's axis: their
    ranges overlap, and `has_edges` is false.
    """
    rmi = pl.col(f"rmi_{role}")
    known = pairs.drop_nulls([f"stratum_{role}", f"rmi_{role}"])
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
    if not {"rank_strong", "rank_weak"} <= set(pairs.columns):
        return _grid(pl.DataFrame(schema={"x": pl.Float64, "y": pl.Float64, "is_selected": pl.Boolean}), [], [])
    chosen = pl.col("is_selected") if "is_selected" in pairs.columns else pl.lit(None, pl.Boolean).alias("is_selected")
    known = pairs.select(chosen, x="rank_strong", y="rank_weak").drop_nulls(["x", "y"])
    edges = np.linspace(0, 1, bins + 1)
    return _grid(known, edges, edges)


def _edges(values: pl.Series, bins: int) -> np.ndarray:
    """Return equal steps over the values, without a thousandth at each end; a single value gets one step around it."""
    if values.is_empty():
        return np.empty(0)
    low, high = values.quantile(_IN_PART, "lower"), values.quantile(1 - _IN_PART, "higher")
    assert low is not None
    assert high is not None
    return np.linspace(low, high, bins + 1) if low < high else np.array([low - 0.5, high + 0.5])


def _grid(points: pl.DataFrame, x_edges: np.ndarray | list[float], y_edges: np.ndarray | list[float]) -> pl.DataFrame:
    """Count the points x, y by cell (edge, edge]; the first cell is closed on both sides."""
    has_selected = "is_selected" in points.columns
    counted = [pl.len().cast(pl.Int64).alias("rows")]
    counted += [pl.col("is_selected").sum().cast(pl.Int64).alias("selected")] if has_selected else []
    cells = points.with_columns(i=_bin(points["x"], x_edges), j=_bin(points["y"], y_edges)).drop_nulls(["i", "j"])
    counts = cells.group_by("i", "j").agg(counted).sort("i", "j")
    edges = {"x": (x_edges, "i"), "y": (y_edges, "j")}
    placed = counts.with_columns(
        pl.Series(f"{axis}{'' if end == 0 else 2}", np.asarray(of, dtype=float)[counts[place].to_numpy() + end])
        for axis, (of, place) in edges.items()
        for end in (0, 1)
    )
    shared = [pl.col("selected"), (pl.col("selected") / pl.col("rows")).alias("share")] if has_selected else []
    return placed.select("x", "x2", "y", "y2", "rows", *shared)


def _bin(values: pl.Series, edges: np.ndarray | list[float]) -> pl.Series:
    """Return the number of each value's bin, from 0; null outside the edges."""
    if len(edges) == 0:
        return pl.Series([None] * len(values), dtype=pl.Int64)
    place = np.maximum(np.searchsorted(edges, values.to_numpy(), side="left") - 1, 0)
    inside = (values.to_numpy() >= edges[0]) & (values.to_numpy() <= edges[-1])
    numbers = pl.DataFrame({"place": place, "inside": inside})
    return numbers.select(pl.when("inside").then(pl.col("place").cast(pl.Int64)))["place"]


def lengths(groups: dict[str, pl.Series]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Summarise the lengths of texts by group of pairs.

    Args:
        groups: number of tokens of every pair, by the group's name.

    Returns:
        group, low, high, share: the share of the group's pairs in [low, high) tokens; 24 bins of equal width on a
            logarithmic axis, the same for all groups.
        group, pairs, p5, median, mean, p95: tokens.
    """
    longest = max((int(values.max() or 0) for values in groups.values() if len(values)), default=0)  # type: ignore[arg-type]
    edges = np.unique(np.floor(np.geomspace(1, longest + 1, 25))) if longest else np.empty(0)
    binned, said = [], []
    for group, values in groups.items():
        if values.is_empty():
            continue
        counts = np.histogram(np.maximum(values.to_numpy(), 1), edges)[0] if longest else np.empty(0)
        binned += [
            (group, float(low), float(high), int(count) / len(values))
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
        ]
        quantiles = [values.quantile(q, "nearest") for q in (TAIL, 0.5, 1 - TAIL)]
        said.append((group, len(values), quantiles[0], quantiles[1], values.mean(), quantiles[2]))
    shares = {"group": pl.String, "low": pl.Float64, "high": pl.Float64, "share": pl.Float64}
    numbers = dict.fromkeys(("p5", "median", "mean", "p95"), pl.Float64)
    return (
        pl.DataFrame(binned, schema=shares, orient="row"),
        pl.DataFrame(said, schema={"group": pl.String, "pairs": pl.Int64} | numbers, orient="row"),
    )


def groups_of_lengths(pairs: pl.DataFrame, column: str) -> dict[str, pl.Series]:
    """Return the token counts of the selected pairs, of all scored pairs, and of the random control."""
    control = f"{_SELECTED}{CONTROL_PREFIX}random"
    drawn = pairs.filter(pl.col(control).fill_null(value=False)) if control in pairs.columns else pairs.clear()
    if column not in pairs.columns:
        return {}
    return {
        "selected": pairs.filter("is_selected")[column].drop_nulls(),
        "all scored pairs": pairs[column].drop_nulls(),
        "random control": drawn[column].drop_nulls(),
    }


def spread(groups: Mapping[str, pl.Series]) -> pl.DataFrame:
    """Return the distribution of a number in groups of pairs, as group, low, high, share.

    The 30 bins have equal width and are the same for all groups. They run from the lowest number to the highest,
    without a thousandth of each group at each end.

    Args:
        groups: the number of every pair, by the group's name; nulls and groups without a number are left out.
    """
    values = {group: of.drop_nulls().cast(pl.Float64) for group, of in groups.items() if of.drop_nulls().len()}
    ends = [_edges(of, 1) for of in values.values()]
    edges = _edges(pl.Series([end for pair in ends for end in pair], dtype=pl.Float64), 30)
    rows = [
        (group, float(low), float(high), int(count) / len(of))
        for group, of in values.items()
        for low, high, count in zip(edges[:-1], edges[1:], np.histogram(of.to_numpy(), edges)[0], strict=True)
    ]
    columns = {"group": pl.String, "low": pl.Float64, "high": pl.Float64, "share": pl.Float64}
    return pl.DataFrame(rows, schema=columns, orient="row")


# --- examples -------------------------------------------------------------------------------------------------------


def tails(pairs: pl.DataFrame, role: str, most: int) -> dict[str, pl.DataFrame]:
    """Return the rows with the lowest and highest rank of a model and gap between the models, most extreme first."""
    ends = {
        f"lowest rank of RMI, {role} model: query and answer may not belong together": (f"rank_{role}", False),
        f"highest rank of RMI, {role} model: the answer may echo its query": (f"rank_{role}", True),
        "lowest gap: the weak model ranks the pair higher than the strong one": ("gap", False),
        "highest gap: only the strong model finds the pair coherent": ("gap", True),
    }
    return {
        title: pairs.drop_nulls(column).sort(column, "pair_id", descending=[descending, False]).head(most)
        for title, (column, descending) in ends.items()
        if column in pairs.columns
    }


def of_each_reason(flat: pl.DataFrame, most: int) -> list[tuple[str, str, int, pl.DataFrame]]:
    """Return decision, reason, rows, and examples: spread evenly over the delivery, the same on every call."""
    found = []
    for decision, reason, rows in by_reason(flat).iter_rows():
        of_it = flat.filter((pl.col("decision") == decision) & (pl.col("reason") == reason)).sort(ROW_KEY)
        found.append((decision, reason, rows, of_it[evenly(rows, most)]))
    return found


def evenly(length: int, most: int) -> list[int]:
    """Return at most `most` evenly spaced indices of a list of that length, from 0."""
    return sorted({math.floor(i * length / min(most, length)) for i in range(min(most, length))})


def with_texts(rows: pl.DataFrame, raw: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """Join columns of RawData to the rows, keeping their order."""
    wanted = [name for name in columns if name not in rows.columns]
    return rows.join(raw.select(*ROW_KEY, *wanted), on=ROW_KEY, how="left", maintain_order="left")
