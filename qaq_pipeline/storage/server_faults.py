"""Faults of a server or of the network that may pass: the store, or a database, does not answer.

Belongs here: recognising one, whichever library noticed it. Does not belong here: trying again.

Libraries of stores and databases that are not installed cannot be imported, so the names of their errors decide.
"""

from __future__ import annotations

from qaq_pipeline.storage.disk_faults import causes_of

_PASSING = {
    "aiohttp.ClientConnectionError",
    "aiohttp.ClientPayloadError",
    "azure.ServiceRequestError",
    "azure.ServiceResponseError",
    "botocore.ConnectionError",
    "botocore.HTTPClientError",
    "psycopg2.OperationalError",
    "sqlalchemy.OperationalError",
    "urllib3.HTTPError",
}
"""Errors of libraries: package and class."""
_SERVER_ERROR = 500
"""The lowest HTTP status that says that the server is at fault."""


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, comes of a server that does not answer or is at fault."""
    return any(map(_may_pass, causes_of(error)))


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return not names.isdisjoint(_PASSING) or _http_status(error) >= _SERVER_ERROR


def _http_status(error: BaseException) -> int:
    """The status of an answer that botocore, gcsfs or azure made an error; 0 where there is none."""
    answer = getattr(error, "response", None)
    if isinstance(answer, dict):
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    status = getattr(error, "status_code", getattr(error, "code", 0))
    return status if isinstance(status, int) else 0
