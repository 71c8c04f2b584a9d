"""What many runs cost together: clients of storage, reads of what is only shown, and looks that nothing asks for."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable

from dagger_operator.api import DAggerRun
from dagger_operator.cluster import stores
from dagger_operator.cluster.reconcile import paced
from dagger_operator.cluster.stores import Stores
from dagger_operator.store.objects import Store
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.progress import report
from dagger_operator.store.results import PrepareResult, StageProgress, save_result


async def test_runs_of_one_bucket_share_a_client_and_runs_of_another_server_do_not(make_run: Callable[..., DAggerRun]) -> None:
    opened = Stores(None)  # type: ignore[arg-type]  # no Secret is read here
    here = [make_run(f"run-{number}", url=f"s3://bucket/run-{number}", region="here") for number in range(3)]
    there = make_run("there", url="s3://bucket/there", region="here", endpointUrl="https://s3.example")
    keys = [stores.RunKey("lab", run.metadata.name) for run in (*here, there)]
    backends = [(await opened._opened(key, run)).store._backend for key, run in zip(keys, (*here, there), strict=True)]
    assert backends[0] is backends[1] is backends[2]
    assert backends[3] is not backends[0]
    await opened.close()


async def test_a_server_costs_threads_for_as_long_as_a_run_uses_it(make_run: Callable[..., DAggerRun]) -> None:
    opened, before = Stores(None), threading.active_count()  # type: ignore[arg-type]  # no Secret is read here
    for number in range(20):
        run = make_run("demo", endpointUrl=f"https://server-{number}.example")
        await opened.read(run)
        opened.forget(stores.RunKey("lab", "demo"))
        del run
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before + stores._THREADS and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert threading.active_count() <= before + stores._THREADS
    await opened.close()


def test_what_only_time_asks_for_comes_later_in_a_large_fleet_and_what_is_awaited_does_not() -> None:
    assert paced(10.0, runs=500, dice=0) == 10.0
    assert paced(10.0, runs=1000, dice=0) == 20.0
    assert paced(3600.0, runs=1000, dice=0) == 3600.0
    assert paced(2.0, runs=1000, dice=0.5) == 2.0
    assert paced(None, runs=1000, dice=0) is None


def test_runs_that_were_made_together_are_not_looked_at_together_for_ever() -> None:
    assert {paced(10.0, runs=1, dice=dice) for dice in (0.0, 0.5, 1.0)} == {10.0, 8.5, 7.0}


async def test_progress_of_many_runs_is_read_now_and_then_and_their_results_at_every_look(make_run: Callable[..., DAggerRun]) -> None:
    opened, run = Stores(None), make_run("demo")  # type: ignore[arg-type]  # no Secret is read here
    store = Store.open(run.spec.storage)
    await take_prefix(store, run)

    async def seen(done: int) -> list[int]:
        await report(store, 0, "prepare", 0, StageProgress(done=done, total=9, unit="files"))
        _, progress = await opened.read(run)
        return [one.done for workers in progress.values() for one in workers.values()]

    assert await seen(1) == [1]
    for number in range(int(stores.PROGRESS_A_SECOND) * 100):
        key = stores.RunKey("lab", f"other-{number}")
        opened._open[key] = opened._open[stores.RunKey("lab", "demo")]
    opened._open[stores.RunKey("lab", "demo")].progress_due = float("-inf")
    assert await seen(2) == [2]
    assert await seen(3) == [2], "it is not due again for a hundred seconds"
    await save_result(store, 0, PrepareResult(policy="r000-base", teacher="t"))
    results, progress = await opened.read(run)
    assert results.has(0, "prepare")
    assert not progress, "what the step before reported is over"
