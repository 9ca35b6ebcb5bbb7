"""The signal `unfinished`: whether the models expect the answer to end where it ends.

It tells answers that are cut, best inside a line. It does not tell one that stops early but at a good place. An answer
that was truncated to fit into the window is not judged.

Costs nothing: it is read where the pass of NLL(Q | A) leaves the answer.
"""

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.signals.signal import Definition

UNFINISHED = Definition(
    Signal.UNFINISHED,
    (Defect.CUT_ANSWER, Defect.CUT_AT_LINE),
    value=-pl.col("nll_end"),
    max_missed=0.2,
    sign=-1,
    fault="the answer seems to be cut: the models do not expect it to end there",
    measure="-ln p(end | A) in nats",
    compared_with="cut answers",
)
