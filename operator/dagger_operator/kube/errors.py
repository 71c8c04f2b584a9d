"""Errors that an API server may return.

ApiError
├── Unavailable   unreachable or too busy: nothing is known, retry
├── Conflict      somebody else was faster: read again
├── Missing       there is no such object, namespace or kind
└── Refused       not permitted: quota, admission, permission, an invalid object
"""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """`reason` is the API server's own, in CamelCase; `code` is the HTTP status, 0 if there was no response."""

    def __init__(self, doing: str, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message
        super().__init__(f"{doing}: {reason}: {message}")

    @property
    def about_one(self) -> bool:
        """Whether other objects may fare better: this one was refused, or only its path is broken, such as an admission webhook."""
        return True


class Unavailable(ApiError):
    @property
    def about_one(self) -> bool:
        return self.code >= 500


class Conflict(ApiError):
    pass


class Missing(ApiError):
    pass


class Refused(ApiError):
    pass


def error_of(doing: str, code: int, status: Mapping[str, Any]) -> ApiError:
    """Return the error for a response; `status` is its body, usually a `Status` object."""
    kind: type[ApiError]
    match code:
        case 404:
            kind = Missing
        case 409:
            kind = Conflict
        case 408 | 429:
            kind = Unavailable
        case 401:
            kind = Unavailable  # a token that is being rotated; the next request reads it again
        case _ if code >= 500:
            kind = Unavailable
        case _:
            kind = Refused
    message = str(status.get("message") or "")
    return kind(doing, code, _reason(code, str(status.get("reason") or f"HTTP{code}"), message), message)


def _reason(code: int, reason: str, message: str) -> str:
    """Return the reason; an exceeded quota, which the API server reports as `Forbidden`, gets a reason of its own."""
    if code == 403 and "exceeded quota" in message:
        return "QuotaExceeded"
    return reason
