"""Compare frames and priors by how well the scores detect planted defects: the demo's two models, on real pairs.

    python -m bench.frames DATA [--rows 400] [--per-defect 45] [--json FILE]

DATA is a file that `qaq run` accepts. The models and the score cache are in QAQ_HOME; cached scores are not computed
again, so an interrupted run continues. Three frames of each model, three priors, four pairs of frames.

Prints, for each pair of frames and each prior: the AUROC of every defect by the stratified rank of each model; the
shares that `diff_high` and `rmi_band` keep if a quarter of the pool is planted; and the whole calibration of the
default. Not here: the definition of a defect, and how it is judged (`qaq_pipeline.calibration`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from rich.console import Console
from rich.table import Table

from qaq_pipeline.calibration import calibration, planting
from qaq_pipeline.config.load import load_settings, parse_settings
from qaq_pipeline.config.settings import RecordSettings, Settings
from qaq_pipeline.ingest import records
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.schema.tables import CLEAN, CachedScores, dtypes
from qaq_pipeline.schema.vocabularies import Quantity, Statistic
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.selection import disagreement_scores
from qaq_pipeline.selection.candidates import candidates
from qaq_pipeline.selection.strategies import select
from qaq_pipeline.storage.storage import open_storage
from qaq_pipeline.validity import judgement
from qaq_pipeline.validity.judgement import Sample, judged_pairs, judged_planted

PRIORS = ("null_answer", "user", "bare")
ROLES = ("strong", "weak")
POOLED_SHARE = 0.25
"""Planted share of a pool."""
NUM_POOLS = 40
"""Number of pools of all clean rows and some planted ones; kept shares are averaged over them."""

TURN_MARKERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""The turn markers of Gemma's instruct models, which the base model's vocabulary has."""


@dataclass(frozen=True, slots=True)
class Frames:
    """A frame for each model, with or without the INVALID clause."""

    name: str
    strong: str
    weak: str
    has_clause: bool = True


FRAMES = (
    Frames("chat | plain", "chat", "plain"),
    Frames("chat | plain, no INVALID", "chat", "plain", has_clause=False),
    Frames("plain | plain", "plain", "plain"),
    Frames("chat | turn markers", "chat", "markers"),
)
"""The first is the demo's."""


def main() -> int:
    """Score what the cache lacks, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.frames", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--per-defect", type=int, default=45)
    parser.add_argument("--json", type=Path, default=Path("var/frames.json"))
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.data, arguments.rows)
    default = variant(FRAMES[0], "null_answer", arguments.per_defect)
    planted = planting.plant([pairs], default.calibration)
    found = []
    for prior in PRIORS:
        for frames in FRAMES:
            settings = variant(frames, prior, arguments.per_defect)
            found.append(measure(settings, pairs, planted) | {"frames": frames.name, "prior": prior})
            write(found, arguments.json)
    show_comparison(found)
    whole = variant(FRAMES[0], "null_answer", arguments.per_defect, quantities=("rmi", "ifd"))
    of_default = measure(whole, pairs, planted)
    show_calibration(of_default["calibration"])
    found.append(of_default | {"frames": "default, with IFD", "prior": "null_answer"})
    write(found, arguments.json)
    return 0


def write(found: list[dict[str, Any]], path: Path) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def read_pairs(data: Path, rows: int) -> pl.DataFrame:
    """Return the first distinct accepted pairs of the file, as RawData."""
    raw = records.read_file(data.read_bytes(), data.name, "b", RecordSettings()).frame
    return raw.filter(pl.col("status") == "accepted").unique("pair_id", keep="first", maintain_order=True).head(rows)


def variant(frames: Frames, prior: str, per_defect: int, quantities: Sequence[str] = ("rmi",)) -> Settings:
    """Return the demo's settings with these frames and this prior."""
    values = load_settings("demo").model_dump(mode="json", exclude_defaults=True)
    for role in ROLES:
        values["models"][role] |= frame_of(getattr(frames, role))
    values["scoring"] = {"quantities": list(quantities), "prior": prior, "invalid_clause": frames.has_clause}
    values["calibration"] = {"mismatches": per_defect, "rows_per_defect": per_defect}
    return parse_settings(yaml.safe_dump(values), "bench")


