"""The signal `implausible_query`: PPL(Q) against that of queries of the same length with invented words.

It tells queries that mean nothing. It does not tell a query that is well written and cannot be answered. Short queries
have a high PPL(Q) too, so the comparison is at the same 1 / tokens of Q.

Costs a pass without an answer for each planted row; the pair itself costs nothing more.
"""

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.signals.signal import Definition

IMPLAUSIBLE_QUERY = Definition(
    Signal.IMPLAUSIBLE_QUERY,
    (Defect.INVENTED_TERMS,),
    value=-pl.col("log_ppl_q"),
    covariate=1 / pl.col("num_q_tokens"),
    max_missed=0.2,
    sign=-1,
    fault="the query seems to have no meaning: it is as unlikely as queries with invented words",
    measure="log PPL(Q) in nats per token",
    compared_with="queries of this length with invented words",
)
