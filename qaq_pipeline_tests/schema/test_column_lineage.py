"""The declared lineage of columns: complete, without a cycle, of the tables upstream, and what the code really does."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import yaml

from qaq_pipeline.config.load import parse_settings
from qaq_pipeline.config.settings import EligibilitySettings, Settings
from qaq_pipeline.orchestration.assets import build_assets
from qaq_pipeline.pipeline import PIPELINE
from qaq_pipeline.publication import exports
from qaq_pipeline.publication.flat_scores import flat_scores
from qaq_pipeline.runs import registration, run_batch
from qaq_pipeline.runs.deployment import Deployment
from qaq_pipeline.schema.column_lineage import Column, ancestry, derivations, of_records, of_scores, sources_in
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.schema.tables import (
    Calibration,
    Contamination,
    Decisions,
    Logprobs,
    PlantedRows,
    RawData,
    SelectedSubset,
    dtypes,
)
from qaq_pipeline.schema.vocabularies import Defect, Quantity
from qaq_pipeline.scoring import rmi_scores
from qaq_pipeline.scoring.pairs import TEXTS, accepted_parts
from qaq_pipeline.screening import duplicates, forbidden
from qaq_pipeline.screening.screen import screen, texts_of
from qaq_pipeline.selection import rank_reference
from qaq_pipeline.selection.candidates import candidates, with_validity
from qaq_pipeline.selection.strategies import select_all
from qaq_pipeline.storage.stored_table import StoredTable
from qaq_pipeline.validity import judgement, words
from qaq_pipeline_tests.conftest import write_jsonl
from qaq_pipeline_tests.support.decided import decide, selected_rows
from qaq_pipeline_tests.support.frames import ONE_STRATUM, pair_name, raw_rows, rejected, rmi_rows
from qaq_pipeline_tests.support.uncalibrated import TABLES

DERIVED = PIPELINE.column_sources
STORED_TABLES = PIPELINE.tables()

SETTINGS = parse_settings(
    yaml.safe_dump(
        {
            "models": {"strong": {"hub": "tiny/strong"}, "weak": {"hub": "tiny/weak"}},
            "ranking": {"pool": "reference", "reference": {"name": "r1", "batches": ["b1"]}},
        }
    )
)


# --- the declaration ------------------------------------------------------------------------------------------------


def test_every_column_of_every_table_is_declared_and_no_other() -> None:
    declared = {table: set(columns) for table, columns in DERIVED.items()}
    assert declared == {table: set(made.columns()) for table, made in STORED_TABLES.items()}
    rows = [(row.table, row.column) for row in derivations(DERIVED)]
    assert len(rows) == len(set(rows)) == sum(map(len, declared.values()))


def test_every_source_is_a_column_of_a_table_that_is_made_before() -> None:
    order = list(DERIVED)
    for row in derivations(DERIVED):
        assert len(set(row.sources)) == len(row.sources)
        for table, column in row.sources:
            assert column in STORED_TABLES[table].columns(), (row, table, column)
            assert order.index(table) < order.index(row.table), row


def test_the_sources_of_a_table_are_exactly_the_tables_that_its_asset_depends_on() -> None:
    deps = {
        asset.key.to_user_string(): {dep.asset_key.to_user_string() for dep in spec.deps}
        for asset in build_assets(SETTINGS)
        for spec in asset.specs
    }
    for table, columns in DERIVED.items():
        assert {name for sources in columns.values() for name, _ in sources} == deps[table] & DERIVED.keys()


def test_only_what_is_of_the_delivery_the_settings_or_a_partition_has_no_source() -> None:
    without = {(row.table, row.column) for row in derivations(DERIVED) if not row.sources}
    of_raw_data = {("raw_data", column) for column in RawData.columns()}
    assert without == of_raw_data | {
        ("reference_cuts", "signal"),
        ("reference_cuts", "chosen_from"),
        ("validity_cuts", "signal"),
        ("rank_reference", "model"),
        ("disagreement_scores", "pool_id"),
        ("decisions", "provenance_id"),
        *(("calibration", column) for column in Calibration.primary_key()),
        *(("training_trial", column) for column in ("measure", "arm", "seed")),
    }


def test_ancestry_goes_back_to_the_delivered_text_each_column_once() -> None:
    rows = ancestry(DERIVED, "rmi_scores", "rmi")
    assert (rows[0].table, rows[0].column) == ("rmi_scores", "rmi")
    assert {row.column for row in rows if row.table == "raw_data"} == {"system", "history", "query", "answer"}
    assert len({(row.table, row.column) for row in rows}) == len(rows)
    assert {row.table for row in rows} == {"rmi_scores", "logprobs", "raw_data"}


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'scores' is no table; known: raw_data, signatures"):
        ancestry(DERIVED, "scores", "rmi")
    with pytest.raises(ValueError, match=r"logprobs has no column 'rmi'; it has pair_id, sum_nll_q"):
        ancestry(DERIVED, "logprobs", "rmi")


def test_of_tables_that_were_no_input_nothing_comes() -> None:
    of_batch = sources_in(DERIVED, "disagreement_scores", {"rmi_scores"})
    assert set(of_batch["ranks"]) == {("rmi_scores", name) for name in ("pair_id", "log_ppl_q", "rmi")}
    assert {
        table for table, _ in sources_in(DERIVED, "disagreement_scores", {"rmi_scores", "rank_reference"})["gap"]
    } == {
        "rmi_scores",
        "rank_reference",
    }


# --- what the code does ---------------------------------------------------------------------------------------------


Tables = dict[str, pl.DataFrame]

QUANTITIES = {"sum_nll_q": 20.0, "sum_nll_q_given_a": 10.0, "sum_nll_a": 40.0, "sum_nll_a_given_q": 30.0}


def _logprobs(*pairs: int) -> pl.DataFrame:
    counts = {"num_q_tokens": 10, "num_a_tokens": 12, "num_a_tokens_untruncated": 12, "is_truncated": False}
    rows = [
        {name: value + number for name, value in QUANTITIES.items()} | counts | {"pair_id": pair_name(number)}
        for number in pairs
    ]
    return pl.DataFrame(rows, schema=dtypes(Logprobs))


def _raw() -> pl.DataFrame:
    text = "one two three four five six seven eight nine ten"
    near = {"query": f"{text} a", "answer": f"{text} b"}, {"query": f"{text} a", "answer": f"{text} c"}
    same = [{"pair_id": pair_name(4)}, {"pair_id": pair_name(4)}]
    return raw_rows({"system": "s", "source": "web"}, *near, *same, rejected())


def _screen(tables: Tables) -> pl.DataFrame:
    raw, nothing = tables["raw_data"], pl.DataFrame(schema=dtypes(Contamination))
    texts, gone = texts_of([StoredTable(raw)]), forbidden.find(raw, SETTINGS.screening)
    return screen(raw, StoredTable(tables["signatures"]), nothing, gone, [], texts, SETTINGS.screening)


def _rmi_scores(tables: Tables) -> pl.DataFrame:
    return rmi_scores.rmi_scores(tables["logprobs"], EligibilitySettings(min_query_tokens=1, short_query_tokens=11))


NUM_PLANTED = 30
"""So many that the three pairs are told from them."""


def _planted() -> Tables:
    """Answers to other queries, and their scores: all below those of the pairs."""
    names = [pair_name(100 + number) for number in range(NUM_PLANTED)]
    texts = {"defect": Defect.OTHER_ANSWER.value, "original_pair_id": pair_name(1), "query": "q", "answer": "a"}
    scores = [{"pair_id": name, "rmi": -1 - number / 1000} for number, name in enumerate(names)]
    rows = pl.DataFrame([{"pair_id": name} | texts for name in names], schema=dtypes(PlantedRows))
    return {"planted_rows": rows, "planted_scores": rmi_rows(*scores)}


def _by_role(strong: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Of the same table: the weak model ranks the other way round."""
    weak = strong.with_columns(rmi=pl.lit(1.0) - pl.col("rmi") * pl.col("rmi"))
    return {"strong": strong, "weak": weak}


