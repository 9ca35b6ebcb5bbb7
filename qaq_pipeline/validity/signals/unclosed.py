"""The signal `unclosed`: the answer leaves a bracket or a code fence open.

It tells about half of the answers that are cut inside code, whatever the models say, and no cut outside of brackets. A
bracket in a string or in prose raises it too, so by default it only flags.

Costs nothing but a look at the text.
"""

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.signals.signal import Definition

UNCLOSED = Definition(
    Signal.UNCLOSED,
    (Defect.CUT_ANSWER, Defect.CUT_AT_LINE),
    value=-pl.col("is_unclosed").cast(pl.Float64),
    sign=-1,
    is_possible=pl.col("is_unclosed"),
    max_missed=0.6,
    fault="the answer leaves a bracket or a code fence open",
    measure="an open bracket or code fence",
    compared_with="cut answers",
    of_text=("a bracket or a code fence is left open", "no bracket or code fence is left open"),
)
