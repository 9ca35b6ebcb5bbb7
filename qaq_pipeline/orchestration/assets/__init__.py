"""The nine assets of every dataset; rank_reference, the audit pages and a calibration's three, where they are wanted.

One module each.

Each module has one function `build_<asset>(settings)`: an asset reads, calls one pure function, and reports. What
an asset computes stands in the pure modules; how it is stored, in `storage` and `resources`.
"""

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.orchestration.assets.audit.batch_report import build_batch_report
from qaq_pipeline.orchestration.assets.audit.dataset_report import build_dataset_report
from qaq_pipeline.orchestration.assets.calibration.calibration import build_calibration
from qaq_pipeline.orchestration.assets.calibration.planted_rows import build_planted_rows
from qaq_pipeline.orchestration.assets.calibration.planted_scores import build_planted_scores
from qaq_pipeline.orchestration.assets.ingest.raw_data import build_raw_data
from qaq_pipeline.orchestration.assets.ingest.screened_data import build_screened_data
from qaq_pipeline.orchestration.assets.ingest.signatures import build_signatures
from qaq_pipeline.orchestration.assets.publication.curated_dataset import build_curated_dataset
from qaq_pipeline.orchestration.assets.publication.selected_subset import build_selected_subset
from qaq_pipeline.orchestration.assets.scoring.logprobs import build_logprobs
from qaq_pipeline.orchestration.assets.scoring.rmi_scores import build_rmi_scores
from qaq_pipeline.orchestration.assets.selection.decisions import build_decisions
from qaq_pipeline.orchestration.assets.selection.disagreement_scores import build_disagreement_scores
from qaq_pipeline.orchestration.assets.selection.rank_reference import build_rank_reference

__all__ = ["build_assets"]


def build_assets(settings: Settings) -> list[dg.AssetsDefinition]:
    """Fresh definitions of all assets, for the settings."""
    builders = (
        build_raw_data,
        build_signatures,
        build_screened_data,
        build_logprobs,
        build_rmi_scores,
        build_disagreement_scores,
        build_decisions,
        build_selected_subset,
        build_curated_dataset,
    )
    optional = [] if settings.ranking.reference is None else [build_rank_reference]
    if settings.reports.pages:
        optional += [build_batch_report, build_dataset_report]
    if settings.is_calibrated:
        optional += [build_planted_rows, build_planted_scores, build_calibration]
    return [build(settings) for build in (*builders, *optional)]
