"""Which fields of a record are read, and which are not.

Belongs here: the shapes of records, the names of their fields, and the pair of a record that is no conversation. Does
not belong here: the turns of a conversation (`conversations`), and the format of a file (`storage.row_files`).

A file has one shape: the one whose fields most of its first 100 objects have. Ties go to the first in this order. A
row of another shape is rejected, without guessing.

    preference         chosen, rejected (or chosen_messages, rejected_messages): answers, or conversations, perhaps
                       after a conversation; the rejected one is not read
    messages           messages: a list of turns
    sharegpt           conversations: a list of turns
    prompt_completion  prompt, completion: two texts, or two lists of turns
    alpaca             instruction, output
    query_answer       the first present of `records.fields.query`, and of `records.fields.answer`

A record with images, videos or audios, or their paths, is rejected, whatever its shape: its text alone is not what was
asked.

In the last two shapes, and where `chosen` is a text, the texts of `records.fields.context` follow the query, each on a
line of its own.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from qaq_pipeline.config.settings import FieldSettings, RecordSettings
from qaq_pipeline.ingest.histories import FIELD as HISTORY
from qaq_pipeline.ingest.histories import TOOLS, of_tools
from qaq_pipeline.ingest.values import Field, is_blank, joined

DETECTION_ROWS = 100

_KNOWN = frozenset(
    (
        *("id", "_id", "idx", "index", "uuid", "hash", "source", "dataset", "split", "url"),
        *("language", "lang", "category", "domain", "topic", "tags", "difficulty", "model", "generator", "num_turns"),
        *("created", "created_at", "date", "timestamp", "label", "kto_tag", "score", "rating"),
        *("rejected", "rejected_messages"),
    )
)
"""Names of fields that are about a row and not part of it: nobody misses them in the query."""

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")

_CONTAINER = re.compile(r"(?:[\w.-]+(?::\d+)?/)*[\w.-]+:[\w.-]+(?:@sha256:\w+)?")
"""What names the image of a container, in which code runs, such as python:3.11: that is no picture."""

CHOSEN = ("chosen", "chosen_messages")
"""Fields of the answer that is preferred to another one."""

CONVERSATIONS = {"messages": "messages", "sharegpt": "conversations"}
"""The field with the turns, by shape."""


def shapes(fields: FieldSettings) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The shapes in order of preference. A shape needs one field of each group."""
    return {
        "preference": (CHOSEN, ("rejected", "rejected_messages")),
        "messages": (("messages",),),
        "sharegpt": (("conversations",),),
        "prompt_completion": (("prompt",), ("completion",)),
        "alpaca": (("instruction",), ("output",)),
        "query_answer": (fields.query, fields.answer),
    }


def has_pair(record: Mapping[str, object], settings: RecordSettings) -> bool:
    """Whether a record has the fields of any shape, by the names that are set or by the usual ones."""
    known = (*shapes(settings.fields).values(), *shapes(FieldSettings()).values())
    return any(_fits(record, groups) for groups in known)


def detect(records: Iterable[object], settings: RecordSettings) -> tuple[str, RecordSettings]:
    """The shape of a file's records, and the settings by which they are read.

    The shape is the one that is set; else `query_answer` where a person named fields of the pair, and one of the first
    records has one; else the one that most of the first records have, by the usual names.
    """
    if settings.shape != "auto":
        return settings.shape, settings
    sample = list(islice((record for record in records if isinstance(record, dict)), DETECTION_ROWS))
    if named := {"query", "context", "answer"} & settings.fields.model_fields_set:
        names = [name for field in named for name in getattr(settings.fields, field)]
        if any(name in record for record in sample for name in names):
            return "query_answer", settings
        usual = FieldSettings().model_dump(include=named)
        settings = settings.model_copy(update={"fields": settings.fields.model_copy(update=usual)})
    return _commonest(sample, shapes(settings.fields)), settings


