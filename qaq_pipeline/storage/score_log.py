"""The files of the scores of one identity: a log of shards in the order of their writing, and packs of older shards.

…/index.json                 the packs, and the number of the first shard that is in none
…/shards/<number>.parquet    a shard: written once; numbers have no gap
…/packs/<time>-<id>.parquet  a pack: the scores of many shards, sorted by pair_id
…/packs/<time>-<id>.keys     the keys of its pairs, sorted: a reader skips a pack without its pairs
…/set_aside/                 damaged files

Belongs here: which files there are, and when shards become a pack. Does not belong here: the choice among scores
(`score_cache`).

Nothing that is read depends on a listing, which may be old or incomplete on an object store: shards are found by their
numbers, packs by the index. Writers take numbers by exclusive creation, and packing replaces the index conditionally,
so that any number of processes may do either at any time. A number is never used twice, also after scores are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import polars as pl

from qaq_pipeline.schema.tables import CachedScores, dtypes
from qaq_pipeline.storage import parquet_file
from qaq_pipeline.storage.files import Files, Place, StorageError, hash_json, json_bytes
from qaq_pipeline.storage.locks import Locks, PartitionBusyError

logger = logging.getLogger(__name__)
_Found = TypeVar("_Found")

SHARDS_PER_PACK = 64
"""The writer of every 64th shard packs all of them."""
SCORES_PER_PACK = 1 << 19
"""Scores of the largest packs. One of them in memory takes some 60 MB."""
_SHARDS_AT_ONCE = 32
"""Shards that are asked for before it is known that they are there."""
_DAY = 24 * 3600
_INDEX, _SHARDS, _PACKS, _SET_ASIDE = "index.json", "shards", "packs", "set_aside"
_KEY_DIGITS = 16
_NUMBER = re.compile(r"(\d{12})\.parquet")
_PACK_NAME = re.compile(r"(\d+-[0-9a-f]{16})\.(parquet|keys)")
SCORED = pl.Schema({**dtypes(CachedScores), "scored_with": pl.String()})
"""Columns of scores as they are read. `scored_with` is JSON: the libraries and the device that scored a row."""
SAME = ("pair_id", "quantity", "num_tokens", "end_ids")
"""Rows that are equal in these are one score."""


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack in the index."""

    name: str
    num_scores: int
    num_bytes: int
    keys_hash: str


