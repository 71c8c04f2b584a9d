"""The API server requests that a worker needs: its sandbox pods and their watch, `exec` into them, and Leases."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from enum import StrEnum
from typing import Self

import aiohttp

from dagger_operator.kube.api import Api, Manifest, segment
from dagger_operator.kube.connection import NoCluster, configuration, session
from dagger_operator.kube.errors import Conflict, Missing, Refused


class Kind(StrEnum):
    """Paths of the two kinds, within a namespace."""

    PODS = "/api/v1/namespaces/{}/pods"
    LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"


class Kube:
    """Client for one namespace. All methods raise `ApiError`."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api, self.namespace = api, namespace

    @classmethod
    @asynccontextmanager
    async def connect(cls, namespace: str) -> AsyncIterator[Self]:
        """Connect as this pod's ServiceAccount, or outside a cluster as `KUBECONFIG` says."""
        try:
            settings = await configuration()
        except NoCluster as error:
            raise Refused("connecting", 0, "NoCluster", str(error)) from error
        async with session(settings, "dagger-operator-worker") as http:
            yield cls(Api(settings, http), namespace)

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Create an object. Raises `Conflict` if the name is taken."""
        return await self._api.ask("POST", self._path(kind), body=manifest)

    async def get(self, kind: Kind, name: str) -> Manifest:
        return await self._api.ask("GET", self._path(kind, name))

    async def replace(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Replace an object; `metadata.resourceVersion` is a precondition."""
        return await self._api.ask("PUT", self._path(kind, manifest["metadata"]["name"]), body=manifest)

    async def delete(self, kind: Kind, manifest: Manifest, *precise: str) -> bool:
        """Delete exactly this object, and no later one of the same name. Return False if it was already gone.

        `precise`: further metadata fields that must be unchanged, such as `resourceVersion`; False as well if one has changed.
        """
        metadata = manifest["metadata"]
        preconditions = {field: metadata[field] for field in ("uid", *precise)}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", "preconditions": preconditions}
        try:
            await self._api.ask("DELETE", self._path(kind, metadata["name"]), body=body)
        except (Missing, Conflict):
            return False
        return True

    async def list(self, kind: Kind, selector: str) -> tuple[list[Manifest], str]:
        """Return all objects with these labels, and the resourceVersion of the list."""
        found = await self._api.ask("GET", self._path(kind), query={"labelSelector": selector})
        return list(found.get("items") or ()), found["metadata"]["resourceVersion"]

    def watch(self, kind: Kind, selector: str, version: str) -> AsyncIterator[tuple[str, Manifest]]:
        """Watch objects with these labels from a resourceVersion on; see `Api.watch`."""
        return self._api.watch(self._path(kind), {"labelSelector": selector}, version)

    def exec(self, pod: str, container: str, *command: str) -> AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open a websocket to a program started in a pod: binary messages, the first byte is the stream (0 in, 1 out, 2 err, 3 status)."""
        query = [("container", container), *(("command", word) for word in command)]
        query += [("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        return self._api.websocket(f"{self._path(Kind.PODS, pod)}/exec", query, "v5.channel.k8s.io", "v4.channel.k8s.io")

    def _path(self, kind: Kind, name: str = "") -> str:
        return kind.format(segment(self.namespace)) + (f"/{segment(name)}" if name else "")
