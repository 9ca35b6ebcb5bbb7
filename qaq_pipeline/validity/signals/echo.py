"""The signal `echo`: the answer repeats the whole query and little else, and so predicts it as an echo does.

A high RMI alone is no fault: many good answers use the names and sample texts of the query. So the query's words must
occur in the answer, and most of the answer's in the query. Code below a comment that repeats the query is no echo. It
does not tell an answer that repeats the query in other words.

Costs nothing but the comparison of two texts.
"""

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.signals.signal import Definition

WHOLE_QUERY = 0.9
"""Least share of the query's word sequences that an echo repeats."""
LITTLE_ELSE = 0.5
"""Least share of the answer's word sequences that occur in the query."""

_EXPLAINED = pl.when(pl.col("log_ppl_q") > 0).then(pl.col("rmi") / pl.col("log_ppl_q"))

ECHO = Definition(
    Signal.ECHO,
    (Defect.ECHO,),
    value=-_EXPLAINED,
    is_possible=(pl.col("query_in_answer") >= WHOLE_QUERY) & (pl.col("answer_in_query") >= LITTLE_ELSE),
    max_missed=0.05,
    sign=-1,
    fault="the answer repeats the query and says little else",
    measure="the share of log PPL(Q) that the answer takes away",
    compared_with="echoes",
)
