"""The signal `mismatch`: RMI against that of the same queries with other answers, at the same log PPL(Q).

It tells answers to other queries, refusals, empty talk and answers in another language. It does not tell an answer to
a very similar query from the right one, nor a wrong answer that speaks of the right things. The null grows with
log PPL(Q): where the query itself is predictable, RMI is small for every answer. A very short answer says too little
about any query: its RMI is near 0 whether it is right or not, so it is not judged.

Costs: a planted row costs a pass with the answer of another query; the pair itself costs nothing more.
"""

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.signals.signal import Definition

SHORTEST = 9
"""Least number of tokens of an answer that is judged."""

MISMATCH = Definition(
    Signal.MISMATCH,
    (Defect.OTHER_ANSWER,),
    value=pl.when(pl.col("num_a_tokens_untruncated") >= SHORTEST).then("rmi"),
    covariate=pl.col("log_ppl_q"),
    max_missed=0.08,
    fault="the answer helps to predict the query not clearly more than an answer to another query does",
    measure="RMI in nats per token",
    compared_with="answers to other queries, at this query perplexity,",
)
