"""Plots of a batch or a version: one function per plot, from the small frames of `summaries` to a chart.

Belongs here: marks, axes with their units, colours, and conversion to SVG or PNG. Does not belong here: counting, and
the layout of pages.

A plot is one SVG for light and dark pages: its colours are CSS variables (`var(--plot-…)`) of the page's stylesheet,
and the count of a cell is the opacity of one colour. Lines differ in dash as well as in colour. Every plot fits on a
phone. altair and vl-convert are imported where they draw; neither uses the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

if TYPE_CHECKING:
    import altair as alt

WIDTH = 400
"""Pixels, including axes: on a screen of 360 px, text of 12 px shrinks to 10."""
_MOST_PNG_BYTES = 75_000
"""100 KB as base64 in a page of the UI."""
_SCALES = (1.0, 0.75)
"""At most 1: the event log keeps every picture of every batch twice."""

_INK, _MUTED, _GRID, _ONE, _TWO, _THREE = "#1b1f24", "#57606b", "#d3d9e0", "#0b5cab", "#b04a00", "#6b6b6c"
VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _ONE: "one",
    _TWO: "two",
    _THREE: "three",
}
"""Colours of a chart, and the names of the CSS variables that replace them on a page: `--plot-<name>`."""

_LONGEST_NAME, _LETTER = 170, 7.3
"""Pixels of an axis label, and of one letter at 12 px in the widest common font."""
_LONG_COUNT = 10_000
"""The count from which an axis writes 10k."""
_DASHES = ([1, 0], [6, 3], [2, 2])


@dataclass(frozen=True)
class Plot:
    """A chart with its description and its numbers."""

    name: str
    title: str
    caption: str
    """A description of the chart and how to read it."""
    chart: alt.TopLevelMixin | None
    """None if there is nothing to draw."""
    table: pl.DataFrame
    """The numbers."""


# --- one function a plot ------------------------------------------------------------------------------------------


def flow(steps: pl.DataFrame) -> Plot:
    """Plot the rows that remain and that leave at each step, from delivered to selected (`summaries.flow`)."""
    import altair as alt

    caption = "Rows that remain after each step; the pale part is the rows that left at that step."
    if steps.is_empty() or not steps["rows"][0]:
        return Plot("flow", "From delivered to selected", caption, None, steps)
    order = steps["step"].to_list()
    said = pl.when(pl.col("left") > 0).then(pl.format("{}  (-{})", _count("rows"), _count("left")))
    bars = steps.with_columns(before=pl.col("rows") + pl.col("left"), label=said.otherwise(_count("rows")))
    y = _names("step", order)
    base = alt.Chart(bars)
    left = base.mark_bar(color=_TWO, opacity=0.3).encode(y=y, x=alt.X("rows:Q", title="rows"), x2="before:Q")
    stay = base.mark_bar(color=_ONE, opacity=0.85).encode(y=y, x=alt.X("rows:Q", title="rows"))
    longest = int(bars["rows"][0])
    text = base.mark_text(align="left", dx=4, color=_INK).encode(y=y, x="before:Q", text="label:N")
    limits = alt.Scale(domain=[0, longest * 2], nice=False)
    ticks = _rows_axis(longest)
    chart = alt.layer(left.encode(x=alt.X("rows:Q", scale=limits, axis=ticks)), stay, text)
    return Plot("flow", "From delivered to selected", caption, _sized(chart, 30 * steps.height + 50), steps)


def by_reason(counts: pl.DataFrame) -> Plot:
    """Plot the rows by decision and reason (`summaries.by_reason`)."""
    import altair as alt

    title, caption = "Rows by decision and reason", "Every delivered row has one decision and one reason for it."
    if counts.is_empty():
        return Plot("by_reason", title, caption, None, counts)
    said = counts.with_columns(
        name=pl.format("{}: {}", *(pl.col(c).str.replace_all("_", " ") for c in ("decision", "reason"))),
        label=pl.format("{}  ({} %)", _count("rows"), (100 * pl.col("rows") / pl.col("rows").sum()).round(1)),
        is_selected=pl.col("decision") == "selected",
    )
    y = _names("name", said["name"].to_list())
    longest = int(said["rows"].max())  # type: ignore[arg-type]
    x = alt.X(
        "rows:Q",
        scale=alt.Scale(domain=[0, longest * 2.2], nice=False),
        axis=_rows_axis(longest),
    )
    colour = alt.condition("datum.is_selected", alt.value(_ONE), alt.value(_THREE))
    bars = alt.Chart(said).mark_bar(opacity=0.85).encode(y=y, x=x, color=colour)
    text = alt.Chart(said).mark_text(align="left", dx=4, color=_INK).encode(y=y, x="rows:Q", text="label:N")
    return Plot("by_reason", title, caption, _sized(alt.layer(bars, text), 26 * said.height + 50), counts)


def density(cells: pl.DataFrame, strata: pl.DataFrame, role: str) -> Plot:
    """Plot the pairs by PPL(Q) and RMI, with strata and both tails (`summaries.density`, `summaries.strata`).

    `strata` is empty if the pairs have no common strata of this model.
    """
    import altair as alt

    name, title = f"density_{role}", f"Query perplexity and RMI, {role} model"
    caption = "A stronger colour means more pairs. " + (
        "No strata are drawn: these pairs have no common strata of this model."
        if strata.is_empty()
        else "Vertical lines are the edges of the strata of PPL(Q). The 5 % of each stratum with the lowest RMI "
        "(possible mismatches) are below the lower line, the 5 % with the highest (possible echoes) above the upper."
    )
    if cells.is_empty():
        return Plot(name, title, caption, None, strata)
    x, y = _axis("x", cells, "log PPL(Q), nats per token"), _axis("y", cells, "RMI, nats per token")
    rects = _heat(cells, x, y, "rows", "pairs")
    if strata.is_empty():
        return Plot(name, title, caption, _sized(alt.layer(rects), 320), strata)
    (left, right), (bottom, top) = _ends(cells, "x"), _ends(cells, "y")
    seen = strata.with_columns(
        pl.col("low", "high").clip(left, right), pl.col("low_tail", "high_tail").clip(bottom, top)
    )
    edges = alt.Chart(seen.slice(1)).mark_rule(color=_MUTED, strokeDash=[1, 3]).encode(x="low:Q")
    tails = [
        alt.Chart(seen).mark_rule(color=_TWO, strokeWidth=2).encode(x="low:Q", x2="high:Q", y=alt.Y(f"{tail}:Q"))
        for tail in ("low_tail", "high_tail")
    ]
    return Plot(name, title, caption, _sized(alt.layer(rects, edges, *tails), 320), strata)


def ranks(cells: pl.DataFrame, is_selected: bool = False) -> Plot:
    """Plot the pairs, or the selected share, by rank under both models (`summaries.rank_grid`)."""
    import altair as alt

    name = "ranks_selected" if is_selected else "ranks"
    title = "Selected by rank under both models" if is_selected else "Rank under the strong and the weak model"
    what = "share selected" if is_selected else "pairs"
    caption = (
        f"A stronger colour means {'a larger share of the cell' if is_selected else 'more pairs'}. On the line both "
        "models give the same rank; below and right of it, the strong model ranks the pair higher than the weak one."
    )
    table = _crosstab(cells)
    if cells.is_empty():
        return Plot(name, title, caption, None, table)
    unit = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("x:Q", scale=unit, title="rank of RMI, strong model (share of its stratum)")
    y = alt.Y("y:Q", scale=unit, title="rank of RMI, weak model (share)")
    rects = _heat(cells, x, y, "share" if is_selected else "rows", what, is_share=is_selected)
    ends = pl.DataFrame({"x": [0.0], "y": [0.0], "x2": [1.0], "y2": [1.0]})
    line = alt.Chart(ends).mark_rule(color=_TWO, strokeDash=[6, 3]).encode(x="x:Q", y="y:Q", x2="x2:Q", y2="y2:Q")
    return Plot(name, title, caption, _sized(alt.layer(rects, line), 400), table)


def _crosstab(cells: pl.DataFrame) -> pl.DataFrame:
    """Count the rows and the selected rows by fifths of both ranks."""
    fifth = [((pl.col(axis) + pl.col(f"{axis}2")) / 2 * 5).floor().cast(pl.Int64) + 1 for axis in ("x", "y")]
    counts = cells.group_by(fifth_strong=fifth[0], fifth_weak=fifth[1]).agg(pl.col("rows", "selected").sum())
    return counts.sort("fifth_strong", "fifth_weak")


def lengths(name: str, shares: pl.DataFrame, numbers: pl.DataFrame, what: str) -> Plot:
    """Plot the lengths of texts by group, on a logarithmic axis (`summaries.lengths`)."""
    title = f"Length of the {what}"
    caption = f"Share of each group's pairs by the number of {what} tokens; all bins have equal width on the axis."
    return Plot(name, title, caption, _steps(shares, f"{what} tokens (logarithmic)", is_log=True), numbers)


def drift(quantity: str, role: str, shares: pl.DataFrame) -> Plot:
    """Plot the distribution of a quantity in the batch and in the reference (`summaries.spread`)."""
    title = f"{quantity}, {role} model: batch and reference"
    name = re.sub(r"\W+", "_", f"drift_{quantity}_{role}".lower())
    chart = _steps(shares, f"{quantity}, nats per token")
    return Plot(name, title, "Share of the pairs by bin.", chart, _by_group(shares))


def _by_group(shares: pl.DataFrame) -> pl.DataFrame:
    """Pivot the shares to one column per group and one row per bin."""
    return shares if shares.is_empty() else shares.pivot("group", index=["low", "high"], values="share")


def _steps(
    shares: pl.DataFrame, title: str, *, is_log: bool = False, marks: Sequence[float] = ()
) -> alt.TopLevelMixin | None:
    """Draw shares by group as step lines over the bins, with vertical lines at the marks."""
    import altair as alt

    if shares.is_empty():
        return None
    groups = shares["group"].unique(maintain_order=True).to_list()
    # The last step needs one more point, its right end.
    ends = shares.group_by("group", maintain_order=True).last().with_columns(low="high")
    points = pl.concat([shares, ends])
    scale = alt.Scale(type="log", base=2, nice=False) if is_log else alt.Scale(zero=False, nice=False)
    colours = [_ONE, _THREE, _TWO][: len(groups)] if len(groups) > 2 else [_ONE, _TWO][: len(groups)]
    legend = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300, columns=3)
    chart = (
        alt.Chart(points)
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X(
                "low:Q", scale=scale, title=title, axis=alt.Axis(grid=False, format=",", tickCount=7, labelOverlap=True)
            ),
            y=alt.Y("share:Q", title="share of the group's pairs", axis=alt.Axis(format="~%", tickCount=5)),
            color=alt.Color("group:N", sort=groups, scale=alt.Scale(domain=groups, range=colours), legend=legend),
            strokeDash=alt.StrokeDash(
                "group:N", sort=groups, scale=alt.Scale(domain=groups, range=_DASHES[: len(groups)])
            ),
        )
    )
    if not marks:
        return _sized(chart, 260)
    rules = alt.Chart(pl.DataFrame({"mark": list(marks)})).mark_rule(color=_INK, strokeWidth=1.5).encode(x="mark:Q")
    return _sized(alt.layer(chart, rules), 260)


def overlap(shares: pl.DataFrame) -> Plot:
    """Plot the overlap of two selections, as a share of the first one's pairs (`summaries.overlap`)."""
    title = "Overlap of the selections"
    caption = "Share of the pairs of the row's selection that the column's selection also takes."
    if shares.is_empty():
        return Plot("overlap", title, caption, None, shares)
    is_known = pl.col("of_first").is_not_null()
    said = shares.with_columns(
        label=pl.when(is_known)
        .then(pl.format("{} %", (100 * pl.col("of_first")).round(0).cast(pl.Int64)))
        .otherwise(pl.lit("none")),
        strength=pl.col("of_first").fill_null(0.0),
        is_below=pl.lit(False),
    )
    return Plot("overlap", title, caption, _labelled_grid(said, "first", "second"), shares)


