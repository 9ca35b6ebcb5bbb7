"""The loader of the settings file, and the folders QAQ_HOME and DAGSTER_HOME.

`QAQ_CONFIG` names the file; the default is the packaged demo profile. `QAQ_HOME` (default `./var`) contains the
Dagster home, the storage and the model cache, unless the file places them elsewhere. Neither is read at import.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from qaq_pipeline.config.base import SettingsError
from qaq_pipeline.config.settings import Settings

_RENAMED_FIELDS = {
    "automation.recuration_cron": "automation.refresh_cron",
    "calibration.false_discovery_rate": "validity.max_false_share",
    "calibration.max_planted_share": "calibration.mismatches and calibration.rows_per_defect, numbers of rows",
    "calibration.max_rows_per_defect": "calibration.rows_per_defect",
    "calibration.max_share": "calibration.mismatches and calibration.rows_per_defect, numbers of rows",
    "calibration.min_auc": "checks.min_auc",
    "checks.max_null_share": "checks.max_null_logprob_share",
    "reports.pictures": "reports.plots",
    "screening.contamination.min_share": "screening.contamination.min_ngram_share",
}
"""The new name of each renamed field, for the error message about the old name."""


def home_directory() -> Path:
    """Return QAQ_HOME as an absolute path; default `./var`."""
    return Path(os.environ.get("QAQ_HOME", "var")).absolute()


def dagster_home() -> Path:
    """Return DAGSTER_HOME if set, otherwise the `dagster` folder of QAQ_HOME."""
    configured = os.environ.get("DAGSTER_HOME")
    return Path(configured).absolute() if configured else home_directory() / "dagster"


def packaged_profiles() -> list[str]:
    """Return the names of the packaged profiles."""
    folder = resources.files("qaq_pipeline") / "profiles"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_settings(path: str | os.PathLike[str] | None = None) -> Settings:
    """Load the settings from `path`, else from `QAQ_CONFIG`, else from the packaged demo profile.

    `path` may be the name of a packaged profile (`demo`, `paper`).

    Raises:
        SettingsError: the file is missing, is not YAML, or contains an invalid value; the text names the field,
            the value and the allowed values of every error.
    """
    source = os.fspath(path) if path is not None else os.environ.get("QAQ_CONFIG") or "demo"
    text, name = _read_profile(source)
    return parse_settings(text, name)


def parse_settings(text: str, name: str = "settings") -> Settings:
    """Parse settings from YAML text; `name` is the file's name in errors. Raises `SettingsError`."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{name}: must be a mapping of settings, not {type(values).__name__}")
    try:
        return Settings.model_validate(values, context={"home": home_directory()})
    except ValidationError as error:
        raise SettingsError(_describe(error, name)) from error


def _read_profile(source: str) -> tuple[str, str]:
    if source in packaged_profiles():
        packaged = resources.files("qaq_pipeline") / "profiles" / f"{source}.yaml"
        return packaged.read_text(encoding="utf-8"), f"profile {source!r}"
    try:
        return Path(source).read_text(encoding="utf-8"), source
    except (OSError, UnicodeDecodeError) as error:
        profiles = ", ".join(packaged_profiles())
        raise SettingsError(
            f"{source}: cannot be read ({error}). Set QAQ_CONFIG to a YAML file or to a packaged profile: {profiles}"
        ) from error


def _describe(error: ValidationError, name: str) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        field = ".".join(str(part) for part in fault["loc"]) or "(whole file)"
        value = fault["input"]
        is_secret = fault["loc"][:1] == ("alerts",)  # It may be a password instead of the name of its variable.
        shown = "" if is_secret or isinstance(value, dict | Settings) else f" (got {value!r})"
        message = f"is now {_RENAMED_FIELDS[field]}" if field in _RENAMED_FIELDS else fault["msg"]
        lines.append(f"  {field}: {message}{shown}")
    return f"{name}: {len(lines)} setting(s) cannot be used:\n" + "\n".join(lines)
