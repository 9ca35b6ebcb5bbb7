"""The card of a published version: its content and how it was chosen, as a Hugging Face dataset card.

Belongs here: the numbers, and the metadata before the text. Does not belong here: the text (`pages/dataset_card.md`),
and what enters a version.

A card is one of the files whose hashes make the version: it holds no time, no run, no path of a machine, and not the
version itself.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import yaml

from qaq_pipeline.config.selections import DiffSelection, RmiBandSelection, RmiTopSelection, Selection, SumSelection
from qaq_pipeline.config.settings import ExportSettings
from qaq_pipeline.ingest import records
from qaq_pipeline.publication import exports, templates
from qaq_pipeline.publication.exports import WRITTEN
from qaq_pipeline.schema.long_form import to_long
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import Decisions
from qaq_pipeline.schema.vocabularies import Decision, Signal, Status
from qaq_pipeline.selection.decisions import by_reason
from qaq_pipeline.selection.scored_batch import UNREACHED_KEY, VALIDITY_KEY
from qaq_pipeline.storage.stored_table import StoredTable, parts_of_both
from qaq_pipeline.storage.tables import empty

_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")
"""The hub's names for numbers of rows of up to 3 digits, of 4, 5, 6, 7, 8, 9, and of more."""

IDENTITY = ("model", "revision", "dtype", "tokenizer_hash", "template_hash", "prior", "max_tokens", "too_long")
"""Fields of a score identity that a reader compares."""

_SELECTED = pl.col("decision") == Decision.SELECTED.value

_OF_RMI = DiffSelection | SumSelection | RmiBandSelection | RmiTopSelection

_PAPER = (
    "In the paper, training on the selected quarter matched training on everything, within noise (one HumanEval+ task "
    "is 0.61 points, the standard error about 3.5)."
)

_LIMITS = (
    "A score is the opinion of two models about text. It runs no code, and it hardly sees a small bug in an answer.",
    "Whether this selection trains a better model than random rows is known only where a training trial is shown.",
    "A rank compares a row only with the rows of its pool: its batch, or the reference that it was ranked against.",
    "Rows were checked for the benchmarks that the card and the page of their batch list, and for no other.",
    "Secrets were looked for by the known formats of keys and tokens only (screening.secrets), and personal data only "
    "of the kinds that screening.personal_data names. Nobody looked for harmful content. The language of the text is "
    "not checked either.",
)
"""Limits of the numbers, for every selection."""


def dataset_card(
    selection: Selection,
    exported: Mapping[str, int],
    export: ExportSettings,
    llama_factory: str | None,
    entries: Sequence[Mapping[str, Any]],
    tables: Mapping[str, Mapping[str, StoredTable]],
) -> bytes:
    """The README.md of a version.

    Args:
        selection: the published one.
        exported: rows in the files of each selection and control, the published one first.
        export: what these files are.
        llama_factory: the first entry of dataset_info.json; None: there is none.
        entries: of the batches, as they stand in the manifest.
        tables: raw_data, screened_data and decisions, by batch, then by name.
    """
    made_of = {batch: of_batch["decisions"].provenance for batch, of_batch in tables.items()}
    benchmarks = {batch: of_batch["screened_data"].provenance["benchmarks"] for batch, of_batch in tables.items()}
    decisions = [of_batch["decisions"] for of_batch in tables.values()]
    reasons = itertools.chain([empty(Decisions)], *(table.parts("decision", "reason") for table in decisions))
    page = {
        "metadata": yaml.safe_dump(_metadata(selection, exported, export), sort_keys=False, allow_unicode=True),
        "title": _title(selection),
        "selection": selection,
        "is_of_rmi": isinstance(selection, _OF_RMI),
        "is_of_tokens": not isinstance(selection, RmiBandSelection) and selection.budget.answer_tokens is not None,
        "about": inspect.getdoc(type(selection)),
        "recipe": yaml.safe_dump(selection.model_dump(mode="json"), sort_keys=False),
        "exported": exported,
        "rows_in": sum(entry["rows_in"] for entry in entries),
        "batches": [(one["batch"], one["rows_in"], one["rows_selected"], one.get("pool", "")) for one in entries],
        "identity": ("role", *(field.replace("_", " ") for field in IDENTITY), "batches"),
        "models": models(entries, IDENTITY),
        "strata": _strata(decisions),
        "decisions": by_reason(reasons).rows(),
        "warnings": _warnings(made_of, selection.name),
        "signals": [signal.value for signal in Signal],
        "validity": _validity(made_of),
        "unjudged": sorted(batch for batch, facts in made_of.items() if VALIDITY_KEY not in facts),
        "benchmarks": _benchmarks(benchmarks),
        "unread": _unread({batch: of_batch["raw_data"].provenance for batch, of_batch in tables.items()}),
        "unchecked": sorted(batch for batch, checked in benchmarks.items() if not checked),
        "num_flagged": sum(_num_flagged(one["screened_data"], one["decisions"]) for one in tables.values()),
        "limits": limits(selection),
        "llama_factory": llama_factory,
        **_files(exported, export),
    }
    return templates.render("dataset_card.md", page, {"shown": _shown})