def kept(name: str, shares: pl.DataFrame, of: str, by: str = "value") -> Plot:
    """Plot the selected share of rows by stratum, language, source or batch (`summaries.kept_by`, `strata`)."""
    import altair as alt

    title, caption = f"Share selected by {of}", f"Selected share of the rows of each {of}."
    if shares.is_empty():
        return Plot(name, title, caption, None, shares)
    said = shares.with_columns(
        pl.col(by).cast(pl.String),
        label=pl.format("{} of {}", _count("selected"), _count("rows")),
    )
    highest = float(said["share"].max() or 0)  # type: ignore[arg-type]
    y = _names(by, said[by].to_list())
    x = alt.X(
        "share:Q",
        scale=alt.Scale(domain=[0, max(highest, 0.01) * 1.7], nice=False),
        axis=alt.Axis(format="~%", title="share selected", tickCount=5),
    )
    bars = alt.Chart(said).mark_bar(color=_ONE, opacity=0.85).encode(y=y, x=x)
    text = alt.Chart(said).mark_text(align="left", dx=4, color=_INK).encode(y=y, x="share:Q", text="label:N")
    return Plot(name, title, caption, _sized(alt.layer(bars, text), 24 * said.height + 50), shares)


# --- of a calibration -----------------------------------------------------------------------------------------------


