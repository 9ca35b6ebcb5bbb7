"""From the files of a delivery to a RawData frame: one row per record, or per pair of a conversation.

Belongs here: the rows of RawData, their identity, and the reasons why a row cannot be read. Strings only. Does not
belong here: file formats (`storage.row_files`), the names of fields (`fields`), turns (`conversations`), what happens
to the rows later, and anything about models or tokenizers.

An unreadable row is kept and rejected with a reason. Query and answer are stored exactly as delivered.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import chain, islice
from typing import Any

import polars as pl

from qaq_pipeline.config.settings import RecordSettings
from qaq_pipeline.ingest import code_fences, conversations, fields, histories, reasonings, sources
from qaq_pipeline.ingest.conversations import Candidate, missing
from qaq_pipeline.ingest.histories import Earlier
from qaq_pipeline.ingest.values import Field, is_blank, storable
from qaq_pipeline.schema.tables import RawData, dtypes
from qaq_pipeline.schema.vocabularies import RejectReason, Status
from qaq_pipeline.storage.row_files import DeliveredRow, NoRowsError, RejectedError, UnreadableFileError, kind, split

UNREAD_KEY = "unread_fields"
"""Key in the provenance of raw_data: fields that nobody reads, and the number of records that have each."""

EARLIER_TURNS = "earlier turns"
"""Stands among the fields that nobody reads for the exchanges before the pair of a conversation."""

ASIDE_KEY = "files_left_aside"
"""Key in the provenance of raw_data: names of delivered files without rows."""

_ROWS_AT_ONCE = 10_000
"""Delivered rows that are in memory as Python objects."""

_MOST = 10
"""Names that a sentence shows."""

_NO_CANDIDATE = Candidate(Field("system", None), Field("query", None), Field("answer", None))


@dataclass(frozen=True)
class Reading:
    """What was read of files."""

    frame: pl.DataFrame
    """RawData."""
    unread: Counter[str]
    """Records with something in a field that is neither read nor known, by the name of the field."""
    num_records: int
    """Records that are objects."""
    left_aside: Sequence[str] = ()
    """Names of files without rows, such as a README.md."""

    def followed_by(self, other: Reading) -> Reading:
        """The rows of both."""
        return Reading(
            pl.concat([self.frame, other.frame], rechunk=False),
            self.unread + other.unread,
            self.num_records + other.num_records,
            [*self.left_aside, *other.left_aside],
        )

    def without_rows(self) -> Reading:
        """What was read of them, but for the rows."""
        return replace(self, frame=self.frame.clear())

    @property
    def facts(self) -> dict[str, Any]:
        """Part of the provenance of raw_data."""
        unread = {"records": self.num_records, "with_field": dict(sorted(self.unread.items()))}
        return {UNREAD_KEY: unread, ASIDE_KEY: sorted(self.left_aside)}


NOTHING = Reading(pl.DataFrame(schema=dtypes(RawData)), Counter(), 0)
"""Of no file."""


def not_read(facts: Mapping[str, Any]) -> list[str]:
    """What of a delivery is not read, in words, from the provenance of raw_data."""
    records, found = facts[UNREAD_KEY]["records"], dict(facts[UNREAD_KEY]["with_field"])
    earlier = found.pop(EARLIER_TURNS, 0)
    most_first = sorted(found.items(), key=lambda one: (-one[1], one[0]))
    fields_of = [
        f"{name!a:.60} ({count:,} of {records:,} records)".replace("'", "") for name, count in most_first[:_MOST]
    ]
    fields_of += [f"and {len(most_first) - _MOST:,} others"] if len(most_first) > _MOST else []
    remedy = "name them in records.fields if they belong to the pair"
    remedy += "; see records.context" if found.keys() & {histories.TOOLS, histories.FIELD} else ""
    said = [f"fields not read: {', '.join(fields_of)}; {remedy}"]
    aside = [*facts[ASIDE_KEY][:_MOST]]
    aside += [f"and {len(facts[ASIDE_KEY]) - _MOST:,} others"] if len(facts[ASIDE_KEY]) > _MOST else []
    of_turns = (
        f"earlier turns are not read: {earlier:,} of {records:,} records have some; see records.multi_turn and "
        "records.context"
    )
    return [
        *(said if found else []),
        *([of_turns] if earlier else []),
        *([f"files left aside: {', '.join(aside)}"] if aside else []),
    ]


def field_of(record: pl.Expr, name: str) -> pl.Expr:
    """The text of a top-level field of JSON objects; null if it is absent or null, or the record is not JSON.

    Args:
        record: the objects.
        name: of the field; without quotes and backslashes.
    """
    return record.str.json_path_match(f"$['{name}']")


def read_file(
    content: bytes, source_file: str, batch: str, settings: RecordSettings, limit: int | None = None
) -> Reading:
    """Read the rows of a delivered file, accepted or rejected, with the columns of RawData in order.

    Args:
        content: of the file.
        source_file: its name.
        batch: name of the batch.
        settings: what is read.
        limit: number of records that are read; None: all.

    Raises:
        UnreadableFileError: the file is empty, damaged, or not a list of rows.
    """
    return reduce(Reading.followed_by, _file_parts(content, source_file, batch, settings, limit), NOTHING)


def _file_parts(
    content: bytes, source_file: str, batch: str, settings: RecordSettings, limit: int | None
) -> Iterator[Reading]:
    """As `read_file`, some thousand records at a time; a file that cannot be read raises before the first."""
    delivered = iter(split(content, source_file, partial(fields.has_pair, settings=settings)))
    begun: list[DeliveredRow] = []

    def seen() -> Iterator[object]:
        for row in delivered:
            begun.append(row)
            yield row.value

    shape, settings = fields.detect(seen(), settings)
    rows = islice(chain(begun, delivered), limit)
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        yield _read_rows(some, source_file, batch, shape, settings)


def _read_rows(
    delivered: Sequence[DeliveredRow], source_file: str, batch: str, shape: str, settings: RecordSettings
) -> Reading:
    rows = [(batch, source_file, *cells) for row in delivered for cells in _read_row(row, shape, settings)]
    records = [row.value for row in delivered if isinstance(row.value, dict)]
    unread = fields.unread_fields(records, shape, settings)
    unread.update(name for record in records for name in {*conversations.unread_of_turns(record, shape, settings)})
    frame = pl.DataFrame(rows, schema=dtypes(RawData), orient="row")
    if settings.multi_turn == "last" and settings.context == "none":
        unread.update({EARLIER_TURNS: frame.filter(pl.col("turn_index") > 0).height})
    return Reading(frame, +unread, len(records))


def read_delivery(contents: Mapping[str, bytes], batch: str, settings: RecordSettings) -> Reading:
    """Read all rows of the delivered files, in the order of their names.

    A file that cannot be split into rows becomes one rejected row, which gates the batch. A file in no format of rows,
    and one with no row, is left aside; if nothing else was delivered, or its name is that of rows, the former is
    rejected like any other.
    """
    sizes = {name: len(content) for name, content in contents.items()}
    return reduce(Reading.followed_by, delivery_parts(sizes, contents.__getitem__, batch, settings), NOTHING)


def delivery_parts(
    sizes: Mapping[str, int],
    read: Callable[[str], bytes],
    batch: str,
    settings: RecordSettings,
    limit: int | None = None,
) -> Iterator[Reading]:
    """As `read_delivery`, in key order, some thousand records of one file at a time.

    Args:
        sizes: bytes of each file, by its name.
        read: returns the content of a file; one file is in memory at a time.
        batch: name of the batch.
        settings: what is read.
        limit: number of records that are read; None: all.
    """
    names, left_aside = sources.split_off(sizes)
    without_rows: list[str] = []
    refused: dict[str, NoRowsError] = {}
    for name in names:
        if limit == 0:
            break
        is_empty = True
        try:
            for reading in _parts_or_rejection(read(name), name, batch, settings, limit):
                is_empty = False
                limit = None if limit is None else limit - reading.frame["source_row"].n_unique()
                yield reading
        except NoRowsError as error:
            refused[name] = error
        else:
            without_rows += [name] if is_empty else []
    if len(refused) < len(names):
        without_rows += refused
    else:
        yield from (_rejection(error, name, batch) for name, error in refused.items())
    yield replace(NOTHING, left_aside=[*left_aside, *without_rows])


def _parts_or_rejection(
    content: bytes, name: str, batch: str, settings: RecordSettings, limit: int | None
) -> Iterator[Reading]:
    """The rows of a file, or one for a file that cannot be read. Raises NoRowsError: it may be left aside."""
    try:
        yield from _file_parts(content, name, batch, settings, limit)
    except UnreadableFileError as error:
        if _may_be_left_aside(error, name):
            raise
        yield _rejection(error, name, batch)


def _may_be_left_aside(error: UnreadableFileError, name: str) -> bool:
    return isinstance(error, NoRowsError) and not sources.is_named_as_rows(name)


def _rejection(error: UnreadableFileError, name: str, batch: str) -> Reading:
    return Reading(unreadable_file(error, name, batch), Counter(), 0)


def check_delivery(contents: Mapping[str, bytes], settings: RecordSettings) -> None:
    """Check that each file of a delivery can be split into rows or left aside, without reading its rows.

    Raises:
        UnreadableFileError: as `read_file`.
    """
    names, _ = sources.split_off({name: len(content) for name, content in contents.items()})
    refused: list[UnreadableFileError] = []
    for name in names:
        try:
            check_file(contents[name], name, settings)
        except UnreadableFileError as error:
            if not _may_be_left_aside(error, name):
                raise
            refused.append(error)
    if refused and len(refused) == len(names):
        raise refused[0]


def check_file(content: bytes, source_file: str, settings: RecordSettings) -> None:
    """Check that a file can be split into rows, without reading them.

    Raises:
        UnreadableFileError: as `read_file`.
    """
    split(content, source_file, partial(fields.has_pair, settings=settings))


def unreadable_file(error: UnreadableFileError, source_file: str, batch: str) -> pl.DataFrame:
    """Return one rejected row for a file that cannot be split into rows: for unattended runs."""
    rejection = (Status.REJECTED.value, RejectReason.UNREADABLE_FILE.value, str(error))
    row = (batch, source_file, 1, 0, *[None] * 9, "", *rejection)
    return pl.DataFrame([row], schema=dtypes(RawData), orient="row")


def pair_id(system: str | None, query: str, answer: str, history: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Content hash of a pair: blake2b-128 of the three texts in UTF-8, each preceded by its length in 8 bytes.

    Then role and content of each earlier turn that is its context. An absent system text equals an empty one.
    """
    digest = hashlib.blake2b(digest_size=16)
    turns = (text for turn in history or () for text in (turn["role"], turn["content"]))
    for text in (system or "", query, answer, *turns):
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