def _commonest(sample: Sequence[Mapping[str, object]], known: Mapping[str, tuple[tuple[str, ...], ...]]) -> str:
    """The shape that most of the records have."""

    def support(shape: str) -> tuple[int, int]:
        fitting = sum(_fits(record, known[shape]) for record in sample)
        return fitting, sum(_fits(record, known[shape], null_counts=True) for record in sample)

    best = max(known, key=support)
    # If no row has both sides, the shape with the most names describes best which one is missing.
    return best if any(support(best)) else "query_answer"


def _fits(record: Mapping[str, object], groups: tuple[tuple[str, ...], ...], *, null_counts: bool = False) -> bool:
    def present(field: str) -> bool:
        return field in record if null_counts else record.get(field) is not None

    return all(any(map(present, group)) for group in groups)


def first_present(record: Mapping[str, object], names: tuple[str, ...]) -> Field:
    """The first of the fields that a record has; all names and None where it has none."""
    taken = _taken(record, names)
    if taken is None:
        return Field(" / ".join(f"`{name}`" for name in names), None)
    return Field(f"`{taken}`", record[taken])


def other_than_text(record: Mapping[str, object]) -> str | None:
    """The field of a record with pictures, films or sounds, or with their places; None: it has none."""
    return next((name for name in _MEDIA if _is_medium(record.get(name))), None)


def _is_medium(value: object) -> bool:
    if isinstance(value, str):
        return not is_blank(value) and _CONTAINER.fullmatch(value) is None
    return isinstance(value, (list, dict, bytes)) and bool(value)


def query_of(record: Mapping[str, object], names: tuple[str, ...], fields: FieldSettings) -> Field:
    """The query of a record that is no conversation: its text, then each text of its context on a line of its own.

    Context that is no text is a fault where it was named, or belongs to an Alpaca instruction; else it is not read.
    """
    query = first_present(record, names)
    contexts = [
        Field(f"`{name}`", record[name])
        for name in fields.context
        if record.get(name) is not None and f"`{name}`" != query.name and not _is_empty(record[name])
    ]
    if not contexts or not isinstance(query.value, str):
        return query
    no_text = [field for field in contexts if not isinstance(field.value, str)]
    wanted = {"`input`"} if query.name == "`instruction`" else set()
    if "context" in fields.model_fields_set:
        wanted = {field.name for field in contexts}
    if fault := next((field for field in no_text if field.name in wanted), None):
        return fault
    contexts = [field for field in contexts if isinstance(field.value, str)]
    if not contexts:
        return query
    if is_blank(query.value):
        return joined(contexts, "\n")
    name = f"{query.name} with {', '.join(field.name for field in contexts)}"
    return Field(name, joined([query, *contexts], "\n").value)


def _is_empty(value: object) -> bool:
    return (isinstance(value, str) and is_blank(value)) or value in ([], {})


def unread_fields(records: Iterable[Mapping[str, object]], shape: str, settings: RecordSettings) -> Counter[str]:
    """How many records have something in a field that is neither read nor known, by its name."""
    return Counter(name for record in records for name in _unread(record, shape, settings))


def _unread(record: Mapping[str, object], shape: str, settings: RecordSettings) -> Iterator[str]:
    fields = settings.fields
    read = {*(_taken(record, names) for names in shapes(fields)[shape])}
    read.add(other_than_text(record))
    if settings.context == "history":
        read |= {HISTORY, TOOLS}
    elif not of_tools(record):
        read.add(TOOLS)
    if shape == "preference":
        read |= {"prompt", *CONVERSATIONS.values(), _taken(record, fields.query)}
    for names in (fields.system, fields.source, fields.language, fields.licence):
        read.add(_taken(record, names))
    texts = (
        [fields.reasoning]
        if shape == "prompt_completion" or shape in CONVERSATIONS
        else [fields.reasoning, fields.context]
    )
    read |= {name for name in itertools.chain.from_iterable(texts) if isinstance(record.get(name), str)}
    return (name for name in with_content(record) if name not in read and name not in _KNOWN)


def _taken(record: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """The name of the field that `first_present` takes."""
    return next((name for name in names if record.get(name) is not None), None)


def with_content(record: Mapping[str, object]) -> Iterator[str]:
    """The names of the fields that say something: false and 0 do."""
    return (name for name, value in record.items() if value is not None and not _is_empty(value))
