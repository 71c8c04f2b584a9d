"""The reverse proxy in front of vLLM: the model's name in requests and answers is a policy version, and nothing else of vLLM is reachable.

Every token passes through it, so answers are forwarded as bytes; only the name in them is replaced.
"""

import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import web

from dagger_operator.serving.engine import SERVED_NAME, Engine
from dagger_operator.serving.gate import Gate, GateClosed
from dagger_operator.serving.metrics import AgentMetrics
from dagger_operator.serving.replica import Replica

LARGEST_REQUEST = 8 * 2**20
"""In bytes. A state of a million tokens has about 5 MB."""

_NOT_PASSED_ON = frozenset({"kv_transfer_params", "ec_transfer_params", "mm_processor_kwargs", "media_io_kwargs", "chat_template"})
"""vLLM parameters with effects beyond the request: other servers, files, the template that the policy is trained with."""
_NAME = f'"model":"{SERVED_NAME}"'.encode()
# Quotes inside a JSON string are escaped, so these bytes can only be a key with its value.
_ABORTED = b'"finish_reason":"abort"'
_LAST_EVENT = b"data: [DONE]"
_COME_BACK_SECONDS = "1"


class Proxy:
    """HTTP handlers of the agent."""

    def __init__(self, engine: Engine, gate: Gate, replica: Replica, metrics: AgentMetrics) -> None:
        self._engine, self._gate, self._replica, self._metrics = engine, gate, replica, metrics

    def application(self) -> web.Application:
        app = web.Application(client_max_size=LARGEST_REQUEST)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/policy", self._policy)
        app.router.add_get("/health/ready", self._ready)
        app.router.add_get("/health/server", self._server)
        app.router.add_get("/metrics", self._exposition)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        try:
            answer = await self._answered(request)
        except _Refused as refused:
            answer = refused.response()
        self._metrics.answered(answer.status)
        return answer

    async def _answered(self, request: web.Request) -> web.StreamResponse:
        body = await _body(request)
        try:
            with self._gate.passing() as version:
                if (asked := body.get("model")) != version:
                    raise _Refused(404, "model_not_found", f"model {asked!r} is not served here: this replica serves {version!r}")
                body["model"] = SERVED_NAME
                return await self._passed(request, body, version)
        except GateClosed:
            raise _Refused(503, "not_serving", f"no policy is served right now: {self._replica.reason or self._replica.state}") from None

    async def _passed(self, request: web.Request, body: Mapping[str, Any], version: str) -> web.StreamResponse:
        headers = {"Content-Type": "application/json"}
        if request_id := request.headers.get("X-Request-Id"):
            headers["X-Request-Id"] = request_id
        data = json.dumps(body, separators=(",", ":")).encode()
        try:
            async with self._engine.session.post("/v1/chat/completions", data=data, headers=headers) as upstream:
                if upstream.content_type == "text/event-stream":
                    return await _streamed(request, upstream, version)
                whole = await upstream.read()
        except (aiohttp.ClientError, OSError) as error:
            raise _Refused(503, "server_unavailable", f"vLLM went away: {type(error).__name__}") from None
        if _ABORTED in whole:
            raise _Refused(503, "server_unavailable", "vLLM ended before the turn did")
        return web.Response(body=_renamed(whole, version), status=upstream.status, content_type=upstream.content_type)

    async def _models(self, _: web.Request) -> web.Response:
        version = self._gate.version
        entry = {"id": version, "object": "model", "owned_by": "dagger-operator", "max_model_len": self._replica.max_model_len}
        return web.json_response({"object": "list", "data": [entry] if version else []})

    async def _policy(self, _: web.Request) -> web.Response:
        replica = self._replica
        serves = replica.serves
        return web.json_response(
            {
                "version": serves.version if serves else None,
                "digest": serves.digest if serves else None,
                "state": replica.state,
                "weights": replica.fingerprint,
                "max_model_len": replica.max_model_len,
                "reason": replica.reason,
            }
        )

    async def _ready(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self._replica.ready else 503, text=self._replica.reason or self._replica.state)

    async def _server(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if await self._replica.server_well() else 503, text=self._replica.reason or self._replica.state)

    async def _exposition(self, _: web.Request) -> web.Response:
        text = self._metrics.exposition()
        try:
            async with self._engine.session.get("/metrics", timeout=aiohttp.ClientTimeout(total=10)) as upstream:
                if upstream.status == 200:
                    text += await upstream.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass  # a server that is away has no metrics; the agent's own show that it is
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


class _Refused(Exception):
    """An error response in the format of the OpenAI API."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message
        super().__init__(message)

    def response(self) -> web.Response:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        headers = {"Retry-After": _COME_BACK_SECONDS} if self.status == 503 else None
        error = {"message": self.message, "type": kind, "param": None, "code": self.code}
        return web.json_response({"error": error}, status=self.status, headers=headers)


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise _Refused(413, "request_too_large", f"a request may have {LARGEST_REQUEST} bytes at most") from None
    except (ValueError, RecursionError):
        raise _Refused(400, "invalid_json", "the body is no JSON") from None
    if not isinstance(body, dict):
        raise _Refused(400, "invalid_json", "the body is no JSON object")
    if reaching := sorted(_NOT_PASSED_ON.intersection(body)):
        raise _Refused(400, "unsupported_parameter", f"{reaching[0]} is not passed on to the server: leave it out")
    return body


async def _streamed(request: web.Request, upstream: aiohttp.ClientResponse, version: str) -> web.StreamResponse:
    """Forward server-sent events, each as soon as it is complete. If vLLM breaks off, so does the connection: with a regular end, half a
    turn would pass for a whole one."""
    response = web.StreamResponse(status=upstream.status, headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    events = Events(version)
    try:
        async for data in upstream.content.iter_any():
            whole = events.feed(data)
            if events.aborted:
                break
            if whole:
                await response.write(whole)
    except (aiohttp.ClientError, OSError):
        events.aborted = True
    if (events.aborted or not events.ended) and request.transport is not None:
        request.transport.abort()
    return response


class Events:
    """Server-sent events of one answer, however they are split in transit, renamed to the version."""

    def __init__(self, version: str) -> None:
        self._version, self._pending = version, b""
        self.ended = False
        """The last event, which closes a stream, has arrived."""
        self.aborted = False
        """vLLM ended before the turn did."""

    def feed(self, data: bytes) -> bytes:
        """Return the events that are complete now."""
        whole, separator, self._pending = (self._pending + data).rpartition(b"\n\n")
        self.ended = self.ended or whole.endswith(_LAST_EVENT)
        self.aborted = self.aborted or _ABORTED in whole
        return whole.replace(_NAME, _named(self._version)) + separator


def _renamed(answer: bytes, version: str) -> bytes:
    return answer.replace(_NAME, _named(version), 1)


def _named(version: str) -> bytes:
    return f'"model":"{version}"'.encode()