# --- rows ---------------------------------------------------------------------------------------------------------


def _read_row(row: DeliveredRow, shape: str, settings: RecordSettings) -> Iterator[tuple[object, ...]]:
    if not isinstance(row.value, dict) or row.fault is not None:
        yield _cells(row, _NO_CANDIDATE, row.fault, settings)
        return
    try:
        candidates = _candidates(row.value, shape, settings)
    except RejectedError as fault:
        yield _cells(row, _NO_CANDIDATE, fault.of_shape(shape), settings)
        return
    for candidate in candidates:
        fault = candidate.fault or _not_text_alone(row.value) or _fault(candidate, row.value)
        yield _cells(row, candidate, fault and fault.of_shape(shape), settings)


def _candidates(record: Mapping[str, object], shape: str, settings: RecordSettings) -> Iterable[Candidate]:
    if conversations.is_conversation(record, shape):
        return conversations.pairs(record, shape, settings)
    names = settings.fields
    query_names, answer_names = fields.shapes(names)[shape]
    if shape == "preference":
        query_names, answer_names = names.query, query_names
    query = (
        fields.first_present(record, query_names)
        if shape == "prompt_completion"
        else fields.query_of(record, query_names, names)
    )
    answer, system = fields.first_present(record, answer_names), fields.first_present(record, names.system)
    reasoning = fields.first_present(record, names.reasoning)
    fault = conversations.label_fault(record, shape)
    history: list[Earlier] = []
    if settings.context == "history":
        history = [*histories.of_tools(record), *histories.of_field(record)]
    return [Candidate(system, query, answer, fault=fault, reasoning=reasoning, history=history)]