def _pairs(tables: Tables) -> pl.DataFrame:
    raw_data, screened_data = (StoredTable(tables[name]) for name in ("raw_data", "screened_data"))
    texts = pl.concat(accepted_parts(raw_data, screened_data, *TEXTS))
    return judgement.judged_pairs(_by_role(tables["rmi_scores"]), texts)


def _choose_cuts(tables: Tables) -> pl.DataFrame:
    rows = tables["planted_rows"]
    planted = judgement.judged_pairs(dict.fromkeys(("strong", "weak"), tables["planted_scores"]), rows)
    defects = planted.join(rows.select("pair_id", "defect"), on="pair_id", maintain_order="left")
    return judgement.choose_cuts(judgement.Sample(_pairs(tables), defects, ("b1",)), SETTINGS.validity)


def _judge(tables: Tables, cuts: str) -> pl.DataFrame:
    return judgement.judge(_pairs(tables), tables[cuts], SETTINGS.validity)


def _freeze(tables: Tables) -> pl.DataFrame:
    judged = _judge(tables, "reference_cuts")
    return rank_reference.freeze([_by_role(tables["rmi_scores"])], ONE_STRATUM, judged)[0]


def _rank(tables: Tables) -> pl.DataFrame:
    scores = _by_role(tables["rmi_scores"])
    return rank_reference.disagreement_scores(scores, tables["rank_reference"], ONE_STRATUM, "reference:r1:0")


