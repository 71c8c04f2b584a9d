"""How an API server is reached: the same way for kopf's watches and for our own requests."""

import os
from collections.abc import Mapping, Sequence

import aiohttp
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config


class NoCluster(Exception):
    """No configuration says how to reach an API server."""


async def configuration() -> Configuration:
    """Return the configuration: in a pod its ServiceAccount (the token is read again as it rotates), otherwise `KUBECONFIG` or
    `~/.kube/config`.

    Raises `NoCluster`.
    """
    settings = Configuration()
    try:
        load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # the library's
    except ConfigException as in_cluster:
        try:
            # Passed explicitly, because the library reads the variable when it is imported.
            await load_kube_config(  # type: ignore[no-untyped-call]  # the library's
                os.environ.get("KUBECONFIG"), client_configuration=settings, persist_config=False
            )
        except (ConfigException, OSError) as error:
            remedy = "run in a pod with a ServiceAccount, or set KUBECONFIG"
            raise NoCluster(f"{in_cluster} {error}: {remedy}") from error
    return settings


async def authorization(settings: Configuration) -> dict[str, str]:
    """Return the header that authenticates a request; empty with client certificates."""
    token = await settings.get_api_key_with_prefix("BearerToken", alias="authorization")
    return {"Authorization": token} if token else {}


def session(
    settings: Configuration,
    agent: str = "dagger-operator",
    *,
    headers: Mapping[str, str] | None = None,
    traces: Sequence[aiohttp.TraceConfig] = (),
) -> aiohttp.ClientSession:
    """Return an HTTP session; `agent` identifies the client in the API server's log."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=RESTClientObject(settings).ssl_context),
        headers={"User-Agent": agent, **(headers or {})},
        proxy=settings.proxy,
        trace_configs=list(traces),
        read_bufsize=1 << 21,  # a pod in a watch may be longer than a line that aiohttp reads by default
    )
