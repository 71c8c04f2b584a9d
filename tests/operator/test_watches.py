"""What is watched is what the cluster has."""

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import kopf
import pytest

from dagger_operator.cluster.cache import Cache
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.watches import NewKind, Watches
from dagger_operator.kube.errors import Unavailable


class Server:
    def __init__(self, **served: str) -> None:
        self.kinds, self.away = served, False

    async def served(self, api_version: str) -> Mapping[str, str]:
        if self.away:
            raise Unavailable("looking", 503, "Unavailable", "down")
        return self.kinds


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    async def for_ever(**_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(kopf, "operator", for_ever)


async def test_a_kind_that_comes_later_ends_this_life_so_that_the_next_one_watches_it(opened: None) -> None:
    server = Server()
    client = cast("Client", server)
    watches = Watches(Settings.read({}), Cache(), client, wake=lambda _: None, gone=lambda _: None, heard=lambda *_: None)
    running = asyncio.create_task(watches.run())
    looking = asyncio.create_task(watches.outgrow(every=0.001))
    await asyncio.sleep(0)  # the watches are opened
    server.away = True
    await asyncio.sleep(0.05)
    server.away = False
    await asyncio.sleep(0.05)
    assert not looking.done()
    server.kinds = {"LeaderWorkerSet": "leaderworkersets"}
    with pytest.raises(NewKind, match="LeaderWorkerSet"):
        await asyncio.wait_for(looking, 5)
    running.cancel()
