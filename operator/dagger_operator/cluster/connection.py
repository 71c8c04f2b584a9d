"""kopf's own connection to the API server, with the same configuration as ours."""

from collections.abc import Sequence

import aiohttp
import kopf

from dagger_operator.kube.connection import authorization, configuration, session


async def kopf_session(traces: Sequence[aiohttp.TraceConfig]) -> kopf.AiohttpSession:
    """Return a session; kopf calls this whenever it needs to log in: at the start, and after its token expired."""
    settings = await configuration()
    http = session(settings, headers=await authorization(settings), traces=traces)
    return kopf.AiohttpSession(server=settings.host, aiohttp_session=http, default_namespace="default")
