"""The check tells stores that keep conditional writes from those that only say so."""

import asyncio

import pytest

from dagger_operator.store.check import check, require_honest
from dagger_operator.store.objects import Object, ObjectInfo, Store
from dagger_operator.store.stage import StageFailure


async def test_an_honest_store_passes_and_is_left_empty(store: Store) -> None:
    report = await check(store, rounds=5, writers=8)
    assert report.honest, str(report)
    assert report.races == 5 and report.updates >= 5 and report.round_trip_seconds > 0
    assert "honours conditional writes" in str(report)
    assert await store.list() == []
    assert (await require_honest(store)).honest


class Ignoring(Store):
    """Takes the conditions and ignores them, as some S3-compatible servers do."""

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        await self.put(key, data)
        return await self.get(key) or Object(data, "")


class CheckThenAct(Store):
    """Checks the condition, and writes a moment later: versitygw before 1.8.0."""

    async def swap(self, key: str, data: bytes, expected: Object | None) -> Object | None:
        there = await self.get(key)
        if (there and there.etag) != (expected and expected.etag):
            return None
        await asyncio.sleep(0.01)
        await self.put(key, data)
        return await self.get(key)


class Lagging(Store):
    """Lists what was there a while ago."""

    async def list(self, prefix: str = "") -> list[ObjectInfo]:
        return (await super().list(prefix))[:-1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Ignoring, "ignores If-None-Match"), (CheckThenAct, "not exactly one winner"), (Lagging, "listings lag behind")],
)
async def test_a_store_that_only_says_so_is_refused_in_words(store: Store, kind: type[Store], words: str) -> None:
    lying = kind(store._backend, store.url, scheme=store._scheme, prefix=store._prefix, folder=store._folder)
    report = await check(lying, rounds=5, writers=8)
    assert not report.honest and words in str(report)
    with pytest.raises(StageFailure, match="StorageNotHonest"):
        await require_honest(lying)
