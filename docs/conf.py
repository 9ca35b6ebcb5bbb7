"""The Sphinx configuration of the site, built from the Markdown of this folder into `_build/html` by `make docs`.

A reader's browser fetches nothing from other hosts: no web fonts, no external scripts, formulas as text.
"""

project = "qaq_pipeline"
copyright = "the qaq_pipeline authors, Apache-2.0"  # noqa: A001 - Sphinx's name.
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
nitpicky = True

myst_heading_anchors = 4  # Allows links such as settings.md#ranking, as on a code host.

linkcheck_ignore = [r"http://127\.0\.0\.1"]

html_theme = "furo"
html_title = "qaq_pipeline"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sourcelink = False