def told_apart(intervals: pl.DataFrame) -> Plot:
    """Plot the AUROC of each defect against its originals: group, defect, value, lower, upper (`calibration_page`)."""
    import altair as alt

    title = "How well RMI detects each defect"
    caption = (
        "P(a row as delivered scores above a planted one), with its 95 % interval: 1 is perfect detection, 0.5 (the "
        "line) is chance. A detected echo shows near 0: it scores above its original, in the tail that the high cut "
        "removes. Any other defect below 0.5 scores better than the original. Answer length costs nothing to compute: "
        "a score that is no farther from the line is not worth its GPU time."
    )
    if intervals.is_empty():
        return Plot("told_apart", title, caption, None, intervals)
    groups, defects = (intervals[name].unique(maintain_order=True).to_list() for name in ("group", "defect"))
    y = _names("defect", defects)
    base = alt.Chart(intervals).encode(
        y=y,
        yOffset=alt.YOffset("group:N", sort=groups),
        color=alt.Color(
            "group:N",
            sort=groups,
            scale=alt.Scale(domain=groups, range=[_ONE, _TWO, _THREE][: len(groups)]),
            legend=alt.Legend(orient="top", title=None, columns=3),
        ),
    )
    limits = alt.Scale(domain=[0, 1], nice=False)
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], grid=True)
    x = alt.X("value:Q", scale=limits, axis=axis, title="P(clean > planted)")
    shapes = alt.Scale(domain=groups, range=["circle", "square", "triangle-up"][: len(groups)])
    points = base.mark_point(filled=True, opacity=1, size=55).encode(
        x=x, shape=alt.Shape("group:N", sort=groups, scale=shapes)
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("lower:Q", scale=limits), x2="upper:Q")
    chance = alt.Chart(pl.DataFrame({"chance": [0.5]})).mark_rule(color=_MUTED, strokeDash=[6, 3]).encode(x="chance:Q")
    height = (14 * len(groups) + 8) * len(defects) + 80
    return Plot("told_apart", title, caption, _sized(alt.layer(chance, bars, points), height), intervals)


