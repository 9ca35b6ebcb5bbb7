"""Curate another home's batches with the present code; show that no likelihood is scored and no result differs.

    python -m bench.same_results OLD_HOME [--code CHECKOUT] [--config SETTINGS] [--keep NEW_HOME]

Deliveries and score cache of OLD_HOME are copied into a new home, its models are linked, and its batches are curated in
their order. Then every column of every stored table, and every file of every version, is compared; same_results.yaml
lists what may differ. OLD_HOME is only read; with --code, `make demo` of that checkout makes it if it is missing.
Exits with 1 if something differs. Tables are read as plain Parquet: this code knows no older layout.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import polars as pl
import yaml
from rich.console import Console

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lineage.lineage import walk
from qaq_pipeline.lineage.verify import verify
from qaq_pipeline.publication.versions import find_version
from qaq_pipeline.runs.deployment import Deployment, open_instance
from qaq_pipeline.runs.run_batch import run_batch
from qaq_pipeline.storage.storage import open_storage

MAP = Path(__file__).with_suffix(".yaml")
COPIED = ("deliveries", "score_cache")
COMPARED_BY_VALUE = {"manifest.json": "manifest", "scores/*.parquet": "scores"}
"""Files of a version in which some values may differ, and their names in the map; all others are compared byte by
byte."""
MOST_ROWS = 3
"""Number of differing rows shown per column."""

console = Console(soft_wrap=True, highlight=False, markup=False)


def main() -> int:
    """Curate and compare; return 1 as exit status if something differs."""
    parser = argparse.ArgumentParser(prog="python -m bench.same_results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old_home", type=Path)
    parser.add_argument("--code", type=Path, help="checkout whose `make demo` makes OLD_HOME if it is missing")
    parser.add_argument("--config", help="settings of OLD_HOME; default: QAQ_CONFIG, else demo")
    parser.add_argument("--keep", type=Path, help="folder to keep the new home in; default: not kept")
    arguments = parser.parse_args()
    old_home = arguments.old_home.absolute()
    if arguments.code is not None and not old_home.exists():
        subprocess.run(["make", "-C", str(arguments.code), "demo", f"QAQ_HOME={old_home}"], check=True)  # noqa: S607
    with tempfile.TemporaryDirectory() as temporary:
        new_home = (arguments.keep or Path(temporary) / "home").absolute()
        return report(show_same(old_home, new_home, arguments.config))


def show_same(old_home: Path, new_home: Path, config: str | None) -> Comparison:
    """Curate the batches of `old_home` in `new_home` with the present code, and compare the two."""
    old, new = old_home / "storage", new_home / "storage"
    copy_home(old_home, new_home)
    settings = settings_in(new_home, config)
    storage = open_storage(settings)
    cached = {one.digest: one.num_scores for one in storage.scores.models()}
    curate(settings, json.loads((old / "batch_order.json").read_bytes()))
    comparison = compare(old, new, Names.read(MAP))
    scored = [one for one in storage.scores.models() if one.num_scores != cached.get(one.digest)]
    comparison.differences += [f"score_cache/{one.digest}: likelihoods were scored" for one in scored]
    newest = walk(storage, find_version(storage, "latest").version)
    comparison.differences += [f"lineage: {finding.sentence}" for finding in verify(storage, newest)]
    return comparison


def report(comparison: Comparison) -> int:
    """Print what was compared and what differs; return the exit status."""
    for difference in comparison.differences:
        console.print(difference, style="red")
    for name in sorted(comparison.reworded):
        console.print(f"{name}: differs, as the map allows")
    console.print(
        f"{comparison.num_tables} tables and manifests with {comparison.num_columns} columns and "
        f"{comparison.num_values:,} values, and {comparison.num_files} other files of versions were compared: "
        f"{len(comparison.differences)} differences."
    )
    if not comparison.differences:
        console.print("No likelihood was scored, and the lineage of the newest version is verified.")
    return 1 if comparison.differences else 0


# --- the new home ---------------------------------------------------------------------------------------------------


def copy_home(old_home: Path, new_home: Path) -> None:
    """Copy the deliveries and the score cache, and link the models."""
    for name in COPIED:
        shutil.copytree(old_home / "storage" / name, new_home / "storage" / name)
    (new_home / "models").symlink_to(old_home / "models")


def settings_in(home: Path, config: str | None) -> Settings:
    """Read the settings with `home` as QAQ_HOME.

    Raises:
        SettingsError: the settings name a storage outside `home`, which would be overwritten.
    """
    os.environ |= {"QAQ_HOME": str(home), "DAGSTER_HOME": str(home / "dagster")}
    if config is not None:
        os.environ["QAQ_CONFIG"] = config
    settings = load_settings()
    if Path(settings.storage_root) != home / "storage":
        raise SettingsError(f"storage.root is {settings.storage_root}: remove it, so that the storage is in QAQ_HOME")
    return settings


def curate(settings: Settings, batches: list[str]) -> None:
    """Run every batch through all stages; publish each before the next is registered."""
    with open_instance() as instance:
        for batch in batches:
            console.print(f"curating {batch}")
            instance.add_dynamic_partitions("batch", [batch])
            run_batch(Deployment(settings, instance), batch)


# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """The committed map of names."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    hashes: tuple[str, ...] = ()
    text: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the map from YAML."""
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(values["renamed"], *(tuple(values[name]) for name in ("removed", "hashes", "text")))

    def new_name(self, name: str) -> str | None:
        """Return the new name for an old one, or None if it was removed; the longest entry decides."""
        for start in _starts(name):
            if any(fnmatch.fnmatchcase(start, pattern) for pattern in self.removed):
                return None
            if start in self.renamed:
                return self.renamed[start] + name.removeprefix(start)
        return name

    def may_differ(self, name: str) -> bool:
        """Return whether a value with this new name may differ."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*self.hashes, *self.text))


