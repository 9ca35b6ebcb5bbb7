"""The assets, one module each, in the folder of their group.

Each module has one function `build_<asset>(settings)`: an asset reads, calls one pure function, and reports. What an
asset computes is in the packages of the stages; which assets there are is in `pipeline`.
"""

import pkgutil

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE, Asset, Pipeline, Purpose

__all__ = ["build_assets", "made_under"]


def made_under(settings: Settings, pipeline: Pipeline = PIPELINE) -> Pipeline:
    """The part of the pipeline that is made under these settings."""
    is_wanted = {Purpose.REFERENCE: settings.ranking.reference is not None, Purpose.PAGE: settings.reports.pages}

    def is_made(asset: Asset) -> bool:
        return is_wanted.get(asset.purpose, True) and (settings.is_calibrated or not asset.needs_calibration)

    return pipeline.part(is_made)


def build_assets(settings: Settings, pipeline: Pipeline = PIPELINE) -> list[dg.AssetsDefinition]:
    """Fresh definitions of all assets that are made under these settings."""
    return [pkgutil.resolve_name(asset.builder)(settings) for asset in made_under(settings, pipeline)]