def auroc_grid(name: str, of: str, cells: pl.DataFrame) -> Plot:
    """Plot the AUROC of every score for every defect: score, defect, value (`calibration_page`)."""
    title = f"P(clean > planted) of every score, {of}"
    caption = (
        "A stronger colour is farther from chance (0.5); the colours differ above and below it. Below 0.5 the defect "
        "scores above its original: for a perplexity, that can detect it as well."
    )
    said = cells.with_columns(
        label=pl.col("value").round(2).map_elements(lambda value: f"{value:.2f}", return_dtype=pl.String),
        strength=(pl.col("value") - 0.5).abs() * 2,
        is_below=pl.col("value") < 0.5,
    )
    return Plot(name, title, caption, _labelled_grid(said, "score", "defect"), cells)


def kept_grid(shares: pl.DataFrame) -> Plot:
    """Plot the share of each defect that each selection takes: selection, defect, value (`calibration_page`)."""
    title = "Share that each selection takes"
    caption = (
        "Share of the column's rows that the row's selection takes. `clean` is the whole batch: a useful selection "
        "takes a smaller share of a defect than of `clean`."
    )
    said = shares.with_columns(
        label=pl.format("{}%", (100 * pl.col("value")).round(0).cast(pl.Int64)),
        strength=pl.col("value"),
        is_below=pl.lit(False),
    )
    return Plot("kept_defects", title, caption, _labelled_grid(said, "selection", "defect"), shares)


