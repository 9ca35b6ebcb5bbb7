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
"""Scales of the pictures to try, largest first. None is above 1: the event log stores every picture twice."""

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

    title = "From delivered to selected"
    caption = "Rows that remain after each step; the pale part is the rows that left at that step."
    if not steps["rows"][0]:
        return Plot("flow", title, caption, None, steps)
    said = pl.when(pl.col("left") > 0).then(pl.format("{}  (-{})", _count("rows"), _count("left")))
    bars = steps.with_columns(before=pl.col("rows") + pl.col("left"), label=said.otherwise(_count("rows")))
    remaining = _labelled_bars(bars, "step", "rows", 2 * bars["rows"][0], label_at="before")
    leaving = (
        alt.Chart(bars).mark_bar(color=_TWO, opacity=0.3).encode(y=_names("step", bars), x="rows:Q", x2="before:Q")
    )
    return Plot("flow", title, caption, _drawn(30 * steps.height + 50, leaving, *remaining), steps)


def by_reason(counts: pl.DataFrame) -> Plot:
    """Plot the rows by decision and reason (`selection.decisions.by_reason`)."""
    import altair as alt

    title, caption = "Rows by decision and reason", "Every delivered row has one decision and one reason for it."
    if counts.is_empty():
        return Plot("by_reason", title, caption, None, counts)
    bars = counts.with_columns(
        name=pl.format("{}: {}", *(pl.col(c).str.replace_all("_", " ") for c in ("decision", "reason"))),
        label=pl.format("{}  ({} %)", _count("rows"), (100 * pl.col("rows") / pl.col("rows").sum()).round(1)),
        is_selected=pl.col("decision") == "selected",
    )
    colour = alt.condition("datum.is_selected", alt.value(_ONE), alt.value(_THREE))
    layers = _labelled_bars(bars, "name", "rows", 2.2 * max(bars["rows"]), colour)
    return Plot("by_reason", title, caption, _drawn(26 * bars.height + 50, *layers), counts)


def density(cells: pl.DataFrame, strata: pl.DataFrame, role: str) -> Plot:
    """Plot the pairs by PPL(Q) and RMI, with strata and both tails (`summaries.density`, `summaries.strata`).

    `strata` is empty if the pairs were not all ranked in the same strata of this model.
    """
    import altair as alt

    name, title = f"density_{role}", f"Query perplexity and RMI, {role} model"
    caption = "A stronger colour means more pairs. " + (
        "No strata are drawn: these pairs were not all ranked in the same strata, or the strata come from the PPL(Q) "
        "of another model."
        if strata.is_empty()
        else "Vertical lines are the edges of the strata of PPL(Q). The 5 % of each stratum with the lowest RMI "
        "(possible mismatches) are below the lower line, the 5 % with the highest (possible echoes) above the upper."
    )
    if cells.is_empty():
        return Plot(name, title, caption, None, strata)
    across, up = ([min(cells[axis]), max(cells[f"{axis}2"])] for axis in ("x", "y"))
    no_grid = alt.Axis(grid=False)
    x = alt.X("x:Q", scale=alt.Scale(domain=across, nice=False), title="log PPL(Q), nats per token", axis=no_grid)
    y = alt.Y("y:Q", scale=alt.Scale(domain=up, nice=False), title="RMI, nats per token", axis=no_grid)
    rects = _heat(cells, x, y)
    if strata.is_empty():
        return Plot(name, title, caption, _drawn(320, rects), strata)
    seen = strata.with_columns(pl.col("low", "high").clip(*across), pl.col("low_tail", "high_tail").clip(*up))
    edges = alt.Chart(seen.slice(1)).mark_rule(color=_MUTED, strokeDash=[1, 3]).encode(x="low:Q")
    tails = [
        alt.Chart(seen).mark_rule(color=_TWO, strokeWidth=2).encode(x="low:Q", x2="high:Q", y=alt.Y(f"{tail}:Q"))
        for tail in ("low_tail", "high_tail")
    ]
    return Plot(name, title, caption, _drawn(320, rects, edges, *tails), strata)


def ranks(cells: pl.DataFrame, is_selected: bool = False) -> Plot:
    """Plot the pairs, or the selected share, by rank under both models (`summaries.rank_grid`)."""
    import altair as alt

    name, title, more = (
        ("ranks_selected", "Selected by rank under both models", "a larger share of the cell")
        if is_selected
        else ("ranks", "Rank under the strong and the weak model", "more pairs")
    )
    caption = (
        f"A stronger colour means {more}. On the line both models give the same rank; below and right of it, the "
        "strong model ranks the pair higher than the weak one."
    )
    table = _crosstab(cells)
    if cells.is_empty():
        return Plot(name, title, caption, None, table)
    unit = alt.Scale(domain=[0, 1], nice=False)
    x = alt.X("x:Q", scale=unit, title="rank of RMI, strong model (share of its stratum)")
    y = alt.Y("y:Q", scale=unit, title="rank of RMI, weak model (share)")
    ends = pl.DataFrame({"x": [0.0], "y": [0.0], "x2": [1.0], "y2": [1.0]})
    line = alt.Chart(ends).mark_rule(color=_TWO, strokeDash=[6, 3]).encode(x="x:Q", y="y:Q", x2="x2:Q", y2="y2:Q")
    return Plot(name, title, caption, _drawn(400, _heat(cells, x, y, is_share=is_selected), line), table)


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


