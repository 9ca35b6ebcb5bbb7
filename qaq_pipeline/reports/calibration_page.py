"""Present a calibration: tables for a terminal or Markdown, and an HTML page with plots.

Belongs here: the layout of the numbers, from Calibration to tables, plots and bytes. Does not belong here: the numbers
(`calibration`), drawing (`plots`), rendering (`pages`) and storage (`page_store`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.calibration import calibration
from qaq_pipeline.calibration.calibration import CONFIDENCE, Judged
from qaq_pipeline.config.selections import Selection
from qaq_pipeline.reports import pages, plots, summaries
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.reports.pages import Example, Made, Table
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN
from qaq_pipeline.schema.vocabularies import Defect, Statistic, UnknownReason
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.origin import batch_of
from qaq_pipeline.storage.tables import StoredTable

_SCORES = {
    "rmi": "RMI",
    "rank": "rank of RMI",
    "ifd_ppl": "IFD",
    "log_ppl_q": "log PPL(Q)",
    "log_ppl_q_given_a": "log PPL(Q|A)",
    "log_ppl_a_given_q": "log PPL(A|Q)",
    "num_a_tokens_untruncated": "answer length",
    "gap": "gap",
    "rank_sum": "sum of ranks",
}
"""Labels of the judged scores."""

_CUTS = (Statistic.LOW_CUT.value, Statistic.HIGH_CUT.value)
_GROUPS = {"as delivered": CLEAN, "other answer": Defect.OTHER_ANSWER.value, "echo": Defect.ECHO.value}

BLIND = "The models cannot tell good from bad on this batch. Do not justify a cut by the numbers below."
"""The warning before suggested cuts if the models failed the validation."""

LIMITS = (
    "Planted defects are made by rule from rows of this batch. Real defects differ: scores that detect the planted "
    "ones may miss them.",
    "Every delivered row counts as clean. If the batch is bad, AUROCs are too low, and the low cut rises or "
    "is missing.",
    "An AUROC compares the planted rows with their original rows, not with the whole batch.",
    "A single wrong token of code is the negative control: no likelihood can be expected to detect it.",
    "The calibration shows whether the scores notice a defect, not whether training without it improves a model.",
)


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(frame: pl.DataFrame) -> list[Table]:
    """Return the numbers of a Calibration: one row per score and defect, one column per model.

    Defects that were not planted and scores that were not wanted have no row; `missing` names them. An unknown number
    is shown as its reason.
    """
    interval = f"{CONFIDENCE:.0%} interval"
    auroc = f"P(clean > planted), {interval}"
    of_both = pl.col("model") == BOTH_MODELS
    return [
        _by_score(auroc, _of(frame, Statistic.AUROC).filter(~of_both)),
        _by_score(f"{auroc}, scores of both models", _of(frame, Statistic.AUROC).filter(of_both)),
        _by_score(f"Share below its own original, {interval}", _of(frame, Statistic.PAIRED_SHARE)),
        _kept(f"Kept share, {interval}", _of(frame, Statistic.KEPT_SHARE)),
        _cut_table(frame),
    ]


def missing(frame: pl.DataFrame) -> list[str]:
    """Return sentences that name what `tables` omits: defects that were not planted, scores that were not wanted."""
    wanted = _of(frame, Statistic.AUROC)
    defects = _distinct(wanted.filter(null_reason=UnknownReason.NOT_PLANTED.value), "defect")
    measures = _distinct(wanted.filter(null_reason=UnknownReason.NOT_WANTED.value), "measure")
    sentences = {
        "Not planted": defects,
        "Not scored, because `scoring.quantities` does not include it": [_SCORES[name] for name in measures],
    }
    return [f"{sentence}: {', '.join(names)}." for sentence, names in sentences.items() if names]


def as_markdown(frame: pl.DataFrame) -> str:
    """Return the tables as Markdown, for the UI."""
    said = []
    for table in tables(frame):
        head = [f"| {' | '.join(table.head)} |", "|" + "---|" * len(table.head)]
        said.append("\n".join([f"**{table.caption}**", "", *head, *(f"| {' | '.join(row)} |" for row in table.rows)]))
    said += missing(frame)
    return "\n\n".join(said) + "\n"


def _of(frame: pl.DataFrame, statistic: Statistic) -> pl.DataFrame:
    return frame.filter(statistic=statistic.value)


def _distinct(rows: pl.DataFrame, column: str) -> list[str]:
    return rows[column].unique(maintain_order=True).to_list()


def _is_asked() -> pl.Expr:
    return ~pl.col("null_reason").fill_null("").is_in([UnknownReason.NOT_PLANTED, UnknownReason.NOT_WANTED])


def _by_score(caption: str, rows: pl.DataFrame) -> Table:
    """Build a table of score, defect and one column per model; a repeated score is blank."""
    models = _distinct(rows, "model")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows.filter(_is_asked()).iter_rows(named=True):
        found.setdefault((row["measure"], row["defect"]), {})[row["model"]] = _said(row)
    keys = sorted(found, key=lambda key: list(_SCORES).index(key[0]))
    labels = _once([_SCORES[measure] for measure, _ in keys])
    lines = [
        (label, key[1], *(found[key].get(model, "") for model in models))
        for label, key in zip(labels, keys, strict=True)
    ]
    return Table(caption, ("score", "defect", *models), lines)


def _kept(caption: str, rows: pl.DataFrame) -> Table:
    known = rows.filter(_is_asked())
    lines = [
        (label, row["defect"], f"{row['num_kept']} of {row['num_clean'] or row['num_planted']}", _said(row))
        for label, row in zip(_once(known["measure"]), known.iter_rows(named=True), strict=True)
    ]
    return Table(caption, ("selection", "rows", "kept", "share"), lines)


def _cut_table(frame: pl.DataFrame) -> Table:
    """Build the table of suggested cuts of RMI, with the clean rows that each keeps."""
    lines = [
        (
            row["statistic"].replace("_", " "),
            row["model"],
            _said(row),
            "" if row["num_kept"] is None else f"{row['num_kept']:,} of {row['num_clean']:,}",
        )
        for row in frame.filter(pl.col("statistic").is_in(_CUTS)).iter_rows(named=True)
    ]
    return Table("Cuts of RMI, nats per token", ("cut", "model", "RMI", "clean rows kept"), lines)


def _once(labels: Iterable[str]) -> list[str]:
    """Return the labels, with repeats of the one before blanked."""
    return ["" if label == before else label for before, label in itertools.pairwise(["", *labels])]


def _said(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return row["null_reason"].replace("_", " ")
    return f"{row['value']:.3f}" + ("" if row["lower"] is None else f" [{row['lower']:.2f}, {row['upper']:.2f}]")


# --- plots ------------------------------------------------------------------------------------------------------------


def told_apart(frame: pl.DataFrame) -> Plot:
    """Plot the AUROCs of every model's RMI, and of the answer length in the first model's tokens."""
    auroc, roles = _known_aurocs(frame)
    groups = {("rmi", role): f"RMI, {role}" for role in roles}
    groups |= {("num_a_tokens_untruncated", role): "answer length" for role in roles[:1]}
    parts = [
        auroc.filter(measure=measure, model=role).with_columns(group=pl.lit(name))
        for (measure, role), name in groups.items()
    ]
    return plots.told_apart(pl.concat(parts).select("group", "defect", "value", "lower", "upper") if parts else auroc)


def _grids(frame: pl.DataFrame) -> list[Plot]:
    auroc, roles = _known_aurocs(frame)
    cells = auroc.with_columns(score=pl.col("measure").replace_strict(_SCORES))
    return [
        plots.auroc_grid(f"auroc_{name}", of, cells.filter(model=model).select("score", "defect", "value"))
        for name, of, model in (
            *((role, f"{role} model", role) for role in roles),
            ("both", "both models together", BOTH_MODELS),
        )
    ]


def _cut_plots(frame: pl.DataFrame, judged: Judged | None) -> list[Plot]:
    if judged is None:
        return []
    values = frame.filter(pl.col("statistic").is_in(_CUTS)).drop_nulls("value")
    return [
        plots.cuts(
            summaries.spread({label: calibration.rmi_of(judged, role, defect) for label, defect in _GROUPS.items()}),
            role,
            values.filter(model=role)["value"].to_list(),
        )
        for role in _known_aurocs(frame)[1]
    ]


def _known_aurocs(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the AUROCs that are known, with the labels of defects on an axis, and the models that have one."""
    auroc = _in_words(_of(frame, Statistic.AUROC))
    return auroc, [name for name in _distinct(auroc, "model") if name != BOTH_MODELS]


