"""Made-up pairs as the signals of validity read them: as delivered, or with a defect that both models see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from qaq_pipeline.config.settings import ValiditySettings
from qaq_pipeline.schema.vocabularies import Defect, Signal
from qaq_pipeline.validity.judgement import MODELS, Sample
from qaq_pipeline.validity.signals.catalogue import SIGNALS
from qaq_pipeline_tests.support.frames import pair_name, rmi_rows

DEFECTS = tuple(dict.fromkeys(defect for one in SIGNALS for defect in one.defects))
"""The defects that set a cut."""

DROP_ALL = ValiditySettings.model_validate(dict.fromkeys(Signal, "drop"))
"""Every signal declares pairs invalid."""


@dataclass(frozen=True)
class Kind:
    """The mean numbers of some pairs under a model."""

    log_ppl_q: float = 1.5
    explained: float = 0.4
    """RMI / log PPL(Q)."""
    nll_end: float = 0.3
    query_in_answer: float = 0.1
    answer_in_query: float = 0.05
    unclosed: float = 0.0
    """Share of the answers that leave a bracket open."""


CLEAN_PAIR = Kind()
KINDS = {
    Defect.OTHER_ANSWER: replace(CLEAN_PAIR, explained=0.03),
    Defect.ECHO: replace(CLEAN_PAIR, explained=0.9, query_in_answer=1.0, answer_in_query=0.9),
    Defect.INVENTED_TERMS: replace(CLEAN_PAIR, log_ppl_q=4.0),
    Defect.CUT_ANSWER: replace(CLEAN_PAIR, nll_end=7.0, unclosed=0.8),
    Defect.CUT_AT_LINE: replace(CLEAN_PAIR, nll_end=5.0, unclosed=0.7),
}


def pairs_like(kind: Kind | Defect, size: int, first: int = 1) -> pl.DataFrame:
    """The pairs `first`, `first` + 1, … of a kind, as `judgement.judged_pairs` gives them. Equal calls give equal ones.

    log PPL(Q) falls with the length of the query, and both models have noise of their own.
    """
    mean = KINDS[kind] if isinstance(kind, Defect) else kind
    random = np.random.default_rng(first)
    num_q_tokens = random.integers(6, 40, size)
    frames = []
    for role in MODELS:
        log_ppl_q = mean.log_ppl_q + 6 / num_q_tokens + random.normal(0, 0.1, size)
        rmi = log_ppl_q * (mean.explained + random.normal(0, 0.03, size))
        columns = {"log_ppl_q": log_ppl_q, "log_ppl_q_given_a": log_ppl_q - rmi, "rmi": rmi}
        columns |= {"nll_end": mean.nll_end * random.lognormal(0, 0.2, size), "num_q_tokens": num_q_tokens}
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        named = (dict(zip(columns, row, strict=True)) for row in rows)
        scores = rmi_rows(*({"pair_id": pair_name(first + n)} | row for n, row in enumerate(named)))
        frames.append(scores.with_columns(model=pl.lit(role)))
    shown = {name: [getattr(mean, name)] * size for name in ("query_in_answer", "answer_in_query")}
    shown |= {"is_unclosed": random.random(size) < mean.unclosed}
    texts = pl.DataFrame({"pair_id": [pair_name(first + n) for n in range(size)], **shown})
    return pl.concat(frames).join(texts, on="pair_id", maintain_order="left")


def together(*frames: pl.DataFrame) -> pl.DataFrame:
    """All these pairs, in the order of `judged_pairs`."""
    return pl.concat(frames).sort("model", "pair_id")


def planted(size: int = 60, *defects: Defect, first: int = 100_000) -> pl.DataFrame:
    """Planted rows: so many of each of these defects; without one, of all that set a cut."""
    frames = [
        pairs_like(defect, size, first + 1000 * place).with_columns(defect=pl.lit(defect.value))
        for place, defect in enumerate(defects or DEFECTS)
    ]
    return together(*frames)


def sample(pairs: pl.DataFrame, rows: pl.DataFrame | None = None, batch: str = "b1") -> Sample:
    """Pairs of a batch with its planted rows."""
    return Sample(pairs, planted() if rows is None else rows, (batch,))