def cuts(shares: pl.DataFrame, role: str, marks: Sequence[float]) -> Plot:
    """Plot the RMI of clean and planted rows, with the suggested cuts (`summaries.spread`)."""
    title = f"Suggested cuts of RMI, {role} model"
    caption = "Share of each group's pairs by RMI. Vertical lines: the low and the high cut, if any."
    chart = _steps(shares, "RMI, nats per token", marks=marks)
    return Plot(f"cuts_{role}", title, caption, chart, _by_group(shares))


def _labelled_grid(cells: pl.DataFrame, row: str, column: str) -> alt.TopLevelMixin | None:
    """Draw a grid of cells with their `label`, coloured by `strength` in [0, 1] and `is_below`."""
    import altair as alt

    if cells.is_empty():
        return None
    rows, columns = (cells[name].unique(maintain_order=True).to_list() for name in (row, column))
    below = alt.Axis(labelAngle=-40, labelLimit=_LONGEST_NAME, orient="bottom", grid=False, minExtent=80)
    x = alt.X(f"{column}:N", sort=columns, title=None, axis=below)
    y = _names(row, rows)
    rects = (
        alt.Chart(cells)
        .mark_rect()
        .encode(
            x=x,
            y=y,
            opacity=alt.Opacity(
                "strength:Q", scale=alt.Scale(domain=[0, 1], range=[0.02, 0.4], nice=False), legend=None
            ),
            color=alt.condition("datum.is_below", alt.value(_TWO), alt.value(_ONE)),
        )
    )
    text = alt.Chart(cells).mark_text(color=_INK).encode(x=x, y=y, text="label:N")
    return _sized(alt.layer(rects, text), 28 * len(rows) + 90)


# --- parts of charts ------------------------------------------------------------------------------------------------


def _heat(cells: pl.DataFrame, x: Any, y: Any, value: str, title: str, *, is_share: bool = False) -> alt.Chart:
    """Draw cells in one colour whose opacity grows with `value`."""
    import altair as alt

    top = 1.0 if is_share else float(cells[value].max())  # type: ignore[arg-type]
    values = [0, 0.5, 1] if is_share else sorted({1, max(1, round(top / 2)), round(top)})
    legend = alt.Legend(
        orient="top",
        title=f"{title}:",
        titleOrient="left",
        direction="horizontal",
        symbolType="square",
        format="~%" if is_share else ",d",
        values=values,
        titleLimit=200,
    )
    scale = alt.Scale(type="linear" if is_share else "sqrt", domain=[0, top], range=[0, 1], nice=False)
    return (
        alt.Chart(cells)
        .mark_rect(color=_ONE, aria=False)
        .encode(x=x, x2="x2:Q", y=y, y2="y2:Q", opacity=alt.Opacity(f"{value}:Q", scale=scale, legend=legend))
    )


def _ends(cells: pl.DataFrame, channel: str) -> tuple[float, float]:
    """Return the first and last edge of the cells."""
    return float(cells[channel].min()), float(cells[f"{channel}2"].max())  # type: ignore[arg-type]