@dataclass(frozen=True, slots=True)
class Index:
    """The content of index.json."""

    first: int = 0
    """Number of the first shard that is in no pack."""
    packs: tuple[Pack, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """With a hash, since a changed byte could hide scores."""
        content = {"first": self.first, "packs": [asdict(pack) for pack in self.packs]}
        return {**content, "hash": hash_json(content)}

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Index:
        """Raises ValueError, KeyError or TypeError where it was changed since it was written."""
        index = cls(int(stored["first"]), tuple(Pack(**pack) for pack in stored["packs"]))
        if index.as_json() != stored:
            raise ValueError("it was changed since it was written")
        return index


class _OvertakenError(Exception):
    """Another process packed the same shards first."""


class ScoreLog:
    """The scores of one identity.

    Args:
        files: of the storage.
        locks: between its writers.
        place: of the folder.
    """

    def __init__(self, files: Files, locks: Locks, place: Place) -> None:
        self._files, self._locks, self._place = files, locks, place
        self._end = 0
        """The next number, as last seen."""

    def append(self, scores: pl.DataFrame, scored_with: Mapping[str, Any]) -> None:
        """Store a shard. Pack the newest shards where it is the last of `SHARDS_PER_PACK`.

        Args:
            scores: as `CachedScores`.
            scored_with: the libraries and the device that scored them.
        """
        data = _encode(scores, scored_with=dict(scored_with))
        if not self._files.exists(*self._path(_INDEX)):
            self._files.create(json_bytes(self._index().as_json()), *self._path(_INDEX))
        number = self._append(data)
        if (number + 1) % SHARDS_PER_PACK == 0:
            self.pack()

    def _append(self, data: bytes) -> int:
        """Store a file under the next number, and return the number."""
        while True:
            number = self._next_number(self._index().first)
            if not self._files.create(data, *self._path(_shard(number))):
                self._end = number + 1  # Another writer was faster.
                continue
            if self._index().first <= number:
                self._end = number + 1
                return number
            # The shards before it were packed and removed meanwhile: nobody would look for it here.
            self._remove_shards([number])

    def _next_number(self, first: int) -> int:
        """The number after the last shard. It is searched from the end that was known before."""
        start = max(first, self._end)
        if start > first and not self._has_shard(start - 1):  # Removed as a whole, or packed since.
            start = first
        step = 1
        while self._has_shard(start + step - 1):
            step *= 2
        low, high = step // 2, step - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._has_shard(start + middle) else (low, middle)
        return start + low

    def _has_shard(self, number: int) -> bool:
        return self._files.exists(*self._path(_shard(number)))

    def read(self, pair_ids: pl.Series) -> Iterator[pl.DataFrame]:
        """All shards, and the packs that may have one of the pairs, as `SCORED`; a score may come more than once.

        A file that is damaged is set aside with a warning: its pairs are scored again.
        """
        keys = _keys(pair_ids)
        read: set[str] = set()
        position, is_damaged = 0, False
        while True:
            index = self._index()
            new = [pack for pack in index.packs if pack.name not in read]
            for pack in self._may_hold(new, keys):
                yield self._pack(pack)
            read |= {pack.name for pack in new}
            position = max(position, index.first)
            for _, shard in self._shards_from(position):
                position += 1
                is_damaged |= shard is None
                if shard is not None:
                    yield shard
            if not self._fill_gap(position) and self._index() == index:
                break
        if is_damaged:
            self.pack()

    def names(self) -> list[str]:
        """Paths of all files with scores, relative to the folder."""

        def of(index: Index) -> list[str]:
            shards = range(index.first, self._next_number(index.first))
            return [*(_pack(pack.name) for pack in index.packs), *map(_shard, shards)]

        return self._while_it_stays(of)

    def holding(self, pair_id: str) -> list[str]:
        """Paths of the files that have a score of the pair, relative to the folder."""
        keys = _keys(pl.Series([pair_id]))

        def of(index: Index) -> list[str]:
            packs = [(_pack(one.name), self._pack(one)) for one in self._may_hold(index.packs, keys)]
            shards = [(_shard(number), shard) for number, shard in self._shards_from(index.first) if shard is not None]
            return [name for name, scores in (*packs, *shards) if scores["pair_id"].is_in([pair_id]).any()]

        return self._while_it_stays(of)

    def counts(self) -> tuple[int, int]:
        """Number of scores, and of bytes. A score that two shards have is counted twice until they are packed."""

        def of(index: Index) -> tuple[int, int]:
            num_scores = sum(pack.num_scores for pack in index.packs)
            num_bytes = sum(pack.num_bytes for pack in index.packs)
            for number, shard in self._shards_from(index.first):
                num_scores += 0 if shard is None else shard.height
                with contextlib.suppress(StorageError):  # Packed meanwhile.
                    num_bytes += self._files.size(*self._path(_shard(number)))
            return num_scores, num_bytes

        return self._while_it_stays(of)

    def _while_it_stays(self, find: Callable[[Index], _Found]) -> _Found:
        """What a function finds by an index that is still the same afterwards."""
        while True:
            index = self._index()
            found = find(index)
            if self._index() == index:
                return found

    def clear(self) -> None:
        """Remove all scores. Numbers go on, so that a writer which knows the log takes none twice.

        Raises:
            PartitionBusyError: another process packs or removes them.
        """
        with self._locks.hold(*self._place):
            index = self._index()
            end = self._next_number(index.first)
            self._files.write_json(Index(end).as_json(), *self._path(_INDEX))
        self._remove_packs(pack.name for pack in index.packs)
        self._remove_shards(range(index.first, end))
        for name in self._files.names(*self._path(_SET_ASIDE)):
            self._remove([f"{_SET_ASIDE}/{name}"])

    def num_set_aside(self) -> int:
        """Number of damaged files."""
        return len(self._files.names(*self._path(_SET_ASIDE)))

    def pack(self) -> None:
        """Pack all shards, with packs that are not much larger. Where another process does so, leave it to that one."""
        self._remove_left_over()
        with contextlib.suppress(_OvertakenError, PartitionBusyError):
            while self._pack_some():
                pass

    def _fill_gap(self, end: int) -> bool:
        """Store an empty shard at the end of the shards that are found, if others follow: somebody removed a file."""
        is_missing = max(map(int, self._listed(_SHARDS, _NUMBER)), default=end) > end and not self._has_shard(end)
        if not is_missing or self._index().first > end:  # Packed meanwhile.
            return False
        path = self._files.path(*self._path(_shard(end)))
        logger.warning("%s: it is missing, though later shards are there; its pairs are scored again", path)
        empty = _encode(pl.DataFrame(schema=dtypes(CachedScores)), scored_with={})
        self._files.create(empty, *self._path(_shard(end)))
        return True

    def _pack_some(self) -> bool:
        """Pack the first shards, as many as fill a pack; False where there is none."""
        index = self._index()
        shards: list[pl.DataFrame] = []
        end, num_scores = index.first, 0
        for number, shard in self._shards_from(index.first):
            if shard is None:
                self._set_aside(_shard(number))
            else:
                shards.append(shard)
                num_scores += shard.height
            end = number + 1
            if num_scores >= SCORES_PER_PACK:
                break
        if end == index.first:
            return self._fill_gap(end)
        merged = _to_merge(index.packs, num_scores)
        scores = distinct(pl.concat([pl.DataFrame(schema=SCORED), *shards, *map(self._pack, merged)]))
        made: list[Pack] = []
        try:
            made += [self._write_pack(part) for part in scores.iter_slices(SCORES_PER_PACK)]
            self._replace(index, end, merged, made)
        except (_OvertakenError, PartitionBusyError):
            known = {pack.name for pack in self._index().packs}
            self._remove_packs(pack.name for pack in made if pack.name not in known)
            raise
        self._remove_packs(pack.name for pack in merged)
        self._remove_shards(range(index.first, end))
        return True

    def _replace(self, old: Index, end: int, merged: Sequence[Pack], made: Sequence[Pack]) -> None:
        kept = tuple(pack for pack in old.packs if pack not in merged)
        new = Index(end, (*kept, *made)).as_json()

        def change(stored: Any) -> Any:
            # A store may have applied a write whose answer was lost: then it is there already.
            if stored not in (old.as_json(), new):
                raise _OvertakenError
            return new

        with self._locks.hold(*self._place):
            self._files.update_json(change, *self._path(_INDEX), at_first=None)

    def _write_pack(self, scores: pl.DataFrame) -> Pack:
        name = f"{int(time.time())}-{uuid.uuid4().hex[:_KEY_DIGITS]}"
        data = _encode(scores)
        keys_hash = self._write_keys(name, scores)
        self._files.write_bytes(data, *self._path(_pack(name)))
        return Pack(name, scores.height, len(data), keys_hash)

    def _index(self) -> Index:
        index, fault = self._stored_index()
        if index is None:
            # It is written before the first shard.
            are_files = self._listed(_SHARDS, _NUMBER) or self._listed(_PACKS, _PACK_NAME)
            index = self._rebuilt_index() if fault or are_files else Index()
        return index

    def _stored_index(self) -> tuple[Index | None, str | None]:
        """The index, or its fault; neither where there is no file."""
        data = self._files.read_if_any(*self._path(_INDEX))
        try:
            return (None if data is None else Index.parse(json.loads(data))), None
        except (ValueError, KeyError, TypeError) as error:
            return None, str(error)

    def _rebuilt_index(self) -> Index:
        """Rebuild the index from the files, and store it.

        Raises:
            PartitionBusyError: another process changes it.
        """
        with self._locks.hold(*self._place):
            index, fault = self._stored_index()
            if index is not None:  # It was written meanwhile.
                return index
            path = self._files.path(*self._path(_INDEX))
            logger.warning("%s: %s; it is built again from the files beside it", path, fault or "it is missing")
            packs = map(self._pack_as_found, self._listed(_PACKS, _PACK_NAME))
            first = min(map(int, self._listed(_SHARDS, _NUMBER)), default=0)
            index = Index(first, tuple(pack for pack in packs if pack is not None))
            self._files.write_json(index.as_json(), *self._path(_INDEX))
        return index

    def _pack_as_found(self, name: str) -> Pack | None:
        data = self._files.read_if_any(*self._path(_pack(name)))
        if data is None:
            return None
        scores = self._scores_of(data, _pack(name))
        if scores is None:
            self._set_aside(_pack(name))
            self._remove_packs([name])
            return None
        return Pack(name, scores.height, len(data), self._write_keys(name, scores))

    def _write_keys(self, name: str, scores: pl.DataFrame) -> str:
        """Store the keys of a pack; return their hash."""
        keys = _keys(scores["pair_id"]).tobytes()
        self._files.write_bytes(keys, *self._path(_keys_of(name)))
        return _hash(keys)

    def _may_hold(self, packs: Sequence[Pack], keys: np.ndarray) -> Iterator[Pack]:
        """The packs that may have one of the pairs."""
        stored = self._files.read_many(self._path(_keys_of(pack.name)) for pack in packs)
        for pack, data in zip(packs, stored, strict=True):
            if data is None or _hash(data) != pack.keys_hash:  # It may have any pair; its keys are stored again.
                self._write_keys(pack.name, self._pack(pack))
                yield pack
            elif _have_any(np.frombuffer(data, np.uint64), keys):
                yield pack

    def _pack(self, pack: Pack) -> pl.DataFrame:
        """The scores of a pack; none where it was merged meanwhile, or is damaged."""
        data = self._files.read_if_any(*self._path(_pack(pack.name)))
        scores = None if data is None else self._scores_of(data, _pack(pack.name))
        if scores is None and pack in self._index().packs:
            self._give_up(pack, is_there=data is not None)
        return pl.DataFrame(schema=SCORED) if scores is None else scores

    def _give_up(self, pack: Pack, *, is_there: bool) -> None:
        if is_there:
            self._set_aside(_pack(pack.name))
        else:
            path = self._files.path(*self._path(_pack(pack.name)))
            logger.warning("%s: it is missing; its pairs are scored again", path)

        with contextlib.suppress(PartitionBusyError):  # Left to the next reader.
            with self._locks.hold(*self._place):
                now = self._stored_index()[0]
                if now is not None and pack in now.packs:
                    left = tuple(one for one in now.packs if one != pack)
                    self._files.write_json(Index(now.first, left).as_json(), *self._path(_INDEX))
            self._remove_packs([pack.name])

    def _shards_from(self, number: int) -> Iterator[tuple[int, pl.DataFrame | None]]:
        """Number and scores of each shard, from a number on; None where it is damaged, which is logged."""
        while True:
            numbers = range(number, number + _SHARDS_AT_ONCE)
            for one, data in zip(
                numbers, self._files.read_many(self._path(_shard(one)) for one in numbers), strict=True
            ):
                if data is None:
                    return
                yield one, self._scores_of(data, _shard(one))
            number += _SHARDS_AT_ONCE

    def _scores_of(self, data: bytes, name: str) -> pl.DataFrame | None:
        """The scores of a shard or a pack; None where it is damaged, which is logged."""
        try:
            return _decode(data)
        except parquet_file.UNREADABLE as error:
            path = self._files.path(*self._path(name))
            logger.warning("%s: no file of scores (%s); its pairs are scored again", path, error)
            return None

    def _set_aside(self, name: str) -> None:
        """Keep a copy of a damaged file, which is removed then."""
        data = self._files.read_if_any(*self._path(name))
        if data is not None:
            self._files.write_bytes(data, *self._path(_SET_ASIDE), name.replace("/", "-"))

    def _remove_packs(self, names: Iterable[str]) -> None:
        self._remove(part for name in names for part in (_pack(name), _keys_of(name)))

    def _remove_shards(self, numbers: Iterable[int]) -> None:
        self._remove(map(_shard, numbers))

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # Another process was faster.
                self._files.remove(*self._path(name))

    def _remove_left_over(self) -> None:
        """Remove what processes left that were killed while they packed. A listing without some of it does no harm."""
        packs, shards = self._listed(_PACKS, _PACK_NAME), self._listed(_SHARDS, _NUMBER)
        index = self._index()  # After the listings: what it names is not left over.
        unknown = set(packs) - {pack.name for pack in index.packs}
        self._remove_packs(name for name in unknown if int(name.partition("-")[0]) < time.time() - _DAY)
        self._remove_shards(number for number in map(int, shards) if number < index.first)

    def _listed(self, folder: str, pattern: re.Pattern[str]) -> list[str]:
        """The part of each name that the pattern captures first, once each."""
        found = map(pattern.fullmatch, self._files.names(*self._path(folder)))
        return sorted({one[1] for one in found if one is not None})

    def _path(self, name: str) -> Place:
        return (*self._place, *name.split("/"))


def distinct(scores: pl.DataFrame, key: Sequence[str] = SAME) -> pl.DataFrame:
    """One row of each score, sorted by the key. Where two writers stored a score, the lower sum counts."""
    ordered = scores.sort(*key, "sum_nll", "scored_with")
    return ordered.filter(pl.any_horizontal(pl.col(name).ne_missing(pl.col(name).shift()) for name in key))


def _to_merge(packs: Sequence[Pack], num_scores: int) -> list[Pack]:
    """The packs that are merged with so many new scores: none that is larger than what it is merged with, so that a
    score is written again a few times only, and few packs are small.
    """
    merged: list[Pack] = []
    for pack in sorted(packs, key=lambda one: (one.num_scores, one.name)):
        if pack.num_scores > num_scores or num_scores + pack.num_scores > SCORES_PER_PACK:
            break
        merged.append(pack)
        num_scores += pack.num_scores
    return merged


def _encode(scores: pl.DataFrame, **footer: Any) -> bytes:
    """A shard, whose footer says what scored it, or a pack."""
    return parquet_file.encode(scores, {"data_version": parquet_file.hash_rows(scores), **footer})


def _decode(data: bytes) -> pl.DataFrame:
    """The scores of a shard or a pack, as `SCORED`. Raises one of `UNREADABLE` where it is none."""
    stream = io.BytesIO(data)
    if fault := parquet_file.file_fault(stream):
        raise ValueError(fault)
    footer, _ = parquet_file.read_footer(stream)
    # Its rows were checked when it was written, and there may be thousands of shards.
    frame = parquet_file.decode(data)
    if "scored_with" not in frame.columns:  # A shard has one for all rows.
        frame = frame.with_columns(scored_with=pl.lit(json.dumps(footer["scored_with"], sort_keys=True)))
    frame = frame.select(list(SCORED))  # It may have more columns.
    if frame.schema != SCORED:
        raise ValueError("its columns have other types")
    return frame


def _keys(pair_ids: pl.Series) -> np.ndarray:
    """The last 64 bits of each distinct pair_id, sorted."""
    digits = pair_ids.unique().str.tail(_KEY_DIGITS)
    return np.sort(digits.str.to_integer(base=16, dtype=pl.UInt64).to_numpy())


def _have_any(stored: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two sorted arrays have an element in common."""
    few, many = sorted((stored, wanted), key=len)
    places = np.searchsorted(many, few)
    is_inside = places < len(many)
    return bool((many[places[is_inside]] == few[is_inside]).any())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _shard(number: int) -> str:
    return f"{_SHARDS}/{number:012d}.parquet"


def _pack(name: str) -> str:
    return f"{_PACKS}/{name}.parquet"


def _keys_of(name: str) -> str:
    return f"{_PACKS}/{name}.keys"
