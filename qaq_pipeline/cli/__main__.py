"""`python -m qaq_pipeline.cli`: the console script, for processes that this package starts."""

from __future__ import annotations

from qaq_pipeline.cli.app import main

if __name__ == "__main__":
    main()