def overlap(shares: pl.DataFrame) -> Plot:
    """Plot the overlap of two selections, as a share of the first one's pairs (`summaries.overlap`)."""
    share = pl.col("of_first")
    label = pl.format("{} %", _percent(share)).fill_null("none")
    chart = _labelled_grid(shares, "first", "second", label, share.fill_null(0.0))
    caption = "Share of the pairs of the row's selection that the column's selection also takes."
    return Plot("overlap", "Overlap of the selections", caption, chart, shares)


def kept(name: str, shares: pl.DataFrame, of: str, by: str = "value") -> Plot:
    """Plot the selected share of rows by stratum, language, source or batch (`summaries.kept_by`, `strata`)."""
    title, caption = f"Share selected by {of}", f"For each {of}: the share of its rows that was selected."
    if shares.is_empty():
        return Plot(name, title, caption, None, shares)
    label = pl.format("{} of {}", _count("selected"), _count("rows"))
    bars = shares.with_columns(pl.col(by).cast(pl.String), label=label)
    layers = _labelled_bars(bars, by, "share", 1.7 * max(0.01, *bars["share"]))
    return Plot(name, title, caption, _drawn(24 * bars.height + 50, *layers), shares)


# --- of a calibration -----------------------------------------------------------------------------------------------


def told_apart(intervals: pl.DataFrame) -> Plot:
    """Plot the AUROC of each defect against its originals: group, defect, value, lower, upper (`calibration_page`)."""
    import altair as alt

    title = "How well RMI detects each defect"
    caption = (
        "P(a row as delivered scores above a planted one), with its 95 % interval: 1 is perfect detection, 0.5 (the "
        "line) is chance. A detected echo shows near 0: it scores above its original. Any other defect below 0.5 "
        "scores better than the original. Answer length costs nothing to compute: a score that is no farther from the "
        "line than answer length is not worth its GPU time."
    )
    limits = alt.Scale(domain=[0, 1], nice=False)
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], grid=True)
    x = alt.X("value:Q", scale=limits, axis=axis, title="P(clean > planted)")
    return Plot("told_apart", title, caption, _intervals(intervals, "defect", x, limits, line=0.5), intervals)


def auroc_grid(name: str, of: str, cells: pl.DataFrame) -> Plot:
    """Plot the AUROC of every score for every defect: score, defect, value (`calibration_page`)."""
    caption = (
        "A stronger colour is farther from chance (0.5); the colours differ above and below it. Below 0.5 the defect "
        "scores above its original: for a perplexity, that can detect it as well."
    )
    value = pl.col("value")
    label = value.round(2).map_elements(lambda number: f"{number:.2f}", return_dtype=pl.String)
    chart = _labelled_grid(cells, "score", "defect", label, (value - 0.5).abs() * 2, is_below=value < 0.5)
    return Plot(name, f"P(clean > planted) of every score, {of}", caption, chart, cells)


def kept_grid(shares: pl.DataFrame) -> Plot:
    """Plot the share of each defect that each selection takes: selection, defect, value (`calibration_page`)."""
    caption = (
        "Share of the column's rows that the row's selection takes. `clean` is the whole batch: a useful selection "
        "takes a smaller share of a defect than of `clean`."
    )
    share = pl.col("value")
    chart = _labelled_grid(shares, "selection", "defect", pl.format("{}%", _percent(share)), share)
    return Plot("kept_defects", "Share that each selection takes", caption, chart, shares)


def evidence(shares: pl.DataFrame, signal: str, cut: float) -> Plot:
    """Plot the evidence of a signal for pairs as delivered and planted ones, with its cut (`summaries.spread`)."""
    title = f"Evidence of the signal {signal}"
    caption = "Share of each group's pairs by evidence. Vertical line: the cut. Pairs at or below it have the defect."
    chart = _steps(shares, "evidence, mean deviations from the planted rows", marks=[cut])
    return Plot(f"evidence_{signal}", title, caption, chart, _by_group(shares))


# --- of a training trial --------------------------------------------------------------------------------------------


