"""The comparison of `bench.same_results` finds one changed number, and allows what its map allows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest

from bench.same_results import MAP, Comparison, Names, compare, copy_home, report
from qaq_pipeline_tests.support.sentences import Check

DECISIONS = "decisions/b1/table.parquet"
SCORES = "curated_dataset/v1/scores/b1.parquet"
EXPORT = "curated_dataset/v1/diff_high/alpaca.json"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A storage with a table and a version."""
    frame = pl.DataFrame(
        {
            "pair_id": ["p1", "p2", "p3"],
            "gap": [0.5, None, float("nan")],
            "explanation": ["kept", "left", "left"],
            "verdicts": [[{"selection": "s", "score": 1.5}], [], [{"selection": "s", "score": None}]],
        }
    )
    for path in (DECISIONS, SCORES):
        (tmp_path / "old" / path).parent.mkdir(parents=True)
        frame.write_parquet(tmp_path / "old" / path)
    version = tmp_path / "old" / "curated_dataset" / "v1"
    (version / "diff_high").mkdir()
    (version / "diff_high" / "alpaca.json").write_text('[{"instruction": "q1"},\n{"instruction": "q2"}]')
    (version / "README.md").write_text("The card.")
    (version / "manifest.json").write_text(
        json.dumps({"batches": [{"batch": "b1", "rows_in": 3}], "files": {"README.md": "a1"}})
    )
    return tmp_path / "old"


@pytest.fixture
def new(old: Path, tmp_path: Path) -> Path:
    """A copy of it, whose version has another name."""
    shutil.copytree(old, tmp_path / "new")
    (tmp_path / "new" / "curated_dataset" / "v1").rename(tmp_path / "new" / "curated_dataset" / "v2")
    return tmp_path / "new"


def change(path: Path, *columns: pl.Expr | pl.Series) -> None:
    pl.read_parquet(path).with_columns(*columns).write_parquet(path)


def test_a_copy_has_no_difference(old: Path, new: Path) -> None:
    comparison = compare(old, new, Names())
    assert comparison == Comparison(num_tables=3, num_columns=13, num_values=33, num_files=2)
    assert report(comparison) == 0


@pytest.mark.parametrize(("file", "table"), [(DECISIONS, "decisions"), (SCORES.replace("v1", "v2"), "scores")])
def test_one_changed_number_is_a_difference(old: Path, new: Path, file: str, table: str) -> None:
    change(new / file, pl.Series("gap", [0.5, None, 0.5000000000000001]))
    comparison = compare(old, new, Names.read(MAP))
    (difference,) = comparison.differences
    assert difference.endswith(f"{table}.gap: row 2 (1 differ): nan became 0.5000000000000001")
    assert report(comparison) == 1


def test_one_changed_number_inside_a_list_is_a_difference(old: Path, new: Path) -> None:
    verdicts = [[{"selection": "s", "score": 1.25}], [], [{"selection": "s", "score": None}]]
    change(new / DECISIONS, pl.Series("verdicts", verdicts))
    assert compare(old, new, Names()).differences == [
        "decisions/b1: decisions.verdicts.score: row 0 (1 differ): [1.5] became [1.25]"
    ]


def test_a_changed_byte_of_a_training_file_is_a_difference(old: Path, new: Path, check_sentence: Check) -> None:
    (new / "curated_dataset" / "v2" / "diff_high" / "alpaca.json").write_text('[{"instruction": "q1"},\n{"x": "q2"}]')
    (difference,) = compare(old, new, Names.read(MAP)).differences
    check_sentence(difference)


def test_a_changed_value_of_a_manifest_is_a_difference_but_for_the_hash_of_text(old: Path, new: Path) -> None:
    changed = {"batches": [{"batch": "b1", "rows_in": 4}], "files": {"README.md": "b2"}}
    (new / "curated_dataset" / "v2" / "manifest.json").write_text(json.dumps(changed))
    comparison = compare(old, new, Names.read(MAP))
    (difference,) = comparison.differences
    assert difference.endswith("manifest.batches.0.rows_in: row 0 (1 differ): 3 became 4")
    assert comparison.reworded == {"manifest.files.README.md"}


def test_what_one_storage_has_only_is_a_difference(old: Path, new: Path) -> None:
    change(new / DECISIONS, pl.lit(1).alias("more"))
    shutil.copytree(new / "decisions", new / "others")
    (new / "curated_dataset" / "v2" / "README.md").unlink()
    assert compare(old, new, Names()).differences == [
        "others/b1: made by the present code only",
        "decisions/b1: column decisions.more: made by the present code only",
        "version of b1: README.md: not made by the present code",
    ]


def test_text_may_differ_and_is_listed(old: Path, new: Path) -> None:
    change(new / DECISIONS, pl.lit("other words").alias("explanation"))
    (new / "curated_dataset" / "v2" / "README.md").write_text("Other words.")
    comparison = compare(old, new, Names.read(MAP))
    assert comparison.differences == []
    assert comparison.reworded == {"decisions.explanation", "README.md"}


def test_a_renamed_table_column_and_field_are_compared_under_their_new_names(old: Path, new: Path) -> None:
    frame = pl.read_parquet(new / DECISIONS).drop("explanation").rename({"gap": "difference"})
    verdicts = frame["verdicts"].list.eval(pl.element().struct.rename_fields(["selection", "value"]))
    frame.with_columns(verdicts).write_parquet(new / DECISIONS)
    (new / "decisions").rename(new / "ledger")
    renamed = {
        "decisions": "ledger",
        "decisions.gap": "ledger.difference",
        "decisions.verdicts.score": "ledger.verdicts.value",
    }
    names = Names(renamed, removed=("decisions.explanation",))
    assert compare(old, new, names).differences == []
    change(new / "ledger" / "b1" / "table.parquet", pl.lit(0.5).alias("difference"))
    assert compare(old, new, names).differences[0].startswith("ledger/b1: ledger.difference: row 1 (2 differ)")


def test_the_old_home_is_copied_and_its_models_are_linked(old: Path, tmp_path: Path) -> None:
    for folder in ("home/storage/deliveries/b1", "home/storage/score_cache/d1", "home/models"):
        (tmp_path / folder).mkdir(parents=True)
    copy_home(tmp_path / "home", tmp_path / "copy")
    assert (tmp_path / "copy" / "storage" / "deliveries" / "b1").is_dir()
    assert (tmp_path / "copy" / "models").readlink() == tmp_path / "home" / "models"
