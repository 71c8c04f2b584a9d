"""The results of a run's stages, as the plan sees them."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dagger_operator.api import DAggerRun
from dagger_operator.api.course import ONCE, StageName
from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Reads
from dagger_operator.store.owner import owner_of, read_owner
from dagger_operator.store.results import (
    KINDS,
    PrepareResult,
    Result,
    TrainingResult,
    read_result,
)

R = TypeVar("R", bound=Result)
RUN_BYTES = 16 << 20
"""Maximum bytes of a run's results: more than a thousand rounds need, without their lists."""


@dataclass(frozen=True)
class Results:
    """Results by round and stage. Each is created once, so a copy of any age is correct in what it contains."""

    records: Mapping[tuple[int, str], Result] = field(default_factory=dict)
    size: int = field(default=0, compare=False)
    """Total bytes of all of them."""

    def has(self, round_number: int, stage: str) -> bool:
        return (round_number, stage) in self.records

    def get(self, kind: type[R], round_number: int) -> R | None:
        """Return a round's result of one kind, such as `results.get(RolloutResult, 3)`."""
        record = self.records.get((round_number, kind.stage))
        return record if isinstance(record, kind) else None

    @property
    def newest_round(self) -> int:
        """The last round in which any stage was done; 0 before round 1."""
        return max((number for number, _ in self.records), default=0)

    def student_after(self, round_number: int) -> str | None:
        """Return the version of the student after a round; round 0 gives the initial one, and a round without training changes nothing."""
        for number in range(round_number, 0, -1):
            if (trained := self.get(TrainingResult, number)) is not None:
                return trained.policy
        prepared = self.get(PrepareResult, 0)
        return prepared.policy if prepared else None


async def read_results(store: Reads, run: DAggerRun, known: Results | None = None) -> Results:
    """Read all results of a run, for both runtimes; results in `known` are not read again.

    If the prefix belongs to another run, nothing below it counts: there are no results, and the run's prepare stage reports the owner.
    Raises `StoreUnavailable` or `DamagedObject`; then nothing is known, and `Observed.storage_problem` says so. Whatever a store answers,
    this ends with the run's last round, and keeps at most `RUN_BYTES`.
    """
    results = known or Results()
    if not results.records and await read_owner(store) != owner_of(run):
        return Results()
    records, size = dict(results.records), results.size
    # An evaluation may end during the next round, up to its publish, which waits for it: the previous round is still read. Without
    # training, nothing waits for the one of round 0.
    first = max(0, results.newest_round - 1)
    for number in (*([0] if first and run.spec.evaluation.initial else []), *range(first, run.spec.rounds + 1)):
        missing = [stage for stage in KINDS if (number, stage) not in records and stage in (_ROUND_0 if number == 0 else _ROUND)]
        found = await asyncio.gather(*(read_result(store, number, KINDS[stage]) for stage in missing))
        new = {(number, stage): _planned_by(record) for stage, record in zip(missing, found, strict=True) if record is not None}
        records.update(new)
        size += sum(len(record.model_dump_json()) for record in new.values())
        if size > RUN_BYTES:
            problem = f"the results up to here have {size} bytes, where {RUN_BYTES} at most are expected"
            raise DamagedObject(layout.round_prefix(number), problem, "delete those that no stage of this run wrote")
        if not any(of == number for of, _ in records):
            break
    return Results(records, size)


def _planned_by(record: Result) -> Result:
    """Return a result without the lists that grow with tasks and steps, which no plan reads."""
    return record.model_copy(update=dict.fromkeys(_LISTS & type(record).model_fields.keys(), ()))


_ROUND_0 = ONCE | {StageName.EVALUATION}
_ROUND = frozenset(StageName) - ONCE
_LISTS = {"losses", "resolved_tasks", "unresolved_tasks"}