@dataclass
class Comparison:
    """The counts of a comparison, and the differences."""

    differences: list[str] = field(default_factory=list)
    reworded: set[str] = field(default_factory=set)
    """Texts that differ, as the map allows."""
    num_tables: int = 0
    num_columns: int = 0
    num_values: int = 0
    num_files: int = 0

    def pairs(self, where: str, old: Mapping[str, Path], new: Mapping[str, Path]) -> Iterator[tuple[str, Path, Path]]:
        """Yield what both have; record what only one has."""
        self.differences += [f"{where}{name}: not made by the present code" for name in sorted(set(old) - set(new))]
        self.differences += [f"{where}{name}: made by the present code only" for name in sorted(set(new) - set(old))]
        for name in sorted(set(old) & set(new)):
            yield name, old[name], new[name]


def compare(old: Path, new: Path, names: Names) -> Comparison:
    """Compare two storages: their tables, and the files of their versions."""
    comparison = Comparison()
    for place, before, after in comparison.pairs("", _tables(old, names), _tables(new, Names())):
        table = place.partition("/")[0]
        old_table = before.relative_to(old).parts[0]
        _compare_tables(comparison, place, (before, old_table), (after, table), names)
    for batches, before, after in comparison.pairs("version of ", _versions(old), _versions(new)):
        version = f"version of {batches}: "
        for name, one, other in comparison.pairs(version, _files(before, names), _files(after, Names())):
            table = next((table for files, table in COMPARED_BY_VALUE.items() if fnmatch.fnmatch(name, files)), None)
            if table is not None:
                _compare_tables(comparison, version + name, (one, table), (other, table), names)
            else:
                _compare_files(comparison, version, name, one, other, names)
    return comparison


def _compare_files(comparison: Comparison, version: str, name: str, old: Path, new: Path, names: Names) -> None:
    comparison.num_files += 1
    if old.read_bytes() == new.read_bytes():
        return
    if names.may_differ(name):
        comparison.reworded.add(name)
    else:
        comparison.differences.append(f"{version}{name}: the bytes differ: {_first_difference(old, new)}")


