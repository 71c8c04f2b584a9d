"""Queries a policy like any client: every way in which an endpoint can fail becomes a `StageFailure` that says what to change."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn

import aiohttp

from dagger_operator.api import MaxTokensParameter, Role, Sampling
from dagger_operator.store import logprobs
from dagger_operator.store.logprobs import TopLogprobs
from dagger_operator.store.stage import StageFailure

Json = dict[str, Any]

_CONNECT_SECONDS = 10.0
_LONGEST_WAIT = 30.0


@dataclass(frozen=True)
class Policy:
    """One replica of a policy, and how to query it."""

    role: Role
    url: str
    """Base URL, up to but without `/chat/completions`."""
    token: str | None = field(repr=False)
    model: str
    sampling: Sampling
    served: bool
    """Whether it is served by vLLM behind our agent."""
    request_seconds: float
    """Timeout of one request."""
    patience_seconds: float
    """How long to retry transient errors (no connection, 429, 5xx)."""
    max_tokens_parameter: MaxTokensParameter = MaxTokensParameter.MAX_TOKENS
    top_logprobs: int = 0
    """Number of log-probabilities to request for each token."""


@dataclass(frozen=True)
class Answer:
    """A turn of the policy."""

    message: Json
    finish_reason: str
    usage: Json
    seconds: float
    logprobs: TopLogprobs | None
    """Log-probabilities of its tokens, if requested."""

    @property
    def thinks(self) -> bool:
        """Whether it contains thoughts: in its text, or where a server's reasoning parser puts them."""
        said = self.message.get("content") or ""
        return _has_thoughts(self.message) or "<think>" in said or "</think>" in said  # a prompt may open it, and the limit cut off its end