def _cells(
    row: DeliveredRow, candidate: Candidate, fault: RejectedError | None, settings: RecordSettings
) -> tuple[object, ...]:
    """Build the columns of RawData after `source_file`."""
    # An empty system text becomes null: both have the same pair_id, so models must get the same input.
    system = storable(candidate.system.value) or None
    query, answer = storable(candidate.query.value), storable(candidate.answer.value)
    reasoning, answer = reasonings.split_off(storable(candidate.reasoning.value), answer)
    if settings.reasoning == "score" and reasoning is not None and answer is not None:
        reasoning, answer = None, reasoning + answer
    record = row.value if isinstance(row.value, dict) else {}
    source, given, licence = (
        fields.first_present(record, names)
        for names in (settings.fields.source, settings.fields.language, settings.fields.licence)
    )
    language = storable(given.value) or code_fences.language_of(answer or "")
    origin = (storable(source.value), language, _licence(licence.value), row.record)
    key = (row.source_row, candidate.turn_index)
    history = None if fault else histories.stored(candidate.history)
    identity = None if fault or query is None or answer is None else pair_id(system, query, answer, history)
    rejection = (Status.REJECTED.value, fault.reason.value, fault.detail) if fault else None
    verdict = rejection or (Status.ACCEPTED.value, None, None)
    return (*key, identity, system, history, query, answer, reasoning, *origin, *verdict)


