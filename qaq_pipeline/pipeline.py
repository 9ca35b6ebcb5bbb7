"""The pipeline, declared once: every asset with its schema, partitioning, inputs and job, in the order of execution.

Belongs here: what jobs, conditions, lineage, staleness and publication derive from. Does not belong here: the columns
of a table (`schema.tables`), and how an asset is made (`orchestration.assets`).

To add a table, write its schema, the sources of its columns, its entry here, and its asset in
`orchestration/assets/<group>/<name>.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property

import dataframely as dy

from qaq_pipeline.schema import column_lineage, tables
from qaq_pipeline.schema.column_lineage import ColumnSources, Sources
from qaq_pipeline.schema.partition import Partition


class Partitioning(StrEnum):
    """The partitions of an asset."""

    BATCH = "batch"
    BATCH_AND_MODEL = "batch and model"
    REFERENCE = "reference"
    """Stored once under the name of the reference."""
    VERSION = "version"
    """One partition for each published version of the dataset."""
    NONE = "none"


class Purpose(StrEnum):
    """The reason for which an asset is made; it says under which settings, and what waits for it."""

    CURATION = "curation"
    """A batch is published from it."""
    REFERENCE = "reference"
    """Batches are ranked against it, where a reference is configured."""
    PUBLICATION = "publication"
    CALIBRATION = "calibration"
    """The scores are validated with it. Nothing is published from it."""
    TRIAL = "trial"
    """It tests what is published. It is made on demand only, and nothing is made from it."""
    PAGE = "page"
    """People read it. Nothing is made from it, so a failure stops nothing."""


@dataclass(frozen=True)
class Asset:
    """One asset of the pipeline."""

    name: str
    group: str
    """Group in the UI, and folder of the asset's module."""
    job: str
    inputs: tuple[str, ...] = ()
    """Assets from which it is always made."""
    optional_inputs: tuple[str, ...] = ()
    """Assets from which it is made under some settings. It reads them itself."""
    calibrated_inputs: tuple[str, ...] = ()
    """Assets from which it is made where batches are calibrated. It reads them itself."""
    partitioning: Partitioning = Partitioning.BATCH
    purpose: Purpose = Purpose.CURATION
    schema: type[dy.Schema] | None = None
    """Schema of the stored table; None: it is no table."""
    sources: Mapping[str, Sources] | None = None
    """Columns from which each column of the table is derived; by default those in `column_lineage.SOURCES`."""
    is_published: bool = False
    """Whether its table of a batch is part of a publication."""
    needs_calibration: bool = False
    """Whether it is made only where batches are calibrated."""
    module: str = field(default="", kw_only=True)
    """Module with `build_<name>`; by default `orchestration/assets/<group>/<name>.py`."""

    @property
    def builder(self) -> str:
        """The function that builds its Dagster definition, as `module:function`."""
        module = self.module or f"qaq_pipeline.orchestration.assets.{self.group}.{self.name}"
        return f"{module}:build_{self.name}"

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Assets from which it may be made."""
        return (*self.inputs, *self.calibrated_inputs, *self.optional_inputs)

    @property
    def table(self) -> type[dy.Schema]:
        """Schema of its table. Raises ValueError where it is no table."""
        if self.schema is None:
            raise ValueError(f"{self.name} is no table")
        return self.schema

    @property
    def has_models(self) -> bool:
        """Whether a batch has one partition of it for each model."""
        return self.partitioning is Partitioning.BATCH_AND_MODEL

    def partitions(self, batch: str, models: Sequence[str]) -> list[Partition]:
        """Its partitions of a batch."""
        return [Partition(batch, model) for model in sorted(models)] if self.has_models else [Partition(batch)]


@dataclass(frozen=True)
class Pipeline:
    """Assets in the order in which they are made.

    Raises:
        ValueError: two assets have one name, or an input is not declared before the asset that needs it.
    """

    assets: tuple[Asset, ...]

    def __post_init__(self) -> None:
        known: set[str] = set()
        for asset in self.assets:
            if asset.name in known:
                raise ValueError(f"asset {asset.name!r} is declared twice")
            if late := {*asset.all_inputs} - known:
                raise ValueError(f"asset {asset.name!r}: declare its inputs {sorted(late)} before it")
            known.add(asset.name)

    def __iter__(self) -> Iterator[Asset]:
        return iter(self.assets)

    def __getitem__(self, name: str) -> Asset:
        """The asset of that name. Raises ValueError with the known names where there is none."""
        found = self._by_name.get(name)
        if found is None:
            raise ValueError(f"{name!r} is no table; known: {', '.join(self._by_name)}")
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Asset]:
        return {asset.name: asset for asset in self.assets}

    def part(self, is_in: Callable[[Asset], bool]) -> Pipeline:
        """The pipeline of these assets alone; their inputs that are not always needed are those among them."""
        assets = [asset for asset in self.assets if is_in(asset)]
        names = {asset.name for asset in assets}
        return Pipeline(
            tuple(
                replace(
                    asset,
                    optional_inputs=tuple(name for name in asset.optional_inputs if name in names),
                    calibrated_inputs=tuple(name for name in asset.calibrated_inputs if name in names),
                )
                for asset in assets
            )
        )

    def of(self, *purposes: Purpose) -> list[Asset]:
        """The assets made for these purposes."""
        return [asset for asset in self.assets if asset.purpose in purposes]

    def jobs(self, *purposes: Purpose) -> dict[str, list[str]]:
        """Jobs and the names of their assets, in the order in which they run; by default all."""
        found: dict[str, list[str]] = {}
        for asset in self.of(*(purposes or Purpose)):
            found.setdefault(asset.job, []).append(asset.name)
        return found

    def tables(self, *purposes: Purpose) -> dict[str, type[dy.Schema]]:
        """Schemas of the stored tables by name; by default all."""
        return {asset.name: asset.table for asset in self.of(*(purposes or Purpose)) if asset.schema}

    def tables_of_batch(self, *purposes: Purpose) -> dict[str, type[dy.Schema]]:
        """Schemas of the tables that belong to one batch; by default of curation and calibration."""
        return self.tables(*(purposes or (Purpose.CURATION, Purpose.CALIBRATION)))

    @cached_property
    def published(self) -> tuple[str, ...]:
        """Names of the tables of a batch that a publication reads."""
        return tuple(asset.name for asset in self.assets if asset.is_published)

    @cached_property
    def sources_of_published(self) -> tuple[Asset, ...]:
        """The published tables and everything that they are made from, in order."""
        found = set(self.published)
        for asset in reversed(self.assets):
            if asset.name in found:
                found |= {*asset.all_inputs}
        return tuple(asset for asset in self.assets if asset.name in found)

    def last_input(self, name: str) -> str | None:
        """The input of an asset that is made last: when it is there, so are the others."""
        inputs = (*self[name].inputs, *self[name].calibrated_inputs)
        return next((asset.name for asset in reversed(self.assets) if asset.name in inputs), None)

    @cached_property
    def column_sources(self) -> ColumnSources:
        """Sources of every column of every stored table, in the order of the schemas.

        Raises:
            ValueError: a column has no declared sources, or a source is declared for a column that there is not.
        """
        found: dict[str, dict[str, Sources]] = {}
        for asset in self.assets:
            sources = asset.sources or column_lineage.SOURCES.get(asset.name)
            if sources is not None:
                columns = asset.table.columns()
                if wrong := sorted(sources.keys() ^ columns.keys()):
                    raise ValueError(f"{asset.name}: its columns and their declared sources differ in {wrong}")
                found[asset.name] = {column: tuple(dict.fromkeys(sources[column])) for column in columns}
        return found


PIPELINE = Pipeline(
    (
        Asset(
            "raw_data",
            group="ingest",
            job="ingest_batch",
            schema=tables.RawData,
            is_published=True,
        ),
        Asset(
            "signatures",
            group="ingest",
            job="ingest_batch",
            inputs=("raw_data",),
            schema=tables.Signatures,
        ),
        Asset(
            "screened_data",
            group="ingest",
            job="ingest_batch",
            inputs=("raw_data", "signatures"),
            schema=tables.ScreenedData,
            is_published=True,
        ),
        Asset(
            "planted_rows",
            group="calibration",
            job="ingest_batch",
            inputs=("raw_data", "screened_data"),
            schema=tables.PlantedRows,
            needs_calibration=True,
        ),
        Asset(
            "logprobs",
            group="scoring",
            job="score_batch",
            inputs=("raw_data", "screened_data"),
            partitioning=Partitioning.BATCH_AND_MODEL,
            schema=tables.Logprobs,
        ),
        Asset(
            "rmi_scores",
            group="scoring",
            job="score_batch",
            inputs=("logprobs",),
            partitioning=Partitioning.BATCH_AND_MODEL,
            schema=tables.RmiScores,
        ),
        Asset(
            "planted_scores",
            group="calibration",
            job="score_batch",
            inputs=("planted_rows",),
            partitioning=Partitioning.BATCH_AND_MODEL,
            schema=tables.PlantedScores,
            needs_calibration=True,
        ),
        Asset(
            "reference_cuts",
            group="validity",
            job="build_reference",
            inputs=("raw_data", "screened_data", "planted_rows", "rmi_scores", "planted_scores"),
            partitioning=Partitioning.REFERENCE,
            purpose=Purpose.REFERENCE,
            schema=tables.ValidityCuts,
            needs_calibration=True,
        ),
        Asset(
            "rank_reference",
            group="selection",
            job="build_reference",
            inputs=("rmi_scores",),
            calibrated_inputs=("raw_data", "screened_data", "reference_cuts"),
            partitioning=Partitioning.REFERENCE,
            purpose=Purpose.REFERENCE,
            schema=tables.RankReference,
        ),
        Asset(
            "disagreement_scores",
            group="selection",
            job="select_from_batch",
            inputs=("rmi_scores",),
            optional_inputs=("rank_reference",),
            schema=tables.DisagreementScores,
        ),
        Asset(
            "validity_cuts",
            group="validity",
            job="select_from_batch",
            inputs=("raw_data", "screened_data", "planted_rows", "rmi_scores", "planted_scores"),
            optional_inputs=("reference_cuts",),
            schema=tables.ValidityCuts,
            needs_calibration=True,
        ),
        Asset(
            "validity",
            group="validity",
            job="select_from_batch",
            inputs=("raw_data", "screened_data", "rmi_scores", "validity_cuts"),
            schema=tables.Validity,
            needs_calibration=True,
        ),
        Asset(
            "decisions",
            group="selection",
            job="select_from_batch",
            inputs=("raw_data", "screened_data", "rmi_scores", "disagreement_scores"),
            calibrated_inputs=("validity_cuts", "validity"),
            optional_inputs=("rank_reference",),
            schema=tables.Decisions,
            is_published=True,
        ),
        Asset(
            "selected_subset",
            group="publication",
            job="select_from_batch",
            inputs=("raw_data", "decisions"),
            schema=tables.SelectedSubset,
            is_published=True,
        ),
        Asset(
            "batch_report",
            group="audit",
            job="report_batch",
            inputs=("raw_data", "screened_data", "rmi_scores", "decisions", "selected_subset"),
            purpose=Purpose.PAGE,
        ),
        Asset(
            "curated_dataset",
            group="publication",
            job="publish_dataset",
            inputs=("raw_data", "screened_data", "decisions", "selected_subset"),
            partitioning=Partitioning.NONE,
            purpose=Purpose.PUBLICATION,
        ),
        Asset(
            "dataset_report",
            group="audit",
            job="report_version",
            inputs=("curated_dataset",),
            partitioning=Partitioning.NONE,
            purpose=Purpose.PAGE,
        ),
        Asset(
            "calibration",
            group="calibration",
            job="calibrate_batch",
            inputs=(
                "raw_data",
                "screened_data",
                "planted_rows",
                "rmi_scores",
                "planted_scores",
                "disagreement_scores",
            ),
            calibrated_inputs=("validity_cuts", "validity"),
            optional_inputs=("rank_reference",),
            purpose=Purpose.CALIBRATION,
            schema=tables.Calibration,
            needs_calibration=True,
        ),
        Asset(
            "training_trial",
            group="trial",
            job="try_version",
            inputs=("raw_data", "screened_data", "rmi_scores", "disagreement_scores", "decisions", "curated_dataset"),
            calibrated_inputs=("validity_cuts", "validity"),
            optional_inputs=("rank_reference",),
            partitioning=Partitioning.VERSION,
            purpose=Purpose.TRIAL,
            schema=tables.TrainingTrial,
        ),
    )
)
"""The pipeline that this project runs. Tests pass another one."""
