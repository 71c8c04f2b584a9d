"""The actions in a policy's message, as the scaffold parses them.

The same reader is used for three purposes: the built-in scaffold executes what it reads, a label is trained on only if it can be read,
and student and teacher agree if their messages read the same.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dagger_operator.api import Protocol, Scaffold, ScaffoldType
from dagger_operator.rollout.library import library
from dagger_operator.rollout.templates import templates
from dagger_operator.store.records import Message


class NoAction(Exception):
    """A message holds no action that the protocol allows; the text says what is wrong with it."""


@dataclass(frozen=True)
class ActionReader:
    """Parses messages of one protocol."""

    read: Callable[[Message], tuple[str, ...]]
    """The actions of an assistant message, at least one, in comparable form; raises `NoAction`."""

    def flaw(self, message: Message) -> str | None:
        """Return what is wrong with a message, or None; the gateway checks labels with it."""
        try:
            self.read(message)
        except NoAction as error:
            return str(error)
        return None

    def agree(self, one: Message, other: Message) -> bool:
        """Whether two messages ask for the same actions."""
        try:
            return self.read(one) == self.read(other)
        except NoAction:
            return False


def action_reader(scaffold: Scaffold) -> ActionReader:
    """Return the reader for a scaffold's protocol. Text: exactly one action. ToolCall: one or more calls, all of them readable."""
    if scaffold.type is ScaffoldType.MINI_SWE_AGENT:
        return ActionReader(_commands_reader(scaffold.protocol, templates(scaffold).action_regex))
    if scaffold.protocol is Protocol.TOOL_CALL:
        return ActionReader(_tool_calls)
    return ActionReader(_text_reader(scaffold.action_regex))


def parse_commands(
    message: Message, protocol: Protocol, action_regex: str, *, format_error: str = "{{ error }}", finish_reason: str = "stop"
) -> list[dict[str, Any]]:
    """Parse a message's actions (`command`, `tool_call_id`) with the library's own parsers; raises the library's `FormatError`."""
    rendering: dict[str, Any] = {"format_error_template": format_error, "template_kwargs": {"finish_reason": finish_reason}}
    if protocol is Protocol.TEXT:
        return library().parse_text(message.get("content") or "", action_regex=action_regex, **rendering)
    calls = [
        SimpleNamespace(id=call.get("id"), function=SimpleNamespace(**{"name": "", "arguments": "", **call.get("function", {})}))
        for call in message.get("tool_calls") or []
    ]
    actions = library().parse_tool_calls(calls, **rendering)
    for action in actions:
        # The library accepts any JSON value; a shell needs text.
        action["command"] = action["command"] if isinstance(action["command"], str) else json.dumps(action["command"])
    return actions


def _commands_reader(protocol: Protocol, action_regex: str) -> Callable[[Message], tuple[str, ...]]:
    def read(message: Message) -> tuple[str, ...]:
        try:
            return tuple(action["command"].strip() for action in parse_commands(message, protocol, action_regex))
        except library().format_error as error:
            raise NoAction(error.messages[0]["content"]) from None  # type: ignore[attr-defined]  # the library is untyped

    return read


def _tool_calls(message: Message) -> tuple[str, ...]:
    """Parse calls of arbitrary tools, for scaffolds that bring their own: name and arguments, compared regardless of JSON spacing."""
    calls = message.get("tool_calls") or []
    if not calls:
        raise NoAction("no tool calls in the message")
    return tuple(_tool_call(call.get("function", {})) for call in calls)


def _tool_call(function: dict[str, Any]) -> str:
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except json.JSONDecodeError as error:
        raise NoAction(f"arguments of the tool call {function.get('name')!r} are no JSON: {error}") from None
    return json.dumps([function.get("name"), arguments], sort_keys=True)


def _text_reader(action_regex: str | None) -> Callable[[Message], tuple[str, ...]]:
    """Read the text of scaffolds with their own protocol: the matches of the resource's regex, or the whole message."""
    pattern = re.compile(action_regex, re.DOTALL) if action_regex else None

    def read(message: Message) -> tuple[str, ...]:
        content = (message.get("content") or "").strip()
        found = (
            [content] if pattern is None and content else [str(action).strip() for action in pattern.findall(content)] if pattern else []
        )
        if len(found) != 1:
            raise NoAction(f"expected exactly 1 action, found {len(found)}")
        return (found[0],)

    return read
