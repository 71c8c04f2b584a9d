"""Streamed chat completions (server-sent events): parsing, assembling them into one answer, and producing them from an answer."""

import time
from typing import Any

from dagger_operator.policy.wire import InvalidWire

Chunk = dict[str, Any]
"""A `chat.completion.chunk`."""

DONE = b"[DONE]"
"""Payload of the last event."""


class EventParser:
    """Splits a byte stream into the data of its events, wherever the network fragmented it."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes; return the data of every event that they complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events


class Assembler:
    """Assembles chunks into the answer that an unstreamed request would have got."""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._parts: dict[str, list[str]] = {}
        self._other: dict[str, Any] = {}
        self._calls: list[dict[str, Any]] = []
        self._usage: dict[str, Any] | None = None
        self._logprobs: list[Any] = []
        self.finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        """Add a chunk. Raises `InvalidWire` if it is malformed."""
        for name in ("id", "created", "model", "system_fingerprint"):
            if chunk.get(name) is not None:
                self._head.setdefault(name, chunk[name])
        if isinstance(chunk.get("usage"), dict):
            self._usage = chunk["usage"]
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise InvalidWire("a chunk without a list of choices")
        for choice in choices:
            if choice.get("index", 0) != 0:
                continue
            self._add_delta(choice.get("delta") or {})
            told = choice.get("logprobs")
            if isinstance(told, dict) and isinstance(content := told.get("content"), list):
                self._logprobs += content
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def _add_delta(self, delta: Any) -> None:
        if not isinstance(delta, dict):
            raise InvalidWire("a chunk whose delta is no object")
        for name, value in delta.items():
            if name == "tool_calls":
                for piece in value or []:
                    self._add_call(piece)
            elif name == "role" or value is None:
                continue
            elif isinstance(value, str):
                self._parts.setdefault(name, []).append(value)
            else:
                self._other[name] = value

    def _add_call(self, piece: Any) -> None:
        if not isinstance(piece, dict):
            raise InvalidWire("a chunk whose tool call is no object")
        # Some servers omit the index; then an id starts a call, and a piece without one continues the last call.
        index = piece.get("index")
        if not isinstance(index, int):
            index = len(self._calls) if piece.get("id") or not self._calls else len(self._calls) - 1
        if not 0 <= index <= len(self._calls):
            raise InvalidWire(f"a chunk for tool call {index} before tool call {len(self._calls)}")
        if index == len(self._calls):
            self._calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = self._calls[index], piece.get("function") or {}
        call["id"] = call["id"] or piece.get("id") or ""
        call["type"] = piece.get("type") or call["type"]
        for name in ("name", "arguments"):
            call["function"][name] += function.get(name) or ""

    def answer(self) -> dict[str, Any]:
        """Return the `chat.completion`. Raises `InvalidWire` if the stream ended before the turn did."""
        if self.finish_reason is None:
            raise InvalidWire("the stream ended without a finish_reason")
        message: dict[str, Any] = {"role": "assistant", "content": None, **{name: "".join(parts) for name, parts in self._parts.items()}}
        message |= self._other
        if self._calls:
            message["tool_calls"] = self._calls
            message["content"] = message["content"] or None
        elif message["content"] is None:
            message["content"] = ""
        answer = {"id": "", "created": int(time.time()), **self._head, "object": "chat.completion"}
        logprobs = {"logprobs": {"content": self._logprobs}} if self._logprobs else {}
        answer["choices"] = [{"index": 0, "message": message, "finish_reason": self.finish_reason, **logprobs}]
        return answer | ({"usage": self._usage} if self._usage else {})


def chunks_of(answer: dict[str, Any]) -> list[Chunk]:
    """Return an answer as an equivalent stream: the message, the finish reason, the token counts."""
    choice = answer["choices"][0]
    delta = {name: value for name, value in choice["message"].items() if value is not None}
    if delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(delta["tool_calls"])]
    head = {name: answer[name] for name in ("id", "created", "model") if name in answer} | {"object": "chat.completion.chunk"}
    chunks: list[Chunk] = [
        head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        head | {"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]},
    ]
    return chunks + ([head | {"choices": [], "usage": answer["usage"]}] if answer.get("usage") else [])


def without_logprobs(answer: dict[str, Any]) -> None:
    """Remove the log-probabilities from an answer or chunk, for a scaffold that did not ask for them."""
    for choice in answer["choices"]:
        if isinstance(choice, dict) and choice.get("logprobs") is not None:
            choice["logprobs"] = None


def finishes(chunk: Chunk) -> bool:
    """Whether this chunk ends the turn."""
    return any(choice.get("finish_reason") for choice in chunk["choices"])