def limits(selection: Selection) -> tuple[str, ...]:
    """Limits of the numbers of a selection, in sentences."""
    papers = DiffSelection(name=selection.name, strategy="diff_high")  # By default a quarter, without conditions.
    return (_PAPER, *_LIMITS) if selection == papers else _LIMITS


def _title(selection: Selection) -> str:
    by = "by QAQ" if isinstance(selection, _OF_RMI) else "by a baseline of QAQ"
    return f"Code instructions selected {by}: {selection.name}"


def _metadata(selection: Selection, exported: Mapping[str, int], export: ExportSettings) -> dict[str, Any]:
    configs, num_digits = _configs(exported, export), len(str(exported[selection.name]))
    return {
        "license": "unknown",
        "pretty_name": _title(selection),
        "language": ["code"],
        "task_categories": ["text-generation"],
        "tags": ["code", "instruction-tuning", "synthetic", "data-selection", "qaq", "arxiv:2603.12165"],
        "size_categories": [_SIZES[min(max(num_digits - 3, 0), len(_SIZES) - 1)]],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}]}
            | ({"default": True} if name == next(iter(configs)) else {})
            for name, (_, path) in configs.items()
        ],
        # Else `datasets` guesses types from the first rows of a file, and takes texts that look like dates for such.
        "dataset_info": [
            {"config_name": name, "features": _features(exports.columns(kind, has_meta=export.meta))}
            for name, (kind, _) in configs.items()
            if kind != exports.CONVERSATION
        ],
    }


def _configs(exported: Mapping[str, int], export: ExportSettings) -> dict[str, tuple[str, str]]:
    """Format and path of each file that the hub's readers are told of, by the name of its configuration.

    The first one is the default. `datasets` reads all configurations of a folder by one loader, so they are the JSON
    files, or, where there are none, the Parquet files; and it can load no file without rows. So the scores, which are
    nothing to train on either, are none of them.
    """
    kinds = [kind for kind in export.written if WRITTEN[kind].is_json]
    kinds = kinds or [kind for kind in export.written if kind == "parquet"]
    return {
        f"{name}-{kind}": (kind, f"{name}/{WRITTEN[kind].path}")
        for name, num_rows in exported.items()
        for kind in kinds
        if num_rows
    }


def _features(columns: Iterable[pa.Field]) -> list[dict[str, Any]]:
    """Arrow's columns as the hub's metadata has them."""
    return [{"name": column.name, **_feature(column.type)} for column in columns]