def _decide(tables: Tables) -> pl.DataFrame:
    by_role, disagreement = _by_role(tables["rmi_scores"]), tables["disagreement_scores"]
    pairs = with_validity(candidates(disagreement, by_role), tables["validity"])
    frozen = rank_reference.reference_candidates(tables["rank_reference"], ["strong", "weak"])
    verdicts = select_all(pairs, SETTINGS.selections, frozen)
    raw, screened = tables["raw_data"], tables["screened_data"]
    why_invalid = words.reasons(_pairs(tables), tables["validity"], tables["validity_cuts"])
    return decide(raw, screened, pairs, verdicts, SETTINGS.published, pair_name(0), why_invalid=why_invalid)


def _select(tables: Tables) -> pl.DataFrame:
    return selected_rows(SETTINGS.published.name, tables["raw_data"], tables["decisions"])


MADE_BY: Mapping[str, Callable[[Tables], pl.DataFrame]] = {
    "signatures": lambda tables: duplicates.signatures(tables["raw_data"]),
    "screened_data": _screen,
    "rmi_scores": _rmi_scores,
    "reference_cuts": _choose_cuts,
    "rank_reference": _freeze,
    "disagreement_scores": _rank,
    "validity_cuts": _choose_cuts,
    "validity": lambda tables: _judge(tables, "validity_cuts"),
    "decisions": _decide,
    "selected_subset": _select,
}
"""The pure functions that the assets call; logprobs are made by models, and tested by what is declared of them."""


@pytest.fixture(scope="module")
def tables() -> Tables:
    made = {"raw_data": _raw(), "logprobs": _logprobs(1, 2, 4), **_planted()}
    for name, make in MADE_BY.items():
        made[name] = make(made)
    accepted = made["screened_data"].filter(pl.col("status") == "accepted")
    assert accepted["pair_id"].to_list() == made["logprobs"]["pair_id"].to_list()
    assert made["validity_cuts"].filter(pl.col("cut").is_not_null())["signal"].to_list() == ["mismatch"]
    return made


def _other(column: str, dtype: pl.DataType) -> pl.Expr:
    """Another value in the first row: a text is longer, a number greater, a truth the other way round."""
    value = pl.col(column)
    if dtype == pl.String():
        changed = pl.concat_str(value, pl.lit(" and other words"))
    elif dtype == pl.Boolean():
        changed = ~value
    else:
        changed = value + 3 if dtype.is_integer() else value * 0.5
    return pl.when(pl.int_range(pl.len()) == 0).then(changed).otherwise(value).cast(dtype).alias(column)


