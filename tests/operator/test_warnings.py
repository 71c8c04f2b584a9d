"""Why an object lacks pods: what the API server said last, and nothing that is over."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from dagger_operator.cluster.client import Client
from dagger_operator.cluster.warnings import warnings_about
from dagger_operator.control import Trouble

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 2, tzinfo=UTC)


def ago(minutes: float) -> str:
    return (NOW - timedelta(minutes=minutes)).isoformat()


def job(*, spec: Json | None = None, **status: Any) -> Json:
    metadata = {"name": "work", "namespace": "lab", "uid": "j", "creationTimestamp": ago(60)}
    return {"kind": "Job", "metadata": metadata, "spec": {"parallelism": 2, **(spec or {})}, "status": status}


def group(replicas: int) -> Json:
    metadata = {"name": "teacher", "namespace": "lab", "uid": "g", "creationTimestamp": ago(60)}
    return {"kind": "LeaderWorkerSet", "metadata": metadata, "spec": {"replicas": replicas, "leaderWorkerTemplate": {"size": 2}}}


def pod(made: float, phase: str = "Running", *, maker: tuple[str, str] = ("Job", "work")) -> Json:
    owner = {"kind": maker[0], "name": maker[1], "uid": "o", "controller": True}
    return {"kind": "Pod", "metadata": {"creationTimestamp": ago(made), "ownerReferences": [owner]}, "status": {"phase": phase}}


def refusal(last: float, first: float | None = None, *, maker: tuple[str, str] = ("Job", "work")) -> Json:
    message = 'Error creating: pods "work-1" is forbidden: exceeded quota: gpus'
    return {
        "involvedObject": {"kind": maker[0], "name": maker[1]},
        "reason": "FailedCreate",
        "message": message,
        "firstTimestamp": ago(last if first is None else first),
        "lastTimestamp": ago(last),
    }


class Server:
    """Keeps Events, and counts how often they are asked for."""

    def __init__(self, *events: Json) -> None:
        self.events, self.asked = events, 0

    async def list(self, *_: str, **query: str) -> AsyncIterator[Json]:
        self.asked += 1
        for one in self.events:
            yield one

    async def about(self, one: Json, *pods: Json) -> Trouble | None:
        found = await warnings_about(cast("Client", self), [one], pods, NOW)
        return found.get((one["kind"], one["metadata"]["name"]))


async def test_a_pod_that_is_refused_is_told_of_beside_one_that_runs() -> None:
    trouble = await Server(refusal(1, 30)).about(job(active=1), pod(30))
    assert trouble is not None
    assert (trouble.reason, trouble.since) == ("QuotaExceeded", NOW - timedelta(minutes=30))


async def test_a_replacement_that_is_refused_is_told_of() -> None:
    trouble = await Server(refusal(1, 50)).about(job(failed=1), pod(30, "Failed"))
    assert trouble is not None
    assert (trouble.reason, trouble.since) == ("QuotaExceeded", NOW - timedelta(minutes=30)), "it was let have a pod since it began"


async def test_a_refusal_that_is_over_is_not_told_of() -> None:
    assert await Server(refusal(40)).about(job(failed=1), pod(50), pod(30, "Failed")) is None, "a pod was made after it"
    assert await Server(refusal(40)).about(job(startTime=ago(10))) is None, "the Job was suspended since"


@pytest.mark.parametrize(
    ("one", "pods"),
    [
        (job(active=2), ()),
        (job(active=1, terminating=1), ()),
        (job(active=1, succeeded=1), ()),
        (job(), (pod(10), pod(10))),
        (job(active=1), (pod(10), pod(0.05))),
        (job(spec={"suspend": True}), ()),
        (job(conditions=[{"type": "FailureTarget", "status": "True"}]), ()),
    ],
    ids=["all run", "one ends", "one is done", "not counted yet", "just made", "suspended", "failed"],
)
async def test_nothing_is_asked_about_a_job_that_lacks_no_pods(one: Json, pods: tuple[Json, ...]) -> None:
    server = Server(refusal(1))
    assert await server.about(one, *pods) is None
    assert server.asked == 0


async def test_a_group_lacks_nodes_by_what_is_said_of_the_stateful_sets_that_make_them() -> None:
    first, others = ("StatefulSet", "teacher"), ("StatefulSet", "teacher-0")
    refused, stranger = refusal(1, 20, maker=others), refusal(1, maker=("StatefulSet", "teacher-of-others"))
    trouble = await Server(refused, stranger).about(group(1), pod(30, maker=first))
    assert trouble is not None
    assert (trouble.reason, trouble.since) == ("QuotaExceeded", NOW - timedelta(minutes=20))
    assert await Server(stranger).about(group(1), pod(30, maker=first)) is None
    server = Server(refused)
    assert await server.about(group(1), pod(30, maker=first), pod(29, maker=others)) is None
    assert await server.about(group(0)) is None
    assert server.asked == 0
