"""How often a server's nodes were begun anew is told by Events alone."""

from collections.abc import AsyncIterator
from typing import Any, cast

from dagger_operator.cluster.client import Client
from dagger_operator.cluster.groups import begun_anew
from dagger_operator.kube.errors import Unavailable

Json = dict[str, Any]


def group(condition: str) -> Json:
    told = [{"type": condition, "status": "True", "lastTransitionTime": "2026-01-01T02:00:00Z"}]
    return {"kind": "LeaderWorkerSet", "metadata": {"name": "teacher", "namespace": "lab"}, "status": {"conditions": told}}


def event(time: str, replica: int, start: str) -> Json:
    first = {"name": f"teacher-{replica}", "uid": start}
    return {"reason": "RecreateGroup", "message": f"{start} ended", "eventTime": f"2026-01-01T{time}.500000Z", "related": first}


class Server:
    def __init__(self, *events: Json, away: bool = False) -> None:
        self.events, self.away = events, away
        self.asked: list[str] = []

    async def messages(self, *objects: Json) -> dict[str, list[str]]:
        found = await begun_anew(cast("Client", self), objects)
        return {name: [failure.message for failure in failures] for name, failures in found.items()}

    async def list(self, *_: str, **query: str) -> AsyncIterator[Json]:
        self.asked.append(query["fieldSelector"])
        if self.away:
            raise Unavailable("listing Events", 503, "Unavailable", "down")
        for one in self.events:
            yield one


async def test_starts_since_it_was_last_available_are_counted_of_the_replica_that_has_most() -> None:
    server = Server(
        event("02:00:09", 1, "c"),
        event("01:59:59", 1, "a"),
        event("02:00:00", 1, "b"),
        event("02:00:10", 1, "c"),
        event("02:00:20", 0, "d"),
    )
    assert await server.messages(group("Progressing")) == {"teacher": ["b ended", "c ended"]}
    assert server.asked == ["involvedObject.kind=LeaderWorkerSet,involvedObject.name=teacher,reason=RecreateGroup"]


async def test_nobody_is_asked_about_a_group_that_is_available_nor_about_what_is_no_group() -> None:
    server = Server(event("02:00:09", 1, "c"))
    assert await server.messages(group("Available"), {"kind": "Deployment", "metadata": {"name": "student"}}) == {}
    assert server.asked == []


async def test_where_events_cannot_be_read_an_explanation_is_missing_and_no_more() -> None:
    assert await Server(away=True).messages(group("Progressing")) == {"teacher": []}
