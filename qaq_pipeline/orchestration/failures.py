"""Why a run failed, in its own words, out of what Dagster wraps around them.

Belongs here: reading failure events. Does not belong here: what is done about a failure.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

_FAILURE = f"{dg.Failure.__module__}.{dg.Failure.__name__}: "
"""How Dagster begins the message of a step that fails with a word of its own."""


def cause(failures: Sequence[dg.DagsterEvent]) -> str:
    """The first failure's own words: what the step raised, out of Dagster's wrapping, and the step's name.

    Args:
        failures: step failures and run failures of one run, in their order.
    """
    for event in failures:
        error = event.step_failure_data.error if event.is_step_failure else None
        while error is not None and error.cause is not None and (error.cls_name or "").startswith("Dagster"):
            error = error.cause
        if error is not None:
            is_interrupted = error.cls_name == dg.DagsterExecutionInterruptedError.__name__
            message = "interrupted by a signal" if is_interrupted else error.message.strip().removeprefix(_FAILURE)
            return f"step {event.step_key}: {message}"
    return "; ".join(event.message or "" for event in failures) or "no event says why; see the run's log"
