"""The few requests that the operator makes, in Kubernetes' own terms: manifests in, manifests out, typed errors.

Generic: any kind is found by discovery, so a new kind of object in a plan needs no change here.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any, Self

import aiohttp

from dagger_operator.kube.api import Api, Manifest, segment
from dagger_operator.kube.connection import configuration, session
from dagger_operator.kube.errors import Missing

FIELD_MANAGER = "dagger-operator"
_PAGE = 500


class Client:
    def __init__(self, api: Api, fence: Callable[[], float] = lambda: inf) -> None:
        self._api, self._fence = api, fence
        self._kinds: dict[str, dict[str, str]] = {}

    @classmethod
    @asynccontextmanager
    async def connect(cls, traces: Sequence[aiohttp.TraceConfig] = ()) -> AsyncIterator[Self]:
        """Connect to the cluster. Raises `NoCluster`."""
        settings = await configuration()
        async with session(settings, traces=traces) as http:
            yield cls(Api(settings, http))

    def fenced(self, fence: Callable[[], float]) -> Self:
        """Return a client that calls `fence` before every write; it raises if this process may no longer write, and otherwise returns the
        seconds within which the write has to be sent."""
        return type(self)(self._api, fence)

    async def get(self, api_version: str, kind: str, namespace: str, name: str) -> Manifest:
        """Return an object. Raises `Missing`."""
        return await self._ask("GET", await self._path(api_version, kind, namespace, name))

    async def list(self, api_version: str, kind: str, namespace: str, **query: str) -> AsyncIterator[Manifest]:
        """Yield the objects of a kind, read in pages, from all namespaces if `namespace` is empty; `query` as in the API: `labelSelector`,
        `fieldSelector`."""
        path = await self._path(api_version, kind, namespace)
        page: dict[str, str] = {"limit": str(_PAGE), **query}
        while True:
            found = await self._ask("GET", path, query=page)
            for item in found.get("items") or ():
                yield {"apiVersion": api_version, "kind": kind, **item}
            if not (more := (found.get("metadata") or {}).get("continue")):
                return
            page["continue"] = more

    async def apply(self, manifest: Mapping[str, Any], subresource: str = "", *, dry_run: bool = False) -> Manifest:
        """Server-side apply: what we stated before and no longer state is removed, and what others changed is changed back.

        A uid or resourceVersion in the manifest is a precondition: `Conflict` if the object is another one now. Quotas and admission treat
        a `dry_run` in the same way, and it changes nothing.
        """
        path = await self._path(manifest["apiVersion"], manifest["kind"], *_place(manifest))
        path += f"/{subresource}" if subresource else ""
        query = {**_as_us(dry_run), "force": "true"}
        return await self._ask("PATCH", path, query=query, body=manifest, content="application/apply-patch+yaml")

    async def create(self, manifest: Mapping[str, Any]) -> Manifest:
        """Create an object. Raises `Conflict` if the name is taken."""
        namespace, _ = _place(manifest)
        path = await self._path(manifest["apiVersion"], manifest["kind"], namespace)
        return await self._ask("POST", path, query={"fieldManager": FIELD_MANAGER}, body=manifest)

    async def patch(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> Manifest:
        """Merge the manifest into the object."""
        path = await self._path(manifest["apiVersion"], manifest["kind"], *_place(manifest))
        return await self._ask("PATCH", path, query=_as_us(dry_run), body=manifest, content="application/merge-patch+json")

    async def replace(self, manifest: Mapping[str, Any]) -> Manifest:
        """Replace an object. `metadata.resourceVersion` is a precondition: `Conflict` if the object changed since."""
        path = await self._path(manifest["apiVersion"], manifest["kind"], *_place(manifest))
        return await self._ask("PUT", path, query={"fieldManager": FIELD_MANAGER}, body=manifest)

    async def delete(
        self, api_version: str, kind: str, namespace: str, name: str, *, preconditions: Mapping[str, str], propagation: str = "Foreground"
    ) -> Manifest | None:
        """Delete an object; return it if it is not gone at once. A missing object is no error; `Conflict` if `uid` or `resourceVersion`
        differs."""
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation, "preconditions": dict(preconditions)}
        try:
            answer = await self._ask("DELETE", await self._path(api_version, kind, namespace, name), body=body)
        except Missing:
            return None
        return answer if answer.get("kind") == kind else None

    async def served(self, api_version: str) -> Mapping[str, str]:
        """Return plurals by kind of a group and version; empty if the cluster does not serve it. Cached once found."""
        if not self._kinds.get(api_version):
            path = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
            try:
                found = await self._ask("GET", path)
            except Missing:
                return {}
            self._kinds[api_version] = {one["kind"]: one["name"] for one in found["resources"] if "/" not in one["name"]}
        return self._kinds[api_version]

    async def _path(self, api_version: str, kind: str, namespace: str, name: str = "") -> str:
        plural = (await self.served(api_version)).get(kind)
        if plural is None:
            raise Missing(f"looking for {kind}", 404, "KindNotInstalled", f"this cluster has no {kind} in {api_version}: install it")
        group = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
        place = f"/namespaces/{segment(namespace)}" if namespace else ""
        return f"{group}{place}/{segment(plural)}" + (f"/{segment(name)}" if name else "")

    async def _ask(
        self, verb: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None, content: str = "application/json"
    ) -> Manifest:
        within = inf if verb == "GET" else self._fence()
        return await self._api.ask(verb, path, query=query, body=body, content=content, within=within)


def _as_us(dry_run: bool) -> dict[str, str]:
    return {"fieldManager": FIELD_MANAGER, **({"dryRun": "All"} if dry_run else {})}


def _place(manifest: Mapping[str, Any]) -> tuple[str, str]:
    return manifest["metadata"]["namespace"], manifest["metadata"]["name"]
