"""Names become parts of paths, and never ways to other objects."""

from typing import Any

import pytest
from yarl import URL

from dagger_operator.cluster.client import Client
from dagger_operator.kube.errors import Refused
from dagger_operator.sandbox.kube import Kind, Kube

HOST = "https://server"


class Asked:
    """Stands for the API server: which paths it is asked for, as they go over the line."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    async def ask(self, verb: str, path: str, **_: Any) -> dict[str, Any]:
        if path == "/api/v1":
            return {"resources": [{"kind": "Secret", "name": "secrets"}, {"kind": "Pod", "name": "pods"}]}
        self.paths.append(URL(HOST + path).raw_path)
        return {"items": [], "metadata": {"resourceVersion": "1"}}


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.mark.parametrize("name", ["../../kube-system/secrets/admin", "a/../../b", "a?watch=true", "a#b", "a%2e%2e%2fb"])
async def test_whatever_a_name_holds_it_stays_in_its_place(asked: Any, name: str) -> None:
    await Client(asked).get("v1", "Secret", "lab", name)
    await Client(asked).get("v1", "Secret", name, "own")
    await Kube(asked, "lab").get(Kind.PODS, name)
    await Kube(asked, name).get(Kind.PODS, "own")
    for path, (before, after) in zip(
        asked.paths,
        [
            ("/api/v1/namespaces/lab/secrets/", ""),
            ("/api/v1/namespaces/", "/secrets/own"),
            ("/api/v1/namespaces/lab/pods/", ""),
            ("/api/v1/namespaces/", "/pods/own"),
        ],
        strict=True,
    ):
        assert path.startswith(before) and path.endswith(after)
        assert "/" not in path.removeprefix(before).removesuffix(after)


@pytest.mark.parametrize("name", [".", ".."])
async def test_what_every_path_would_resolve_is_never_asked_for(asked: Any, name: str) -> None:
    for asking in (Client(asked).get("v1", "Secret", "lab", name), Client(asked).get("v1", "Secret", name, "own")):
        with pytest.raises(Refused, match=r"names no object: write the object's own name"):
            await asking
    assert asked.paths == []


async def test_an_ordinary_name_is_left_as_it_is(asked: Any) -> None:
    await Client(asked).get("v1", "Secret", "lab", "lab.demo.worker-0")
    assert asked.paths == ["/api/v1/namespaces/lab/secrets/lab.demo.worker-0"]
