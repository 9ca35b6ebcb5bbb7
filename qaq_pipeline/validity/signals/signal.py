"""What a signal is: the number that it reads, the planted rows that it is compared with, and its words.

To add a signal, give it a word in `schema.vocabularies.Signal` and a reason in `SelectionReason`, a setting in
`config.settings.ValiditySettings`, a module here, and an entry in `catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

from qaq_pipeline.schema.vocabularies import Defect, Signal

NO_COVARIATE = pl.lit(0.0)
ALWAYS = pl.lit(value=True)


@dataclass(frozen=True, slots=True)
class Definition:
    """A signal. Its expressions are over the scores of one model, with the columns of `judgement.judged_pairs`."""

    signal: Signal
    defects: tuple[Defect, ...]
    """Planted rows that set the cut."""
    value: pl.Expr
    """The number; low where the pair has the defect, null where it cannot be judged."""
    max_missed: float
    """Largest share of pairs with the defect that the cut may miss."""
    covariate: pl.Expr = NO_COVARIATE
    """Number on which place and scale of the planted rows depend."""
    is_possible: pl.Expr = ALWAYS
    """Whether the pair can have the defect, by evidence other than the number."""
    sign: Literal[1, -1] = 1
    """-1: people read the number with the other sign."""
    fault: str = ""
    """What is wrong with a pair that has the defect, as a sentence without a full stop."""
    measure: str = ""
    """Name of the number as people read it."""
    compared_with: str = ""
    """The planted rows, in words."""
    of_text: tuple[str, str] | None = None
    """Where the number is 1 or 0 and comes from the text alone: what is said of a pair with 1 ("…, as in 45% of the
    planted rows"), and of one with 0 ("…; one is in 45% of the planted rows")."""

    @property
    def columns(self) -> list[str]:
        """The columns that it reads, each once."""
        read = (name for one in (self.value, self.covariate, self.is_possible) for name in one.meta.root_names())
        return list(dict.fromkeys(read))