def differences(intervals: pl.DataFrame, other: str) -> Plot:
    """Plot each arm's loss less that of another one: group, arm, value, lower, upper (`trial_page`)."""
    import altair as alt

    title = f"Loss of each arm less that of {other}"
    caption = (
        "Mean difference over the measured answers, in nats per token, with its 95 % interval over the seeds. Left of "
        "the line an arm trains better."
    )
    scale = alt.Scale(zero=True)
    x = alt.X("value:Q", scale=scale, axis=alt.Axis(grid=True), title="difference, nats per token")
    return Plot("differences", title, caption, _intervals(intervals, "arm", x, scale, line=0.0), intervals)


def learning_curves(points: pl.DataFrame) -> Plot:
    """Plot the loss of held-out answers during training: group (the arm), step, loss (`trial_page`)."""
    import altair as alt

    title = "Learning curves"
    caption = (
        "Loss of some of the held-out answers and their ends during the first seed's training, in nats per token. A "
        "curve that rises shows that the training went on for too long."
    )
    if points.is_empty():
        return Plot("learning_curves", title, caption, None, points)
    arms = points["group"].unique(maintain_order=True).to_list()
    colour = _group_colour(arms, [_ONE, _TWO, _THREE] * len(arms), symbolType="stroke", symbolSize=300)
    dashes = alt.Scale(domain=arms, range=[_DASHES[place // 3 % len(_DASHES)] for place in range(len(arms))])
    lines = (
        alt.Chart(points)
        .mark_line(strokeWidth=2, point=True)
        .encode(
            x=alt.X("step:Q", title="optimizer step", axis=alt.Axis(grid=False)),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False), title="loss, nats per token"),
            color=colour,
            strokeDash=alt.StrokeDash("group:N", sort=arms, scale=dashes),
        )
    )
    return Plot("learning_curves", title, caption, _drawn(260, lines), points)


# --- parts of charts ------------------------------------------------------------------------------------------------


def _intervals(
    intervals: pl.DataFrame, names: str, x: alt.X, scale: alt.Scale, line: float
) -> alt.TopLevelMixin | None:
    """Draw the values of each name by group as points with their intervals, and a vertical line."""
    import altair as alt

    if intervals.is_empty():
        return None
    groups, rows = (intervals[name].unique(maintain_order=True).to_list() for name in ("group", names))
    base = alt.Chart(intervals).encode(
        y=_names(names, intervals),
        yOffset=alt.YOffset("group:N", sort=groups),
        color=_group_colour(groups, [_ONE, _TWO, _THREE]),
    )
    shapes = alt.Scale(domain=groups, range=["circle", "square", "triangle-up"][: len(groups)])
    shape = alt.Shape("group:N", sort=groups, scale=shapes)
    points = base.mark_point(filled=True, opacity=1, size=55).encode(x=x, shape=shape)
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("lower:Q", scale=scale), x2="upper:Q")
    at = alt.Chart(pl.DataFrame({"line": [line]})).mark_rule(color=_MUTED, strokeDash=[6, 3]).encode(x="line:Q")
    return _drawn((14 * len(groups) + 8) * len(rows) + 80, at, bars, points)


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
    scale = alt.Scale(type="log", base=2, nice=False) if is_log else alt.Scale(zero=False, nice=False)
    axis = alt.Axis(grid=False, format=",", tickCount=7, labelOverlap=True)
    dashes = alt.Scale(domain=groups, range=_DASHES[: len(groups)])
    lines = (
        alt.Chart(pl.concat([shares, ends]))
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("low:Q", scale=scale, title=title, axis=axis),
            y=alt.Y("share:Q", title="share of the group's pairs", axis=alt.Axis(format="~%", tickCount=5)),
            color=_group_colour(
                groups, [_ONE, _THREE, _TWO] if len(groups) > 2 else [_ONE, _TWO], symbolType="stroke", symbolSize=300
            ),
            strokeDash=alt.StrokeDash("group:N", sort=groups, scale=dashes),
        )
    )
    rules = alt.Chart(pl.DataFrame({"mark": list(marks)})).mark_rule(color=_INK, strokeWidth=1.5).encode(x="mark:Q")
    return _drawn(260, lines, *([rules] if marks else []))


def _group_colour(groups: Sequence[str], colours: Sequence[str], **legend: Any) -> alt.Color:
    """Give each group a colour, with a legend on top."""
    import altair as alt

    scale = alt.Scale(domain=list(groups), range=colours[: len(groups)])
    return alt.Color(
        "group:N", sort=list(groups), scale=scale, legend=alt.Legend(orient="top", title=None, columns=3, **legend)
    )