class Asker:
    """A connection to one replica. Every failure is a `StageFailure` whose reason starts with the role."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {policy.token}"} if policy.token else None,
            timeout=aiohttp.ClientTimeout(total=policy.request_seconds, sock_connect=_CONNECT_SECONDS),
            # Endpoints may be behind a proxy (HTTPS_PROXY); our own servers never are.
            trust_env=not policy.served,
        )

    async def __aenter__(self) -> "Asker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def models(self) -> list[Json] | None:
        """Return the entries of `/models`; None if the endpoint does not offer it."""
        status, text = await self._request("GET", "/models", None, needed=False)
        if status != 200:
            return None
        try:
            entries = json.loads(text)["data"]
        except (ValueError, KeyError, TypeError):
            return None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else None

    async def chat(self, messages: list[Json], **more: Any) -> Answer:
        """Request one turn, with the run's own sampling unless `more` overrides it."""
        started = time.monotonic()
        status, text = await self._request("POST", "/chat/completions", self._body(messages, more))
        if status != 200:
            self._refused(status, text)
        return self._answer(text, time.monotonic() - started)

    async def streamed(self, messages: list[Json]) -> str | None:
        """Stream a turn; return None if that works, otherwise what is wrong."""
        status, text = await self._request("POST", "/chat/completions", self._body(messages, {"stream": True}))
        if status != 200:
            return f"refused with status {status}: {self._said(text)}"
        events = [line.removeprefix("data:").strip() for line in text.splitlines() if line.startswith("data:")]
        if not events or events[-1] != "[DONE]":
            return "the answer is no stream of events that ends with [DONE]"
        try:
            choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices") or []]
        except (ValueError, AttributeError):
            return "an event is no JSON object"
        return None if any(choice.get("finish_reason") for choice in choices) else "no event holds a finish_reason"

    def fail(self, reason: str, message: str, *, permanent: bool = True) -> NoReturn:
        """Raise a `StageFailure` about this policy."""
        where = f"{self.policy.role} {self.policy.model!r} at {self.policy.url}"
        raise StageFailure(f"{self.policy.role.capitalize()}{reason}", f"{where}: {self._without_secret(message)}", permanent=permanent)

    @property
    def remedy_field(self) -> str:
        return f"{self.policy.role}.{'serving' if self.policy.served else 'endpoint'}"

    def _body(self, messages: list[Json], more: Mapping[str, Any]) -> Json:
        body = self.policy.sampling.asked(self.policy.max_tokens_parameter)
        return {"model": self.policy.model, "messages": messages, **body, **logprobs.asked(self.policy.top_logprobs), **more}

    async def _request(self, method: str, path: str, body: Json | None, *, needed: bool = True) -> tuple[int, str]:
        """Return status and text; transient errors are retried with back-off while patience lasts. Not `needed`: any status is accepted."""
        deadline, wait = time.monotonic() + self.policy.patience_seconds, 0.5
        while True:
            retry_after = 0.0
            try:
                async with self._session.request(method, self.policy.url + path, json=body, allow_redirects=False) as answer:
                    text = await answer.text(errors="replace")
                    if not needed or (answer.status != 429 and answer.status < 500):
                        return answer.status, text
                    reason, what = ("Overloaded", "answers 429") if answer.status == 429 else ("Failing", f"answers {answer.status}")
                    what += f": {self._said(text)}"
                    retry_after = _seconds(answer.headers.get("Retry-After"))
            except TimeoutError as error:
                if not isinstance(error, aiohttp.ConnectionTimeoutError):
                    self._slow()
                reason, what = "Unreachable", f"no connection within {_CONNECT_SECONDS:g} s"
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
                reason, what = "Unreachable", f"{type(error).__name__}: {error}"
            except (aiohttp.ClientError, ValueError) as error:
                self.fail("Garbled", f"what answers there does not speak HTTP as it should: {error}. Look at {self.remedy_field}.url")
            pause = min(max(wait, retry_after), _LONGEST_WAIT)
            if time.monotonic() + pause > deadline:
                self._given_up(reason, what)
            await asyncio.sleep(pause)
            wait *= 2

    def _given_up(self, reason: str, what: str) -> NoReturn:
        remedy = {
            "Overloaded": "wait until its rate limit allows more, or ask for a higher one",
            "Failing": "look at the logs of that server",
            "Unreachable": f"start it, or correct {self.remedy_field}.url" if not self.policy.served else "look at the logs of its pods",
        }[reason]
        self.fail(reason, f"{what} (tried for {self.policy.patience_seconds:g} s): {remedy}", permanent=False)

    def _slow(self) -> NoReturn:
        remedy = "use a faster endpoint, or one with less load"
        if not self.policy.served:
            remedy += f", or raise {self.policy.role}.endpoint.timeoutSeconds"
        self.fail("Slow", f"a short question was not answered within {self.policy.request_seconds:g} s: {remedy}", permanent=False)

    def _refused(self, status: int, text: str) -> NoReturn:
        said, role = self._said(text), self.policy.role
        match status:
            case 401 | 403:
                self.fail("Unauthorized", f"answers {status}: {said}: put a valid key into the Secret that {role}.endpoint.secretRef names")
            case 404:
                self.fail(
                    "Unknown", f"answers 404: {said}: correct {role}.endpoint.model, or {role}.endpoint.url, which mostly ends in /v1"
                )
            case _ if 300 <= status < 400:
                self.fail("Moved", f"answers {status}, a redirect: write its target as {role}.endpoint.url")
            case 400 if self.policy.max_tokens_parameter is MaxTokensParameter.MAX_TOKENS and "max_completion_tokens" in text:
                self.fail("Refuses", f"answers 400: {said}: write {role}.endpoint.maxTokensParameter MaxCompletionTokens")
            case _:
                fields = [f"{role}.sampling"]
                if self.policy.max_tokens_parameter is MaxTokensParameter.MAX_COMPLETION_TOKENS:
                    fields = [f"{role}.sampling (a temperature or topP of 1 is not sent)", f"{role}.endpoint.maxTokensParameter"]
                fields += ["labels.topLogprobs"] if self.policy.top_logprobs else []
                self.fail("Refuses", f"answers {status}: {said}: look at {' and '.join(fields)}, which it may not support")

    def _answer(self, text: str, seconds: float) -> Answer:
        try:
            found = json.loads(text)
            choice = found["choices"][0]
            message, reason = choice["message"], choice["finish_reason"]
            if not isinstance(message, dict) or not isinstance(reason, str):
                raise TypeError
            if not isinstance(message.get("content"), str) and not message.get("tool_calls") and not _has_thoughts(message):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError):
            self.fail("Garbled", f"its answer is no chat completion: {self._said(text)}: {self.remedy_field} must speak the OpenAI API")
        return Answer(message, reason, found.get("usage") or {}, seconds, logprobs.told(choice, self.policy.top_logprobs))

    def _said(self, text: str) -> str:
        """Return the message of an error in a body, otherwise the body's beginning."""
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            pass
        # Remove the secret before truncating, which could otherwise leave its first part.
        return " ".join(self._without_secret(text).split())[:300] or "an empty body"

    def _without_secret(self, text: str) -> str:
        return text.replace(self.policy.token, "***") if self.policy.token else text


def _has_thoughts(message: Json) -> bool:
    """Whether a reasoning parser found any; a turn that was cut off while thinking has nothing else."""
    return bool(message.get("reasoning") or message.get("reasoning_content"))


def _seconds(header: str | None) -> float:
    """Return the seconds of a Retry-After header (seconds or a date); 0 if it is missing or unreadable."""
    if header is None:
        return 0.0
    try:
        return float(header)
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