def _axis(channel: str, cells: pl.DataFrame, title: str) -> Any:
    import altair as alt

    limits = alt.Scale(domain=list(_ends(cells, channel)), nice=False)
    return (alt.X if channel == "x" else alt.Y)(f"{channel}:Q", scale=limits, title=title, axis=alt.Axis(grid=False))


def _names(column: str, names: Sequence[str]) -> Any:
    """Build an axis of names, the first on top. Its width is fixed: a browser's font is wider than vl-convert's."""
    import altair as alt

    room = min(_LONGEST_NAME, round(_LETTER * max(map(len, names)))) + 8
    axis = alt.Axis(labelLimit=_LONGEST_NAME, grid=False, minExtent=room, maxExtent=room)
    return alt.Y(f"{column}:N", sort=list(names), title=None, axis=axis)


def _rows_axis(longest: int) -> Any:
    """Build an axis of row counts whose labels do not overlap."""
    import altair as alt

    form = "~s" if longest >= _LONG_COUNT else ",d"
    return alt.Axis(values=_ticks(longest), format=form, title="rows", labelOverlap=True)


def _ticks(longest: int) -> list[int]:
    """Return 0 and at most three round numbers of rows."""
    step = 10 ** (len(str(max(longest, 1))) - 1)
    while longest // step > 3:
        step *= 2 if longest // step < 6 else 5
    return [*range(0, longest + 1, step)]


def _count(column: str) -> pl.Expr:
    """Format a count with commas: 1,234,567."""
    return pl.col(column).map_elements(lambda value: f"{value:,}", return_dtype=pl.String)


def _sized(chart: Any, height: int) -> alt.TopLevelMixin:
    import altair as alt

    return (
        chart.properties(width=WIDTH, height=height, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
        .configure(aria=False, font="system-ui, sans-serif", background="transparent", padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=_MUTED,
            titleColor=_INK,
            domainColor=_MUTED,
            tickColor=_MUTED,
            gridColor=_GRID,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
        )
        .configure_legend(
            labelColor=_MUTED, titleColor=_INK, labelFontSize=12, titleFontSize=12, titleFontWeight="normal"
        )
        .configure_text(fontSize=12)
    )


# --- pictures -------------------------------------------------------------------------------------------------------


def svg(plot: Plot) -> str:
    """Render the chart as SVG for a page, without script or style; empty if there is nothing to draw.

    Its colours are `var(--plot-…)`. The page's elements `<name>-title` and `<name>-caption` label it.
    """
    import vl_convert

    if plot.chart is None:
        return ""
    picture = vl_convert.vegalite_to_svg(plot.chart.to_json(validate=False), allowed_base_urls=[])
    for colour, name in VARIABLES.items():
        picture = picture.replace(colour, f"var(--plot-{name})")
    head, body = picture.split(">", 1)
    (size,) = re.findall(r'viewBox="[^"]*"', head)
    # Vega numbers clips and gradients from the same start in every picture, so ids would collide on a page.
    body = re.sub(r'(id="|url\(#)(\w)', rf"\g<1>{plot.name}-\g<2>", body)
    label = f'role="img" aria-labelledby="{plot.name}-title" aria-describedby="{plot.name}-caption"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>{body}'


def png(plot: Plot) -> bytes:
    """Render the chart as PNG on white, under 75 KB, for the UI; empty if there is nothing to draw.

    Raises:
        ValueError: the picture is too large at every scale, because it has too many marks.
    """
    import vl_convert

    if plot.chart is None:
        return b""
    spec = plot.chart.to_dict(validate=False)
    spec["config"]["background"] = "white"
    sizes = []
    for scale in _SCALES:
        picture = vl_convert.vegalite_to_png(spec, scale=scale, allowed_base_urls=[])
        if len(picture) <= _MOST_PNG_BYTES:
            return picture
        sizes.append(len(picture))
    raise ValueError(f"{plot.name}: {sizes} bytes at the scales {_SCALES}, more than {_MOST_PNG_BYTES:,}")
