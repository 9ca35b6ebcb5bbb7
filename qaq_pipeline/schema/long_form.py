"""Two forms of what is known of a pair under each model or selection: a long frame, and a column of lists.

Belongs here: the way from either form to the other. Does not belong here: what the columns mean (`tables`).

In the long form, which every computation uses, a row is one pair under one model (`pair_id, model, …`) or one
selection (`pair_id, selection, …`). A stored table has one row for each pair or delivered row, and a list of structs
instead. Only `to_columns` makes a column for each model or selection, for what a person reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import dataframely as dy
import polars as pl


def by_pair(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame sorted by pair_id. Looking first is cheap: most tables are stored in that order."""
    return frame if frame["pair_id"].is_sorted() else frame.sort("pair_id")


def to_lists(long: pl.DataFrame, struct: dy.Struct, column: str) -> pl.DataFrame:
    """One row for each pair: pair_id and `column`, a list with one struct for each model or selection.

    Args:
        long: all pairs of one model or selection, then the same pairs in the same order of the next one, and so on.
        struct: the fields of the list; the first one is `model` or `selection`.
        column: name of the list.

    Raises:
        ValueError: a model or selection has other pairs than the first one.
    """
    if long.is_empty():
        return pl.DataFrame(schema={"pair_id": pl.String, column: pl.List(struct.dtype)})
    key, *_ = struct.inner
    size = long.height // long[key].n_unique()
    parts = [long.slice(start, size) for start in range(0, long.height, size)]  # Unlike partition_by, copies nothing.
    pair_ids = parts[0]["pair_id"]
    if not all(part["pair_id"].equals(pair_ids) and part[key].n_unique() == 1 for part in parts):
        raise ValueError(f"{column}: not every {key} has the same pairs")
    structs = [part.select(pl.struct(list(struct.inner)).alias(f"{i}")) for i, part in enumerate(parts)]
    # Ten times faster than group_by("pair_id").
    lists = pl.concat(structs, how="horizontal").select(pl.concat_arr(pl.all()).arr.to_list().alias(column))
    return lists.insert_column(0, pair_ids)


def find_pairs(pair_ids: pl.Series, wanted: pl.Series) -> pl.Series:
    """The places of the wanted pair_ids among others, without those that are not among them.

    It takes a binary search for each wanted one, however often others are looked for.

    Args:
        pair_ids: sorted, each once.
        wanted: each once, without null.
    """
    if pair_ids.is_empty():
        return pl.Series(dtype=pl.UInt32)
    places = pair_ids.search_sorted(wanted)
    nearest = places.clip(upper_bound=len(pair_ids) - 1)
    return nearest.filter(pair_ids.gather(nearest) == wanted)


def slices_of_pairs(long: pl.DataFrame, num_keys: int, size: int) -> Iterator[pl.DataFrame]:
    """The long frame in parts, each of all rows of at most `size` pairs, in their order.

    Args:
        long: all pairs of one model or selection, then the same pairs in the same order of the next one, and so on.
        num_keys: number of models or selections.
        size: pairs of a part.
    """
    num_pairs = long.height // num_keys
    for start in range(0, num_pairs, size):
        length = min(size, num_pairs - start)
        yield pl.concat(long.slice(key * num_pairs + start, length) for key in range(num_keys))


def rows_of_pairs(long: pl.DataFrame, num_pairs: int, places: pl.Series) -> pl.DataFrame:
    """The rows of some pairs, in the order of the long frame if the places grow.

    Args:
        long: as for `slices_of_pairs`, of so many pairs.
        num_pairs: number of pairs.
        places: of the wanted pairs among them.
    """
    starts = range(0, long.height, num_pairs) if num_pairs else ()
    return long[pl.concat([places.clear(), *(places + start for start in starts)])]


def to_long(frame: pl.DataFrame, column: str, *keep: str) -> pl.DataFrame:
    """The columns `keep` and the fields of the list `column`: one row for each struct.

    The first structs of all lists come first, in the order of the frame, then the second ones, and so on.
    """
    longest = frame[column].list.len().max()
    places = range(int(longest or 1))  # type: ignore[arg-type]
    of_place = [frame.select(*keep, pl.col(column).list.get(place, null_on_oob=True)) for place in places]
    return pl.concat([structs.drop_nulls(column).unnest(column) for structs in of_place])


def to_columns(frame: pl.DataFrame, column: str, separator: str = "_", fields: Sequence[str] = ()) -> pl.DataFrame:
    """The frame with a column for each field and each model or selection instead of the list `column`.

    Args:
        frame: a stored table.
        column: its list.
        separator: between the field and the model or selection in the name of a column: `rank_strong`.
        fields: those that become columns; empty: all.
    """
    long = to_long(frame.with_row_index("row"), column, "row")
    _, key, *others = long.columns
    wide = frame.select(pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"))
    for value in long[key].unique(maintain_order=True):
        part = long.filter(pl.col(key) == value).select(
            "row", pl.col(fields or others).name.suffix(f"{separator}{value}")
        )
        wide = wide.join(part, on="row", how="left", validate="1:1", maintain_order="left")
    return pl.concat([frame.drop(column), wide.drop("row")], how="horizontal")
