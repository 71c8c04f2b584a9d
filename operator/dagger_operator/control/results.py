"""The results of a run's stages, as the plan sees them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dagger_operator.api import DAggerRun
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import owner_of, read_owner
from dagger_operator.store.records import Record
from dagger_operator.store.results import (
    KINDS,
    PrepareResult,
    TrainingResult,
    read_result,
)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Results:
    """Results by round and stage. They are created once, so a copy of any age is right in what it has."""

    records: Mapping[tuple[int, str], Record] = field(default_factory=dict)

    def has(self, round_number: int, stage: str) -> bool:
        return (round_number, stage) in self.records

    def get(self, kind: type[R], round_number: int) -> R | None:
        """A round's result of one kind, such as `results.get(RolloutResult, 3)`."""
        stage = next(name for name, known in KINDS.items() if known is kind)
        record = self.records.get((round_number, stage))
        return record if isinstance(record, kind) else None

    @property
    def newest_round(self) -> int:
        """The furthest round that any stage was done in; 0 before round 1."""
        return max((number for number, _ in self.records), default=0)

    def student_after(self, round_number: int) -> str | None:
        """Version of the student once a round is over; round 0 is the initial one, and a round without training changes nothing."""
        for number in range(round_number, 0, -1):
            if (trained := self.get(TrainingResult, number)) is not None:
                return trained.policy
        prepared = self.get(PrepareResult, 0)
        return prepared.policy if prepared else None


async def read_results(store: Store, run: DAggerRun, known: Results | None = None) -> Results:
    """What both runtimes read before they plan: all results of a run, those `known` already not again.

    What stands below a prefix that is another run's is none of this run's: then there are no results, and its prepare stage
    says whose they are. Raises `StoreUnavailable` or `DamagedObject`; then nothing is known, and `Observed.storage_problem` says so.
    """
    records = dict(known.records) if known else {}
    if not records and await read_owner(store) != owner_of(run):
        return Results()
    # An evaluation may end beside the next round, up to its publish, which waits for it: the round before is still asked for.
    number = max(0, Results(records).newest_round - 1)
    while True:
        missing = [stage for stage in KINDS if (number, stage) not in records and (stage in _ROUND_0) == (number == 0)]
        found = await asyncio.gather(*(read_result(store, number, stage, KINDS[stage]) for stage in missing))
        records.update({(number, stage): record for stage, record in zip(missing, found, strict=True) if record is not None})
        if not any(of == number for of, _ in records):
            return Results(records)
        number += 1


_ROUND_0 = ("prepare", "preflight")
