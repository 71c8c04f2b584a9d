"""Reading results: whose credentials are used, and a store that hangs."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dagger_operator.api import DAggerRun
from dagger_operator.cluster import stores
from dagger_operator.cluster.places import Places, sit
from dagger_operator.cluster.stores import Stores
from dagger_operator.store.objects import Store, StoreUnavailable
from dagger_operator.store.owner import take_prefix
from dagger_operator.store.results import PrepareResult, save_result
from fixtures.secrets import Secrets


async def _late_answers(read: Stores) -> None:
    """Until nothing is being read any more."""
    await asyncio.wait([one.reading for one in read._open.values() if one.reading is not None], timeout=20)


async def test_a_missing_secret_is_named_and_a_new_one_is_taken_at_once(make_run: Callable[..., DAggerRun]) -> None:
    secrets, run = Secrets(), make_run(secretRef={"name": "keys"})
    read = Stores(secrets)  # type: ignore[arg-type]  # as Secrets
    with pytest.raises(StoreUnavailable, match=r"Secret keys in namespace lab .* does not exist: create it"):
        await read.read(run)
    secrets.held["keys"] = ("1", {})
    results, _ = await read.read(run)
    assert results.records == {}


async def test_a_secret_that_cannot_be_decoded_is_named_with_its_key(make_run: Callable[..., DAggerRun]) -> None:
    class Broken(Secrets):
        async def get(self, *place: str) -> dict[str, Any]:
            return {"metadata": {"resourceVersion": "1"}, "data": {"AWS_REGION": "%"}}

    with pytest.raises(StoreUnavailable, match=r"Secret keys in namespace lab .* key AWS_REGION is not base64 .*: create the Secret"):
        await Stores(Broken()).read(make_run(secretRef={"name": "keys"}))  # type: ignore[arg-type]  # as Secrets


async def test_a_store_that_hangs_is_said_to_be_away_and_its_late_answer_is_not_taken_for_a_fresh_one(
    make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, hangs = make_run(), asyncio.Event()
    read, reads = Stores(Secrets()), 0  # type: ignore[arg-type]  # as Secrets
    real = stores._read

    async def slow(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        answer = await real(*arguments)
        await hangs.wait()
        return answer

    monkeypatch.setattr(stores, "_read", slow)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.05)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await read.read(run)
    assert reads == 1, "it is asked once at a time"
    store = Store.open(run.spec.storage)
    await take_prefix(store, run)
    await save_result(store, 0, PrepareResult(policy="r000-base", teacher="t"))
    hangs.set()
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 30.0)
    await asyncio.sleep(0.1)
    results, _ = await read.read(run)
    assert results.has(0, "prepare"), "the late answer was from before the result"
    assert reads == 2


async def test_a_store_that_was_away_holds_nobody_up_until_it_answers_in_time_again(
    make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read, real, answers = make_run(), Stores(Secrets()), stores._read, asyncio.Event()  # type: ignore[arg-type]  # as Secrets
    honest = False

    async def slow(*arguments: Any) -> Any:
        await answers.wait()
        if not honest:
            raise StoreUnavailable("a timeout")
        return await real(*arguments)

    async def look() -> Any:
        return await asyncio.wait_for(read.read(run), 20)

    monkeypatch.setattr(stores, "_read", slow)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(StoreUnavailable, match="did not answer"):
        await look()
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 3600.0)
    for _ in range(3):
        answers.set()
        await asyncio.sleep(0.05)
        with pytest.raises(StoreUnavailable, match="a timeout"):
            await look()
        answers.clear()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="a timeout"):
                await look()
    honest = True
    answers.set()
    await _late_answers(read)
    with monkeypatch.context() as patched:
        patched.setattr(stores, "GLANCE_SECONDS", 10.0)
        assert (await look())[0].records == {}
    answers.clear()
    patient = asyncio.create_task(look())
    await asyncio.sleep(3 * stores.GLANCE_SECONDS)
    answers.set()
    assert (await patient)[0].records == {}, "it is waited for as any other"


async def test_a_look_lets_others_work_while_it_waits_for_a_slow_store_and_only_then(
    make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, answers = make_run(), asyncio.Event()
    read, places = Stores(Secrets()), Places(1)  # type: ignore[arg-type]  # as Secrets
    real = stores._read

    async def slow(*arguments: Any) -> Any:
        await answers.wait()
        return await real(*arguments)

    async def look() -> None:
        sit(place)
        await read.read(run)

    place = await places.take()
    monkeypatch.setattr(stores, "AT_HAND_SECONDS", 3600.0)
    await asyncio.create_task(look())
    others = asyncio.create_task(places.take())
    await asyncio.sleep(0.01)
    assert not others.done()
    monkeypatch.setattr(stores, "_read", slow)
    monkeypatch.setattr(stores, "AT_HAND_SECONDS", 0.01)
    looking = asyncio.create_task(look())
    await asyncio.wait_for(others, 10)
    assert not looking.done()
    answers.set()
    await looking


async def test_a_server_that_hangs_is_waited_for_by_one_of_its_runs_and_briefly_by_the_others(
    make_run: Callable[..., DAggerRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real, answers = Stores(Secrets()), stores._read, asyncio.Event()  # type: ignore[arg-type]  # as Secrets

    async def slow(*arguments: Any) -> Any:
        await answers.wait()
        return await real(*arguments)

    async def look(name: str) -> Any:
        return await asyncio.wait_for(read.read(make_run(name)), 20)

    monkeypatch.setattr(stores, "_read", slow)
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(StoreUnavailable, match="did not answer"):
        await look("first")
    monkeypatch.setattr(stores, "PATIENCE_SECONDS", 3600.0)
    monkeypatch.setattr(stores, "WARY_SECONDS", 0.05)
    for name in ("second", "third"):
        with pytest.raises(StoreUnavailable, match="did not answer"):
            await look(name)
    answers.set()
    await _late_answers(read)
    monkeypatch.setattr(stores, "GLANCE_SECONDS", 10.0)
    assert (await look("second"))[0].records == {}
    monkeypatch.setattr(stores, "WARY_SECONDS", 0.0)
    answers.clear()
    patient = asyncio.create_task(look("fourth"))
    await asyncio.sleep(0.1)
    assert not patient.done(), "it answers in time again, so it is waited for as any other"
    answers.set()
    assert (await patient)[0].records == {}