def _licence(value: object) -> str | None:
    """The licence that a row names, or all that it names, separated by commas."""
    given = value if isinstance(value, list) else [value]
    names = [storable(_name_of_licence(one)) for one in given]
    return ", ".join(name for name in names if name) or None


def _name_of_licence(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in ("spdx_id", "key", "name", "id") if value.get(key)), None)


def _not_text_alone(record: Mapping[str, object]) -> RejectedError | None:
    media = fields.other_than_text(record)
    found = f"`{media}` is not empty; text alone is expected"
    return None if media is None else RejectedError(RejectReason.OTHER_THAN_TEXT, found)


def _fault(candidate: Candidate, record: Mapping[str, object]) -> RejectedError | None:
    system, query, answer = candidate.system, candidate.query, candidate.answer
    for field, reason in ((query, RejectReason.MISSING_QUERY), (answer, RejectReason.MISSING_ANSWER)):
        if field.value is None:
            return missing(field.name, reason, record)
    for field in (system, query, answer):
        if field.value is not None and not isinstance(field.value, str):
            return RejectedError(RejectReason.WRONG_TYPE, f"{field.name} is {kind(field.value)}; text is expected")
    for field in (system, query, answer, *(turn.text for turn in candidate.history)):
        if field.value is not None and storable(field.value) is None:
            return RejectedError(RejectReason.INVALID_UTF8, f"{field.name} contains {_unstorable(str(field.value))}")
    for field, reason in ((query, RejectReason.EMPTY_QUERY), (answer, RejectReason.EMPTY_ANSWER)):
        if is_blank(str(field.value)):
            return RejectedError(reason, f"{field.name} is empty or only white space")
    return None


def _unstorable(text: str) -> str:
    """What in a text UTF-8 cannot store: a byte that is not UTF-8 itself, or half of a pair that JSON escapes."""
    (first, *_) = (ord(character) for character in text if 0xD800 <= ord(character) <= 0xDFFF)
    if 0xDC80 <= first <= 0xDCFF:
        return f"the byte \\x{first & 0xFF:02x}, which is not UTF-8"
    return "half of a UTF-16 surrogate pair, which UTF-8 cannot store"
