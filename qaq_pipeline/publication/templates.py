"""The environment of the templates in `pages/`: the dataset card and the audit pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jinja2


def render(
    template: str,
    values: Mapping[str, Any],
    filters: Mapping[str, Callable[..., Any]],
    finalize: Callable[[Any], Any] | None = None,
) -> bytes:
    """Render a template of `pages/`. Values are escaped in HTML only: other text has a filter for it."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qaq_pipeline", "pages"),
        autoescape=jinja2.select_autoescape(),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
        keep_trailing_newline=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(values).encode()