def _compare_tables(
    comparison: Comparison, place: str, old_table: tuple[Path, str], new_table: tuple[Path, str], names: Names
) -> None:
    """Compare two tables, each given as a file and its table name there."""
    old, new = _columns(*old_table, names), _columns(*new_table, Names())
    comparison.num_tables += 1
    for name in sorted(set(old) ^ set(new)):
        whose = "not made by the present code" if name in old else "made by the present code only"
        comparison.differences.append(f"{place}: column {name}: {whose}")
    for name in (name for name in old if name in new):
        comparison.num_columns += 1
        comparison.num_values += len(old[name])
        if old[name].equals(new[name], check_dtypes=True, null_equal=True):
            continue
        if names.may_differ(name):
            comparison.reworded.add(name)
        else:
            comparison.differences += _differing_rows(f"{place}: {name}", old[name], new[name])


def _differing_rows(place: str, old: pl.Series, new: pl.Series) -> Iterator[str]:
    """Yield the first rows that differ."""
    if old.dtype != new.dtype or len(old) != len(new):
        yield f"{place}: {len(old)} rows of {old.dtype} became {len(new)} rows of {new.dtype}"
        return
    rows = enumerate(zip(old.to_list(), new.to_list(), strict=True))
    differing = [(row, before, after) for row, (before, after) in rows if repr(before) != repr(after)]
    for row, before, after in differing[:MOST_ROWS]:
        yield f"{place}: row {row} ({len(differing)} differ): {before!r} became {after!r}"


def _first_difference(old: Path, new: Path) -> str:
    """Show the first line that differs."""
    before, after = (path.read_bytes().splitlines() for path in (old, new))
    for number, (one, other) in enumerate(zip(before, after, strict=False), start=1):
        if one != other:
            return f"line {number}: {one[:200]!r} became {other[:200]!r}"
    return f"{len(before)} lines became {len(after)}"


# --- what is stored -------------------------------------------------------------------------------------------------


def _tables(storage: Path, names: Names) -> dict[str, Path]:
    """Find the stored tables, keyed by path under the new name: `decisions/week-47`."""
    found = {}
    for path in storage.glob("*/**/table.parquet"):
        table, *partition = path.relative_to(storage).parent.parts
        if (name := names.new_name(table)) is not None:
            found["/".join([name, *partition])] = path
    return found


def _versions(storage: Path) -> dict[str, Path]:
    """Find the folders of versions, keyed by their batches; if several have the same batches, the newest."""
    manifests = sorted(storage.glob("curated_dataset/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return {
        ", ".join(one["batch"] for one in json.loads(path.read_bytes())["batches"]): path.parent for path in manifests
    }


def _files(version: Path, names: Names) -> dict[str, Path]:
    """Find the files of a version, keyed by path under the new name."""
    paths = {path.relative_to(version).as_posix(): path for path in version.rglob("*") if path.is_file()}
    return {new: path for name, path in paths.items() if (new := names.new_name(name)) is not None}


def _columns(path: Path, table: str, names: Names) -> dict[str, pl.Series]:
    """Read Parquet or JSON: columns and struct fields, keyed by the new name `table.column.field`."""
    if path.suffix == ".json":
        columns = {name: pl.Series([value]) for name, value in _leaves(json.loads(path.read_bytes()), table)}
    else:
        columns = {f"{table}.{series.name}": series for series in pl.read_parquet(path)}
    while nested := [name for name, series in columns.items() if _fields(series)]:
        for name in nested:
            series = columns.pop(name)
            columns |= {f"{name}.{key}": _field(series, key) for key in _fields(series)}
    return {new: series for name, series in columns.items() if (new := names.new_name(name)) is not None}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield every value inside a JSON value, with its path: `manifest.batches.0.rows_in`."""
    if not isinstance(value, dict | list):
        yield name, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(inner, f"{name}.{key}")


def _fields(series: pl.Series) -> list[str]:
    """List the fields of the struct that a column, or a list in it, holds."""
    inner = series.dtype.inner if isinstance(series.dtype, pl.List) else series.dtype
    return [one.name for one in inner.fields] if isinstance(inner, pl.Struct) else []


def _field(series: pl.Series, key: str) -> pl.Series:
    if isinstance(series.dtype, pl.List):
        return series.list.eval(pl.element().struct.field(key))
    return series.struct.field(key)


def _starts(name: str) -> Iterator[str]:
    """Yield the name and each name that contains it, the longest first."""
    yield name
    for end in range(len(name) - 1, 0, -1):
        if name[end] in "./":
            yield name[:end]


if __name__ == "__main__":
    sys.exit(main())