def _changed_columns(made: pl.DataFrame, again: pl.DataFrame) -> set[str]:
    """Columns that differ; all, where there are other rows."""
    if made.height != again.height:
        return set(made.columns)
    return {name for name in made.columns if not made[name].equals(again[name], null_equal=True)}


def _perturbations() -> list[Any]:
    """Each column of plain values that is a source of a table here, less keys and closed vocabularies."""
    closed = {*ROW_KEY, "pair_id", "status", "reason", "batch_gate", "decision", "model", "content_hash", "signal"}
    inputs = {table: {name for of in DERIVED[table].values() for name, _ in of} for table in MADE_BY}
    return [
        pytest.param(table, source, column, id=f"{table}-{source}.{column}")
        for table, names in inputs.items()
        for source in sorted(names)
        for column, dtype in dtypes(STORED_TABLES[source]).items()
        if column not in closed and not column.startswith("null_reason") and not dtype.is_nested()
    ]


@pytest.mark.parametrize(("table", "source", "column"), _perturbations())
def test_what_changes_with_a_column_is_declared_to_be_derived_from_it(
    table: str, source: str, column: str, tables: Tables
) -> None:
    frame = tables[source]
    changed = tables | {source: frame.with_columns(_other(column, frame.schema[column]))}
    try:
        again = MADE_BY[table](changed)
    except (ValueError, pl.exceptions.PolarsError):
        return  # Refused as inconsistent: nothing is derived from it.
    declared = {name for name, sources in DERIVED[table].items() if (source, column) in sources}
    assert _changed_columns(tables[table], again) <= declared


SPOT_CHECKS: list[tuple[Column, Column]] = [
    (("signatures", "content_hash"), ("raw_data", "system")),
    (("signatures", "bands"), ("raw_data", "answer")),
    (("screened_data", "similarity"), ("raw_data", "answer")),
    (("rmi_scores", "rmi"), ("logprobs", "sum_nll_q")),
    (("rmi_scores", "rmi"), ("logprobs", "sum_nll_q_given_a")),
    (("rmi_scores", "rmi"), ("logprobs", "num_q_tokens")),
    (("rmi_scores", "ifd_ppl"), ("logprobs", "sum_nll_a")),
    (("rmi_scores", "ifd_loss"), ("logprobs", "num_a_tokens")),
    (("rank_reference", "rank"), ("rmi_scores", "rmi")),
    (("disagreement_scores", "gap"), ("rmi_scores", "rmi")),
    (("disagreement_scores", "ranks"), ("rank_reference", "rmi")),
    (("validity_cuts", "cut"), ("planted_scores", "rmi")),
    (("validity_cuts", "num_planted"), ("planted_rows", "defect")),
    (("validity", "signals"), ("rmi_scores", "rmi")),
    (("validity", "query_in_answer"), ("raw_data", "query")),
    (("decisions", "gap"), ("disagreement_scores", "gap")),
    (("decisions", "decision"), ("disagreement_scores", "gap")),
    (("decisions", "verdicts"), ("disagreement_scores", "gap")),
    (("decisions", "scores"), ("rmi_scores", "log_ppl_a")),
    (("selected_subset", "query"), ("raw_data", "query")),
]


@pytest.mark.parametrize(("derived", "source"), SPOT_CHECKS, ids=".".join)
def test_another_value_of_a_source_makes_another_value(derived: Column, source: Column, tables: Tables) -> None:
    (table, column), (name, changed) = derived, source
    assert source in DERIVED[table][column]
    again = [
        MADE_BY[table](tables | {name: _with_other_row(tables[name], row, changed)})
        for row in range(tables[name].height)
    ]
    assert any(column in _changed_columns(tables[table], frame) for frame in again)


def _with_other_row(frame: pl.DataFrame, row: int, column: str) -> pl.DataFrame:
    order = [row, *(other for other in range(frame.height) if other != row)]
    other = frame[order].with_columns(_other(column, frame.schema[column]))
    return other[[order.index(place) for place in range(frame.height)]]


JSON_FORMATS = ("messages", "prompt_completion", "sharegpt", "alpaca")


