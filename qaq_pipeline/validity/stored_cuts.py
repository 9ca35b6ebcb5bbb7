"""Stored ValidityCuts that a batch takes over: those of an older batch, where its own rows are too few.

Belongs here: which older batch, and what is taken over. Does not belong here: the choice of cuts (`judgement`), and a
reference's cuts (`selection.stored_reference`).
"""

from __future__ import annotations

import polars as pl

from qaq_pipeline.schema.partition import Partition
from qaq_pipeline.schema.vocabularies import NoCutReason
from qaq_pipeline.scoring.stored_scores import Scores, scored_by
from qaq_pipeline.screening import batch_order
from qaq_pipeline.storage.files import StorageError
from qaq_pipeline.storage.storage import Storage
from qaq_pipeline.storage.stored_table import StoredTable

NAME = "validity_cuts"


def lacks_rows(cuts: pl.DataFrame) -> bool:
    """Whether a signal has no cut for want of planted rows or of pairs."""
    return cuts.select(_lacks().any()).item()


def newest_older(storage: Storage, batch: str, scores: Scores, code_version: str | None) -> StoredTable | None:
    """The cuts of the newest older batch that has its own, made like this one; None: there is none.

    Args:
        storage: contains older batches.
        batch: name of this one.
        scores: its rmi_scores. Only cuts for scores of the same models, asked in the same way, can be taken over.
        code_version: of the asset that chooses cuts. It contains the settings.
    """
    for older in reversed(batch_order.batches_before(storage, batch)):
        footer = storage.tables.readable_footer(NAME, Partition(older))
        if footer is None or footer.provenance["code_version"] != code_version:
            continue
        if footer.provenance["scored_by"] == scored_by(scores):
            cuts = _readable(storage, older)
            if cuts is not None and not lacks_rows(cuts.frame) and _are_own(cuts.frame, older):
                return cuts
    return None


def _readable(storage: Storage, batch: str) -> StoredTable | None:
    """The stored cuts of a batch; None: the file is damaged, which concerns that batch alone."""
    try:
        return storage.tables.read(NAME, Partition(batch))
    except StorageError:
        return None


def _are_own(cuts: pl.DataFrame, batch: str) -> bool:
    """Whether every cut was chosen from the batch's own rows."""
    return all(chosen_from == [batch] for chosen_from in cuts["chosen_from"].to_list())


def filled(cuts: pl.DataFrame, older: pl.DataFrame) -> pl.DataFrame:
    """The cuts, with those of an older batch for the signals that have none for want of rows."""
    lacking = cuts.filter(_lacks())["signal"]
    own = cuts.filter(~pl.col("signal").is_in(lacking.implode()))
    place = {signal: number for number, signal in enumerate(cuts["signal"])}
    joined = pl.concat([own, older.filter(pl.col("signal").is_in(lacking.implode()))])
    return joined.sort(pl.col("signal").replace_strict(place, return_dtype=pl.Int64))


def _lacks() -> pl.Expr:
    return pl.col("null_reason").is_in([NoCutReason.TOO_FEW_PLANTED.value, NoCutReason.NOT_SCORED.value])
