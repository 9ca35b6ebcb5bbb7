"""The card of a published version: what lies in it and how it was chosen, as a Hugging Face dataset card.

Belongs here: the words, and the metadata before them. Does not belong here: what enters a version.

A card is one of the files whose hashes make the version: it holds no time, no run, no path of a machine, and not the
version itself.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, assert_never

import polars as pl
import pyarrow as pa
import yaml

from qaq_pipeline.config.selections import (
    DiffSelection,
    IfdSelection,
    LengthSelection,
    PplSelection,
    RandomSelection,
    RmiBandSelection,
    RmiTopSelection,
    Selection,
    SumSelection,
)
from qaq_pipeline.config.settings import ExportSettings
from qaq_pipeline.publication import exports
from qaq_pipeline.publication.exports import FORMATS
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.vocabularies import Decision, Status

_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
}
"""The hub's names for fewer rows than these."""

_IDENTITY = ("model", "revision", "dtype", "tokenizer_hash", "template_hash", "prior", "max_tokens", "too_long")
"""Of what makes a score what it is, the part that a reader compares."""

_OF_RMI = DiffSelection | SumSelection | RmiBandSelection | RmiTopSelection

_INTRODUCTION = """\
Pairs of a query and an answer, for training code models: {selected:,} of {rows_in:,} delivered rows, {grounds}

`scores.parquet` has the scores, ranks and decision of every delivered row; `manifest.json` has the data versions and
the settings' hashes, and the hash of it names this version.
"""

_BY_RMI = """\
chosen by how well the answer explains the query (QAQ, arXiv:2603.12165):

    RMI = log PPL(Q) - log PPL(Q | A)

RMI is ranked among pairs of like PPL(Q), under each model; """

_BY_IFD = """\
chosen by instruction-following difficulty under the {model} model, the highest: how little the query helps to predict
the answer.

    {measure} = {formula}"""

_IFD_FORMULAS = {"ifd_ppl": "PPL(A | Q) / PPL(A)", "ifd_loss": "log PPL(A | Q) / log PPL(A)"}

_PERPLEXITIES = {
    "log_ppl_q": "log PPL(Q)",
    "log_ppl_q_given_a": "log PPL(Q | A)",
    "log_ppl_a": "log PPL(A)",
    "log_ppl_a_given_q": "log PPL(A | Q)",
}

_CONTROLS = """\
What to compare with: {size} of the same pool, in the order of a keyed hash. `control_random` draws from the whole pool,
`control_stratified_random` the same share from each stratum of PPL(Q).
"""

_STRATA = """\
Distinct pairs by their stratum of PPL(Q), under each model, and how many of them this selection keeps. In a batch's own
pool the strata are the batch's own, so that the ranges of several batches overlap.
"""

_FILES = """\
In the folder of each selection, the same columns in every record. `FOLDER` is this folder, or its name on the hub.
"""

_LOADING = {
    "json": '`datasets`, and what reads through it: `load_dataset(FOLDER, "{config}", split="train")`.',
    "prompt_completion": "TRL: the loss of `prompt_completion` is on the completion alone, of `messages` on all text.",
    "parquet": '`load_dataset(FOLDER, data_files="{selection}/messages.parquet", split="train")`.',
    "hf": '`load_from_disk("FOLDER/{selection}/hf")`, of a local folder; Axolotl: `path: FOLDER/{selection}/hf`.',
    "llama_factory": "LLaMA-Factory: `dataset_dir: FOLDER`, `dataset: {entry}`; `dataset_info.json` lists the others.",
}
"""A line on each way of loading."""

_PAPER = (
    "In the paper a quarter of the data, so chosen, trained as well as all of it, within noise: one HumanEval+ task is "
    "0.61\n  points and a standard error about 3.5."
)

_LIMITS = (
    "A score is the opinion of two models about text. It runs no code, and it hardly sees a small bug in an answer.",
    "Whether this selection trains better than its random controls is an open question until both were trained on.",
    "A rank compares a row with those of its pool only: its batch, or the reference that it was ranked against.",
    "Rows were checked for the benchmarks that the card and the page of their batch list, and for no other.",
    "Nobody looked for personal data, secrets or harmful content. The language of the text is not checked either.",
)
"""What the numbers do not promise."""

