"""What is watched is what the cluster has."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, cast

import kopf
import pytest

from dagger_operator.cluster.cache import Cache, RunKey
from dagger_operator.cluster.client import Client
from dagger_operator.cluster.settings import Settings
from dagger_operator.cluster.watches import NewKind, Watches
from dagger_operator.kube.errors import Unavailable
from fixtures.objects import Objects, Place


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


async def test_kopf_keeps_nothing_of_an_object_beside_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    async def operator(**settings: Any) -> None:
        given.update(settings)

    monkeypatch.setattr(kopf, "operator", operator)
    client = cast("Client", Server())
    await Watches(Settings.read({}), Cache(), client, wake=lambda _: None, gone=lambda _: None, heard=lambda *_: None).run()
    await given["memories"].recall({"metadata": {"uid": "u"}}, noticed_by_listing=True, memobase=kopf.Memo())
    assert list(given["memories"].iter_all_memories()) == []


@pytest.mark.parametrize(
    ("becomes", "known"),
    [("unlabelled", ["Job"]), ("gone", []), ("not to be asked for", [])],
)
async def test_what_left_a_watch_is_known_on_where_it_only_lost_the_label_that_is_watched(becomes: str, known: list[str]) -> None:
    objects, cache, woken = Objects(), Cache(), list[RunKey]()
    metadata = {"name": "demo-r001-rollout-x", "namespace": "lab", "labels": {"dagger-operator.dev/run": "demo", "watched": "yes"}}
    made = objects.put({"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata})
    cache.put(made)
    later = objects.put({**made, "metadata": {**made["metadata"], "labels": {"dagger-operator.dev/run": "demo"}}})
    told = {**made, "metadata": {**made["metadata"], "resourceVersion": later["metadata"]["resourceVersion"]}}
    if becomes == "gone":
        objects.there.clear()
    objects.fault = away if becomes == "not to be asked for" else objects.fault
    client = cast("Client", objects)
    watches = Watches(Settings.read({}), cache, client, wake=woken.append, gone=lambda _: None, heard=lambda *_: None)
    heard: Callable[..., Any] = watches._handler("batch/v1", "Job")
    await heard(event={"type": "DELETED", "object": told})
    assert [one["kind"] for one in cache.children(RunKey("lab", "demo"))] == known
    assert woken == [("lab", "demo")], "its run is to put the label back, or the object"


async def test_what_cannot_be_measured_is_known_all_the_same() -> None:
    cache, woken = Cache(), list[RunKey]()

    def heard(*_: Any) -> None:
        raise KeyError("lastTransitionTime")

    client = cast("Client", Objects())
    watches = Watches(Settings.read({}), cache, client, wake=woken.append, gone=lambda _: None, heard=heard)
    handler: Callable[..., Any] = watches._handler("batch/v1", "Job")
    metadata = {"name": "a", "namespace": "lab", "uid": "a", "resourceVersion": "1", "labels": {"dagger-operator.dev/run": "demo"}}
    with pytest.raises(KeyError):  # kopf logs it
        await handler(event={"type": "ADDED", "object": {"metadata": metadata}})
    assert woken == [("lab", "demo")]
    assert cache.count("Job") == 1


def away(verb: str, place: Place) -> None:
    raise Unavailable(verb, 503, "Unavailable", "down")
