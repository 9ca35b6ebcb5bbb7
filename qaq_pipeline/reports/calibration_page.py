"""What a person reads of a calibration: its tables, in a terminal or in Markdown, and its page with plots.

Belongs here: which numbers stand beside which, from Calibration to tables, plots and bytes. Does not belong here: the
numbers (`calibration`), how a plot is drawn (`plots`), how a page is written (`report`), where it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from qaq_pipeline.calibration import calibration
from qaq_pipeline.calibration.calibration import CONFIDENCE, Judged
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.reports import pages, plots, summaries
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.reports.pages import Example, Examples, Made, Table
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN
from qaq_pipeline.schema.vocabularies import Defect, Statistic, UnknownReason
from qaq_pipeline.screening.gates import Gate

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
"""What the judged scores are called."""

_CUTS = (Statistic.LOW_CUT.value, Statistic.HIGH_CUT.value)
_GROUPS = {"as delivered": CLEAN, "other answer": Defect.OTHER_ANSWER.value, "echo": Defect.ECHO.value}

BLIND = "What follows rests on models that cannot tell good from bad here: do not defend a cut with it."
"""Said before cuts that are offered where the models were found blind."""

LIMITS = (
    "A planted defect is made by rule, from a row of this batch. Real defects are other ones: what is told apart here "
    "may be missed there.",
    "A row as delivered counts as clean. Where the batch is bad, AUROCs are too low, and the low cut rises or "
    "is missing.",
    "An AUROC compares the planted rows with the rows that they were made of, not with the whole batch.",
    "One token of the code that is wrong is the negative control: no likelihood of a text can be expected to tell it.",
    "It says whether the scores notice a defect, not whether a model that is trained without it becomes better.",
)


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(frame: pl.DataFrame) -> list[Table]:
    """The numbers of a Calibration, long: one row a score and defect, one column a model.

    What was not planted, or not asked for, has no row; `missing` names it. A number that is not known is its reason.
    """
    interval = f"{CONFIDENCE:.0%} interval"
    auroc = f"P(clean > planted), {interval}"
    of_both = pl.col("model") == BOTH_MODELS
    return [
        _by_score(auroc, _of(frame, Statistic.AUROC).filter(~of_both)),
        _by_score(f"{auroc}, scores of both models", _of(frame, Statistic.AUROC).filter(of_both)),
        _by_score(f"Share below its own twin, {interval}", _of(frame, Statistic.PAIRED_SHARE)),
        _kept(f"Kept share, {interval}", _of(frame, Statistic.KEPT_SHARE)),
        _cut_table(frame),
    ]


def missing(frame: pl.DataFrame) -> list[str]:
    """Sentences on what `tables` has no row of: defects without a planted row, scores that were not asked for."""
    wanted = _of(frame, Statistic.AUROC)
    absent = {
        reason: wanted.filter(pl.col("null_reason") == reason.value)
        for reason in (UnknownReason.NOT_PLANTED, UnknownReason.NOT_WANTED)
    }
    names = absent[UnknownReason.NOT_PLANTED]["defect"].unique(maintain_order=True).to_list()
    scores = [_SCORES[name] for name in absent[UnknownReason.NOT_WANTED]["measure"].unique(maintain_order=True)]
    sentences = {
        f"Not planted: {', '.join(names)}.": names,
        f"Not scored, since `scoring.quantities` does not ask for it: {', '.join(scores)}.": scores,
    }
    return [sentence for sentence, of in sentences.items() if of]


def as_markdown(frame: pl.DataFrame) -> str:
    """The tables in Markdown, for the UI."""
    said = []
    for table in tables(frame):
        head = [f"| {' | '.join(table.head)} |", "|" + "---|" * len(table.head)]
        said.append("\n".join([f"**{table.caption}**", "", *head, *(f"| {' | '.join(row)} |" for row in table.rows)]))
    said += missing(frame)
    return "\n\n".join(said) + "\n"


def _of(frame: pl.DataFrame, statistic: Statistic) -> pl.DataFrame:
    return frame.filter(pl.col("statistic") == statistic.value)


def _is_asked() -> pl.Expr:
    return ~pl.col("null_reason").fill_null("").is_in([UnknownReason.NOT_PLANTED, UnknownReason.NOT_WANTED])


def _by_score(caption: str, rows: pl.DataFrame) -> Table:
    """Score, defect and a column for each model; the score stands where it begins."""
    models = rows["model"].unique(maintain_order=True).to_list()
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows.filter(_is_asked()).iter_rows(named=True):
        found.setdefault((row["measure"], row["defect"]), {})[row["model"]] = _said(row)
    lines = sorted(found.items(), key=lambda item: list(_SCORES).index(item[0][0]))
    labels = _once(_SCORES[measure] for (measure, _), _ in lines)
    return Table(
        caption,
        ("score", "defect", *models),
        [
            (label, defect, *(cells.get(model, "") for model in models))
            for label, ((_, defect), cells) in zip(labels, lines, strict=True)
        ],
    )


def _kept(caption: str, rows: pl.DataFrame) -> Table:
    known = rows.filter(_is_asked())
    labels = _once(known["measure"])
    return Table(
        caption,
        ("selection", "rows", "kept", "share"),
        [
            (label, row["defect"], f"{row['num_kept']} of {row['num_clean'] or row['num_planted']}", _said(row))
            for label, row in zip(labels, known.iter_rows(named=True), strict=True)
        ],
    )


def _cut_table(frame: pl.DataFrame) -> Table:
    """Where RMI could be cut, and how many of the rows as delivered a cut leaves."""
    rows = frame.filter(pl.col("statistic").is_in(_CUTS))
    return Table(
        "Cuts of RMI, nats per token",
        ("cut", "model", "RMI", "leaves of the clean rows"),
        [
            (
                row["statistic"].replace("_", " "),
                row["model"],
                _said(row),
                "" if row["num_kept"] is None else f"{row['num_kept']:,} of {row['num_clean']:,}",
            )
            for row in rows.iter_rows(named=True)
        ],
    )


def _once(labels: Any) -> Iterator[str]:
    """Each label where it begins, and nothing where it goes on."""
    before = None
    for label in labels:
        yield "" if label == before else label
        before = label


def _said(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return row["null_reason"].replace("_", " ")
    return f"{row['value']:.3f}" + ("" if row["lower"] is None else f" [{row['lower']:.2f}, {row['upper']:.2f}]")


# --- plots ------------------------------------------------------------------------------------------------------------


def told_apart(frame: pl.DataFrame) -> Plot:
    """What RMI tells apart, by a Calibration."""
    auroc = _known_aurocs(frame)
    return plots.told_apart(_intervals(auroc, _roles(auroc)))


def _grids(frame: pl.DataFrame) -> list[Plot]:
    auroc = _known_aurocs(frame)
    return [
        *(plots.auroc_grid(f"auroc_{role}", f"{role} model", _cells(auroc, role)) for role in _roles(auroc)),
        plots.auroc_grid("auroc_both", "both models together", _cells(auroc, BOTH_MODELS)),
    ]


def _cut_plots(frame: pl.DataFrame, judged: Judged | None) -> list[Plot]:
    if judged is None:
        return []
    roles = _roles(_known_aurocs(frame))
    return [plots.cuts(_spread(judged, role), role, _marks(frame, role)) for role in roles]


def _known_aurocs(frame: pl.DataFrame) -> pl.DataFrame:
    return _of(frame, Statistic.AUROC).drop_nulls("value")


def _roles(auroc: pl.DataFrame) -> list[str]:
    return [name for name in auroc["model"].unique(maintain_order=True) if name != BOTH_MODELS]


def _intervals(auroc: pl.DataFrame, roles: Sequence[str]) -> pl.DataFrame:
    """RMI of every model, and the length that the first one counts."""
    groups = {("rmi", role): f"RMI, {role}" for role in roles}
    groups |= {("num_a_tokens_untruncated", role): "answer length" for role in roles[:1]}
    parts = [
        auroc.filter(pl.col("measure") == measure, pl.col("model") == role).select(
            pl.lit(name).alias("group"), _in_words(), "value", "lower", "upper"
        )
        for (measure, role), name in groups.items()
    ]
    return pl.concat(parts) if parts else auroc.select(pl.lit("").alias("group"), "defect", "value", "lower", "upper")


def _cells(auroc: pl.DataFrame, model: str) -> pl.DataFrame:
    of_model = auroc.filter(pl.col("model") == model)
    return of_model.select(pl.col("measure").replace_strict(_SCORES).alias("score"), _in_words(), "value")


def _kept_cells(frame: pl.DataFrame) -> pl.DataFrame:
    rows = _of(frame, Statistic.KEPT_SHARE).drop_nulls("value")
    return rows.select(pl.col("measure").alias("selection"), _in_words(), "value")


def _in_words() -> pl.Expr:
    """A defect as an axis names it."""
    return pl.col("defect").str.replace_all("_", " ")


def _spread(judged: Judged, role: str) -> pl.DataFrame:
    return summaries.spread({label: calibration.rmi_of(judged, role, defect) for label, defect in _GROUPS.items()})


def _marks(frame: pl.DataFrame, role: str) -> list[float]:
    of_role = frame.filter(pl.col("statistic").is_in(_CUTS), pl.col("model") == role)
    return of_role["value"].drop_nulls().to_list()


# --- the page ---------------------------------------------------------------------------------------------------------


def page(
    batch: str,
    frame: pl.DataFrame,
    judged: Judged | None,
    planted: pl.DataFrame,
    settings: Settings,
    finding: Finding,
    gate: Gate | None,
    made: Made,
) -> bytes:
    """The page of a batch's calibration, one HTML file.

    Args:
        batch: its name.
        frame: its Calibration.
        judged: what that was made of; None: nothing was planted.
        planted: its PlantedRows.
        settings: what they were made by.
        finding: whether the models can tell.
        gate: why nothing of the batch was scored; None: it was.
        made: by whom and when.
    """
    *of_aurocs, kept, cuts = tables(frame)
    return pages.render(
        "calibration.html",
        {
            "title": f"Calibration of batch {batch}",
            "batch": batch,
            "gate": gate,
            "finding": finding,
            "num_planted": planted.height,
            "num_pairs": 0 if judged is None else judged.clean["pair_id"].n_unique(),
            "defects": Table(
                "The defects that were planted",
                ("defect", "rows", "what is done"),
                [
                    (defect.value, planted.filter(pl.col("defect") == defect.value).height, defect.meaning)
                    for defect in settings.calibration.defects
                ],
            ),
            "auroc_plots": [told_apart(frame), *_grids(frame)],
            "kept_plots": [plots.kept_grid(_kept_cells(frame))],
            "cut_plots": _cut_plots(frame, judged),
            "tables": of_aurocs,
            "missing": missing(frame),
            "kept": kept,
            "cuts": cuts,
            "offered": calibration.offered_yaml(frame, settings.published),
            "blind": None if finding.passed else BLIND,
            "examples": [] if judged is None else _examples(judged, planted, settings),
            "limits": LIMITS,
            "made": made,
        },
    )


def _examples(judged: Judged, planted: pl.DataFrame, settings: Settings) -> list[Examples]:
    """Of each defect some scored rows, from the one that RMI tells best to the one that it tells least.

    An echo is told by scoring above its twin, every other defect by scoring below it.
    """
    roles = sorted(settings.models)
    after = planted.select("pair_id", "defect", "original_pair_id", "query", "answer")
    texts = after.join(_rmi_columns(judged.planted, ""), on="pair_id", validate="1:1").join(
        _rmi_columns(judged.clean, ":twin"), left_on="original_pair_id", right_on="pair_id", how="left"
    )
    below = pl.col(f"{roles[0]}:twin") - pl.col(roles[0])
    told = texts.with_columns(told=pl.when(pl.col("defect") == Defect.ECHO.value).then(-below).otherwise(below))
    found = []
    for defect in settings.calibration.defects:
        of_defect = told.filter(pl.col("defect") == defect.value)
        rows = of_defect.drop_nulls("told").sort("told", "pair_id", descending=[True, False])
        if not rows.is_empty():
            shown = rows[sorted({0, rows.height // 2, rows.height - 1})]
            title = f"{defect.value} ({of_defect.height:,} rows): {defect.meaning}"
            found.append(Examples(title, [_example(row, roles) for row in shown.iter_rows(named=True)]))
    return found


def _rmi_columns(pairs: pl.DataFrame, suffix: str) -> pl.DataFrame:
    """pair_id and the RMI under each model, `<model><suffix>`."""
    columns = pairs.pivot("model", index="pair_id", values="rmi")
    return columns.rename({role: f"{role}{suffix}" for role in columns.columns[1:]})


def _example(row: Mapping[str, Any], roles: Sequence[str]) -> Example:
    numbers = [
        f"{role}: RMI {before:.3f} as delivered, {after:.3f} planted"
        for role in roles
        if (before := row[f"{role}:twin"]) is not None and (after := row[role]) is not None
    ]
    side = "above" if row["defect"] == Defect.ECHO.value else "below"
    verdict = f"{side} its twin" if row["told"] > 0 else f"not {side} its twin"
    return Example(
        place=f"made of pair {row['original_pair_id']}",
        decision=row["defect"],
        reason=verdict,
        explanation="",
        texts={"query": row["query"], "answer": row["answer"]},
        numbers="; ".join(numbers),
    )
