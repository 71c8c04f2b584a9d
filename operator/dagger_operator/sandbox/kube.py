"""The few requests that a worker makes of the API server: its sandbox pods, their watch, `exec` into them, and Leases.

KubeError        the server answered, and not with what was asked for
└── Unreachable  it did not answer, or is too busy: nothing is known, try again
"""

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Any, Self

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

Manifest = dict[str, Any]

_TIMEOUT = aiohttp.ClientTimeout(total=30, connect=10)
_WATCH_SECONDS = 290
_SILENCE_SECONDS = 320.0


class KubeError(Exception):
    """`reason` is the API server's own, in CamelCase; `code` the HTTP status, 0 where there was no answer."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message
        super().__init__(f"{reason}: {message}")


class Unreachable(KubeError):
    pass


class Kind(StrEnum):
    """Paths of the two kinds, in a namespace."""

    PODS = "/api/v1/namespaces/{}/pods"
    LEASES = "/apis/coordination.k8s.io/v1/namespaces/{}/leases"


class Kube:
    """Speaks to one namespace."""

    def __init__(self, settings: Configuration, http: aiohttp.ClientSession, namespace: str) -> None:
        self._settings, self._http, self.namespace = settings, http, namespace

    @classmethod
    @asynccontextmanager
    async def connect(cls, namespace: str) -> AsyncIterator[Self]:
        """As this pod's ServiceAccount, elsewhere as `KUBECONFIG` says. Raises `KubeError`."""
        settings = Configuration()
        try:
            load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # the library's
        except ConfigException as in_cluster:
            try:
                # Named, because the library reads the variable when it is imported.
                await load_kube_config(  # type: ignore[no-untyped-call]  # the library's
                    os.environ.get("KUBECONFIG"), client_configuration=settings, persist_config=False
                )
            except (ConfigException, OSError) as error:
                remedy = "run in a pod with a ServiceAccount, or set KUBECONFIG"
                raise KubeError(0, "NoCluster", f"{in_cluster} {error}: {remedy}") from error
        connector = aiohttp.TCPConnector(limit=0, ssl=RESTClientObject(settings).ssl_context)
        # A pod in a watch may be longer than a line that aiohttp reads by itself.
        async with aiohttp.ClientSession(connector=connector, proxy=settings.proxy, read_bufsize=1 << 21) as http:
            yield cls(settings, http, namespace)

    async def create(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Raises `KubeError` with reason `AlreadyExists` where the name is taken."""
        return await self._ask("POST", self._path(kind), body=manifest)

    async def get(self, kind: Kind, name: str) -> Manifest:
        return await self._ask("GET", self._path(kind, name))

    async def replace(self, kind: Kind, manifest: Manifest) -> Manifest:
        """`metadata.resourceVersion` is a precondition."""
        return await self._ask("PUT", self._path(kind, manifest["metadata"]["name"]), body=manifest)

    async def delete(self, kind: Kind, manifest: Manifest, *precise: str) -> None:
        """Deletes this very object and no later one of its name; that it is gone already is fine.

        `precise`: further fields of its metadata that must not have changed, such as `resourceVersion`.
        """
        metadata = manifest["metadata"]
        preconditions = {field: metadata[field] for field in ("uid", *precise)}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background", "preconditions": preconditions}
        try:
            await self._ask("DELETE", self._path(kind, metadata["name"]), body=body)
        except KubeError as error:
            if error.code not in (404, 409):
                raise

    async def list(self, kind: Kind, selector: str) -> tuple[list[Manifest], str]:
        """All objects with these labels, and the resourceVersion at which that was so."""
        found = await self._ask("GET", self._path(kind), query={"labelSelector": selector})
        return list(found.get("items") or ()), found["metadata"]["resourceVersion"]

    async def watch(self, kind: Kind, selector: str, version: str) -> AsyncIterator[tuple[str, Manifest]]:
        """What happens to them from a resourceVersion on: (`ADDED`, `MODIFIED`, `DELETED` or `BOOKMARK`, object). Ends now and then.

        Raises `KubeError` with code 410 where that version is too old: list again.
        """
        query = {"labelSelector": selector, "watch": "true", "resourceVersion": version}
        query |= {"allowWatchBookmarks": "true", "timeoutSeconds": str(_WATCH_SECONDS)}
        timeout = aiohttp.ClientTimeout(total=None, connect=10, sock_read=_SILENCE_SECONDS)
        async with self._answer("GET", self._path(kind), query, None, timeout) as answer:
            if answer.status >= 400:
                raise _error(answer.status, await answer.read())
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _error(event["object"].get("code", 500), json.dumps(event["object"]).encode())
                yield event["type"], event["object"]

    @asynccontextmanager
    async def exec(self, pod: str, container: str, *command: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A websocket to a program started in a pod: binary messages, whose first byte is the stream (0 in, 1 out, 2 err, 3 status)."""
        query = [("container", container), *(("command", word) for word in command)]
        query += [("stdin", "true"), ("stdout", "true"), ("stderr", "true")]
        url = self._settings.host + self._path(Kind.PODS, pod) + "/exec"
        try:
            async with self._http.ws_connect(
                url,
                params=query,
                headers=await self._headers(),
                protocols=("v5.channel.k8s.io", "v4.channel.k8s.io"),
                max_msg_size=0,
                heartbeat=30,
            ) as socket:
                yield socket
        except aiohttp.WSServerHandshakeError as error:
            raise KubeError(error.status, "ExecRefused", f"exec into {pod}: {error.message}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(0, "Unreachable", f"exec into {pod}: {error or type(error).__name__}") from error

    def _path(self, kind: Kind, name: str = "") -> str:
        return kind.format(self.namespace) + (f"/{name}" if name else "")

    async def _headers(self) -> dict[str, str]:
        token = await self._settings.get_api_key_with_prefix("BearerToken", alias="authorization")
        headers = {"Accept": "application/json", "User-Agent": "dagger-operator-worker"}
        return {**headers, "Authorization": token} if token else headers

    @asynccontextmanager
    async def _answer(
        self, verb: str, path: str, query: Mapping[str, str] | None, body: Any, timeout: aiohttp.ClientTimeout
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {**await self._headers(), "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            async with self._http.request(
                verb, self._settings.host + path, params=query, data=data, headers=headers, timeout=timeout
            ) as answer:
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(0, "Unreachable", f"{verb} {path}: {error or type(error).__name__}") from error

    async def _ask(self, verb: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None) -> Manifest:
        async with self._answer(verb, path, query, body, _TIMEOUT) as answer:
            text = await answer.read()
        if answer.status >= 400:
            raise _error(answer.status, text)
        return dict(json.loads(text))


def _error(code: int, text: bytes) -> KubeError:
    try:
        status = json.loads(text)
    except ValueError:
        status = {"message": text.decode(errors="replace")[:500]}
    reason, message = str(status.get("reason") or f"HTTP{code}"), str(status.get("message") or "")
    if code == 403 and "exceeded quota" in message:
        reason = "QuotaExceeded"
    # 401: a token that is being rotated; the next request reads it anew.
    kind = Unreachable if code in (401, 408, 429) or code >= 500 else KubeError
    return kind(code, reason, message)
