"""Asks one policy for a turn: retries transient failures and reports permanent ones.

Errors: `PolicyUnavailable` (infrastructure) and `PolicyRefused` (the policy's own); see `failures`.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from yarl import URL

from dagger_operator.policy.failures import CONTEXT_TOO_LONG, PolicyRefused, PolicyUnavailable
from dagger_operator.policy.metrics import GatewayMetrics
from dagger_operator.policy.replicas import Replicas
from dagger_operator.policy.request import ChatRequest
from dagger_operator.policy.retry import retry_after_seconds
from dagger_operator.policy.streaming import DONE, Assembler, Chunk, EventParser, chunks_of, without_logprobs
from dagger_operator.policy.upstream import Upstream
from dagger_operator.policy.wire import InvalidWire, dump, parse, without_nulls
from dagger_operator.store import logprobs
from dagger_operator.store.records import Completion

CONNECT_SECONDS = 10.0
_REFUSALS = (400, 413, 422)
"""Statuses caused by the state that was sent; all others are caused by the connection or the endpoint."""
_QUOTED = 500
"""Characters of a policy's response that a message quotes."""
_TOO_LONG = (
    *("context_length_exceeded", "context length", "context window", "prompt is too long"),
    # vLLM's messages for a prompt longer than its context, and for one that fills it: we never ask for less than one token.
    *("maximum model length", "max_tokens must be at least 1"),
)
"""How endpoints describe a state that is too long, in lower case."""


@dataclass(frozen=True)
class Answer:
    """A policy's turn."""

    payload: dict[str, Any]
    """The `chat.completion` as received, or as assembled from its stream, without log-probabilities that only labels need."""
    completion: Completion


class _Passing(Exception):
    """A transient failure, which may be gone at the next try."""

    def __init__(self, reason: str, message: str, *, retry_after: float | None = None, unreachable: bool = False) -> None:
        self.reason, self.retry_after, self.unreachable = reason, retry_after, unreachable
        super().__init__(message)


