"""Clearing the sandbox namespace: what cannot be decided or removed is kept, named, and in nobody's way."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from dagger_operator.api import DAggerRun
from dagger_operator.cluster import reaper as module
from dagger_operator.cluster.apply import Applier
from dagger_operator.cluster.cache import Cache, Id
from dagger_operator.cluster.reaper import GRACE, Reaper
from dagger_operator.kube.errors import ApiError, error_of
from fixtures.objects import Objects, Place

Json = dict[str, Any]
DAY = 86400.0


def made(kind: str, name: str, run_namespace: str = "lab", run: str = "gone") -> Json:
    labels = {"dagger-operator.dev/run": run, "dagger-operator.dev/run-namespace": run_namespace}
    api_version = {"Lease": "coordination.k8s.io/v1", "RoleBinding": "rbac.authorization.k8s.io/v1"}[kind]
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": "sandboxes", "labels": labels}}


@pytest.fixture
def objects() -> Objects:
    """Two bindings of runs that are gone, and two Leases of one that is there, which nobody renews."""
    held = Objects()
    held.put({"apiVersion": "dagger-operator.dev/v1alpha1", "kind": "DAggerRun", "metadata": {"name": "there", "namespace": "lab"}})
    leases = (made("Lease", name, run="there") for name in ("a", "b"))
    for one in (made("RoleBinding", "a", "theirs"), made("RoleBinding", "b"), *leases):
        held.put(one)
    return held


def reaper(objects: Any) -> Reaper:
    looks = iter([0.0, 61.0, 61.0 + GRACE])
    return Reaper("sandboxes", Cache(), objects, lambda key: None, looks.__next__)


def left(objects: Objects) -> set[tuple[str, str]]:
    return {(kind, name) for kind, _, name in objects.there if kind != "DAggerRun"}


FORBIDDEN = (403, {"reason": "Forbidden", "message": "the operator cannot get daggerruns in theirs"})
NO_WEBHOOK = (500, {"reason": "InternalError", "message": "failed calling webhook"})


@pytest.mark.parametrize("said", [FORBIDDEN, NO_WEBHOOK], ids=["it may not", "a webhook is down"])
@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("get", ("DAggerRun", "theirs", "gone")),
        ("delete", ("RoleBinding", "sandboxes", "a")),
        ("delete", ("Lease", "sandboxes", "a")),
    ],
)
async def test_what_it_may_not_decide_or_remove_is_kept_and_named_and_stops_nothing(
    objects: Objects, said: tuple[int, Json], verb: str, place: Place
) -> None:
    def fault(asked: str, of: Place) -> None:
        if (asked, of) == (verb, place):
            raise error_of(asked, *said)

    objects.fault = fault
    one = reaper(objects)
    with capture_logs() as logs:
        for _ in range(3):
            await one.reap()
    kept = ("Lease" if place[0] == "Lease" else "RoleBinding", "a")
    assert left(objects) == {kept}
    told = [log for log in logs if log["event"] == "not cleared"]
    assert told
    assert {(log["kind"], log["namespace"], log["name"]) for log in told} == {(kept[0], "sandboxes", "a")}
    assert all(said[1]["message"] in log["error"] and "delete" in log["remedy"] for log in told)


async def test_leases_go_first_since_their_pods_cost_something(objects: Objects) -> None:
    order: list[str] = []
    objects.fault = lambda verb, place: order.append(place[0]) if verb == "delete" else None
    one = reaper(objects)
    objects.there = {place: one for place, one in objects.there.items() if place[0] != "RoleBinding"}
    await one.reap()
    await one.reap()
    objects.put(made("RoleBinding", "b"))
    await one.reap()
    assert order == ["Lease", "Lease", "RoleBinding"]


async def test_a_lease_goes_with_its_run_however_often_it_is_renewed(objects: Objects) -> None:
    """A worker that was taken over, and its like, may renew it for as long as they run."""
    one = reaper(objects)
    for _ in range(3):
        objects.put(made("Lease", "of a run that is gone"))
        objects.put(made("Lease", "a", run="there"))
        await one.reap()
    assert left(objects) == {("Lease", "a")}


async def test_an_api_server_that_is_away_ends_the_look(objects: Objects) -> None:
    def away(verb: str, place: Place) -> None:
        if verb == "get":
            raise error_of(verb, 429, {})

    objects.fault = away
    with pytest.raises(ApiError):
        await reaper(objects).reap()
    assert left(objects) == {("RoleBinding", "a"), ("RoleBinding", "b"), ("Lease", "a"), ("Lease", "b")}


def binding(name: str, account: str) -> Json:
    return made("RoleBinding", name, run="there") | {"subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "lab"}]}


async def test_a_binding_goes_with_the_account_that_it_binds_and_its_run_is_asked_whether_it_wants_it_again(objects: Objects) -> None:
    """Who makes an account of that name later has no right to run commands in sandboxes by it."""
    objects.there = {place: one for place, one in objects.there.items() if place[0] == "DAggerRun"}
    objects.put({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "theirs", "namespace": "lab"}})
    cache, woken = Cache(), []
    odd = made("RoleBinding", "odd", run="there")
    for one in (binding("of workers that ended", "there-worker"), binding("of an account of its user", "theirs"), odd):
        cache.put(objects.put(one))
    watched = {"name": "known", "namespace": "lab", "uid": "k", "resourceVersion": "1"}
    cache.put({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": watched})
    objects.put(binding("of workers at work", "known"))
    asked: list[Place] = []
    objects.fault = lambda verb, place: asked.append(place) if verb == "get" else None
    looks: Any = objects
    reaper = Reaper("sandboxes", cache, looks, woken.append)
    assert await reaper.reap() == 1
    assert {name for _, name in left(objects)} == {"of an account of its user", "odd", "of workers at work", "theirs"}
    assert ("ServiceAccount", "lab", "known") not in asked, "what is watched is not asked for"
    assert woken == [("lab", "there")]
    assert cache.get(Id("RoleBinding", "sandboxes", "of workers that ended")) is None, "so the next plan that asks for it makes it"
    assert await reaper.reap() == 0


async def test_a_binding_that_somebody_edited_is_put_right(objects: Objects, make_run: Callable[..., DAggerRun]) -> None:
    """Bindings are not watched. A subject that somebody adds may run commands in sandboxes."""
    objects.put({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "there-worker", "namespace": "lab"}})
    cache, woken, run = Cache(), list[Any](), make_run("there")
    planned = binding("lab.there.worker", "there-worker")
    planned["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "dagger-operator"
    client: Any = objects
    applier, reaper = Applier(client, cache), Reaper("sandboxes", cache, client, woken.append)
    await applier.apply(run, planned)
    await reaper.reap()
    assert woken == [], "it is as it was applied"

    stranger = {"kind": "ServiceAccount", "name": "stranger", "namespace": "lab"}
    made = objects.there["RoleBinding", "sandboxes", "lab.there.worker"]
    objects.put({**made, "subjects": [*made["subjects"], stranger]})
    await reaper.reap()
    assert woken == [("lab", "there")]
    await applier.apply(run, planned)
    assert objects.there["RoleBinding", "sandboxes", "lab.there.worker"]["subjects"] == planned["subjects"]
    await reaper.reap()
    assert woken == [("lab", "there")], "our own write is no news"


async def test_whatever_is_written_there_ends_no_operator(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.001)
    objects.put(made("Lease", "odd", run="there") | {"spec": {"leaseDurationSeconds": "long"}})
    reaping = asyncio.create_task(Reaper("sandboxes", Cache(), objects, lambda key: None).run())  # type: ignore[arg-type]  # as Client
    await asyncio.sleep(0.05)
    assert not reaping.done()
    del objects.there["Lease", "sandboxes", "odd"]
    async with asyncio.timeout(10):
        while not reaping.done() and ("RoleBinding", "b") in left(objects):
            await asyncio.sleep(0.001)
    assert not reaping.done()
    reaping.cancel()
