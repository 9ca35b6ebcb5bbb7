"""Present a calibration: tables for a terminal or Markdown, and an HTML page with plots and examples.

Belongs here: the layout of the numbers, from Calibration to tables, plots and bytes. Does not belong here: the numbers
(`calibration`), drawing (`plots`), rendering (`pages`) and storage (`page_store`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import polars as pl

from qaq_pipeline.calibration.calibration import CONFIDENCE, VALID, Judged
from qaq_pipeline.calibration.planted_batch import PlantedBatch
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.reports import pages, plots, summaries
from qaq_pipeline.reports.check_metrics import Finding
from qaq_pipeline.reports.pages import Example, Made, Table
from qaq_pipeline.reports.plots import Plot
from qaq_pipeline.schema.tables import BOTH_MODELS, CLEAN
from qaq_pipeline.schema.vocabularies import Defect, Signal, Statistic, UnknownReason
from qaq_pipeline.scoring.pairs import accepted_parts
from qaq_pipeline.screening.gates import Gate
from qaq_pipeline.storage.origin import batch_of
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import words
from qaq_pipeline.validity.judgement import judged_pairs, of_signal
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline.validity.signals.signal import Definition

_SCORES = {
    "rmi": "RMI",
    "rank": "rank of RMI",
    "ifd_ppl": "IFD",
    "log_ppl_q": "log PPL(Q)",
    "log_ppl_q_given_a": "log PPL(Q|A)",
    "log_ppl_a_given_q": "log PPL(A|Q)",
    "nll_end": "NLL of the end",
    "num_a_tokens_untruncated": "answer length",
    "gap": "gap",
    "rank_sum": "sum of ranks",
}
"""Labels of the judged scores."""

_SETS_CUTS_OF = {
    defect.value: ", ".join(one.signal for one in SIGNALS if defect in one.defects)
    for defect in Defect
    if any(defect in one.defects for one in SIGNALS)
}
"""The signals whose cuts the planted rows of a defect set; the rows of other defects set none."""

LIMITS = (
    "Planted defects are made by rule from rows of this batch. Real defects differ: scores that detect the planted "
    "ones may miss them.",
    "Every delivered row counts as clean. If the batch is bad, AUROCs are too low, and a signal may have no cut.",
    "The same planted rows set the cuts of the signals. What a selection keeps of the other defects is an independent "
    "test.",
    "An AUROC compares the planted rows with their original rows, not with the whole batch.",
    "A single wrong token of code is the negative control: no likelihood can be expected to detect it.",
    "The calibration shows whether the scores notice a defect, not whether training without it improves a model.",
)


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(frame: pl.DataFrame) -> list[Table]:
    """Return the numbers of a Calibration: one row per score and defect, one column per model.

    Defects that were not planted and scores that were not wanted have no row; `missing` names them. An unknown number
    is shown as its reason. The shares that selections keep and signals drop come first.
    """
    interval = f"{CONFIDENCE:.0%} interval"
    auroc = f"P(clean > planted), {interval}"
    of_both = pl.col("model") == BOTH_MODELS
    return [
        _counted(f"Kept share, {interval}", ("selection", "rows", "kept", "share"), _of(frame, Statistic.KEPT_SHARE)),
        _dropped(_of(frame, Statistic.DROPPED_SHARE)),
        _by_score(auroc, _of(frame, Statistic.AUROC).filter(~of_both)),
        _by_score(f"{auroc}, scores of both models", _of(frame, Statistic.AUROC).filter(of_both)),
        _by_score(f"Share below its own original, {interval}", _of(frame, Statistic.PAIRED_SHARE)),
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


def _counted(caption: str, head: Sequence[str], rows: pl.DataFrame) -> Table:
    """Build a table of shares with their counts and intervals: measure, rows, count, share; a repeat is blank."""
    known = rows.filter(_is_asked())
    lines = [
        (label, row["defect"], _count(row), _said(row))
        for label, row in zip(_once(known["measure"]), known.iter_rows(named=True), strict=True)
    ]
    return Table(caption, head, lines)


def _count(row: Mapping[str, Any]) -> str:
    return "" if row["num_kept"] is None else f"{row['num_kept']:,} of {row['num_clean'] or row['num_planted']:,}"


def _dropped(rows: pl.DataFrame) -> Table:
    """Build the table of the shares that each signal would drop: one row per defect, one column per signal."""
    known = rows.filter(_is_asked())
    measures = _distinct(known, "measure")
    found: dict[str, dict[str, str]] = {}
    for row in known.iter_rows(named=True):
        said = _reason(row) if row["value"] is None else f"{row['value']:.3f}"
        found.setdefault(row["defect"], {})[row["measure"]] = said
    lines = [(defect, *(cells[measure] for measure in measures)) for defect, cells in found.items()]
    return Table("Share that each signal would drop, and share that is valid", ("rows", *measures), lines)


def _once(labels: Iterable[str]) -> list[str]:
    """Return the labels, with repeats of the one before blanked."""
    return ["" if label == before else label for before, label in itertools.pairwise(["", *labels])]


def _said(row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return _reason(row)
    return f"{row['value']:.3f}" + ("" if row["lower"] is None else f" [{row['lower']:.2f}, {row['upper']:.2f}]")


def _reason(row: Mapping[str, Any]) -> str:
    return row["null_reason"].replace("_", " ")


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


def _known_aurocs(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Return the AUROCs that are known, with the labels of defects on an axis, and the models that have one."""
    auroc = _in_words(_of(frame, Statistic.AUROC))
    return auroc, [name for name in _distinct(auroc, "model") if name != BOTH_MODELS]


