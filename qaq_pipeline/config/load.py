"""The loader of the settings file, and the folders QAQ_HOME and DAGSTER_HOME.

`QAQ_CONFIG` names the file; the default is the packaged demo profile. `QAQ_HOME` (default `./var`) contains the
Dagster home, the storage and the model cache, unless the file places them elsewhere. Neither is read at import.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from qaq_pipeline.config.base import SettingsError, without_credentials
from qaq_pipeline.config.settings import Settings


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


def load_settings(path: str | os.PathLike[str] | None = None, home: Path | None = None) -> Settings:
    """Load the settings from `path`, else from `QAQ_CONFIG`, else from the packaged demo profile.

    `path` may be the name of a packaged profile (`demo`, `paper`). `home` is used instead of QAQ_HOME.

    Raises:
        SettingsError: the file is missing, is not YAML, or contains an invalid value; the text names the field,
            the value and the allowed values of every error.
    """
    source = os.fspath(path) if path is not None else os.environ.get("QAQ_CONFIG") or "demo"
    text, name = _read_profile(source)
    return parse_settings(text, name, home)


def parse_settings(text: str, name: str = "settings", home: Path | None = None) -> Settings:
    """Parse settings from YAML text; `name` is the file's name in errors. Raises `SettingsError`."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{name}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{name}: must be a mapping of settings, not {type(values).__name__}")
    try:
        return Settings.model_validate(values, context={"home": home or home_directory()})
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
    faults = error.errors(include_url=False)
    lines = [f"  {_path(fault)}: {_said(fault)}" for fault in faults if not _follows_from_another(fault, faults)]
    return f"{name}: {len(lines)} setting(s) cannot be used:\n" + "\n".join(lines)


def _path(fault: ErrorDetails) -> str:
    return ".".join(str(part) for part in fault["loc"]) or "(whole file)"


def _follows_from_another(fault: ErrorDetails, faults: Sequence[ErrorDetails]) -> bool:
    """Whether a list is too short only because one of its items cannot be used."""
    length = len(fault["loc"])
    return fault["type"] == "too_short" and any(
        len(one["loc"]) > length and one["loc"][:length] == fault["loc"] for one in faults
    )


def _said(fault: ErrorDetails) -> str:
    """What is wrong with a value, the value, and the remedy."""
    value = fault["input"]
    is_secret = fault["loc"][:1] == ("alerts",)  # It may be a password instead of the name of its variable.
    shown = "" if is_secret or isinstance(value, dict | Settings) else f" (got {without_credentials(repr(value))})"
    if fault["type"] == "extra_forbidden":
        *parents, last = fault["loc"]
        return f"there is no such setting{shown}{_nearest(str(last), _fields_at(parents))}"
    if fault["type"] == "union_tag_invalid":
        context = fault.get("ctx", {})
        key, tag, known = (
            context["discriminator"].strip("'"),
            context["tag"],
            context["expected_tags"].replace("'", "").split(", "),
        )
        return f"{key} {tag!r} is not known{_nearest(tag, known)}"
    return fault["msg"].removeprefix("Value error, ") + shown


def _nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is most like this one, else all of them."""
    if alike := difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {alike[0]!r}?"
    return f"; known: {', '.join(map(repr, known))}" if known else ""


def _fields_at(place: Sequence[int | str]) -> list[str]:
    """The names of the settings at a place, of which parts may be positions, keys of a mapping, or kinds of a union."""
    models = {Settings}
    for part in place:
        below = {model for one in models if part in one.model_fields for model in _models_of(one.model_fields[part])}
        of_kind = {
            one for one in models if any(part in get_args(field.annotation) for field in one.model_fields.values())
        }
        models = below or of_kind or models
    return sorted({name for one in models for name in one.model_fields})


def _models_of(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """The models in the type of a field."""
    open_types: list[Any] = [field.annotation]
    while open_types:
        one = open_types.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one
        open_types += get_args(one)
