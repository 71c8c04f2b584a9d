"""The policy gateway: an OpenAI-compatible server, in the rollout worker, with a base URL and a token for each rollout."""

import asyncio
import contextlib
import resource
import secrets
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from dagger_operator.api import Labels
from dagger_operator.policy.act import Act, TurnDropped
from dagger_operator.policy.client import Client
from dagger_operator.policy.failures import CONTEXT_TOO_LONG, PolicyRefused, PolicyUnavailable
from dagger_operator.policy.labels import Labeller
from dagger_operator.policy.metrics import GatewayMetrics
from dagger_operator.policy.request import ChatRequest, UnsupportedRequest, chat_request
from dagger_operator.policy.rollout_session import RolloutSession, TurnLimit
from dagger_operator.policy.session import SessionRequest
from dagger_operator.policy.streaming import DONE
from dagger_operator.policy.upstream import Upstream
from dagger_operator.policy.wire import InvalidWire, dump, parse

MODEL = "policy"
"""The only model name that scaffolds see."""
LARGEST_REQUEST = 8 << 20
"""Bytes, the limit of the policy agent (`serving.proxy`). A state of a million tokens has about 5 MB. Malicious JSON can take 25 times its
size in memory, and all rollouts of the worker wait while it is parsed."""
_LARGE_REQUEST = 1 << 20
"""Bytes above which a request is parsed in a thread."""
_OPEN_FILES = 65536


class Gateway:
    """Serves the sessions of one worker.

        async with Gateway(student, teacher, labels) as gateway:
            session = gateway.open(request)
            ...  # a scaffold talks to session.base_url with session.token
            recording = await session.finish()

    `teacher` is None in evaluation, where `student` is greedy. `host` and `port` are the address to listen on (port 0: any);
    `advertise` is the host in base URLs, if scaffolds run elsewhere.
    """

    def __init__(
        self,
        student: Upstream,
        teacher: Upstream | None,
        labels: Labels,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        advertise: str | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._metrics = GatewayMetrics(registry or CollectorRegistry())
        self._student_version = student.version
        self._student = Client(student, self._metrics)
        self._teacher = Client(teacher, self._metrics) if teacher else None
        self._labeller = Labeller(self._teacher, labels.concurrency, self._metrics) if self._teacher else None
        self._host, self._advertise, self._port = host, advertise or host, port
        self._sessions: dict[str, RolloutSession] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        _raise_open_files()
        for client in filter(None, (self._student, self._teacher)):
            await self._stack.enter_async_context(client)
        app = web.Application(client_max_size=LARGEST_REQUEST)
        app.router.add_post("/{rollout}/v1/chat/completions", self._completions)
        app.router.add_get("/{rollout}/v1/models", self._models)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, self._host, self._port, backlog=4096).start()
        self._port = runner.addresses[0][1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for session in list(self._sessions.values()):
            await session.abort()
        await self._stack.aclose()

    @property
    def address(self) -> str:
        """Address that it listens on, as host:port."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    def open(self, request: SessionRequest) -> RolloutSession:
        """Open a rollout's session. Raises `ValueError` if this gateway cannot serve the request."""
        key = request.rollout_id
        if key in self._sessions:
            raise ValueError(f"rollout_id {key!r} is open already: finish or abort it first")
        if request.student != self._student_version:
            raise ValueError(f"student {request.student!r} must act, but this gateway was made for {self._student_version!r}")
        if (request.mixing is None) != (self._teacher is None):
            has = "it has none" if self._teacher is None else "it has one"
            raise ValueError(
                f"rollout_id {key!r} has mixing {request.mixing!r}, which belongs exactly where this gateway has a teacher ({has}): "
                "make the gateway with a teacher for rounds, or set mixing to None for evaluation"
            )
        self._sessions[key] = session = RolloutSession(
            request,
            base_url=f"http://{self._advertise}:{self._port}/{quote(key, safe='')}/v1",
            token=secrets.token_urlsafe(32),
            student=self._student,
            teacher=self._teacher,
            labeller=self._labeller,
            metrics=self._metrics,
            on_close=lambda: self._close(key, session),
        )
        self._metrics.sessions.set(len(self._sessions))
        return session

    def _close(self, key: str, session: RolloutSession) -> None:
        if self._sessions.get(key) is session:
            del self._sessions[key]
            self._metrics.sessions.set(len(self._sessions))

    def _session(self, http: web.Request) -> RolloutSession | None:
        session = self._sessions.get(http.match_info["rollout"])
        given = http.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        expected = session.token if session else secrets.token_urlsafe(32)
        return session if secrets.compare_digest(given.encode(errors="surrogateescape"), expected.encode()) else None

    async def _models(self, http: web.Request) -> web.StreamResponse:
        if self._session(http) is None:
            return _unknown_rollout()
        return web.json_response(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "dagger-operator"}]}
        )

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        session = self._session(http)
        if session is None:
            return _unknown_rollout()
        try:
            # A body stays unread, in the network, until the previous one has been given its turn: a scaffold may send any number.
            async with session.admission:
                session.check()
                request = chat_request(await _parsed(await http.read()))
                act = await session.turn(request)
            respond: Callable[[web.Request, ChatRequest, Act], Awaitable[web.StreamResponse]] = _stream if request.stream else _whole
            return await respond(http, request, act)
        except web.HTTPRequestEntityTooLarge:
            return _refused(413, "request_too_large", f"a request may have {LARGEST_REQUEST} bytes at most")
        except UnsupportedRequest as error:
            return _refused(400, "unsupported", str(error), param=error.field)
        except InvalidWire as error:
            return _refused(400, "invalid_body", str(error))
        except TurnLimit as error:
            return _refused(409, "turn_limit", str(error))
        except PolicyUnavailable as error:
            return _refused(503, "policy_unavailable", str(error))
        except PolicyRefused as error:
            return _refused(400, "context_length_exceeded" if error.reason == CONTEXT_TOO_LONG else "policy_refused", str(error))
        except TurnDropped:
            return _refused(410, "session_closed", "this rollout has ended")


