"""A partition of the stored tables, and the name of an input, as values with parsers.

Belongs here: the form of partition keys and of the names that provenance gives to inputs. Does not belong here: which
table has which partitions (`pipeline`). It imports no other module of the project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

_BATCH_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")
_SEPARATOR = "|"
_LONGEST_SHOWN = 60


def check_batch_name(name: str) -> str:
    """`name`, if it can name a batch; it becomes a partition key and part of paths.

    Raises:
        ValueError: anything but a letter or digit, then up to 99 letters, digits, `_`, `-` or `.`, without `..`.
    """
    if not _BATCH_NAME.fullmatch(name) or ".." in name:
        shown = name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…"
        raise ValueError(
            f"batch name {shown!r} cannot be used: give a letter or digit, then up to 99 letters, digits, "
            "'_', '-' or '.', without '..'"
        )
    return name


@dataclass(frozen=True, slots=True)
class Partition:
    """One batch, or one model of one batch. A rank_reference is stored under its own name in place of a batch's.

    Raises:
        ValueError: the name of the batch or of the model cannot be used.
    """

    batch: str
    model: str | None = None

    def __post_init__(self) -> None:
        for part in self.parts:
            check_batch_name(part)

    @classmethod
    def parse(cls, key: str) -> Self:
        """The partition with this key: `batch`, or `batch|model`. Raises ValueError where it is neither."""
        batch, *model = key.split(_SEPARATOR)
        if len(model) > 1:
            raise ValueError(f"partition {key!r} cannot be read: give BATCH or BATCH|MODEL")
        return cls(batch, *model)

    @property
    def parts(self) -> tuple[str, ...]:
        """(batch,) or (batch, model): the folders of its tables."""
        return (self.batch,) if self.model is None else (self.batch, self.model)

    @property
    def key(self) -> str:
        """Its key in Dagster: `batch`, or `batch|model`."""
        return _SEPARATOR.join(self.parts)

    def __str__(self) -> str:
        return self.key


@dataclass(frozen=True, slots=True)
class Input:
    """A stored table that another was made from, as its provenance names it.

    `table`; `table|model`, of the same batch; or, of another batch, `table|batch|model` or `table|batch|`.
    """

    table: str
    model: str | None = None
    batch: str | None = None

    @classmethod
    def parse(cls, name: str) -> Self:
        """The input with this name."""
        table, *others = name.split(_SEPARATOR)
        return cls(table, *(part or None for part in reversed(others)))

    def __str__(self) -> str:
        if self.batch is not None:
            return _SEPARATOR.join((self.table, self.batch, self.model or ""))
        return self.table if self.model is None else _SEPARATOR.join((self.table, self.model))
