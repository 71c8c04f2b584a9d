"""One prefix belongs to one run."""

import asyncio

import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.store import layout
from dagger_operator.store.objects import DamagedObject, Store
from dagger_operator.store.owner import read_owner, take_prefix
from dagger_operator.store.stage import StageFailure


def other(run: DAggerRun, **metadata: str) -> DAggerRun:
    return run.model_copy(update={"metadata": run.metadata.model_copy(update=metadata)})


async def test_a_run_takes_its_prefix_as_often_as_it_likes(store: Store, run: DAggerRun) -> None:
    assert await read_owner(store) is None
    assert await take_prefix(store, run) == await take_prefix(store, run) == await read_owner(store)


@pytest.mark.parametrize("metadata", [{"name": "b-run"}, {"namespace": "rivals"}, {"uid": "5678"}])
async def test_another_run_is_told_whose_prefix_it_is_and_what_to_do(store: Store, run: DAggerRun, metadata: dict[str, str]) -> None:
    await take_prefix(store, run)
    with pytest.raises(StageFailure, match=r"team/a-run \(uid 1234\).*storage\.url") as refused:
        await take_prefix(store, other(run, **metadata))
    assert refused.value.reason == "PrefixTaken" and refused.value.permanent


async def test_of_many_runs_one_gets_it(store: Store, run: DAggerRun) -> None:
    runs = [other(run, name=f"run-{number}") for number in range(8)]
    ends = await asyncio.gather(*(take_prefix(store, one) for one in runs), return_exceptions=True)
    assert sorted(type(end).__name__ for end in ends) == ["Owner"] + ["StageFailure"] * 7


async def test_a_garbled_owner_is_no_free_prefix(store: Store, run: DAggerRun) -> None:
    await store.put(layout.RUN, b"{}")
    with pytest.raises(DamagedObject, match=r"run\.json"):
        await take_prefix(store, run)