def frame_of(name: str) -> dict[str, Any]:
    """Return the settings of a frame; the template with turn markers is written beside the models."""
    if name != "markers":
        return {"frame": name}
    template = load_settings("demo").model_cache_dir / "turn_markers.jinja"
    template.write_text(TURN_MARKERS, encoding="utf-8")
    return {"frame": "chat", "chat_template_from": str(template)}


def score(settings: Settings, role: str, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows' RmiScores under a model."""
    storage, runtime = open_storage(settings), _runtime(settings)
    pairs = [Pair(*row) for row in rows.sort("pair_id").select("pair_id", "system", "query", "answer").iter_rows()]
    logprobs = runtime.score(role, Pairs.of(pairs), storage, on_shard=lambda _: None).frame
    return rmi_scores.rmi_scores(logprobs, settings.eligibility)


def measure(settings: Settings, pairs: pl.DataFrame, planted: pl.DataFrame) -> dict[str, Any]:
    """Return the calibration under these settings, as rows, and what selections keep of a pool with planted rows."""
    clean, bad = {}, {}
    columns = ["pair_id", "system", "query", "answer"]
    rows = pl.concat([pairs.select(columns), planted.select(columns)])
    for role in ROLES:
        reuse(settings, role, rows["pair_id"])
        scored = score(settings, role, rows)  # In one call: loading a model takes as long as scoring hundreds of pairs.
        clean[role], bad[role] = (scored.join(of, on="pair_id", how="semi") for of in (pairs, planted))
    ranked, _ = disagreement_scores.disagreement_scores(clean, settings.ranking, "batch:b")
    of_clean, of_bad = judged_pairs(clean, pairs), judged_planted(bad, planted)
    cuts = judgement.choose_cuts(Sample(of_clean, of_bad, ("b",)), settings.validity)
    validity = (judgement.judge(of_clean, cuts, settings.validity), judgement.judge(of_bad, cuts, settings.validity))
    judged = calibration.judge(planted, bad, clean, ranked, validity, settings.ranking, settings.selections)
    found = calibration.calibrate(
        judged, settings.models, settings.scoring.quantities, settings.selections, settings.calibration
    )
    return {
        "calibration": found.to_dicts(),
        "pooled": pooled(clean, bad, planted, settings),
    }


def reuse(settings: Settings, role: str, pair_ids: pl.Series) -> None:
    """Copy scores of Q | A made under the first prior: the sequence is the same under every prior."""
    scoring = settings.scoring.model_copy(update={"prior": PRIORS[0]})
    source = _identity(settings.model_copy(update={"scoring": scoring}), role)
    storage, identity = open_storage(settings), _identity(settings, role)
    known = storage.scores.read(source, pair_ids).filter(pl.col("quantity") == Quantity.Q_GIVEN_A.value)
    has = storage.scores.read(identity, pair_ids)
    new = known.join(has, on=["place", "quantity", "num_tokens", "end_ids"], how="anti")
    if not new.is_empty():
        named = new.with_columns(pair_id=pair_ids.gather(new["place"]), null_reason=pl.lit(None, pl.String))
        columns = dtypes(CachedScores)
        scores = named.cast({name: columns[name] for name in columns}).select(list(columns))
        storage.scores.append(identity, scores, {"libraries": {}, "device": "cpu"})


def _identity(settings: Settings, role: str) -> Any:
    _, model = _runtime(settings)._prepare(role)
    return model.identity


def _runtime(settings: Settings) -> ModelRuntime:
    return ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)