async def _parsed(body: bytes) -> dict[str, Any]:
    return await asyncio.to_thread(parse, body) if len(body) > _LARGE_REQUEST else parse(body)


async def _whole(http: web.Request, request: ChatRequest, act: Act) -> web.StreamResponse:
    return web.Response(body=dump(await act.answer() | {"model": request.model}), content_type="application/json")


async def _stream(http: web.Request, request: ChatRequest, act: Act) -> web.StreamResponse:
    """Stream a turn. A failure before the first chunk is raised and gets its own status; a later one cuts the connection."""
    response: web.StreamResponse | None = None
    try:
        async for chunk in act.stream():
            if not chunk["choices"] and not request.include_usage:
                continue
            if response is None:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
                await response.prepare(http)
            await response.write(b"data: %b\n\n" % dump(chunk | {"model": request.model}))
        assert response is not None, "an answer has at least one chunk"
        await response.write(b"data: %b\n\n" % DONE)
        await response.write_eof()
    except ConnectionError:
        structlog.get_logger().info("a scaffold went away in the middle of a turn", rollout=http.match_info["rollout"])
        return response or web.Response()
    except (PolicyUnavailable, PolicyRefused, TurnDropped):
        if response is None:
            raise
        if http.transport is not None:
            http.transport.abort()
    return response


def _refused(status: int, code: str, message: str, *, param: str | None = None) -> web.Response:
    error: dict[str, Any] = {"message": message, "type": "policy_gateway", "code": code, "param": param}
    # OpenAI's own client retries 409 and 503; this gateway has already retried everything that is worth retrying.
    return web.json_response({"error": error}, status=status, headers={"x-should-retry": "false"})


def _unknown_rollout() -> web.Response:
    return _refused(401, "unknown_rollout", "no open rollout has this base URL and token")


def _raise_open_files() -> None:
    """Raise the soft limit: a rollout holds up to three connections, and the usual 1024 files are meant for programs that call select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than their hard limit says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
