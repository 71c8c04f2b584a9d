"""A policy server on loopback that can be made to misbehave, and gateways in front of it."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from dagger_operator.api import LabelMode, Labels, Mixing, Role, Sampling, Schedule, ScheduleType
from dagger_operator.policy.gateway import Gateway
from dagger_operator.policy.retry import Backoff
from dagger_operator.policy.rollout_session import RolloutSession
from dagger_operator.policy.session import SessionRequest
from dagger_operator.policy.upstream import Upstream

Behaviour = Callable[["StubPolicy", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class StubPolicy:
    """Answers `<name> at <number of messages>`; what `script` holds is done first, one entry a request."""

    name: str
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    script: deque[Behaviour] = field(default_factory=deque)
    always: Behaviour | None = None
    delay: float = 0.0
    active: int = 0
    peak: int = 0
    cancelled: int = 0

    def answer(self, body: dict[str, Any], **message: Any) -> dict[str, Any]:
        """The `chat.completion` of this policy for a request."""
        return {
            "id": f"chatcmpl-{len(self.requests)}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": f"{self.name} at {len(body['messages'])}", "refusal": None, **message},
                    "finish_reason": "tool_calls" if message.get("tool_calls") else "stop",
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 8}},
        }

    async def handle(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.requests.append(body)
        self.tokens.append(http.headers.get("Authorization"))
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            if self.delay:
                await asyncio.sleep(self.delay)
            behaviour = self.script.popleft() if self.script else self.always
            if behaviour is not None:
                return await behaviour(self, http, body)
            if body.get("stream"):
                return await self.stream(http, self.chunks(body))
            return web.json_response(self.answer(body))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.active -= 1

    def chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The stream of this policy for a request, a few characters a chunk."""
        head = {"id": "chatcmpl-s", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        text = f"{self.name} at {len(body['messages'])}"
        deltas: list[dict[str, Any]] = [
            {"role": "assistant", "content": ""},
            *({"content": text[i : i + 3]} for i in range(0, len(text), 3)),
        ]
        chunks = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        return [*chunks, head | {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}}]

    async def stream(
        self, http: web.Request, chunks: list[dict[str, Any]], *, cut: int | None = None, pause: float = 0.0
    ) -> web.StreamResponse:
        """Streams; `cut` writes the bytes in pieces of that size, wherever that cuts them."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        data = b"".join(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in chunks) + b"data: [DONE]\n\n"
        events = [data[i : i + cut] for i in range(0, len(data), cut)] if cut else data.split(b"\n\n")[:-1]
        for event in events:
            await response.write(event if cut else event + b"\n\n")
            await asyncio.sleep(pause)
        await response.write_eof()
        return response


async def start_app(stack: AsyncExitStack, app: web.Application) -> str:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


@pytest.fixture
async def policies() -> AsyncIterator[Callable[[str], Awaitable[StubPolicy]]]:
    """Starts policy servers."""
    async with AsyncExitStack() as stack:

        async def start(name: str) -> StubPolicy:
            stub = StubPolicy(name)
            app = web.Application(client_max_size=1 << 30)
            app.router.add_post("/v1/chat/completions", stub.handle)
            stub.url = await start_app(stack, app) + "/v1"
            return stub

        yield start


@pytest.fixture
async def student(policies: Callable[[str], Awaitable[StubPolicy]]) -> StubPolicy:
    return await policies("student")


@pytest.fixture
async def teacher(policies: Callable[[str], Awaitable[StubPolicy]]) -> StubPolicy:
    return await policies("teacher")


@pytest.fixture
def upstream() -> Callable[..., Upstream]:
    """An `Upstream` for URLs, impatient enough for tests."""

    def make(*urls: str, role: Role = Role.STUDENT, **changes: Any) -> Upstream:
        version = {"student": "r001-0123456789ab", "teacher": "r000-ba9876543210"}[role.value]
        defaults: dict[str, Any] = {
            "role": role,
            "urls": urls,
            "token": f"{role.value}-secret",
            "model": version,
            "version": version,
            "sampling": Sampling(temperature=0.7, top_p=0.9, max_tokens=64),
            "timeout_seconds": 20.0,
            "attempts": 3,
            "served": True,
            "backoff": Backoff(0.01, 0.05),
        }
        return Upstream(**(defaults | changes))

    return make


@dataclass
class Rig:
    """A gateway before a student and a teacher."""

    gateway: Gateway
    registry: CollectorRegistry
    http: aiohttp.ClientSession

    def open(self, **changes: Any) -> RolloutSession:
        defaults: dict[str, Any] = {
            "seed": 1,
            "round": 1,
            "rollout_id": "00000",
            "task_id": "t",
            "student": "r001-0123456789ab",
            "max_turns": 50,
            "label_check": lambda message: None,
            "mixing": Mixing(beta=Schedule(type=ScheduleType.CONSTANT, value=0.5)),
            "labels": LabelMode.ASYNC,
        }
        return self.gateway.open(SessionRequest(**(defaults | changes)))

    async def ask(self, session: RolloutSession, messages: list[dict[str, Any]], **body: Any) -> tuple[int, dict[str, Any]]:
        """One request; status and body."""
        async with self.http.post(
            f"{session.base_url}/chat/completions",
            json={"model": "any", "messages": messages, **body},
            headers={"Authorization": f"Bearer {session.token}"},
        ) as response:
            return response.status, await response.json()

    async def rollout(self, session: RolloutSession, turns: int) -> list[dict[str, Any]]:
        """Plays turns as a scaffold does: the answer and an observation are appended, then it asks again."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": "task"}]
        for number in range(turns):
            status, answer = await self.ask(session, messages)
            assert status == 200, answer
            messages = [*messages, answer["choices"][0]["message"], {"role": "user", "content": f"observation {number}"}]
        return messages


RigMaker = Callable[..., Any]


@pytest.fixture
def rig(upstream: Callable[..., Upstream]) -> RigMaker:
    """Opens a gateway: `async with rig(student, teacher) as r`."""

    @asynccontextmanager
    async def make(
        student: StubPolicy, teacher: StubPolicy | None, *, concurrency: int = 64, student_changes: Any = None, teacher_changes: Any = None
    ) -> AsyncIterator[Rig]:
        registry = CollectorRegistry()
        gateway = Gateway(
            upstream(student.url, **(student_changes or {})),
            upstream(teacher.url, role=Role.TEACHER, **(teacher_changes or {})) if teacher else None,
            Labels(concurrency=concurrency),
            registry=registry,
        )
        async with gateway, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            yield Rig(gateway, registry, http)

    return make