class Client:
    """The connections to one policy."""

    def __init__(self, upstream: Upstream, metrics: GatewayMetrics) -> None:
        self.upstream = upstream
        self._metrics = metrics
        # Only our own Services are headless: an endpoint's name is also needed for its certificate and its virtual host.
        self._replicas = Replicas(upstream.urls, resolve=upstream.served)
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        authorization = {"Authorization": f"Bearer {self.upstream.token}"} if self.upstream.token else {}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Content-Type": "application/json", **authorization},
            timeout=aiohttp.ClientTimeout(total=self.upstream.timeout_seconds, sock_connect=CONNECT_SECONDS),
            # Endpoints may be reached through a proxy (HTTPS_PROXY); our own servers never are.
            trust_env=not self.upstream.served,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._http is not None:
            await self._http.close()

    async def complete(
        self,
        request: ChatRequest,
        *,
        seed: int,
        priority: int,
        affinity: str,
        forward: Callable[[Chunk], None] | None = None,
        failing: Callable[[PolicyUnavailable], None] = lambda why: None,
    ) -> Answer:
        """Return the policy's turn at this state. With `forward` it is streamed: `forward` gets every chunk as it arrives, none twice.
        `failing` is called for each failed try that is followed by another.

        `affinity` keeps a rollout at one replica. Raises `PolicyUnavailable`, `PolicyRefused`.
        """
        body = self.upstream.body(request, stream=forward is not None, seed=seed, priority=priority)
        role = self.upstream.role.value
        failures = 0
        while True:
            url = ""
            try:
                url = await self._replicas.pick(affinity)
                return await self._try(url, body, forward)
            except (PolicyUnavailable, PolicyRefused) as error:
                self._metrics.failures.labels(role, error.reason).inc()
                raise
            except (_Passing, OSError) as error:
                passing = error if isinstance(error, _Passing) else _Passing("Unreachable", f"{type(error).__name__}: {error}")
                failures += 1
                if passing.unreachable:
                    self._replicas.unreachable(url)
                unavailable = PolicyUnavailable(passing.reason, self._say(url, f"{passing} (tried {failures} times)"))
                if failures >= self.upstream.attempts:
                    self._metrics.failures.labels(role, passing.reason).inc()
                    raise unavailable from error
                failing(unavailable)
                self._metrics.retries.labels(role, passing.reason).inc()
                await asyncio.sleep(self.upstream.backoff.wait(failures, passing.retry_after))

    async def _try(self, url: str, body: dict[str, Any], forward: Callable[[Chunk], None] | None) -> Answer:
        assert self._http is not None, "Client is an async context manager"
        started = time.monotonic()
        k = self.upstream.top_logprobs
        stream = _Stream(forward, self._check_error, lambda chunk: self._check_version(url, chunk), bare=k > 0) if forward else None
        whole = b""
        try:
            async with self._http.post(f"{url}/chat/completions", data=dump(body), allow_redirects=False) as response:
                if response.status != 200:
                    raise self._refusal(url, response, await response.text(errors="replace"))
                if stream and response.content_type == "text/event-stream":
                    payload = await stream.read(response)
                else:
                    whole = await response.read()
                    payload = parse(whole)
                    self._check_error(payload)
                    self._check_version(url, payload)
            completion = completion_of(payload, self.upstream.version, time.monotonic() - started, k)
            if k:
                without_logprobs(payload)
            if stream and not stream.forwarded:
                stream.send(chunks_of(payload))
            return Answer(payload, completion)
        except (aiohttp.ClientError, TimeoutError, InvalidWire, OSError, _Passing) as error:
            if stream and stream.forwarded:
                # The scaffold has already read part of this turn: a second try would be another turn.
                raise PolicyUnavailable("BrokenStream", self._say(url, f"the stream broke off: {error}")) from error
            raise _passing(error, self.upstream.timeout_seconds, self._quoted(whole.decode(errors="replace"))) from error

    def _check_error(self, payload: dict[str, Any]) -> None:
        """Raise if the payload is an error. Providers also fail with HTTP 200 once they have started to answer."""
        if error := _error_in(payload):
            raise _Passing("ServerError", f"an error with HTTP 200: {self._quoted(str(error))}")

    def _check_version(self, url: str, payload: dict[str, Any]) -> None:
        """Raise unless a served policy's answer names the requested version: nothing else may be recorded under it."""
        found = payload.get("model")
        if self.upstream.served and found != self.upstream.version:
            raise PolicyUnavailable("WrongVersion", self._say(url, f"asked for policy {self.upstream.version}, {found!r} answered"))

    def _refusal(self, url: str, response: aiohttp.ClientResponse, text: str) -> Exception:
        status, message = response.status, f"HTTP {response.status}: {self._quoted(text)}"
        if status == 429 or status in (408, 409, 425) or status >= 500:
            retry_after = retry_after_seconds(response.headers.get("Retry-After"))
            # A replica's agent answers so while its vLLM restarts: another replica may be serving.
            away = status == 503 and self.upstream.served
            return _Passing("RateLimited" if status == 429 else "ServerError", message, retry_after=retry_after, unreachable=away)
        message = self._say(url, message)
        if status in _REFUSALS:
            too_long = status == 413 or any(sign in text.lower() for sign in _TOO_LONG)
            return PolicyRefused(CONTEXT_TOO_LONG if too_long else "BadRequest", message)
        if status in (401, 403):
            return PolicyUnavailable("Unauthorized", f"{message}: check the token in the policy's Secret")
        if status == 402:
            return PolicyUnavailable("PaymentRequired", f"{message}: the endpoint wants to be paid")
        if status == 404:
            return PolicyUnavailable(
                "WrongVersion" if self.upstream.served else "NotFound", f"{message}: asked for model {self.upstream.model}"
            )
        if status < 400:
            return PolicyUnavailable("Redirected", f"{message}: write the URL that it redirects to")
        return PolicyUnavailable("TurnedAway", f"{message}: look at the endpoint, and at the proxies on the way to it")

    def _say(self, url: str, message: str) -> str:
        """Return a message that names the policy and contains no secret, even if the server echoes one."""
        where = URL(url).origin() if url else ", ".join(str(URL(each).origin()) for each in self.upstream.urls)
        return f"{self.upstream.role} at {where}: {self._without_secret(message)}"

    def _quoted(self, text: str) -> str:
        """Return the beginning of the policy's response. Secrets are removed before it is cut, so that no part of one remains."""
        return self._without_secret(text)[:_QUOTED]

    def _without_secret(self, text: str) -> str:
        return text.replace(self.upstream.token, "***") if self.upstream.token else text