@pytest.mark.parametrize("column", [*dtypes(SelectedSubset), "record"])
def test_a_field_of_a_record_changes_with_exactly_the_columns_that_it_is_derived_from(
    column: str, tables: Tables
) -> None:
    rows, raw = tables["selected_subset"], tables["raw_data"]
    before, after = (
        exports.with_meta(of, records, raw.clear())
        for of, records in ((rows, raw), (_another(rows, column), _another(raw, column)))
    )
    for name in JSON_FORMATS:
        fields = exports.columns(name, has_meta=True).names
        derived = {row.column: row.sources for row in of_records("file", fields, "selected_subset")}
        old, new = _records(name, before), _records(name, after)
        source = ("raw_data" if column == "record" else "selected_subset", column)
        assert {field for field in fields if old[field] != new[field]} == {
            field for field, sources in derived.items() if source in sources
        }


def _another(frame: pl.DataFrame, column: str) -> pl.DataFrame:
    """Another value in every row, where the frame has the column; keys stay unique."""
    if column not in frame.columns:
        return frame
    value, dtype = pl.col(column), frame.schema[column]
    if dtype.is_nested():
        other = pl.lit([{"role": "user", "content": "another"}], dtype)
    else:
        other = pl.concat_str(value.fill_null(""), pl.lit("another")) if dtype == pl.String() else value + 100
    return frame.with_columns(other.alias(column))


def _records(name: str, rows: pl.DataFrame) -> dict[str, list[object]]:
    """The values of each field."""
    with tempfile.TemporaryDirectory() as folder:
        with exports.open_file(name, Path(folder), has_meta="meta" in rows.columns) as file:
            file.append("b1", rows)
        data = next(Path(folder).iterdir()).read_text(encoding="utf-8")
    records = json.loads(data) if name == "alpaca" else [json.loads(line) for line in data.splitlines()]
    return {field: [record[field] for record in records] for field in records[0]}


def test_scores_of_a_version_change_with_the_column_of_the_decisions_that_is_declared(tables: Tables) -> None:
    flat = flat_scores(tables["decisions"])
    derived = {row.column: row.sources for row in of_scores("scores/*.parquet", flat.columns)}
    assert {source for sources in derived.values() for source in sources} == {
        ("decisions", column) for column in Decisions.columns()
    }
    for column in ("scores", "verdicts"):
        without = flat_scores(tables["decisions"].with_columns(pl.col(column).list.head(0)))
        assert {name for name, sources in derived.items() if sources == (("decisions", column),)} == {
            name for name in flat.columns if name not in without.columns
        }


@pytest.mark.parametrize("quantity", Quantity)
def test_likelihoods_come_from_the_texts_of_their_own_row(quantity: Quantity) -> None:
    assert DERIVED["logprobs"][f"sum_nll_{quantity}"] == tuple(
        ("raw_data", column) for column in ("system", "history", "query", "answer")
    )


# --- as Dagster has it ----------------------------------------------------------------------------------------------


def test_every_materialisation_says_what_its_columns_come_from(
    settings_for: Callable[..., Settings], instance: dg.DagsterInstance, tmp_path: Any
) -> None:
    settings = settings_for()
    rows = [{"query": f"query {number}", "response": f"answer {number}"} for number in range(4)]
    registration.register(Deployment(settings, instance), "b1", [write_jsonl(tmp_path / "rows.jsonl", rows)], None)
    run_batch.run_batch(Deployment(settings, instance), "b1")
    for table in TABLES:
        records = instance.fetch_materializations(dg.AssetKey(table), limit=1).records
        event = records[0].asset_materialization
        assert event is not None
        lineage = event.metadata["dagster/column_lineage"].value
        assert isinstance(lineage, dg.TableColumnLineage)
        found = {
            column: [(dep.asset_key.to_user_string(), dep.column_name) for dep in deps]
            for column, deps in lineage.deps_by_column.items()
        }
        made_of = sources_in(DERIVED, table, set(TABLES))
        assert found == {column: sorted(sources) for column, sources in made_of.items()}
