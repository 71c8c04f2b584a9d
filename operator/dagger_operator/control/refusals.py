"""Since when the API server has been refusing an object. It does not store refusals, so the status records them."""

import re
from dataclasses import replace
from datetime import UTC, datetime

from dagger_operator.api import Phase, RunStatus
from dagger_operator.control.child import Trouble
from dagger_operator.control.conditions import ConditionType, Reason

_FORM = "%Y-%m-%d %H:%M:%S"
_SINCE = re.compile(r"\(since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC\)")


def since(trouble: Trouble) -> str:
    """Return the message with the time since when, as far as that was observed."""
    return f"{trouble.message} (since {trouble.since:{_FORM}} UTC)" if trouble.since else trouble.message


def failed_by(status: RunStatus | None) -> Trouble | None:
    """Return the refusal that made a run fail: it holds until the object is accepted, whichever controller looks."""
    told = _told(status, ConditionType.FAILED) if status is not None and status.phase is Phase.FAILED else None
    return None if told is None or told.reason == Reason.NODE_LOST else told


def waited_since(status: RunStatus | None, reason: str, now: datetime) -> datetime:
    """Return since when a run has been waiting for a reason that carries no time of its own."""
    for kind in (ConditionType.FAILED, ConditionType.PROGRESSING):
        if (told := _told(status, kind)) is not None and told.reason == reason and told.since is not None:
            return told.since
    return now


def dated(refusal: Trouble, known: Trouble | None, status: RunStatus | None) -> Trouble:
    """Return the refusal, dated by its first occurrence as known to this controller or recorded by an earlier one."""
    if (failed := failed_by(status)) is not None:
        return replace(refusal, since=failed.since)
    for before in (known, _told(status, ConditionType.PROGRESSING)):
        if before is not None and before.reason == refusal.reason:
            return replace(refusal, since=before.since)
    return refusal


def _told(status: RunStatus | None, kind: ConditionType) -> Trouble | None:
    """Return a condition's reason and message with the date in its message. Not its `lastTransitionTime`: the run may have waited for other
    things before."""
    told = next((one for one in (status.conditions if status else ()) if one.type == kind), None)
    if told is None or (written := _SINCE.search(told.message)) is None:
        return None
    try:
        at = datetime.strptime(written[1], _FORM).replace(tzinfo=UTC)
    except ValueError:
        return None
    return Trouble(told.reason, told.message, at)
