"""What a notebook needs: versions, decisions and explanations as Polars frames and text, and scores of some pairs.

Belongs here: a few functions, each a short way to what the other packages do. Does not belong here: computations. It
imports no Dagster, and torch only to score.

    home = api.open_home("~/curation", "settings.yaml")
    home.versions()                             # number, hash, day
    home.version("latest")                      # the published rows, in the order of the training files
    home.decisions("week-47")                   # every delivered row: decision, reason, explanation, scores
    home.explain("week-47", "pairs.jsonl:12")   # the explanation of one row
    home.score([("Reverse a list.", "xs[::-1]")])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from qaq_pipeline.config.load import load_settings
from qaq_pipeline.config.settings import Settings
from qaq_pipeline.ingest.records import pair_id
from qaq_pipeline.lineage import row_history
from qaq_pipeline.lm.prompts import Pair
from qaq_pipeline.publication import versions
from qaq_pipeline.publication.difference import compare
from qaq_pipeline.publication.flat_scores import flat_scores, lines
from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.row_place import ROW_KEY
from qaq_pipeline.scoring.pairs import Pairs
from qaq_pipeline.scoring.rmi_scores import rmi_scores
from qaq_pipeline.scoring.runtime import ModelRuntime
from qaq_pipeline.storage.storage import Storage, open_storage


@dataclass(frozen=True)
class Home:
    """A home: its settings, and its storage, which only `score` writes to."""

    settings: Settings
    storage: Storage

    def versions(self) -> pl.DataFrame:
        """The published versions by number: number, version (hash), published_at, is_kept."""
        kept = set(versions.kept_versions(self.storage))
        rows = [
            (one.number, one.version, one.published_at, one.version in kept)
            for one in versions.publications(self.storage)
        ]
        schema = {"number": pl.Int64, "version": pl.String, "published_at": pl.String, "is_kept": pl.Boolean}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def version(self, name: str = "latest") -> pl.DataFrame:
        """The published rows of a version in the order of its training files, with all columns of the scores, and
        `line`, `query` and `answer`. The texts are those that are delivered now; null where these are others.

        Args:
            name: number, first digits of the hash, or `latest`.

        Raises:
            StorageError: there is no such version, or its files were not kept.
        """
        found = versions.find_version(self.storage, name).version
        manifest = versions.read_manifest(self.storage, found)
        batches = [entry["batch"] for entry in manifest["batches"]]
        scores = versions.read_scores(self.storage, found)
        of_files = lines(scores, batches, manifest["selection"]["name"])
        rows = of_files.join(scores, on=ROW_KEY, how="left", validate="1:1", maintain_order="left")
        texts = [
            self.storage.tables.read("raw_data", Partition(batch)).select(*ROW_KEY, "pair_id", "query", "answer")
            for batch in batches
        ]
        with_texts = rows.join(pl.concat(texts), on=[*ROW_KEY, "pair_id"], how="left", maintain_order="left")
        return with_texts.select("line", pl.exclude("line"))

    def decisions(self, batch: str) -> pl.DataFrame:
        """Every delivered row of a batch: decision, reason, explanation, and a column for each score and model
        (`rmi_strong`) and each selection (`is_selected:qaq`).

        Raises:
            StorageError: there is no such batch, or it has no decisions.
        """
        return flat_scores(self.storage.tables.read("decisions", Partition(batch)).frame)

    def explain(self, batch: str, row: str) -> str:
        """The explanation of a row of a batch, as decided now.

        Args:
            batch: name of the batch.
            row: row number, file:row, file:row.turn, or the first digits of a pair_id.

        Raises:
            StorageError: there is no such batch, or it has no decisions.
            LookupError: no row matches.
        """
        found = row_history.find_row(self.storage, batch, row).rows
        if not found:
            raise LookupError(f"batch {batch!r} has no row {row!r}")
        return found[0]["explanation"]

    def difference(self, older: str, newer: str) -> pl.DataFrame:
        """The rows that are in only one of two versions, and why (table Difference). Raises StorageError."""
        return compare(self.storage, *(versions.find_version(self.storage, name).version for name in (older, newer)))

    def score(self, pairs: Sequence[tuple[str, str]]) -> pl.DataFrame:
        """The scores of some pairs of query and answer: query, answer, model and the columns of RmiScores. The
        likelihoods stay in the score cache, so that they are not computed again.

        Raises:
            model_files.ModelNotFoundError: a model's files are missing.
        """
        settings = self.settings
        asked = {pair_id(None, query, answer): (query, answer) for query, answer in pairs}
        runtime = ModelRuntime(settings.models, settings.scoring, settings.runtime, settings.model_cache_dir)
        wanted = Pairs.of([Pair(name, None, *texts) for name, texts in asked.items()])
        texts = pl.DataFrame(
            [(name, *texts) for name, texts in asked.items()],
            schema={"pair_id": pl.String, "query": pl.String, "answer": pl.String},
            orient="row",
        )
        found = []
        for role in settings.models:
            scored = runtime.score(role, wanted, self.storage, lambda _: None).frame
            scores = rmi_scores(scored, settings.eligibility)
            of_model = texts.join(scores, on="pair_id", how="left", validate="1:1", maintain_order="left")
            named = of_model.select("query", "answer", pl.lit(role).alias("model"), pl.exclude(*texts.columns))
            found.append(named)
        return pl.concat(found)


def open_home(home: str | os.PathLike[str] | None = None, settings: str | os.PathLike[str] | None = None) -> Home:
    """Open a home.

    Args:
        home: the folder; default: QAQ_HOME, else ./var.
        settings: the settings file, or the name of a packaged profile; default: QAQ_CONFIG, else demo.

    Raises:
        SettingsError: the settings cannot be used.
    """
    folder = None if home is None else Path(home).expanduser().absolute()
    loaded = load_settings(None if settings is None else Path(settings).expanduser(), folder)
    return Home(loaded, open_storage(loaded))