_LICENCE = """\
The licence is that of the rows: each inherits it from the data it was delivered in, and, where a model wrote it, the
terms of that model. This pipeline does not know them, and grants none: find them out before you use or publish it.
"""


def dataset_card(
    selection: Selection,
    exported: Mapping[str, int],
    export: ExportSettings,
    entries: Sequence[Mapping[str, Any]],
    screened: pl.DataFrame,
    decisions: pl.DataFrame,
    benchmarks: Mapping[str, Mapping[str, str]],
) -> bytes:
    """The README.md of a version.

    Args:
        selection: the published one.
        exported: rows in the files of each selection and control, the published one first.
        export: what these files are.
        entries: of the batches, as they stand in the manifest.
        screened: ScreenedData of all batches.
        decisions: Decisions of the same rows.
        benchmarks: for each batch, the sha256 of the benchmark files that its rows were checked for, by name.
    """
    rows_in = sum(entry["rows_in"] for entry in entries)
    sections = {
        "Selection": _recipe(selection),
        "Controls": f"{_controls(selection)}\n{_table(('selection', 'rows'), exported.items())}",
        "Files": _files(selection.name, exported, export),
        "Batches": _batches(entries),
        "Models": _models(entries),
        "Strata": f"{_STRATA}\n{_strata(decisions)}",
        "Decisions": _decisions(decisions),
        "Decontamination": _decontamination(benchmarks, _num_flagged(screened, decisions)),
        "What the numbers do not promise": "".join(f"- {limit}\n" for limit in limits(selection)),
        "Licence": _LICENCE,
    }
    introduction = _INTRODUCTION.format(selected=exported[selection.name], rows_in=rows_in, grounds=_grounds(selection))
    body = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    front = yaml.safe_dump(_metadata(selection, exported, export), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n# {_title(selection)}\n\n{introduction}\n{body}".encode()


def _grounds(selection: Selection) -> str:
    """By what the rows were chosen."""
    match selection:
        case DiffSelection() | SumSelection() | RmiBandSelection() | RmiTopSelection():
            return _BY_RMI + _taken_ranks(selection)
        case IfdSelection():
            formula = _IFD_FORMULAS[selection.measure]
            return _BY_IFD.format(model=selection.model, measure=selection.measure, formula=formula)
        case PplSelection():
            measure = _PERPLEXITIES[selection.measure]
            return f"chosen by the {_end(selection.order)}\n{measure} under the {selection.model} model."
        case LengthSelection():
            return f"chosen by the\nlength of the answer, the longest first, in tokens of the {selection.model} model."
        case RandomSelection():
            share = ", the same share of every stratum of PPL(Q)" if selection.strategy == "stratified_random" else ""
            return f"chosen at random{share}:\nin the order of a keyed hash, whatever they hold."
    assert_never(selection)


def _taken_ranks(selection: DiffSelection | SumSelection | RmiBandSelection | RmiTopSelection) -> str:
    match selection:
        case DiffSelection():
            return (
                "the gap is the rank under the strong model less\n"
                f"that under the weak one: the {_end(selection.strategy)} are taken."
            )
        case SumSelection():
            return f"the {_end(selection.strategy)} sums of the ranks under the\nstrong and the weak one are taken."
        case RmiBandSelection():
            low, high = selection.band
            return f"taken are the ranks in ({low:g}, {high:g}]\nunder the {selection.model} one."
        case RmiTopSelection():
            return f"the highest ranks under the\n{selection.model} one are taken."
    assert_never(selection)


def _end(order: str) -> str:
    return "highest" if order.endswith("high") else "lowest"


def _is_the_papers(selection: Selection) -> bool:
    """Whether it is what the paper trained on: the quarter of the highest gaps, of all pairs."""
    return (
        isinstance(selection, DiffSelection)
        and selection.strategy == "diff_high"
        and selection.budget.fraction == 0.25
        and selection.min_gap is None
        and selection.rank_strong is None
        and selection.rmi_strong is None
    )


def limits(selection: Selection) -> tuple[str, ...]:
    """What the numbers of a selection do not promise, in sentences."""
    return ((_PAPER,) if _is_the_papers(selection) else ()) + _LIMITS


def _controls(selection: Selection) -> str:
    is_of_tokens = not isinstance(selection, RmiBandSelection) and selection.budget.answer_tokens is not None
    return _CONTROLS.format(size="at most as many answer tokens" if is_of_tokens else "as many rows")


def _title(selection: Selection) -> str:
    by = "by QAQ" if isinstance(selection, _OF_RMI) else "by a baseline of QAQ"
    return f"Code instructions selected {by}: {selection.name}"


def _metadata(selection: Selection, exported: Mapping[str, int], export: ExportSettings) -> dict[str, Any]:
    num_rows = exported[selection.name]
    configs = _configs(exported, export)
    return {
        "license": "unknown",
        "pretty_name": _title(selection),
        "language": ["code"],
        "task_categories": ["text-generation"],
        "tags": ["code", "instruction-tuning", "synthetic", "data-selection", "qaq", "arxiv:2603.12165"],
        "size_categories": [next((name for limit, name in _SIZES.items() if num_rows < limit), "n>1B")],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}]}
            | ({"default": True} if name == next(iter(configs)) else {})
            for name, (_, path) in configs.items()
        ],
        # Else `datasets` guesses types from the first rows of a file, and takes texts that look like dates for such.
        "dataset_info": [
            {"config_name": name, "features": _features(exports.columns(kind, has_meta=export.meta))}
            for name, (kind, _) in configs.items()
        ],
    }


