"""The assets, one module each, in the folder of their group.

Each module has one function `build_<asset>(settings)`: an asset reads, calls one pure function, and reports. What an
asset computes is in the packages of the stages; which assets there are is in `pipeline`.
"""

import pkgutil

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE, Pipeline, Purpose

__all__ = ["build_assets", "wanted_purposes"]


def wanted_purposes(settings: Settings) -> list[Purpose]:
    """The purposes for which assets are made under these settings."""
    is_wanted = {
        Purpose.REFERENCE: settings.ranking.reference is not None,
        Purpose.PAGE: settings.reports.pages,
        Purpose.CALIBRATION: settings.is_calibrated,
    }
    return [purpose for purpose in Purpose if is_wanted.get(purpose, True)]


def build_assets(settings: Settings, pipeline: Pipeline = PIPELINE) -> list[dg.AssetsDefinition]:
    """Fresh definitions of all assets that are made under these settings."""
    return [pkgutil.resolve_name(asset.builder)(settings) for asset in pipeline.of(*wanted_purposes(settings))]