def _labelled_bars(
    bars: pl.DataFrame, names: str, lengths: str, end: float, colour: Any = None, label_at: str | None = None
) -> list[alt.Chart]:
    """Draw a bar per row with its `label` behind it, on an axis up to `end`: of rows, or of shares."""
    import altair as alt

    if lengths == "rows":
        longest = max(bars["rows"])
        form = "~s" if longest >= _LONG_COUNT else ",d"
        axis = alt.Axis(values=_ticks(longest), format=form, title="rows", labelOverlap=True)
    else:
        axis = alt.Axis(format="~%", title="share selected", tickCount=5)
    x = alt.X(f"{lengths}:Q", scale=alt.Scale(domain=[0, end], nice=False), axis=axis)
    base = alt.Chart(bars).encode(y=_names(names, bars))
    text = base.mark_text(align="left", dx=4, color=_INK).encode(x=f"{label_at or lengths}:Q", text="label:N")
    return [base.mark_bar(opacity=0.85).encode(x=x, color=colour or alt.value(_ONE)), text]


def _labelled_grid(
    cells: pl.DataFrame, row: str, column: str, label: pl.Expr, strength: pl.Expr, is_below: pl.Expr | bool = False
) -> alt.TopLevelMixin | None:
    """Draw a grid of cells with their label, coloured by strength in [0, 1], and in another colour if below chance."""
    import altair as alt

    if cells.is_empty():
        return None
    rows, columns = (cells[name].unique(maintain_order=True).to_list() for name in (row, column))
    axis = alt.Axis(labelAngle=-40, labelLimit=_LONGEST_NAME, orient="bottom", grid=False, minExtent=80)
    base = alt.Chart(cells.with_columns(label=label, strength=strength, is_below=is_below)).encode(
        x=alt.X(f"{column}:N", sort=columns, title=None, axis=axis), y=_names(row, cells)
    )
    scale = alt.Scale(domain=[0, 1], range=[0.02, 0.4], nice=False)
    rects = base.mark_rect().encode(
        opacity=alt.Opacity("strength:Q", scale=scale, legend=None),
        color=alt.condition("datum.is_below", alt.value(_TWO), alt.value(_ONE)),
    )
    text = base.mark_text(color=_INK).encode(text="label:N")
    return _drawn(28 * len(rows) + 90, rects, text)


def _heat(cells: pl.DataFrame, x: alt.X, y: alt.Y, *, is_share: bool = False) -> alt.Chart:
    """Draw cells in one colour whose opacity grows with the selected share or the number of pairs."""
    import altair as alt

    if is_share:
        value, title, form, top, values = "share", "share selected:", "~%", 1, [0, 0.5, 1]
    else:
        top = max(cells["rows"])
        value, title, form, values = "rows", "pairs:", ",d", sorted({1, max(1, round(top / 2)), top})
    legend = alt.Legend(
        orient="top",
        title=title,
        titleOrient="left",
        direction="horizontal",
        symbolType="square",
        format=form,
        values=values,
        titleLimit=200,
    )
    scale = alt.Scale(type="linear" if is_share else "sqrt", domain=[0, top], range=[0, 1], nice=False)
    return (
        alt.Chart(cells)
        .mark_rect(color=_ONE, aria=False)
        .encode(x=x, x2="x2:Q", y=y, y2="y2:Q", opacity=alt.Opacity(f"{value}:Q", scale=scale, legend=legend))
    )


def _names(column: str, rows: pl.DataFrame) -> alt.Y:
    """Build an axis of names, the first on top. Its width is fixed: a browser's font is wider than vl-convert's."""
    import altair as alt

    names = rows[column].unique(maintain_order=True).to_list()
    room = min(_LONGEST_NAME, round(_LETTER * max(map(len, names)))) + 8
    axis = alt.Axis(labelLimit=_LONGEST_NAME, grid=False, minExtent=room, maxExtent=room)
    return alt.Y(f"{column}:N", sort=names, title=None, axis=axis)


def _ticks(longest: int) -> list[int]:
    """Return 0 and at most three round numbers of rows."""
    step = 10 ** (len(str(max(longest, 1))) - 1)
    while longest // step > 3:
        step *= 2 if longest // step < 6 else 5
    return [*range(0, longest + 1, step)]


def _count(column: str) -> pl.Expr:
    """Format a count with commas: 1,234,567."""
    return pl.col(column).map_elements(lambda value: f"{value:,}", return_dtype=pl.String)


def _percent(share: pl.Expr) -> pl.Expr:
    return (100 * share).round(0).cast(pl.Int64)


def _drawn(height: int, *layers: alt.Chart) -> alt.TopLevelMixin:
    """Draw the layers over each other, in the style of all plots."""
    import altair as alt

    fit = alt.AutoSizeParams(type="fit", contains="padding")
    return (
        alt.layer(*layers)
        .properties(width=WIDTH, height=height, autosize=fit)
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
