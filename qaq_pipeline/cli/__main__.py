"""The console script `qaq`, and `python -m qaq_pipeline.cli` for processes that this package starts."""

from __future__ import annotations

import gc

_OBJECTS = 100_000
"""New objects after which Python looks for garbage. An import makes many that stay: with the usual 700, a command spent
a third of its time on looking through them."""


def main() -> None:
    """Run the command line."""
    gc.set_threshold(_OBJECTS)
    from qaq_pipeline.cli.app import app

    try:
        app()
    finally:
        gc.freeze()  # Else Python looks through all of them once more as it ends.


if __name__ == "__main__":
    main()
