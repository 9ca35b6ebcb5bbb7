"""Check whether this machine can run the pipeline: models, devices, storage, benchmarks, Dagster home, versions.

Belongs here: one function per check, with its finding and, if it fails, the remedy.
Does not belong here: fixing anything; nothing is downloaded, though a GGUF file is converted on the way.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from qaq_pipeline.cli.terminal import ConfigOption, console, read_settings
from qaq_pipeline.config import load
from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.lm import model_files
from qaq_pipeline.lm.prompts import PairEncoder
from qaq_pipeline.publication import exports
from qaq_pipeline.scoring.pools import SCORING_LIBRARIES, pool_of
from qaq_pipeline.screening.benchmarks import BenchmarkError, load_benchmark
from qaq_pipeline.storage.files import Files
from qaq_pipeline.storage.locks import open_locks


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    is_ok: bool
    text: str
    is_warning: bool = False

    @property
    def mark(self) -> str:
        """The result in a word, for a table."""
        return ("[yellow]warn[/]" if self.is_warning else "[green]ok[/]") if self.is_ok else "[red]no[/]"


def doctor(config_file: ConfigOption = None) -> None:
    """Check models, devices, storage, benchmarks, Dagster home and versions; exit 1 if something is missing."""
    settings = read_settings(config_file)
    # In the order in which a run would depend on them.
    findings = [_versions(), *_models(settings), _storage(settings), _locks(settings), *_benchmarks(settings)]
    findings += [_exports(settings), _dagster_home(settings)]
    result = Table("", "check", "finding", title="qaq doctor")
    for finding in findings:
        result.add_row(finding.mark, finding.check, escape(finding.text))
    console.print(result)
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


def _versions() -> Finding:
    libraries = (*SCORING_LIBRARIES, "polars", "dagster")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    return Finding("versions", is_ok=True, text=f"Python {platform.python_version()}, {versions}")


def _models(settings: Settings) -> Iterator[Finding]:
    from qaq_pipeline.lm import causal_lm, devices
    from qaq_pipeline.lm.tokenizer import load_tokenizer, warnings

    for role, model in settings.models.items():
        check = f"model {role}"
        try:
            placed = pool_of(settings.runtime).local(model)
            device = devices.resolve_device(placed.device)
            files = model_files.locate(model, settings.model_cache_dir, download=False)
            tokenizer = load_tokenizer(model, files, settings.model_cache_dir)
            encoder = PairEncoder(tokenizer, model, settings.scoring, files.num_embeddings())
            causal_lm.check_weights(files)
            warned = warnings(model, files, tokenizer, encoder)
        except model_files.ModelNotFetchedError as error:
            yield Finding(check, is_ok=True, text=str(error), is_warning=True)
            continue
        except (OSError, ValueError) as error:  # Of the files, the tokenizer, the template, the device.
            yield Finding(check, is_ok=False, text=str(error))
            continue
        where = str(device) if placed == model else f"{model.device} of another machine"
        dtype = devices.resolve_dtype(model.dtype, device)
        yield Finding(check, is_ok=True, text=f"{files.name} on {where}, {dtype}, {model.frame} frame, {files.folder}")
        yield from (Finding(check, is_ok=True, text=said, is_warning=True) for said in warned)


def _storage(settings: Settings) -> Finding:
    name = f".doctor-{uuid.uuid4().hex}"
    try:
        files = Files(settings.storage_root)
        files.write_bytes(b"qaq", name)
        files.remove(name)
    except (OSError, ValueError, ImportError) as error:
        return Finding("storage", is_ok=False, text=f"{settings.storage_root}: cannot be written ({error})")
    return Finding("storage", is_ok=True, text=f"{settings.storage_root}: writable")


def _locks(settings: Settings) -> Finding:
    kind, name = settings.storage.locks.kind, f"doctor-{uuid.uuid4().hex}"
    try:
        locks = open_locks(settings, settings.home / "locks")
        with locks.hold(name):
            pass
        locks.forget(name)
    except (OSError, SettingsError) as error:
        return Finding("locks", is_ok=False, text=f"{kind}: {error}")
    if locks.are_of_one_machine and "://" in settings.storage_root:
        remedy = f"if another one writes {settings.storage_root} too, set storage.locks.kind: postgres"
        return Finding("locks", is_ok=True, text=f"{kind}: of this machine; {remedy}", is_warning=True)
    return Finding("locks", is_ok=True, text=kind)


def _benchmarks(settings: Settings) -> Iterator[Finding]:
    excluded, measured = settings.screening.contamination.benchmarks, settings.trial.benchmarks
    if not excluded:
        text = "none: published rows are not checked for tasks of benchmarks (screening.contamination.benchmarks)"
        yield Finding("benchmarks", is_ok=True, text=text, is_warning=True)
    for source in dict.fromkeys((*excluded, *measured)):
        try:
            tasks = load_benchmark(source).tasks
        except BenchmarkError as error:
            yield Finding(f"benchmark {source.name}", is_ok=False, text=str(error))
        else:
            yield Finding(f"benchmark {source.name}", is_ok=True, text=f"{len(tasks):,} texts, {source.path}")


def _exports(settings: Settings) -> Finding:
    formats = settings.export.written
    try:
        exports.check_installed(formats)
    except SettingsError as error:
        return Finding("exports", is_ok=False, text=str(error))
    return Finding("exports", is_ok=True, text=", ".join(formats))


def _dagster_home(settings: Settings) -> Finding:
    home = load.dagster_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return Finding("Dagster home", is_ok=False, text=f"{home}: cannot be made ({error}); set QAQ_HOME")
    if not os.access(home, os.W_OK):
        return Finding("Dagster home", is_ok=False, text=str(home))
    if settings.storage.locks.kind == "postgres" and not _names_postgres(home / "dagster.yaml"):
        text = f"{home}: its batches and runs are known to this machine alone; name Postgres in its dagster.yaml too"
        return Finding("Dagster home", is_ok=True, text=text, is_warning=True)
    return Finding("Dagster home", is_ok=True, text=str(home))


def _names_postgres(instance: Path) -> bool:
    """Whether the settings of a Dagster instance keep its runs and events in Postgres."""
    try:
        return "postgres" in (yaml.safe_load(instance.read_text(encoding="utf-8")) or {}).get("storage", {})
    except FileNotFoundError:
        return False