def _feature(arrow: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(arrow):
        return {"list": _features(arrow.value_type)}
    return {"dtype": str(arrow)}


def _files(exported: Mapping[str, int], export: ExportSettings) -> dict[str, Any]:
    """The files in the folder of a selection, and the names by which readers load the first of them; None: by none."""
    files = [
        (kind, WRITTEN[kind].path, ", ".join(exports.columns(kind, has_meta=export.meta).names))
        for kind in export.written
    ]
    of_json = (name for name, (kind, _) in _configs(exported, export).items() if WRITTEN[kind].is_json)
    return {
        "formats": export.written,
        "files": files,
        "json_config": next(of_json, None),
    }


def _warnings(made_of: Mapping[str, Mapping[str, Any]], published: str) -> list[str]:
    """What a reader must know first: signals that tell nothing of a batch, and budgets that were not reached."""
    said = []
    for batch, facts in sorted(made_of.items()):
        said += [(batch, sentence) for sentence in facts.get(VALIDITY_KEY, {}).get("warnings", [])]
        said += [(batch, f"{name} {how}") for name, how in facts.get(UNREACHED_KEY, {}).items() if name == published]
    return [f"Batch {_shown(batch)}: {sentence}." for batch, sentence in said]


def _unread(read_of: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not read of the delivery of each batch."""
    found = [(batch, sentence) for batch, facts in sorted(read_of.items()) for sentence in records.not_read(facts)]
    return [f"Batch {_shown(batch)}: {_shown(sentence)}." for batch, sentence in found]


def _validity(made_of: Mapping[str, Mapping[str, Any]]) -> list[tuple[str | int, ...]]:
    """One row for each judged batch: its valid pairs, and those that each signal declares invalid."""
    judged = {batch: facts[VALIDITY_KEY] for batch, facts in sorted(made_of.items()) if VALIDITY_KEY in facts}
    return [
        (batch, found["valid_pairs"], *(found["invalid_pairs"][signal.value] for signal in Signal))
        for batch, found in judged.items()
    ]


def _strata(decisions: Sequence[StoredTable]) -> list[tuple[str | int, ...]]:
    """One row for each model and stratum, apart where a pool was so small that it has fewer strata."""
    parts = itertools.chain.from_iterable(table.parts("decision", "scores") for table in decisions)
    found = [_strata_of(empty(Decisions)), *map(_strata_of, parts)]
    strata = (
        pl.concat(found)
        .group_by("model", "num_strata", "stratum")
        .agg(pl.col("pairs", "selected").sum(), pl.col("lowest").min(), pl.col("highest").max())
    )
    return [
        (model, f"{stratum} of {of}", pairs, selected, f"{selected / pairs:.0%}", f"{lowest:.3f} to {highest:.3f}")
        for model, of, stratum, pairs, selected, lowest, highest in strata.sort("model", "num_strata", "stratum").rows()
    ]


def _strata_of(decisions: pl.DataFrame) -> pl.DataFrame:
    scored = decisions.filter(pl.col("decision").is_in([Decision.SELECTED.value, Decision.NOT_SELECTED.value]))
    ranked = to_long(scored, "scores", "decision").drop_nulls("stratum")
    return ranked.group_by("model", "num_strata", "stratum").agg(
        pl.len().alias("pairs"),
        _SELECTED.sum().alias("selected"),
        pl.col("log_ppl_q").min().alias("lowest"),
        pl.col("log_ppl_q").max().alias("highest"),
    )


def models(entries: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[tuple[str | int, ...]]:
    """List each role and identity by these fields, with the batches that were scored so."""
    batches: dict[tuple[str | int, ...], list[str]] = {}
    for entry in entries:
        for role, identity in entry["models"].items():
            key = (role, *(identity[field] for field in fields))
            batches.setdefault(key, []).append(entry["batch"])
    return [(*key, ", ".join(names)) for key, names in sorted(batches.items())]


def _num_flagged(screened: StoredTable, decisions: StoredTable) -> int:
    """Selected rows of a batch that hold a benchmark's task, where such rows are flagged and not dropped."""
    is_flagged = (pl.col("status") == Status.ACCEPTED.value) & pl.col("evidence").is_not_null()
    rows = parts_of_both(screened, ("status", "evidence"), decisions, ("decision",), ROW_KEY)
    return sum(part.filter(is_flagged, _SELECTED).height for part in rows)


def _benchmarks(benchmarks: Mapping[str, Mapping[str, str]]) -> list[tuple[str, str, str]]:
    """One row for each benchmark and sha256 of its file, with the batches that were checked for it."""
    files = sorted({file for of_batch in benchmarks.values() for file in of_batch.items()})
    return [
        (name, sha256, ", ".join(batch for batch, checked in sorted(benchmarks.items()) if checked.get(name) == sha256))
        for name, sha256 in files
    ]


_CODE = re.compile(r"[A-Za-z0-9_.:/@+=%-](?:[A-Za-z0-9_.:/@+=%, -]*[A-Za-z0-9_.:/@+=%-])?")


def _shown(value: str | int) -> str:
    """A value that reads as itself in Markdown, whatever it holds: no markup, no link, no HTML, no other cell."""
    if isinstance(value, int):
        return f"{value:,}"
    if _CODE.fullmatch(value):
        return f"`{value}`"
    visible = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value)
    return re.sub(r"[^\w\s]|_", lambda found: f"&#{ord(found[0])};", visible)
