"""The acceptance of validity: real pairs of which a share is made bad, curated by the product; what it publishes.

    python -m bench.validity PAIRS.json [--draws 5] [--json FILE] [--read FILE]

PAIRS.json is a file in Alpaca form, of 400 distinct pairs for each draw. The demo's two models score it (fetched by
`python examples/fetch_models.py`); scores are cached in QAQ_HOME, so that a second run scores nothing. The bad rows
have other words, donors and places of the cut than the planted rows that set the cuts. Prints tables; --json writes
every number, --read the rows for a reader who judges them blind.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from scipy import stats

from bench.validity import bad_rows
from bench.validity.bad_rows import CLEAN, Batch
from bench.validity.curated import Curated, Score, counts, curate, texts
from qaq_pipeline.calibration.defects import guess_language
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.selections import Budget, DiffSelection, IfdSelection, RandomSelection, RmiTopSelection
from qaq_pipeline.config.selections import RmiBandSelection as BandSelection
from qaq_pipeline.config.settings import CalibrationSettings, Settings
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.validity import judgement
from qaq_pipeline.validity.judgement import MODELS

QUARTER = Budget(fraction=0.25, count=None, answer_tokens=None)
SELECTIONS = (
    DiffSelection(name="qaq", strategy="diff_high", valid=True, budget=QUARTER),
    DiffSelection(name="diff_high", strategy="diff_high", budget=QUARTER),
    BandSelection(name="rmi_band", strategy="rmi_band"),
    RmiTopSelection(name="rmi_top", strategy="rmi_top", budget=QUARTER),
    IfdSelection(name="ifd", strategy="ifd", budget=QUARTER),
    RandomSelection(name="random", strategy="random", budget=QUARTER),
)
DELIVERED = f"{0:.0%}"
MIXED = tuple(f"{share:.0%}" for share in bad_rows.SHARES if share)
OWN_DEFECTS = {
    "other answer": (Defect.OTHER_ANSWER,),
    "echo": (Defect.ECHO,),
    "cut anywhere": (Defect.CUT_ANSWER, Defect.CUT_AT_LINE),
    "cut at a line": (Defect.CUT_ANSWER, Defect.CUT_AT_LINE),
    "invented terms": (Defect.INVENTED_TERMS,),
}
"""The planted defects that set the cut for a kind of bad rows; the other kinds are never planted for a cut."""
CURVE = (0.02, 0.05, 0.08, 0.1, 0.15, 0.2, 0.3)
"""Largest missed shares of a trade-off curve."""
LEAST_IN_GROUP = 50

console = Console(width=160)
_Results = dict[str, list[Curated]]


def main() -> int:
    """Run the trial and print what it found."""
    parser = argparse.ArgumentParser(prog="python -m bench.validity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--alone", type=int, default=2, help="draws with runs of the kinds that no cut is set for")
    parser.add_argument("--ifd", action="store_true", help="score IFD too, which doubles the time")
    parser.add_argument("--json", type=Path, help="file for every number")
    parser.add_argument("--read", type=Path, help="file for the rows that a reader judges blind")
    arguments = parser.parse_args()
    settings = trial_settings(has_ifd=arguments.ifd)
    batches = bad_rows.batches(bad_rows.read_pairs(arguments.pairs), arguments.draws, arguments.alone)
    score = scored(settings, batches)

    def run(changed: Settings, wanted: Sequence[str], *, is_valid_first: bool = False) -> _Results:
        found: _Results = {}
        for batch in batches:
            if batch.name in wanted:
                curated = curate(batch, changed, score, is_valid_first=is_valid_first)
                found.setdefault(batch.name, []).append(curated)
        return found

    names = [one.name for one in settings.selections]
    results = run(settings, [DELIVERED, *MIXED, *bad_rows.ALONE_KINDS])
    report = {
        "by_share": {name: shares(results[name], names) for name in (DELIVERED, *MIXED)},
        "declared_valid": declared([one for name in MIXED for one in results[name]]),
        "alone": {name: declared(found) for name, found in results.items() if name in bad_rows.ALONE_KINDS},
        "left_out": left_out(settings, run),
        "valid_first": {name: shares(found, ["qaq"]) for name, found in ranked_among_valid(settings, run).items()},
        "curves": curves(settings, run),
        "groups": groups(results[DELIVERED]),
    }
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    if arguments.read:
        to_read(results[DELIVERED]).write_ndjson(arguments.read)
    return 0


def trial_settings(*, has_ifd: bool) -> Settings:
    """The demo's models and the product's defaults. Only the defects that set cuts are planted."""
    demo = load_settings("demo")
    selections = [one for one in SELECTIONS if has_ifd or not isinstance(one, IfdSelection)]
    defects = tuple(defect for defect in Defect if any(defect in own for own in OWN_DEFECTS.values()))
    quantities = ("rmi", "ifd", "end") if has_ifd else ("rmi", "end")
    return demo.model_copy(
        update={
            "selections": tuple(selections),
            "calibration": CalibrationSettings(defects=defects),
            "scoring": demo.scoring.model_copy(update={"quantities": quantities}),
        }
    )


def scored(settings: Settings, batches: Sequence[Batch]) -> Score:
    """Score every row of every batch, and every planted row, once.

    IFD, which only orders pairs, is that of the strong model, and planted rows get none.
    """
    both = [texts(batch, settings) for batch in batches]
    delivered, planted = (_distinct(frames) for frames in zip(*both, strict=True))
    without_ifd = settings.scoring.model_copy(update={"quantities": ("rmi", "end")})
    storage, found = open_storage(settings), {}
    for role in MODELS:
        parts = []
        of_delivered = settings.scoring if role == "strong" else without_ifd
        for scoring, pairs in ((of_delivered, delivered), (without_ifd, _without(planted, delivered))):
            runtime = ModelRuntime(settings.models, scoring, settings.runtime, settings.model_cache_dir)
            made = runtime.score(role, Pairs.of(pairs), storage, lambda done: print(done.sentence, file=sys.stderr))  # noqa: T201
            parts.append(rmi_scores.rmi_scores(made.frame, settings.eligibility))
        found[role] = pl.concat(parts)

    def score(role: str, rows: pl.DataFrame) -> pl.DataFrame:
        return rows.select("pair_id").join(found[role], on="pair_id", how="left", validate="1:1").sort("pair_id")

    return score


def _distinct(frames: Sequence[pl.DataFrame]) -> list[Pair]:
    rows = pl.concat(frame.select("pair_id", "query", "answer") for frame in frames).unique("pair_id").sort("pair_id")
    return [Pair(pair_id, None, query, answer) for pair_id, query, answer in rows.iter_rows()]


def _without(pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    known = {pair.pair_id for pair in others}
    return [pair for pair in pairs if pair.pair_id not in known]


def shares(found: Sequence[Curated], names: Sequence[str]) -> dict[str, Any]:
    """For each selection: clean share and yield, with 95 % intervals; and the share of clean rows declared valid."""
    table = counts(found, names)
    clean = table.filter(kind=CLEAN).row(0, named=True)
    budget = len(found) * round(bad_rows.ROWS / 4)
    possible = min(budget, clean["rows"])
    return {
        "clean_rows": clean["rows"],
        "clean_valid": share(clean["valid"], clean["rows"]),
        "invalid_by": {signal.value: share(clean[signal.value], clean["rows"]) for signal in Signal},
        "clean_share_of_valid": share(clean["valid"], int(table["valid"].sum())),
        "selections": {
            name: {
                "taken": int(table[name].sum()),
                "clean_share": share(clean[name], int(table[name].sum())),
                "yield": share(min(clean[name], possible), possible),
                "kept": {row["kind"]: share(row[name], row["rows"]) for row in table.iter_rows(named=True)},
            }
            for name in names
        },
    }


def declared(found: Sequence[Curated]) -> dict[str, Any]:
    """For each kind: rows, and the share that is declared valid."""
    table = counts(found, ["qaq"])
    return {
        row["kind"]: {"valid": share(row["valid"], row["rows"]), "published": share(row["qaq"], row["rows"])}
        for row in table.iter_rows(named=True)
    }


def share(part: int, whole: int) -> dict[str, float | int | None]:
    """`part / whole` with its Wilson interval; null of nothing."""
    if not whole:
        return {"value": None, "lower": None, "upper": None, "of": 0}
    interval = stats.binomtest(part, whole).proportion_ci(method="wilson")
    return {"value": part / whole, "lower": float(interval.low), "upper": float(interval.high), "of": whole}


def left_out(settings: Settings, run: Callable[[Settings, Sequence[str]], _Results]) -> dict[str, Any]:
    """The share of each kind that is declared valid where its own defect is not planted."""
    found = {}
    for kind, own in OWN_DEFECTS.items():
        others = tuple(defect for defect in settings.calibration.defects if defect not in own)
        changed = settings.model_copy(update={"calibration": CalibrationSettings(defects=others)})
        found[kind] = declared([one for each in run(changed, MIXED).values() for one in each])[kind]["valid"]
    return found


def ranked_among_valid(settings: Settings, run: Callable[..., _Results]) -> _Results:
    """The same with ranks among valid pairs alone, and the same number of rows to take."""
    budget = Budget(fraction=None, count=round(bad_rows.ROWS / 4), answer_tokens=None)
    selection = DiffSelection(name="qaq", strategy="diff_high", valid=True, budget=budget)
    return run(settings.model_copy(update={"selections": (selection,)}), [DELIVERED, *MIXED], is_valid_first=True)


def curves(settings: Settings, run: Callable[[Settings, Sequence[str]], _Results]) -> dict[str, Any]:
    """For each signal and largest missed share: clean rows that it drops as delivered, and kinds that are kept."""
    known, found = judgement.SIGNALS, {}
    try:
        for one in known:
            for missed in CURVE:
                changed = dataclasses.replace(one, max_missed=missed)
                judgement.SIGNALS = tuple(changed if other is one else other for other in known)
                results = run(settings, [DELIVERED, *MIXED])
                clean = counts(results[DELIVERED], ["qaq"]).filter(kind=CLEAN).row(0, named=True)
                mixed = declared([each for name in MIXED for each in results[name]])
                found[f"{one.signal} {missed:g}"] = {
                    "dropped_as_delivered": clean[one.signal.value] / clean["rows"],
                    "kept": {kind: each["valid"]["value"] for kind, each in mixed.items() if kind != CLEAN},
                }
    finally:
        judgement.SIGNALS = known
    return found


def groups(found: Sequence[Curated]) -> list[dict[str, Any]]:
    """The share of rows as delivered that each signal drops, by group; groups of at least 50 rows."""
    rows = pl.concat(one.rows for one in found).with_columns(
        query_words=pl.col("query").str.count_matches(r"\S+"), answer_words=pl.col("answer").str.count_matches(r"\S+")
    )
    is_code = rows["answer"].map_elements(lambda text: guess_language(text) is not None, return_dtype=pl.Boolean)
    places: Mapping[str, pl.Expr] = {
        "query words": _interval("query_words", (6, 10, 15, 25, 50)),
        "answer words": _interval("answer_words", (5, 15, 30, 60, 120)),
        "lines of the answer": pl.when(pl.col("answer").str.strip_chars().str.contains("\n"))
        .then(pl.lit("several"))
        .otherwise(pl.lit("one")),
        "answer": pl.when(pl.lit(is_code)).then(pl.lit("program")).otherwise(pl.lit("no program known")),
    }
    overall = {signal.value: (rows["invalid_by"] == signal.value).sum() / rows.height for signal in Signal}
    found_groups = []
    for name, group in places.items():
        table = rows.group_by(group.cast(pl.String).alias("group")).agg(
            pl.len().alias("rows"),
            pl.col("invalid_by").is_not_null().mean().alias("any"),
            *(
                (pl.col("invalid_by") == signal.value).fill_null(value=False).mean().alias(signal.value)
                for signal in Signal
            ),
        )
        for row in table.filter(pl.col("rows") >= LEAST_IN_GROUP).sort("rows", descending=True).iter_rows(named=True):
            over = [signal.value for signal in Signal if row[signal.value] > 2 * overall[signal.value] > 0]
            found_groups.append({"by": name, **row, "over_twice": over})
    return found_groups


def _interval(column: str, ends: Sequence[int]) -> pl.Expr:
    """The interval of a count, such as `6 to 10`."""
    said = pl.lit(f"over {ends[-1]}")
    for low, high in reversed(list(zip((0, *ends), ends, strict=False))):
        said = pl.when(pl.col(column) <= high).then(pl.lit(f"{low + 1} to {high}")).otherwise(said)
    return said


def to_read(found: Sequence[Curated]) -> pl.DataFrame:
    """Rows as delivered, shuffled: 30 nearest to the cuts, 50 random invalid and 50 random published ones."""
    choice = random.Random(0)  # noqa: S311
    nearest, invalid, published = [], [], []
    for one in found:
        cuts = dict(one.cuts.select("signal", "cut").iter_rows())
        evidence = one.validity.select("pair_id", "signals").explode("signals").unnest("signals")
        cut = pl.col("signal").replace_strict(cuts, return_dtype=pl.Float64)
        distance = evidence.with_columns(distance=(pl.col("evidence") - cut).abs()).drop_nulls("distance")
        own = one.rows.join(distance.group_by("pair_id").agg(pl.col("distance").min()), on="pair_id", how="left")
        nearest.append(own.sort("distance").head(30))
        invalid.append(own.filter(pl.col("invalid_by").is_not_null()))
        published.append(own.filter("takes:qaq"))
    sampled = [
        pl.concat(nearest).sort("distance").head(30).with_columns(why=pl.lit("nearest")),
        pl.concat(invalid).sample(50, seed=0).with_columns(why=pl.lit("invalid")),
        pl.concat(published).sample(50, seed=0).with_columns(why=pl.lit("published")),
    ]
    rows = pl.concat(sampled).select("pair_id", "why", "invalid_by", "query", "answer")
    order = list(range(rows.height))
    choice.shuffle(order)
    return rows[order]


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    for name, title in (("by_share", "By share of bad rows"), ("valid_first", "Ranked among valid pairs")):
        table = Table("bad", "selection", "taken", "clean share", "yield", "clean rows valid", title=title)
        for bad, found in report[name].items():
            for selection, numbers in found["selections"].items():
                cells = (_said(numbers["clean_share"]), _said(numbers["yield"]), _said(found["clean_valid"]))
                table.add_row(bad, selection, str(numbers["taken"]), *cells)
        console.print(table)
    table = Table("kind", "rows", "declared valid", "published", "valid, its defect not planted", title="Kept")
    for kind, found in report["declared_valid"].items():
        without = report["left_out"].get(kind)
        shown = "never planted" if without is None else _said(without)
        table.add_row(kind, str(found["valid"]["of"]), _said(found["valid"]), _said(found["published"]), shown)
    console.print(table)
    table = Table("run", "kind", "declared valid", "published", title="Kinds with runs of their own")
    for run, kinds in report["alone"].items():
        for kind, found in kinds.items():
            table.add_row(run, kind, _said(found["valid"]), _said(found["published"]))
    console.print(table)
    table = Table("signal, largest missed", "dropped as delivered", "kept", title="Trade-off")
    for name, found in report["curves"].items():
        kept = ", ".join(f"{kind} {value:.3f}" for kind, value in found["kept"].items())
        table.add_row(name, f"{found['dropped_as_delivered']:.3f}", kept)
    console.print(table)
    names = [signal.value for signal in Signal]
    table = Table("by", "group", "rows", "any", *names, "over twice", title="Dropped of the rows as delivered")
    for row in report["groups"]:
        numbers = (f"{row[name]:.3f}" for name in ("any", *names))
        table.add_row(row["by"], str(row["group"]), str(row["rows"]), *numbers, ", ".join(row["over_twice"]))
    console.print(table)


def _said(found: Mapping[str, Any]) -> str:
    if found["value"] is None:
        return "-"
    return f"{found['value']:.3f} [{found['lower']:.3f}, {found['upper']:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
