"""When to ask again: exponential back-off with full jitter, and what the server itself says."""

import random
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True)
class Backoff:
    """Waits between tries. Full jitter: workers that failed together do not come back together."""

    base_seconds: float = 1.0
    cap_seconds: float = 60.0

    def wait(self, failures: int, retry_after: float | None = None) -> float:
        """Seconds to wait after so many failures in a row (from 1); never less than the server asked for, never more than the cap."""
        jittered = random.uniform(0.0, self.base_seconds * 2.0 ** min(failures - 1, 30))  # noqa: S311 - spreads load, guards nothing
        return min(self.cap_seconds, max(jittered, retry_after or 0.0))


def retry_after_seconds(value: str | None, now: datetime | None = None) -> float | None:
    """A Retry-After header (RFC 9110: seconds or an HTTP date) as seconds from now; None where there is none that can be read."""
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
