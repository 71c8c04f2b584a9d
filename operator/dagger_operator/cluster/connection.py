"""How an API server is reached: one way for kopf's watches and for our own requests."""

from collections.abc import Sequence

import aiohttp
import kopf
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config


class NoCluster(Exception):
    """Nothing says how to reach an API server."""


async def configuration() -> Configuration:
    """In a pod its ServiceAccount (the token is read anew while it rotates), else `KUBECONFIG` or `~/.kube/config`.

    Raises `NoCluster`.
    """
    settings = Configuration()
    try:
        load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]  # the library's
    except ConfigException as in_cluster:
        try:
            await load_kube_config(  # type: ignore[no-untyped-call]  # the library's
                client_configuration=settings, persist_config=False
            )
        except (ConfigException, OSError) as error:
            remedy = "run in a pod with a ServiceAccount, or set KUBECONFIG"
            raise NoCluster(f"{in_cluster} {error}: {remedy}") from error
    return settings


async def authorization(settings: Configuration) -> dict[str, str]:
    """The header that authenticates a request; empty with client certificates."""
    token = await settings.get_api_key_with_prefix("BearerToken", alias="authorization")
    return {"Authorization": token} if token else {}


def session(settings: Configuration, headers: dict[str, str], traces: Sequence[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
    context = RESTClientObject(settings).ssl_context
    connector = aiohttp.TCPConnector(limit=0, ssl=context)
    return aiohttp.ClientSession(
        connector=connector,
        headers={"User-Agent": "dagger-operator", **headers},
        proxy=settings.proxy,
        trace_configs=list(traces),
    )


async def kopf_session(traces: Sequence[aiohttp.TraceConfig]) -> kopf.AiohttpSession:
    """Called by kopf whenever it needs to log in: at the start, and after its token expired."""
    settings = await configuration()
    return kopf.AiohttpSession(
        server=settings.host, aiohttp_session=session(settings, await authorization(settings), traces), default_namespace="default"
    )