def pooled(
    clean: dict[str, pl.DataFrame], bad: dict[str, pl.DataFrame], planted: pl.DataFrame, settings: Settings
) -> list[dict[str, Any]]:
    """Return the shares of clean rows and of each defect that each selection keeps in pools with planted rows.

    `POOLED_SHARE` of each pool is planted, drawn separately for each pool; the rest is all clean rows. The result is
    the mean over the pools, with the Wilson interval for one draw of each distinct row.
    """
    random = np.random.default_rng(0)
    number = round(clean["strong"].height * POOLED_SHARE / (1 - POOLED_SHARE))
    label = planted.select("pair_id", "defect")
    kept = []
    for _ in range(NUM_POOLS):
        drawn = label.filter(pl.Series(np.isin(np.arange(label.height), random.permutation(label.height)[:number])))
        pool = {role: pl.concat([clean[role], bad[role].join(drawn, on="pair_id", how="semi")]) for role in ROLES}
        ranked, _ = disagreement_scores.disagreement_scores(pool, settings.ranking, "pool")
        pairs = candidates(ranked, pool)
        verdicts = [select(pairs, one) for one in settings.selections]
        kept.append(pl.concat(verdicts).join(drawn, on="pair_id", how="left").fill_null(CLEAN))
    shares = (
        pl.concat(kept)
        .group_by("selection", "defect")
        .agg(share=pl.col("is_selected").mean(), rows=pl.col("pair_id").n_unique())
    )
    return [
        row | dict(zip(("lower", "upper"), wilson(row["share"], row["rows"]), strict=True))
        for row in shares.sort("selection", "defect").iter_rows(named=True)
    ]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return the ends of (p + z² / 2n ± z sqrt(p (1 - p) / n + z² / 4n²)) / (1 + z² / n)."""
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# --- tables -----------------------------------------------------------------------------------------------------------


def show_comparison(found: list[dict[str, Any]]) -> None:
    """Print AUROCs by frame, prior and model, and the shares kept of pools with planted rows."""
    defects = [row["defect"] for row in found[0]["calibration"] if row["measure"] == "rmi" and row["model"] == "strong"]
    defects = list(dict.fromkeys(defects))
    aurocs = Table("frames", "prior", "model", *defects, title="AUROC of the stratified rank of RMI, 95 % interval")
    gaps = Table("frames", "prior", *defects, title="AUROC of the gap")
    shares = Table("frames", "prior", "selection", CLEAN, *defects, title=f"Kept, {POOLED_SHARE:.0%} planted")
    for one in found:
        rows = {
            (row["model"], row["measure"], row["defect"]): row
            for row in one["calibration"]
            if row["statistic"] == Statistic.AUROC.value
        }
        for role in ROLES:
            aurocs.add_row(one["frames"], one["prior"], role, *(_said(rows[role, "rank", d]) for d in defects))
        gaps.add_row(one["frames"], one["prior"], *(_said(rows[calibration.BOTH_MODELS, "gap", d]) for d in defects))
        kept = {(row["selection"], row["defect"]): row["share"] for row in one["pooled"]}
        for name in dict.fromkeys(row["selection"] for row in one["pooled"]):
            said = (f"{kept[name, defect]:.3f}" if (name, defect) in kept else "-" for defect in (CLEAN, *defects))
            shares.add_row(one["frames"], one["prior"], name, *said)
    for table in (aurocs, gaps, shares):
        Console(width=220).print(table)


def show_calibration(rows: list[dict[str, Any]]) -> None:
    """Print every number of one calibration."""
    table = Table("statistic", "defect", "model", "measure", "value", "clean", "planted", "kept", title="The default")
    for row in rows:
        counts = (str(row[name]) if row[name] is not None else "" for name in ("num_clean", "num_planted", "num_kept"))
        table.add_row(row["statistic"], row["defect"], row["model"], row["measure"], _said(row), *counts)
    Console(width=160).print(table)


def _said(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return str(row["null_reason"])
    ends = "" if row["lower"] is None else f" [{row['lower']:.2f}, {row['upper']:.2f}]"
    return f"{row['value']:.3f}{ends}"


if __name__ == "__main__":
    sys.exit(main())
