"""The assets, one module each, in the folder of their group.

Each module has one function `build_<asset>(settings)`: an asset reads, calls one pure function, and reports. What an
asset computes is in the packages of the stages; which assets there are is in `pipeline`.
"""

import importlib
from collections.abc import Callable

import dagster as dg

from qaq_pipeline.config.settings import Settings
from qaq_pipeline.pipeline import PIPELINE, Asset, Pipeline, Purpose

__all__ = ["build_assets", "wanted_purposes"]

_Build = Callable[[Settings], dg.AssetsDefinition]


def wanted_purposes(settings: Settings) -> list[Purpose]:
    """The purposes for which assets are made under these settings."""
    unwanted = {
        Purpose.REFERENCE: settings.ranking.reference is None,
        Purpose.PAGE: not settings.reports.pages,
        Purpose.CALIBRATION: not settings.is_calibrated,
    }
    return [purpose for purpose in Purpose if not unwanted.get(purpose, False)]


def build_assets(settings: Settings, pipeline: Pipeline = PIPELINE) -> list[dg.AssetsDefinition]:
    """Fresh definitions of all assets that are made under these settings."""
    return [_builder(asset)(settings) for asset in pipeline.of(*wanted_purposes(settings))]


def _builder(asset: Asset) -> _Build:
    module, function = asset.builder
    return getattr(importlib.import_module(module), function)
