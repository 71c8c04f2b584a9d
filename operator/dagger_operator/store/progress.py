"""Progress of a stage's workers: overwritten as they go, only for display."""

import asyncio
import time
from typing import Protocol

import structlog
from pydantic import ValidationError

from dagger_operator.store import layout
from dagger_operator.store.objects import SMALL_BYTES, DamagedObject, Reads, Store, StoreUnavailable
from dagger_operator.store.results import StageProgress

REPORT_SECONDS = 5.0
"""Interval between two reports of one worker."""


async def report(store: Store, round_number: int, stage: str, index: int, progress: StageProgress) -> None:
    """Report the progress of worker `index`. An unavailable store costs the report and nothing else."""
    try:
        await store.put(layout.progress(round_number, stage, index), progress.model_dump_json().encode())
    except StoreUnavailable as error:
        structlog.get_logger().warning("progress not reported", problem=str(error))


class Tell(Protocol):
    """Receives progress, as often as the caller likes."""

    async def __call__(self, done: int, total: int, /) -> object: ...


async def silent(done: int, total: int, /) -> None:
    """Ignore progress: a `Tell` for callers that need none."""


class Reporter:
    """Stores the progress it is given when due: the first, the last, and others at most every `REPORT_SECONDS`."""

    def __init__(self, store: Store, round_number: int, stage: str, unit: str) -> None:
        self._store, self._where, self._unit = store, (round_number, stage), unit
        self._started, self._due = time.monotonic(), 0.0
        self._before: int | None = None

    async def tell(self, done: int, total: int, *, counters: dict[str, float] | None = None, seconds: float | None = None) -> bool:
        """Return whether it was stored. `seconds`: time of all work done, if more than this process has spent on it."""
        now = time.monotonic()
        if self._before is None:
            self._before = done if seconds is None else 0
        if now < self._due and done < total:
            return False
        self._due = now + REPORT_SECONDS
        worked = now - self._started if seconds is None else seconds
        progress = StageProgress(done=done, total=total, unit=self._unit, counters=counters or {}, seconds=worked, before=self._before)
        await report(self._store, *self._where, 0, progress)
        return True


async def read_progress(store: Reads, round_number: int, stage: str, workers: int = 1) -> dict[int, StageProgress]:
    """Return the progress of the first `workers` workers, by index; what cannot be read is left out, since nothing depends on it."""

    async def of(index: int) -> StageProgress | None:
        try:
            entry = await store.get(layout.progress(round_number, stage, index), SMALL_BYTES)
            return None if entry is None else StageProgress.model_validate_json(entry.data)
        except (DamagedObject, ValidationError):
            return None

    found = await asyncio.gather(*map(of, range(workers)))
    return {index: one for index, one in enumerate(found) if one is not None}
