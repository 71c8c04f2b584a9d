"""A scaffold's request: validated, and split into the state and what the spec decides."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dagger_operator.policy.wire import without_nulls
from dagger_operator.store.records import Message

_FORWARDED = frozenset({"tool_choice", "parallel_tool_calls", "response_format", "stop"})
"""Part of the request's meaning, so both student and teacher get them."""

_OVERRIDDEN = frozenset(
    {"model", "stream_options", "seed", "reasoning_effort", "temperature", "top_p", "top_k", "min_p", "max_tokens"}
    | {"max_completion_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty"}
)
"""Decided by the spec for every turn, whatever the scaffold sends."""

_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "priority", "prompt_cache_key", "safety_identifier", "cache_salt"})
"""Bookkeeping that does not affect the answer."""


class UnsupportedRequest(ValueError):
    """A request that cannot be honoured; `field` names the offending part."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(f"{field}: {message}")


@dataclass(frozen=True)
class ChatRequest:
    """One request for a turn. Two are equal if they ask for the same turn at the same state."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    """Tool schemas; empty if there are none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The other options that affect the answer, such as `stop`."""
    model: str = field(default="policy", compare=False)
    """Model name in the scaffold's request; the answer repeats it, so that the scaffold never learns who acted."""
    stream: bool = field(default=False, compare=False)
    include_usage: bool = field(default=False, compare=False)
    """Whether a streamed answer ends with a chunk of token counts."""


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """Parse a body of `/v1/chat/completions`. Raises `UnsupportedRequest`, which names the field."""
    for name, value in body.items():
        _check(name, value)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise UnsupportedRequest("messages", "a list of at least one message, each an object with a role")
    tools = body.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnsupportedRequest("tools", "a list of tool schemas")
    stream_options = body.get("stream_options") or {}
    return ChatRequest(
        messages=tuple(without_nulls(message) for message in messages),
        tools=tuple(tools),
        options={name: body[name] for name in sorted(_FORWARDED) if body.get(name) is not None},
        model=str(body.get("model") or "policy"),
        stream=bool(body.get("stream")),
        include_usage=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
    )


def _check(name: str, value: Any) -> None:
    if name in ("messages", "tools", "stream") or name in _FORWARDED or name in _OVERRIDDEN or name in _IGNORED:
        return
    if not value or (name == "n" and value == 1):
        return
    if name == "n":
        raise UnsupportedRequest("n", f"a turn is one action, got {value!r}: leave it out, or write 1")
    if name in ("functions", "function_call"):
        raise UnsupportedRequest(name, "deprecated by the OpenAI API: use tools and tool_choice")
    if name in ("logprobs", "top_logprobs"):
        raise UnsupportedRequest(name, "turns are recorded as text, without log-probabilities: leave it out")
    raise UnsupportedRequest(name, "not supported by the policy gateway: leave it out")
