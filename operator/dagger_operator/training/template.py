"""The student's chat template, applied exactly as the server applies it, so that training sees the tokens that acting sees.

vLLM hands a template not the request's messages but what it made of them (`vllm/renderers/chat_utils.py`, 0.32): absent content is
the empty string, parts of text are joined, arguments of tool calls are objects. The same is done here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dagger_operator.store.records import Message
from dagger_operator.store.stage import StageFailure

Tools = Sequence[Mapping[str, Any]]


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    eos_token: str

    @property
    def added_tokens_encoder(self) -> Mapping[str, int]: ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any: ...


class StudentTemplate:
    """Renders states and labels as the student's tokens.

    `options` are the template's own variables, such as `enable_thinking`, where the server sets them.
    """

    def __init__(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self._tokenise = _memo(lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]))
        self._openers = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._cuts, self._unchecked = True, 8

    def prompt(self, messages: Sequence[Message], tools: Tools | None) -> list[int]:
        """Tokens of a state: what the student is given before its turn."""
        return self.tokens(self._render(messages, tools, prompt=True))

    def label(self, messages: Sequence[Message], tools: Tools | None, label: Message) -> list[int]:
        """Tokens of a turn at that state, its end-of-turn token last: what the student should have said.

        Raises `StageFailure` where the template renders no such turn.
        """
        prompt = self._render(messages, tools, prompt=True)
        for turn in (label, _without_reasoning(label)):  # a prompt that closes the thinking leaves no place for the teacher's
            whole = self._render([*messages, turn], tools)
            if whole.startswith(prompt):
                text = whole[len(prompt) :]
                break
        else:
            # The template renders the state another way once a turn follows it, as when it drops earlier thinking.
            text = self._alone(_without_reasoning(label), tools)
        end = text.rfind(self._tokenizer.eos_token)
        return self.tokens(text[:end] + self._tokenizer.eos_token if end >= 0 else text.rstrip("\n") + self._tokenizer.eos_token)

    def _alone(self, label: Message, tools: Tools | None) -> str:
        """A turn's own text in a conversation in which nothing is earlier: what follows the header that every turn has."""
        opening: list[Message] = [{"role": "user", "content": "."}]
        first, second = (self._render([*opening, {"role": "assistant", "content": probe}], tools) for probe in ("a", "b"))
        header = first[: next(i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y)]
        whole = self._render([*opening, label], tools)
        if not whole.startswith(header):
            raise StageFailure(
                "TemplateUnsupported",
                "the student's chat template writes a turn with tool calls under another header than one with text: "
                "use a template in which every assistant turn begins alike",
            )
        return whole[len(header) :]

    def _render(self, messages: Sequence[Message], tools: Tools | None, *, prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [_served(message) for message in messages],
                tools=[_served_tool(tool) for tool in tools] if tools else None,
                add_generation_prompt=prompt,
                tokenize=False,
                **self._options,
            )
        except Exception as error:  # a template is a program of its author: it may raise anything
            raise StageFailure(
                "TemplateFailed", f"the student's chat template refuses a conversation that was recorded: {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text.

        Added tokens part a text before anything else is done with it, so each message is tokenised once although it is rendered in
        every state after it; where a tokenizer looks across such a border, it is seen here and nothing is cut.
        """
        pieces = self._pieces(text)
        if len(pieces) == 1:
            return list(self._tokenise(text))
        ids = [token for piece in pieces for token in self._tokenise(piece)]
        if self._unchecked > 0:
            self._unchecked -= 1
            whole = self._tokenise(text)
            self._cuts = self._cuts and ids == whole
            return list(whole)
        return ids

    def _pieces(self, text: str) -> list[str]:
        opener = next((token for token in self._openers if text.startswith(token)), None) if self._cuts else None
        if opener is None:
            return [text]
        return [opener + piece for piece in text.split(opener)[1:]]


def _memo(function: Callable[[str], list[int]], entries: int = 4096) -> Callable[[str], list[int]]:
    """Remembers the latest results; `functools.lru_cache` would keep hold of every tokenizer."""
    known: dict[str, list[int]] = {}

    def remembered(text: str) -> list[int]:
        if (found := known.get(text)) is None:
            if len(known) >= entries:
                known.pop(next(iter(known)))
            found = known[text] = function(text)
        return found

    return remembered


def _served(message: Message) -> dict[str, Any]:
    """A message as the server hands it to the template."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(part if isinstance(part, str) else part.get("text", "") for part in content)
    served: dict[str, Any] = {"role": message["role"], "content": content or ""}
    if message["role"] == "assistant":
        if calls := message.get("tool_calls"):
            served["tool_calls"] = [_served_call(call) for call in calls]
        if (reasoning := message.get("reasoning") or message.get("reasoning_content")) is not None:
            served["reasoning"] = served["reasoning_content"] = reasoning
    elif message["role"] == "tool" and "tool_call_id" in message:
        served["tool_call_id"] = message["tool_call_id"]
    if isinstance(message.get("name"), str):
        served["name"] = message["name"]
    return served


def _without_reasoning(message: Message) -> Message:
    """A turn as a student says it that does not think aloud."""
    content = message.get("content")
    bare = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    return bare | {"content": content.rpartition("</think>")[2].lstrip("\n")} if isinstance(content, str) else bare


def _served_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}


def _served_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema in the order and with the absent fields of the server's own model: templates write it out as JSON."""
    given = tool["function"]
    function = {name: given.get(name) for name in ("name", "description", "parameters")}
    function |= {name: given[name] for name in ("strict", "defer_loading") if given.get(name) is not None}
    return {"type": tool.get("type", "function"), "function": function}


def template_options(server_arguments: Sequence[str]) -> dict[str, Any]:
    """Variables that a server's command line sets for every template: vLLM's `--default-chat-template-kwargs`."""
    flag = "--default-chat-template-kwargs"
    for position, argument in enumerate(server_arguments):
        name, _, value = argument.partition("=")
        if name == flag:
            options: dict[str, Any] = json.loads(value or server_arguments[position + 1])
            return options
    return {}