def _in_words(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.drop_nulls("value").with_columns(pl.col("defect").str.replace_all("_", " "))


# --- the page ---------------------------------------------------------------------------------------------------------


def page(
    planted_rows: StoredTable,
    gate: Gate | None,
    judged: Judged | None,
    frame: pl.DataFrame,
    finding: Finding,
    defects: Sequence[Defect],
    published: Selection,
    made: Made,
) -> bytes:
    """Render the page of a batch's calibration as one HTML file.

    Args:
        planted_rows: PlantedRows of the batch.
        gate: the verdict on the batch.
        judged: their scores and those of the batch; None if nothing was planted.
        frame: the Calibration computed from these.
        finding: whether the models can tell pairs from mismatches.
        defects: the defects to plant.
        published: the selection that gets the suggested cuts.
        made: the run that renders the page, and when.
    """
    batch, planted = batch_of(planted_rows), planted_rows.frame
    kept_cells = _in_words(_of(frame, Statistic.KEPT_SHARE))
    *of_aurocs, kept, cuts = tables(frame)
    numbers = [(defect.value, planted.filter(defect=defect.value).height, defect.meaning) for defect in defects]
    return pages.render(
        "calibration.html",
        {
            "title": f"Calibration of batch {batch}",
            "batch": batch,
            "gate": gate,
            "finding": finding,
            "num_planted": planted.height,
            "num_pairs": 0 if judged is None else judged.clean["pair_id"].n_unique(),
            "defects": Table("Planted defects", ("defect", "rows", "meaning"), numbers),
            "auroc_plots": [told_apart(frame), *_grids(frame)],
            "kept_plots": [plots.kept_grid(kept_cells.select(selection="measure", defect="defect", value="value"))],
            "cut_plots": _cut_plots(frame, judged),
            "tables": of_aurocs,
            "missing": missing(frame),
            "kept": kept,
            "cuts": cuts,
            "offered": calibration.offered_yaml(frame, published),
            "blind": None if finding.passed else BLIND,
            "examples": {} if judged is None else _examples(judged, planted, defects),
            "limits": LIMITS,
            "made": made,
        },
    )


def _examples(judged: Judged, planted: pl.DataFrame, defects: Iterable[Defect]) -> dict[str, list[Example]]:
    """Return three scored rows per defect: the best, the median and the worst detected by RMI.

    An echo is detected if it scores above its original, any other defect if it scores below.
    """
    roles = sorted(judged.clean["model"].unique())
    after = planted.select("pair_id", "defect", "original_pair_id", "query", "answer")
    texts = after.join(_rmi_columns(judged.planted, ""), on="pair_id", validate="1:1").join(
        _rmi_columns(judged.clean, ":twin"), left_on="original_pair_id", right_on="pair_id", how="left"
    )
    below = pl.col(f"{roles[0]}:twin") - pl.col(roles[0])
    told = texts.with_columns(told=pl.when(pl.col("defect") == Defect.ECHO.value).then(-below).otherwise(below))
    found = {}
    for defect in defects:
        of_defect = told.filter(defect=defect.value)
        rows = of_defect.drop_nulls("told").sort("told", "pair_id", descending=[True, False])
        if not rows.is_empty():
            shown = rows[sorted({0, rows.height // 2, rows.height - 1})]
            title = f"{defect.value} ({of_defect.height:,} rows): {defect.meaning}"
            found[title] = [_example(row, roles) for row in shown.iter_rows(named=True)]
    return found


def _rmi_columns(pairs: pl.DataFrame, suffix: str) -> pl.DataFrame:
    """Return pair_id and the RMI under each model, as `<model><suffix>`."""
    columns = pairs.pivot("model", index="pair_id", values="rmi")
    return columns.rename({role: f"{role}{suffix}" for role in columns.columns[1:]})


def _example(row: Mapping[str, Any], roles: Sequence[str]) -> Example:
    numbers = [
        f"{role}: RMI {before:.3f} as delivered, {after:.3f} planted"
        for role in roles
        if (before := row[f"{role}:twin"]) is not None and (after := row[role]) is not None
    ]
    side = "above" if row["defect"] == Defect.ECHO.value else "below"
    verdict = f"{side} its original" if row["told"] > 0 else f"not {side} its original"
    return Example(
        place=f"made from pair {row['original_pair_id']}",
        decision=row["defect"],
        reason=verdict,
        explanation="",
        texts={"query": row["query"], "answer": row["answer"]},
        numbers="; ".join(numbers),
    )