def _in_words(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.drop_nulls("value").with_columns(pl.col("defect").str.replace_all("_", " "))


# --- the page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """What a page shows of a batch besides numbers."""

    batch: str
    texts: Callable[[], Iterable[pl.DataFrame]]
    """Returns pair_id, query and answer of its pairs, part by part."""
    scores: Mapping[str, StoredTable]
    """RmiScores of these pairs, by model."""
    planted: pl.DataFrame
    """PlantedRows."""
    cuts: pl.DataFrame
    """ValidityCuts."""

    @classmethod
    def of(cls, batch: PlantedBatch) -> Self:
        """Take it from the stored tables."""
        sample = batch.sample
        texts = partial(accepted_parts, sample.raw_data, sample.screened_data, "query", "answer")
        planted, cuts = sample.planted_rows.frame, batch.judged.cuts.frame
        return cls(batch_of(sample.planted_rows), texts, sample.rmi_scores, planted, cuts)


@dataclass(frozen=True, slots=True)
class SignalPart:
    """The part of the page about one signal."""

    name: str
    meaning: str
    action: str
    """What the settings do with the pairs that have the defect by this signal."""
    sentence: str
    """Its cut and what it costs, or why there is none."""
    plots: Sequence[Plot] = ()
    examples: Mapping[str, Sequence[Example]] | None = None
    """Pairs as delivered on both sides of the cut, nearest first; None: there is no cut."""


def page(
    shown: Shown,
    gate: Gate | None,
    judged: Judged | None,
    frame: pl.DataFrame,
    findings: Sequence[Finding],
    settings: Settings,
    made: Made,
) -> bytes:
    """Render the page of a batch's calibration as one HTML file.

    Args:
        shown: texts and cuts of the batch.
        gate: the verdict on the batch.
        judged: scores and validity of the planted rows and of the batch; None if nothing was planted.
        frame: the Calibration computed from these.
        findings: whether the published selection keeps defects out, and whether the models can tell pairs from
            mismatches.
        settings: the published selection, the defects to plant, the actions of the signals, the number of examples.
        made: the run that renders the page, and when.
    """
    defects, planted = settings.calibration.defects, shown.planted
    kept_cells = _in_words(_of(frame, Statistic.KEPT_SHARE))
    kept, dropped, *of_aurocs = tables(frame)
    with_counts = _counted(
        f"Share that each signal would drop, and share that is {VALID}, {CONFIDENCE:.0%} interval",
        ("signal", "rows", "counted", "share"),
        _of(frame, Statistic.DROPPED_SHARE),
    )
    numbers = [(defect.value, planted.filter(defect=defect.value).height, defect.meaning) for defect in defects]
    return pages.render(
        "calibration.html",
        {
            "title": f"Calibration of batch {shown.batch}",
            "batch": shown.batch,
            "published": settings.published.name,
            "gate": gate,
            "warnings": [] if gate else words.warnings(shown.cuts),
            "findings": findings,
            "num_planted": planted.height,
            "num_pairs": 0 if judged is None else judged.clean["pair_id"].n_unique(),
            "proof": _proof(frame, settings.published.name),
            "independent": [name for name, number, _ in numbers if number and _is_independent(name)],
            "kept_plots": [plots.kept_grid(kept_cells.select(selection="measure", defect="defect", value="value"))],
            "kept": kept,
            "dropped": dropped,
            "with_counts": with_counts,
            "signals": [] if gate else _signals(shown, judged, settings),
            "defects": Table("Planted defects", ("defect", "rows", "meaning"), numbers),
            "auroc_plots": [told_apart(frame), *_grids(frame)],
            "tables": of_aurocs,
            "missing": missing(frame),
            "examples": {} if judged is None else _examples(judged, planted, defects),
            "limits": LIMITS,
            "made": made,
        },
    )


def _is_independent(defect: str) -> bool:
    """Return true if the rows of a defect set no cut and are expected to be kept out."""
    return defect not in _SETS_CUTS_OF and defect != Defect.ONE_TOKEN_BUG.value


def _proof(frame: pl.DataFrame, published: str) -> Table:
    """Build the table of what the published selection keeps: the rows as delivered first, then independent defects."""
    rows = _of(frame, Statistic.KEPT_SHARE).filter(_is_asked(), measure=published).to_dicts()
    lines = []
    for row in rows:
        name = "as delivered" if row["defect"] == CLEAN else row["defect"]
        lines.append((name, _count(row), _said(row), _SETS_CUTS_OF.get(row["defect"], "")))
    caption = f"What the selection {published} keeps, {CONFIDENCE:.0%} interval"
    head = ("rows", "kept", "share", "sets the cut of")
    return Table(caption, head, sorted(lines, key=lambda line: line[3] != ""))


def _signals(shown: Shown, judged: Judged | None, settings: Settings) -> list[SignalPart]:
    """Return the part about each signal. The texts of all pairs that are shown are read in one pass."""
    parts = [_signal(one, shown, judged, settings) for one in SIGNALS]
    wanted = [rows["pair_id"] for _, near in parts for rows in near.values() if not rows.is_empty()]
    texts, pairs = _read(shown, pl.concat(wanted).unique()) if wanted else (pl.DataFrame(), pl.DataFrame())
    found = []
    for one, (part, near) in zip(SIGNALS, parts, strict=True):
        examples = {title: _near_examples(one, shown, rows, texts, pairs) for title, rows in near.items()}
        found.append(replace(part, examples=examples or None))
    return found


def _read(shown: Shown, pair_ids: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the texts of some pairs, and these pairs as the signals read them."""
    is_wanted = pl.col("pair_id").is_in(pair_ids.implode())
    texts = pl.concat(part.filter(is_wanted) for part in shown.texts())
    scores = {role: pl.concat(part.filter(is_wanted) for part in table.parts()) for role, table in shown.scores.items()}
    return texts, judged_pairs(scores, texts)


def _signal(
    one: Definition, shown: Shown, judged: Judged | None, settings: Settings
) -> tuple[SignalPart, dict[str, pl.DataFrame]]:
    """Return the part about a signal, without examples, and the pairs nearest to its cut, of `_nearest`."""
    name, action = one.signal.value, getattr(settings.validity, one.signal.value)
    cuts = shown.cuts.filter(signal=name)
    sentence = next(iter(words.of_cuts(cuts)), f"{name}: it is turned off (validity.{name})")
    part = SignalPart(name, one.signal.meaning, action, f"{sentence}.")
    if judged is None or cuts["cut"].null_count() == cuts.height:
        return part, {}
    (cut,) = cuts.to_dicts()
    clean, planted = (of_signal(validity, one.signal) for validity in judged.validity)
    of_defect = judged.validity[1]["defect"].is_in([defect.value for defect in one.defects])
    groups = {"as delivered": clean["evidence"], " or ".join(one.defects): planted.filter(of_defect)["evidence"]}
    plot = plots.evidence(summaries.spread(groups), name, cut["cut"])
    return replace(part, plots=[plot]), _nearest(one, cut["cut"], clean, settings.reports.examples)


def _nearest(one: Definition, cut: float, evidence: pl.DataFrame, most: int) -> dict[str, pl.DataFrame]:
    """Return the pairs as delivered nearest to the cut on both sides, nearest first, at most `most` of each."""
    known = evidence.lazy().drop_nulls("evidence")
    sides = {"Nearest pairs that it would drop": True, "Nearest pairs that it would keep": False}
    return {
        f"{title} ({one.signal})": known.filter(pl.col("is_raised") == is_raised)
        .sort((pl.col("evidence") - cut).abs(), "pair_id")
        .head(most)
        .collect()
        for title, is_raised in sides.items()
    }


def _near_examples(
    one: Definition, shown: Shown, near: pl.DataFrame, of_all: pl.DataFrame, pairs: pl.DataFrame
) -> list[Example]:
    """Return examples of the pairs near a cut; texts and pairs of `_read`."""
    if near.is_empty():
        return []
    (cut,) = shown.cuts.filter(signal=one.signal.value).to_dicts()
    texts = near.join(of_all, on="pair_id", validate="1:1", maintain_order="left")
    numbers = words.measured(one, pairs, cut, dict(near.select("pair_id", "evidence").iter_rows()))
    copied = pairs.unique("pair_id").select("pair_id", "query_in_answer", "answer_in_query")
    return [
        Example(
            place=f"pair {row['pair_id']}",
            decision="would be dropped" if row["is_raised"] else "would be kept",
            reason=f"evidence {row['evidence']:.3f}, cut {cut['cut']:.3f}",
            explanation=f"{numbers[row['pair_id']]}.",
            texts={"query": row["query"], "answer": row["answer"]},
            numbers=_copied(row) if one.signal is Signal.ECHO else "",
        )
        for row in texts.join(copied, on="pair_id", maintain_order="left").iter_rows(named=True)
    ]


def _copied(row: Mapping[str, Any]) -> str:
    return (
        f"{row['query_in_answer']:.0%} of the query's word sequences occur in the answer, and "
        f"{row['answer_in_query']:.0%} of the answer's in the query"
    )


def _examples(judged: Judged, planted: pl.DataFrame, defects: Iterable[Defect]) -> dict[str, list[Example]]:
    """Return three scored rows per defect: the best, the median and the worst detected by RMI.

    An echo is detected if it scores above its original, any other defect if it scores below.
    """
    roles = sorted(judged.clean["model"].unique())
    after = planted.select("pair_id", "defect", "original_pair_id", "query", "answer")
    is_original = pl.col("pair_id").is_in(planted["original_pair_id"].unique().implode())
    originals = judged.clean.lazy().filter(is_original).select("pair_id", "model", "rmi").collect()
    texts = after.join(_rmi_columns(judged.planted, ""), on="pair_id", validate="1:1").join(
        _rmi_columns(originals, ":twin"), left_on="original_pair_id", right_on="pair_id", how="left"
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