class _Stream:
    """Forwards a stream while assembling it."""

    def __init__(
        self, forward: Callable[[Chunk], None], check: Callable[[Chunk], None], check_first: Callable[[Chunk], None], *, bare: bool
    ) -> None:
        """`check` sees each chunk before it is forwarded, `check_first` only the first; they raise if the chunk is unacceptable. `bare`:
        forward no log-probabilities."""
        self._forward, self._check, self._check_first, self._bare = forward, check, check_first, bare
        self.forwarded = False

    async def read(self, response: aiohttp.ClientResponse) -> dict[str, Any]:
        parser, assembler = EventParser(), Assembler()
        async for data in response.content.iter_any():
            for event in parser.feed(data):
                if event == DONE:
                    return assembler.answer()
                chunk = parse(event)
                self._check(chunk)
                if not self.forwarded:
                    self._check_first(chunk)
                assembler.add(chunk)
                if self._bare:
                    without_logprobs(chunk)
                self.send([chunk])
        return assembler.answer()

    def send(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self.forwarded = True
            self._forward(chunk)


def _error_in(payload: dict[str, Any]) -> Any:
    """Return the error, or None. OpenRouter may also report it in a choice, whose finish reason is then `error`."""
    choice = _first_choice(payload)
    of_choice = choice.get("error") or "finish_reason is error" if choice.get("finish_reason") == "error" else None
    return payload.get("error") or of_choice


def _first_choice(payload: dict[str, Any]) -> dict[str, Any]:
    choices = payload.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _passing(error: Exception, timeout: float, said: str) -> _Passing:
    """Convert an error. `said`: the beginning of the answer, if it arrived whole."""
    if isinstance(error, _Passing):
        return error
    if isinstance(error, InvalidWire):
        return _Passing("Garbled", f"{error}: {said}" if said else str(error))
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return _Passing("Unreachable", f"no connection within {CONNECT_SECONDS:g} s", unreachable=True)
    if isinstance(error, TimeoutError):
        return _Passing("Timeout", f"no answer within {timeout:g} s")
    # str() may be empty: then the class name is all there is to report.
    return _Passing("Unreachable", f"{type(error).__name__}: {error}", unreachable=True)


def completion_of(payload: dict[str, Any], version: str, seconds: float, top_logprobs: int = 0) -> Completion:
    """Return the record of an answer that was asked for `top_logprobs` log-probabilities. Raises `InvalidWire` if it holds no turn."""
    choice = _first_choice(payload)
    message, reason = choice.get("message"), choice.get("finish_reason")
    if not isinstance(message, dict) or not isinstance(reason, str):
        raise InvalidWire("an answer without choices[0].message and finish_reason")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if not (content is None or isinstance(content, str)) or not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise InvalidWire("an answer whose content is no text, or whose tool calls are no list of functions")
    record = {**without_nulls(message), "role": "assistant", "content": content if calls else content or ""}
    if not calls:
        record.pop("tool_calls", None)
    usage = payload.get("usage") or {}
    return Completion(
        message=record,
        policy=version,
        finish_reason=reason,
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(usage.get("prompt_tokens_details") or {}, "cached_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
        latency_seconds=seconds,
        logprobs=logprobs.told(choice, top_logprobs) if top_logprobs else None,
    )


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and isinstance(function.get("arguments"), str)


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