def _configs(exported: Mapping[str, int], export: ExportSettings) -> dict[str, tuple[str, str]]:
    """Format and path of each file that the hub's readers are told of, by the name of its configuration.

    The first one is the default. `datasets` reads all configurations of a folder by one loader, so they are the JSON
    files, or, where there are none, the Parquet files; and it can load no file without rows. So `scores.parquet`, which
    is nothing to train on either, is none of them.
    """
    kinds = _loaded_by_json(export) or [kind for kind in export.formats if kind == "parquet"]
    return {
        f"{name}-{kind}": (kind, f"{name}/{FORMATS[kind].path}")
        for name, num_rows in exported.items()
        for kind in kinds
        if num_rows
    }


def _loaded_by_json(export: ExportSettings) -> list[str]:
    return [kind for kind in export.formats if FORMATS[kind].is_json]


def _features(columns: Iterable[pa.Field]) -> list[dict[str, Any]]:
    """Arrow's columns as the hub's metadata has them."""
    return [{"name": column.name, **_feature(column.type)} for column in columns]


def _feature(arrow: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(arrow):
        return {"list": _features(arrow.value_type)}
    return {"dtype": str(arrow)}


def _files(name: str, exported: Mapping[str, int], export: ExportSettings) -> str:
    """What lies in the folder of a selection, and how it is loaded."""
    rows = [
        (kind, FORMATS[kind].path, ", ".join(exports.columns(kind, has_meta=export.meta).names))
        for kind in export.formats
    ]
    configs, entries = _configs(exported, export), exports.llama_factory_entries(exported, export.formats)
    ways = {"json": bool(_loaded_by_json(export) and configs), "llama_factory": bool(entries)}
    values = {"selection": name, "config": next(iter(configs), ""), "entry": next(iter(entries), "")}
    lines = [f"- {line.format(**values)}\n" for way, line in _LOADING.items() if ways.get(way, way in export.formats)]
    return f"{_FILES}\n{_table(('format', 'file', 'columns'), rows)}\n{''.join(lines)}"


def _strata(decisions: pl.DataFrame) -> str:
    """One row for each model and stratum, apart where a pool was so small that it has fewer strata."""
    scored = decisions.filter(pl.col("decision").is_in([Decision.SELECTED.value, Decision.NOT_SELECTED.value]))
    ranked = (
        scored.select("decision", "scores")
        .explode("scores", empty_as_null=False)
        .unnest("scores")
        .drop_nulls("stratum")
    )
    strata = ranked.group_by("model", "num_strata", "stratum").agg(
        pl.len().alias("pairs"),
        (pl.col("decision") == Decision.SELECTED.value).sum().alias("selected"),
        pl.col("log_ppl_q").min().alias("lowest"),
        pl.col("log_ppl_q").max().alias("highest"),
    )
    rows = [
        (model, f"{stratum} of {of}", pairs, selected, f"{selected / pairs:.0%}", f"{lowest:.3f} to {highest:.3f}")
        for model, of, stratum, pairs, selected, lowest, highest in strata.sort("model", "num_strata", "stratum").rows()
    ]
    return _table(("model", "stratum", "pairs", "selected", "share kept", "log PPL(Q) of them, nats/token"), rows)


def _recipe(selection: Selection) -> str:
    values = yaml.safe_dump(selection.model_dump(mode="json"), sort_keys=False)
    return f"{inspect.getdoc(type(selection))}\n\n```yaml\n{values}```\n"


def _batches(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [(entry["batch"], entry["rows_in"], entry["rows_selected"], entry.get("pool", "")) for entry in entries]
    total = ("all", sum(row[1] for row in rows), sum(row[2] for row in rows), "")
    return _table(("batch", "rows in", "selected", "pool of its ranks"), rows, total)


def _models(entries: Sequence[Mapping[str, Any]]) -> str:
    """One row for each role and identity, with the batches that were scored so."""
    batches: dict[tuple[str | int, ...], list[str]] = {}
    for entry in entries:
        for role, identity in entry["models"].items():
            key = (role, *(identity[field] for field in _IDENTITY))
            batches.setdefault(key, []).append(entry["batch"])
    rows = [(*key, ", ".join(names)) for key, names in sorted(batches.items())]
    return _table(("role", *(field.replace("_", " ") for field in _IDENTITY), "batches"), rows)


def _decisions(decisions: pl.DataFrame) -> str:
    counts = decisions.group_by("decision", "reason").len().sort("len", "reason", descending=[True, False])
    order = [decision.value for decision in Decision]
    rows = sorted(counts.rows(), key=lambda row: order.index(row[0]))
    return _table(("decision", "reason", "rows"), rows, ("all", "", decisions.height))


def _num_flagged(screened: pl.DataFrame, decisions: pl.DataFrame) -> int:
    """Selected rows that hold a benchmark's task, where such rows are flagged and not dropped."""
    flagged = screened.filter(pl.col("status") == Status.ACCEPTED.value, pl.col("evidence").is_not_null())
    selected = decisions.filter(pl.col("decision") == Decision.SELECTED.value)
    return flagged.join(selected, on=ROW_KEY, how="semi").height


def _decontamination(benchmarks: Mapping[str, Mapping[str, str]], num_flagged: int) -> str:
    files = sorted({file for of_batch in benchmarks.values() for file in of_batch.items()})
    rows = [
        (name, sha256, ", ".join(batch for batch, checked in sorted(benchmarks.items()) if checked.get(name) == sha256))
        for name, sha256 in files
    ]
    unchecked = sorted(batch for batch, checked in benchmarks.items() if not checked)
    listed = _table(("benchmark", "sha256 of its file", "batches"), rows) if rows else ""
    flagged = f"Selected rows that hold a benchmark's task all the same, flagged in the ledger: {num_flagged:,}.\n"
    warning = f"Checked for no benchmark: {', '.join(map(_cell, unchecked))}.\n"
    return "\n".join([listed] * bool(rows) + [flagged] * bool(rows) + [warning] * bool(unchecked))


# --- Markdown -----------------------------------------------------------------------------------------------------

_CODE = re.compile(r"[A-Za-z0-9_.:/@+=%-](?:[A-Za-z0-9_.:/@+=%, -]*[A-Za-z0-9_.:/@+=%-])?")


def _table(head: Sequence[str], rows: Iterable[Sequence[str | int]], total: Sequence[str | int] = ()) -> str:
    lines = [list(head), ["---:" if title.startswith(("rows", "selected", "pairs")) else "---" for title in head]]
    lines += [list(map(_cell, row)) for row in [*rows, *([total] if total else [])]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str | int) -> str:
    """A value that reads as itself in a table, whatever it holds: no markup, no link, no HTML, no other cell."""
    if isinstance(value, int):
        return f"{value:,}"
    if _CODE.fullmatch(value):
        return f"`{value}`"
    visible = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value)
    return re.sub(r"[^\w\s]|_", lambda found: f"&#{ord(found[0])};", visible)
