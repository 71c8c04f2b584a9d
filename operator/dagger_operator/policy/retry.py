"""When to retry: exponential back-off with full jitter, and the server's Retry-After."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True)
class Backoff:
    """Waits between tries. Full jitter keeps workers that failed together from retrying together."""

    base_seconds: float = 1.0
    cap_seconds: float = 60.0

    def wait(self, failures: int, retry_after: float | None = None) -> float:
        """Return seconds to wait after `failures` in a row (from 1): at least what the server asked for, at most the cap, which wins."""
        jittered = random.uniform(0.0, self.base_seconds * 2.0 ** min(failures - 1, 30))  # noqa: S311 - spreads load, guards nothing
        return min(self.cap_seconds, max(jittered, retry_after or 0.0))


def retry_after_seconds(value: str | None, now: datetime | None = None) -> float | None:
    """Return a Retry-After header (RFC 9110: seconds or an HTTP date) as seconds from now; None if it is missing or unreadable."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - (now or datetime.now(UTC))).total_seconds())
